"""Which rows of a step of the engine run at full depth."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class BoundaryRows:
    """The rows of a step that omitted layers compute; the others are context rows.

    Attributes:
        index: ``[kept]`` int64, rows of the step in their order, on the CPU.
        query_start_loc: ``[requests + 1]`` int32, where those of each request begin among them, on the CPU.
        longest: of one request.
    """

    index: torch.Tensor
    query_start_loc: torch.Tensor
    longest: int


def boundary_rows(query_start_loc: torch.Tensor, boundary: int, min_tokens: int = 0) -> BoundaryRows | None:
    """The last ``boundary`` rows of each request, and all of a request that brings fewer than ``min_tokens``.

    A request that only decodes, or has drafts verified, brings no more than ``boundary`` rows and keeps all of them.

    Args:
        query_start_loc: ``[requests + 1]``, where the new tokens of each request begin in the step, on the CPU.
            A request without new tokens (padding) keeps none.
        boundary: at least 1, and at least the tokens that a request may have verified.
        min_tokens: ``Plan.min_tokens``.

    Returns:
        None if no row is left out: the step is not a prefill.
    """
    begin = query_start_loc.to(torch.int64)
    lengths = begin.diff()
    kept = torch.where(lengths < min_tokens, lengths, lengths.clamp(max=boundary))
    if torch.equal(kept, lengths):
        return None
    starts = torch.zeros_like(begin)
    starts[1:] = kept.cumsum(0)
    # Row j of a request's kept ones is row end - kept + j of the step.
    offset = (begin[1:] - kept - starts[:-1]).repeat_interleave(kept)
    index = torch.arange(int(starts[-1])) + offset
    return BoundaryRows(index, starts.to(torch.int32), int(kept.max()))
