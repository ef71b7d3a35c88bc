"""bench/run.py prints and saves what it measured, and reports failures."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pop_ext
import pytest
import torch
from pop_ext import _core
from pop_ext.hf.weight_map import describe
from pop_ext.plans.plan import Plan
from pop_ext.utils.roofline import Peaks
from tiny_llama import SIZES as TINY

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from bench import cli, plot, report, run  # noqa: E402
from bench.arms import layers_text, make_arms, plan_flops, plan_name, stock_flops  # noqa: E402
from bench.cases import Case, Settings, run_case  # noqa: E402
from bench.kernel_table import measure_kernels  # noqa: E402
from bench.measure import Summary, Timed, interleave, paired_ratio  # noqa: E402
from bench.memory import measure_memory  # noqa: E402
from bench.profile import stage_sums  # noqa: E402
from bench.shapes import SHAPES, load_model  # noqa: E402

CPU = torch.device("cpu")
LAYERS = 6
SIZES = TINY | {"num_hidden_layers": LAYERS}
SETTINGS = Settings(repeats=2, warmup=1, quiet=True)


@pytest.fixture(scope="module")
def config_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    (path / "config.json").write_text(json.dumps(SIZES))
    return path


@pytest.fixture(scope="module")
def tiny(config_dir):
    return load_model(str(config_dir), torch.float32, CPU)


@pytest.fixture
def small_reference(monkeypatch):
    """Make the square product that defines the peak small enough for a test."""
    monkeypatch.setattr("bench.rates._SQUARE", {"cpu": 64})
    monkeypatch.setattr("bench.kernel_table.measure_bandwidth", lambda device: {"copy": 1e9, "read": 2e9})


class Ticks:
    """A clock that runs the call and returns given seconds."""

    def __init__(self, *seconds: float) -> None:
        self.seconds = list(seconds)

    def time(self, call) -> float:
        call()
        return self.seconds.pop(0)


def test_a_run_saves_every_sample_and_prints_every_arm(config_dir, tmp_path, capsys, small_reference):
    path = tmp_path / "report.json"
    options = ["--model", str(config_dir), "--lengths", "24", "--count", "2", "--boundary", "1", "4"]
    code = cli.main([*options, "--repeats", "3", "--kernels", "--quiet", "--json", str(path)])
    printed = capsys.readouterr().out
    assert code == 0, printed
    saved = json.loads(path.read_text())
    assert saved["schema"] == report.SCHEMA
    assert {"processor", "threads", "torch", "transformers", "pop_ext", "git_commit", "isa"} <= set(
        saved["environment"]
    )
    [case] = saved["cases"]
    names = ["hf-eager", "native-full", "pop 2/6", "pop 2/6 b4"]
    assert [arm["name"] for arm in case["arms"]] == names
    for arm in case["arms"]:
        assert arm["failed"] is None
        assert len(arm["samples_s"]) == 3
        assert arm["median_s"] == pytest.approx(sorted(arm["samples_s"])[1])
        assert arm["memory"]["kv_cache"] == 2 * LAYERS * 24 * 64 * 2  # K and V, layers, tokens, 2 heads of 32, bf16
        assert arm["name"] in printed
    assert all(gemm["flop_per_s"] > 0 for gemm in case["gemm"])
    assert case["gemm_peak_flop_per_s"] == max(gemm["flop_per_s"] for gemm in case["gemm"])
    assert "only 3 repeats (as asked for)" in printed
    [kernels] = saved["kernels"]
    rows = {row["name"]: row for row in kernels["rows"]}
    assert {"rms_norm", "attention", "torch sdpa", "kv_project, 2 layers", "boundary step, 2 layers"} <= set(rows)
    assert all(row["failed"] is None and row["median_s"] > 0 for row in rows.values())


def test_ceilings_come_from_the_cost_model(tiny, small_reference):
    plan = Plan(LAYERS, (3, 4, 5), boundary=2)
    spec = describe(tiny.model).spec
    case = run_case(tiny, spec, 2, 20, [plan], SETTINGS)
    shapes = [_core.SequenceShape(20, boundary=2, logits_to_keep=1)] * 2
    full_shapes = [_core.SequenceShape(20)] * 2
    stock = _core.stock_cost(spec, full_shapes)["flops"]
    full = _core.plan_cost(spec, Plan(LAYERS, ()), full_shapes)["flops"]
    pruned = _core.plan_cost(spec, plan, shapes)["flops"]
    ceilings = {(item.arm, item.baseline): item.ceiling for item in case.comparisons()}
    assert ceilings == {
        ("native-full", "hf-eager"): stock / full,
        ("pop 3/6 b2", "hf-eager"): stock / pruned,
        ("pop 3/6 b2", "native-full"): full / pruned,
    }
    peaks = Peaks(case.peak, case.bandwidth)
    calls = ((Plan(LAYERS, ()), full_shapes), (plan, shapes))
    least = [peaks.least_seconds(_core.plan_cost(spec, *call)) for call in calls]
    [found] = [item for item in case.comparisons() if (item.arm, item.baseline) == ("pop 3/6 b2", "native-full")]
    assert found.roofline == least[0] / least[1]
    assert found.share_of_roofline == found.speedup / found.roofline
    assert stock == stock_flops(spec, 2, 20)
    assert pruned == plan_flops(spec, plan, 2, 20)


@pytest.mark.parametrize("via", ["enable", "prefill"])
def test_native_arms_compute_what_the_stock_model_computes(tiny, via, small_reference):
    last = Plan(LAYERS, (LAYERS - 1,))
    case = run_case(tiny, describe(tiny.model).spec, 1, 33, [last], Settings(1, 1, via=via, quiet=True))
    errors = {arm.name: arm.error for arm in case.arms if arm.plan is not None}
    assert set(errors) == {"native-full", "pop 1/6"}
    assert max(errors.values()) < 1e-4
    assert "forward" not in vars(tiny.model), "the stock model must stay one"


def broken_arms(broken):
    """Return a `make_arms` whose native-full has another call."""

    def arms_of(*arguments):
        arms = make_arms(*arguments)
        next(arm for arm in arms if arm.name == "native-full").make = broken
        return arms

    return arms_of


def test_an_arm_that_raises_is_printed_as_failed(tiny, small_reference):
    def broken(arm):
        raise RuntimeError("no such kernel")

    case = run_case(tiny, describe(tiny.model).spec, 1, 16, [Plan.last(LAYERS)], SETTINGS, None, broken_arms(broken))
    line = next(line for line in report.case_text(case).splitlines() if line.startswith("native-full"))
    assert line.split(maxsplit=1)[1] == "failed: RuntimeError: no such kernel"
    saved = {arm["name"]: arm for arm in report.case_json(case)["arms"]}
    assert saved["native-full"]["failed"] == "RuntimeError: no such kernel"
    assert saved["pop 2/6"]["failed"] is None
    assert [item["baseline"] for item in report.case_json(case)["comparisons"]] == ["hf-eager"]


def test_a_full_depth_arm_with_other_logits_fails(tiny, small_reference):
    def broken(arm):
        return lambda: SimpleNamespace(logits=torch.ones(1, 1, SIZES["vocab_size"]), past_key_values=None)

    case = run_case(tiny, describe(tiny.model).spec, 1, 16, [Plan.last(LAYERS)], SETTINGS, None, broken_arms(broken))
    [full] = [arm for arm in case.arms if arm.name == "native-full"]
    assert "logits differ from hf-eager's" in full.failed
    assert full.samples == []


def test_a_failed_kernel_is_printed_as_failed(tiny, monkeypatch, small_reference):
    from pop_ext.hf.load import load

    def broken(operands):
        raise RuntimeError("not on this device")

    monkeypatch.setattr("bench.kernel_table._attention", broken)
    table = measure_kernels("tiny", load(tiny.model, Plan.last(LAYERS)), [16], repeats=1, quiet=True)
    assert "failed at 16 tokens: RuntimeError: not on this device" in report.kernel_text(table)
    [row] = [row for row in report.kernel_json(table)["rows"] if row["name"] == "attention"]
    assert row["failed"] == "RuntimeError: not on this device"


def test_kernel_flops_come_from_the_cost_model(tiny, small_reference):
    from pop_ext.hf.load import load

    plan = Plan(LAYERS, (1, 2))  # not the last layers: the last layer's own projection must not count
    native = load(tiny.model, plan)
    table = measure_kernels("tiny", native, [16], repeats=1, quiet=True)
    rows = {row.name: row for row in table.rows}
    hidden, kv_dim = SIZES["hidden_size"], 64
    assert rows["kv_project, 2 layers"].flops == rows["its bare gemm"].flops == 2 * 16 * hidden * 2 * 2 * kv_dim
    whole = _core.plan_cost(native.spec, plan, [_core.SequenceShape(16)])["stages"]
    assert rows["boundary step, 2 layers"].bytes == whole["boundary"]["bytes"]
    stock = _core.stock_cost(native.spec, [_core.SequenceShape(16)])["stages"]
    assert rows["attention"].flops == stock["attention"]["flops"] / LAYERS


def test_rounds_interleave_and_change_their_order():
    ran = []
    items = [Timed(name, lambda name=name: ran.append(name)) for name in "abc"]
    assert interleave(items, Ticks(*[1.0] * 9), repeats=3) == 3
    assert [ran[i : i + 3] for i in (0, 3, 6)] == [["a", "b", "c"], ["a", "c", "b"], ["c", "a", "b"]]
    assert all(item.samples == [1.0] * 3 for item in items)


def test_a_spent_budget_ends_rounds_after_the_fewest():
    item = Timed("a", lambda: None)
    assert interleave([item], Ticks(*[1.0] * 9), repeats=9, deadline=0.0, fewest=3) == 3


def test_too_few_repeats_give_a_warning(tiny, small_reference):
    case = run_case(tiny, describe(tiny.model).spec, 1, 16, [], Settings(9, 1, quiet=True), budget=0.0)
    assert case.rounds == 3
    assert "only 3 repeats (the time budget was spent)" in report.case_text(case)


def test_the_paired_ratio_cancels_drift():
    fast, slow = [1.0, 10.0, 2.0], [2.0, 20.0, 4.0]
    assert paired_ratio(slow, fast) == 2.0
    assert Summary.of([4.0, 1.0, 2.0, 3.0, 5.0]) == Summary(5, 3.0, 2.0, 4.0, 1.0)


def test_the_baseline_is_the_faster_stock_arm(tiny):
    spec = describe(tiny.model).spec
    arms = make_arms(tiny.model, spec, torch.zeros(1, 8, dtype=torch.int64), [], "default")
    for arm, seconds in zip(arms, (2.0, 1.0, 0.5), strict=True):
        arm.samples = [seconds]
    case = Case(tiny, spec, 1, 8, torch.float32, arms, [])
    assert [arm.name for arm in arms] == ["hf-eager", "hf-compile", "native-full"]
    assert case.baseline().name == "hf-compile"
    assert case.compare(arms[2], case.baseline()).speedup == 2.0
    arms[1].failed = "no compiler"
    assert case.baseline().name == "hf-eager"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_includes_memory_that_a_call_frees():
    size = 48 * 2**20

    def call():
        torch.ones(size, dtype=torch.int8).add_(1)
        return None

    use = measure_memory(call, CPU)
    assert 0.9 * size < use.peak_extra < 1.5 * size
    assert use.kv_cache == 0


def test_random_weights_are_finite_and_reproducible(config_dir, tiny):
    again = load_model(str(config_dir), torch.float32, CPU)
    assert again.weights == "random"
    assert "holds no weights" in again.note
    for one, other in zip(tiny.model.parameters(), again.model.parameters(), strict=True):
        assert bool(one.isfinite().all())
        assert torch.equal(one, other)
    assert float(tiny.model.lm_head.weight.detach().std()) == pytest.approx(0.02, rel=0.05)


def test_weights_beyond_free_memory_are_refused(monkeypatch):
    monkeypatch.setattr("bench.shapes.available_bytes", lambda device: 2**30)
    with pytest.raises(ValueError, match=r"llama-3.1-8b: torch.bfloat16 weights take 15.0 GiB, 1.0 GiB are free"):
        load_model("llama-3.1-8b", torch.bfloat16, CPU)


@pytest.mark.parametrize(("paying", "expected"), [(32, 32), (None, 33)])
def test_plans_keep_the_calibrated_min_tokens(
    paying, expected, config_dir, tmp_path, capsys, small_reference, monkeypatch
):
    asked = []
    monkeypatch.setattr(cli, "shortest_paying", lambda model, plan, lengths, batch: asked.append(lengths) or paying)
    path = tmp_path / "report.json"
    options = ["--model", str(config_dir), "--lengths", "16", "32", "--count", "2", "--calibrate", "--repeats", "3"]
    assert cli.main([*options, "--quiet", "--json", str(path)]) == 0
    assert asked == [[16, 32]]
    cases = {case["tokens"]: case for case in json.loads(path.read_text())["cases"]}
    arms = {tokens: {arm["name"]: arm for arm in case["arms"]} for tokens, case in cases.items()}
    pruned = {tokens: by_name["pop 2/6"] for tokens, by_name in arms.items()}
    assert {arm["plan"]["min_tokens"] for arm in pruned.values()} == {expected}
    full = {tokens: by_name["native-full"]["flops"] for tokens, by_name in arms.items()}
    assert pruned[16]["flops"] == full[16]  # shorter prompts run at full depth
    assert (pruned[32]["flops"] < full[32]) == (paying is not None)
    printed = capsys.readouterr().out
    assert f"min_tokens {expected}" in printed
    ratios = [a / b for a, b in zip(*(arms[32][name]["samples_s"] for name in ("hf-eager", "pop 2/6")), strict=True)]
    [line] = [line for line in printed.splitlines() if line.startswith("1 x 32 ")]
    assert line.endswith(f"{sorted(ratios)[1]:.2f}x")


def test_a_model_that_cannot_be_loaded_fails_alone(config_dir, tmp_path, capsys, small_reference):
    path = tmp_path / "report.json"
    models = ["--model", str(tmp_path / "missing"), str(config_dir)]
    code = cli.main([*models, "--lengths", "16", "--repeats", "1", "--quiet", "--json", str(path)])
    saved = json.loads(path.read_text())
    assert code == 1
    assert [failure["model"] for failure in saved["failed_models"]] == [str(tmp_path / "missing")]
    assert len(saved["cases"]) == 1
    assert "missing failed: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--lengths", "1"], "--lengths: expected integers from 2, got [1]"),
        (["--repeats", "0"], "--repeats: expected at least 1, got 0"),
        (["--device", "tpu"], "--device: expected cpu or cuda, got tpu"),
        (["--tune", "early_launch"], '--tune: expected options such as "early_launch=1,sdpa_rows=0", got'),
        (["--cuda-graphs"], "--cuda-graphs: expected --device cuda, got cpu"),
        (["--calibrate"], "--calibrate: expected --model, and --via enable, the only way that respects min_tokens"),
        (["--model", "demo", "--calibrate", "--via", "prefill"], "--calibrate: expected --model, and --via enable"),
        (
            ["--tune", "gemm_blocks=0,early_launch=1"],
            "--tune: expected gemm_blocks, or --device cuda, got early_launch",
        ),
    ],
)
def test_bad_arguments_are_named(arguments, text, capsys):
    assert cli.main(arguments) == 2
    assert text in capsys.readouterr().err


def test_plans_are_named_by_what_they_omit():
    assert layers_text(Plan(16, (3, *range(11, 16)))) == "layers 3, 11-15"
    assert layers_text(Plan(16, ())) == "nothing"
    assert plan_name(Plan(16, range(11, 16))) == "pop 5/16"
    assert plan_name(Plan(16, range(11, 16), boundary=32)) == "pop 5/16 b32"


def test_named_shapes_exist():
    assert {"llama-3.2-1b", "llama-3.1-8b"} <= set(SHAPES)
    assert run.ROOT == ROOT


def test_stage_sums_tell_boundary_rows_from_retained_layers():
    plan = Plan(3, (1,))
    layer = [("qkv", 1.0), ("rope_cache_write", 1.0), ("attention", 1.0), ("o_proj", 1.0), ("mlp", 1.0)]
    ranges = [("embed", 0.5), *layer, ("kv_project", 7.0), *layer, ("kv_project", 2.0), *layer, ("final_norm", 0.5)]
    sums = stage_sums(ranges, plan)
    assert sums["boundary"] == 5.0
    assert sums["qkv"] == sums["mlp"] == 2.0
    assert sums["kv_project"] == 9.0
    with pytest.raises(RuntimeError, match="expected 3 ranges of each stage of a layer, got"):
        stage_sums(ranges[:-2], plan)


def test_a_profile_accounts_for_the_whole_call(config_dir, tmp_path, capsys, small_reference, monkeypatch):
    monkeypatch.setattr("bench.profile.measure_bandwidth", lambda device: {"copy": 1e9, "read": 2e9})
    path = tmp_path / "report.json"
    options = ["--model", str(config_dir), "--lengths", "40", "--count", "2", "--profile", "--no-cases", "--int8"]
    code = cli.main([*options, "--quiet", "--json", str(path)])
    printed = capsys.readouterr().out
    assert code == 0, printed
    assert printed.count("us before the operator") == 4
    profiles = json.loads(path.read_text())["profiles"]
    assert [item["arm"] for item in profiles] == ["native-full", "pop 2/6", "native-full int8", "pop 2/6 int8"]
    assert printed.count("peak of int8 products") == 2
    for item in profiles:
        stages = {stage["name"]: stage for stage in item["stages"]}
        assert sum(stage["seconds"] for stage in stages.values()) >= 0.99 * item["seconds"]
        assert item["bandwidth_bytes_per_s"] == 2e9
        assert all(seconds > 0 for seconds in item["host_seconds"].values())
        assert ("boundary" in stages) == bool(item["omit"])
        assert stages["lm_head"]["seconds"] > 0
        spec = describe(load_model(str(config_dir), torch.float32, CPU).model).spec
        plan = Plan(LAYERS, item["omit"])
        cost = _core.plan_cost(spec, plan, [_core.SequenceShape(40)])["stages"]
        assert {name: stages[name]["flops"] for name in ("qkv", "mlp", "kv_project")} == {
            name: cost[name]["flops"] for name in ("qkv", "mlp", "kv_project")
        }
        # q is rounded, k and v are not.
        rounded = {"qkv": spec.q_dim / (spec.q_dim + 2 * spec.kv_dim), "o_proj": 1, "mlp": 1}
        for name, stage in stages.items():
            share = rounded.get(name, 0) if item["products"] == "int8" else 0
            assert stage["rounded_flops"] == pytest.approx(share * (stage["flops"] or 0)), name
        mlp, peaks = stages["mlp"], (item["gemm_peak_flop_per_s"], item["rounded_peak_op_per_s"])
        if item["products"] == "int8":
            assert mlp["share_of_peak"] == pytest.approx(mlp["flops"] / peaks[1] / mlp["seconds"])
        else:
            assert peaks[1] is None


def test_a_case_beyond_the_budget_is_left_out_and_reported(config_dir, tmp_path, capsys, small_reference):
    path = tmp_path / "report.json"
    options = ["--model", str(config_dir), "--lengths", "24", "4096", "--budget", "1e-9", "--quiet"]
    assert cli.main([*options, "--json", str(path)]) == 0
    saved = json.loads(path.read_text())
    assert saved["cases"] == []
    assert len(saved["left_out"]) == 2
    assert "24 tokens: left out, it would take" in capsys.readouterr().out


@pytest.mark.parametrize("via", ["enable", "prefill"])
def test_copies_of_weights_add_arms_loaded_with_them(tiny, via):
    spec, ids = describe(tiny.model).spec, torch.zeros(1, 8, dtype=torch.int64)
    arms = make_arms(tiny.model, spec, ids, [Plan.last(LAYERS)], None, via, copies=("fp8", "int8", "prepack"))
    names = ["native-full", "pop 2/6"]
    assert [arm.name for arm in arms[1:]] == [
        f"{name}{copies}" for name in names for copies in ("", " fp8", " int8", " prepack")
    ]
    for arm in arms:
        arm.prepare()
        if arm.copies == "prepack":
            assert "prepack: expected bfloat16 weights, got float32" in arm.failed
    plain, fp8, int8 = (arm.folded_bytes for arm in arms[1:4])
    assert min(fp8, int8) > plain


@pytest.mark.parametrize("via", ["enable", "prefill"])
def test_graphs_add_arms_whose_models_use_them(tiny, via, monkeypatch):
    used = []
    for name in ("load", "enable"):
        plain = getattr(pop_ext, name)

        def without_graphs(*arguments, cuda_graphs=0, plain=plain, **options):
            used.extend([cuda_graphs] * (cuda_graphs > 0))
            return plain(*arguments, **options)

        monkeypatch.setattr(pop_ext, name, without_graphs)
    spec, ids = describe(tiny.model).spec, torch.zeros(1, 8, dtype=torch.int64)
    arms = make_arms(tiny.model, spec, ids, [Plan.last(LAYERS)], None, via, graphs=True)
    assert [arm.name for arm in arms[1:]] == ["native-full", "native-full graphs", "pop 2/6", "pop 2/6 graphs"]
    for arm in arms:
        arm.prepare()
        assert arm.failed is None
        assert len(used) == sum(before.graphs for before in arms[: arms.index(arm) + 1])


def test_backend_options_add_arms_that_run_under_them(tiny, monkeypatch):
    state = {"early_launch": 0}
    seen = []

    def tune(name, value):
        before, state[name] = state[name], value
        return before

    monkeypatch.setattr(torch.ops.pop, "tune", tune)
    spec, ids = describe(tiny.model).spec, torch.zeros(1, 8, dtype=torch.int64)
    arms = make_arms(tiny.model, spec, ids, [Plan.last(LAYERS)], None, "prefill", [{"early_launch": 1}])
    assert [arm.name for arm in arms] == ["hf-eager", "native-full", "pop 2/6", "pop 2/6 early_launch=1"]
    for arm in arms[2:]:
        arm.make = lambda arm: lambda: seen.append(state["early_launch"])
        arm.prepare()
        arm.run()
    assert seen == [0, 1]
    assert state == {"early_launch": 0}


def test_a_figure_has_a_panel_per_baseline_and_profile(tmp_path, capsys):
    reports = sorted((ROOT / "bench" / "results").glob("cpu-*.json"))
    panels = plot.speedup_panels([json.loads(path.read_text()) for path in reports])
    assert set(panels) == {
        f"llama-3.2-1b, batch 1, against {baseline}" for baseline in ("hf-eager", "hf-compile", "native-full")
    }
    points = panels["llama-3.2-1b, batch 1, against hf-eager"]["pop 5/16"]
    assert [point.tokens for point in points] == [512, 2048]
    assert all(point.roofline is None or point.roofline > 1 for point in points)
    assert plot.main([str(tmp_path / "out.png"), *map(str, reports)]) == 0
    assert (tmp_path / "out.png").stat().st_size > 1000
    (tmp_path / "empty.json").write_text(json.dumps({"cases": [], "profiles": []}))
    assert plot.main([str(tmp_path / "none.png"), str(tmp_path / "empty.json")]) == 1
    assert "expected cases or profiles" in capsys.readouterr().err
