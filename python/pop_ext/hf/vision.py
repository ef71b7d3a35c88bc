"""Vision-language models: transformers' own wrapper, around a native prefill of its language model.

The wrapper (``model.model``) runs the vision tower, puts its features among the embeddings and finds positions.
A call runs it on shallow copies, in which something else stands in the language model's place: the model itself is
not touched, so that other threads may use it meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from pop_ext.hf.architectures import Vision
from pop_ext.hf.compat import field_of_cache, with_cache
from pop_ext.hf.packing import PackedBatch
from pop_ext.hf.restore import shell_of

if TYPE_CHECKING:
    from pop_ext.hf.dispatch import Call


@dataclass(frozen=True)
class DecoderCall:
    """What a wrapper hands to its language model.

    Attributes:
        inputs_embeds: ``[batch, columns, hidden_size]``, features of images in their places.
        position_ids: ``[batch or 1, columns]``, or ``[3, batch, columns]`` for time, height and width, or None.
        feature_mask: ``[batch, columns]`` bool: columns that features are added to after the first layers. None: none.
        features: those of each of the first layers, ``[columns of the mask, hidden_size]`` (DeepStack).
    """

    inputs_embeds: torch.Tensor
    position_ids: torch.Tensor | None
    feature_mask: torch.Tensor | None
    features: tuple[torch.Tensor, ...]


def run_around(
    module: nn.Module,
    path: str,
    decode: Callable[[DecoderCall], tuple[torch.Tensor, Any]],
    arguments: dict[str, Any],
    **children: nn.Module,
) -> Any:
    """The stock forward of ``module``, with ``decode`` in the place of its language model.

    Args:
        path: where the language model is, "language_model" of a wrapper, "model.language_model" of a whole model.
        decode: returns hidden states after the final norm, of the last rows at least whose logits are wanted, and
            the cache.
        arguments: of ``module.forward``.
        children: what else stands in the place of a child of ``module``.

    What the wrapper assigns to itself (positions of later tokens, say) is assigned to the real one if all goes well.
    """

    def forward(
        input_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        visual_pos_masks: torch.Tensor | None = None,
        deepstack_visual_embeds: list[torch.Tensor] | None = None,
        **_: Any,
    ) -> BaseModelOutputWithPast:
        assert inputs_embeds is not None  # a wrapper always embeds
        if position_ids is not None and position_ids.ndim == 3 and len(position_ids) == 4:
            position_ids = position_ids[1:]  # the first are those of text, for masks
        if position_ids is not None:  # counted from a mask they begin with the past
            position_ids = position_ids[..., -inputs_embeds.shape[1] :]
        call = DecoderCall(inputs_embeds, position_ids, visual_pos_masks, tuple(deepstack_visual_embeds or ()))
        hidden_states, cache = decode(call)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states, **field_of_cache(BaseModelOutputWithPast, cache)
        )

    modules = [module]
    for name in path.split("."):
        modules.append(getattr(modules[-1], name))
    shell = shell_of(modules[-1])
    shell.forward = forward
    shells = []
    for parent, name in zip(modules[-2::-1], path.split(".")[::-1], strict=True):
        shell = shell_of(parent, **{name: shell}, **(children if parent is module else {}))
        shells.append((parent, dict(shell.__dict__), shell))
    output = type(module).forward(shell, **arguments)
    for parent, before, after in shells:
        for name, value in after.__dict__.items():
            if value is not before.get(name):
                parent.__dict__[name] = value
    return output


Blocks = list[tuple[int, int, int]]
"""(sequence, begin, end) of real new tokens that see each other, in ascending order."""


def blocks_of(around: Vision, arguments: dict[str, Any], packed: PackedBatch) -> Blocks:
    """Runs of ones in the argument ``around.blocks_by``, ``[batch, columns]`` or ``[batch, past + columns]``.

    Raises:
        TypeError, ValueError: not an integer tensor of one of these shapes.
    """
    name = around.blocks_by
    token_types = None if name is None else arguments.get(name)
    if token_types is None:
        return []
    if not isinstance(token_types, torch.Tensor) or token_types.is_floating_point():
        found = token_types.dtype if isinstance(token_types, torch.Tensor) else type(token_types).__name__
        raise TypeError(f"{name}: expected an integer tensor, got {found}")
    batch, columns = packed.batch, packed.columns
    if tuple(token_types.shape) not in ((batch, columns), (batch, packed.slots)):
        raise ValueError(
            f"{name}: expected shape [{batch}, {columns}] or [{batch}, {packed.slots}] (with the past), "
            f"got {list(token_types.shape)}"
        )
    rows = packed.pack(token_types[:, -columns:]).cpu() == 1
    blocks = []
    for sequence, marked in enumerate(rows.split(packed.tokens)):
        edges = torch.nn.functional.pad(marked.to(torch.int8), (1, 1)).diff()
        begins, ends = (edges == 1).nonzero().flatten(), (edges == -1).nonzero().flatten()
        blocks += [(sequence, begin, end) for begin, end in zip(begins.tolist(), ends.tolist(), strict=True)]
    return blocks


def widened(boundaries: list[int], tokens: list[int], blocks: Blocks) -> list[int]:
    """Boundaries that would cut a block, widened to its start: its rows see each other in omitted layers, too."""
    wide = list(boundaries)
    for sequence, begin, end in blocks:
        if begin < tokens[sequence] - wide[sequence] < end:
            wide[sequence] = tokens[sequence] - begin
    return wide


def packed_features(call: DecoderCall, packed: PackedBatch) -> dict[str, Any]:
    """A call's features as members of ``PrefillInputs``: which row of them belongs to each packed row, or -1."""
    mask = call.feature_mask
    assert mask is not None
    index = torch.where(mask, mask.flatten().cumsum(0).view(mask.shape) - 1, -1)
    hidden = call.inputs_embeds
    features = tuple(layer.to(hidden.device, hidden.dtype) for layer in call.features)
    return {"feature_index": packed.pack(index.to(hidden.device)), "features": features}


