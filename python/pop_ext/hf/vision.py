"""Prefill vision-language models: run transformers' own wrapper around a native prefill of the language model.

The wrapper (``model.model``) runs the vision tower, inserts its features into the embeddings and computes positions.
Its ``forward`` runs on a shallow clone whose language model is replaced by a native prefill. The model itself is not
changed during the call, so other threads may use it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPast

from pop_ext.hf.compat import cache_field, with_cache
from pop_ext.hf.family import VisionSpec
from pop_ext.hf.inputs import PrefillRequest
from pop_ext.hf.restore import shallow_clone


def run_wrapper(
    wrapper: Any, spec: VisionSpec, request: PrefillRequest, run_decoder: Callable[[PrefillRequest], Any]
) -> Any:
    """Run a wrapper's stock forward, with a native prefill instead of its language model.

    The wrapper may assign attributes to itself, such as the position offset of later tokens. They are copied to the
    real wrapper after a successful call.

    Args:
        wrapper: ``model.model`` of a vision-language model.
        spec: description of the wrapper.
        request: its ``arguments`` are passed to the wrapper.
        run_decoder: takes a request with the wrapper's embeddings, positions and features, runs the language model,
            and returns a ``PrefillOutput``.

    Returns:
        The output of ``run_decoder``, with ``wrapper_output`` set.
    """
    outputs: list[Any] = []

    def language_model(
        input_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        visual_pos_masks: torch.Tensor | None = None,
        deepstack_visual_embeds: list[torch.Tensor] | None = None,
        **_: Any,
    ) -> BaseModelOutputWithPast:
        assert inputs_embeds is not None  # a wrapper always embeds
        outputs.append(
            run_decoder(
                replace(
                    request,
                    rows=request.packed.pack(inputs_embeds),
                    positions=_decoder_positions(request, spec, position_ids),
                    **_packed_features(request, inputs_embeds, visual_pos_masks, deepstack_visual_embeds),
                )
            )
        )
        return BaseModelOutputWithPast(
            last_hidden_state=outputs[0].hidden_states,
            **cache_field(BaseModelOutputWithPast, outputs[0].past_key_values),
        )

    decoder = shallow_clone(getattr(wrapper, spec.decoder))
    decoder.forward = language_model
    clone = shallow_clone(wrapper, **{spec.decoder: decoder})
    before = dict(clone.__dict__)
    arguments = dict(request.arguments)
    if spec.spans_argument is not None:
        arguments["attention_mask"] = {}  # an empty dict keeps the wrapper from making 4-D masks, which are not used
    cache = arguments.pop("past_key_values")
    result = type(wrapper).forward(clone, **arguments, **with_cache(wrapper, cache), return_dict=True)
    for name, value in clone.__dict__.items():
        if value is not before.get(name):
            wrapper.__dict__[name] = value
    return replace(outputs[0], wrapper_output=result)


def _decoder_positions(request: PrefillRequest, spec: VisionSpec, position_ids: torch.Tensor | None) -> torch.Tensor:
    """Return packed positions: those that the wrapper gives its language model, else those of the request."""
    packed = request.packed
    if position_ids is None:
        positions = request.positions
    else:
        if position_ids.ndim == 3:
            position_ids = position_ids[-3:]  # the first of four axes holds text positions, for masks
        # Positions that the wrapper computes from a mask cover the past, too: take those of the new columns.
        positions = packed.pack_positions(position_ids[..., -packed.columns :]).to(request.positions.device)
    return positions.expand(3, -1) if spec.uses_mrope else positions  # text has the same position on all axes


def _packed_features(
    request: PrefillRequest,
    inputs_embeds: torch.Tensor,
    mask: torch.Tensor | None,
    features: list[torch.Tensor] | None,
) -> dict[str, Any]:
    """Return the fields ``features`` and ``feature_index`` of a request (DeepStack); empty without features.

    Args:
        request: of the call.
        inputs_embeds: ``[batch, columns, hidden_size]``.
        mask: ``[batch, columns]`` bool, True for a column that features are added to. None: no such column.
        features: for each of the first layers ``[True columns of the mask, hidden_size]``.
    """
    if mask is None or not features:
        return {}
    index = torch.where(mask, mask.flatten().cumsum(0).view(mask.shape) - 1, -1)
    return {
        "feature_index": request.packed.pack(index.to(inputs_embeds.device)),
        "features": tuple(layer.to(inputs_embeds.device, inputs_embeds.dtype) for layer in features),
    }
