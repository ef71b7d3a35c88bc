"""Operands of single kernels, in the shapes of a prompt of ``tokens`` rows without a past."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pop_ext import _core
from pop_ext.hf.native_model import NativeModel

_LAYER = "layers."


@dataclass
class Operands:
    """Random operands of the building blocks.

    Attributes:
        spec: shape of the model.
        tokens: rows of the prompt.
        dtype: of the operands.
        device: of the operands.
        cos: ``[tokens, rotary_dim]`` float32.
        sin: ``[tokens, rotary_dim]`` float32.
        lengths: ``cu_seqlens``, ``past_lens`` and ``cache_start`` of one sequence.
    """

    spec: _core.ModelSpec
    tokens: int
    dtype: torch.dtype
    device: torch.device

    def __post_init__(self) -> None:
        angle = torch.rand(self.tokens, self.spec.rotary_dim, device=self.device)
        self.cos, self.sin = angle.cos(), angle.sin()
        self.lengths = (torch.tensor([0, self.tokens], dtype=torch.int32), *_zeros(2))

    @property
    def kind(self) -> tuple[torch.dtype, torch.device]:
        """The dtype and the device."""
        return self.dtype, self.device

    def rand(self, *shape: int) -> torch.Tensor:
        """Return normally distributed numbers in the model's dtype."""
        return torch.empty(shape, dtype=self.dtype, device=self.device).normal_()

    def rows(self) -> torch.Tensor:
        """Return random hidden states ``[tokens, hidden_size]``."""
        return self.rand(self.tokens, self.spec.hidden_size)

    def cache(self) -> torch.Tensor:
        """Return a random cache tensor ``[1, kv_heads, tokens, head_dim]``."""
        return self.rand(1, self.spec.num_kv_heads, self.tokens, self.spec.head_dim)

    def queries(self) -> torch.Tensor:
        """Return random Q ``[tokens, heads, head_dim]``."""
        return self.rand(self.tokens, self.spec.num_heads, self.spec.head_dim)

    def keys(self) -> torch.Tensor:
        """Return random K or V ``[tokens, kv_heads, head_dim]``."""
        return self.rand(self.tokens, self.spec.num_kv_heads, self.spec.head_dim)


def _zeros(count: int) -> list[torch.Tensor]:
    return [torch.zeros(1, dtype=torch.int32) for _ in range(count)]


def with_layers(spec: _core.ModelSpec, layers: Sequence[int]) -> _core.ModelSpec:
    """Return the spec of a model that has only these layers, in this order."""
    facts = json.loads(spec.to_json())
    facts["num_layers"] = len(layers)
    for name in ("window", "rope_table", "sparse"):
        facts[name] = [facts[name][layer] for layer in layers]
    return _core.ModelSpec.from_json(json.dumps(facts))


class BoundaryStep:
    """The boundary rows of a prompt through a run of omitted layers, over a cache of the tokens before them.

    Calls ``pop::prefill`` on a model of only these layers (with the embedding and the final norm, which take little
    time) with ``tokens - rows`` positions in the cache. Its time is mostly that of reading the weights.

    Args:
        native: the whole model.
        run: the layers.
        tokens: length of the prompt.
        rows: number of boundary rows.
    """

    def __init__(self, native: NativeModel, run: range, tokens: int, rows: int = 1) -> None:
        rows = min(rows, tokens)
        spec = with_layers(native.spec, run)
        weights = {ref.slot: ref.tensor for ref in native.description.weights}
        plan = _core.Plan(len(run), [])
        slots = [_slot_in(name, run) for name, _layer, _shape in spec.weight_slots()]
        with torch.no_grad():
            self._handle = torch.ops.pop.load(spec.to_json(), plan.to_json(), [weights[slot] for slot in slots])
        operands = Operands(spec, tokens, native.dtype, native.device)
        one = torch.ones(1, dtype=torch.int32)
        self._arguments: tuple[Any, ...] = (
            torch.zeros(rows, dtype=torch.int64, device=native.device),
            *(table[-rows:].contiguous() for table in (operands.cos, operands.sin)),
            torch.tensor([0, rows], dtype=torch.int32),
            torch.tensor([tokens - rows], dtype=torch.int32),
            torch.zeros(1, dtype=torch.int32),
            *(one * rows, one),
            *([operands.cache() for _ in run] for _ in range(2)),
            None,
            False,
        )

    def __call__(self) -> torch.Tensor:
        with torch.no_grad():
            return torch.ops.pop.prefill(self._handle, *self._arguments)

    def __del__(self) -> None:
        handle = getattr(self, "_handle", None)
        if handle is not None:
            torch.ops.pop.unload(handle)


def _slot_in(name: str, run: range) -> str:
    """Translate a weight's name to the whole model's: "layers.0.q_proj" -> "layers.11.q_proj" for a run from 11."""
    if not name.startswith(_LAYER):
        return name
    index, _, rest = name.removeprefix(_LAYER).partition(".")
    return f"{_LAYER}{run[int(index)]}.{rest}"
