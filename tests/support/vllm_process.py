"""Start an engine in processes of its own, as a user does: ``python vllm_process.py MODEL OPTIONS COUNT IDS``.

OPTIONS are further arguments of ``vllm.LLM``, a JSON object. Prints the modules of pop_ext that were loaded, then,
as JSON, tokens and log-probabilities of COUNT tokens after the prompt IDS, a JSON list.
"""

from __future__ import annotations

import json
import os
import sys


def main(model: str, options: str, count: str, ids: str) -> None:
    more = json.loads(options)
    ranks = more.get("tensor_parallel_size", 1) * more.get("pipeline_parallel_size", 1)
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(map(str, sorted(os.sched_getaffinity(0))[:ranks]))
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM, SamplingParams

    arguments = dict(
        dtype="float32",
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=128,
        block_size=32,
        max_logprobs=-1,
        kv_cache_memory_bytes=16 << 20,
        enable_prefix_caching=False,
    )
    llm = LLM(model, **{**arguments, **more})
    logprobs = None if "speculative_config" in more else -1
    parameters = SamplingParams(
        max_tokens=int(count), temperature=0.0, logprobs=logprobs, detokenize=False, ignore_eos=True
    )
    [output] = llm.generate({"prompt_token_ids": json.loads(ids)}, parameters, use_tqdm=False)
    [found] = output.outputs
    table = [[step[token].logprob for token in range(len(step))] for step in found.logprobs or ()]
    print([name for name in sys.modules if name.startswith("pop_ext")])
    print("\n" + json.dumps({"tokens": list(found.token_ids), "log_probs": table}))


if __name__ == "__main__":  # vLLM imports this file again in its processes
    main(*sys.argv[1:])
