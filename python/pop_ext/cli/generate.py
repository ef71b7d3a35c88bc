"""``pop-ext generate``: one prompt, continued three ways."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from pop_ext import env_info as facts
from pop_ext.cli import shared
from pop_ext.cli.shared import (
    BoundaryOption,
    CountOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    OmitOption,
    PlanOption,
    ThreadsOption,
)


def generate(
    model: ModelOption,
    prompt_file: Annotated[Path, typer.Option(help="Text of the prompt and, after it, its true continuation.")],
    prompt_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of the prompt; by default all before the continuation.")
    ] = None,
    continuation: Annotated[
        int, typer.Option(min=0, help="Tokens after the prompt that are held back as its true continuation.")
    ] = 64,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of the greedy continuations.")] = 48,
    plan: PlanOption = None,
    omit: OmitOption = None,
    count: CountOption = None,
    boundary: BoundaryOption = None,
    repeats: Annotated[int, typer.Option(min=3, help="Rounds of timing; medians are shown.")] = 7,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "cpu",
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Continue a text three ways: stock model, native at full depth, pruned; compare time, text and likelihood."""
    with shared.errors():
        shared.set_threads(threads)
        text = prompt_file.read_text(encoding="utf-8")
        with shared.loading(as_json):
            loaded = shared.load_model(model, dtype, device)
            tokenizer = shared.load_tokenizer(model)
        chosen = shared.choose_plan(loaded.config, plan, omit, count, boundary)

        from pop_ext.cli.compare import compare, count_steps, split_prompt

        limit = getattr(loaded.config, "max_position_embeddings", None)
        prompt = split_prompt(tokenizer(text)["input_ids"], continuation, prompt_tokens, limit, max_new_tokens)
        with shared.stepwise(as_json) as bar:
            task = bar.add_task("", total=count_steps(prompt, repeats))

            def advance(stage: str) -> None:
                bar.update(task, description=stage, advance=1, refresh=True)

            result = compare(loaded, prompt, chosen, repeats, max_new_tokens, advance)
        report = _generate_report(model, str(prompt_file), loaded, tokenizer, result)
    if as_json:
        shared.print_json(report)
    else:
        _print_generate(report)


def _generate_report(name: str, prompt_file: str, model: Any, tokenizer: Any, result: Any) -> dict[str, Any]:
    arms = []
    for index, arm in enumerate(result.arms):
        arms.append(
            {
                "name": arm.name,
                "ttft_ms": {
                    "median": 1e3 * arm.median,
                    "min": 1e3 * min(arm.seconds),
                    "max": 1e3 * max(arm.seconds),
                    "all": [1e3 * seconds for seconds in arm.seconds],
                },
                "gflops": arm.flops / 1e9,
                "log_likelihood_per_token": arm.log_likelihood,
                "continuation_ids": arm.continuation,
                "continuation": tokenizer.decode(arm.continuation),
                "agreement": result.agreement(index),
            }
        )
    pairs = [(1, 0), (2, 0), (2, 1)]
    installed = facts.installation()
    return {
        "model": name,
        "prompt_file": prompt_file,
        "prompt_tokens": len(result.prompt.context),
        "prompt_end": tokenizer.decode(result.prompt.context[-48:]),
        "true_continuation_ids": result.prompt.truth,
        "true_continuation": tokenizer.decode(result.prompt.truth) if result.prompt.truth else None,
        "plan": facts.describe_plan(result.plan),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "attention": model.config._attn_implementation,
        "versions": {name: installed[name] for name in ("pop_ext", "torch", "transformers")},
        "cpu_isa": installed["cpu_isa"],
        "threads": installed["threads"],
        "arms": arms,
        "speedups": [
            {
                "arm": result.arms[arm].name,
                "baseline": result.arms[baseline].name,
                "measured": result.speedup(arm, baseline),
                "ceiling": result.ceiling(arm, baseline),
            }
            for arm, baseline in pairs
        ],
    }


def _print_generate(report: dict[str, Any]) -> None:
    console = Console()
    plan = report["plan"]
    kernels = f"{report['cpu_isa']}, {report['threads']} threads"
    lines = [
        f"{report['model']}: {report['dtype']} on {report['device']} ({kernels})",
        f"prompt: the first {report['prompt_tokens']} tokens of {report['prompt_file']}",
        f"POP omits {len(plan['omit'])} of {plan['num_layers']} layers for all of them but the last {plan['boundary']}",
    ]
    if report["prompt_tokens"] < plan["min_tokens"]:
        lines.append(f"(enable() would run it at full depth: it is shorter than min_tokens, {plan['min_tokens']})")
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
    times = shared.new_table("first token", "median ms", "range", "log p/token", "as stock")
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
    ratios = shared.new_table("speed-up", "measured", "ceiling")
    for row in report["speedups"]:
        ratios.add_row(f"{row['arm']} vs {row['baseline']}", f"{row['measured']:.2f}x", f"{row['ceiling']:.2f}x")
    console.print(ratios)
    repeats = len(report["arms"][0]["ttft_ms"]["all"])
    for note in (
        f"Time to first token: medians of {repeats} interleaved runs. log p: nats, of the true",
        "continuation. As stock: leading tokens of the greedy continuation. Ceiling: ratio",
        "of FLOPs, what omitting work alone can gain; more than that is owed to the kernels.",
    ):
        console.print(Text(note, style="dim"))


def _milliseconds(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"
