"""Importance of each layer, for context rows and for loss rows apart (POP, arXiv 2602.03295)."""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from pop_ext.methods.calibration import Batches, check_batches, count_sequences, stock_evaluation, stock_model
from pop_ext.methods.gates import ATTENTION, LAYER, MLP, gate_derivatives, gate_kinds
from pop_ext.methods.plots import plot_importance
from pop_ext.plans.origin import Origin, check_origin, origin_of, weights_hash
from pop_ext.plans.plan import Plan
from pop_ext.plans.selection import ranked_plan
from pop_ext.utils.files import read_utf8
from pop_ext.utils.json import finite, read_int, read_text
from pop_ext.utils.progress import Progress, reporting
from pop_ext.utils.texts import missing_or, refuse_unknown

StrPath = str | PathLike[str]
_MEMBERS = frozenset({"origin", "continuation", "seed", "digest", "weights", "gates"})


@dataclass(frozen=True)
class GateScores:
    """Importance ``E[(dL/dg_l)^2]`` of every layer for one kind of gate, in nats squared.

    Attributes:
        prefill: One value per layer, for gates on context rows.
        decode: One value per layer, for gates on loss rows.
        prefill_error: Standard errors of ``prefill``; NaN for a single sample.
        decode_error: Standard errors of ``decode``; NaN for a single sample.
    """

    prefill: tuple[float, ...]
    decode: tuple[float, ...]
    prefill_error: tuple[float, ...]
    decode_error: tuple[float, ...]


@dataclass(frozen=True)
class Importance:
    """Importance of every layer, as ``pop_ext.importance`` returns it.

    Attributes:
        layer: Scores of whole residual branches.
        attention: Scores of attention branches; None without ``branches=True``.
        mlp: Scores of MLP branches; None without ``branches=True``.
        origin: The model and the number of samples.
        continuation: Number of loss rows of each sample, as given; None for the default.
        seed: Seed of the drawn targets.
        digest: SHA-256 over the samples' ids. A resumed run must begin with the same samples.
        weights: ``weights_hash`` of the model, and its dtype. A resumed run must use the same weights.
    """

    layer: GateScores
    attention: GateScores | None
    mlp: GateScores | None
    origin: Origin
    continuation: int | None
    seed: int
    digest: str
    weights: str

    @property
    def prefill(self) -> tuple[float, ...]:
        """Importance of each layer for the context rows."""
        return self.layer.prefill

    @property
    def decode(self) -> tuple[float, ...]:
        """Importance of each layer for the loss rows."""
        return self.layer.decode

    @property
    def prefill_error(self) -> tuple[float, ...]:
        """Standard error of ``prefill``."""
        return self.layer.prefill_error

    @property
    def decode_error(self) -> tuple[float, ...]:
        """Standard error of ``decode``."""
        return self.layer.decode_error

    @property
    def samples(self) -> int:
        """Number of sequences that the scores are averaged over."""
        return self.origin.samples or 0

    def gates(self) -> dict[str, GateScores]:
        """Return the scores by kind of gate: "layer" and, with ``branches=True``, "attention" and "mlp"."""
        scores = {LAYER: self.layer, ATTENTION: self.attention, MLP: self.mlp}
        return {kind: score for kind, score in scores.items() if score is not None}

    def plan(
        self,
        count: SupportsIndex | None = None,
        fraction: float | None = None,
        *,
        contiguous: bool = True,
        boundary: SupportsIndex = 1,
        min_tokens: SupportsIndex = 0,
    ) -> Plan:
        """Return the plan that omits the layers of least importance for context rows.

        Args:
            count: Number of layers to omit.
            fraction: Fraction of the layers to omit, in place of ``count``. With neither, a third is omitted.
            contiguous: True to omit consecutive layers, those of the lowest sum. False to choose each layer on its
                own.
            boundary: As for ``Plan``.
            min_tokens: As for ``Plan``.

        Returns:
            The plan, whose origin states the model, the method and the number of samples.

        Raises:
            ValueError: As for ``Plan.last``.
            TypeError: As for ``Plan.last``.
        """
        return ranked_plan(
            self.prefill,
            self.origin,
            count,
            fraction,
            contiguous=contiguous,
            boundary=boundary,
            min_tokens=min_tokens,
        )

    def plot(self, path: StrPath) -> None:
        """Draw importance by layer, context rows beside loss rows, with standard errors.

        Args:
            path: File to write; its ending gives the format, such as ``.png`` or ``.svg``.

        Raises:
            ImportError: matplotlib is missing (extra ``plot``).
        """
        name = str(self.origin.model or "model").rstrip("/")
        plot_importance(
            {kind: vars(scores) for kind, scores in self.gates().items()}, f"{name}, {self.samples} samples", path
        )

    def save(self, path: StrPath) -> None:
        """Write the importance to a JSON file, through a temporary file, so that none is left half written.

        Raises:
            OSError: The file cannot be written.
        """
        gates = {kind: finite(vars(scores)) for kind, scores in self.gates().items()}
        members = {
            "origin": self.origin.to_dict(),
            "continuation": self.continuation,
            "seed": self.seed,
            "digest": self.digest,
            "weights": self.weights,
            "gates": gates,
        }
        whole = Path(path)
        part = whole.with_name(whole.name + ".part")
        part.write_text(json.dumps(members, indent=2) + "\n", encoding="utf-8")
        os.replace(part, whole)

    @classmethod
    def load(cls, path: StrPath) -> Importance:
        """Read an importance that ``save`` wrote.

        Raises:
            OSError: The file cannot be read.
            ValueError: The file is not one that ``save`` writes.
        """
        try:
            members = json.loads(read_utf8(path))
            refuse_unknown("importance", members, _MEMBERS)
            refuse_unknown("gates", members["gates"], {LAYER, ATTENTION, MLP})
            rows = members["continuation"]
            scores = {
                kind: GateScores(**{name: _from_json(values) for name, values in gate.items()})
                for kind, gate in members["gates"].items()
            }
            return cls(
                layer=scores[LAYER],
                attention=scores.get(ATTENTION),
                mlp=scores.get(MLP),
                origin=Origin.from_dict(members["origin"]),
                continuation=None if rows is None else read_int("continuation", rows, 1),
                seed=read_int("seed", members["seed"]),
                digest=read_text("digest", members["digest"]),
                weights=read_text("weights", members["weights"]),
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{path}: expected an importance as Importance.save writes it ({missing_or(error)})"
            ) from None


