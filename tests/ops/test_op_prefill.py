"""torch.ops.pop.prefill on the caller's caches equals the oracle."""

from __future__ import annotations

import pop_ext
import pytest
import torch
from against_oracle import GAPS, NATIVE, plan_of, run_oracle
from instruction_sets import assert_lesser_sets_pass
from models import shared, tokens
from op_calls import LAYOUTS, SENTINEL, op_call, rope_of, run_op
from op_operands import DTYPES, strided
from other_families import OTHER, shared_other
from tolerance import assert_close_fp32


def assert_prefill_equals_oracle(native, prompts, call, past=None):
    """Compare hidden states of the kept rows, and K/V of every layer and position, for each sequence."""
    hidden = run_op(call)
    boundary, keep, start = (call[name].tolist() for name in ("boundary", "logits_to_keep", "cache_start"))
    row = 0
    for i, ids in enumerate(prompts):
        cache = None if past is None else past[i]
        expected = run_oracle(
            native.model, native.plan, ids[None], boundary=boundary[i], logits_to_keep=keep[i], past_key_values=cache
        )
        assert_close_fp32(hidden[row : row + keep[i]], expected.hidden_states[0], f"hidden states of sequence {i}")
        row += keep[i]
        for number, layer in enumerate(expected.cache.layers):
            slots = slice(start[i], start[i] + layer.keys.shape[2])
            where = f"layer {number}, sequence {i}"
            assert_close_fp32(call["key_cache"][number][i][:, slots], layer.keys[0], f"keys, {where}")
            assert_close_fp32(call["value_cache"][number][i][:, slots], layer.values[0], f"values, {where}")
    assert row == len(hidden)
    return hidden


def assert_sentinels_outside(call, spans):
    """Check that slots of sequence i outside `spans[i]` still hold the sentinel."""
    for cache in (*call["key_cache"], *call["value_cache"]):
        for i, (begin, end) in enumerate(spans):
            assert (cache[i][:, :begin] == SENTINEL).all()
            assert (cache[i][:, end:] == SENTINEL).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", [*NATIVE, "gpt_oss"])
def test_prefill_fills_caches_of_any_stride(family, layout):
    model = shared_other(family) if family in OTHER else shared(family)
    native = pop_ext.load(model, plan_of(model, GAPS, 2))
    prompts = [tokens(native.model, n, seed=n) for n in (19, 1, 33)]
    call = op_call(
        native, prompts, start=[3, 0, 7], boundary=[2, 1, 9], logits_to_keep=[2, 1, 4], capacity=45, layout=layout
    )
    assert_prefill_equals_oracle(native, prompts, call)
    assert_sentinels_outside(call, [(3, 22), (0, 1), (7, 40)])


@pytest.mark.cpu
def test_lesser_instruction_sets_prefill_gpt_oss():
    """Its experts alone read channels in turns and add biases of their own."""
    assert_lesser_sets_pass("gpt_oss and any_stride", __file__)


def test_prefill_writes_no_byte_between_the_views():
    native = pop_ext.load(shared(), plan_of(shared(), GAPS))
    spec = native.spec
    for name in ("padded channels", "[B, S, H, D]"):
        call = op_call(native, [tokens(native.model, 9)])
        buffers, keys, values = LAYOUTS[name](spec.num_layers, 1, spec.num_kv_heads, 11, spec.head_dim, torch.float32)
        run_op({**call, "key_cache": keys, "value_cache": values})
        for cache in (*keys, *values):
            assert not (cache[:, :, :9] == SENTINEL).any()
            cache[:, :, :9] = SENTINEL
        assert all((buffer == SENTINEL).all() for buffer in buffers)


def test_prefill_continues_the_callers_cache():
    native = pop_ext.load(shared(), plan_of(shared(), GAPS, 2))
    first = [tokens(native.model, n, seed=n) for n in (19, 4)]
    call = op_call(native, first, start=[2, 5], capacity=60)
    run_op(call)
    past = [run_oracle(native.model, native.plan, ids[None]).cache for ids in first]
    second = [tokens(native.model, n, seed=n) for n in (7, 20)]
    again = op_call(native, second, past=[19, 4], start=[2, 5], capacity=60)
    again.update(key_cache=call["key_cache"], value_cache=call["value_cache"])
    assert_prefill_equals_oracle(native, second, again, past)
    assert_sentinels_outside(again, [(2, 28), (5, 29)])


