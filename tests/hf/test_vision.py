"""Test vision-language models: native prefill of text and images against the oracle, and the oracle itself.

The oracle is compared with the stock model and with the hook reference.
"""

from __future__ import annotations

from typing import Any

import pop_ext
import pytest
import torch
from against_oracle import GAPS, LAST, OMITS, assert_equals_oracle, run_native, run_stock
from enabled_models import generate, native_and_oracle
from hook_reference import context_rows, held_back_forward
from pop_ext import Plan, reference
from pop_ext.hf.packing import snap_to_span_start
from tolerance import assert_close_fp32, compare_caches
from transformers import DynamicCache
from vision_models import BATCHES, IMAGE, VISION, Prompt, gemma3_vl, prompt, qwen3_vl

LAYERS = 6
FAMILIES = sorted(VISION)


def plan_of(omit: tuple[int, ...] = LAST, boundary: int = 1) -> Plan:
    return Plan(LAYERS, omit, boundary=boundary)


def assert_prompt_equals_oracle(model: Any, plan: Plan, p: Prompt, **call: Any) -> Any:
    return assert_equals_oracle(model, plan, p.ids, mask=p.mask, **p.vision, **call)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("omit", OMITS)
@pytest.mark.parametrize("family", FAMILIES)
def test_images_equal_the_oracle(family, omit, batch):
    model = VISION[family]()
    assert_prompt_equals_oracle(model, plan_of(OMITS[omit]), prompt(model, *BATCHES[batch]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_images_in_low_precision_are_as_close_as_the_oracle(family, batch, dtype):
    model = VISION[family](dtype)
    assert_prompt_equals_oracle(model, plan_of(GAPS), prompt(model, *BATCHES[batch]))


@pytest.mark.parametrize("boundary", [1, 2, 6, 7, 8, 14, 24, 25, 26])
@pytest.mark.parametrize("family", FAMILIES)
def test_any_boundary_near_an_image_equals_the_oracle(family, boundary):
    model = VISION[family]()
    p = prompt(model, [9, "image", 6], [2, "image", "image", 3])
    assert_prompt_equals_oracle(model, plan_of(GAPS, boundary), p)


@pytest.mark.parametrize("keep", [1, 9, [2, 30]])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_rows_inside_an_image_equal_the_oracle(family, keep):
    model = VISION[family]()
    assert_prompt_equals_oracle(
        model, plan_of(GAPS), prompt(model, [9, "image", 6], [2, "image", 20]), logits_to_keep=keep
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_second_turn_with_another_image_equals_the_oracle(family):
    model = VISION[family]()
    first = prompt(model, [9, "image", 6], [4, "image", 3])
    past = assert_prompt_equals_oracle(model, plan_of(GAPS), first).cache
    second = prompt(model, [3, "image", 2], [1, "image", 4], seed=1)
    second.mask.fill_(1)  # no padding in between: a sliding-window cache also keeps masked slots
    mask = torch.cat([first.mask, second.mask], 1)
    assert_equals_oracle(model, plan_of(LAST, 2), second.ids, past=past, mask=mask, **second.vision)


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_with_images_in_place_equal_the_oracle(family):
    model = VISION[family]()
    p = prompt(model, [9, "image", 6])
    with torch.no_grad():
        embeds = model.get_input_embeddings()(p.ids)
    vision = {**p.vision, "inputs_embeds": embeds}
    vision.pop("mm_token_type_ids", None)  # without ids, positions are counted as for text
    assert_equals_oracle(model, plan_of(GAPS), mask=p.mask, **vision)


def test_videos_equal_the_oracle():
    model = qwen3_vl()
    p = prompt(model, [5, "video", 4], [2, "image", 3, "video", 6, "image", 1])
    assert_prompt_equals_oracle(model, plan_of(GAPS), p)


@pytest.mark.parametrize("features", [0, 1, 3])
@pytest.mark.parametrize("omit", [(0,), (1, 2), (0, 1, 2, 3), (2, 3, 4, 5)])
def test_runs_split_by_deepstack_features_equal_the_oracle(omit, features):
    model = qwen3_vl(features=features)
    p = prompt(model, [7, "image", 5], [3, "image", 4, "image", 9])
    assert_prompt_equals_oracle(model, plan_of(omit, 3), p)


def test_deepstack_features_change_the_logits():
    model = qwen3_vl()
    p = prompt(model, [7, "image", 5])
    before = run_native(model, plan_of(), p.ids, **p.call).logits
    with torch.no_grad():
        model.model.visual.deepstack_merger_list[2].linear_fc2.weight.mul_(-1)
    after = run_native(model, plan_of(), p.ids, **p.call).logits
    assert (before - after).abs().max() > 1e-2


@pytest.mark.parametrize("window", [None, 1000])
def test_windows_longer_than_the_prompt_equal_the_oracle(window):
    model = gemma3_vl(sliding_window=window or 5)
    assert_prompt_equals_oracle(model, plan_of(GAPS), prompt(model, [7, "image", 5], [30, "image"]))


# Against the stock model and the hook reference


@pytest.mark.parametrize("omit", [(), (LAYERS - 1,)])
@pytest.mark.parametrize("family", FAMILIES)
def test_omitting_nothing_or_the_last_layer_equals_the_stock_model(family, omit):
    model = VISION[family]()
    p = prompt(model, *BATCHES["0, 1 and 2 images"])
    if family == "gemma3":  # its stock forward counts masked columns in positions
        p.vision["position_ids"] = (p.mask.cumsum(1) - 1).clamp(min=0)
    expected, cache = run_stock(model, p.ids, **p.call)
    actual = run_native(model, plan_of(omit), p.ids, **p.call)
    assert_close_fp32(actual.logits, expected[:, -1:], "logits")
    compare_caches(actual.cache, cache, mask=p.mask)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_boundary_of_the_whole_prompt_equals_the_stock_model(family):
    model = VISION[family]()
    p = prompt(model, [7, "image", 5])
    expected, cache = run_stock(model, p.ids, **p.call)
    assert_close_fp32(run_native(model, plan_of(GAPS, 1000), p.ids, **p.call).logits, expected[:, -1:], "logits")
    logits, oracle_cache = reference.prefill(model, p.ids, plan_of(GAPS, 1000), **p.call)
    assert_close_fp32(logits, expected[:, -1:], "logits")
    compare_caches(oracle_cache, cache)


@pytest.mark.parametrize("boundary", [1, 4])
@pytest.mark.parametrize("omit", [LAST, GAPS, (0, 1, 2)])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_oracle_equals_the_hook_reference(family, omit, boundary):
    model = VISION[family]()
    p = prompt(model, [7, "image", 5], [4, "image", 8])
    context = context_rows(p.mask, [boundary] * 2)
    expected, cache = held_back_forward(model, p.ids, omit, context, **p.call)
    logits, oracle_cache = reference.prefill(model, p.ids, plan_of(omit, boundary), boundary, **p.call)
    assert_close_fp32(logits, expected[:, -boundary:], "logits")
    compare_caches(oracle_cache, cache, mask=p.mask)


# Boundaries and images


def test_a_boundary_inside_an_image_snaps_to_its_start():
    spans = [(0, 3, 8), (1, 0, 4), (1, 6, 9)]
    tokens = [10, 12]
    assert snap_to_span_start([2, 3], tokens, spans) == [2, 3]
    assert snap_to_span_start([3, 6], tokens, spans) == [7, 6]
    assert snap_to_span_start([6, 4], tokens, spans) == [7, 6]
    assert snap_to_span_start([7, 9], tokens, spans) == [7, 12]
    assert snap_to_span_start([8, 12], tokens, spans) == [8, 12]


@pytest.mark.parametrize(("boundary", "expected"), [(1, 1), (6, 6), (7, 7), (8, 23), (22, 23), (23, 23), (24, 24)])
def test_explain_shows_the_snapped_boundary(boundary, expected):
    model = pop_ext.enable(gemma3_vl(), plan_of(LAST, boundary))
    p = prompt(model, [9, "image", 6])
    with torch.no_grad():
        decision = pop_ext.explain(model, p.ids, logits_to_keep=1, **p.call)
    assert decision.native
    assert decision.boundary == (expected,)


def test_native_prefill_snaps_a_boundary_inside_an_image():
    model = gemma3_vl()
    native = pop_ext.load(model, plan_of())
    p = prompt(model, [9, "image", 6])
    called = {}

    def spy(*arguments: Any) -> None:
        called["boundary"] = arguments[7]
        raise RuntimeError("seen")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.ops.pop, "prefill", spy)
        with pytest.raises(RuntimeError, match="seen"):
            native.prefill(p.ids, boundary=12, **p.call)
    assert called["boundary"].tolist() == [23]


# Enabled models


@pytest.mark.parametrize("family", FAMILIES)
def test_64_greedy_tokens_after_images_are_those_of_the_oracle(family):
    model = VISION[family](**({"tied": False} if family == "gemma3" else {}))
    p = prompt(model, [7, "image", 5], [3, "image", 4, "image", 9])
    twins = native_and_oracle(model, plan_of(GAPS))
    outputs = [generate(twin, p.ids, 64, **p.call) for twin in twins]
    assert torch.equal(*outputs)
    assert len(set(outputs[0][:, p.ids.shape[1] :].flatten().tolist())) >= 16
    assert pop_ext.last_call(twins[0]).native
    assert pop_ext.last_call(twins[1]).backend == "reference"


@pytest.mark.parametrize("how", [{"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}])
@pytest.mark.parametrize("family", FAMILIES)
def test_beams_and_samples_after_images_are_those_of_the_oracle(family, how):
    model = VISION[family]()
    p = prompt(model, [7, "image", 5])
    twins = native_and_oracle(model, plan_of(GAPS))
    outputs = []
    for twin in twins:
        torch.manual_seed(0)
        outputs.append(generate(twin, p.ids, 12, **how, **p.call))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_omitting_the_last_layer_equals_the_stock_model(family):
    model = VISION[family]()
    p = prompt(model, *BATCHES["0, 1 and 2 images"])
    expected = generate(model, p.ids, 16, **p.call)
    with pop_ext.enabled(model, plan_of((LAYERS - 1,)), strict=True):
        assert torch.equal(generate(model, p.ids, 16, **p.call), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_returns_what_the_stock_forward_returns(family):
    model = VISION[family]()
    p = prompt(model, [7, "image", 5])
    with torch.no_grad():
        expected = model(p.ids, use_cache=True, logits_to_keep=1, **p.call)
        with pop_ext.enabled(model, plan_of((LAYERS - 1,)), strict=True):
            actual = model(p.ids, use_cache=True, logits_to_keep=1, **p.call)
            as_tuple = model(p.ids, use_cache=True, logits_to_keep=1, return_dict=False, **p.call)
    assert type(actual) is type(expected)
    assert list(actual) == list(expected)
    assert_close_fp32(actual.logits, expected.logits, "logits")
    assert isinstance(as_tuple, tuple)
    assert_close_fp32(as_tuple[0], expected.logits, "logits")


@pytest.mark.parametrize("family", FAMILIES)
def test_config_return_dict_false_returns_a_tuple(family):
    model = VISION[family]()
    p = prompt(model, [7, "image", 5])
    with torch.no_grad(), pop_ext.enabled(model, plan_of(), strict=True):
        expected = model(p.ids, use_cache=True, logits_to_keep=1, **p.call)
        model.config.return_dict = False
        as_tuple = model(p.ids, use_cache=True, logits_to_keep=1, **p.call)
        as_output = model(p.ids, use_cache=True, logits_to_keep=1, return_dict=True, **p.call)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], expected.logits)
    assert type(as_output) is type(expected)
    assert torch.equal(as_output.logits, expected.logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_native_prefill_takes_positions_that_begin_with_the_past(family):
    model = VISION[family]()
    native = pop_ext.load(model, plan_of())
    first, second = prompt(model, [7, "image", 5]), torch.full((1, 4), 3)
    columns = first.ids.shape[1] + 4
    positions = torch.arange(columns)[None]
    logits = []
    for given in (positions, positions[:, -4:]):
        cache = native.prefill(first.ids, **first.call).past_key_values
        logits.append(native.prefill(second, past_key_values=cache, position_ids=given).logits)
    assert torch.equal(*logits)
    with pytest.raises(ValueError, match=r"position_ids: expected shape \[1, 4\]( or \[3, 1, 4\])?, got \[1, 5\]"):
        native.prefill(second, past_key_values=cache, position_ids=positions[:, :5])


def test_native_prefill_keeps_no_image_features_alive():
    model = VISION["gemma3"]()
    output = pop_ext.load(model, plan_of()).prefill(
        prompt(model, [7, "image", 5]).ids, **prompt(model, [7, "image", 5]).call
    )
    assert output.wrapper_output is None


def test_a_call_stores_the_stock_rope_deltas():
    model = qwen3_vl()
    p = prompt(model, [7, "image", 5])
    with torch.no_grad():
        model(p.ids, use_cache=True, logits_to_keep=1, **p.call)
        expected, model.model.rope_deltas = model.model.rope_deltas, None
        with pop_ext.enabled(model, plan_of(), strict=True):
            model(p.ids, use_cache=True, logits_to_keep=1, **p.call)
    assert torch.equal(model.model.rope_deltas, expected)
    assert int(expected) != 0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_failing_head_leaves_model_and_cache_unchanged(family):
    model = VISION[family]()
    p = prompt(model, [7, "image", 5])
    cache = DynamicCache()
    model.lm_head.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("head")))
    with pop_ext.enabled(model, plan_of()), torch.no_grad(), pytest.raises(RuntimeError, match="head"):
        model(p.ids, use_cache=True, logits_to_keep=1, past_key_values=cache, **p.call)
    assert cache.get_seq_length() == 0
    assert getattr(model.model, "rope_deltas", None) is None


# Declined and refused calls


def test_token_types_without_the_past_run_the_stock_forward():
    model = pop_ext.enable(gemma3_vl(), plan_of())
    first, second = prompt(model, [9, "image", 6]), prompt(model, [3, "image", 2], seed=1)
    with torch.no_grad():
        cache = model(first.ids, use_cache=True, logits_to_keep=1, **first.call)
        past = getattr(cache, "cache", None) or cache.past_key_values
        decision = pop_ext.explain(model, second.ids, past_key_values=past, logits_to_keep=1, **second.vision)
        whole = {**second.vision, "token_type_ids": torch.cat([v.vision["token_type_ids"] for v in (first, second)], 1)}
        assert pop_ext.explain(model, second.ids, past_key_values=past, logits_to_keep=1, **whole).native
    assert not decision.native
    assert decision.rule == "token_type_ids"


def test_a_hook_on_the_wrapper_runs_the_stock_forward():
    model = pop_ext.enable(qwen3_vl(), plan_of())
    p = prompt(model, [7, "image", 5])
    hook = model.model.register_forward_hook(lambda *_: None)
    with torch.no_grad():
        decision = pop_ext.explain(model, p.ids, logits_to_keep=1, **p.call)
        hook.remove()
        assert pop_ext.explain(model, p.ids, logits_to_keep=1, **p.call).native
    assert decision.rule == "hooks"
    assert "model" in decision.reason


def test_a_hook_in_the_vision_tower_runs():
    model = pop_ext.enable(qwen3_vl(), plan_of(), strict=True)
    p = prompt(model, [7, "image", 5])
    seen: list[int] = []
    model.model.visual.register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        model(p.ids, use_cache=True, logits_to_keep=1, **p.call)
    assert seen == [1]


def test_a_text_model_refuses_image_arguments():
    from models import llama, tokens

    model = llama()
    with pytest.raises(TypeError, match="pixel_values: expected no such argument for a llama, got one"):
        pop_ext.load(model, "third").prefill(tokens(model, 1, 5), pixel_values=torch.zeros(1))
    with pytest.raises(TypeError, match="pixel_values: expected no such argument for a LlamaForCausalLM, got one"):
        reference.prefill(model, tokens(model, 1, 5), "third", pixel_values=torch.zeros(1))


@pytest.mark.parametrize(
    ("types", "error", "text"),
    [
        (torch.zeros(1, 3, dtype=torch.long), ValueError, r"token_type_ids: expected shape \[1, 33\].* got \[1, 3\]"),
        (torch.zeros(1, 33), TypeError, "token_type_ids: expected an integer tensor, got torch.float32"),
    ],
)
def test_malformed_token_types_are_refused(types, error, text):
    model = gemma3_vl()
    p = prompt(model, [9, "image", 6])
    with pytest.raises(error, match=text):
        pop_ext.load(model, plan_of()).prefill(p.ids, **{**p.call, "token_type_ids": types})


def test_an_id_outside_the_vocabulary_is_refused():
    model = qwen3_vl()
    p = prompt(model, [7, "image", 5])
    p.ids[0, 0] = 263
    with pytest.raises(ValueError, match="input_ids: expected ids from 0 to 262, got 263"):
        pop_ext.load(model, plan_of()).prefill(p.ids, **p.call)
    assert int((p.ids == IMAGE).sum()) == 6
