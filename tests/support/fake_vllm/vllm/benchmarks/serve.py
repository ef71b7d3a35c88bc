"""vLLM's load generator in small: the same call and the same members of the result, as far as bench/serve.py uses them.

tests/vllm/test_vllm_load.py compares it with the real one.
"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from enum import Enum


class TaskType(Enum):
    GENERATION = "generation"


async def benchmark(
    task_type,
    endpoint_type,
    api_url,
    base_url,
    model_id,
    model_name,
    tokenizer,
    input_requests,
    logprobs,
    request_rate,
    burstiness,
    disable_tqdm,
    num_warmups,
    profile,
    selected_percentile_metrics,
    selected_percentiles,
    ignore_eos,
    goodput_config_dict,
    max_concurrency,
    lora_modules,
    extra_headers,
    extra_body,
    ready_check_timeout_sec=600,
):
    def send(item):
        body = {"model": model_id, "prompt": item.prompt, "max_tokens": item.expected_output_len, "stream": True}
        body |= {"ignore_eos": ignore_eos, **extra_body}
        headers = {"content-type": "application/json"}
        request = urllib.request.Request(api_url, json.dumps(body).encode(), headers)
        begin, times, usage = time.perf_counter(), [], {}
        try:
            with urllib.request.urlopen(request) as response:
                for line in response:
                    if line.startswith(b"data: "):
                        data = json.loads(line.removeprefix(b"data: "))
                        times += [time.perf_counter() - begin] if data["choices"] else []
                        usage = data.get("usage", usage)
        except OSError as error:
            return 0.0, 0.0, 0, 0, str(error)
        return times[0], times[-1], usage["prompt_tokens"], usage["completion_tokens"], ""

    begin = time.perf_counter()
    with ThreadPoolExecutor(max_concurrency) as pool:
        columns = list(zip(*pool.map(send, input_requests), strict=True))
    found = dict(zip(("ttfts", "latencies", "input_lens", "output_lens", "errors"), map(list, columns), strict=True))
    return found | {"duration": time.perf_counter() - begin}
