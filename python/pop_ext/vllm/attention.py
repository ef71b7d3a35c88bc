"""Attention of omitted layers: a backend whose metadata is that of the boundary rows alone."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import AttentionBackend, AttentionCGSupport, subclass_attention_backend

from pop_ext.vllm.rows import BoundaryRows, boundary_rows


@cache
def boundary_backend(underlying: type[AttentionBackend], boundary: int, min_tokens: int) -> type[AttentionBackend]:
    """The backend ``underlying``, for layers that only the boundary rows of a prefill run through.

    In a step that prefills, its metadata describes those rows as if they were all the step had brought, and carries
    their indices as ``boundary``. In any other step it is what ``underlying`` makes. One class for all layers: the
    engine builds metadata once for layers of one backend.
    """
    builder = underlying.get_builder_cls()

    class BoundaryBuilder(builder):  # type: ignore[misc,valid-type]
        supports_update_block_table = False

        @classmethod
        def get_cudagraph_support(cls, *args: Any, **kwargs: Any) -> AttentionCGSupport:
            # A graph of a step that may prefill would have the number of boundary rows built in.
            support = super().get_cudagraph_support(*args, **kwargs)
            return min(support, AttentionCGSupport.UNIFORM_BATCH, key=lambda level: level.value)

        def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
            rows = boundary_rows(common_attn_metadata.query_start_loc_cpu, boundary, min_tokens)
            if rows is None:
                return super().build(common_prefix_len, common_attn_metadata, fast_build)
            index = async_tensor_h2d(rows.index, device=common_attn_metadata.slot_mapping.device)
            metadata = super().build(0, _of_rows(common_attn_metadata, rows, index), fast_build)
            carrier = copy.copy(metadata)
            carrier.__class__ = _carrier(type(metadata))  # type: ignore[arg-type]
            carrier.boundary = index
            return carrier

    return subclass_attention_backend("Boundary", underlying, BoundaryBuilder)


def _of_rows(common: Any, rows: BoundaryRows, index: Any) -> Any:
    """The engine's description of a step, of some of its rows; sequences are as long as they are."""
    return common.replace(
        query_start_loc=async_tensor_h2d(rows.query_start_loc, device=common.query_start_loc.device),
        query_start_loc_cpu=rows.query_start_loc,
        num_actual_tokens=len(rows.index),
        max_query_len=rows.longest,
        slot_mapping=common.slot_mapping[index],
        positions=None if common.positions is None else common.positions[index],
        logits_indices_padded=None,
        num_logits_indices=None,
        _num_computed_tokens_cache=None,
        _token_to_req_indices_cache=None,
    )


@cache
def _carrier(kind: type) -> type:
    """A backend's metadata with the rows that it is of; the backend takes it for its own."""
    return type(f"Boundary{kind.__name__}", (kind,), {"boundary": None})
