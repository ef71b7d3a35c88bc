"""Test 4-D masks, one for all layers or one per layer type.

A mask that holds only causality, windows and padding is read as padding; any other is declined.
"""

from __future__ import annotations

import inspect
from typing import Any

import pop_ext
import pytest
import torch
from enabled_models import PLAN
from models import WINDOW, gemma2, gemma3, mistral, pad, qwen2, tokens
from pop_ext.hf.masks import CustomMaskError, check_pattern, mask_layer_types, padding_mask
from torch import Tensor
from transformers import Cache, StaticCache
from transformers.masking_utils import create_masks_for_generate

T = 30
CAPACITY = 64
BUILDS = {
    "mistral": mistral,
    "qwen2": lambda **over: qwen2(use_sliding_window=True, **over),
    "gemma2": gemma2,  # eager, so that its masks are added to the scores
    "gemma3": gemma3,
}


def stock_masks(model: Any, mask: Tensor, columns: int, cache: Cache | None, **over: Any) -> Any:
    """Return the 4-D masks that `generate` makes from a padding mask [batch, past + columns]."""
    embeds = torch.empty(len(mask), columns, 0, dtype=model.dtype)
    name = "cache" if "cache" in inspect.signature(create_masks_for_generate).parameters else "past_key_values"
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -columns:]
    return create_masks_for_generate(model.config, embeds, mask, position_ids=positions, **{name: cache}, **over)


def read(model: Any, mask: Any, batch: int, columns: int, cache: Cache | None = None, spans: Any = ()) -> Tensor:
    """Return the padding mask that `mask` holds. Raises CustomMaskError if it holds anything else."""
    past = 0 if cache is None else int(cache.get_seq_length())
    types = mask_layer_types(model.config, cache, columns)
    real = padding_mask(mask, batch, columns, past, types)
    check_pattern(mask, real, list(spans), columns, past, types)
    return real


def filled_cache(model: Any, mask: Tensor) -> StaticCache:
    cache = StaticCache(config=model.config, max_cache_len=CAPACITY)
    ids = tokens(model, *mask.shape)
    pop_ext.load(model, PLAN).prefill(ids, attention_mask=mask, past_key_values=cache)
    return cache


@pytest.mark.parametrize("columns", [2, WINDOW - 1, WINDOW, WINDOW + 1, T])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("family", BUILDS)
def test_generate_masks_are_read_as_their_padding(family, static, columns):
    model = BUILDS[family]()
    cache = StaticCache(config=model.config, max_cache_len=CAPACITY) if static else None
    _, mask = pad([torch.zeros(n) for n in (1, columns)], "left")
    actual = read(model, stock_masks(model, mask, columns, cache), 2, columns, cache)
    assert torch.equal(actual, mask.bool())


@pytest.mark.parametrize("past", [3, WINDOW - 1, WINDOW, WINDOW + 1, T])
@pytest.mark.parametrize("columns", [2, WINDOW + 3])
@pytest.mark.parametrize("family", BUILDS)
def test_masks_over_a_past_are_read_as_their_padding(family, columns, past):
    model = BUILDS[family]()
    _, first = pad([torch.zeros(n) for n in (2, past)], "left")
    cache = filled_cache(model, first)
    mask = torch.cat([first, first.new_ones(2, columns)], 1)
    actual = read(model, stock_masks(model, mask, columns, cache), 2, columns, cache)
    if family == "mistral":  # no layer sees before the window of the first new token
        actual, mask = (each[:, max(0, past - WINDOW + 1) :] for each in (actual, mask))
    assert torch.equal(actual, mask.bool())


@pytest.mark.parametrize("over", [-1, 1])
@pytest.mark.parametrize("family", BUILDS)
def test_a_mask_of_another_window_is_declined(family, over):
    model, other = BUILDS[family](), BUILDS[family]()
    other.config.sliding_window += over
    _, mask = pad([torch.zeros(n) for n in (T - 2, T)], "left")  # without padding there may be no mask to read
    with pytest.raises(CustomMaskError, match="a causal mask for sliding_attention layers, got .* another pattern"):
        read(model, stock_masks(other, mask, T, None), 2, T)


