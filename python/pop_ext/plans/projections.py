"""Fitted K/V projections of omitted layers: what ``pop_ext.fit`` makes and a plan carries, and how a file keeps them.

Plain PyTorch on Hugging Face modules: the native path and the oracle both read them here.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pop_ext.plans.origin import spread_values
from pop_ext.utils.json import finite

SAMPLE = 16
"""Values of each weight that a fit remembers, to know the weights it was made for."""

FORMAT = "pop_ext fitted projections"
"""What the file of a plan's projections says of itself."""

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}


class FitMismatch(ValueError):
    """Fitted projections and a model that they were not made for."""


@dataclass(frozen=True)
class FitReport:
    """How projections were fitted.

    Attributes:
        ridge: lambda, relative to the mean diagonal of a run's Gram matrix; inf: the original projections.
        sequences, tokens: that the least squares saw; tokens of weight 0 do not count.
        condition: of each run's Gram matrix with its ridge; 1 at an infinite one.
        losses: of each lambda that was tried, (lambda, mean, standard error) of the held-out loss in nats a token;
            empty where nothing was held out.
        holdout: how many held-out sequences chose lambda.
        weighting: of rows, as ``pop_ext.fit`` takes it.
        residuals: of each layer, error energy of K and V over their own, before and after the fit, on what it saw:
            layer -> (K before, K after, V before, V after).
    """

    ridge: float
    sequences: int
    tokens: int
    condition: tuple[float, ...] = ()
    losses: tuple[tuple[float, float, float], ...] = ()
    holdout: int = 0
    residuals: Mapping[int, tuple[float, float, float, float]] = field(default_factory=dict)
    weighting: str = "uniform"

    def method(self) -> str:
        """In words, for the origin of a plan."""
        rows = ", rows weighted by attention" if self.weighting == "attention" else ""
        return f"ridge towards the original projections, lambda {self.ridge:g}{rows}"

    @staticmethod
    def ridge_text(ridge: float) -> str:
        """A lambda as tables of what was tried show it."""
        return "original projections" if math.isinf(ridge) else f"{ridge:g}"

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which knows no infinity: None stands for it."""
        return {
            "ridge": finite(self.ridge),
            "sequences": self.sequences,
            "tokens": self.tokens,
            "condition": list(self.condition),
            "losses": finite(self.losses),
            "holdout": self.holdout,
            "weighting": self.weighting,
            "residuals": {str(layer): list(values) for layer, values in self.residuals.items()},
        }

    @classmethod
    def from_dict(cls, members: Any) -> FitReport:
        """What ``to_dict`` gave. Raises ValueError for anything else."""
        try:
            return cls(
                ridge=_number(members["ridge"], math.inf),
                sequences=int(members["sequences"]),
                tokens=int(members["tokens"]),
                condition=tuple(map(float, members["condition"])),
                losses=tuple(
                    (_number(ridge, math.inf), _number(loss, math.nan), _number(error, math.nan))
                    for ridge, loss, error in members["losses"]
                ),
                holdout=int(members["holdout"]),
                weighting=str(members["weighting"]),
                residuals={int(layer): tuple(values) for layer, values in members["residuals"].items()},
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"projections: expected what Plan.save writes of a fit, got {error!r}") from None


@dataclass(frozen=True, eq=False, repr=False)
class Projections:
    """Fitted K/V projections, one a layer; not to be changed once a plan has them.

    Attributes:
        matrices: layer -> ``[2 * kv_dim, hidden_size]``, rows of K and then of V, on the CPU and in the dtype of the
            model that they were fitted on. They multiply the normalised hidden state without the norm's weight (what
            the layer reads as it is, in families without a norm there); biases, k_norm and RoPE follow as ever.
        samples: layer -> some values of the weights that they stand in for, float32.
        report: how they were made.
    """

    matrices: Mapping[int, Tensor]
    samples: Mapping[int, Tensor]
    report: FitReport

    def __post_init__(self) -> None:
        if set(self.matrices) != set(self.samples) or not self.matrices:
            raise ValueError(
                f"projections: expected matrices and samples of the same layers, got {sorted(self.matrices)} and "
                f"{sorted(self.samples)}"
            )
        shapes = {(tuple(matrix.shape), matrix.dtype) for matrix in self.matrices.values()}
        dtype = next(iter(self.matrices.values())).dtype
        if len(shapes) != 1 or next(iter(self.matrices.values())).ndim != 2 or dtype not in _DTYPES.values():
            raise ValueError(
                "projections: expected matrices of one shape [2 * kv_dim, hidden_size] and one of float32, bfloat16 "
                f"and float16, got {', '.join(f'{list(shape)} {kind}' for shape, kind in sorted(shapes, key=str))}"
            )

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(sorted(self.matrices))

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.matrices.values())).dtype

    @cached_property
    def digest(self) -> str:
        """SHA-256 of layers and matrices: of projections that compute the same, the same."""
        found = hashlib.sha256(repr((self.layers, self.dtype)).encode())
        for layer in self.layers:
            found.update(self.matrices[layer].contiguous().view(torch.uint8).numpy().tobytes())
        return found.hexdigest()

    def stack_rows(self, like: Tensor) -> list[Tensor]:
        """The matrices by layer, in the dtype and on the device of ``like``: what ``pop::load`` takes."""
        return [self.matrices[layer].to(like.device, like.dtype) for layer in self.layers]

    def check_weights(self, layer: int, sample: Tensor, dtype: torch.dtype) -> None:
        """Raises FitMismatch unless ``sample`` (``sample_of``) of a layer's weights in ``dtype`` is that of the fit."""
        then = self.samples[layer]
        # The same dtype: the same values. Another one: those that rounding to it may have made of them.
        rtol, atol = (0.0, 0.0) if dtype == self.dtype else (2**-7, 1e-7)
        if sample.shape != then.shape or not torch.allclose(sample, then, rtol, atol, equal_nan=True):
            raise FitMismatch(
                f"plan.projections: expected a fit on the weights that the model has, got one on others (layer "
                f"{layer}, k_proj, v_proj or its norm): fit again, or take plan.replace(projections=None)"
            )

    def __eq__(self, other: object) -> bool:
        """Equal if they compute the same; how they were made does not count."""
        if not isinstance(other, Projections):
            return NotImplemented
        return self.layers == other.layers and all(
            ours.dtype == other.matrices[layer].dtype and torch.equal(ours, other.matrices[layer])
            for layer, ours in self.matrices.items()
        )

    __hash__ = None  # type: ignore[assignment]

    def __deepcopy__(self, memo: Any) -> Projections:
        return self

    def __repr__(self) -> str:
        shape = list(next(iter(self.matrices.values())).shape)
        return f"<{len(self.matrices)} fitted matrices {shape}, lambda {self.report.ridge:g}>"


