"""Fitted K/V projections of omitted layers, which ``pop_ext.fit`` makes and a plan carries, and their file.

This is plain PyTorch on Hugging Face modules. The native path and the oracle both read projections through it.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pop_ext.plans.norms import norm_shift
from pop_ext.plans.origin import spread_values
from pop_ext.utils.json import finite, read_float, read_int, read_list, read_text
from pop_ext.utils.texts import missing_or, refuse_unknown

SAMPLE = 16
"""Number of values of each weight that a fit records, to recognise the weights it was made for."""

FORMAT = "pop_ext fitted projections"
"""Value of ``format`` in the metadata of a plan's safetensors file."""

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}


class FitMismatch(ValueError):
    """Raised when fitted projections meet a model that they were not fitted on."""


@dataclass(frozen=True)
class FitReport:
    """How projections were fitted.

    Attributes:
        ridge: The chosen lambda, relative to the mean diagonal of a run's Gram matrix. Infinity stands for the
            original projections.
        sequences: Number of sequences that the least squares read.
        tokens: Number of their tokens with a weight above 0.
        condition: Condition number of each run's Gram matrix with its ridge; 1 for an infinite ridge.
        losses: One (lambda, mean, standard error) for each lambda that was tried: the loss of the held-out sequences
            in nats per token. Empty if nothing was held out.
        holdout: Number of held-out sequences that chose lambda.
        weighting: Weighting of rows, as for ``pop_ext.fit``.
        residuals: Layer -> (K before, K after, V before, V after): the squared error of K and V over their energy,
            before and after the least squares, on the rows that they read.
        method: "ridge", or "distill" if training followed the least squares.
        tasks: Number of tasks that were read beside the sequences.
        steps: Number of steps of the training after which the matrices were taken; 0 are those of the ridge.
        training: One (step, KL of text, KL of tasks, share of exact answers) for each time that held-out sequences
            and tasks judged the training, in nats a token; NaN without tasks. Empty for a ridge.
    """

    ridge: float
    sequences: int
    tokens: int
    condition: tuple[float, ...] = ()
    losses: tuple[tuple[float, float, float], ...] = ()
    holdout: int = 0
    residuals: Mapping[int, tuple[float, float, float, float]] = field(default_factory=dict)
    weighting: str = "uniform"
    method: str = "ridge"
    tasks: int = 0
    steps: int = 0
    training: tuple[tuple[int, float, float, float], ...] = ()

    def describe(self) -> str:
        """Describe the fit in words, for the origin of a plan."""
        rows = ", rows weighted by attention" if self.weighting == "attention" else ""
        trained = f", then {self.steps} steps of KL divergence to the full model" if self.method == "distill" else ""
        return f"ridge towards the original projections, lambda {self.ridge:g}{rows}{trained}"

    @staticmethod
    def ridge_text(ridge: float) -> str:
        """Format a lambda for a table."""
        return "original projections" if math.isinf(ridge) else f"{ridge:g}"

    def to_dict(self) -> dict[str, Any]:
        """Return the members, ready for JSON. None stands for infinity and NaN, which JSON lacks."""
        return {
            "ridge": finite(self.ridge),
            "sequences": self.sequences,
            "tokens": self.tokens,
            "condition": finite(self.condition),
            "losses": finite(self.losses),
            "holdout": self.holdout,
            "weighting": self.weighting,
            "residuals": {str(layer): finite(values) for layer, values in self.residuals.items()},
            "method": self.method,
            "tasks": self.tasks,
            "steps": self.steps,
            "training": finite(self.training),
        }

    @classmethod
    def from_dict(cls, members: Any) -> FitReport:
        """Build a report from the result of ``to_dict``.

        Raises:
            ValueError: A member is missing, unknown or has the wrong type.
        """
        if isinstance(members, dict):
            refuse_unknown("projections", members, {entry.name for entry in fields(cls)} | {"file", "sha256"})
        try:
            return cls(
                ridge=read_float("ridge", members["ridge"], math.inf),
                sequences=read_int("sequences", members["sequences"]),
                tokens=read_int("tokens", members["tokens"]),
                condition=_read_floats("condition", members["condition"]),
                losses=tuple(
                    (read_float("losses", one[0], math.inf), *_read_floats("losses", one[1:]))
                    for one in _read_rows("losses", members["losses"], 3)
                ),
                holdout=read_int("holdout", members["holdout"]),
                weighting=read_text("weighting", members["weighting"]),
                residuals={
                    int(layer): _read_floats("residuals", read_list("residuals", values, 4))
                    for layer, values in members["residuals"].items()
                },
                # Files of earlier versions lack these.
                method=read_text("method", members.get("method", "ridge")),
                tasks=read_int("tasks", members.get("tasks", 0)),
                steps=read_int("steps", members.get("steps", 0)),
                training=tuple(
                    (read_int("training", one[0]), *_read_floats("training", one[1:]))
                    for one in _read_rows("training", members.get("training", []), 4)
                ),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"projections: expected what Plan.save writes of a fit, got {missing_or(error)}") from None


