"""bench/serve.py measures two servers alike: the same prompts, and the processor time of all their processes."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from pop_ext import Plan, _core
from tiny_llama import SIZES as TINY

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from bench import plot, serve  # noqa: E402
from bench.serving import rounds, server  # noqa: E402
from bench.serving.ceilings import Ceilings, Request, ceilings, flops, prefill_work  # noqa: E402
from bench.serving.figures import Cell, Round, cell_json, percentile  # noqa: E402
from bench.serving.models import served_model, spec_of  # noqa: E402
from bench.serving.server import flags, process_tree, processor_seconds  # noqa: E402
from bench.serving.texts import cells_text  # noqa: E402

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc, on Linux")

SIZES = TINY | {"num_hidden_layers": 6, "max_position_embeddings": 512}


@pytest.fixture
def python(tmp_path):
    """An interpreter in whose environment the made-up vLLM is installed."""
    fake = ROOT / "tests" / "support" / "fake_vllm"
    site = tmp_path / "site"
    (site / "vllm-9.9.dist-info").mkdir(parents=True)
    (site / "vllm-9.9.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 9.9\n")
    (site / "vllm").symlink_to(fake / "vllm")
    path = tmp_path / "python"
    path.write_text(f'#!/bin/sh\nexport PYTHONPATH="$PYTHONPATH:{site}"\nexec {shlex.quote(sys.executable)} "$@"\n')
    path.chmod(0o755)
    return path


def run(folder, python, *more):
    """Run the script on the tiny shape; return its exit status and its report (None if there is none)."""
    path = folder / "report.json"
    options = ["--model", str(folder / "tiny"), "--tokens", "40", "80", "--concurrency", "2", "--output-tokens", "3"]
    options += ["--rounds", "2", "--dtype", "float32", "--threads", "1", "--no-roofline", "--quiet"]
    options += ["--timeout", "60", "--python", str(python), "--folder", str(folder / "work"), "--json", str(path)]
    code = serve.main([*options, *more])
    return code, json.loads(path.read_text()) if path.exists() else None


def test_both_servers_get_the_same_load_and_their_processor_time_is_counted(folder, python, capsys):
    code, report = run(folder, python, "--plot", str(folder / "figure.png"))
    printed = capsys.readouterr()
    assert code == 0, printed
    serving = report["serving"]
    assert (serving["weights"], serving["versions"]["vllm"]) == ("dummy", "9.9")
    assert serving["plan"]["omit"] == [4, 5]
    plain, pop = serving["servers"]["plain"], serving["servers"]["pop"]
    assert pop[: len(plain)] == plain, "the servers must differ by the plan alone"
    assert plain[:2] == ["--model", str(folder / "tiny")]
    assert [(cell["tokens"], cell["concurrency"]) for cell in serving["cells"]] == [(40, 2), (80, 2)]
    for cell in serving["cells"]:
        assert cell["failed"] is None
        for arm, share in (("plain", 1.0), ("pop", 0.5)):
            figures = cell["arms"][arm]
            assert [len(one["ttft_s"]) for one in figures["rounds"]] == [4, 4]
            # The made-up engine burns three milliseconds a token, in a process below the server.
            burnt = share * 3e-3 * cell["tokens"]
            assert burnt - 0.01 <= figures["processor_s"]["min"] <= burnt + 0.1
            assert figures["tpot_s"]["median"] > 0  # a busy client sees several tokens at once
        ratio = cell["ratios"]["processor_s"]
        assert 1.2 < ratio["median"] < 2.6
        assert ratio["share_of_ceiling"] == pytest.approx(ratio["median"] / ratio["ceiling"])
        assert ratio["ceiling"] == cell["ceilings"]["flops"]["request"] < cell["ceilings"]["flops"]["prefill"]
        assert cell["ratios"]["ttft_s"]["ceiling"] == cell["ceilings"]["flops"]["prefill"]
    assert "pop 2/6 without layers 4-5" in printed.out
    assert (folder / "figure.png").stat().st_size > 0
    assert list(plot.serving_panels([report])[f"{folder / 'tiny'} served, time to first token"]) == ["2 at once"]


def test_a_server_that_dies_fails_the_cell_and_shows_in_the_status(folder, python, capsys):
    code, report = run(folder, python, "--engine-args=--fake-crash-after 13")
    assert code == 1
    first, second = report["serving"]["cells"]
    assert first["failed"] is not None or second["failed"] is not None
    assert "failed: 2 x 80 -> 3" in capsys.readouterr().out


def test_a_server_that_does_not_start_is_reported_with_its_last_error(folder, python, capsys):
    code, report = run(folder, python, "--engine-args=--no-such-argument")
    assert (code, report) == (1, None)
    assert "error: plain: it ended with code 2; log " in capsys.readouterr().err


def test_an_environment_without_vllm_is_refused(folder, capsys):
    code, report = run(folder, sys.executable)
    if code == 0 or "expected an environment with vLLM" not in capsys.readouterr().err:
        pytest.skip("vLLM is installed here")
    assert (code, report) == (1, None)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--tokens", "1"], "--tokens: expected at least 2, got 1"),
        (["--concurrency", "1", "0"], "--concurrency: expected at least 1, got 0"),
        (["--max-batched-tokens", "0"], "--max-batched-tokens: expected at least 1, got 0"),
        (["--threads", "100000"], "--threads: expected at least 1 and at most"),
        (["--python", "/no/such/python"], "--python: expected an interpreter, got /no/such/python"),
    ],
)
def test_bad_arguments_are_named(arguments, text, capsys):
    assert serve.main(arguments) == 2
    assert text in capsys.readouterr().err


def test_arguments_of_an_engine_become_flags():
    given = {
        "hf_overrides": {"architectures": ["A"]},
        "additional_config": {"pop_ext": {"plan": "third"}},
        "enable_prefix_caching": False,
        "enforce_eager": True,
        "quantization": None,
        "max_num_seqs": 4,
        "middleware": ["a", "b"],
    }
    assert flags(given) == [
        *("--hf-overrides", '{"architectures": ["A"]}'),
        *("--additional-config", '{"pop_ext": {"plan": "third"}}'),
        "--no-enable-prefix-caching",
        "--enforce-eager",
        *("--max-num-seqs", "4"),
        *("--middleware", "a", "b"),
    ]


def test_processor_time_includes_children_that_run_and_that_ended():
    burn = "import time\nend = time.process_time() + 0.3\nwhile time.process_time() < end: pass\n"
    code = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {burn!r}])\n"
    code += f"child = subprocess.Popen([sys.executable, '-c', {burn!r} + 'print(1, flush=True)\\ninput()'])\n"
    code += "print(2, flush=True)\nchild.wait()\n"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as process:
        lines = {process.stdout.readline() for _ in range(2)}
        assert lines == {"1\n", "2\n"}
        assert len(process_tree(process.pid)) == 2
        assert 0.6 <= processor_seconds(process.pid) + 0.02 < 2.0
        process.communicate("\n")
    assert processor_seconds(process.pid) == 0.0


def test_a_server_is_stopped_and_ended_with_all_its_processes(tmp_path):
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\nsleep 100 &\nwait\n")
    script.chmod(0o755)
    found = server.Server("any", script, [], os.environ, tmp_path / "log.txt")
    deadline = time.monotonic() + 10
    while len(tree := process_tree(found._process.pid)) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)

    def states():
        return {(server._stat(pid) or "-")[0] for pid in tree}

    found.pause()
    while states() != {"T"}:
        assert time.monotonic() < deadline, states()
        time.sleep(0.01)
    found.close(patience=5.0)
    while states() - {"-", "Z"}:
        assert time.monotonic() < deadline, states()
        time.sleep(0.01)


def test_an_engine_that_outlives_its_server_is_ended(tmp_path):
    script = tmp_path / "python"
    script.write_text(f"#!/bin/sh\nsleep 100 &\necho $! > {tmp_path}/pid\n")
    script.chmod(0o755)
    found = server.Server("any", script, [], os.environ, tmp_path / "log.txt")
    with pytest.raises(server.ServerError, match="any: it ended with code 0"):
        found.wait(10)
    pid = int((tmp_path / "pid").read_text())
    assert (server._stat(pid) or "-")[0] not in "-Z"
    found.close()
    deadline = time.monotonic() + 10
    while (server._stat(pid) or "-")[0] not in "-Z":
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_prompts_are_shared_by_the_arms_and_never_repeat():
    load = rounds.Load([64], [1, 16], 1, 2, None, 0)
    requests = [Request(64, 1, 64, concurrency) for concurrency in (1, 16)]
    drawn = [load.prompts(request, number, 263) for request in requests for number in range(3)]
    assert drawn == [load.prompts(request, number, 263) for request in requests for number in range(3)]
    every = [tuple(prompt) for prompts in drawn for prompt in prompts]
    assert len(every) == len(set(every)) == 3 * (4 + 16)
    assert {len(prompt) for prompt in every} == {64}
    assert 0 <= min(map(min, every)) <= max(map(max, every)) == 262
    assert rounds.Load([64], [1], 1, 2, None, 1).prompts(requests[0], 0, 263) != drawn[0]


def test_the_order_of_the_arms_alternates():
    class Servers:
        sent: list = []  # noqa: RUF012

        def send(self, arm, request, prompts):
            self.sent.append(arm)
            return Round(1.0, 1.0, 64, 1, [0.1], [0.1])

    cell = Cell(Request(64, 1, 64), {})
    rounds.run_cell(Servers(), rounds.Load([64], [1], 1, 3, None, 0), cell, 263)
    assert Servers.sent == ["plain", "pop", "pop", "plain"] * 2
    assert {arm: len(found) for arm, found in cell.rounds.items()} == {"plain": 3, "pop": 3}


def test_percentiles_interpolate():
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile([1.0, 2.0], 0.5) == 1.5
    assert percentile(list(map(float, range(101))), 0.99) == 99.0
    assert percentile([5.0], 0.99) == 5.0


def cell_of(plain, pop, **more):
    """Return a cell of rounds (seconds, processor seconds, times to first token, latencies)."""
    found = Cell(Request(100, 5, 2048, 2), {"flops": Ceilings(2.0, 1.6)}, **more)
    for arm, given in (("plain", plain), ("pop", pop)):
        found.rounds[arm] = [Round(seconds, busy, 100, 5, first, last) for seconds, busy, first, last in given]
    return found


def test_figures_of_a_cell_are_by_request_and_paired_by_round():
    plain = [(2.0, 6.0, [0.5, 0.7], [0.9, 1.1]), (4.0, 12.0, [1.0, 1.4], [1.8, 2.2])]
    pop = [(1.0, 4.0, [0.3, 0.5], [0.7, 0.9]), (4.0, 6.0, [0.8, 1.2], [1.6, 2.0])]
    cell = cell_of(plain, pop)
    assert cell.samples("plain", "processor_s") == [3.0, 6.0]
    assert cell.samples("plain", "requests_per_s") == [1.0, 0.5]
    assert cell.samples("plain", "prompt_tokens_per_s") == [100.0, 50.0]
    assert cell.samples("plain", "tpot_s") == pytest.approx([0.1, 0.2])
    assert cell.ratio("processor_s").rounds == [1.5, 2.0]
    assert cell.ratio("processor_s").median == 1.75
    assert cell.ratio("requests_per_s").rounds == [2.0, 1.0]
    assert cell.ratio("ttft_s").rounds == pytest.approx([1.5, 1.2])
    assert (cell.ceiling("processor_s"), cell.ceiling("ttft_s"), cell.ceiling("tpot_s")) == (1.6, 2.0, None)
    assert cell.share("processor_s") == 1.75 / 1.6
    assert cell.share("processor_s", "roofline") is None
    assert cell.ttft_percentile("plain", 0.5) == pytest.approx(0.85)
    facts = json.loads(json.dumps(cell_json(cell)))
    assert facts["arms"]["pop"]["rounds"][1]["latency_s"] == [1.6, 2.0]
    assert facts["ratios"]["requests_per_s"]["share_of_ceiling"] == 1.5 / 1.6
    text = cells_text([cell])
    assert "2 x 100 -> 5" in text
    assert "1.750x" in text
    assert "109.4 %" in text


def test_one_output_token_has_no_time_per_token():
    one = Round(1.0, 1.0, 100, 1, [0.5], [0.5])
    assert "tpot_s" not in one.figures()


def test_a_failed_cell_is_printed_with_its_reason():
    text = cells_text([cell_of([], [], failed="it ended with code 3")])
    assert [line.split() for line in text.splitlines()].count(["2", "x", "100", "->", "5", "failed"]) == 3
    assert text.endswith("failed: 2 x 100 -> 5: it ended with code 3")


@pytest.fixture(scope="module")
def spec():
    from transformers import LlamaConfig

    sizes = {name: value for name, value in SIZES.items() if name not in ("model_type", "architectures")}
    return spec_of(LlamaConfig(**sizes), torch.float32)


def test_ceilings_count_the_chunks_and_the_decoding(spec):
    plan = Plan.last(6, 2)
    shape = _core.SequenceShape(200)
    alone = _core.stock_cost(spec, [shape])["flops"] / _core.plan_cost(spec, plan, [shape])["flops"]
    whole = ceilings(spec, plan, Request(200, 1, 2048), flops)
    assert whole.prefill == whole.request == pytest.approx(alone)
    chunked = ceilings(spec, plan, Request(200, 1, 64), flops)
    assert 1 < chunked.prefill < whole.prefill, "each chunk has boundary rows of its own"
    steps = sum(_core.stock_cost(spec, [_core.SequenceShape(1, past=200 + n)])["flops"] for n in range(7))
    longer = ceilings(spec, plan, Request(200, 8, 2048), flops)
    full, pruned = (prefill_work(spec, one, Request(200, 8, 2048), flops) for one in (None, plan))
    assert longer.prefill == whole.prefill
    assert longer.request == pytest.approx((full + steps) / (pruned + steps))
    short = Request(64, 1, 2048)
    at_full_depth = ceilings(spec, Plan.last(6, 0), short, flops).prefill  # above 1: rows of the last layer
    assert ceilings(spec, plan.replace(min_tokens=65), short, flops).prefill == pytest.approx(at_full_depth)
    assert ceilings(spec, plan.replace(min_tokens=64), short, flops).prefill > 1.1 * at_full_depth


def test_a_shape_is_served_with_dummy_weights_and_without_tokenizer(tmp_path):
    model = served_model(None, "llama-3.2-1b", torch.bfloat16, tmp_path)
    written = json.loads((tmp_path / "llama-3.2-1b" / "config.json").read_text())
    assert written["architectures"] == ["LlamaForCausalLM"]
    assert model.arguments == {"load_format": "dummy", "skip_tokenizer_init": True}
    assert (model.spec.num_layers, model.spec.dtype) == (16, "bfloat16")
