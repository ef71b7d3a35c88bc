"""Select the rows of an engine's step that run at full depth. This module needs no vLLM."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class BoundaryRows:
    """The boundary rows of a step: those that omitted layers compute. The other rows are context rows.

    Attributes:
        index: ``[boundary rows]`` int64 on the CPU, their indices in the step, ascending.
        query_start_loc: ``[requests + 1]`` int32 on the CPU, where each request begins among the boundary rows.
        longest: the most boundary rows of one request.
    """

    index: torch.Tensor
    query_start_loc: torch.Tensor
    longest: int


def boundary_rows(
    query_start_loc: torch.Tensor, boundary: int, min_tokens: int = 0, generated: torch.Tensor | None = None
) -> BoundaryRows | None:
    """Return the last ``boundary`` rows of each request, and all rows of a request with fewer than ``min_tokens``.

    A request that decodes, or whose drafts are verified, has at most ``boundary`` rows: all are boundary rows. A
    request that was preempted is computed again from its first token: the rows that ran at full depth the first time,
    its generated tokens and the boundary of its prompt, are boundary rows again.

    Args:
        query_start_loc: ``[requests + 1]`` on the CPU, where the new tokens of each request begin in the step. A
            request without new tokens (padding) has no boundary rows.
        boundary: at least 1, and at least the number of tokens of a request that may be verified at once.
        min_tokens: ``Plan.min_tokens``.
        generated: ``[requests]`` int64 on the CPU, how many of the last tokens of each request are generated ones; at
            most 0 if none is. None: unknown; all tokens of a prefill are taken for prompts.

    Returns:
        None if there are no context rows: the step is not a prefill.
    """
    begin = query_start_loc.to(torch.int64)
    lengths = begin.diff()
    wanted = torch.full_like(lengths, boundary)
    if generated is not None:
        wanted += generated.clamp(min=0)
    kept = torch.where(lengths < min_tokens, lengths, torch.minimum(lengths, wanted))
    if torch.equal(kept, lengths):
        return None
    starts = torch.zeros_like(begin)
    starts[1:] = kept.cumsum(0)
    # Boundary row j of a request is row end - kept + j of the step.
    offset = (begin[1:] - kept - starts[:-1]).repeat_interleave(kept)
    index = torch.arange(int(starts[-1])) + offset
    return BoundaryRows(index, starts.to(torch.int32), int(kept.max()))
