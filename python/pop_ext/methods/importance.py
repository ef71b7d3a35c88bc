"""How much each layer matters, for encoding a prompt and for predicting what follows (POP, arXiv 2602.03295)."""

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

from pop_ext.methods.calibration import Batches, checked, count_sequences, stock_model, undisturbed
from pop_ext.methods.gates import ATTENTION, LAYER, MLP, gate_derivatives, kinds
from pop_ext.methods.plots import plot_importance
from pop_ext.plans.origin import Origin, check_origin, origin_of, weights_hash
from pop_ext.plans.plan import Plan
from pop_ext.plans.selection import ranked_plan
from pop_ext.utils.json import finite
from pop_ext.utils.progress import Progress, reporting

Path_ = str | PathLike[str]


@dataclass(frozen=True)
class GateScores:
    """Importance of one kind of gate, ``E[(dL/dg_l)^2]`` in nats squared, a value a layer.

    Attributes:
        prefill: of gates that act on the context rows.
        decode: of gates that act on the loss rows.
        prefill_error, decode_error: their standard errors; NaN for a single sample.
    """

    prefill: tuple[float, ...]
    decode: tuple[float, ...]
    prefill_error: tuple[float, ...]
    decode_error: tuple[float, ...]


@dataclass(frozen=True)
class Importance:
    """What ``pop_ext.importance`` returns.

    Attributes:
        layer: of whole residual branches; attention, mlp: of their two parts, None where nobody asked.
        origin: the model, and the number of samples.
        continuation: loss rows of each sample as they were asked for; None: the default.
        seed: of the targets.
        digest: SHA-256 over the samples' ids, so that a run goes on with the samples that it began with.
        weights: ``pop_ext.plans.origin.weights_hash`` of the model, so that it goes on with the same model.
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
        """How many sequences it is the mean of."""
        return self.origin.samples or 0

    def gates(self) -> dict[str, GateScores]:
        """What was scored, by kind: "layer" and, where asked for, "attention" and "mlp"."""
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
        """Omits the layers that matter least for the context rows; its origin says so.

        Args:
            count, fraction: how many, as for ``Plan.last``; by default a third.
            contiguous: consecutive layers, with the lowest sum. False: each layer for itself.

        Raises:
            ValueError, TypeError: as for ``Plan.last``.
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

    def plot(self, path: Path_) -> None:
        """Draws importance by layer and stage into a file; its ending says the format (needs matplotlib).

        Raises:
            ImportError: matplotlib is missing (extra ``plot``).
        """
        name = str(self.origin.model or "model").rstrip("/")
        plot_importance(
            {kind: vars(scores) for kind, scores in self.gates().items()}, f"{name}, {self.samples} samples", path
        )

    def save(self, path: Path_) -> None:
        """Writes it as JSON, all or nothing."""
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
    def load(cls, path: Path_) -> Importance:
        """Reads what ``save`` wrote.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is not what ``save`` writes.
        """
        try:
            members = json.loads(Path(path).read_text(encoding="utf-8"))
            scores = {
                kind: GateScores(**{name: _from_json(values) for name, values in gate.items()})
                for kind, gate in members["gates"].items()
            }
            return cls(
                layer=scores[LAYER],
                attention=scores.get(ATTENTION),
                mlp=scores.get(MLP),
                origin=Origin.from_dict(members["origin"]),
                continuation=members["continuation"],
                seed=members["seed"],
                digest=members["digest"],
                weights=members["weights"],
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: expected an importance as Importance.save writes it ({error!r})") from None


def importance(
    model: Any,
    batches: Batches,
    *,
    continuation: int | None = None,
    seed: int = 0,
    branches: bool = False,
    recompute: bool = False,
    resume: Path_ | None = None,
    progress: Progress = False,
) -> Importance:
    """Scores every layer by a virtual gate on its residual branch, for context rows and loss rows apart.

    A sequence of ``T`` ids is a prompt of ``T - continuation`` tokens and its continuation. The model reads all of it
    but the last token. The **loss rows** are those that predict the continuation: the prompt's last row, and those of
    all but its last token. The **context rows** are the ones before, prompt tokens but the last. The loss is the sum
    over the loss rows of -log p(y), with y drawn from the model's own p at each row; of each sequence its derivative in
    a gate is squared, and the squares are averaged.

    Args:
        model: any Hugging Face decoder, enabled or not, in float32 or bfloat16, on any device. As before afterwards.
        batches: an iterable of input_ids, int [batch, T], without padding. A batch shares one forward and backward;
            how sequences are grouped changes memory, not results.
        continuation: last tokens of each sequence, 1...T-2. None: a quarter of T, at most 64.
        seed: of the drawn targets.
        branches: score the attention and the MLP branch of each layer, too.
        recompute: keep hidden states only (one a layer; two with ``branches``) and compute one layer's activations at
            a time, twice: less memory, a third more time.
        resume: a file that takes the state after each batch. Where it is there, its samples are not computed again.
        progress: True for a bar, or a callback told (sequences done, all of them or None).

    Raises:
        TypeError, ValueError: a bad argument, named; a file of another model or other weights, of another seed or
            continuation, or of other sequences; a model whose derivatives are not finite (float16 overflows). The model
            is as before.

    Source: POP (arXiv 2602.03295), section 3.
    """
    model = stock_model(model)
    _check_arguments(continuation, seed)
    state = _State(model, continuation, seed, branches)
    if resume is not None and Path(resume).exists():
        state.take(Importance.load(resume), Path(resume))
    with undisturbed(model), reporting(progress, "importance", count_sequences(batches)) as advance:
        for ids in checked(batches, model, least=3):
            rows = _loss_rows(ids.shape[1], continuation)
            uniforms = state.draw(len(ids), rows)
            known = state.recognise(ids, rows)
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
    """Of a sequence of so many tokens; at least one context row is left."""
    rows = max(1, min(64, tokens // 4)) if continuation is None else continuation
    if rows > tokens - 2:
        raise ValueError(f"continuation: expected at most {tokens - 2} (the {tokens} tokens but 2), got {rows}")
    return rows


class _State:
    """Mean and squared deviations of the squared derivatives so far (Welford), and what was seen."""

    def __init__(self, model: Any, continuation: int | None, seed: int, branches: bool) -> None:
        depth = model.config.get_text_config().num_hidden_layers
        self.config = model.config
        self.origin, self.weights = origin_of(model, "gates"), weights_hash(model)
        self.continuation, self.seed, self.kinds = continuation, seed, kinds(branches)
        self.mean = torch.zeros(len(self.kinds), 2, depth, dtype=torch.float64, device="cpu")
        self.deviations = torch.zeros_like(self.mean)
        self.samples = 0
        self.digest = ""
        self.generator = torch.Generator("cpu").manual_seed(seed)
        self.before: Importance | None = None  # from a file
        self.seen = 0

    @property
    def taken(self) -> int:
        """Samples that came from a file."""
        return 0 if self.before is None else self.before.samples

    def take(self, before: Importance, path: Path) -> None:
        """Goes on from a file."""
        check_origin(before.origin, self.config, str(path))
        for name, found, wanted in (
            ("continuation", before.continuation, self.continuation),
            ("seed", before.seed, self.seed),
            ("weights", before.weights, self.weights),
            ("gates", tuple(before.gates()), self.kinds),
        ):
            if found != wanted:
                raise ValueError(f"resume: expected {name} {wanted!r} in {path}, got {found!r}")
        self.before = before
        scores = [before.gates()[kind] for kind in self.kinds]
        means = [[score.prefill, score.decode] for score in scores]
        errors = [[score.prefill_error, score.decode_error] for score in scores]
        self.mean = torch.tensor(means, dtype=torch.float64, device="cpu")
        self.samples = self.taken
        spread = torch.tensor(errors, dtype=torch.float64, device="cpu") ** 2 * self.taken * (self.taken - 1)
        self.deviations = spread.nan_to_num(0.0)

    def draw(self, batch: int, rows: int) -> Tensor:
        """[batch, rows] float64: the same for a sample whatever batch it is in."""
        return torch.rand(batch, rows, dtype=torch.float64, generator=self.generator, device="cpu")

    def recognise(self, ids: Tensor, rows: int) -> int:
        """Notes the sequences of a batch; how many of them the file has already."""
        known = max(0, min(len(ids), self.taken - self.seen))
        for sequence in ids.cpu():
            data = sequence.numpy().astype("<i8").tobytes()
            self.digest = hashlib.sha256(f"{self.digest} {rows} ".encode() + data).hexdigest()
            self.seen += 1
            if self.before is not None and self.seen == self.taken and self.digest != self.before.digest:
                raise ValueError(
                    f"resume: expected batches to begin with the {self.taken} sequences of the file, got others"
                )
        return known

    def add(self, derivatives: dict[str, Tensor]) -> None:
        squares = torch.stack([derivatives[kind] for kind in self.kinds], dim=1) ** 2  # [batch, kinds, 2, layers]
        if not squares.isfinite().all():
            raise ValueError("model: expected finite derivatives, got others (float16 overflows: use bfloat16)")
        for square in squares:
            self.samples += 1
            delta = square - self.mean
            self.mean = self.mean + delta / self.samples
            self.deviations = self.deviations + delta * (square - self.mean)

    def finish(self) -> None:
        if self.samples == 0:
            raise ValueError("batches: expected at least one sequence, got none")
        if self.seen < self.taken:
            raise ValueError(
                f"resume: expected batches to begin with the {self.taken} sequences of the file, got {self.seen}"
            )

    def result(self) -> Importance:
        if self.before is not None and self.samples == self.taken:
            return self.before  # through deviations and back, errors may differ in the last bit
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
