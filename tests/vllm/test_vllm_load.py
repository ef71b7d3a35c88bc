"""vLLM's load generator, as bench/serve.py calls it, against a server whose times are known."""

from __future__ import annotations

import importlib.util
import inspect
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from bench.serving.load import Engine, benchmark_arguments  # noqa: E402
from bench.serving.server import free_port  # noqa: E402

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vllm (make vllm)"),
]


@pytest.fixture
def url():
    """A server of tests/support/fake_vllm, which burns 3 ms a token of the prompt and writes a token each 10 ms."""
    port = free_port()
    fake = ROOT / "tests" / "support" / "fake_vllm"
    script = fake / "vllm" / "entrypoints" / "openai" / "api_server.py"
    environment = os.environ | {"VLLM_PLUGINS": "", "PYTHONPATH": str(fake)}
    command = [sys.executable, "-S", str(script), "--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen([*command, "--no-enable-prefix-caching"], env=environment)
    found = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(f"{found}/health", timeout=5).close()
            break
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    yield found
    process.terminate()
    process.wait()


def request(url, prompts):
    return {"url": url, "model": "model", "prompts": prompts, "output_tokens": 4, "concurrency": 2}


def test_times_are_those_of_the_server(url):
    prompts = [[number] * 50 for number in range(3)]
    answer = Engine().call(request(url, prompts))
    assert [len(answer[name]) for name in ("ttft_s", "latency_s")] == [3, 3]
    for first, last in zip(answer["ttft_s"], answer["latency_s"], strict=True):
        assert first >= 0.15
        assert last - first >= 0.03
    assert answer["seconds"] >= 3 * 0.15


def test_a_refused_request_is_an_error(url):
    with pytest.raises(RuntimeError, match="a prompt came twice"):
        Engine().call(request(url, [[1] * 20, [1] * 20]))


def test_the_made_up_generator_is_called_like_this_one():
    from vllm.benchmarks.serve import benchmark

    inspect.signature(benchmark).bind(**benchmark_arguments(request("http://127.0.0.1:1", [[1, 2]])))
