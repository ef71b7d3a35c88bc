"""``PartialLayer``: an omitted layer. Context rows leave it only K and V; boundary rows run the stock layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pop_ext.hf.modules import Module
from pop_ext.portable.arguments import MASK, bind, causal_mask, last_rows
from pop_ext.portable.captures import FilledCache, KeysValues, RecordedMixer
from pop_ext.portable.decoder import cache_name, clone_module
from pop_ext.portable.projector import LayerProjector


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


class PartialLayer(LayerProjector):
    """Run one omitted layer in one call, as the ``forward`` of a clone of the layer.

    Args:
        layer: the stock layer, which stays as it is.
        rows: of the call.
        compute: last columns whose output is wanted: those of boundary rows, or in the last layer those of logits.
        fitted: ``[2 * kv_dim, hidden]``, projects K and V of context rows in place of the layer's own weights; or None.
    """

    def __init__(self, layer: Module, rows: Rows, compute: int, fitted: Tensor | None = None) -> None:
        super().__init__(layer, cache_name(layer) or "", fitted)
        self.rows, self.compute = rows, compute

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

    def _merge(self, hidden_states: Tensor, output: Any, compute: int, boundary: Tensor | None) -> Any:
        """Return all rows: the output of the boundary rows among the last ``compute``, and the others as they came."""
        new = output[0] if isinstance(output, tuple) else output
        if boundary is not None:
            new = torch.where(boundary, new, hidden_states[..., -compute:, :])
        if self.rows.merged is not hidden_states:  # one copy for each run of omitted layers
            self.rows.merged = hidden_states.clone()
        self.rows.merged[..., -compute:, :] = new
        return (self.rows.merged, *output[1:]) if isinstance(output, tuple) else self.rows.merged

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

    def _with_own_boundary_rows(self, fitted: KeysValues, own: KeysValues) -> KeysValues:
        """Return fitted K and V of context rows, and the layer's own of boundary rows."""
        columns, both = self.rows.columns, []
        for theirs, ours in ((fitted.keys, own.keys), (fitted.values, own.values)):
            last = ours
            if self.rows.boundary is not None:
                last = torch.where(self.rows.boundary[:, None, :, None], ours, theirs[..., -columns:, :])
            both.append(torch.cat([theirs[..., :-columns, :], last], dim=-2))
        return KeysValues(both[0], both[1], own.args, own.kwargs)


def _needs_mask(layer: Module) -> bool:
    """Return whether few queries over many keys need a mask where all queries together need none."""
    config = next((module.config for module in layer.modules() if hasattr(module, "config")), None)
    return getattr(config, "_attn_implementation", None) == "sdpa"
