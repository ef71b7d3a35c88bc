"""Logits processors that refuse requests for logits of prompt tokens, and change no logits.

vLLM has two model runners, each with an interface of its own; there is a class for either.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.exceptions import VLLMValidationError
from vllm.v1.sample import logits_processor as v1
from vllm.v1.worker.gpu.sample.logits_processor import interface as v2


def _check(params: Any) -> None:
    """Check the sampling parameters of a request.

    Raises:
        VLLMValidationError: they ask for log-probabilities of prompt tokens.
    """
    for name in ("prompt_logprobs", "prompt_logprob_token_ids"):
        value = getattr(params, name, None)
        if value is not None:
            raise VLLMValidationError(
                f"{name}: expected None with pruned prefills, which compute no logits of prompt tokens, got {value}",
                parameter=name,
            )


class NoPromptLogprobsV1(v1.LogitsProcessor):
    """For vLLM's V1 model runner."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        pass

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        _check(sampling_params)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        return logits

    def is_argmax_invariant(self) -> bool:
        return True

    def update_state(self, batch_update: Any) -> None:
        pass


class NoPromptLogprobsV2(v2.LogitsProcessor):
    """For vLLM's V2 model runner."""

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        _check(sampling_params)

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        return False

    def apply(self, logits: torch.Tensor, ctx: Any) -> torch.Tensor:
        return logits
