"""Rooflines: least times by FLOPs and bytes, at peaks that are given or measured."""

from __future__ import annotations

import math

import pytest
import torch
from pop_ext.utils.roofline import Peaks, measure_peaks


def cost(*stages: tuple[float, float]) -> dict:
    """Return a cost of stages with these FLOPs and bytes."""
    return {"stages": {str(i): {"flops": flops, "bytes": moved} for i, (flops, moved) in enumerate(stages)}}


def test_a_roofline_takes_the_longer_of_flops_and_bytes_of_each_stage():
    peaks = Peaks(flop_per_s=4e9, bytes_per_s=2e9)
    baseline, pruned = cost((8e9, 1e3), (1e3, 6e9)), cost((4e9, 1e3), (1e3, 3e9))
    assert peaks.least_seconds(baseline) == 2 + 3
    assert peaks.roofline(pruned, baseline) == 5 / 2.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_peaks_are_measured(dtype):
    peaks = measure_peaks(torch.get_default_device(), dtype, repeats=1)
    for rate in (peaks.flop_per_s, peaks.bytes_per_s):
        assert math.isfinite(rate)
        assert rate > 1e7
    assert str(peaks).endswith(" GB/s")
