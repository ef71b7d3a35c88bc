"""A second reference of Prefill-Only Pruning: one stock forward with hooks that hold back context rows.

Every layer runs in full over all rows and writes its own K/V. A hook on an omitted layer then restores the input of the
layer in the context rows. This shares no code with pop_ext.reference.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from contextlib import ExitStack
from typing import Any

import torch
from against_oracle import plan_of
from pop_ext import reference
from tolerance import assert_close_fp32, compare_caches
from torch import Tensor, nn
from transformers import DynamicCache


@torch.no_grad()
def held_back_forward(
    model: nn.Module, input_ids: Tensor, omit: Collection[int], context: Tensor, **call: Any
) -> tuple[Tensor, DynamicCache]:
    """Run the stock forward of `input_ids` [batch, T]; rows in `context` (bool [batch, T]) skip the layers of `omit`.

    `call` is passed to the model.

    Returns:
        The logits of all rows, [batch, T, vocab], and the cache, with the full length in all layers.
    """
    call = {"past_key_values": DynamicCache(), **call}

    def hold_back(_layer: nn.Module, args: tuple[Tensor], _kwargs: dict[str, Any], output: Tensor) -> Tensor:
        return torch.where(context[..., None], args[0], output)

    with ExitStack() as stack:
        for index in omit:
            hook = model.get_decoder().layers[index].register_forward_hook(hold_back, with_kwargs=True)
            stack.callback(hook.remove)
        output = model(input_ids, use_cache=True, **call)
    return output.logits, output.past_key_values


def context_rows(mask: Tensor, boundary: list[int]) -> Tensor:
    """Return bool [batch, T]: the rows before the last `boundary[i]` real ones of `mask` [batch, T]."""
    real = mask.long()
    from_end = real.sum(1, keepdim=True) - real.cumsum(1)  # 0 at the last real row
    return mask.bool() & (from_end >= torch.tensor(boundary)[:, None])


def assert_equals_hook_reference(
    model: nn.Module,
    ids: Tensor,
    omit: tuple[int, ...],
    boundary: int = 1,
    past: DynamicCache | None = None,
    **call: Any,
) -> tuple[Tensor, DynamicCache]:
    """Compare the oracle's logits of boundary rows and K/V of all layers and positions; sequences have no padding."""
    lengths = torch.ones_like(ids)
    expected, expected_cache = held_back_forward(
        model,
        ids,
        omit,
        context_rows(lengths, [boundary] * len(ids)),
        past_key_values=copy.deepcopy(past) if past is not None else DynamicCache(),
        **call,
    )
    logits, cache = reference.prefill(
        model, ids, plan_of(model, omit, boundary), boundary, past_key_values=past, **call
    )
    assert_close_fp32(logits, expected[:, -boundary:], "logits")
    compare_caches(cache, expected_cache)
    return logits, cache
