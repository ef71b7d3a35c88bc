"""Test every wrapper of a language model, with images, against the oracle and the stock model."""

from __future__ import annotations

import pop_ext
import pytest
import torch
from against_oracle import GAPS, LAST, assert_equals_oracle
from pop_ext import Plan
from vision_models import BATCHES
from wrapped_models import NAMES, image_prompt, wrapped

LAYERS = 6


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", NAMES)
def test_images_equal_the_oracle(name, batch):
    model = wrapped(name)
    p = image_prompt(model, *BATCHES[batch])
    assert_equals_oracle(model, Plan(LAYERS, GAPS, 2), p.ids, mask=p.mask, **p.vision)


@pytest.mark.parametrize("name", NAMES)
def test_images_in_low_precision_are_as_close_as_the_oracle(name):
    model = wrapped(name, torch.bfloat16)
    p = image_prompt(model, *BATCHES["0, 1 and 2 images"])
    assert_equals_oracle(model, Plan(LAYERS, LAST, 3), p.ids, mask=p.mask, **p.vision)


@pytest.mark.parametrize("name", NAMES)
def test_a_second_turn_with_another_image_equals_the_oracle(name):
    model = wrapped(name)
    first = image_prompt(model, [9, "image", 6], [9, "image", 6])
    past = assert_equals_oracle(model, Plan(LAYERS, GAPS), first.ids, mask=first.mask, **first.vision).cache
    second = image_prompt(model, [3, "image", 2], [3, "image", 2], seed=1)
    mask = torch.cat([first.mask, second.mask], 1)
    assert_equals_oracle(model, Plan(LAYERS, LAST, 2), second.ids, past=past, mask=mask, **second.vision)


@pytest.mark.parametrize("name", NAMES)
def test_generate_with_images_equals_stock_where_only_the_last_layer_is_omitted(name):
    model = wrapped(name)
    p = image_prompt(model, *BATCHES["0, 1 and 2 images"])
    how = {"max_new_tokens": 6, "do_sample": False}
    expected = model.generate(p.ids, **p.call, **how)
    with pop_ext.enabled(model, Plan(LAYERS, (LAYERS - 1,)), strict=True):
        found = model.generate(p.ids, **p.call, **how)
        assert pop_ext.last_call(model).backend == "native"
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("name", "text"),
    [("internvl", "mistral"), ("internvl", "qwen3"), ("internvl", "llama"), ("mistral3", "ministral3")],
)
def test_a_wrapper_runs_around_another_language_model(name, text):
    model = wrapped(name, text=text)
    p = image_prompt(model, *BATCHES["one image"])
    assert_equals_oracle(model, Plan(LAYERS, GAPS, 2), p.ids, mask=p.mask, **p.vision)


def test_no_wrapper_divides_logits():
    model = wrapped("llava", text="granite")
    model.config.text_config.logits_scaling = 4.0  # as of a checkpoint: GraniteForCausalLM alone reads it
    p = image_prompt(model, *BATCHES["one image"])
    assert_equals_oracle(model, Plan(LAYERS, GAPS, 2), p.ids, mask=p.mask, **p.vision)


def test_a_wrapper_around_an_unknown_language_model_says_so_and_runs_portably():
    model = wrapped("mistral3", text="apertus")
    with pytest.raises(pop_ext.UnsupportedModelError, match="got mistral3 around apertus"):
        pop_ext.load(model)
    with pop_ext.enabled(model, Plan(LAYERS, LAST)):
        p = image_prompt(model, *BATCHES["one image"])
        model.generate(p.ids, **p.call, max_new_tokens=2)
        assert pop_ext.last_call(model).backend == "portable"
