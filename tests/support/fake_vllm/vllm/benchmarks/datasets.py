"""A request of vLLM's load generator."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class SampleRequest:
    prompt: list[int]
    prompt_len: int
    expected_output_len: int