class KeyValueWeights(NamedTuple):
    """K and V projections of an attention module, ``[kv_dim, hidden_size]`` each, and their biases or None."""

    k: Tensor
    v: Tensor
    k_bias: Tensor | None
    v_bias: Tensor | None


def key_value_weights(attention: Any) -> KeyValueWeights:
    """The weights behind ``k_proj`` and ``v_proj``, or behind the last rows of ``qkv_proj`` (Phi-3)."""
    if hasattr(attention, "qkv_proj"):
        kv_dim = attention.config.num_key_value_heads * attention.head_dim
        weight, bias = attention.qkv_proj.weight.detach(), attention.qkv_proj.bias
        biases = (None, None) if bias is None else bias.detach()[-2 * kv_dim :].split(kv_dim)
        return KeyValueWeights(*weight[-2 * kv_dim :].split(kv_dim), *biases)
    projections = (attention.k_proj, attention.v_proj)
    biases = tuple(None if module.bias is None else module.bias.detach() for module in projections)
    return KeyValueWeights(*(module.weight.detach() for module in projections), *biases)


def without_gamma(layer: Any, hidden_states: Tensor) -> Tensor:
    """What a fitted projection reads, in float32: ``h * rsqrt(mean(h^2) + eps)``, or ``h`` where nothing normalises."""
    norm = getattr(layer, "input_layernorm", None)
    hidden = hidden_states.float()
    if norm is None:
        return hidden
    eps = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
    return hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + eps)


