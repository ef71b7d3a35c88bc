"""``PartialLayer``: an omitted layer. Context rows leave it only K and V; boundary rows run the stock layer."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pop_ext.hf.compat import new_cache
from pop_ext.hf.modules import Module
from pop_ext.plans.norms import normalize_unweighted
from pop_ext.plans.projections import fitted_biases
from pop_ext.portable.arguments import MASK, bind, causal_mask, last_rows
from pop_ext.portable.captures import (
    CaptureCache,
    Captured,
    FilledCache,
    KeysValues,
    NarrowQuery,
    Precomputed,
    RecordedMixer,
    has_heads_in_q_proj,
)
from pop_ext.portable.decoder import cache_name, clone_module
from pop_ext.utils.tensors import is_out_of_memory


@dataclass
class Rows:
    """Which of the new rows of a padded batch run at full depth.

    Attributes:
        columns: last columns that hold all boundary rows.
        num_logits: last columns whose logits are wanted, at most ``columns``.
        boundary: bool ``[batch, columns]``, True for a boundary row; None if every one of these columns is.
        merged: output of the omitted layer that ran last in this call, which the next one may write into.
    """

    columns: int
    num_logits: int
    boundary: Tensor | None = None
    merged: Tensor | None = None


class PartialLayer:
    """Run one omitted layer in one call, as the ``forward`` of a clone of the layer.

    Args:
        layer: the stock layer, which stays as it is.
        rows: of the call.
        compute: last columns whose output is wanted: those of boundary rows, or in the last layer those of logits.
        fitted: ``[2 * kv_dim, hidden]``, projects K and V of context rows in place of the layer's own weights; or None.
    """

    def __init__(self, layer: Module, rows: Rows, compute: int, fitted: Tensor | None = None) -> None:
        self.layer, self.rows, self.compute, self.fitted = layer, rows, compute, fitted
        self._class: Any = type(layer)
        self._cache_name = cache_name(layer) or ""
        self._mixers: dict[str, Module] = {
            name: child for name, child in layer.named_children() if cache_name(child) is not None
        }

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call, hidden_name = bind(self._class, args, kwargs)
        hidden_states: Tensor = call[hidden_name]
        total = hidden_states.shape[-2]
        compute = min(self.compute, total)  # some decoders cut rows of last layers by themselves
        boundary = None if self.rows.boundary is None else self.rows.boundary[:, -compute:, None]
        if total == compute and boundary is None:
            return self._class.forward(self.layer, **call)
        layer, few = self.layer, last_rows(call, total, compute)
        cache: Any = call.get(self._cache_name)
        keys = 0
        if self._leaves_something():
            written, recorded = self._project(call, total)
            if recorded:
                layer = clone_module(layer, **{name: mixer.replay(compute) for name, mixer in recorded.items()})
            if written is not None:
                filled = cache.update(written.keys, written.values, *written.args, **written.kwargs)
                few[self._cache_name] = FilledCache(cache, filled, compute)
                keys = filled[0].shape[-2]
        keys = keys or total
        if few.get(MASK, ...) is None and (compute > 1 or keys > total) and _needs_mask(self.layer):
            few[MASK] = causal_mask(total, compute, keys, hidden_states.device)
        return self._merge(hidden_states, self._class.forward(layer, **few), compute, boundary)

    def _leaves_something(self) -> bool:
        """Return whether context rows leave anything: a layer may attend to another's K and V, or be an MLP alone."""
        shares = any(getattr(mixer, "is_kv_shared_layer", False) for mixer in self._mixers.values())
        return bool(self._mixers) and not shares

    def _merge(self, hidden_states: Tensor, output: Any, compute: int, boundary: Tensor | None) -> Any:
        """Return all rows: the output of the boundary rows among the last ``compute``, and the others as they came."""
        new = output[0] if isinstance(output, tuple) else output
        if boundary is not None:
            new = torch.where(boundary, new, hidden_states[..., -compute:, :])
        if self.rows.merged is not hidden_states:  # one copy for each run of omitted layers
            self.rows.merged = hidden_states.clone()
        self.rows.merged[..., -compute:, :] = new
        return (self.rows.merged, *output[1:]) if isinstance(output, tuple) else self.rows.merged

    # K and V

    def _project(self, call: dict[str, Any], total: int) -> tuple[KeysValues | None, dict[str, RecordedMixer]]:
        """Return the K and V of all rows, and the mixers that have brought a state up to date in place of K and V."""
        if self.fitted is None:
            return self._run_until_written(call)
        hidden_states = next(iter(call.values()))
        own, _ = self._run_until_written(last_rows(call, total, self.rows.columns))
        fitted, _ = self._run_until_written(call, self._project_fitted(hidden_states))
        assert own is not None  # a fit is of K and V
        assert fitted is not None
        return self._with_own_boundary_rows(fitted, own), {}

    def _project_fitted(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Return fitted K and V before norm and RoPE, ``[batch, rows, kv_dim]`` each."""
        assert self.fitted is not None
        plain = normalize_unweighted(self.layer, hidden_states).to(hidden_states.dtype)
        keys, values = (plain @ self.fitted.to(plain).T).chunk(2, dim=-1)
        k_bias, v_bias = fitted_biases(self.layer)
        return (keys if k_bias is None else keys + k_bias), (values if v_bias is None else values + v_bias)

    def _with_own_boundary_rows(self, fitted: KeysValues, own: KeysValues) -> KeysValues:
        """Return fitted K and V of context rows, and the layer's own of boundary rows."""
        columns, both = self.rows.columns, []
        for theirs, ours in ((fitted.keys, own.keys), (fitted.values, own.values)):
            last = ours
            if self.rows.boundary is not None:
                last = torch.where(self.rows.boundary[:, None, :, None], ours, theirs[..., -columns:, :])
            both.append(torch.cat([theirs[..., :-columns, :], last], dim=-2))
        return KeysValues(both[0], both[1], own.args, own.kwargs)

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


def _needs_mask(layer: Module) -> bool:
    """Return whether few queries over many keys need a mask where all queries together need none."""
    config = next((module.config for module in layer.modules() if hasattr(module, "config")), None)
    return getattr(config, "_attn_implementation", None) == "sdpa"


def _with_projected(mixer: Module, keys: Tensor, values: Tensor) -> dict[str, nn.Module]:
    """Return projections of an attention that give these K and V, ``[batch, rows, kv_dim]`` each."""
    if not hasattr(mixer, "qkv_proj"):
        return {"k_proj": Precomputed(keys), "v_proj": Precomputed(values)}
    queries = keys.new_zeros(*keys.shape[:-1], mixer.qkv_proj.out_features - 2 * keys.shape[-1])
    return {"qkv_proj": Precomputed(torch.cat([queries, keys, values], dim=-1))}
