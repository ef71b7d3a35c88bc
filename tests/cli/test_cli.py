"""`pop-ext generate` and `info`: reports, refused options, messages for missing dependencies."""

from __future__ import annotations

import functools
import io
import json
import re
import subprocess
import sys
import time

import models
import pop_ext
import pytest
import torch
import transformers
from instruction_sets import has_avx512_bf16
from model_folder import save_tiny_llama
from pop_ext import cli
from pop_ext.cli import options, output
from pop_ext.cli.app import app
from pop_ext.cli.compare import compare, count_steps, split_prompt
from pop_ext.env_info import ceilings
from pop_ext.utils.layer_ranges import parse_layers
from pop_ext.utils.roofline import Peaks
from rich.console import Console
from typer.testing import CliRunner


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture
def prompt_file(tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_text("def square(x):\n    return x * x\n" * 3)
    return path


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def generate(folder, prompt_file, *options):
    common = ("--continuation", 8, "--max-new-tokens", 6, "--repeats", 3)
    return run("generate", "--model", folder, "--prompt-file", prompt_file, *common, *options)


def test_generate_reports_three_arms_in_json(folder, prompt_file):
    result = generate(folder, prompt_file, "--json", "--count", 2)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert [arm["name"] for arm in report["arms"]] == ["Hugging Face full", "native full", "POP"]
    assert report["plan"]["omit"] == [4, 5]
    assert report["prompt_tokens"] == 96 - 8
    assert report["true_continuation"].replace(" ", "") == "nx*x\n"
    for arm in report["arms"]:
        assert len(arm["ttft_ms"]["all"]) == 3
        assert arm["ttft_ms"]["min"] <= arm["ttft_ms"]["median"] <= arm["ttft_ms"]["max"]
        assert len(arm["continuation_ids"]) == 6
    stock, full, pruned = (arm["log_likelihood_per_token"] for arm in report["arms"])
    assert full == pytest.approx(stock, abs=1e-4)
    assert pruned != pytest.approx(stock, abs=1e-4)
    assert report["arms"][1]["agreement"] == 6
    for row in report["speedups"]:
        assert row["measured"] > 0
        assert row["ceiling"] > 1
        assert row["roofline"] > 0
    assert min(report["peaks"].values()) > 0


def test_generate_prints_times_ratios_and_texts(folder, prompt_file):
    result = generate(folder, prompt_file)
    assert result.exit_code == 0, result.output
    for text in (
        "first token",
        "speed-up",
        "ceiling",
        "roofline: the same with bytes, at",
        "POP vs native full",
        "true continuation",
        "continuation, POP",
    ):
        assert text in result.stdout


@pytest.mark.parametrize("products", ["fp8", pytest.param("int8", marks=pytest.mark.cpu)])
def test_generate_compares_8_bit_products_beside_plain_ones(folder, prompt_file, products):
    result = generate(folder, prompt_file, "--json", "--count", 2, f"--{products}")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    plain, rounded = report["arms"][1:3], report["arms"][3:]
    assert [arm["name"] for arm in rounded] == [f"native full, {products}", f"POP, {products}"]
    assert [arm["products"] for arm in report["arms"]] == [None, None, None, products, products]
    model = options.load_model(str(folder), "auto", "cpu")
    tokens = options.load_tokenizer(str(folder))(prompt_file.read_text())["input_ids"]
    for one, other, count in zip(plain, rounded, (0, 2), strict=True):
        assert one["gflops"] == other["gflops"]
        with pop_ext.enabled(model, pop_ext.Plan.last(6, count=count), **{products: True}):
            [expected] = pop_ext.score(model, [tokens[:-8]], [tokens[-8:]])
        assert other["log_likelihood_per_token"] == pytest.approx(expected.log_likelihood / 8, abs=1e-6)
        assert abs(one["log_likelihood_per_token"] - other["log_likelihood_per_token"]) > 1e-4
    for row in report["speedups"]:
        assert (row["roofline"] is None) == (products in row["arm"] or products in row["baseline"])
    assert f"POP, {products} vs POP" in generate(folder, prompt_file, f"--{products}").stdout


def test_generate_without_continuation_has_no_likelihood(folder, prompt_file):
    report = json.loads(generate(folder, prompt_file, "--json", "--continuation", 0).stdout)
    assert report["prompt_tokens"] == 96
    assert report["true_continuation"] is None
    assert all(arm["log_likelihood_per_token"] is None for arm in report["arms"])


def test_generate_executes_a_saved_plan_despite_min_tokens(folder, prompt_file, tmp_path):
    path = tmp_path / "plan.json"
    pop_ext.Plan(6, omit=[2, 4], boundary=3, min_tokens=1000).save(path)
    report = json.loads(generate(folder, prompt_file, "--json", "--plan", path).stdout)
    assert report["plan"] == {"num_layers": 6, "omit": [2, 4], "boundary": 3, "min_tokens": 1000}
    assert report["arms"][2]["gflops"] < report["arms"][1]["gflops"]
    assert "shorter than min_tokens" in generate(folder, prompt_file, "--plan", path).stdout


def test_generate_without_a_plan_measures_a_third_and_says_that_its_cost_is_unknown(folder, prompt_file):
    report = json.loads(generate(folder, prompt_file, "--json").stdout)
    assert report["plan"]["omit"] == [4, 5]
    assert report["plan_choice"] == {
        "reason": "the deepest third of the layers; what it costs is unknown",
        "unmeasured": True,
    }
    named = json.loads(generate(folder, prompt_file, "--json", "--plan", "third").stdout)
    assert named["plan"] == report["plan"]
    assert named["plan_choice"] == {"reason": "--plan third", "unmeasured": False}


def test_info_shows_which_plan_runs_without_one_and_why(folder):
    model = json.loads(run("info", "--model", folder, "--json").stdout)["model"]
    assert model["plan"]["omit"] == []
    assert model["plan_choice"] == {"reason": "no plan whose cost was measured is known", "unmeasured": True}
    text = run("info", "--model", folder).stdout
    assert "why: no plan whose cost was measured is known" in text
    assert "pop-ext calibrate" in text
    assert run("info", "--model", folder, "--plan", "preset").exit_code == 2


def test_likelihood_and_continuation_equal_score_and_generate():
    model = models.llama()
    context, continuation = models.tokens(model, 30).tolist(), models.tokens(model, 5, seed=1).tolist()
    plan = pop_ext.Plan(6, omit=[1, 4], boundary=3)
    steps: list[str] = []
    prompt = split_prompt(context + continuation, 5, None, None)
    result = compare(model, prompt, plan, repeats=3, max_new_tokens=4, progress=steps.append)
    assert len(steps) == count_steps(prompt, 3)
    with pop_ext.enabled(model, plan):
        [expected] = pop_ext.score(model, [context], [continuation])
        text = model.generate(torch.tensor([context]), max_new_tokens=4, do_sample=False)[0, 30:]
    assert result.arms[2].log_likelihood == pytest.approx(expected.log_likelihood / 5, abs=1e-5)
    assert result.arms[2].continuation == text.tolist()


def test_ceilings_of_the_published_shape_match_the_paper():
    spec = pop_ext._core.ModelSpec(
        architecture="llama",
        dtype="bfloat16",
        num_layers=32,
        hidden_size=4096,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        intermediate_size=14336,
        vocab_size=128256,
    )
    plan, h200 = pop_ext.Plan.preset("meta-llama/Llama-3.1-8B-Instruct"), Peaks(640e12, 4.26e12)
    row = ceilings(spec, plan, 2048, h200)
    assert row["pop_over_stock"] == pytest.approx(1.43, abs=0.005)
    assert row["pop_over_native_full"] == pytest.approx(1.39, abs=0.005)
    short = ceilings(spec, plan, 512, h200)
    assert short["pop_over_native_full"] == pytest.approx(1.39, abs=0.01)
    assert 1.15 < short["roofline"]["pop_over_native_full"] < 1.25  # the boundary row reads every weight


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt-tokens", 500], "--prompt-tokens: expected at most 88"),
        (["--continuation", 96], "expected more than the 96 tokens of --continuation"),
        (["--count", 6], "expected an integer in 0...5, got 6"),
        (["--count", 2, "--omit", "3"], "--omit and --count: expected one of them"),
        (["--omit", "3-x"], "--omit: expected layers like 22-31 or 8,9,11, got '3-x'"),
        (["--omit", "5-3"], "--omit: expected layers like 22-31 or 8,9,11, got '5-3'"),
        (["--omit", "6"], "got 6"),
        (["--dtype", "int8"], "--dtype: expected one of auto, float32, bfloat16, float16, got 'int8'"),
        (["--device", "foo"], "got 'foo'"),
        (["--max-new-tokens", 4096], "--continuation, --max-new-tokens: expected fewer than the "),
        (["--continuation", 200, "--prompt-tokens", 5], "expected more than the 200 tokens of --continuation, got 96"),
        (["--device", "cuda"], "got 'cuda'"),
        (["--plan", "absent.json"], "absent.json"),
        (["--int8", "--fp8"], "--int8 and --fp8: expected one of them"),
    ],
)
def test_bad_options_are_one_line_and_status_2(folder, prompt_file, arguments, message):
    result = generate(folder, prompt_file, *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output


def test_a_failure_is_one_line_and_status_1(folder, prompt_file, monkeypatch):
    def fail(*_):
        raise RuntimeError("planted failure")

    monkeypatch.setattr(options, "load_model", fail)
    for result in (generate(folder, prompt_file), run("info", "--model", folder)):
        assert result.exit_code == 1
        assert result.stderr == "pop-ext: planted failure\n"
        assert result.stdout == ""


def test_generate_prefills_portably_where_there_is_no_native_form(tmp_path, prompt_file):
    folder = save_tiny_llama(tmp_path)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    torch.manual_seed(3)
    model = transformers.HyperCLOVAXForCausalLM(transformers.HyperCLOVAXConfig(**sizes)).eval()
    model.save_pretrained(folder)
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(prompt_file.read_text())["input_ids"]
    report = json.loads(generate(folder, prompt_file, "--json", "--omit", 1, "--boundary", 3).stdout)
    assert [arm["name"] for arm in report["arms"]] == ["Hugging Face full", "POP"]
    assert [(row["arm"], row["ceiling"]) for row in report["speedups"]] == [("POP", None)]
    with pop_ext.enabled(model, pop_ext.Plan(3, omit=[1], boundary=3), backend="reference"):
        [expected] = pop_ext.score(model, [tokens[:-8]], [tokens[-8:]])
    stock, pruned = (arm["log_likelihood_per_token"] for arm in report["arms"])
    assert pruned == pytest.approx(expected.log_likelihood / 8, abs=1e-5)
    assert pruned != pytest.approx(stock, abs=1e-5)
    assert "ceiling: not known" in generate(folder, prompt_file).stdout


def test_8_bit_products_of_a_model_that_cannot_have_them_are_one_line(tmp_path, prompt_file):
    models.mixtral().save_pretrained(save_tiny_llama(tmp_path / "experts"))
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    other = transformers.HyperCLOVAXForCausalLM(transformers.HyperCLOVAXConfig(**sizes))
    other.save_pretrained(save_tiny_llama(tmp_path / "portable"))
    for name, text in (
        ("experts", "--int8: expected a model without experts, got one of 4"),
        ("portable", "--int8: expected a model with a native form; model: expected an architecture"),
    ):
        result = generate(tmp_path / name, prompt_file, "--int8")
        assert result.exit_code == 2
        assert text in result.stderr
        assert result.stderr.count("\n") == 1
        result = run("info", "--model", tmp_path / name, "--int8")
        assert (result.exit_code, result.stdout) == (2, "")
        assert text in result.stderr


def test_an_architecture_that_no_backend_runs_is_named(tmp_path, prompt_file):
    folder = save_tiny_llama(tmp_path)
    config = transformers.XLNetConfig(n_layer=3, d_model=8, n_head=2, d_inner=8)
    transformers.XLNetLMHeadModel(config).save_pretrained(folder)
    result = generate(folder, prompt_file)
    assert result.exit_code == 2
    assert "got xlnet" in result.stderr
    assert "portable" in result.stderr


def test_info_says_which_backend_runs_a_model(folder, tmp_path):
    assert json.loads(run("info", "--model", folder, "--json").stdout)["model"]["backend"] == "native"
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    other = save_tiny_llama(tmp_path)
    transformers.HyperCLOVAXForCausalLM(transformers.HyperCLOVAXConfig(**sizes)).save_pretrained(other)
    model = json.loads(run("info", "--model", other, "--plan", "third", "--json").stdout)["model"]
    assert model["backend"] == "portable"
    assert model["plan"]["omit"] == [2]
    assert "portable backend; not native: model: expected an architecture that" in run("info", "--model", other).stdout


def test_the_spinner_turns_while_a_model_loads(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    console = functools.partial(Console, file=terminal, force_terminal=True, _environ={"TERM": "xterm"})
    monkeypatch.setattr(output, "Console", lambda stderr: console())
    with output.loading_spinner(quiet=False):
        time.sleep(0.5)
    frames = set(re.findall("[\u2800-\u28ff]", terminal.getvalue()))
    assert len(frames) >= 2
    assert "loading" in terminal.getvalue()


def test_nothing_is_drawn_without_a_terminal_or_with_json(folder, prompt_file):
    for arguments in ((), ("--json",)):
        assert generate(folder, prompt_file, *arguments).stderr == ""


def test_info_reports_the_installation():
    report = json.loads(run("info", "--json").stdout)
    assert report["pop_ext"] == pop_ext.__version__
    assert report["torch"] == torch.__version__
    assert report["cpu_isa"] == torch.ops.pop.cpu_isa()
    assert report["aten_schemas"] == "as expected"
    assert report["prepack"].startswith("possible" if has_avx512_bf16() else "expected a processor with AVX-512 BF16")
    assert "llama" in report["families"]
    names = [name for preset in report["presets"] for name in preset["names"]]
    assert len(names) == len(set(names))
    assert "meta-llama/Llama-3.1-8B" in names
    assert torch.__version__ in run("info").stdout


def test_info_of_a_model_reports_plan_memory_and_ceilings(folder):
    result = run("info", "--model", folder, "--omit", "2-3,5", "--boundary", 4, "--json")
    model = json.loads(result.stdout)["model"]
    assert model["plan"] == {"num_layers": 6, "omit": [2, 3, 5], "boundary": 4, "min_tokens": 0}
    # Keys and values of three layers, 2 KV heads of 64 channels each, float32.
    assert model["extra_bytes"] == 3 * 2 * 2 * 64 * 96 * 4
    assert [row["tokens"] for row in model["ceilings"]] == [512, 2048, 8192]
    assert all(row["roofline"].keys() < row.keys() for row in model["ceilings"])
    assert min(model["peaks"].values()) > 0
    printed = run("info", "--model", folder).stdout
    assert "ceiling, roofline" in printed
    assert "GB/s" in printed


@pytest.mark.cpu
def test_info_counts_the_copies_of_8_bit_products(folder):
    printed = run("info", "--model", folder, "--count", 2, "--int8")
    assert "extra memory for K/V weights of omitted layers and copies for int8 products: " in printed.stdout
    plain, rounded = (
        json.loads(run("info", "--model", folder, "--count", 2, "--json", *more).stdout) for more in ((), ("--int8",))
    )
    model = options.load_model(str(folder), "auto", "cpu")
    native = pop_ext.load(model, pop_ext.Plan.last(6, count=2), int8=True)
    assert (plain["model"]["products"], rounded["model"]["products"]) == (None, "int8")
    assert rounded["model"]["extra_bytes"] == native.extra_bytes > plain["model"]["extra_bytes"]
    assert f"8-bit integers: {plain['int8_isa']}" in run("info").stdout
    refused = run("info", "--int8")
    assert refused.exit_code == 2
    assert "--int8: expected it only with --model" in refused.stderr


@pytest.mark.parametrize(("text", "layers"), [("", []), ("3", [3]), ("3,5-7", [3, 5, 6, 7]), ("5 - 6, 8", [5, 6, 8])])
def test_layers_are_parsed_from_numbers_and_ranges(text, layers):
    assert parse_layers(text) == layers


def test_a_prompt_leaves_room_for_what_follows():
    assert split_prompt(range(10), 3, None, None) == (list(range(7)), [7, 8, 9])
    assert split_prompt(range(10), 3, 4, None) == ([0, 1, 2, 3], [4, 5, 6])
    assert split_prompt(range(10), 3, None, 8) == ([0, 1, 2, 3, 4], [5, 6, 7])
    assert split_prompt(range(10), 3, None, 8, max_new_tokens=6) == ([0, 1], [2, 3, 4])
    with pytest.raises(ValueError, match=re.escape("at most 5 (the model takes 8 tokens), got 6")):
        split_prompt(range(10), 3, 6, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((range(10), 10, None, None), "prompt: expected more than the 10 tokens of --continuation, got 10"),
        ((range(10), 20, 5, None), "prompt: expected more than the 20 tokens of --continuation, got 10"),
        ((range(90), 3, None, 8, 8), "--max-new-tokens: expected fewer than the 8 tokens that the model takes, got 8"),
        ((range(90), 20, 5, 8), "--max-new-tokens: expected fewer than the 8 tokens that the model takes, got 20"),
        ((range(10), 3, 8, None), "--prompt-tokens: expected at most 7 (the text has 10 tokens), got 8"),
    ],
)
def test_a_text_without_room_for_a_prompt_is_refused(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        split_prompt(*arguments)


def test_without_typer_main_says_what_to_install(monkeypatch):
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None if name == "typer" else object())
    with pytest.raises(SystemExit, match=re.escape("needs typer: pip install 'pop_ext[cli,hf]'")):
        cli.main()


def test_python_m_pop_ext_runs_the_command():
    result = subprocess.run(
        [sys.executable, "-m", "pop_ext", "info", "--json"], capture_output=True, text=True, check=True
    )
    assert json.loads(result.stdout)["pop_ext"] == pop_ext.__version__
