"""LoRA adapters in a pruned prefill.

vLLM's adapter layers look up the adapter of each row in tables that a step fills once, for all its rows. The stage of
an omitted run sees other rows, and its K and V must hold what adapters of k_proj and v_proj add.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Adapters:
    """The adapter tables of an engine.

    Args:
        layers: Decoder layers of the omitted runs. Where the engine loads no adapters, they have no tables.
    """

    def __init__(self, layers: Iterable[torch.nn.Module]) -> None:
        found = (getattr(module, "punica_wrapper", None) for layer in layers for module in layer.modules())
        self._tables: Any = next((tables for tables in found if tables is not None), None)

    @property
    def active(self) -> bool:
        """True if an adapter applies to a row of this step."""
        if self._tables is None:
            return False
        on_device = getattr(self._tables, "token_mapping_meta", None)
        if on_device is not None:
            return not bool(on_device.no_lora_flag_cpu[0])
        return not self._tables.no_lora

    @contextmanager
    def of_rows(self, rows: torch.Tensor) -> Iterator[None]:
        """Let the tables describe only these rows of the step, ``[rows]``, in this order."""
        if not self.active:
            yield
            return
        tables = self._tables
        whole, length = tables.token_lora_indices.clone(), tables.indices_len[0]
        tables._token_lora_indices[: len(rows)] = whole[rows]
        tables.indices_len[0] = len(rows)
        self._update()
        try:
            yield
        finally:
            tables._token_lora_indices[: len(whole)] = whole
            tables.indices_len[0] = length
            self._update()

    def _update(self) -> None:
        """Make what kernels read of the table of rows: on a GPU rows by adapter, on a CPU runs of rows."""
        tables = self._tables
        on_device = getattr(tables, "token_mapping_meta", None)
        if on_device is not None:
            on_device.prepare_tensors(tables.token_lora_indices)
        else:
            tables._update_prefill_metadata(tables.token_lora_indices)