@dataclass(frozen=True, eq=False, repr=False)
class Projections:
    """Fitted K/V projections, one for each omitted layer. Do not change them once a plan holds them.

    A matrix multiplies the normalised hidden state without the weight and bias of the norm. In families that have no
    norm there, it multiplies the hidden state itself. Biases (``fitted_biases``), k_norm and RoPE follow unchanged.

    Attributes:
        matrices: Layer -> ``[2 * kv_dim, hidden_size]``, the rows of K and then those of V, on the CPU, in the dtype
            of the model that they were fitted on.
        samples: Layer -> some values of the weights that the matrix replaces, float32.
        report: How they were fitted.

    Raises:
        ValueError: ``matrices`` and ``samples`` have different layers or none, or the matrices differ in shape or
            dtype, or the dtype is not float32, bfloat16 or float16.
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
        """The fitted layers, sorted."""
        return tuple(sorted(self.matrices))

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the matrices."""
        return next(iter(self.matrices.values())).dtype

    @cached_property
    def digest(self) -> str:
        """SHA-256 of layers, dtype and matrices. Equal projections have the same digest."""
        found = hashlib.sha256(repr((self.layers, self.dtype)).encode())
        for layer in self.layers:
            found.update(self.matrices[layer].contiguous().view(torch.uint8).numpy().tobytes())
        return found.hexdigest()

    def stack_rows(self, like: Tensor) -> list[Tensor]:
        """Return the matrices by layer, with the dtype and device of ``like``, for ``pop::load``."""
        return [self.matrices[layer].to(like.device, like.dtype) for layer in self.layers]

    def check_weights(self, layer: int, sample: Tensor, dtype: torch.dtype) -> None:
        """Check that a layer has the weights that it had at the fit.

        Args:
            layer: Index of the layer.
            sample: ``sample_weights`` of the layer now.
            dtype: Dtype of the layer's weights now. In another dtype than at the fit, values may differ by rounding.

        Raises:
            FitMismatch: The weights differ.
        """
        expected = self.samples[layer]
        # In another dtype the same weights may have been rounded, in bfloat16 to 8 bits.
        rtol, atol = (0.0, 0.0) if dtype == self.dtype else (2**-7, 1e-7)
        if sample.shape != expected.shape or not torch.allclose(sample, expected, rtol, atol, equal_nan=True):
            raise FitMismatch(
                f"plan.projections: expected a fit on the weights that the model has, got one on others (layer "
                f"{layer}, k_proj, v_proj or its norm): fit again, or take plan.replace(projections=None)"
            )

    def __eq__(self, other: object) -> bool:
        """Compare layers, dtypes and matrices. The report does not count."""
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
        trained = f", distilled in {self.report.steps} steps" if self.report.method == "distill" else ""
        return f"<{len(self.matrices)} fitted matrices {shape}, lambda {self.report.ridge:g}{trained}>"


