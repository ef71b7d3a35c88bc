"""torch.ops.pop.attention equals softmax(scale * q.k) . v in float64, on every instruction set of this processor."""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pop_ext  # noqa: F401  (registers torch.ops.pop)
import pytest
import torch
from attention_calls import Call, assert_equals_reference, make_call
from instruction_sets import ISAS, assert_lesser_sets_pass
from op_operands import DTYPES

LENGTHS = [1, 2, 19, 33, 49, 111, 127, 128, 129, 500]
PASTS = [0, 1, 77]
# (heads, kv_heads, head_dim)
SHAPES = [
    (4, 4, 64),
    (8, 2, 64),
    (8, 1, 80),
    (6, 2, 96),
    (4, 1, 128),
    (2, 1, 256),
    (7, 1, 40),
    (3, 3, 8),
    (16, 1, 24),
    (1, 1, 64),
    (4, 2, 32),
    (4, 1, 160),
    (2, 2, 224),
]
TILES = [64, 128]  # keys in a tile of the CPU kernel, without and with AMX, which rounds them to 16 and 32
WINDOWS = [1, 2, 15, 17, 31, 33, 50, *(tile + i for tile in TILES for i in (-1, 0, 1)), 205, 206, 207]


# Against the reference


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("past", PASTS)
@pytest.mark.parametrize("length", LENGTHS)
def test_attention_equals_the_reference(length, past, dtype, shape):
    assert_equals_reference(make_call(shape, [length], [past], dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(("length", "past"), [(206, 0), (129, 77), (2, 204)])
def test_a_window_hides_older_positions(length, past, window, dtype):
    assert_equals_reference(make_call((8, 2, 64), [length], [past], dtype, window))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("permuted", [False, True], ids=["consecutive slots", "permuted slots"])
@pytest.mark.parametrize("slots_first", [False, True], ids=["heads first", "slots first"])
@pytest.mark.parametrize("window", [0, 40])
def test_any_cache_layout_and_slot_table_equals_the_reference(window, slots_first, permuted, dtype):
    lengths, pasts = [111, 1, 2, 19], [0, 300, 77, 64]
    assert_equals_reference(make_call((6, 2, 96), lengths, pasts, dtype, window, slots_first, permuted))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [1, 2, 3, 8, 16])
@pytest.mark.parametrize("shape", [(4, 1, 64), (8, 1, 128), (2, 2, 256), (4, 1, 80)], ids=str)
def test_a_few_boundary_rows_over_a_long_cache_equal_the_reference(shape, length, dtype):
    assert_equals_reference(make_call(shape, [length], [1500], dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [-0.3, 0.0, 1.7])
@pytest.mark.parametrize("length", [1, 129])
def test_any_scale_equals_the_reference(length, scale, dtype):
    assert_equals_reference(make_call((4, 2, 64), [length], [77], dtype, scale=scale))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [2, 200])
def test_growing_scores_stay_exact(length, dtype):
    call = make_call((4, 2, 64), [length], [200], dtype)
    call.query.fill_(1)
    call.key.abs_().mul_(torch.linspace(0.1, 3, call.key.shape[2])[:, None])
    assert_equals_reference(replace(call, scale=0.1))


# (lengths, pasts, blocks): a prompt that is one image; images at both ends, adjacent, of one token, of any length.
BLOCKS = [
    ([19], [0], [(0, 0, 19)]),
    ([200], [77], [(0, 0, 70), (0, 70, 71), (0, 100, 200)]),
    ([129, 2, 300], [0, 300, 64], [(0, 3, 128), (1, 0, 2), (2, 64, 192), (2, 200, 201)]),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [0, 5, 90])
@pytest.mark.parametrize(("lengths", "pasts", "blocks"), BLOCKS)
def test_tokens_of_a_block_attend_to_each_other(lengths, pasts, blocks, window, dtype):
    for shape in ((8, 2, 64), (3, 1, 40)):
        assert_equals_reference(make_call(shape, lengths, pasts, dtype, window, blocks=blocks))


def with_sinks(call: Call, sinks: list[float] | None = None) -> Call:
    """Return a call with these sinks, repeated over the heads; None: random ones."""
    heads = call.query.shape[1]
    values = 2 * torch.randn(heads) if sinks is None else torch.tensor(sinks).repeat(heads)[:heads]
    return replace(call, sinks=values.to(call.query.dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("length", "past"), [(1, 0), (1, 77), (2, 300), (19, 1), (129, 77)])
def test_a_sink_takes_its_share_of_the_softmax(length, past, shape, dtype):
    assert_equals_reference(with_sinks(make_call(shape, [length], [past], dtype)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [1, 2, 50, 64, 65, 128, 129])
def test_a_sink_is_seen_through_every_window(window, dtype):
    call = make_call((8, 2, 64), [206, 2, 1], [0, 300, 77], dtype, window, permuted=True)
    assert_equals_reference(with_sinks(call))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [1, 2, 8])
def test_a_sink_counts_once_over_a_long_cache(length, dtype):
    assert_equals_reference(with_sinks(make_call((8, 2, 64), [length], [1500], dtype), [6.0, -3.0, 9.0]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [1, 2, 70])
def test_sinks_far_above_and_below_the_scores_equal_the_reference(length, dtype):
    call = with_sinks(make_call((8, 2, 64), [length], [70], dtype), [-3e4, -100.0, 0.0, 30.0, 100.0, 3e4, -math.inf])
    assert_equals_reference(call)
    out = call.run()
    assert not out[:, 5].any()
    assert torch.equal(out[:, [0, 6]], replace(call, sinks=None).run()[:, [0, 6]])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [1, 100])
def test_a_sink_that_is_no_number_reaches_its_head_alone(length, dtype):
    out = with_sinks(make_call((4, 2, 64), [length], [70], dtype), [0.0, math.nan, 1.0, 2.0]).run()
    assert out[:, 1].isnan().all()
    assert out[:, [0, 2, 3]].isfinite().all()


# Independence


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(8, 2, 64), (6, 2, 96), (3, 1, 40)], ids=str)
def test_batch_mates_do_not_change_a_sequences_bits(shape, dtype):
    call = make_call(shape, [129, 1, 19, 500], [0, 77, 300, 1], dtype, window=90)
    alone = torch.cat([call.sequence(i).run() for i in range(4)])
    assert torch.equal(call.run(), alone)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_number_of_threads_does_not_change_bits(dtype):
    call = make_call((8, 2, 64), [500, 19, 1], [0, 77, 300], dtype)
    one = call.run()
    torch.set_num_threads(2)
    assert torch.equal(call.run(), one)
    assert torch.equal(call.run(), one)


