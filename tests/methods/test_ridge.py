"""Least squares of pop_ext.fit: moments, solutions, row weights, condition number."""

from __future__ import annotations

import math

import pytest
import torch
from pop_ext.methods.ridge import RunMoments, condition
from tolerance import assert_close_fp32


def test_the_moments_recover_a_linear_map():
    generator = torch.Generator().manual_seed(0)
    original, wanted = torch.randn(2, 6, 5, generator=generator)
    moments = RunMoments({3: original})
    for _ in range(4):
        x = torch.randn(20, 5, generator=generator)
        moments.add(x, {3: x @ wanted.T})
    found = original.double() + moments.solve(1e-9).changes[3]
    assert_close_fp32(found, wanted, "W", 1e-5)
    before_k, after_k, before_v, after_v = moments.residuals(3, found - original)
    assert min(before_k, before_v) > 0.1
    assert max(after_k, after_v) < 1e-6


def test_a_solution_equals_stacked_least_squares():
    generator = torch.Generator().manual_seed(1)
    original, x, y = (torch.randn(*shape, generator=generator) for shape in ((6, 5), (30, 5), (30, 6)))
    moments = RunMoments({0: original})
    moments.add(x[:11], {0: y[:11]})
    moments.add(x[11:], {0: y[11:]})
    for ridge in (0.01, 1.0, 30.0):
        scale = math.sqrt(ridge * float((x.T @ x).diagonal().mean()))
        rows = torch.cat([x, scale * torch.eye(5)]).double()
        expected = torch.linalg.lstsq(rows, torch.cat([y, scale * original.T]).double()).solution.T
        assert_close_fp32(original + moments.solve(ridge).changes[0], expected, f"ridge {ridge}", 1e-5)


def test_row_weights_equal_repeated_rows():
    generator = torch.Generator().manual_seed(3)
    original, x, y = (torch.randn(*shape, generator=generator) for shape in ((6, 5), (30, 5), (30, 6)))
    times = torch.randint(0, 4, (30,), generator=generator)
    weighted, repeated = RunMoments({0: original}), RunMoments({0: original})
    weighted.add(x, {0: y}, times.float())
    repeated.add(x.repeat_interleave(times, 0), {0: y.repeat_interleave(times, 0)})
    found, wanted = (run.solve(0.1).changes[0] for run in (weighted, repeated))
    assert_close_fp32(found, wanted, "change", 1e-5)
    assert weighted.residuals(0, found) == pytest.approx(repeated.residuals(0, wanted), rel=1e-4)


def test_condition_is_the_ratio_of_extreme_eigenvalues():
    x = torch.randn(60, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    x[:, 0] *= 20
    gram = x.T @ x
    values = torch.linalg.eigvalsh(gram)
    found = condition(gram, torch.linalg.cholesky(gram), steps=200)
    assert found == pytest.approx(float(values[-1] / values[0]), rel=0.02)
