"""Moments of a run's least squares and their solutions: ridge towards the original K/V projections."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class LayerMoments:
    """Sums over calibration rows of one omitted layer.

    Attributes:
        original: W0 ``[2 * kv_dim, hidden]`` float32, the folded projection.
        cross: ``X^T (Y - X W0^T)``, ``[hidden, 2 * kv_dim]`` float64.
        error: squared error of the original projection, of each output, ``[2 * kv_dim]`` float64. All sums are over
            rows, each as often as it weighs.
        energy: ``Y^2``, likewise.
    """

    original: Tensor
    cross: Tensor
    error: Tensor
    energy: Tensor

    @classmethod
    def empty(cls, original: Tensor) -> LayerMoments:
        rows, hidden = original.shape
        zeros = torch.zeros(rows, dtype=torch.float64, device=original.device)
        cross = torch.zeros(hidden, rows, dtype=torch.float64, device=original.device)
        return cls(original, cross, zeros, zeros.clone())


class RunMoments:
    """Of one run: its layers share what they read, so they share one Gram matrix ``X^T X``, [hidden, hidden] float64.

    A batch's products are float32, sums over batches float64. Of what least squares needs nothing else is kept:
    ``8 * hidden * (hidden + 2 * kv_dim * layers)`` bytes a run.
    """

    def __init__(self, originals: dict[int, Tensor]) -> None:
        self.layers = {layer: LayerMoments.empty(original) for layer, original in originals.items()}
        first = next(iter(originals.values()))
        self.gram = torch.zeros(first.shape[1], first.shape[1], dtype=torch.float64, device=first.device)
        self.rows = 0

    def add(self, x: Tensor, targets: dict[int, Tensor], weights: Tensor | None = None) -> None:
        """Rows ``x`` [rows, hidden] float32 and what each layer's K and V are, [rows, 2 * kv_dim] float32.

        weights: [rows] float32 from 0 on, how much each row counts; None: 1.
        """
        weights = torch.ones(len(x), device=x.device) if weights is None else weights
        weighted, each = (x * weights[:, None]).T, weights.double()
        self.gram += (weighted @ x).double()
        self.rows += int((weights > 0).sum())
        for layer, y in targets.items():
            moments = self.layers[layer]
            residual = y - x @ moments.original.T
            moments.cross += (weighted @ residual).double()
            moments.error += each @ residual.double().square()
            moments.energy += each @ y.double().square()

    def is_finite(self) -> bool:
        """Whether no NaN and no infinity came in."""
        return all(bool(moments.cross.isfinite().all()) for moments in self.layers.values())

    def solve(self, ridge: float) -> RunSolution:
        """W = W0 + argmin ``|X D^T - (Y - X W0^T)|^2 + ridge * mean(diag(X^T X)) * |D|^2``, by Cholesky in float64."""
        if math.isinf(ridge):
            return RunSolution({layer: torch.zeros_like(m.original) for layer, m in self.layers.items()}, 1.0)
        regular = self.gram.clone()
        regular.diagonal().add_(ridge * self.gram.diagonal().mean())
        factor, failed = torch.linalg.cholesky_ex(regular)
        if failed:
            raise ValueError(
                f"lambdas: expected a ridge that makes the Gram matrix of {self.rows} rows positive definite, got "
                f"{ridge:g}"
            )
        changes = {layer: torch.cholesky_solve(m.cross, factor).T for layer, m in self.layers.items()}
        return RunSolution(changes, condition(regular, factor))

    def residuals(self, layer: int, change: Tensor) -> tuple[float, float, float, float]:
        """Error over energy: (K before, K after, V before, V after) a change ``[2 * kv_dim, hidden]``."""
        moments, change = self.layers[layer], change.double()
        after = moments.error - 2 * (change.T * moments.cross).sum(0) + ((change @ self.gram) * change).sum(1)
        found = []
        for half in range(2):
            energy, before, less = (part.chunk(2)[half].sum() for part in (moments.energy, moments.error, after))
            energy = energy.clamp_min(torch.finfo(torch.float64).tiny)
            found += [float(before / energy), float((less / energy).clamp_min(0))]
        return found[0], found[1], found[2], found[3]


@dataclass(frozen=True)
class RunSolution:
    """Changes of the original projections, layer -> ``[2 * kv_dim, hidden]``, and what was solved's condition."""

    changes: dict[int, Tensor]
    condition: float


def condition(matrix: Tensor, factor: Tensor, steps: int = 40) -> float:
    """Largest over smallest eigenvalue of a positive definite matrix, by power iteration; factor: its Cholesky one."""
    generator = torch.Generator("cpu").manual_seed(0)
    start = torch.randn(len(matrix), 1, dtype=torch.float64, generator=generator, device="cpu").to(matrix.device)

    def largest(apply: object) -> float:
        vector, norm = start / start.norm(), torch.ones((), dtype=torch.float64)
        for _ in range(steps):
            vector = apply(vector)  # type: ignore[operator]
            norm = vector.norm()
            vector = vector / norm
        return float(norm)

    return largest(lambda v: matrix @ v) * largest(lambda v: torch.cholesky_solve(v, factor))
