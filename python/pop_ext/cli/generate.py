"""``pop-ext generate``: one prompt prefilled by the stock model, natively in full if it can be, and pruned."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from pop_ext import env_info
from pop_ext.cli import options, output
from pop_ext.cli.options import (
    BoundaryOption,
    CountOption,
    DeviceOption,
    DtypeOption,
    Fp8Option,
    Int8Option,
    JsonOption,
    ModelOption,
    OmitOption,
    PlanOption,
    ThreadsOption,
)
from pop_ext.utils.files import read_own_text
from pop_ext.utils.progress import ProgressBar
from pop_ext.utils.roofline import Peaks


def generate(
    model: ModelOption,
    prompt_file: Annotated[
        Path, typer.Option(help="Text to split into a prompt and its true continuation.", metavar="FILE")
    ],
    prompt_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="Length of the prompt, from the start of the text. Default: all but the continuation."
        ),
    ] = None,
    continuation: Annotated[
        int,
        typer.Option(min=0, help="Tokens after the prompt whose log-probability is measured; 0 measures none."),
    ] = 64,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate, greedily.")] = 48,
    repeats: Annotated[int, typer.Option(min=3, help="Timed prefills of each kind; medians are shown.")] = 7,
    plan: PlanOption = None,
    omit: OmitOption = None,
    count: CountOption = None,
    boundary: BoundaryOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "cpu",
    threads: ThreadsOption = None,
    int8: Int8Option = False,
    fp8: Fp8Option = False,
    as_json: JsonOption = False,
) -> None:
    """Prefill one prompt three ways and compare time, text and likelihood.

    The three are the stock Hugging Face model, pop_ext's own prefill of all layers (native full), and the pruned
    prefill (POP). The stock model decodes after each. A model without a native form has no native full prefill, and
    its POP is portable.

    With --int8 or --fp8, native full and POP are compared with 8-bit products as well.

    --plan, --omit or --count choose the plan, one of them at most. Default: the plan that pop_ext.enable runs (pop-ext
    info --model shows it); if that omits no layer, the preset of a model of this shape (pop-ext info lists presets),
    else the deepest third. The plan runs even if the prompt is shorter than its min_tokens, below which pop_ext.enable
    runs all layers.
    """
    with output.errors_on_one_line():
        products = options.chosen_products(int8, fp8)
        options.set_threads(threads)
        text = read_own_text(prompt_file)
        with output.loading_spinner(as_json):
            loaded = options.load_model(model, dtype, device)
            tokenizer = options.load_tokenizer(model)
        chosen = options.chosen_plan(loaded, plan, omit, count, boundary, measure=True)

        from pop_ext.cli.compare import compare, count_steps, split_prompt
        from pop_ext.methods.calibration import longest_input

        limit = longest_input(loaded)
        prompt = split_prompt(tokenizer(text)["input_ids"], continuation, prompt_tokens, limit, max_new_tokens)
        steps = count_steps(prompt, repeats, products)
        with ProgressBar("comparing", steps, quiet=as_json) as bar, output.products_named(products):

            def advance(stage: str) -> None:
                bar.advance(label=stage)

            result = compare(loaded, prompt, chosen.plan, repeats, max_new_tokens, advance, products)
        report = _generate_report(model, str(prompt_file), loaded, tokenizer, result)
        report["plan_choice"] = {"reason": chosen.reason, "unmeasured": chosen.unmeasured}
    if as_json:
        output.print_json(report)
    else:
        _print_generate(report)


def _generate_report(name: str, prompt_file: str, model: Any, tokenizer: Any, result: Any) -> dict[str, Any]:
    arms = []
    for index, arm in enumerate(result.arms):
        arms.append(
            {
                "name": arm.name,
                "products": arm.products,
                "ttft_ms": {
                    "median": 1e3 * arm.median,
                    "min": 1e3 * min(arm.seconds),
                    "max": 1e3 * max(arm.seconds),
                    "all": [1e3 * seconds for seconds in arm.seconds],
                },
                "gflops": None if arm.flops is None else arm.flops / 1e9,
                "log_likelihood_per_token": arm.log_likelihood,
                "continuation_ids": arm.continuation,
                "continuation": tokenizer.decode(arm.continuation),
                "agreement": result.agreement(index),
            }
        )
    pairs = [(arm, baseline) for arm in range(len(result.arms)) for baseline in range(arm)]
    installed = env_info.installation()
    return {
        "model": name,
        "prompt_file": prompt_file,
        "prompt_tokens": len(result.prompt.context),
        "prompt_end": tokenizer.decode(result.prompt.context[-48:]),
        "true_continuation_ids": result.prompt.truth,
        "true_continuation": tokenizer.decode(result.prompt.truth) if result.prompt.truth else None,
        "plan": env_info.describe_plan(result.plan),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "attention": model.config._attn_implementation,
        "versions": {name: installed[name] for name in ("pop_ext", "torch", "transformers")},
        "cpu_isa": installed["cpu_isa"],
        "int8_isa": installed["int8_isa"],
        "threads": installed["threads"],
        "arms": arms,
        "peaks": None if result.peaks is None else asdict(result.peaks),
        "speedups": [
            {
                "arm": result.arms[arm].name,
                "baseline": result.arms[baseline].name,
                "measured": result.speedup(arm, baseline),
                "ceiling": result.ceiling(arm, baseline),
                "roofline": result.roofline(arm, baseline),
            }
            for arm, baseline in pairs
        ],
    }


def _print_generate(report: dict[str, Any]) -> None:
    console = Console()
    plan = report["plan"]
    kernels = f"{report['cpu_isa']}, {report['threads']} threads"
    if report["arms"][-1]["products"] == "int8":
        kernels += f", 8-bit integers: {report['int8_isa']}"
    lines = [
        f"{report['model']}: {report['dtype']} on {report['device']} ({kernels})",
        f"prompt: the first {report['prompt_tokens']} tokens of {report['prompt_file']}",
        f"POP omits {len(plan['omit'])} of {plan['num_layers']} layers for all tokens of the prompt but the last "
        f"{min(plan['boundary'], report['prompt_tokens'])}",
        f"plan: {report['plan_choice']['reason']}",
    ]
    if report["plan_choice"]["unmeasured"]:
        lines.append("(pop_ext.enable runs all layers of this model unless it is given a plan)")
    if report["prompt_tokens"] < plan["min_tokens"]:
        lines.append(
            f"(pop_ext.enable would run all layers: the prompt is shorter than min_tokens, {plan['min_tokens']})"
        )
    for line in lines:
        console.print(Text(line))
    _print_arms(console, report)
    texts = {
        "end of the prompt": report["prompt_end"],
        "true continuation": report["true_continuation"],
        **{f"continuation, {arm['name']}": arm["continuation"] for arm in report["arms"]},
    }
    for name, text in texts.items():
        if text is not None:
            console.print(Panel(Text(text), title=name, title_align="left"))


def _print_arms(console: Console, report: dict[str, Any]) -> None:
    times = output.new_table("first token", "median ms", "range", "log p/token", "as stock")
    for arm in report["arms"]:
        ttft, likelihood = arm["ttft_ms"], arm["log_likelihood_per_token"]
        times.add_row(
            arm["name"],
            _milliseconds(ttft["median"]),
            f"{_milliseconds(ttft['min'])}-{_milliseconds(ttft['max'])}",
            "-" if likelihood is None else f"{likelihood:.4f}",
            f"{arm['agreement']} of {len(arm['continuation_ids'])}",
        )
    console.print(times)
    ratios = output.new_table("speed-up", "measured", "ceiling", "roofline")
    for row in report["speedups"]:
        bounds = (_factor(row[name]) for name in ("ceiling", "roofline"))
        ratios.add_row(f"{row['arm']} vs {row['baseline']}", f"{row['measured']:.2f}x", *bounds)
    console.print(ratios)
    repeats = len(report["arms"][0]["ttft_ms"]["all"])
    for note in (
        f"first token: time to first token, medians of {repeats} interleaved runs.",
        "log p/token: mean log-probability of the true continuation's tokens, in nats.",
        "as stock: leading tokens of the greedy continuation that equal the stock model's.",
        "ceiling: ratio of FLOPs, the speed-up from omitted work alone; kernels give the rest."
        if report["speedups"][0]["ceiling"]
        else "ceiling: not known, since this model has no native form; POP is portable.",
        *(
            [f"roofline: the same with bytes, at {Peaks(**report['peaks'])} as measured in this run."]
            if report["peaks"]
            else []
        ),
    ):
        console.print(Text(note, style="dim"))


def _factor(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def _milliseconds(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"
