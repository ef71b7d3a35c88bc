"""``LayerProjector``: read the K and V that the rows of an omitted layer leave, by the layer's own modules."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from pop_ext.hf.compat import new_cache
from pop_ext.hf.modules import Module
from pop_ext.plans.norms import normalize_unweighted
from pop_ext.plans.projections import fitted_biases
from pop_ext.portable.arguments import last_rows
from pop_ext.portable.captures import (
    CaptureCache,
    Captured,
    KeysValues,
    NarrowQuery,
    Precomputed,
    RecordedMixer,
    has_heads_in_q_proj,
)
from pop_ext.portable.decoder import cache_name, clone_module
from pop_ext.utils.tensors import is_out_of_memory


class LayerProjector:
    """Run a layer up to the point where it has written K and V.

    Args:
        layer: the stock layer, which stays as it is.
        cache_argument: name of the argument that brings the layer its cache.
        fitted: ``[2 * kv_dim, hidden]``, projects K and V of context rows in place of the layer's own weights; or None.
    """

    def __init__(self, layer: Module, cache_argument: str, fitted: Tensor | None) -> None:
        self.layer, self.fitted = layer, fitted
        self._class: Any = type(layer)
        self._cache_name = cache_argument
        self._mixers: dict[str, Module] = {
            name: child for name, child in layer.named_children() if cache_name(child) is not None
        }

    def _leaves_something(self) -> bool:
        """Return whether context rows leave anything: a layer may attend to another's K and V, or be an MLP alone."""
        shares = any(getattr(mixer, "is_kv_shared_layer", False) for mixer in self._mixers.values())
        return bool(self._mixers) and not shares

    def _project_fitted(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Return fitted K and V before norm and RoPE, ``[batch, rows, kv_dim]`` each."""
        assert self.fitted is not None
        plain = normalize_unweighted(self.layer, hidden_states).to(hidden_states.dtype)
        keys, values = (plain @ self.fitted.to(plain).T).chunk(2, dim=-1)
        k_bias, v_bias = fitted_biases(self.layer)
        return (keys if k_bias is None else keys + k_bias), (values if v_bias is None else values + v_bias)

    def _run_until_written(
        self, call: dict[str, Any], projected: tuple[Tensor, Tensor] | None = None
    ) -> tuple[KeysValues | None, dict[str, RecordedMixer]]:
        """Run the layer until it has written K and V, or until its only mixer has ended.

        Args:
            call: arguments of the layer by name.
            projected: K and V before norm and RoPE, in place of the layer's own projections; None for its own.
        """
        cache = call[self._cache_name]
        mixers = {}
        for name, mixer in self._mixers.items():
            children = {} if projected is None else _with_projected(mixer, *projected)
            if self._takes_narrow_query(mixer, call):
                children["q_proj"] = NarrowQuery(mixer)
            mixers[name] = clone_module(mixer, **children) if children else mixer
        return self._capture(call, cache, mixers)

    def _capture(
        self, call: dict[str, Any], cache: Any, mixers: dict[str, Module]
    ) -> tuple[KeysValues | None, dict[str, RecordedMixer]]:
        """Run the layer with these mixers until it has written K and V, or until its only mixer has ended."""
        recorders = {name: RecordedMixer(mixer, ends_layer=len(mixers) == 1) for name, mixer in mixers.items()}
        capture = CaptureCache(cache)
        with suppress(Captured):
            self._class.forward(clone_module(self.layer, **recorders), **{**call, self._cache_name: capture})
        return capture.written, {name: mixer for name, mixer in recorders.items() if mixer.output is not None}

    def _takes_narrow_query(self, mixer: Module, call: dict[str, Any]) -> bool:
        """Return whether an attention writes the same K and V without its queries; tried once for each kind.

        Attentions split the heads of ``q_proj`` by a ``view`` that infers their number. One that does not, one with a
        norm over all heads, and a linear attention, whose output matters, compute their queries.
        """
        if not has_heads_in_q_proj(mixer) or len(self._mixers) > 1:
            return False
        kind = type(mixer), mixer.q_proj.out_features, tuple(mixer._modules)
        if kind not in _TAKES_NARROW_QUERY:
            row = last_rows(call, next(iter(call.values())).shape[-2], 1)
            _TAKES_NARROW_QUERY[kind] = _are_equal(
                self._capture_apart(row, mixer),
                self._capture_apart(row, clone_module(mixer, q_proj=NarrowQuery(mixer))),
            )
        return _TAKES_NARROW_QUERY[kind]

    def _capture_apart(self, call: dict[str, Any], mixer: Module) -> KeysValues | None:
        """Return what the layer would write with this mixer, without its cache; None if it fails or writes nothing."""
        (name,) = self._mixers
        try:
            return self._capture(call, new_cache(mixer.config), {name: mixer})[0]
        except (RuntimeError, ValueError, IndexError) as error:
            if is_out_of_memory(error):
                raise
            return None


_TAKES_NARROW_QUERY: dict[tuple[Any, ...], bool] = {}


def _are_equal(own: KeysValues | None, other: KeysValues | None) -> bool:
    """Return whether both were written, and are alike up to rounding."""
    if own is None or other is None:
        return False
    pairs = ((own.keys, other.keys), (own.values, other.values))
    return all(a.shape == b.shape and torch.allclose(a, b, rtol=1e-3, atol=1e-5, equal_nan=True) for a, b in pairs)


def _with_projected(mixer: Module, keys: Tensor, values: Tensor) -> dict[str, nn.Module]:
    """Return projections of an attention that give these K and V, ``[batch, rows, kv_dim]`` each."""
    if not hasattr(mixer, "qkv_proj"):
        return {"k_proj": Precomputed(keys), "v_proj": Precomputed(values)}
    queries = keys.new_zeros(*keys.shape[:-1], mixer.qkv_proj.out_features - 2 * keys.shape[-1])
    return {"qkv_proj": Precomputed(torch.cat([queries, keys, values], dim=-1))}