def sample_of(layer: Any) -> Tensor:
    """Values of a layer's K, V and input norm, spread over each: float32, on the CPU."""
    weights = key_value_weights(layer.self_attn)
    tensors = [weights.k, weights.v]
    if hasattr(layer, "input_layernorm"):
        tensors.append(layer.input_layernorm.weight.detach())
    return torch.cat([spread_values(tensor, SAMPLE).float() for tensor in tensors])


def check_fit(plan: Any, layers: Sequence[Any]) -> None:
    """Raises FitMismatch unless a plan's projections, if it has any, were fitted on these decoder layers."""
    projections: Projections | None = getattr(plan, "projections", None)
    if projections is None:
        return
    if len(layers) != plan.num_layers:
        raise FitMismatch(f"plan: expected num_layers {len(layers)}, the model's, got {plan.num_layers}")
    for index, matrix in projections.matrices.items():
        weights = key_value_weights(layers[index].self_attn)
        shape = (2 * weights.k.shape[0], weights.k.shape[1])
        if tuple(matrix.shape) != shape:
            raise FitMismatch(
                f"plan.projections: expected a matrix {list(shape)} for layer {index} of this model, got "
                f"{list(matrix.shape)}"
            )
        projections.check_weights(index, sample_of(layers[index]), weights.k.dtype)


# Files


def save_matrices(projections: Projections, path: Path) -> str:
    """Writes matrices and samples as safetensors, all or nothing; the SHA-256 of the file.

    Raises:
        ValueError: the file is there and holds something else, such as a model's weights.
    """
    save = _safetensors().save
    if path.exists() and _format_of(path) != FORMAT:
        raise ValueError(f"projections: expected no other file in the place of {path}, got one that no plan wrote")
    tensors = {f"layers.{layer}.kv": matrix.contiguous() for layer, matrix in projections.matrices.items()}
    tensors |= {f"layers.{layer}.sample": sample for layer, sample in projections.samples.items()}
    data: bytes = save(tensors, {"format": FORMAT})
    part = path.with_name(path.name + ".part")
    part.write_bytes(data)
    os.replace(part, path)
    return hashlib.sha256(data).hexdigest()


def _format_of(path: Path) -> str | None:
    """What a safetensors file says of itself; None: it is none."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("format")
    except SafetensorError:
        return None


def load_matrices(path: Path, sha256: str, layers: Iterable[int], report: FitReport) -> Projections:
    """What ``save_matrices`` wrote.

    Raises:
        FileNotFoundError: there is none.
        ValueError: another file than the one that the plan was saved with.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"projections: expected the plan's matrices in {path}, got no such file") from None
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise ValueError(f"projections: expected {path.name} with SHA-256 {sha256}, as it was saved, got {found}")
    tensors = _safetensors().load(data)
    try:
        matrices = {layer: tensors[f"layers.{layer}.kv"] for layer in layers}
        samples = {layer: tensors[f"layers.{layer}.sample"] for layer in layers}
    except KeyError as error:
        raise ValueError(f"projections: expected {error.args[0]} in {path.name}, got none") from None
    return Projections(matrices, samples, report)


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "projections: a file of fitted projections needs safetensors: pip install 'pop_ext[hf]'", name=error.name
        ) from None
    return safetensors.torch


def _number(value: float | None, missing: float) -> float:
    return missing if value is None else float(value)
