"""vLLM's own load generator in a child process (`bench.engines.child`), in the environment of vLLM.

`vllm bench serve` itself draws text, which a server tokenises again: lengths drift, and a shape with dummy weights has
no tokenizer. So this calls the function behind that command, ``vllm.benchmarks.serve.benchmark``, which takes token
ids. Its own figures are recomputed by `bench.serving.figures`, since it reports milliseconds and no round by round.
"""

from __future__ import annotations

import asyncio
from typing import Any

# It scrapes /metrics four times a call for drafts and denoising steps, which would count as processor time of the
# requests. Nothing listens here (port "discard"), and it takes a refused connection as "no metrics".
_NO_METRICS = "http://127.0.0.1:9"


class Engine:
    """Send the prompts of a round.

    The only request is "call": ``url`` (of the server), ``model``, ``prompts`` (lists of token ids), ``output_tokens``
    and ``concurrency``. The answer has a list a figure, with an entry a request.
    """

    def call(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send all prompts, at most ``concurrency`` at once, and return their times.

        Raises:
            RuntimeError: a request failed, or brought another number of tokens than was asked for.
        """
        from vllm.benchmarks.serve import benchmark

        prompts, output_tokens = request["prompts"], request["output_tokens"]
        lengths = [len(prompt) for prompt in prompts]
        result = asyncio.run(benchmark(**benchmark_arguments(request)))
        errors = [error for error in result["errors"] if error]
        if errors:
            raise RuntimeError(errors[0].strip().splitlines()[-1])
        expected = (lengths, [output_tokens] * len(prompts))
        if (got := (result["input_lens"], result["output_lens"])) != expected:
            raise RuntimeError(f"tokens of prompts and outputs: expected {expected}, got {got}")
        return {
            "seconds": result["duration"],
            "ttft_s": result["ttfts"],
            "latency_s": result["latencies"],
        }


def benchmark_arguments(request: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of ``vllm.benchmarks.serve.benchmark`` (vLLM 0.32) for a request."""
    from vllm.benchmarks.datasets import SampleRequest
    from vllm.benchmarks.serve import TaskType

    return {
        "task_type": TaskType.GENERATION,
        "endpoint_type": "openai",
        "api_url": f"{request['url']}/v1/completions",
        "base_url": _NO_METRICS,
        "model_id": request["model"],
        "model_name": request["model"],
        "tokenizer": None,
        "input_requests": [
            SampleRequest(prompt=prompt, prompt_len=len(prompt), expected_output_len=request["output_tokens"])
            for prompt in request["prompts"]
        ],
        "logprobs": None,
        "request_rate": float("inf"),
        "burstiness": 1.0,
        "disable_tqdm": True,
        "num_warmups": 0,
        "profile": False,
        "selected_percentile_metrics": [],
        "selected_percentiles": [50.0],
        "ignore_eos": True,
        "goodput_config_dict": {},
        "max_concurrency": request["concurrency"],
        "lora_modules": None,
        "extra_headers": None,
        "extra_body": {"temperature": 0.0},
        "ready_check_timeout_sec": 0,
    }
