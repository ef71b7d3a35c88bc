"""Start an engine in processes of its own, as a user does: ``python tests/support/vllm_ranks.py MODEL PLAN RANKS``.

Prints the log-probabilities of the first token after the prompt 0, 7, 14, ..., as JSON.
"""

from __future__ import annotations

import json
import os
import sys


def main(model: str, plan: str, ranks: str) -> None:
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(map(str, sorted(os.sched_getaffinity(0))[: int(ranks)]))
    os.environ.update(VLLM_NO_USAGE_STATS="1", VLLM_LOGGING_LEVEL="ERROR")
    import pop_ext.vllm
    from vllm import LLM, SamplingParams

    arguments = dict(
        dtype="float32",
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=128,
        block_size=32,
        max_logprobs=-1,
        kv_cache_memory_bytes=16 << 20,
        tensor_parallel_size=int(ranks),
    )
    llm = LLM(model, **arguments, **pop_ext.vllm.engine_arguments(model, plan))
    parameters = SamplingParams(max_tokens=1, temperature=0.0, logprobs=-1, detokenize=False)
    [output] = llm.generate({"prompt_token_ids": [i * 7 % 263 for i in range(61)]}, parameters, use_tqdm=False)
    found = output.outputs[0].logprobs[0]
    print("\n" + json.dumps([found[token].logprob for token in range(len(found))]))


if __name__ == "__main__":  # vLLM imports this file again in its processes
    main(*sys.argv[1:])
