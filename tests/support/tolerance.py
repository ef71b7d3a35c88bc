"""Comparisons with the fp32 oracle; in low precision relative to the oracle's own error in that dtype."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache

RMS_FACTOR = 2.0
MAX_FACTOR = 4.0


def worst_element(actual: Tensor, expected: Tensor) -> str:
    """Describe the element with the largest error: index, both values and error."""
    error = (actual.double() - expected.double()).abs().nan_to_num(nan=torch.inf)
    flat = int(error.argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), error.shape))
    a, e = actual[index].item(), expected[index].item()
    return f"worst at {list(index)}: got {a:.8g}, expected {e:.8g}, off by {error.flatten()[flat].item():.3g}"


def assert_same_form(actual: Tensor, expected: Tensor, name: str) -> None:
    assert actual.shape == expected.shape, f"{name}: shape {list(actual.shape)}, expected {list(expected.shape)}"


def assert_close_fp32(actual: Tensor, expected: Tensor, name: str, atol: float = 1e-4) -> None:
    """Check that the largest absolute error is at most atol, for values of scale 1; a NaN on either side fails."""
    assert_same_form(actual, expected, name)
    if actual.numel() == 0:
        return
    error = (actual.double() - expected.double()).abs().max().item()
    assert error <= atol, f"{name}: max error {error:.3g} > {atol:.3g}; {worst_element(actual, expected)}"


def assert_low_precision(actual: Tensor, oracle_same_dtype: Tensor, oracle_fp32: Tensor, name: str) -> None:
    """Check the error to the fp32 oracle relative to that of the oracle run in this dtype.

    The RMS error may be at most twice, the largest error at most four times as large. Both bounds are at least one
    rounding to the dtype, since the oracle may happen to be exact in tensors of a few elements.
    """
    assert_same_form(actual, oracle_fp32, name)
    assert_same_form(oracle_same_dtype, oracle_fp32, name)
    assert actual.dtype == oracle_same_dtype.dtype, f"{name}: {actual.dtype}, expected {oracle_same_dtype.dtype}"
    if actual.numel() == 0:
        return
    truth = oracle_fp32.double()
    ours, theirs = actual.double() - truth, oracle_same_dtype.double() - truth
    eps = torch.finfo(actual.dtype).eps
    rms_bound = max(RMS_FACTOR * rms(theirs), eps / 4 * rms(truth))
    max_bound = max(MAX_FACTOR * theirs.abs().max().item(), eps / 2 * truth.abs().max().item())
    worst = worst_element(actual, oracle_fp32)
    assert rms(ours) <= rms_bound, f"{name}: RMS error {rms(ours):.3g} > {rms_bound:.3g}; {worst}"
    largest = ours.abs().max().item()
    assert largest <= max_bound, f"{name}: max error {largest:.3g} > {max_bound:.3g}; {worst}"


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


@dataclass(frozen=True)
class StoredLayer:
    """A cache layer: keys, values [batch, kv_heads, length - first, head_dim], of columns first..length-1."""

    keys: Tensor
    values: Tensor
    first: int
    length: int


def stored_layers(cache: Cache) -> list[StoredLayer]:
    """Return the filled part of each layer of a dynamic or static cache; sliding layers may have dropped columns."""
    layers = []
    for layer in cache.layers:
        length = int(layer.get_seq_length())
        stored = min(length, layer.keys.shape[2]) if length else 0
        keys, values = (x[:, :, :stored] if length else torch.empty(0) for x in (layer.keys, layer.values))
        layers.append(StoredLayer(keys, values, length - stored, length))
    return layers


def compare_caches(
    actual: Cache,
    expected: Cache,
    name: str = "cache",
    *,
    mask: Tensor | None = None,
    oracle_fp32: Cache | None = None,
    atol: float = 1e-4,
) -> None:
    """Compare K and V of every layer and position.

    Only columns that both caches have are compared (a sliding layer may have dropped the first ones). With `mask`
    [batch, columns], only real columns are compared, and masked columns of `actual` must be zero. With `oracle_fp32`,
    `expected` is the oracle in the same dtype, compared by `assert_low_precision`; otherwise by `assert_close_fp32`.
    """
    ours, theirs = stored_layers(actual), stored_layers(expected)
    truth = theirs if oracle_fp32 is None else stored_layers(oracle_fp32)
    assert len(ours) == len(theirs) == len(truth), f"{name}: {len(ours)} layers, expected {len(theirs)}"
    for index, (a, e, t) in enumerate(zip(ours, theirs, truth, strict=True)):
        where = f"{name}, layer {index}"
        assert a.length == e.length == t.length, f"{where}: {a.length} positions, expected {e.length}"
        first = max(a.first, e.first, t.first)
        for kind in ("keys", "values"):
            columns = [getattr(x, kind)[:, :, first - x.first :] for x in (a, e, t)]
            if mask is not None:
                real = mask[:, first : a.length].bool()
                masked = columns[0].transpose(1, 2)[~real]
                assert not masked.any(), f"{where} {kind}: masked columns hold up to {masked.abs().max().item():.3g}"
                columns = [x.transpose(1, 2)[real] for x in columns]
            if oracle_fp32 is None:
                assert_close_fp32(columns[0], columns[1], f"{where} {kind}", atol)
            else:
                assert_low_precision(columns[0], columns[1], columns[2], f"{where} {kind}")
