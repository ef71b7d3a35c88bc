"""bench/capacity.py follows the cost model, and says that nothing in it was measured."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path

import pytest
from pop_ext import Plan, _core

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from bench import capacity as bench  # noqa: E402
from bench.capacity import Gpu, Service, capacity, engine_of, weight_bytes  # noqa: E402

PAGE = ROOT / "docs" / "serving-capacity.md"
# A GPU without a limit of memory: time is FLOPs by this rate.
ENDLESS = Gpu(tflops=1000.0, tbytes_per_s=1e9, compute_efficiency=0.5)


@pytest.fixture(scope="module")
def small():
    return engine_of("llama-3.1-8b", Gpu())


def test_an_engine_has_the_gpus_that_hold_it(small):
    assert (small.gpus, len(small.plan.omit)) == (1, 10)
    assert weight_bytes(small.spec) == pytest.approx(2 * 8.03e9, rel=0.01)
    large = engine_of("llama-3.1-70b", Gpu())
    assert (large.gpus, len(large.plan.omit)) == (4, 26)
    assert weight_bytes(large.spec) == pytest.approx(2 * 70.6e9, rel=0.01)


def test_a_prefill_takes_its_flops_by_the_rate_that_is_reached(small):
    found = capacity(small, ENDLESS, Service(), 4096, 1)
    shape = _core.SequenceShape(4096)
    full = _core.stock_cost(small.spec, [shape])["flops"]
    pruned = _core.plan_cost(small.spec, small.plan, [shape])["flops"]
    assert found.prefill_s == pytest.approx(full / 5e14)
    assert found.pop_prefill_s == pytest.approx(pruned / 5e14)
    assert (found.decode_s, found.decode) == (0.0, 0)
    assert found.request_ratio == found.prefill_ratio == pytest.approx(full / pruned)


def test_decoding_takes_its_bytes_by_the_bandwidth_that_is_reached(small):
    # Of products without end, so that every stage takes its bytes.
    gpu = Gpu(tflops=1e9, memory_efficiency=0.5)
    found = capacity(small, gpu, Service(decode_batch=8), 1000, 102)
    step = _core.stock_cost(small.spec, [_core.SequenceShape(1, past=1050)] * 8)["bytes"]
    assert found.decode_s == pytest.approx(101 * step / 8 / (0.5 * 3.35e12))
    each = [_core.stock_cost(small.spec, [_core.SequenceShape(1, past=1000 + n)] * 8)["bytes"] for n in range(101)]
    assert found.decode_s == pytest.approx(sum(each) / 8 / (0.5 * 3.35e12)), "one step must stand for all"


def test_gpus_are_whole_engines_with_headroom(small):
    service = Service(rate=100.0, utilisation=0.5)
    found = capacity(small, Gpu(), service, 2048, 128)
    busy = {name: getattr(found, name) * 200 for name in ("prefill_s", "pop_prefill_s", "decode_s")}
    assert found.prefill == math.ceil(busy["prefill_s"])
    assert found.prefill_pop == math.ceil(busy["pop_prefill_s"]) < found.prefill
    assert found.decode == math.ceil(busy["decode_s"])
    assert found.shared == math.ceil(busy["prefill_s"] + busy["decode_s"])
    assert found.shared_pop == math.ceil(busy["pop_prefill_s"] + busy["decode_s"]) < found.shared
    assert found.prefill_share == pytest.approx(busy["prefill_s"] / (busy["prefill_s"] + busy["decode_s"]))
    two = capacity(dataclasses.replace(small, gpus=4), Gpu(), service, 2048, 128)
    assert two.prefill_s == pytest.approx(found.prefill_s / 4)
    assert two.prefill % 4 == two.shared % 4 == 0


def test_the_longest_output_still_saves_a_tenth(small):
    longest = capacity(small, Gpu(), Service(), 2048, 1).longest_output
    work = {n: capacity(small, Gpu(), Service(), 2048, longest + n) for n in (0, 1)}
    saved = {n: 1 - 1 / found.request_ratio for n, found in work.items()}
    assert saved[1] < 0.1 <= saved[0]
    none = dataclasses.replace(small, plan=Plan.last(32, 0))
    assert capacity(none, ENDLESS, Service(), 2048, 1).longest_output == 0


def test_requests_that_decode_together_fit_into_memory(small):
    assert capacity(small, Gpu(), Service(), 512, 16).decode_batch == 64
    free = 0.9 * 80e9 - weight_bytes(small.spec)
    position = 2 * 2 * 32 * 1024
    found = capacity(small, Gpu(), Service(), 20000, 480).decode_batch
    assert found == int(free / (position * 20480)) < 64
    with pytest.raises(ValueError, match="K and V that fit beside the weights of llama-3.1-8b, got 600016"):
        capacity(small, Gpu(), Service(), 600000, 16)


def test_short_prompts_and_a_plugin_below_the_ceiling_save_less(small):
    whole = capacity(small, Gpu(), Service(), 2048, 1)
    reached = capacity(small, Gpu(), Service(share_of_ceiling=0.9), 2048, 1)
    assert reached.prefill_ratio == pytest.approx(0.9 * whole.prefill_ratio)
    assert capacity(small, Gpu(), Service(share_of_ceiling=0.1), 2048, 1).prefill_ratio == 1.0
    late = dataclasses.replace(small, plan=small.plan.replace(min_tokens=2049))
    assert capacity(late, Gpu(), Service(), 2048, 1).prefill_ratio < 1.05
    alone = capacity(small, Gpu(), Service(step_rows=256), 256, 1)
    assert alone.prefill_ratio < whole.prefill_ratio, "boundary rows read the weights of the omitted layers"
    slow = capacity(small, Gpu(compute_efficiency=0.3), Service(), 2048, 1)
    assert slow.prefill_ratio == pytest.approx(whole.prefill_ratio, rel=0.02), "as the page says"


def test_the_page_has_the_tables_of_the_command_that_it_names(capsys):
    command = "python bench/capacity.py --tokens 512 2048 8192 --markdown"
    page = PAGE.read_text()
    assert command in page
    assert bench.main(command.split()[2:]) == 0
    assert capsys.readouterr().out.strip() in page


def test_every_form_says_that_nothing_was_measured(tmp_path, capsys):
    path = tmp_path / "capacity.json"
    options = ["--model", "llama-3.1-8b", "--tokens", "512", "--output-tokens", "16", "--json", str(path)]
    assert bench.main(options) == 0
    assert "not measured" in capsys.readouterr().out
    report = json.loads(path.read_text())
    assert report["measured"] is False
    assert "not measured" in report["note"]
    assert report["gpu"]["compute_efficiency"] == 0.6
    [request] = report["models"][0]["requests"]
    assert request["prefill_ratio"] == request["prefill_s"] / request["pop_prefill_s"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--tokens", "0"], "--tokens: expected integers from 1, got [0]"),
        (["--rate", "0"], "--rate: expected more than 0, got 0.0"),
        (["--compute-efficiency", "60"], "--compute-efficiency: expected a share in (0, 1], got 60.0"),
    ],
)
def test_bad_arguments_are_named(arguments, text, capsys):
    assert bench.main(arguments) == 2
    assert text in capsys.readouterr().err
