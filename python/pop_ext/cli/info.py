"""``pop-ext info``: show what is installed, and what a plan omits and can gain on a model."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pop_ext import env_info
from pop_ext.cli import options, output
from pop_ext.cli.options import (
    BoundaryOption,
    CountOption,
    DtypeOption,
    Fp8Option,
    Int8Option,
    JsonOption,
    OmitOption,
    PlanOption,
)
from pop_ext.hf.decision import Products
from pop_ext.plans.plan import Plan
from pop_ext.utils.roofline import Peaks


def info(
    model: Annotated[
        str | None, typer.Option(help="Folder or Hugging Face name of a model to describe as well.", metavar="MODEL")
    ] = None,
    plan: PlanOption = None,
    omit: OmitOption = None,
    count: CountOption = None,
    boundary: BoundaryOption = None,
    dtype: DtypeOption = "auto",
    int8: Int8Option = False,
    fp8: Fp8Option = False,
    as_json: JsonOption = False,
) -> None:
    """Show versions, kernels and supported models; with --model also a plan, its memory and its possible speed-up.

    The possible speed-up is the ratio of FLOPs, what omitting work alone can gain, and beside it the roofline, which
    also counts bytes, at the rates that this machine's processor reaches in a measurement of a second.

    With --int8 or --fp8, the memory is that with the copies for 8-bit products, and a model that cannot have these is
    an error.

    --plan, --omit or --count choose the plan, one of them at most. Default: the plan that pop_ext.enable runs, which is
    the one beside the checkpoint if its card holds figures of these weights, else the preset published for this
    checkpoint, else one that omits no layer.
    """
    with output.errors_on_one_line():
        products = options.chosen_products(int8, fp8)
        if products is not None and model is None:
            raise ValueError(f"--{products}: expected it only with --model, got it without")
        report = env_info.installation()
        if model is not None:
            with output.loading_spinner(as_json), output.products_named(products):
                loaded = options.load_model(model, dtype, "cpu")

                chosen = options.chosen_plan(loaded, plan, omit, count, boundary)
                summary = _summary(loaded, chosen.plan, products)
            report["model"] = {"name": model, **summary}
            report["model"]["plan_choice"] = {"reason": chosen.reason, "unmeasured": chosen.unmeasured}
    if as_json:
        output.print_json(report)
    else:
        _print_info(report)


def _summary(model: Any, plan: Plan, products: Products | None) -> dict[str, Any]:
    """Describe a model under the backend that would run it.

    Raises:
        UnsupportedModelError: None does, or the native one not with these 8-bit products.
    """
    from pop_ext.hf.architectures import PORTABLE_ADVICE, UnsupportedModelError
    from pop_ext.hf.load import load
    from pop_ext.hf.portable_backend import PortableBackend

    try:
        native = load(model, plan, fp8=products == "fp8", int8=products == "int8")
        return {"backend": "native", **env_info.model_summary(native)}
    except UnsupportedModelError as error:
        if products is not None:
            raise
        try:
            PortableBackend(plan).load(model)
        except ValueError:
            raise error from None
        return {
            "backend": "portable",
            "not_native": str(error).removesuffix(f". {PORTABLE_ADVICE}"),
            "architecture": model.config.model_type,
            "dtype": str(model.dtype).removeprefix("torch."),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "plan": env_info.describe_plan(plan),
        }


def _print_info(report: dict[str, Any]) -> None:
    console = Console()
    table = Table(show_header=False, box=None, pad_edge=False)
    schemas = report["aten_schemas"]
    rows = {
        "pop_ext": report["pop_ext"],
        "python": report["python"],
        "torch": f"{report['torch']} (built with the headers of {report['built_with']['torch_headers']})",
        "transformers": report["transformers"] or "not installed (extra hf)",
        "compiler": report["built_with"]["compiler"],
        "CPU kernels": f"{report['cpu_isa']}, 8-bit integers: {report['int8_isa']}; {report['threads']} threads",
        "CUDA kernels": report["cuda"],
        "aten schemas": schemas if isinstance(schemas, str) else f"changed, native prefill disabled: {schemas}",
        "attention": ", ".join(f"{device}: {provider}" for device, provider in report["attention"].items()),
        "prepack": report["prepack"],
        "native families": ", ".join(report["families"]),
        "other models": "most decoders of transformers, quantised, adapted and offloaded weights: portable backend",
        "presets (omitted layers)": "\n".join(
            f"{preset['omitted']:2} of {preset['layers']} layers: {preset['names'][0]}"
            f"{' (published)' if preset['published'] else ''}"
            for preset in report["presets"]
        ),
    }
    for name, value in rows.items():
        table.add_row(Text(name, style="bold"), Text(value))
    console.print(table)
    if "model" in report:
        _print_model(console, report["model"])


def _print_model(console: Console, model: dict[str, Any]) -> None:
    plan, windows = model["plan"], model.get("sliding_windows")
    name = f"{model['name']}: {model['architecture']}, {model['parameters'] / 1e6:.1f} M parameters, {model['dtype']}"
    why = f"why: {model['plan_choice']['reason']}"
    if model["backend"] == "portable":
        for line in ("", name, f"plan: omits {plan['omit']}, boundary {plan['boundary']}", why):
            console.print(Text(line))
        console.print(Text(f"portable backend; not native: {model['not_native']}"))
        return
    lines = [
        "",
        name,
        f"{model['layers']} layers of hidden {model['hidden_size']}, {model['heads']} heads and {model['kv_heads']} "
        f"KV heads of {model['head_dim']}, MLP {model['intermediate_size']}; vocabulary {model['vocab_size']}",
        f"plan: omits {plan['omit']}, boundary {plan['boundary']}, min_tokens {plan['min_tokens']}",
        why,
        f"extra memory for K/V weights of omitted layers{_copies(model['products'])}: "
        f"{model['extra_bytes'] / 2**20:.1f} MiB",
    ]
    if model["plan_choice"]["unmeasured"]:
        lines.append(
            "pop-ext calibrate MODEL --text FILE --max-loss 0.03 -o DIR finds layers to omit at that price; "
            "--plan third shows the deepest third"
        )
    if windows:
        lines.insert(3, f"sliding windows: {windows}")
    for line in lines:
        console.print(Text(line))
    names = ("pop_over_stock", "pop_over_native_full", "native_full_over_stock")
    table = output.new_table("ceiling, roofline", "POP vs HF full", "POP vs native full", "native full vs HF full")
    for row in model["ceilings"]:
        table.add_row(f"{row['tokens']} tokens", *(f"{row[name]:.3f}x, {row['roofline'][name]:.3f}x" for name in names))
    console.print(table)
    for note in (
        "ceiling: ratio of FLOPs at batch 1.",
        f"roofline: the same with bytes, at {Peaks(**model['peaks'])} as measured now on this processor.",
    ):
        console.print(Text(note, style="dim"))


def _copies(products: str | None) -> str:
    """Name the copies of other matrices, after the K/V weights of omitted layers."""
    return "" if products is None else f" and copies for {products} products"
