"""Calls of torch.ops.pop.attention on random operands, and their reference: softmax(scale * q.k) . v in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from op_calls import int32, offsets
from tolerance import assert_close_fp32, assert_low_precision
from torch import Tensor


@dataclass(frozen=True)
class Call:
    """Arguments of one call. Cache slots that no row may see hold NaN."""

    query: Tensor  # [rows, heads, head_dim]
    key: Tensor  # [batch, kv_heads, capacity, head_dim]
    value: Tensor
    lengths: list[int]
    pasts: list[int]
    starts: list[int]
    scale: float
    window: int = 0
    table: Tensor | None = None  # int32 [batch, capacity], on the CPU
    blocks: tuple[tuple[int, int, int], ...] = ()  # (sequence, begin, end) of new tokens that attend to each other
    sinks: Tensor | None = None  # [heads]

    def args(self) -> tuple:
        lengths = offsets(self.lengths), int32(self.pasts), int32(self.starts)
        return self.query, self.key, self.value, *lengths, self.scale, self.window, self.table

    def run(self) -> Tensor:
        blocks = torch.tensor(self.blocks, dtype=torch.int32, device="cpu") if self.blocks else None
        return torch.ops.pop.attention(*self.args(), blocks=blocks, sinks=self.sinks)

    def sequence(self, i: int) -> Call:
        """Return the call of sequence i alone."""
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
            blocks=tuple((0, begin, end) for sequence, begin, end in self.blocks if sequence == i),
        )

    def slots(self, i: int) -> Tensor:
        """Return the slots of all positions of sequence i, on the CPU, like the table."""
        total = self.pasts[i] + self.lengths[i]
        if self.table is not None:
            return self.table[i, :total].long()
        return self.starts[i] + torch.arange(total, device="cpu")

    def visible(self, i: int) -> Tensor:
        """Return bool [length, past + length]: the positions that each row of sequence i sees."""
        rows = self.pasts[i] + torch.arange(self.lengths[i])[:, None]
        keys = torch.arange(self.pasts[i] + self.lengths[i])[None]
        seen = keys <= rows
        for sequence, begin, end in self.blocks:
            if sequence == i:
                inside = [(x >= self.pasts[i] + begin) & (x < self.pasts[i] + end) for x in (rows, keys)]
                seen = seen | (inside[0] & inside[1])
        return seen & (keys > rows - self.window) if self.window else seen

    def per_sequence(self, attend) -> Tensor:
        """Call attend(q, k, v, visible) for each sequence, on [heads, length, head_dim], and pack the results."""
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
            scores = scores.masked_fill(~visible, -math.inf)
            if self.sinks is None:
                return scores.softmax(-1) @ v.double()
            sink = self.sinks.double()[:, None, None].expand(*scores.shape[:2], 1)
            return torch.cat([scores, sink], -1).softmax(-1)[..., :-1] @ v.double()

        return self.per_sequence(attend)

    def sdpa(self) -> Tensor:
        def attend(q, k, v, visible):
            if self.sinks is not None:  # one more key and value of zeros, whose score is the mask's
                mask = torch.zeros(visible.shape, dtype=q.dtype).masked_fill(~visible, -math.inf)
                mask = mask.expand(len(q), *visible.shape)
                visible = torch.cat([mask, self.sinks[:, None, None].expand(*mask.shape[:2], 1)], -1)[None]
                k, v = (torch.cat([x, torch.zeros_like(x[:, :1])], 1) for x in (k, v))
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
    one_start=False,
    blocks=(),
) -> Call:
    """Return a call on random q, k and v.

    Args:
        shape: (heads, kv_heads, head_dim).
        lengths: new tokens of each sequence.
        pasts: cached positions of each sequence.
        dtype: of q, k and v.
        window: as of the operator.
        slots_first: the memory layout of the cache is [batch, capacity, kv_heads, head_dim].
        permuted: a slot table gives the positions of a sequence random slots.
        scale: as of the operator; None: 1 / sqrt(head_dim).
        one_start: every sequence begins at the same slot, as in a batch of equal prompts.
        blocks: as of the operator.
    """
    heads, kv_heads, head_dim = shape
    lengths, pasts = list(lengths), list(pasts)
    batch, capacity = len(lengths), max(n + p for n, p in zip(lengths, pasts, strict=True)) + 5

    def cache() -> Tensor:
        if slots_first:
            return torch.randn(batch, capacity, kv_heads, head_dim).to(dtype).transpose(1, 2)
        return torch.randn(batch, kv_heads, capacity, head_dim).to(dtype)

    # Rows of q are strided, as in a fused q, k, v projection.
    query = torch.randn(sum(lengths), heads + 3, head_dim).to(dtype)[:, :heads]
    table = torch.stack([torch.randperm(capacity, device="cpu") for _ in lengths]).int() if permuted else None
    call = Call(
        query=query,
        key=cache(),
        value=cache(),
        lengths=lengths,
        pasts=pasts,
        starts=[0 if permuted else 3 if one_start else i % 5 for i in range(1, batch + 1)],
        scale=head_dim**-0.5 if scale is None else scale,
        window=window,
        table=table,
        blocks=tuple(blocks),
    )
    for i in range(batch):
        unseen = torch.ones(capacity, dtype=torch.bool)
        unseen[call.slots(i)[call.visible(i).any(0).cpu()]] = False
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
