"""Operands of the operators of torch.ops.pop, and their references in plain torch and float64."""

from __future__ import annotations

import torch
from op_calls import LAYOUTS, SENTINEL, int32, offsets
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPS = 1e-5


def random(*shape: int, dtype=torch.float32, seed: int = 0) -> Tensor:
    """Return normally distributed numbers on the default device; they are the same on every device."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), device="cpu")
    return values.to(torch.get_default_device(), dtype)


def strided(x: Tensor) -> Tensor:
    """Return the same values with gaps between rows."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 3), float("nan"), dtype=x.dtype)
    wide[..., : x.shape[-1]] = x
    return wide[..., : x.shape[-1]]


def assert_one_rounding(actual: Tensor, expected: Tensor, ulps: float = 2.0):
    """Check that `actual` is `expected` (float64) rounded to the dtype of `actual`."""
    eps = max(torch.finfo(actual.dtype).eps, 1e-6)
    torch.testing.assert_close(actual.double(), expected.double(), rtol=ulps * eps, atol=ulps * eps * 0.1)


def rms_norm(x: Tensor, weight: Tensor, eps: float = EPS) -> Tensor:
    x = x.double()
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.double()


def rope_tables(rows: int, rotary: int, dtype=torch.float32) -> tuple[Tensor, Tensor]:
    angle = 3 * random(rows, rotary // 2, seed=8)
    return torch.cat([angle.cos()] * 2, 1).to(dtype), torch.cat([angle.sin()] * 2, 1).to(dtype)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x [rows, heads, dim] with RoPE on its first `rotary` channels, in float64."""
    rotary, x = cos.shape[1], x.double()
    half = rotary // 2
    turned, rest = x[..., :rotary], x[..., rotary:]
    crossed = torch.cat([-turned[..., half:], turned[..., :half]], -1)
    return torch.cat([turned * cos.double()[:, None] + crossed * sin.double()[:, None], rest], -1)


# Geometries of a call on a cache: (tokens, past, start) of each sequence.
GEOMETRIES = {
    "one token": [(1, 0, 0)],
    "19 tokens": [(19, 0, 0)],
    "past": [(7, 12, 0)],
    "batch with past and start": [(7, 5, 3), (1, 0, 0), (33, 2, 9), (1, 40, 1)],
}
CAPACITY = 50


class Caches:
    """A pair of caches inside larger buffers of sentinels, and the slots of a geometry in it."""

    def __init__(self, geometry, heads, dim, dtype, layout="separate", scattered=False, layers=1):
        self.geometry = geometry
        tokens_of = [tokens for tokens, _, _ in geometry]
        self.lengths = (offsets(tokens_of), int32(p for _, p, _ in geometry), int32(s for _, _, s in geometry))
        self.slot_table = None
        if scattered:
            generator = torch.Generator().manual_seed(7)
            slots = [torch.randperm(CAPACITY, generator=generator, device="cpu") for _ in geometry]
            # Strided on purpose. Columns beyond a sequence's positions are not read.
            self.slot_table = torch.stack(slots).to(torch.int32).t().contiguous().t()
        self.buffers, self.keys, self.values = LAYOUTS[layout](layers, len(geometry), heads, CAPACITY, dim, dtype)
        self.before = [buffer.clone() for buffer in self.buffers]
        self.after = None

    def slots(self, sequence: int, new_only: bool = True) -> Tensor:
        """Return the slots of a sequence's new positions, or of all positions, on the CPU, like the slot table."""
        count, past, start = self.geometry[sequence]
        positions = torch.arange(past if new_only else 0, past + count, device="cpu")
        return positions + start if self.slot_table is None else self.slot_table[sequence, positions].long()

    def fill_past(self, seed: int = 5):
        """Write random K and V at every past position."""
        for number, cache in enumerate((*self.keys, *self.values)):
            for i, (count, past, _) in enumerate(self.geometry):
                slots = self.slots(i, new_only=False)[:-count]
                cache[i][:, slots] = random(cache.shape[1], past, cache.shape[3], dtype=cache.dtype, seed=seed + number)
        self.before = [buffer.clone() for buffer in self.buffers]

    def new_rows(self, cache: Tensor) -> Tensor:
        """Return [rows, heads, dim], the contents of the new positions of all sequences."""
        return torch.cat([cache[i][:, self.slots(i)].transpose(0, 1) for i in range(len(self.geometry))])

    def rows_of(self, cache: Tensor, sequence: int) -> Tensor:
        """Return [heads, past + tokens, dim], the contents of one sequence in order."""
        return cache[sequence][:, self.slots(sequence, new_only=False)]

    def assert_nothing_else_changed(self):
        """Restore the new positions, and check that the buffers then equal their old state bit by bit."""
        shadows = [buffer.clone() for buffer in self.buffers]
        for cache in (*self.keys, *self.values):
            for i in range(len(self.geometry)):
                cache[i][:, self.slots(i)] = SENTINEL
        for buffer, before in zip(self.buffers, self.before, strict=True):
            assert torch.equal(buffer, before), "a slot that the call does not address was written"
        for buffer, shadow in zip(self.buffers, shadows, strict=True):
            buffer.copy_(shadow)