def importance(
    model: Any,
    batches: Batches,
    *,
    continuation: int | None = None,
    seed: int = 0,
    branches: bool = False,
    recompute: bool = False,
    resume: StrPath | None = None,
    progress: Progress = False,
) -> Importance:
    """Score every layer by a virtual gate on its residual branch, for context rows and loss rows apart.

    A sequence of ``T`` ids is a prompt of ``T - continuation`` tokens and its continuation. The model reads all of it
    but the last token. The **loss rows** predict the continuation: they are the prompt's last row and the rows of the
    continuation but its last. The **context rows** are the prompt's rows before. The loss is the sum over the loss rows
    of -log p(y), with y drawn from the model's own p at each row. The derivative of each sequence's loss with respect
    to a gate is squared, and the squares are averaged over the sequences.

    Args:
        model: Hugging Face decoder of any family, enabled or not, in float32 or bfloat16, on any device. It is left
            unchanged.
        batches: Iterable of input_ids, int [batch, T], without padding. The sequences of a batch share one forward and
            one backward. How sequences are grouped changes memory, not results.
        continuation: Number of last tokens of each sequence that are its continuation, in 1...T-2. None for a quarter
            of T, at most 64.
        seed: Seed of the drawn targets.
        branches: True to score the attention and the MLP branch of each layer, too.
        recompute: True to keep hidden states only (one per layer, two with ``branches``) and compute the activations
            of one layer at a time, twice. This takes less memory and a third more time.
        resume: File that takes the state after each batch. If it exists, the samples in it are not computed again.
        progress: True for a progress bar, or a callback that takes (sequences done, their number or None).

    Returns:
        The scores with their standard errors.

    Raises:
        ValueError: An argument has a bad value. The file of ``resume`` is of another model, other weights, another
            seed or continuation, or other sequences. A derivative is not finite (float16 overflows).
        TypeError: An argument has the wrong type.

    Source: POP (arXiv 2602.03295), section 3.
    """
    model = stock_model(model)
    _check_arguments(continuation, seed)
    state = _State(model, continuation, seed, branches)
    if resume is not None and Path(resume).exists():
        state.resume(Importance.load(resume), Path(resume))
    with stock_evaluation(model), reporting(progress, "importance", count_sequences(batches)) as advance:
        for ids in check_batches(batches, model, least=3):
            rows = _loss_rows(ids.shape[1], continuation)
            uniforms = state.draw(len(ids), rows)
            known = state.count_known(ids, rows)
            if known < len(ids):
                state.add(gate_derivatives(model, ids[known:, :-1], rows, uniforms[known:], branches, recompute))
                if resume is not None:
                    state.result().save(resume)
            advance(len(ids))
    state.finish()
    return state.result()


def _check_arguments(continuation: int | None, seed: int) -> None:
    for name, value, least in (("continuation", continuation, 1), ("seed", seed, 0)):
        if name == "continuation" and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: expected an int, got {type(value).__name__} {value!r}")
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")


