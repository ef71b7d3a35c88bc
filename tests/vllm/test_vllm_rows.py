"""The parts of the plugin that need no vLLM: boundary rows of a step, and arguments of an engine."""

from __future__ import annotations

import pytest
import torch
from pop_ext import vllm
from pop_ext.vllm.rows import boundary_rows


def rows_of(lengths: list[int], boundary: int, min_tokens: int = 0) -> list[list[int]] | None:
    """Select the boundary rows of each request by a loop."""
    kept, begin = [], 0
    for length in lengths:
        count = length if length < min_tokens else min(length, boundary)
        kept.append(list(range(begin + length - count, begin + length)))
        begin += length
    return None if sum(map(len, kept)) == begin else kept


@pytest.mark.parametrize("min_tokens", [0, 5, 1000])
@pytest.mark.parametrize("boundary", [1, 2, 17])
@pytest.mark.parametrize(
    "lengths", [[19], [1, 1, 1], [1, 30, 1, 7], [0, 3, 0, 0], [2, 0, 18], [4, 4, 4], [5], [17, 18], [0]], ids=str
)
def test_a_request_keeps_its_last_rows(lengths, boundary, min_tokens):
    begin = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    expected, found = rows_of(lengths, boundary, min_tokens), boundary_rows(begin, boundary, min_tokens)
    if expected is None:
        assert found is None
        return
    assert found.index.dtype == torch.int64
    assert found.index.tolist() == [row for rows in expected for row in rows]
    assert found.query_start_loc.dtype == torch.int32
    assert found.query_start_loc.tolist() == [0, *torch.tensor([len(rows) for rows in expected]).cumsum(0).tolist()]
    assert found.longest == max(map(len, expected))


def test_generated_tokens_of_a_preempted_request_keep_full_depth():
    """The first is computed again with 5 generated tokens, the second is a prompt, the third decodes."""
    begin = torch.tensor([0, 25, 45, 46], dtype=torch.int32)
    found = boundary_rows(begin, 2, generated=torch.tensor([5, -10, 30]))
    assert found.index.tolist() == [*range(18, 25), 43, 44, 45]
    assert found.query_start_loc.tolist() == [0, 7, 9, 10]


def test_engine_arguments_name_the_plan(tmp_path):
    plan = tmp_path / "plan.json"
    assert vllm.engine_arguments("a/model", plan) == {"additional_config": {"pop_ext": {"plan": str(plan)}}}
    assert vllm.engine_arguments("a/model") == {"additional_config": {"pop_ext": {}}}
    asked = vllm.engine_arguments("a/model", "third", strict=False)
    assert asked == {"additional_config": {"pop_ext": {"plan": "third", "strict": False}}}
