"""Test `generate` of enabled vision-language models: static caches, speculation, chunks, chat turns with images."""

from __future__ import annotations

import copy
from typing import Any

import pop_ext
import pytest
import torch
from against_oracle import GAPS
from enabled_models import generate, native_and_oracle, recorded
from pop_ext import Plan
from pop_ext.hf.compat import NEW_CACHE_NAME, cache_argument
from torch import Tensor
from transformers import DynamicCache, Gemma3ForConditionalGeneration, StaticCache
from vision_models import BATCHES, VISION, Prompt, prompt

LAYERS = 6
PLAN = Plan(LAYERS, GAPS)
FAMILIES = sorted(VISION)
ENCODES_FIRST = cache_argument(Gemma3ForConditionalGeneration.forward) == NEW_CACHE_NAME
"""From transformers 5.24 on, `generate` encodes images before it calls the model, so that chunks may split an image."""


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_static_cache_takes_images_natively(family, batch, attention):
    model = VISION[family]()
    model.set_attn_implementation(attention)
    p = prompt(model, *BATCHES[batch])
    native, oracle = native_and_oracle(model, PLAN)
    decisions = recorded(native)
    static = generate(native, p.ids, 16, cache_implementation="static", return_dict_in_generate=True, **p.call)
    assert isinstance(static.past_key_values, StaticCache)
    assert [decision.backend for decision in decisions] == ["native"]
    assert torch.equal(static.sequences, generate(native, p.ids, 16, **p.call))
    assert torch.equal(static.sequences, generate(oracle, p.ids, 16, cache_implementation="static", **p.call))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_hooks_that_gradient_checkpointing_leaves_change_no_prefill_of_images(family):
    model = pop_ext.enable(VISION[family](), PLAN, strict=True)
    p = prompt(model, [3, "image", 4, "image", 9])
    expected = generate(model, p.ids, 8, **p.call)
    model.enable_input_require_grads()
    assert torch.equal(generate(model, p.ids, 8, **p.call), expected)
    assert pop_ext.last_call(model).native


@pytest.mark.parametrize("how", [{"prompt_lookup_num_tokens": 4}, "assistant"], ids=["prompt lookup", "assistant"])
@pytest.mark.parametrize("family", FAMILIES)
def test_speculation_after_images_gives_the_tokens_of_plain_greedy_decoding(family, how):
    model = pop_ext.enable(VISION[family](), PLAN, strict=True)
    p = prompt(model, [3, "image", 4, "image", 9])
    expected = generate(model, p.ids, 24, **p.call)
    decisions = recorded(model)
    options = {"assistant_model": VISION[family]()} if how == "assistant" else how
    assert torch.equal(generate(model, p.ids, 24, **options, **p.call), expected)
    first = decisions[-1]
    assert first.native
    assert first.boundary == (first.tokens[0] - p.ids.shape[1] + 1,)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_chunked_text_prefill_prunes_each_chunk_as_the_oracle(family, cache):
    model = VISION[family]()
    if not ENCODES_FIRST and family == "qwen3_vl":
        pytest.skip("before 5.24 transformers does not split the positions of Qwen3-VL")
    p = prompt(model, [30])
    native, oracle = native_and_oracle(model, PLAN)
    decisions = recorded(native)
    how = {"prefill_chunk_size": 11, "cache_implementation": cache, **p.call}
    assert torch.equal(*(generate(twin, p.ids, 16, **how) for twin in (native, oracle)))
    assert [decision.tokens for decision in decisions] == [(11,), (11,), (8,)]


@pytest.mark.skipif(not ENCODES_FIRST, reason="before 5.24 transformers does not split prompts with images")
@pytest.mark.parametrize("size", [5, 11, 12, 40])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_chunked_prefill_may_split_an_image(family, size):
    model = VISION[family]()
    p = prompt(model, [7, "image", 5])
    how = {"prefill_chunk_size": size, **p.call}
    assert torch.equal(*(generate(twin, p.ids, 16, **how) for twin in native_and_oracle(model, PLAN)))
    stock = generate(model, p.ids, 16, **how)
    unpruned = pop_ext.enable(model, Plan(LAYERS, (LAYERS - 1,)), strict=True)
    assert torch.equal(generate(unpruned, p.ids, 16, **how), stock)


def second_turn(model: Any, first: Prompt, second: Prompt, cache: Any, whole: bool) -> Tensor:
    """Return the answer to a second prompt.

    With `whole`, ids and token types of the first turn are passed again.
    """
    one = generate(model, first.ids, 9, return_dict_in_generate=True, past_key_values=cache, **first.call).sequences
    ids = torch.cat([one, second.ids], 1)
    mask = torch.ones_like(ids)
    vision = {name: value for name, value in second.vision.items() if not name.endswith("token_type_ids")}
    (types,) = (name for name in first.vision if name.endswith("token_type_ids"))
    answer = torch.zeros(1, one.shape[1] - first.ids.shape[1], dtype=first.vision[types].dtype)
    vision[types] = torch.cat([first.vision[types], answer, second.vision[types]], 1)
    if not whole:  # the last token of the answer is not in the cache yet
        ids, vision[types] = ids[:, one.shape[1] - 1 :], vision[types][:, one.shape[1] - 1 :]
    return generate(model, ids, 16, attention_mask=mask, past_key_values=cache, **vision)[:, -16:]


def cache_of_kind(kind: str, model: Any) -> Any:
    config = model.config
    return DynamicCache(config=config) if kind == "dynamic" else StaticCache(config=config, max_cache_len=120)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("image", [False, True], ids=["text", "another image"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_second_turn_after_an_image_answers_as_the_oracle(family, image, cache):
    model = VISION[family]()
    first, second = prompt(model, [7, "image", 5]), prompt(model, [4, "image", 6] if image else [14], seed=3)
    # Gemma 3 reads token types from the first column of the cache on. Types that begin later would be misread.
    whole = family == "gemma3" and image
    known = not whole or (ENCODES_FIRST and cache == "dynamic")
    answers = []
    for backend in ("native", "reference"):
        twin = pop_ext.enable(copy.deepcopy(model), PLAN, strict=known, backend=backend)
        decisions = recorded(twin)
        answers.append(second_turn(twin, first, second, cache_of_kind(cache, model), whole))
        assert [decision.backend for decision in decisions] == [backend, backend if known else "stock"]
    assert torch.equal(*answers)


@pytest.mark.filterwarnings("ignore:pop_ext")
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_second_image_turn_omitting_the_last_layer_equals_stock(family, cache):
    model = VISION[family]()
    first, second = prompt(model, [7, "image", 5]), prompt(model, [4, "image", 6], seed=3)
    whole = family == "gemma3"
    expected = second_turn(model, first, second, cache_of_kind(cache, model), whole)
    with pop_ext.enabled(model, Plan(LAYERS, (LAYERS - 1,))):
        assert torch.equal(second_turn(model, first, second, cache_of_kind(cache, model), whole), expected)