def _loss_rows(tokens: int, continuation: int | None) -> int:
    """Return the number of loss rows of a sequence of ``tokens`` ids, which leaves at least one context row."""
    rows = max(1, min(64, tokens // 4)) if continuation is None else continuation
    if rows > tokens - 2:
        raise ValueError(f"continuation: expected at most {tokens - 2} ({tokens} tokens less 2), got {rows}")
    return rows


class _State:
    """Running mean and squared deviations (Welford) of the squared derivatives, and a digest of the sequences seen."""

    def __init__(self, model: Any, continuation: int | None, seed: int, branches: bool) -> None:
        depth = model.config.get_text_config().num_hidden_layers
        self.config = model.config
        self.origin = origin_of(model, "gates")
        self.weights = f"{weights_hash(model)} {str(model.dtype).removeprefix('torch.')}"
        self.continuation, self.seed, self.kinds = continuation, seed, gate_kinds(branches)
        self.mean = torch.zeros(len(self.kinds), 2, depth, dtype=torch.float64, device="cpu")
        self.deviations = torch.zeros_like(self.mean)
        self.samples = 0
        self.digest = ""
        self.generator = torch.Generator("cpu").manual_seed(seed)
        self.resumed: Importance | None = None  # read from a file
        self.seen = 0  # sequences so far, those in the file included

    @property
    def num_resumed(self) -> int:
        """Number of samples in the file."""
        return 0 if self.resumed is None else self.resumed.samples

    def resume(self, before: Importance, path: Path) -> None:
        """Continue from the importance in ``path``, after a check that it is of the same run."""
        check_origin(before.origin, self.config, str(path))
        for name, found, wanted in (
            ("continuation", before.continuation, self.continuation),
            ("seed", before.seed, self.seed),
            ("weights", before.weights, self.weights),
            ("gates", tuple(before.gates()), self.kinds),
        ):
            if found != wanted:
                raise ValueError(f"resume: expected {name} {wanted!r} in {path}, got {found!r}")
        self.resumed = before
        scores = [before.gates()[kind] for kind in self.kinds]
        means = [[score.prefill, score.decode] for score in scores]
        errors = [[score.prefill_error, score.decode_error] for score in scores]
        self.mean = torch.tensor(means, dtype=torch.float64, device="cpu")
        self.samples = self.num_resumed
        spread = (
            torch.tensor(errors, dtype=torch.float64, device="cpu") ** 2 * self.num_resumed * (self.num_resumed - 1)
        )
        self.deviations = spread.nan_to_num(0.0)

    def draw(self, batch: int, rows: int) -> Tensor:
        """Draw uniforms [batch, rows] float64. A sample gets the same ones however sequences are grouped."""
        return torch.rand(batch, rows, dtype=torch.float64, generator=self.generator, device="cpu")

    def count_known(self, ids: Tensor, rows: int) -> int:
        """Add the sequences of a batch to the digest, and return how many of them the file already has.

        Raises:
            ValueError: The sequences are not those of the file.
        """
        known = max(0, min(len(ids), self.num_resumed - self.seen))
        for sequence in ids.cpu():
            data = sequence.numpy().astype("<i8").tobytes()
            self.digest = hashlib.sha256(f"{self.digest} {rows} ".encode() + data).hexdigest()
            self.seen += 1
            if self.resumed is not None and self.seen == self.num_resumed and self.digest != self.resumed.digest:
                raise ValueError(
                    f"resume: expected batches to begin with the {self.num_resumed} sequences of the file, got other "
                    "sequences"
                )
        return known

    def add(self, derivatives: dict[str, Tensor]) -> None:
        """Add the derivatives of new samples, kind of gate -> [batch, 2, layers] float64."""
        squares = torch.stack([derivatives[kind] for kind in self.kinds], dim=1) ** 2  # [batch, kinds, 2, layers]
        if not squares.isfinite().all():
            raise ValueError(
                "model: expected finite derivatives, got NaN or infinity (float16 overflows: use bfloat16)"
            )
        for square in squares:
            self.samples += 1
            delta = square - self.mean
            self.mean = self.mean + delta / self.samples
            self.deviations = self.deviations + delta * (square - self.mean)

    def finish(self) -> None:
        """Check that there was a sequence, and that none of the file is missing."""
        if self.samples == 0:
            raise ValueError("batches: expected at least one sequence, got none")
        if self.seen < self.num_resumed:
            raise ValueError(
                f"resume: expected batches to begin with the {self.num_resumed} sequences of the file, got {self.seen}"
            )

    def result(self) -> Importance:
        """Return the importance over the samples so far."""
        if self.resumed is not None and self.samples == self.num_resumed:
            return self.resumed  # recomputed errors may differ in the last bit
        between = self.samples * (self.samples - 1)
        errors = (self.deviations / between).sqrt() if between else torch.full_like(self.mean, math.nan)
        scores = {
            kind: GateScores(
                *(tuple(values[stage].tolist()) for values in (mean, error) for stage in (0, 1)),
            )
            for kind, mean, error in zip(self.kinds, self.mean, errors, strict=True)
        }
        origin = Origin(self.origin.model, self.origin.config_hash, self.origin.method, self.samples)
        gates = (scores[LAYER], scores.get(ATTENTION), scores.get(MLP))
        return Importance(*gates, origin, self.continuation, self.seed, self.digest, self.weights)


def _from_json(values: list[float | None]) -> tuple[float, ...]:
    return tuple(math.nan if value is None else float(value) for value in values)
