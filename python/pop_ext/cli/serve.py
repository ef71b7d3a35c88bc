"""``pop-ext serve``: serve a model with pruned prefills by the server of transformers or of vLLM."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from pop_ext.cli import options, output
from pop_ext.cli.options import PLAN_HELP, Fp8Option, Int8Option, ModelArgument
from pop_ext.hf.decision import Products

CEILING_TOKENS = 2048
_VLLM_MODULE = "vllm.entrypoints.openai.api_server"


def serve(
    context: typer.Context,
    model: ModelArgument,
    plan: Annotated[str | None, typer.Option(help=PLAN_HELP, metavar="PLAN")] = None,
    engine: Annotated[
        str, typer.Option(help="Whose server runs: transformers (transformers serve) or vllm.", metavar="ENGINE")
    ] = "transformers",
    sequential: Annotated[
        bool,
        typer.Option(
            "--sequential",
            help="One request after the other by model.generate, in the place of continuous batching (transformers).",
        ),
    ] = False,
    strict: Annotated[
        bool,
        typer.Option("--strict", help="Fail requests whose prefill cannot be pruned, with the reason (transformers)."),
    ] = False,
    int8: Int8Option = False,
    fp8: Fp8Option = False,
) -> None:
    """Serve a model with pruned prefills through an OpenAI-compatible API, with streaming.

    The server is that of transformers, or of vLLM with --engine vllm. All other options are handed on to it, such as
    --host and --port; name MODEL before them. `transformers serve --help` and `vllm serve --help` list them.

    One line on standard error says at the start which plan runs: layers that prefills omit, boundary, fit, 8-bit
    products, and the highest possible speed-up of a prefill.

    --int8 and --fp8 are for the server of transformers, and need a model with a native form. vLLM has quantised
    checkpoints of its own.
    """
    rest = list(context.args)
    with output.errors_on_one_line():
        products = options.chosen_products(int8, fp8)
        if engine == "transformers":
            if fp8 and not sequential:
                raise ValueError(
                    "--fp8: expected it only with --sequential, since steps of continuous batching run natively on a "
                    "CPU alone; got it without"
                )
            with output.products_named(products):
                _serve_by_transformers(model, plan, sequential, strict, products, rest)
        elif engine == "vllm":
            only = {"--sequential": sequential, "--strict": strict, "--int8": int8, "--fp8": fp8}
            for option, given in only.items():
                if given:
                    raise ValueError(f"{option}: expected it only with --engine transformers, got --engine vllm")
            _serve_by_vllm(model, plan, rest)
        else:
            raise ValueError(f"--engine: expected transformers or vllm, got {engine!r}")


def _serve_by_transformers(
    model: str, plan: str | None, sequential: bool, strict: bool, products: Products | None, rest: list[str]
) -> None:
    """Run ``transformers serve`` in this process, with a model that is enabled as soon as it is loaded.

    Raises:
        ImportError: A package that the server needs is missing.
        OSError, ValueError: There is no such model or plan, or no backend runs it.
    """
    missing = [name for name in ("fastapi", "uvicorn", "openai", "pydantic") if not importlib.util.find_spec(name)]
    if missing:
        raise ImportError(f"the server of transformers needs {', '.join(missing)}: pip install 'pop_ext[serve]'")
    from transformers.cli.transformers import app

    flags = [] if sequential else ["--continuous-batching"]
    with enabled_when_loaded(plan, strict, not sequential, products):
        app(args=["serve", model, *flags, *rest], prog_name="transformers")


@contextmanager
def enabled_when_loaded(
    plan: str | None, strict: bool, batching: bool, products: Products | None = None
) -> Iterator[None]:
    """Make servers of transformers that are built inside the block enable the models that they load.

    A server takes ``ModelManager`` and ``GenerationState`` by their names. Handlers ask the former for the model of
    each request.

    Args:
        plan: as for ``pop_ext.enable``.
        strict: as for ``pop_ext.enable``.
        batching: whether the server uses continuous batching, which is tried on a short prompt then.
        products: 8-bit products of native prefills; None for products in the model's dtype.
    """
    from transformers.cli.serving import model_manager, utils

    stock: Any = model_manager.ModelManager
    stock_state: Any = utils.GenerationState

    class EnablingManager(stock):
        """Enable each model once, before the first request sees it."""

        _enabling = threading.Lock()

        def load_model_and_processor(self, model_name: str, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
            model, processor = super().load_model_and_processor(model_name, *args, **kwargs)
            with self._enabling:
                if not _is_enabled(model):
                    enable_and_announce(model, model_name, plan, strict, products)
                    if batching and model.config.get_text_config() is model.config:  # others run one by one
                        check_steps(model, model_name)
            return model, processor

    class UngraphedState(stock_state):
        """Record no CUDA graphs of prefills, which would replay stock ones, unless the caller has asked for them."""

        def __init__(self, *args: Any, cb_config: Any = None, **kwargs: Any) -> None:
            super().__init__(*args, cb_config=without_prefill_graphs(cb_config), **kwargs)

    for module, name, built in (
        (model_manager, "ModelManager", EnablingManager),
        (utils, "GenerationState", UngraphedState),
    ):
        setattr(module, name, built)
    try:
        yield
    finally:
        for module, name, built in ((model_manager, "ModelManager", stock), (utils, "GenerationState", stock_state)):
            setattr(module, name, built)


def without_prefill_graphs(config: Any) -> Any:
    """Return a ``ContinuousBatchingConfig`` that leaves CUDA graphs to decode steps, if ``config`` leaves it open.

    Args:
        config: a ``ContinuousBatchingConfig``, changed in place; None for a new one.
    """
    import torch
    from transformers import ContinuousBatchingConfig

    config = ContinuousBatchingConfig() if config is None else config
    if config.use_cuda_graph is None and torch.cuda.is_available():
        config.use_cuda_graph = (False, True)
    return config


def check_steps(model: Any, name: str) -> None:
    """Run one short prompt through continuous batching before the first request comes.

    A step that is declined warns, or under strict ends the server here: a request would only get an error.

    Raises:
        RuntimeError: The prompt failed. The text says why.
    """
    from transformers import ContinuousBatchingConfig, GenerationConfig

    config = GenerationConfig(max_new_tokens=1, do_sample=False, eos_token_id=-1, pad_token_id=0)
    batching = without_prefill_graphs(ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=16))
    outputs = model.generate_batch([[0, 0]], config, batching, warmup=False)
    for answer in outputs.values():
        if answer.error is not None:
            raise RuntimeError(f"{name}: expected continuous batching to answer a prompt, got: {answer.error}")


def _is_enabled(model: Any) -> bool:
    from pop_ext.hf.forward import find_prefill_forward

    return find_prefill_forward(model) is not None


def enable_and_announce(
    model: Any, name: str, plan: str | None, strict: bool, products: Products | None = None
) -> None:
    """Enable a model, and print the start-up line on standard error.

    Raises:
        OSError, ValueError: As for ``pop_ext.enable``.
    """
    from pop_ext.hf.enable import enable, require_enabled

    enable(model, plan, strict, fp8=products == "fp8", int8=products == "int8")
    backend = require_enabled(model).backend
    print(f"pop-ext: {startup_line(name, model, backend.plan, products)}", file=sys.stderr, flush=True)


def startup_line(name: str, model: Any, plan: Any, products: Products | None = None) -> str:
    """Return what a server does: plan, omitted layers, boundary, fit, products and FLOP ceiling, on one line."""
    from pop_ext.env_info import flop_ceiling
    from pop_ext.hf.architectures import UnsupportedModelError
    from pop_ext.hf.weight_map import describe

    in_8_bits = f", {products} products" if products else ""
    if not plan.omit:
        return f"{name}: the plan omits no layer, prefills run at full depth{in_8_bits}"
    fit = "unfitted" if plan.projections is None else f"fitted K and V ({plan.projections.report.method})"
    least = f", prompts of {plan.min_tokens} tokens or more" if plan.min_tokens else ""
    try:
        ratio = flop_ceiling(describe(model).spec, plan, CEILING_TOKENS)
        ceiling = f"FLOP ceiling of a prefill {ratio:.2f}x at {CEILING_TOKENS:,} tokens"
    except UnsupportedModelError:
        ceiling = "FLOP ceiling unknown (no native form)"
    return (
        f"{name}: prefills omit {len(plan.omit)} of {plan.num_layers} layers ({_ranges(plan)}), boundary "
        f"{plan.boundary}{least}, {fit}{in_8_bits}; {ceiling}"
    )


def _ranges(plan: Any) -> str:
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in plan.runs)


def _serve_by_vllm(model: str, plan: str | None, rest: list[str]) -> None:
    """Replace this process by vLLM's OpenAI server, with the arguments of the plugin.

    Raises:
        ImportError: vLLM is not installed.
        OSError, ValueError: There is no such model or plan, or the plugin does not know the model.
    """
    if importlib.util.find_spec("vllm") is None:
        raise ImportError("--engine vllm: expected vllm in this environment, got none: pip install vllm")
    command = vllm_command(model, plan, rest)
    print(f"pop-ext: {_startup_line_of_config(model, plan)}", file=sys.stderr, flush=True)
    os.execv(command[0], command)


def vllm_command(model: str, plan: str | None, rest: list[str]) -> list[str]:
    """Return the command that starts vLLM's OpenAI server with the arguments of the plugin.

    Raises:
        ValueError: They hold a configuration that would take the place of the plugin's.
    """
    from pop_ext.vllm import engine_arguments

    if any(argument.partition("=")[0] == "--additional-config" for argument in rest):
        raise ValueError(
            "--additional-config: expected none beside --engine vllm, which passes its own; start vLLM itself with "
            '\'{"pop_ext": {"plan": PLAN}, ...}\''
        )
    command = [sys.executable, "-m", _VLLM_MODULE, "--model", model]
    for name, value in engine_arguments(model, plan).items():
        command += [f"--{name.replace('_', '-')}", value if isinstance(value, str) else json.dumps(value)]
    return command + rest


def _startup_line_of_config(name: str, plan: str | None) -> str:
    """Return the start-up line of a model that is not loaded here: its layers have no memory."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from pop_ext.plans.default import choose_plan

    if plan is None:  # what vLLM loads decides
        return f"{name}: vLLM's log names the plan, if there is one beside the checkpoint or published for it"
    config = AutoConfig.from_pretrained(name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return startup_line(name, model, choose_plan(plan, model.config).plan)
