"""VisionSpec-language models: transformers' own wrapper around a native prefill of the language model.

The wrapper (``model.model``) runs the vision tower, puts its features among the embeddings and counts positions. It
runs on a shallow copy whose language model is replaced. The model itself stays untouched, so other threads may use it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPast

from pop_ext.hf.architectures import VisionSpec
from pop_ext.hf.compat import cache_field, with_cache
from pop_ext.hf.inputs import PrefillRequest
from pop_ext.hf.restore import shallow_clone


def run_wrapper(
    wrapper: Any, spec: VisionSpec, request: PrefillRequest, run_decoder: Callable[[PrefillRequest], Any]
) -> Any:
    """Run a wrapper's stock forward with a prefill in the place of its language model.

    Args:
        wrapper: ``model.model`` of a vision-language model.
        spec: what the wrapper is and takes.
        request: its ``arguments`` go to the wrapper.
        run_decoder: runs the request of the language model alone: embeddings, positions and features are the
            wrapper's. Returns a ``PrefillOutput``.

    Returns:
        The output of ``run_decoder``, with ``wrapper_output`` set.

    What the wrapper assigns to itself, such as the position offset of later tokens, is assigned to the real one if all
    goes well.
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

    decoder = shallow_clone(wrapper.language_model)
    decoder.forward = language_model
    clone = shallow_clone(wrapper, language_model=decoder)
    before = dict(clone.__dict__)
    arguments = dict(request.arguments)
    if spec.spans_argument is not None:
        arguments["attention_mask"] = {}  # the wrapper would only make 4-D masks, which nobody reads
    cache = arguments.pop("past_key_values")
    result = type(wrapper).forward(clone, **arguments, **with_cache(wrapper, cache))
    for name, value in clone.__dict__.items():
        if value is not before.get(name):
            wrapper.__dict__[name] = value
    return replace(outputs[0], wrapper_output=result)


def _decoder_positions(request: PrefillRequest, spec: VisionSpec, position_ids: torch.Tensor | None) -> torch.Tensor:
    """Return the positions that the wrapper gives its language model, packed; the request's where it gives none."""
    packed = request.packed
    if position_ids is None:
        positions = request.positions
    else:
        if position_ids.ndim == 3:
            position_ids = position_ids[-3:]  # of four axes the first is that of text, for masks
        # Positions that were counted from a mask begin with the past.
        positions = packed.pack_positions(position_ids[..., -packed.columns :]).to(request.positions.device)
    return positions.expand(3, -1) if spec.uses_mrope else positions  # text has one position on all axes


def _packed_features(
    request: PrefillRequest,
    inputs_embeds: torch.Tensor,
    mask: torch.Tensor | None,
    features: list[torch.Tensor] | None,
) -> dict[str, Any]:
    """Return ``features`` and ``feature_index`` of a request.

    Args:
        request: of the call.
        inputs_embeds: ``[batch, columns, hidden_size]``.
        mask: ``[batch, columns]`` bool, columns that features are added to; None: none.
        features: for each of the first layers ``[columns of the mask, hidden_size]``.
    """
    if mask is None or not features:
        return {}
    index = torch.where(mask, mask.flatten().cumsum(0).view(mask.shape) - 1, -1)
    return {
        "feature_index": request.packed.pack(index.to(inputs_embeds.device)),
        "features": tuple(layer.to(inputs_embeds.device, inputs_embeds.dtype) for layer in features),
    }