def test_two_concurrent_callers_do_not_disturb_each_other():
    torch.set_num_threads(2)
    calls = [make_call((8, 2, 64), [300 + i], [i], torch.bfloat16) for i in range(2)]
    expected = [call.run() for call in calls]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(10):
            results = list(pool.map(Call.run, calls))
            assert all(torch.equal(a, e) for a, e in zip(results, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [2, 100])
def test_a_nan_reaches_only_the_heads_that_see_it(length, dtype):
    call = make_call((4, 2, 64), [length], [70], dtype)
    slot = call.slots(0)[65]
    call.key[0, 1, slot, 3] = math.nan
    out = call.run()
    assert out[:, 2:].isnan().all()
    assert out[:, :2].isfinite().all()


# The operator


def test_the_operator_passes_opcheck():
    args = make_call((4, 2, 64), [19, 2], [0, 7]).args()
    torch.library.opcheck(torch.ops.pop.attention.default, args)
    torch.library.opcheck(torch.ops.pop.attention.default, args, {"sinks": torch.randn(4)})


@pytest.mark.parametrize("sinks", [torch.zeros(3), torch.zeros(4, dtype=torch.bfloat16), torch.zeros(1, 4)])
def test_sinks_of_another_shape_or_dtype_are_refused_by_name(sinks):
    with pytest.raises(RuntimeError, match="pop::attention: sinks: expected"):
        replace(make_call((4, 2, 64), [2], [7]), sinks=sinks).run()


def test_the_selected_instruction_set_runs():
    wanted = os.environ.get("POP_CPU_ISA")
    # limits that have kernels for products of integers alone
    of_integers = {"avx_vnni": "avx2", "avx512_vnni": "avx2"}
    assert torch.ops.pop.cpu_isa() in ([of_integers.get(wanted, wanted)] if wanted else ISAS)


def test_lesser_instruction_sets_pass_these_tests():
    assert_lesser_sets_pass("not lesser", __file__)
