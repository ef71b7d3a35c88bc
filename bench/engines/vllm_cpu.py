"""vLLM's CPU build, in this process: ``LLM.generate`` with one new token."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

_MARGIN = 16  # positions beyond the prompt


class Engine:
    """Run vLLM's CPU build. Takes no job options. Prompts run whole: no chunks, no prefix cache."""

    def arm_and_arguments(self, job: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """Return the name of the arm, and further arguments of ``vllm.LLM``."""
        return "vllm", {}

    def load(self, job: dict[str, Any]) -> tuple[dict[str, str], list[str]]:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        length = job["max_tokens"] + _MARGIN
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(cache_gib(job["weights"], length))
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, sorted(os.sched_getaffinity(0))))
        os.environ["VLLM_NO_USAGE_STATS"] = "1"
        os.environ["VLLM_CACHE_ROOT"] = os.path.join(job["work"], "cache")
        from vllm import LLM

        name, more = self.arm_and_arguments(job)
        self._engine = LLM(
            model=job["weights"],
            skip_tokenizer_init=True,
            dtype=job["dtype"],
            max_model_len=length,
            max_num_batched_tokens=max(length, 2048),
            max_num_seqs=1,
            enable_prefix_caching=False,
            max_logprobs=64,
            seed=0,
            **more,
        )
        return {name: "LLM.generate(ids, max_tokens=1): scheduling, one forward, sampling of one token"}, [
            "vllm-cpu",
            "torch",
        ]

    def prefill(self, arm: str, ids: list[int]) -> Any:
        return self._generate(ids, None)

    def log_probs(self, arm: str, ids: list[int], keep: int | None) -> dict[int, float]:
        [output] = self._generate(ids, keep)
        found = output.outputs[0].logprobs[0]
        return {int(token): float(item.logprob) for token, item in found.items()}

    def _generate(self, ids: list[int], logprobs: int | None) -> Any:
        from vllm import SamplingParams

        sampling = SamplingParams(max_tokens=1, temperature=0.0, logprobs=logprobs, ignore_eos=True, detokenize=False)
        return self._engine.generate({"prompt_token_ids": ids}, sampling, use_tqdm=False)


def cache_gib(weights: str, tokens: int) -> int:
    """Return whole GiB for twice the K/V cache of a prompt in 16 bits: vLLM uses blocks, and reserves one."""
    config = json.loads((Path(weights) / "config.json").read_text())
    width = config["num_key_value_heads"] * config["head_dim"]
    needed = 2 * 2 * 2 * config["num_hidden_layers"] * width * tokens
    return max(1, -(-needed // 2**30))
