"""torch.ops.pop.attention against softmax(scale * q.k) . v in float64, on every instruction set of this processor."""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import pop_ext  # noqa: F401  (registers torch.ops.pop)
import pytest
import torch
from instruction_sets import ISAS, assert_lesser_sets_pass
from op_operands import DTYPES
from tolerance import assert_close_fp32, assert_low_precision
from torch import Tensor

LENGTHS = [1, 2, 19, 111, 129, 500]
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
]
TILE = 64  # keys that the CPU kernel takes at a time


@dataclass(frozen=True)
class Call:
    """Arguments of one call; key slots that no row may see hold NaN."""

    query: Tensor  # [rows, heads, head_dim]
    key: Tensor  # [batch, kv_heads, capacity, head_dim]
    value: Tensor
    lengths: list[int]
    pasts: list[int]
    starts: list[int]
    scale: float
    window: int = 0
    table: Tensor | None = None  # int32 [batch, capacity]

    def args(self) -> tuple:
        cu_seqlens = torch.tensor([0, *self.lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        pasts = torch.tensor(self.pasts, dtype=torch.int32)
        starts = torch.tensor(self.starts, dtype=torch.int32)
        return self.query, self.key, self.value, cu_seqlens, pasts, starts, self.scale, self.window, self.table

    def run(self) -> Tensor:
        return torch.ops.pop.attention(*self.args())

    def sequence(self, i: int) -> Call:
        """The call of sequence i alone."""
        first = sum(self.lengths[:i])
        return replace(
            self,
            query=self.query[first : first + self.lengths[i]],
            key=self.key[i : i + 1],
            value=self.value[i : i + 1],
            lengths=self.lengths[i : i + 1],
            pasts=self.pasts[i : i + 1],
            starts=self.starts[i : i + 1],
            table=None if self.table is None else self.table[i : i + 1],
        )

    def slots(self, i: int) -> Tensor:
        """Slots of the positions of sequence i, from 0 on."""
        total = self.pasts[i] + self.lengths[i]
        if self.table is not None:
            return self.table[i, :total].long()
        return self.starts[i] + torch.arange(total)

    def visible(self, i: int) -> Tensor:
        """[length, past + length]: which positions a row of sequence i sees."""
        rows = self.pasts[i] + torch.arange(self.lengths[i])[:, None]
        keys = torch.arange(self.pasts[i] + self.lengths[i])[None]
        seen = keys <= rows
        return seen & (keys > rows - self.window) if self.window else seen

    def per_sequence(self, attend) -> Tensor:
        """attend(q, k, v, visible) for each sequence, on [heads, length, head_dim], packed again."""
        outputs = []
        group = self.query.shape[1] // self.key.shape[1]
        for i in range(len(self.lengths)):
            query = self.sequence(i).query.transpose(0, 1)
            hidden = ~self.visible(i).any(0)
            k, v = (
                x[i][:, self.slots(i)].masked_fill(hidden[None, :, None], 0).repeat_interleave(group, 0)
                for x in (self.key, self.value)
            )
            outputs.append(attend(query, k, v, self.visible(i)).transpose(0, 1))
        return torch.cat(outputs)

    def reference(self) -> Tensor:
        def attend(q, k, v, visible):
            scores = (q.double() @ k.double().transpose(1, 2)) * self.scale
            return scores.masked_fill(~visible, -math.inf).softmax(-1) @ v.double()

        return self.per_sequence(attend)

    def sdpa(self) -> Tensor:
        def attend(q, k, v, visible):
            return torch.nn.functional.scaled_dot_product_attention(
                q[None], k[None], v[None], attn_mask=visible, scale=self.scale
            )[0]

        return self.per_sequence(attend)


def make_call(
    shape=(8, 2, 64),
    lengths=(19,),
    pasts=(0,),
    dtype=torch.float32,
    window=0,
    slots_first=False,
    permuted=False,
    scale=None,
) -> Call:
    """Random q, k and v. `slots_first`: the cache lies as [batch, capacity, kv_heads, head_dim]."""
    heads, kv_heads, head_dim = shape
    lengths, pasts = list(lengths), list(pasts)
    batch, capacity = len(lengths), max(n + p for n, p in zip(lengths, pasts, strict=True)) + 5

    def cache() -> Tensor:
        if slots_first:
            return torch.randn(batch, capacity, kv_heads, head_dim).to(dtype).transpose(1, 2)
        return torch.randn(batch, kv_heads, capacity, head_dim).to(dtype)

    # Rows of q lie further apart than they are wide, as in a fused q, k, v projection.
    query = torch.randn(sum(lengths), heads + 3, head_dim).to(dtype)[:, :heads]
    table = torch.stack([torch.randperm(capacity) for _ in lengths]).int() if permuted else None
    call = Call(
        query=query,
        key=cache(),
        value=cache(),
        lengths=lengths,
        pasts=pasts,
        starts=[0 if permuted else i % 5 for i in range(1, batch + 1)],
        scale=head_dim**-0.5 if scale is None else scale,
        window=window,
        table=table,
    )
    for i in range(batch):
        unseen = torch.ones(capacity, dtype=torch.bool)
        unseen[call.slots(i)[call.visible(i).any(0)]] = False
        for x in (call.key, call.value):
            x[i].masked_fill_(unseen[None, :, None], math.nan)
    return call


def assert_equals_reference(call: Call) -> None:
    actual, expected = call.run(), call.reference()
    assert actual.is_contiguous()
    assert actual.dtype == call.query.dtype
    if call.query.dtype == torch.float32:
        assert_close_fp32(actual, expected, "attention", atol=2e-5)
    else:
        assert_low_precision(actual, call.sdpa(), expected, "attention")


# Against the reference


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("past", PASTS)
@pytest.mark.parametrize("length", LENGTHS)
def test_attention_equals_the_reference(length, past, dtype, shape):
    assert_equals_reference(make_call(shape, [length], [past], dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [1, 2, 50, TILE - 1, TILE, TILE + 1, 205, 206, 207])
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
def test_scores_that_keep_growing_stay_exact(length, dtype):
    call = make_call((4, 2, 64), [length], [200], dtype)
    call.query.fill_(1)
    call.key.abs_().mul_(torch.linspace(0.1, 3, call.key.shape[2])[:, None])
    assert_equals_reference(replace(call, scale=0.1))


# Independence


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sequence_has_the_same_bits_with_and_without_batch_mates(dtype):
    call = make_call((8, 2, 64), [129, 1, 19, 500], [0, 77, 300, 1], dtype, window=90)
    alone = torch.cat([call.sequence(i).run() for i in range(4)])
    assert torch.equal(call.run(), alone)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_number_of_threads_leaves_the_bits_alone(dtype):
    call = make_call((8, 2, 64), [500, 19, 1], [0, 77, 300], dtype)
    one = call.run()
    torch.set_num_threads(2)
    assert torch.equal(call.run(), one)
    assert torch.equal(call.run(), one)


def test_two_callers_at_once_do_not_disturb_each_other():
    torch.set_num_threads(2)
    calls = [make_call((8, 2, 64), [300 + i], [i], torch.bfloat16) for i in range(2)]
    expected = [call.run() for call in calls]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(10):
            results = list(pool.map(Call.run, calls))
            assert all(torch.equal(a, e) for a, e in zip(results, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [2, 100])
def test_a_nan_reaches_the_rows_that_see_it(length, dtype):
    call = make_call((4, 2, 64), [length], [70], dtype)
    slot = call.slots(0)[65]
    call.key[0, 1, slot, 3] = math.nan
    out = call.run()
    assert out[:, 2:].isnan().all()
    assert out[:, :2].isfinite().all()


# The operator


def test_the_operator_passes_opcheck():
    torch.library.opcheck(torch.ops.pop.attention.default, make_call((4, 2, 64), [19, 2], [0, 7]).args())


def test_the_instruction_set_is_the_one_asked_for():
    wanted = os.environ.get("POP_CPU_ISA")
    assert torch.ops.pop.cpu_isa() in ([wanted] if wanted else ISAS)


def test_lesser_instruction_sets_pass_these_tests():
    assert_lesser_sets_pass(__file__, "not lesser")
