"""Attention of omitted layers: a backend whose metadata covers the boundary rows only."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import AttentionBackend, AttentionCGSupport, subclass_attention_backend

from pop_ext.vllm.rows import BoundaryRows, boundary_rows


class StepRequests:
    """The requests of the step that the engine is about to run, read from its model runner.

    A runner of another kind leaves this empty; then tokens that a preempted request generated are pruned like a prompt.

    Attributes:
        batch: The runner's description of its requests; None outside a step.
        declined: True if the step prefills and runs at full depth, since its chunks are shorter than ``min_tokens``.
    """

    def __init__(self) -> None:
        self.batch: Any = None
        self.declined = False

    def generated(self, query_start_loc: torch.Tensor) -> torch.Tensor | None:
        """Return ``[requests]`` int64: how many tokens of the step, or before it, come after a request's prompt.

        Args:
            query_start_loc: ``[requests + 1]`` on the CPU, where the new tokens of each request begin in the step.
        """
        if self.batch is None:
            return None
        known = self.batch.num_reqs  # a step may be padded with requests without tokens
        after = query_start_loc.diff().to(torch.int64)
        after[:known] += torch.from_numpy(self.batch.num_computed_tokens_cpu[:known])
        after[:known] -= torch.from_numpy(self.batch.num_prompt_tokens[:known])
        after[known:] = 0
        return after


REQUESTS = StepRequests()
"""Of this process's engine. Set around a step by ``pop_ext.vllm.install``."""


@cache
def boundary_backend(underlying: type[AttentionBackend], boundary: int, min_tokens: int) -> type[AttentionBackend]:
    """Return a subclass of the backend ``underlying`` for layers that only boundary rows run through.

    In a step that prefills, its metadata describes the boundary rows as if the step had no others, and carries their
    indices as ``boundary``. In any other step it is the metadata of ``underlying``. All layers get one class (the
    function is cached), since the engine builds metadata once for all layers of a backend.
    """
    builder = underlying.get_builder_cls()

    class BoundaryBuilder(builder):  # type: ignore[misc,valid-type]
        supports_update_block_table = False

        @classmethod
        def get_cudagraph_support(cls, *args: Any, **kwargs: Any) -> AttentionCGSupport:
            # A graph of a step that may prefill would fix the number of boundary rows.
            support = super().get_cudagraph_support(*args, **kwargs)
            return min(support, AttentionCGSupport.UNIFORM_BATCH, key=lambda level: level.value)

        def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
            begin = common_attn_metadata.query_start_loc_cpu
            rows = boundary_rows(begin, boundary, min_tokens, REQUESTS.generated(begin))
            if rows is None:
                REQUESTS.declined = int(begin.diff().max()) > boundary
                return super().build(common_prefix_len, common_attn_metadata, fast_build)
            index = async_tensor_h2d(rows.index, device=common_attn_metadata.slot_mapping.device)
            metadata = super().build(0, _of_rows(common_attn_metadata, rows, index), fast_build)
            carrier = copy.copy(metadata)
            carrier.__class__ = _carrier(type(metadata))  # type: ignore[arg-type]
            carrier.boundary = index
            carrier.step_tokens = int(begin[-1])
            return carrier

    return subclass_attention_backend("Boundary", underlying, BoundaryBuilder)


def _of_rows(common: Any, rows: BoundaryRows, index: Any) -> Any:
    """Restrict the engine's description of a step to the boundary rows; the lengths of sequences stay."""
    return common.replace(
        query_start_loc=async_tensor_h2d(rows.query_start_loc, device=common.query_start_loc.device),
        query_start_loc_cpu=rows.query_start_loc,
        num_actual_tokens=len(rows.index),
        max_query_len=rows.longest,
        slot_mapping=common.slot_mapping[index],
        positions=None if common.positions is None else common.positions[..., index],
        logits_indices_padded=None,
        num_logits_indices=None,
        _num_computed_tokens_cache=None,
        _token_to_req_indices_cache=None,
    )


@cache
def _carrier(kind: type) -> type:
    """Return a subclass of a backend's metadata with the indices of boundary rows, and the tokens of the step.

    The backend accepts it as its own.
    """
    return type(f"Boundary{kind.__name__}", (kind,), {"boundary": None, "step_tokens": 0})
