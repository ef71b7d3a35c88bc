"""The parts of the plugin that need no vLLM: boundary rows of a step, and arguments of an engine."""

from __future__ import annotations

import json

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


@pytest.mark.parametrize("name", vllm.ARCHITECTURES)
def test_engine_arguments_name_the_pruned_class_and_the_plan(name, tmp_path):
    kinds = {"Llama": "llama", "Mistral": "mistral", "Qwen2": "qwen2", "Qwen3": "qwen3"}
    kind = kinds[name.removesuffix("ForCausalLM")]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, "architectures": [name]}))
    assert vllm.engine_arguments(tmp_path, tmp_path / "plan.json") == {
        "hf_overrides": {"architectures": [f"POP{name}"]},
        "additional_config": {"pop_ext": {"plan": str(tmp_path / "plan.json")}},
    }
    assert vllm.engine_arguments(str(tmp_path))["additional_config"] == {"pop_ext": {}}


def test_an_unsupported_architecture_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}))
    with pytest.raises(ValueError, match="expected an architecture of LlamaForCausalLM, .*, got GPT2LMHeadModel"):
        vllm.engine_arguments(tmp_path)
