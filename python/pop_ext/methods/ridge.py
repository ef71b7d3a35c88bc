"""Least squares of a run of omitted layers: moments over calibration rows, and ridge towards the original projections.

``X`` are the rows that a fitted projection reads, ``Y`` the K and V that the full model has there, and ``W0`` the
original projection. A row counts by its weight in every sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class LayerMoments:
    """Weighted sums over calibration rows for one omitted layer.

    Attributes:
        original: ``W0``, ``[2 * kv_dim, hidden]`` float32, with the norm's weight folded in.
        cross: ``X^T (Y - X W0^T)``, ``[hidden, 2 * kv_dim]`` float64.
        error: ``(Y - X W0^T)^2`` of each output, ``[2 * kv_dim]`` float64.
        energy: ``Y^2`` of each output, ``[2 * kv_dim]`` float64.
    """

    original: Tensor
    cross: Tensor
    error: Tensor
    energy: Tensor

    @classmethod
    def empty(cls, original: Tensor) -> LayerMoments:
        """Return the moments of no rows, for the projection ``original``."""
        rows, hidden = original.shape
        zeros = torch.zeros(rows, dtype=torch.float64, device=original.device)
        cross = torch.zeros(hidden, rows, dtype=torch.float64, device=original.device)
        return cls(original, cross, zeros, zeros.clone())


class RunMoments:
    """Moments of one run of omitted layers.

    The layers of a run read the same hidden state, so they share one Gram matrix ``X^T X``. Products of a batch are
    float32, sums over batches are float64. Nothing else is kept: ``8 * hidden * (hidden + 2 * kv_dim * layers)`` bytes
    per run.

    Attributes:
        layers: Layer -> its moments.
        gram: ``X^T X``, ``[hidden, hidden]`` float64.
        rows: Number of rows with a weight above 0.
    """

    def __init__(self, originals: dict[int, Tensor]) -> None:
        """Start with no rows.

        Args:
            originals: Layer -> original projection, ``[2 * kv_dim, hidden]`` float32.
        """
        self.layers = {layer: LayerMoments.empty(original) for layer, original in originals.items()}
        first = next(iter(originals.values()))
        self.gram = torch.zeros(first.shape[1], first.shape[1], dtype=torch.float64, device=first.device)
        self.rows = 0

    def add(self, x: Tensor, targets: dict[int, Tensor], weights: Tensor | None = None) -> None:
        """Add rows to the sums.

        Args:
            x: Normalised hidden states, [rows, hidden] float32.
            targets: Layer -> K and V of the full model, [rows, 2 * kv_dim] float32.
            weights: Weight of each row, >= 0, [rows] float32. None weighs every row 1.
        """
        weights = torch.ones(len(x), device=x.device) if weights is None else weights
        weighted, per_row = (x * weights[:, None]).T, weights.double()
        self.gram += (weighted @ x).double()
        self.rows += int((weights > 0).sum())
        for layer, y in targets.items():
            moments = self.layers[layer]
            residual = y - x @ moments.original.T
            moments.cross += (weighted @ residual).double()
            moments.error += per_row @ residual.double().square()
            moments.energy += per_row @ y.double().square()

    def is_finite(self) -> bool:
        """Return True if no row contained NaN or infinity."""
        return all(bool(moments.cross.isfinite().all()) for moments in self.layers.values())

    def solve(self, ridge: float) -> RunSolution:
        """Minimise ``|X D^T - (Y - X W0^T)|^2 + ridge * mean(diag(X^T X)) * |D|^2`` by Cholesky in float64.

        Args:
            ridge: Lambda > 0. Infinity gives ``D = 0``.

        Returns:
            The change ``D`` of each layer's projection.

        Raises:
            ValueError: The Gram matrix with this ridge is not positive definite.
        """
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
        """Return the squared error of K and V over their energy, before and after a change of the projection.

        Args:
            layer: Index of the layer.
            change: ``[2 * kv_dim, hidden]``, to be added to the original projection.

        Returns:
            (K before, K after, V before, V after).
        """
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
    """Solution of the least squares of one run.

    Attributes:
        changes: Layer -> change of the original projection, ``[2 * kv_dim, hidden]`` float64.
        condition: Condition number of the Gram matrix with its ridge.
    """

    changes: dict[int, Tensor]
    condition: float


def condition(matrix: Tensor, factor: Tensor, steps: int = 40) -> float:
    """Estimate the condition number of a positive definite matrix by power iteration.

    Args:
        matrix: [n, n] float64.
        factor: Lower Cholesky factor of ``matrix``.
        steps: Number of iterations for each end of the spectrum.

    Returns:
        The largest eigenvalue over the smallest.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    start = torch.randn(len(matrix), 1, dtype=torch.float64, generator=generator, device="cpu").to(matrix.device)

    def largest(apply: Callable[[Tensor], Tensor]) -> float:
        vector, norm = start / start.norm(), torch.ones((), dtype=torch.float64)
        for _ in range(steps):
            vector = apply(vector)
            norm = vector.norm()
            vector = vector / norm
        return float(norm)

    return largest(lambda v: matrix @ v) * largest(lambda v: torch.cholesky_solve(v, factor))
