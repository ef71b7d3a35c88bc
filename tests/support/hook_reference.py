"""The third form of Prefill-Only Pruning: one stock forward whose omitted layers hold back their context rows.

Every layer runs in full over all rows, so that its K/V are what the layer itself computes from its input; a hook on an
omitted layer then undoes the residual update of the context rows. Nothing of pop_ext.reference has a part in it.
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
    """Stock forward of `input_ids` [batch, T], in which rows with `context` [batch, T] pass by the layers of `omit`.

    `call` goes to the model. Returns the logits of all rows [batch, T, vocab] and the cache, full length in all layers.
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
    """bool [batch, T]: rows before the last `boundary[i]` real ones of `mask` [batch, T]."""
    real = mask.long()
    from_end = real.sum(1, keepdim=True) - real.cumsum(1)  # 0 at the last real row
    return mask.bool() & (from_end >= torch.tensor(boundary)[:, None])


def assert_equals_third_form(
    model: nn.Module,
    ids: Tensor,
    omit: tuple[int, ...],
    boundary: int = 1,
    past: DynamicCache | None = None,
    **call: Any,
) -> tuple[Tensor, DynamicCache]:
    """The oracle's logits of boundary rows and its K/V of all layers and positions, for sequences without padding."""
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
