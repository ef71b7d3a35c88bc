"""Engines in processes of their own, which find the plugin by its entry point: ranks, two engines, an HTTP server."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from importlib.metadata import entry_points
from pathlib import Path

import models
import pop_ext
import pytest
import torch
from pop_ext import reference
from tolerance import assert_close_fp32
from vllm_engine import GAPS, byte_tokenizer, turns

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None or not entry_points(group="vllm.general_plugins", name="pop_ext"),
        reason="needs vllm (make vllm)",
    ),
]
SUPPORT = Path(__file__).parents[1] / "support"
IDS = torch.arange(61) * 7 % 263
OWN_PROCESSES = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}  # vllm_engine sets 0 for engines in this process


def section(plan, folder) -> dict:
    plan.save(folder / "plan.json")
    return {"pop_ext": {"plan": str(folder / "plan.json")}}


def run_engine(folder: Path, count: int = 1, ids=IDS, environment: dict[str, str] | None = None, **options):
    """Run ``vllm_process.py``; return its tokens, its log-probabilities ``[count, vocab]``, and what it logged."""
    command = [
        sys.executable,
        SUPPORT / "vllm_process.py",
        folder,
        json.dumps(options),
        str(count),
        json.dumps(ids.tolist()),
    ]
    run = subprocess.run(
        command, capture_output=True, text=True, timeout=500, env={**os.environ, **OWN_PROCESSES, **(environment or {})}
    )
    assert run.returncode == 0, (run.stdout + run.stderr)[-20000:]
    found = json.loads(next(line for line in run.stdout.splitlines() if line.startswith('{"tokens"')))
    return found["tokens"], torch.tensor(found["log_probs"]), run.stdout + run.stderr


RANKS = {
    "heads": {"tensor_parallel_size": 2},
    # vLLM's CPU build makes what ranks of a pipeline receive in a warm-up, which only compiled engines have.
    "layers": {"pipeline_parallel_size": 2, "enforce_eager": False, "compilation_config": {"backend": "eager"}},
}


@pytest.mark.parametrize("ranks", RANKS)
def test_each_of_two_ranks_prunes_its_part(ranks, tmp_path):
    """Each rank takes its heads of the fit, or its layers; the second run of layers crosses the ranks of a pipeline."""
    model, plan = models.shared("llama"), pop_ext.Plan(6, omit=[1, 2, 3, 4])
    ids = [torch.randint(263, (1, 60), generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    plan = pop_ext.fit(model, plan, ids, lambdas=[0.1])
    model.save_pretrained(tmp_path / "model")
    tokens, found, _ = run_engine(
        tmp_path / "model",
        4,
        additional_config=section(plan, tmp_path),
        distributed_executor_backend="mp",
        **RANKS[ranks],
    )
    want, table, _ = turns(model, plan, [IDS], 4)
    assert_close_fp32(found, table, "log-probabilities")
    assert tokens == want


def test_drafts_from_the_prompt_change_no_token(tmp_path):
    model, plan = models.shared("llama"), GAPS.replace(boundary=4)
    model.save_pretrained(tmp_path / "model")
    ids = torch.randint(263, (12,), generator=torch.Generator().manual_seed(0)).repeat(
        5
    )  # so there are drafts to verify
    drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4, "prompt_lookup_min": 1}
    tokens, _, _ = run_engine(
        tmp_path / "model", 20, ids, additional_config=section(plan, tmp_path), speculative_config=drafts
    )
    assert tokens == turns(model, plan, [ids], 20)[0]


def test_an_engine_that_prefills_hands_its_cache_to_one_that_decodes(tmp_path):
    """The second engine is plain vLLM: it takes whole blocks of K and V, and computes the rest at full depth."""
    model, shared = models.shared("llama"), tmp_path / "shared"
    model.save_pretrained(tmp_path / "model")
    connector = {
        "kv_connector": "ExampleConnector",
        "kv_connector_extra_config": {"shared_storage_path": str(shared)},
    }
    producer, consumer = ({**connector, "kv_role": role} for role in ("kv_producer", "kv_consumer"))
    run_engine(tmp_path / "model", kv_transfer_config=producer, additional_config=section(GAPS, tmp_path))
    assert len(list(shared.rglob("*.safetensors"))) == 6, "K and V of all layers"
    tokens, found, _ = run_engine(tmp_path / "model", 4, kv_transfer_config=consumer)
    _, cache = reference.prefill(model, IDS[None], GAPS)
    cache.crop(32)  # one block of context rows
    want, table = [], []
    ids = IDS[None, 32:]
    for _ in range(4):
        with torch.no_grad():
            logits = model(ids, past_key_values=cache).logits
        table.append(logits[0, -1].float().log_softmax(-1))
        want.append(int(table[-1].argmax()))
        ids = torch.tensor([want[-1:]])
    assert_close_fp32(found, torch.stack(table), "log-probabilities")
    assert tokens == want


def test_an_engine_without_a_plan_is_plain(tmp_path):
    """Its outputs are equal bit by bit, and its log has the same lines, but for what every run has of its own."""
    models.shared("llama").save_pretrained(tmp_path / "model")

    def run(plugins: str):
        # In one process: several log their ends in any order, or not at all.
        names = {"VLLM_PLUGINS": plugins, "VLLM_LOGGING_LEVEL": "INFO", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        return run_engine(tmp_path / "model", 4, environment=names)

    (_, plain, log), (_, found, with_plugin) = run("lora_filesystem_resolver"), run("pop_ext,lora_filesystem_resolver")
    assert "'pop_ext.vllm'" not in log
    assert "'pop_ext.vllm'" in with_plugin
    assert torch.equal(plain, found)
    lines = [
        sorted({re.sub(r"[0-9.:/_a-f-]+", "#", line) for line in text.splitlines() if not line.startswith(("[", "{"))})
        for text in (log, with_plugin)
    ]
    assert lines[0] == lines[1]


@contextlib.contextmanager
def server(folder: Path, environment: dict[str, str], *options: str):
    """Start vLLM's OpenAI-compatible server on a model; yield a function that requests a path, and the log's path."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = folder.parent / "server.log"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--port", str(port)]
    command += ["--served-model-name", "tiny", "--dtype", "float32", "--enforce-eager", "--max-model-len", "128"]
    command += ["--block-size", "32", "--no-enable-prefix-caching", *options]
    settings = {
        **OWN_PROCESSES,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "INFO",
        **environment,
    }

    def ask(path: str, body: dict | None = None):
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers={"Content-Type": "application/json"})
        data = None if body is None else json.dumps({"model": "tiny", **body}).encode()
        return urllib.request.urlopen(request, data, timeout=100)

    with log.open("w") as output:
        running = subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, **settings})
    try:
        for _ in range(240):
            assert running.poll() is None, log.read_text()[-3000:]
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                ask("/health")
                break
            time.sleep(1)
        yield ask, log
    finally:
        running.terminate()
        running.wait(60)