def test_prefill_scatters_through_a_slot_table():
    native = pop_ext.load(shared(), plan_of(shared(), GAPS, 2))
    prompts = [tokens(native.model, n, seed=n) for n in (19, 4)]
    straight = op_call(native, prompts, capacity=30)
    expected = run_op(straight)
    table = torch.stack([torch.randperm(30, device="cpu") for _ in prompts]).to(torch.int32)
    scattered = {**op_call(native, prompts, capacity=30), "slot_table": table}
    assert torch.equal(run_op(scattered), expected)
    for name in ("key_cache", "value_cache"):
        for ours, theirs in zip(scattered[name], straight[name], strict=True):
            for i in range(2):
                assert torch.equal(ours[i][:, table[i].long()], theirs[i])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_prefill_accepts_other_dtypes_strides_and_table_shapes(dtype):
    model = shared(dtype=dtype)
    native = pop_ext.load(model, plan_of(model, GAPS, 2))
    prompts = [tokens(model, n, seed=n) for n in (19, 4)]

    def run(**over):
        call = {**op_call(native, prompts), **over}
        return [run_op(call), *call["key_cache"], *call["value_cache"]]

    call = op_call(native, prompts)
    expected = run()
    half = native.spec.rotary_dim // 2
    spread = {
        name: torch.stack([call[name], call[name] + 1], dim=1)[:, 0]
        for name in ("cu_seqlens", "past_lens", "cache_start", "boundary", "logits_to_keep")
    }
    assert not spread["past_lens"].is_contiguous()
    rows = len(call["input"])
    variants = {
        "int32 ids": {"input": call["input"].int()},
        "strided ids": {"input": torch.stack([call["input"]] * 2, dim=1)[:, 0]},
        "half width": {"cos": call["cos"][:, :half].contiguous(), "sin": call["sin"][:, :half].contiguous()},
        "strided half width": {"cos": call["cos"][:, :half], "sin": call["sin"][:, half:]},
        "strided lengths": spread,
        "embeddings": {"input": model.model.embed_tokens.weight.detach()[call["input"]]},
        "strided embeddings": {"input": strided(model.model.embed_tokens.weight.detach()[call["input"]])},
        "column-major rope tables": {name: call[name].t().contiguous().t() for name in ("cos", "sin")},
    }
    for name, over in variants.items():
        for ours, theirs in zip(run(**over), expected, strict=True):
            assert torch.equal(ours, theirs), name
    rounded = {name: call[name].bfloat16() for name in ("cos", "sin")}
    widened = {name: table.float() for name, table in rounded.items()}
    for ours, theirs in zip(run(**rounded), run(**widened), strict=True):
        assert torch.equal(ours, theirs)
    assert rows == 23


def test_each_row_uses_its_row_of_the_rope_tables():
    native = pop_ext.load(shared(), plan_of(shared(), GAPS, 2))
    prompts = [tokens(native.model, n, seed=n) for n in (9, 12)]
    together = op_call(native, prompts)
    positions = [torch.arange(9) * 3 + 5, torch.arange(12) + 40]
    tables = [rope_of(native, p) for p in positions]
    hidden = run_op({**together, **{name: torch.cat([table[name] for table in tables]) for name in ("cos", "sin")}})
    for i in range(2):
        alone = {**op_call(native, prompts[i : i + 1]), **tables[i]}
        assert_close_fp32(hidden[i : i + 1], run_op(alone), f"sequence {i}")


def test_prefill_without_restore_on_error_gives_the_same():
    native = pop_ext.load(shared(), plan_of(shared()))
    prompts = [tokens(native.model, 19)]
    expected = run_op(op_call(native, prompts))
    assert torch.equal(run_op({**op_call(native, prompts), "restore_on_error": False}), expected)
