"""Run a packed step of several requests over a paged cache: transformers' continuous batching.

The rows of all requests lie one after the other, ``[1, rows, ...]``. Each request brings a chunk of its prompt, or the
one token that it decodes. The last rows of each chunk are boundary rows, all others context rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from pop_ext.hf.modules import Module
from pop_ext.plans.plan import Plan
from pop_ext.portable.arguments import MASK, bind
from pop_ext.portable.captures import KeysValues
from pop_ext.portable.decoder import Decoder, clone_module
from pop_ext.portable.forward import run_with_layers
from pop_ext.portable.projector import LayerProjector

PAGES = "cache"
"""Argument by which continuous batching hands layers their pages, in every version of transformers."""
_LENGTHS = ("max_length_q", "max_seqlen_q")
_ROWS = ("position_ids", "position_embeddings", "cache_position", MASK)


class Picked:
    """Some last rows of each request of a step.

    Args:
        tokens: rows of each request.
        counts: number of its last rows to pick, from 1 to all; 0 of a request without rows.
        total: rows of the step, those that pad it included.
        device: of the step's tensors.

    Attributes:
        index: int64 ``[sum(counts)]``, the picked rows.
        every: whether all rows are picked.
    """

    def __init__(self, tokens: Sequence[int], counts: Sequence[int], total: int, device: torch.device) -> None:
        ends = accumulate(tokens)
        rows = [row for end, count in zip(ends, counts, strict=True) for row in range(end - count, end)]
        self._total, self.every, self._longest = total, len(rows) == total, max(counts)
        self.index = torch.tensor(rows, dtype=torch.int64, device=device)
        self._starts = torch.tensor([0, *accumulate(counts)], dtype=torch.int32, device=device)

    def of(self, call: dict[str, Any], hidden_name: str) -> dict[str, Any]:
        """Return the arguments of a layer for the picked rows alone."""
        few = {name: self._pick(name, value, name == hidden_name) for name, value in call.items()}
        few["cu_seq_lens_q"] = self._starts
        return few | dict.fromkeys(few.keys() & set(_LENGTHS), self._longest)

    def _pick(self, name: str, value: Any, hidden: bool = False) -> Any:
        if isinstance(value, dict) and name in _ROWS:
            return {kind: self._pick(name, item) for kind, item in value.items()}
        if isinstance(value, (tuple, list)) and name in _ROWS:
            return type(value)(self._pick(name, item) for item in value)
        if not isinstance(value, Tensor):
            return value
        if name in ("position_ids", "cache_position"):
            return value[..., self.index]
        # Beside these, tensors that some architectures give each layer, such as embeddings of its own.
        rows = hidden or name in _ROWS or value.ndim == 3
        return value.index_select(-2, self.index) if rows and value.shape[-2] == self._total else value


class PackedRows:
    """Which rows of a step run at full depth, and which get logits.

    Args:
        tokens: rows of each request.
        boundary: boundary rows of each request, from 1 to all; 0 of a request without rows.
        total: rows of the step. Those beyond the requests' pad it: they are context rows whose K and V nobody reads.
        device: of the step's tensors.

    Attributes:
        boundary: the boundary rows.
        last: the last row of each request.
        merged: output of the omitted layer that ran last in this step, which the next one may write into.
    """

    def __init__(self, tokens: Sequence[int], boundary: Sequence[int], total: int, device: torch.device) -> None:
        self.boundary = Picked(tokens, boundary, total, device)
        self.last = Picked(tokens, [min(1, count) for count in tokens], total, device)
        self.merged: Tensor | None = None


class PackedLayer(LayerProjector):
    """Run one omitted layer, or the last one, in one step, as the ``forward`` of a clone of the layer.

    K and V of all rows go to the pages by one ``update`` of the paged cache, which reads a sliding window before it
    overwrites it. The picked rows then attend to what that update returned.

    Args:
        layer: the stock layer, which stays as it is.
        rows: of the step.
        compute: rows whose output is wanted.
        fitted: ``[2 * kv_dim, hidden]``, projects K and V of context rows in place of the layer's own weights; or None.
    """

    def __init__(self, layer: Module, rows: PackedRows, compute: Picked, fitted: Tensor | None = None) -> None:
        super().__init__(layer, PAGES, fitted)
        self.rows, self.compute = rows, compute

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call, hidden_name = bind(self._class, args, kwargs)
        hidden_states: Tensor = call[hidden_name]
        if self.compute.every:
            return self._class.forward(self.layer, **call)
        written = self._project(call, hidden_name)
        # The update adds what its attention must know, such as the bounds of the keys, to the attention's arguments.
        attention = written.kwargs.get("kwargs", {})
        before = dict(attention)
        filled = call[PAGES].update(written.keys, written.values, *written.args, **written.kwargs)
        added = {name: value for name, value in attention.items() if value is not before.get(name)}
        few = self.compute.of(call, hidden_name) | {PAGES: FilledPages(filled, added)}
        output = self._class.forward(self.layer, **few)
        new = output[0] if isinstance(output, tuple) else output
        if self.rows.merged is not hidden_states:  # one copy for each run of omitted layers
            self.rows.merged = hidden_states.clone()
        self.rows.merged[:, self.compute.index] = new
        return (self.rows.merged, *output[1:]) if isinstance(output, tuple) else self.rows.merged

    def _project(self, call: dict[str, Any], hidden_name: str) -> KeysValues:
        """Return the K and V of all rows: by the fit in context rows, if there is one, and the layer's own in others.

        Raises:
            NotImplementedError: The layer has written nothing.
        """
        projected = None if self.fitted is None else self._project_fitted(call[hidden_name])
        written, _ = self._run_until_written(call, projected)
        if written is None:
            raise NotImplementedError(f"model: expected layers that write K and V, got {self._class.__name__}")
        if projected is not None:
            own, _ = self._run_until_written(self.rows.boundary.of(call, hidden_name))
            assert own is not None
            written.keys[:, :, self.rows.boundary.index] = own.keys
            written.values[:, :, self.rows.boundary.index] = own.values
        return written


class FilledPages:
    """Give a layer the K and V that an update of the paged cache has returned, for whatever it writes.

    Args:
        filled: K and V as ``update`` returned them.
        added: what ``update`` has changed among the arguments of the attention.
    """

    def __init__(self, filled: tuple[Tensor, Tensor], added: dict[str, Any]) -> None:
        self._filled, self._added = filled, added

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        kwargs.get("kwargs", {}).update(self._added)
        return self._filled


def run_packed(model: Module, decoder: Decoder, plan: Plan, rows: PackedRows, arguments: dict[str, Any]) -> Any:
    """Run a pruned step: one forward of the model, in which context rows skip the omitted layers.

    Args:
        model: the model.
        decoder: its language model (``find_decoder``).
        plan: layers to omit.
        rows: of this step.
        arguments: of the model's ``forward``, as continuous batching gives them.

    Returns:
        What the stock forward returns. Of the last layer only the last row of each request is computed: those are the
        rows whose logits continuous batching reads.
    """
    fitted = {} if plan.projections is None else plan.projections.matrices
    last = plan.num_layers - 1
    layers: dict[str, nn.Module] = {}
    for index in sorted({*plan.omit, last}):
        layer, compute = decoder.layers[index], rows.last if index == last else rows.boundary
        packed = PackedLayer(layer, rows, compute, fitted.get(index) if index in plan.omit else None)
        layers[str(index)] = clone_module(layer, packed)
    try:
        return run_with_layers(model, decoder, layers, {}, arguments)
    finally:
        rows.merged = None
