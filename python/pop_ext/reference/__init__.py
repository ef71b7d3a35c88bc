"""The oracle: Prefill-Only Pruning in plain PyTorch, which the native path is compared with."""

from __future__ import annotations

from pop_ext.reference.prefill import prefill
from pop_ext.reference.projection import project_kv

__all__ = ["prefill", "project_kv"]