def test_a_server_streams_counts_and_refuses(tmp_path):
    model, counters = models.shared("llama"), tmp_path / "counters"
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    counters.mkdir()
    want, _, _ = turns(model, GAPS, [IDS], 6)
    body = {"prompt": IDS.tolist(), "max_tokens": 6, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    plan = json.dumps(section(GAPS, tmp_path))
    with server(tmp_path / "model", {"PROMETHEUS_MULTIPROC_DIR": str(counters)}, "--additional-config", plan) as (
        ask,
        log,
    ):
        events = [line for line in ask("/v1/completions", {**body, "stream": True}) if line.startswith(b"data: {")]
        parts = [json.loads(line[6:])["choices"][0] for line in events]
        assert [token for part in parts for token in part["token_ids"] or []] == want
        assert len(parts) > 1

        with pytest.raises(urllib.error.HTTPError) as refused:
            ask("/v1/completions", {**body, "prompt_logprobs": 1})
        assert refused.value.code == 400
        assert "prompt_logprobs: expected None with pruned prefills" in refused.value.read().decode()

        stream = ask("/v1/completions", {**body, "stream": True, "max_tokens": 60})
        stream.readline()
        stream.close()  # the client leaves

        choice = json.load(ask("/v1/completions", body))["choices"][0]
        assert choice["token_ids"] == want

        metrics = ask("/metrics").read().decode()
        found = {
            name: float(value) for name, value in re.findall(r"^(pop_ext_\w+)(?:{.*})? ([0-9.e+]+)$", metrics, re.M)
        }
        assert found["pop_ext_pruned_steps_total"] == 3
        assert found["pop_ext_context_rows_total"] == 3 * 60
        assert found["pop_ext_boundary_rows_total"] == 3
        assert "omit 3 of 6 layers (1, 3-4)" in log.read_text()