_PLAIN = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Dtypes whose values are the weights themselves."""


class KeyValueWeights(NamedTuple):
    """Weights of the K and V projections of an attention module.

    Attributes:
        k: ``[kv_dim, hidden_size]``.
        v: ``[kv_dim, hidden_size]``.
        k_bias: ``[kv_dim]`` or None.
        v_bias: ``[kv_dim]`` or None.
    """

    k: Tensor
    v: Tensor
    k_bias: Tensor | None
    v_bias: Tensor | None


def key_value_weights(attention: Any) -> KeyValueWeights:
    """Return the weights of ``k_proj`` and ``v_proj``, or the last rows of a fused ``qkv_proj`` (Phi-3).

    Quantised weights are returned as the values that the module multiplies by.
    """
    dtype = getattr(attention.config, "dtype", None)
    if hasattr(attention, "qkv_proj"):
        kv_dim = attention.config.num_key_value_heads * attention.head_dim
        weights = dense_weight(attention.qkv_proj, dtype)[-2 * kv_dim :].split(kv_dim)
    else:
        weights = tuple(dense_weight(module, dtype) for module in (attention.k_proj, attention.v_proj))
    return KeyValueWeights(weights[0], weights[1], *key_value_biases(attention))


def key_value_biases(attention: Any) -> tuple[Tensor | None, Tensor | None]:
    """Return the biases of K and V, ``[kv_dim]`` each or None. Unlike the weights they are never quantised."""
    if hasattr(attention, "qkv_proj"):
        kv_dim, bias = attention.config.num_key_value_heads * attention.head_dim, linear_bias(attention.qkv_proj)
        return (None, None) if bias is None else (bias[-2 * kv_dim : -kv_dim], bias[-kv_dim:])
    return linear_bias(attention.k_proj), linear_bias(attention.v_proj)


def fitted_biases(layer: Any) -> tuple[Tensor | None, Tensor | None]:
    """Return what is added to the product of a fitted matrix: K and V of a zero row, ``[kv_dim]`` each or None.

    These are the biases of K and V. Behind a norm with a bias, such as an ``nn.LayerNorm``, K and V of that bias are
    part of them.
    """
    attention, shift = layer.self_attn, norm_shift(layer)
    if shift is None:
        return key_value_biases(attention)
    with torch.no_grad():
        if not hasattr(attention, "qkv_proj"):
            return attention.k_proj(shift)[0], attention.v_proj(shift)[0]
        kv_dim = attention.config.num_key_value_heads * attention.head_dim
        keys, values = attention.qkv_proj(shift)[0, -2 * kv_dim :].split(kv_dim)
    return keys, values


def dense_weight(module: Any, dtype: torch.dtype | None = None) -> Tensor:
    """Return the matrix that a linear module multiplies by, ``[out_features, in_features]``.

    Args:
        module: ``nn.Linear``, or a quantised module of any library, with ``in_features``.
        dtype: Dtype of the inputs of a quantised module whose weight does not say. None for float32.
    """
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor):
        weight = loaded_weight(module)
        if type(weight) is not Tensor and hasattr(weight, "dequantize"):  # torchao, quanto
            dense: Tensor = weight.dequantize()
            return dense
        if weight.dtype in _PLAIN:
            return weight
    # Formats differ, and so do the layouts of one format; what a module computes from the identity does not.
    device = next((tensor.device for tensor in (*module.parameters(), *module.buffers())), torch.device("cpu"))
    identity = torch.eye(module.in_features, dtype=dtype if dtype in _PLAIN else torch.float32, device=device)
    with torch.no_grad():
        product: Tensor = module(identity)
    bias = linear_bias(module)
    return (product if bias is None else product - bias.to(product)).T.contiguous()


def loaded_weight(module: Any, name: str = "weight") -> Tensor:
    """Return a parameter of a module, read from where accelerate has offloaded it if it is not in memory.

    Raises:
        FitMismatch: It is not in memory, and no hook of the module itself knows where it is.
    """
    weight: Tensor = getattr(module, name).detach()
    if not weight.is_meta:
        return weight
    elsewhere = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
    if elsewhere is None:
        raise FitMismatch(
            "plan.projections: expected weights in memory, to compare them with the fit's, got offloaded ones"
        )
    read: Tensor = elsewhere[name]
    return read


def linear_bias(module: Any) -> Tensor | None:
    """Return the bias of a linear module, quantised or not."""
    bias = getattr(module, "bias", None)
    if callable(bias):  # torch.ao
        bias = bias()
    if isinstance(bias, Tensor) and bias.is_meta:
        return loaded_weight(module, "bias")
    return bias.detach() if isinstance(bias, Tensor) else None


def sample_weights(layer: Any, weights: KeyValueWeights | None = None) -> Tensor:
    """Return ``SAMPLE`` values of each of a layer's K, V and input norm weights, float32 on the CPU.

    A norm with a bias adds as many of its values.

    ``weights`` are the layer's K and V if they are known; those of quantised layers take time.
    """
    weights = weights or key_value_weights(layer.self_attn)
    tensors = [weights.k, weights.v]
    norm = getattr(layer, "input_layernorm", None)
    for name in ("weight", "bias") if norm is not None else ():
        if isinstance(getattr(norm, name, None), Tensor):
            tensors.append(loaded_weight(norm, name))
    return torch.cat([spread_values(tensor, SAMPLE).float() for tensor in tensors])


def check_fit(plan: Any, layers: Sequence[Any]) -> None:
    """Check that the projections of a plan were fitted on these decoder layers.

    Args:
        plan: A plan. One without projections passes.
        layers: All decoder layers of the model.

    Raises:
        FitMismatch: The number of layers, the shape of a matrix or the weights of a layer differ.
    """
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
        projections.check_weights(index, sample_weights(layers[index], weights), weights.k.dtype)


# Files


def save_matrices(projections: Projections, path: Path) -> str:
    """Write matrices and samples to a safetensors file, through a temporary file, so that none is left half written.

    Args:
        projections: The projections to write.
        path: File to write; a file of older projections is replaced.

    Returns:
        SHA-256 of the file, in hexadecimal digits.

    Raises:
        ValueError: ``path`` is a file of another kind, such as a model's weights.
        ImportError: safetensors is missing.
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
    """Return the ``format`` of a safetensors file; None if it has none or is no safetensors file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("format")
    except SafetensorError:
        return None


def load_matrices(path: Path, sha256: str, layers: Iterable[int], report: FitReport) -> Projections:
    """Read a file that ``save_matrices`` wrote.

    Args:
        path: The file.
        sha256: SHA-256 that ``save_matrices`` returned.
        layers: Layers to read.
        report: How the projections were fitted, from the plan's JSON.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file has another SHA-256, or lacks a layer.
        ImportError: safetensors is missing.
    """
    if not path.exists():
        raise FileNotFoundError(f"projections: expected the plan's matrices in {path.name}, got no such file")
    if not path.is_file():  # a device may have no end
        raise ValueError(f"projections: expected the plan's matrices in a file, got {path.name}, which is none")
    data = path.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise ValueError(f"projections: expected {path.name} with SHA-256 {sha256}, as it was saved, got {found}")
    load = _safetensors().load
    from safetensors import SafetensorError

    try:
        tensors = load(data)
    except SafetensorError as error:
        raise ValueError(f"projections: expected a safetensors file, got {path.name} ({error})") from None
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


def _read_rows(name: str, values: Any, length: int) -> list[list[Any]]:
    return [read_list(name, row, length) for row in read_list(name, values)]


def _read_floats(name: str, values: Any) -> tuple[Any, ...]:
    return tuple(read_float(name, value) for value in read_list(name, values))
