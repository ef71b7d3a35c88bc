"""The oracle: Prefill-Only Pruning in plain PyTorch on the Hugging Face modules (POP, arXiv 2602.03295).

It is written to be read, not to be fast. Every sequence is computed alone, at batch 1 and without padding, in two
phases:

1. The *context rows* run through the stock decoder, in which the independent KV projection (``project_kv``) replaces
   the omitted layers.
2. The *boundary rows* run through every layer of the stock model, over the cache that phase 1 filled.

Nothing of the native path is imported here.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache

from pop_ext.hf.choice import plan_for
from pop_ext.hf.compat import uncompiled, with_cache
from pop_ext.hf.modules import DecoderModules, Module, find_decoder_modules
from pop_ext.hf.restore import module_restored_on_error, replaced_forward
from pop_ext.reference.caches import (
    UnpaddedSequence,
    assemble_cache,
    check_filled,
    gather_past,
    past_key_values_length,
    read_past,
)
from pop_ext.reference.checks import (
    PlanLike,
    check_ids,
    check_inputs,
    check_mask,
    check_plan,
    check_positions,
    per_sequence,
)
from pop_ext.reference.projection import omitted_layers
from pop_ext.reference.vision import DecoderInputs, Images, has_wrapper, run_wrapper
from pop_ext.utils.forks import check_threads
from pop_ext.utils.tensors import check_dense, check_layers

# A call replaces the forward of modules while it runs. Two calls at once would restore each other's replacements.
_FORWARD_LOCK = threading.RLock()


@torch.no_grad()
def prefill(
    model: nn.Module,
    input_ids: Tensor | None = None,
    plan: PlanLike | str | PathLike[str] | None = None,
    logits_to_keep: int | Sequence[int] | Tensor = 1,
    *,
    inputs_embeds: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Cache | None = None,
    boundary: int | Sequence[int] | Tensor | None = None,
    **vision: Any,
) -> tuple[Tensor, DynamicCache]:
    """Prefill ``T`` new tokens per sequence under a plan, after the ``P`` columns that the cache holds.

    Sequence i has ``T_i`` real new tokens. Its last ``min(T_i, max(boundary_i, logits_to_keep_i))`` rows run at full
    depth. The context rows before them skip the omitted layers, which only project their K and V (in the paper:
    independent KV projection and boundary handling). ``plan.min_tokens`` is ignored.

    RoPE frequencies that depend on the length ("dynamic", "longrope") follow the largest position of the whole call, as
    in one stock call over the batch. The sliding window counts real positions of the sequence, not columns.

    Args:
        model: Hugging Face causal language model. Every decoder layer has ``self_attn.k_proj`` and
            ``self_attn.v_proj`` (or ``self_attn.qkv_proj``) and, if the family has them, ``input_layernorm`` and
            ``self_attn.k_norm``. A family that projects K and V in another way is refused, after a check on one row of
            every omitted layer.
        input_ids: int [batch, T]. Give either this or ``inputs_embeds``.
        plan: Object with ``num_layers``, ``omit`` and ``boundary``; or "third", "preset", a path or None, as in
            ``pop_ext.enable``.
        logits_to_keep: Number of last rows to return logits for, in 1..T_i: an int, or one per sequence (1-D).
        inputs_embeds: [batch, T, hidden] in the model's dtype.
        attention_mask: bool or 0/1 [batch, P + T], 1 for real positions. New tokens may be padded on the left or the
            right, and the past may have holes, but the new tokens may not. None if everything is real.
        position_ids: int [batch, T] or [1, T]. None to count real positions from the mask, past included. For a
            vision-language model, the positions that its wrapper takes, or None to let the wrapper count images.
        past_key_values: DynamicCache, StaticCache or QuantizedCache. It is read and never modified.
        boundary: Number of last rows at full depth, in 1..T_i, in place of ``plan.boundary``: an int, or one per
            sequence (1-D).
        **vision: Further arguments of a vision-language model's ``forward``, such as ``pixel_values``. Its wrapper
            runs unchanged, and both phases run in the language model that it calls. With ``token_type_ids`` (Gemma 3)
            the tokens of an image attend to each other, so a boundary inside an image moves to its start.

    Returns:
        The logits, [batch, logits_to_keep, vocab], or packed [sum(logits_to_keep), vocab] for one value per sequence.
        And a new ``DynamicCache`` with ``P + T`` columns in every layer, in the order of the mask. Masked columns hold
        zeros, and so do columns that a sliding layer of the given cache had already dropped. Sliding layers keep their
        full length: the stock model masks them when it decodes.

    Raises:
        ValueError: An argument does not fit; the text gives the argument, what was expected and what came. Also if
            hooks of the model's attentions shorten the cache between the two phases.
        TypeError: An argument has the wrong type.
        RuntimeError: The model is on the CPU, and the process was forked from one with OpenMP threads.
    """
    stock: Module = uncompiled(model)
    parts = find_decoder_modules(stock)
    chosen = plan_for(stock, plan)
    ran: PlanLike = chosen.plan
    check_plan(ran, parts.layers, stock.config)
    chosen.warn(stock)
    given = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "attention_mask": attention_mask}
    check_dense({**given, "position_ids": position_ids, **vision})
    check_layers(past_key_values)
    inputs = check_inputs(stock, input_ids, inputs_embeds)
    if inputs.device.type == "cpu":
        check_threads()
    batch, new = inputs.shape[:2]
    past = read_past(past_key_values, len(parts.layers), batch)
    past_length = past_key_values_length(past_key_values)

    mask = check_mask(attention_mask, batch, past_length, new, inputs.device)
    check_ids(stock, input_ids, mask[:, past_length:])
    wrapped: DecoderInputs | None = None
    if has_wrapper(stock, parts):
        call = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "position_ids": position_ids, **vision}
        with _FORWARD_LOCK:
            wrapped = run_wrapper(stock, parts, attention_mask=attention_mask, past_key_values=past_key_values, **call)
        inputs, position_ids = wrapped.embeds, wrapped.positions
    elif vision:
        raise TypeError(f"{next(iter(vision))}: expected no such argument for a {type(stock).__name__}, got one")
    if wrapped is not None and position_ids is not None:
        positions = position_ids
    else:
        positions = check_positions(position_ids, mask, past_length)
    sequences = remove_padding(mask, past_length, positions, wrapped, ran.boundary, boundary, logits_to_keep)
    window = getattr(stock.config.get_text_config(), "sliding_window", None)
    caches = [gather_past(past, sequence, i, window) for i, sequence in enumerate(sequences)]

    name = "input_ids" if inputs_embeds is None and wrapped is None else "inputs_embeds"
    largest = torch.cat([sequence.positions for sequence in sequences], dim=-1).max()
    logits = []
    with _FORWARD_LOCK, module_restored_on_error(parts.rotary), rope_seen_up_to(parts.rotary, largest):
        for i, (sequence, cache) in enumerate(zip(sequences, caches, strict=True)):
            rows = inputs[i : i + 1, sequence.new_columns]
            logits.append(prefill_sequence(stock, parts, ran, name, rows, sequence, cache))
            check_filled(cache, len(sequence.past_columns) + rows.shape[1])
    packed = torch.cat(logits)
    if isinstance(logits_to_keep, int):
        packed = packed.view(batch, logits_to_keep, packed.shape[-1])
    return packed, assemble_cache(caches, sequences, past_length, new)


def remove_padding(
    mask: Tensor,
    past_length: int,
    positions: Tensor,
    wrapped: DecoderInputs | None,
    plan_boundary: int,
    boundary: int | Sequence[int] | Tensor | None,
    logits_to_keep: int | Sequence[int] | Tensor,
) -> list[UnpaddedSequence]:
    """Split a padded batch into its sequences, each with its own boundary.

    Args:
        mask: bool [batch, P + T].
        past_length: Columns ``P`` in the cache.
        positions: int64 [batch, T] or [3, batch, T].
        wrapped: Inputs of the language model of a vision-language model, else None.
        plan_boundary: Boundary of the plan, for ``boundary=None``.
        boundary: As for ``prefill``.
        logits_to_keep: As for ``prefill``.

    Raises:
        ValueError: As for ``per_sequence``.
        TypeError: As for ``per_sequence``.
    """
    lengths = mask[:, past_length:].sum(1).tolist()
    num_logits = per_sequence("logits_to_keep", logits_to_keep, lengths)
    if boundary is None:
        boundaries = [min(plan_boundary, length) for length in lengths]
    else:
        boundaries = per_sequence("boundary", boundary, lengths)
    sequences = []
    for i, length in enumerate(lengths):
        new_columns = mask[i, past_length:].nonzero().flatten()
        images = Images() if wrapped is None else wrapped.images(i, new_columns)
        context = images.snap_to_image_start(max(0, length - max(boundaries[i], num_logits[i])))
        sequences.append(
            UnpaddedSequence(
                past_columns=mask[i, :past_length].nonzero().flatten(),
                new_columns=new_columns,
                positions=positions[..., i, new_columns].unsqueeze(-2),
                boundary=length - context,
                num_logits=num_logits[i],
                images=images,
            )
        )
    return sequences


# The two phases


def prefill_sequence(
    model: Module,
    parts: DecoderModules,
    plan: PlanLike,
    name: str,
    rows: Tensor,
    sequence: UnpaddedSequence,
    cache: DynamicCache,
) -> Tensor:
    """Run both phases for one sequence.

    Args:
        model: The model.
        parts: Its modules.
        plan: The plan.
        name: Argument that takes the rows, "input_ids" or "inputs_embeds".
        rows: Ids [1, T_i] or embeddings [1, T_i, hidden].
        sequence: The sequence.
        cache: Its past, to which all new positions are added.

    Returns:
        Logits [num_logits, vocab].

    Raises:
        ValueError: A hook shortened the cache, or a layer projects K and V in another way.
    """
    context = rows.shape[1] - sequence.boundary

    def call(start: int, stop: int) -> dict[str, Any]:
        past, config = len(sequence.past_columns), model.config.get_text_config()
        return {
            name: rows[:, start:stop],
            "attention_mask": torch.ones(1, past + stop, dtype=torch.long, device=rows.device),
            "position_ids": sequence.positions[..., start:stop],
            "use_cache": True,
            "return_dict": True,
            **sequence.images.arguments(start, stop, past, config, rows.dtype),
        }

    if context > 0:
        with omitted_layers(parts.layers, plan):
            parts.decoder(**call(0, context), **with_cache(parts.decoder, cache))
        check_filled(cache, len(sequence.past_columns) + context)
    boundary = call(context, rows.shape[1])
    if has_wrapper(model, parts):  # the wrapper has already run
        hidden_states = parts.decoder(**boundary, **with_cache(parts.decoder, cache)).last_hidden_state
        return model.lm_head(hidden_states[:, -sequence.num_logits :])[0]
    # The forward of the class is the stock one, even if the instance has a replaced ``forward``.
    stock_forward = type(model).forward
    return stock_forward(model, **boundary, **with_cache(model, cache), logits_to_keep=sequence.num_logits).logits[0]


@contextmanager
def rope_seen_up_to(rotary: Module, largest: Tensor) -> Iterator[None]:
    """Let each call of ``rotary`` see the position ``largest``, too.

    Frequencies that depend on the length ("dynamic", "longrope") are then those of one stock call over the whole batch.

    Args:
        rotary: The model's rotary module.
        largest: Largest position of the call, a scalar int64 tensor.
    """
    original = rotary.forward

    def forward(x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        extended = torch.cat([position_ids, largest.expand(*position_ids.shape[:-1], 1)], dim=-1)
        cos, sin = original(x, extended, *args, **kwargs)
        return cos[..., :-1, :], sin[..., :-1, :]

    with replaced_forward(rotary, forward):
        yield
