"""The norm before K and V. Without its weight and bias it gives the input of a fitted projection."""

from __future__ import annotations

import copy
import math
import weakref
from typing import Any

import torch
from torch import Tensor

_centring: weakref.WeakKeyDictionary[type, bool] = weakref.WeakKeyDictionary()


def normalize_unweighted(layer: Any, hidden_states: Tensor) -> Tensor:
    """Apply the input norm of a layer without its weight and bias, which is the input of a fitted projection.

    Args:
        layer: Decoder layer. Without an ``input_layernorm``, the hidden states are returned as they are.
        hidden_states: ``[..., hidden_size]``, any floating dtype.

    Returns:
        ``h * rsqrt(mean(h^2) + eps)``, float32, same shape. Of a LayerNorm, ``h`` less its mean takes the place of
        ``h``.
    """
    norm = getattr(layer, "input_layernorm", None)
    hidden = hidden_states.float()
    if norm is None:
        return hidden
    if _centres(norm, hidden_states):
        hidden = hidden - hidden.mean(-1, keepdim=True)
    eps = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
    return hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + eps)


def norm_shift(layer: Any) -> Tensor | None:
    """Return the bias of a layer's input norm, [1, hidden_size]; None without one."""
    norm = getattr(layer, "input_layernorm", None)
    if norm is None or not isinstance(getattr(norm, "bias", None), Tensor):
        return None
    # Of zeros any norm returns its bias, also one whose weights accelerate has offloaded.
    weight = norm.bias if norm.bias.device.type != "meta" else norm.bias.new_empty(0, device="cpu")
    with torch.no_grad():
        shift: Tensor = norm(weight.new_zeros(1, norm.bias.shape[0]))
    return shift


def norm_gain(layer: Any, like: Tensor) -> Tensor | None:
    """Return the weight by which a layer's input norm multiplies, [hidden_size] float32; None without a norm.

    Families store it in different ways (Gemma stores it less 1), so it is read off the norm's output.

    Args:
        layer: Decoder layer.
        like: Any tensor ``[..., hidden_size]`` on the layer's device.

    Raises:
        ValueError: The norm is neither an RMSNorm nor a LayerNorm with one weight per channel.
    """
    norm = getattr(layer, "input_layernorm", None)
    if norm is None:
        return None
    generator = torch.Generator("cpu").manual_seed(0)
    probe = torch.randn(2, like.shape[-1], generator=generator, device="cpu").to(like.device)
    with torch.no_grad():
        exact = copy.deepcopy(norm).float()
        normed, shift = exact(probe), exact(torch.zeros_like(probe))
        if any(isinstance(getattr(norm, name, None), float) for name in ("variance_epsilon", "eps")):
            plain = normalize_unweighted(layer, probe)
            gain: Tensor = (normed[0] - shift[0]) / plain[0]
            shifts = isinstance(getattr(norm, "bias", None), Tensor) or not bool(shift.any())
            if shifts and torch.allclose(plain[1] * gain + shift[1], normed[1], rtol=1e-3, atol=1e-4, equal_nan=True):
                return gain.detach()
    raise ValueError(
        f"model: expected an RMSNorm or a LayerNorm before K and V, which a fit needs, got {type(norm).__name__}; "
        'pop_ext.autoplan with method="unfitted" (--method unfitted) needs none'
    )


def check_norms(layers: Any, size: int) -> None:
    """Check that K and V of all decoder layers, of hidden size ``size``, can be fitted behind their norms.

    Raises:
        ValueError: As for ``norm_gain``.
    """
    for layer in layers:
        weight = getattr(getattr(layer, "input_layernorm", None), "weight", None)
        device = weight.device if isinstance(weight, Tensor) else torch.device("cpu")
        if device.type != "meta":  # the fit itself reads offloaded ones
            norm_gain(layer, torch.empty(size, device=device))


def _centres(norm: Any, like: Tensor) -> bool:
    """Return whether a norm takes the mean off its input, as a LayerNorm does; found out once for each class."""
    kind = type(norm)
    if kind not in _centring:
        dtype = next((parameter.dtype for parameter in norm.parameters()), torch.float32)
        row = (torch.arange(like.shape[-1], device=like.device) % 3).to(dtype)[None]
        with torch.no_grad():
            first, second = norm(row).float(), norm(row + 4).float()  # exact in any dtype
        size = float(first.norm())
        if not 0 < size < math.inf:  # its weights say nothing
            return False
        _centring[kind] = float((first - second).norm()) < 0.05 * size
    return _centring[kind]
