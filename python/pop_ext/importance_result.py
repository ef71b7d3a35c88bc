"""What virtual gates found, per layer and stage: statistics, a plan, a file, a plot."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor

from pop_ext.plan import Plan


@dataclass(frozen=True)
class Importance:
    """Result of ``pop_ext.importance``.

    Attributes:
        model: kind and sizes of the model.
        num_layers: its depth ``L``.
        seed, continuation: arguments of the run.
        batches: how many batches it read.
        prefill_squares, decode_squares: ``(dL/dg)^2`` of each sample, ``[samples][L]``.
    """

    model: str
    num_layers: int
    seed: int
    continuation: int | None
    batches: int
    prefill_squares: list[list[float]]
    decode_squares: list[list[float]]

    @classmethod
    def empty(cls, model: str, num_layers: int, seed: int, continuation: int | None) -> Importance:
        return cls(model, num_layers, seed, continuation, 0, [], [])

    @property
    def samples(self) -> int:
        return len(self.prefill_squares)

    @property
    def prefill(self) -> list[float]:
        """Importance of each layer for the context rows ``[L]``, in nats squared."""
        return [_mean(column) for column in zip(*self.prefill_squares, strict=True)]

    @property
    def decode(self) -> list[float]:
        """Importance of each layer for the rows that predict ``[L]``, in nats squared."""
        return [_mean(column) for column in zip(*self.decode_squares, strict=True)]

    @property
    def prefill_stderr(self) -> list[float]:
        """Standard error of ``prefill`` over samples ``[L]``; nan for one sample."""
        return [_standard_error(column) for column in zip(*self.prefill_squares, strict=True)]

    @property
    def decode_stderr(self) -> list[float]:
        """Standard error of ``decode`` over samples ``[L]``; nan for one sample."""
        return [_standard_error(column) for column in zip(*self.decode_squares, strict=True)]

    def plan(self, count: int, *, contiguous: bool = True, boundary: int = 1, min_tokens: int = 0) -> Plan:
        """Omits the ``count`` layers that matter least in prefill.

        Args:
            contiguous: consecutive layers with the least sum, the deepest such where sums are equal; otherwise each
                layer is ranked alone.

        Raises:
            ValueError, TypeError: a count that is no integer in ``0...L-1``.
        """
        if isinstance(count, bool) or not isinstance(count, int):
            raise TypeError(f"count: expected an int, got {count!r}")
        if not 0 <= count < self.num_layers:
            raise ValueError(f"count: expected an integer in 0...{self.num_layers - 1}, got {count}")
        scores = self.prefill
        if contiguous:
            starts = range(self.num_layers - count, -1, -1)
            start = min(starts, key=lambda first: math.fsum(scores[first : first + count]))
            omit = list(range(start, start + count))
        else:
            omit = sorted(range(self.num_layers), key=lambda layer: (scores[layer], -layer))[:count]
        return Plan(self.num_layers, omit, boundary, min_tokens)

    def save(self, path: str | PathLike[str]) -> None:
        """Writes a JSON file; a reader never finds half of one."""
        target = Path(path)
        beside = target.with_name(f"{target.name}.{os.getpid()}.tmp")
        beside.write_text(json.dumps({**asdict(self), **self._statistics()}) + "\n", encoding="utf-8")
        beside.replace(target)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Importance:
        """Reads what ``save`` wrote.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is not JSON, or lacks a member.
        """
        text = Path(path).read_text(encoding="utf-8")
        try:
            members = json.loads(text)
            return cls(**{name: members[name] for name in cls.__dataclass_fields__})
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: expected what Importance.save writes, got {error!r}") from None

    def plot(self, path: str | PathLike[str]) -> None:
        """Draws importance by layer, a line a stage with standard errors, to a file whose ending names the format.

        Raises:
            ImportError: matplotlib is not installed (extra ``plot``).
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.add_subplot()
        layers = range(self.num_layers)
        for name, means, errors in (
            ("prefill (context rows)", self.prefill, self.prefill_stderr),
            ("decode (loss rows)", self.decode, self.decode_stderr),
        ):
            axes.errorbar(layers, means, yerr=errors, marker="o", capsize=3, label=name)
        axes.set_yscale("log", nonpositive="clip")
        axes.set_xlabel("layer")
        axes.set_ylabel("E[(dL/dg)²]")
        axes.set_title(f"Importance by virtual gates, {self.samples} samples")
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(path)

    def extended(self, prefill: Tensor, decode: Tensor) -> Importance:
        """With one more batch of derivatives, each ``[batch, L]``; squared here, a sample at a time."""
        return replace(
            self,
            batches=self.batches + 1,
            prefill_squares=self.prefill_squares + prefill.square().tolist(),
            decode_squares=self.decode_squares + decode.square().tolist(),
        )

    def require_same_run(self, other: Importance, path: str) -> Importance:
        """Self, where ``other`` is a run of the same model and arguments."""
        for name in ("model", "num_layers", "seed", "continuation"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                raise ValueError(f"state: {path} was written with {name} {mine!r}, this run has {theirs!r}")
        return self

    def _statistics(self) -> dict[str, Any]:
        names = ("prefill", "prefill_stderr", "decode", "decode_stderr")
        # JSON has no nan, which is the error of a single sample.
        return {name: [None if math.isnan(x) else x for x in getattr(self, name)] for name in names}


def _mean(values: tuple[float, ...]) -> float:
    return math.fsum(values) / len(values)


def _standard_error(values: tuple[float, ...]) -> float:
    count = len(values)
    if count < 2:
        return math.nan
    mean = _mean(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1) / count)