def mask_for(around: Vision, mask: torch.Tensor | None) -> Any:
    """The mask of padding as the wrapper should get it: one that only makes 4-D masks of it is spared the work."""
    return mask if around.blocks_by is None else {}


class _Head(nn.Module):
    """Stands for a head whose logits are there already."""

    def __init__(self, outputs: list[Any]) -> None:
        super().__init__()
        self._outputs = outputs

    def forward(self, _hidden_states: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self._outputs[0].logits
        return logits


def prefill_around(model: nn.Module, call: Call) -> Any:
    """A call of a vision-language model's ``forward``: what that returns, with a native prefill inside."""
    native, packed, decision = call.native, call.packed, call.decision
    assert native is not None
    assert native.family.vision is not None
    assert packed is not None
    outputs: list[Any] = []

    def decode(decoder: DecoderCall) -> tuple[torch.Tensor, Any]:
        if decoder.position_ids is None:  # as the stock model counts them: by column, masked or not
            by_column = torch.arange(packed.past_slots, packed.slots, device=native.device)[None]
            decoder = replace(decoder, position_ids=by_column)
        output = native.prefill_decoder(
            decoder,
            packed,
            call.blocks,
            cache=call.arguments.get("past_key_values"),
            boundary=list(decision.boundary),
            logits_to_keep=decision.logits_to_keep,
        )
        outputs.append(output)
        return output.hidden_states, output.past_key_values

    stock = {**call.arguments, "attention_mask": mask_for(native.family.vision, call.mask)}
    if "past_key_values" in stock:
        stock |= with_cache(model, stock.pop("past_key_values"))
    return run_around(model, native.family.decoder, decode, stock, lm_head=_Head(outputs))
