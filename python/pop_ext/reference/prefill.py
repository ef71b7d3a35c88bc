"""The oracle: Prefill-Only Pruning in plain PyTorch on the Hugging Face modules (POP, arXiv 2602.03295).

Written to be read, not to be fast. Every sequence is computed alone, at batch 1 and without padding, in two phases:

1. the *context rows* run through the stock decoder, in which the omitted layers are replaced by the independent KV
   projection (`project_kv`);
2. the *boundary rows* run through the stock model, every layer of it, over the cache that phase 1 filled.

Nothing of the native path is imported here.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache

from pop_ext.hf.compat import uncompiled, with_cache
from pop_ext.hf.modules import DecoderModules, Module, find_parts
from pop_ext.hf.restore import module_restored_on_error, replaced_forward
from pop_ext.reference.caches import (
    OneSequence,
    assemble,
    check_filled,
    past_key_values_length,
    past_of_sequence,
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
from pop_ext.reference.vision import Images, Wrapped, is_wrapped, run_wrapper

# A call replaces forwards of the model's modules while it runs: two at once would put back each other's.
_ONE_CALL_AT_A_TIME = threading.RLock()


@torch.no_grad()
def prefill(
    model: nn.Module,
    input_ids: Tensor | None = None,
    plan: PlanLike | None = None,
    logits_to_keep: int | Sequence[int] | Tensor = 1,
    *,
    inputs_embeds: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Cache | None = None,
    boundary: int | Sequence[int] | Tensor | None = None,
    **vision: Any,
) -> tuple[Tensor, DynamicCache]:
    """Prefill `T` new tokens a sequence, after the `P` columns that the cache holds, under `plan`.

    The plan is executed as given, always: `plan.min_tokens` is not looked at. Sequence i has `T_i` real new tokens; its
    last `min(T_i, max(boundary_i, logits_to_keep_i))` rows run at full depth, the context rows before them skip the
    omitted layers, which only project their K/V (paper: independent KV projection and boundary handling).

    Args:
        model: Hugging Face causal language model; every decoder layer has `self_attn.k_proj` and `self_attn.v_proj`
            (or `self_attn.qkv_proj`) and, where the family has them, `input_layernorm` and `self_attn.k_norm`. A family
            that projects K/V in another way is refused (checked on one row of every omitted layer).
        input_ids: int [batch, T]. Exactly one of it and `inputs_embeds`.
        plan: anything with `.num_layers`, `.omit`, `.boundary`; None takes the default plan of the model's config.
        logits_to_keep: how many last rows get logits, an int or one per sequence (1-D); 1..T_i.
        inputs_embeds: [batch, T, hidden], the model's dtype.
        attention_mask: bool or 0/1, [batch, P + T], real positions 1. Padding left or right of the new tokens and holes
            in the past are legal, holes in the new tokens are not. None: everything is real.
        position_ids: int [batch, T] or [1, T]; None: real positions counted from the mask, past included. In a
            vision-language model as its wrapper takes them, and None: as it counts images.
        past_key_values: DynamicCache, StaticCache or QuantizedCache, read and never modified.
        boundary: overrides `plan.boundary`, an int or one per sequence (1-D); 1..T_i.
        vision: what else the `forward` of a vision-language model takes (`pixel_values`, ...). Its wrapper runs as it
            is; both phases are of the language model that it calls. With `token_type_ids` (Gemma 3) the tokens of an
            image see each other, and a boundary inside of one is widened to its start.

    Returns:
        logits: [batch, logits_to_keep, vocab], or packed [sum(logits_to_keep), vocab] for per-sequence values.
        cache: always a new `DynamicCache` of plain layers with `P + T` columns in all layers, in the mask's columns;
            masked columns hold zeros, and so do columns which a sliding layer of the given cache had already dropped.
            Sliding layers are kept at full length: the stock model masks them by itself when it decodes.

    Raises:
        ValueError: an argument does not fit; the text names it, what was expected and what came. Or hooks of the
            model's attentions shortened the cache on the way: both phases are calls of them.
        TypeError: an argument is of the wrong kind.

    RoPE frequencies that depend on the length ("dynamic", "longrope") follow the largest position of the whole call, as
    in one stock call over the batch. The sliding window counts real positions of the sequence, not columns.
    """
    stock: Module = uncompiled(model)
    parts = find_parts(stock)
    if plan is None:
        from pop_ext.plans.presets import default_plan

        plan = default_plan(stock.config)
    check_plan(plan, parts.layers, stock.config)
    inputs = check_inputs(stock, input_ids, inputs_embeds)
    batch, new = inputs.shape[:2]
    past = read_past(past_key_values, len(parts.layers), batch)
    past_length = past_key_values_length(past_key_values)

    mask = check_mask(attention_mask, batch, past_length, new, inputs.device)
    check_ids(stock, input_ids, mask[:, past_length:])
    wrapped: Wrapped | None = None
    if is_wrapped(stock, parts):
        call = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "position_ids": position_ids, **vision}
        with _ONE_CALL_AT_A_TIME:
            wrapped = run_wrapper(stock, parts, attention_mask=attention_mask, past_key_values=past_key_values, **call)
        inputs, position_ids = wrapped.embeds, wrapped.positions
    elif vision:
        raise TypeError(f"{next(iter(vision))}: expected no such argument for a {type(stock).__name__}, got one")
    if wrapped is not None and position_ids is not None:
        positions = position_ids
    else:
        positions = check_positions(position_ids, mask, past_length)
    lengths = mask[:, past_length:].sum(1).tolist()
    keeps = per_sequence("logits_to_keep", logits_to_keep, lengths)
    if boundary is None:
        boundaries = [min(plan.boundary, length) for length in lengths]
    else:
        boundaries = per_sequence("boundary", boundary, lengths)

    sequences = []
    for i in range(batch):
        new_columns = mask[i, past_length:].nonzero().flatten()
        images = Images() if wrapped is None else wrapped.images(i, new_columns)
        sequences.append(
            OneSequence(
                past_columns=mask[i, :past_length].nonzero().flatten(),
                new_columns=new_columns,
                positions=positions[..., i, new_columns].unsqueeze(-2),
                boundary=lengths[i] - images.start(max(0, lengths[i] - max(boundaries[i], keeps[i]))),
                keep=keeps[i],
                images=images,
            )
        )
    window = getattr(stock.config.get_text_config(), "sliding_window", None)
    caches = [past_of_sequence(past, sequence, i, window) for i, sequence in enumerate(sequences)]

    name = "input_ids" if inputs_embeds is None and wrapped is None else "inputs_embeds"
    largest = torch.cat([sequence.positions for sequence in sequences], dim=-1).max()
    logits = []
    with _ONE_CALL_AT_A_TIME, module_restored_on_error(parts.rotary), rope_of_whole_call(parts.rotary, largest):
        for i, (sequence, cache) in enumerate(zip(sequences, caches, strict=True)):
            rows = inputs[i : i + 1, sequence.new_columns]
            logits.append(prefill_sequence(stock, parts, plan, name, rows, sequence, cache))
            check_filled(cache, len(sequence.past_columns) + rows.shape[1])
    packed = torch.cat(logits)
    if isinstance(logits_to_keep, int):
        packed = packed.view(batch, logits_to_keep, packed.shape[-1])
    return packed, assemble(caches, sequences, past_length, new)


# The two phases


def prefill_sequence(
    model: Module,
    parts: DecoderModules,
    plan: PlanLike,
    name: str,
    rows: Tensor,
    sequence: OneSequence,
    cache: DynamicCache,
) -> Tensor:
    """Both phases for one sequence: `rows` [1, T_i(, hidden)] of argument `name` in, logits [keep, vocab] out."""
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
    if is_wrapped(model, parts):  # the wrapper has run
        hidden_states = parts.decoder(**boundary, **with_cache(parts.decoder, cache)).last_hidden_state
        return model.lm_head(hidden_states[:, -sequence.keep :])[0]
    # The class's forward: the stock one, also where the instance carries a replaced `forward`.
    stock_forward = type(model).forward
    return stock_forward(model, **boundary, **with_cache(model, cache), logits_to_keep=sequence.keep).logits[0]


@contextmanager
def rope_of_whole_call(rotary: Module, largest: Tensor) -> Iterator[None]:
    """Inside: each call of `rotary` also sees the position `largest`, so that frequencies which depend on the length
    ("dynamic", "longrope") are those that one stock call over the whole batch would use."""
    original = rotary.forward

    def forward(x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        extended = torch.cat([position_ids, largest.expand(*position_ids.shape[:-1], 1)], dim=-1)
        cos, sin = original(x, extended, *args, **kwargs)
        return cos[..., :-1, :], sin[..., :-1, :]

    with replaced_forward(rotary, forward):
        yield