@pytest.mark.parametrize("kind", ["full_attention", "sliding_attention"])
@pytest.mark.parametrize(("row", "slot"), [(T - 1, T - 2), (20, 20), (9, 6), (5, 9)])
def test_one_changed_element_of_either_mask_is_declined(kind, row, slot):
    model = gemma3()
    _, mask = pad([torch.zeros(n) for n in (T - 2, T)], "left")
    masks = stock_masks(model, mask, T, StaticCache(model.config, CAPACITY))
    read(model, masks, 2, T)
    masks[kind] = masks[kind].clone()
    masks[kind][1, 0, row, slot].logical_not_()
    with pytest.raises(CustomMaskError, match=f"{kind} layers, got a 4-D mask with another pattern"):
        read(model, masks, 2, T)


def test_masks_of_two_kinds_that_disagree_on_padding_are_declined():
    model = gemma3()
    masks = []
    for length in (T - 2, T - 3):
        _, mask = pad([torch.zeros(n) for n in (length, T)], "left")
        masks.append(stock_masks(model, mask, T, StaticCache(model.config, CAPACITY)))
    for kind in masks[0]:
        with pytest.raises(CustomMaskError, match="another pattern"):
            read(model, {**masks[0], kind: masks[1][kind]}, 2, T)


def test_bidirectional_spans_must_match_those_of_the_call():
    model = gemma3()
    mask = torch.ones(1, T, dtype=torch.long)
    mask[:, :2] = 0
    blocks = torch.full((1, T), -1)
    blocks[:, 4:24] = 0  # longer than the window
    masks = stock_masks(model, mask, T, StaticCache(model.config, CAPACITY), block_sequence_ids=blocks)
    assert torch.equal(read(model, masks, 1, T, spans=[(0, 2, 22)]), mask.bool())
    for other in ([], [(0, 2, 21)], [(0, 3, 22)], [(0, 2, 10), (0, 10, 22)]):
        with pytest.raises(CustomMaskError, match="another pattern"):
            read(model, masks, 1, T, spans=other)
    causal = stock_masks(model, mask, T, StaticCache(model.config, CAPACITY))
    with pytest.raises(CustomMaskError, match="another pattern"):
        read(model, causal, 1, T, spans=[(0, 2, 22)])


def test_a_missing_mask_means_causal_where_causal_is_enough():
    model = gemma3()
    none = {"full_attention": None, "sliding_attention": None}
    assert read(model, none, 2, WINDOW) is None
    with pytest.raises(CustomMaskError, match="expected a mask for sliding_attention layers, got None"):
        read(model, none, 2, WINDOW + 1)
    with pytest.raises(CustomMaskError, match="layers, got None"):
        read(model, none, 2, WINDOW, spans=[(0, 2, 4)])
    with pytest.raises(CustomMaskError, match="layers, got None"):
        read(model, none, 2, 3, filled_cache(model, torch.ones(2, 4, dtype=torch.long)))
    padded = torch.ones(2, WINDOW, dtype=torch.long)
    padded[0, 0] = 0
    with pytest.raises(CustomMaskError, match="expected a mask for full_attention layers, got None"):
        read(model, {**stock_masks(model, padded, WINDOW, None), "full_attention": None}, 2, WINDOW)


@pytest.mark.parametrize(
    ("mask", "text"),
    [
        ({"full_attention": None}, "masks for sliding_attention, full_attention layers, got .* for full_attention"),
        (dict.fromkeys(("full_attention", "sliding_attention"), torch.ones(1, T)), r"tensor of \[1, 30\]"),
        (dict.fromkeys(("full_attention", "sliding_attention"), torch.ones(1, 1, T, T - 1) > 0), r"\[1, 1, 30, 29\]"),
        (dict.fromkeys(("full_attention", "sliding_attention"), torch.ones(1, 1, T, T)), "other values"),
        (
            dict.fromkeys(("full_attention", "sliding_attention"), torch.ones(1, 1, T, T, dtype=torch.int64)),
            "got a torch.int64 .* other values",
        ),
        (dict.fromkeys(("full_attention", "sliding_attention"), torch.full((1, 1, T, T), torch.nan)), "other values"),
        ("left", "expected a 2-D padding mask or a 4-D mask, got str"),
    ],
)
def test_malformed_masks_are_named(mask, text):
    with pytest.raises(CustomMaskError, match=text):
        read(gemma3(), mask, 1, T)


def test_unknown_layer_types_accept_only_a_padding_mask():
    model = gemma3()
    model.config.layer_types = ["chunked_attention"] * 6
    assert read(model, torch.ones(1, T), 1, T).shape == (1, T)
    with pytest.raises(CustomMaskError, match="a 2-D padding mask for chunked_attention layers"):
        read(model, torch.ones(1, 1, T, T).tril() > 0, 1, T)
