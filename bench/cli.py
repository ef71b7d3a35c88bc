"""The command line of ``bench/run.py``."""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from pop_ext.hf.load import load
from pop_ext.hf.weight_map import describe
from pop_ext.methods.latency import shortest_paying
from pop_ext.plans.plan import Plan
from pop_ext.plans.presets import preset_or_third
from pop_ext.utils.layer_ranges import parse_layers

from bench import report
from bench.arms import VIA, layers_text, make_arms, plan_flops, stock_flops
from bench.cases import Case, Settings, failed_model, run_case
from bench.environment import environment
from bench.kernel_table import measure_kernels
from bench.measure import FEWEST_REPEATS, MIN_REPEATS, WallClock
from bench.memory import release_memory
from bench.profile import profile_json, profile_plans, profile_text
from bench.rates import make_gemm
from bench.shapes import SHAPES, BenchModel, load_model

RESULTS = Path(__file__).resolve().parent / "results"
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_SHORT = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_AUTO_BUDGET = 165.0  # seconds of a run without arguments, without the start of the interpreter
_AUTO_LENGTHS = (512, 256, 128)
_SLOW = 20.0  # seconds of the demo model at 512 tokens; on slower machines a run without arguments does less
_OVERHEAD = 1.4  # estimated time of a prefill, relative to its FLOPs at the rate of a bare product


def parser() -> argparse.ArgumentParser:
    """Return the parser with all options."""
    p = argparse.ArgumentParser(
        prog="bench/run.py",
        description="Time prefill by Hugging Face and by pop_ext, interleaved in one run.",
        epilog="Without --model: the demo model, and llama-3.2-1b with kernels, within three minutes on two cores.",
    )
    names = ", ".join(["demo", *SHAPES])
    p.add_argument("--model", nargs="+", help=f"shapes ({names}), directories or Hugging Face names")
    p.add_argument("--random-weights", action="store_true", help="read only the configs of --model")
    p.add_argument("--lengths", nargs="+", type=int, default=[512, 2048], help="tokens per sequence")
    p.add_argument("--batch", nargs="+", type=int, default=[1], help="batch sizes")
    p.add_argument("--dtype", default="bfloat16", choices=[*_DTYPES, *_SHORT], help="dtype of the weights")
    p.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    p.add_argument("--threads", type=int, help="threads of torch and of the kernels (default: torch's)")
    p.add_argument("--plan", nargs="+", action="extend", type=Path, default=[], help="plan files (Plan.save)")
    p.add_argument(
        "--omit",
        nargs="+",
        action="extend",
        default=[],
        help='omitted layers, such as "11-15" or "8,9,12-15"; each a plan',
    )
    p.add_argument(
        "--count", nargs="+", action="extend", type=int, default=[], help="omit the COUNT deepest layers; each a plan"
    )
    p.add_argument("--boundary", nargs="+", type=int, help="boundary rows; each adds arms")
    p.add_argument(
        "--calibrate",
        action="store_true",
        help="first find each plan's min_tokens among --lengths, and time the plan with it",
    )
    p.add_argument("--via", choices=VIA, default="enable", help="how native arms are called (default: enable)")
    p.add_argument("--repeats", type=int, default=11, help="timed rounds (default: 11)")
    p.add_argument("--warmup", type=int, default=2, help="untimed calls of each arm before the rounds (default: 2)")
    p.add_argument("--budget", type=float, help="seconds for the whole run; fewer rounds run if it is spent")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None, help="run the hf-compile arm")
    p.add_argument("--compile-mode", default="default", help="mode of torch.compile for hf-compile (default: default)")
    p.add_argument("--compile-lengths", nargs="+", type=int, help="lengths that hf-compile runs at (default: all)")
    p.add_argument(
        "--tune",
        nargs="+",
        action="extend",
        default=[],
        help='backend options, such as "gemm_blocks=0" or "early_launch=1,sdpa_rows=0"; each adds arms',
    )
    p.add_argument("--fp8", action="store_true", help="add native arms with products in 8-bit floats")
    p.add_argument("--int8", action="store_true", help="add native arms with products in 8-bit integers (CPU)")
    p.add_argument("--cuda-graphs", action="store_true", help="add native arms that run as CUDA graphs (CUDA)")
    p.add_argument("--prepack", action="store_true", help="add native arms with prepacked weights (CPU)")
    p.add_argument("--profile", action="store_true", help="profile native prefills stage by stage")
    p.add_argument("--kernels", action=argparse.BooleanOptionalAction, default=None, help="measure the kernel table")
    p.add_argument("--cases", action=argparse.BooleanOptionalAction, default=True, help="run the comparisons")
    p.add_argument("--json", type=Path, help="where to save (default: bench/results/local-<time>.json)")
    p.add_argument("--quiet", action="store_true", help="no progress on stderr")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the bench. Return 0; 1 if an arm, a kernel or a model failed; 2 for bad arguments."""
    argv = sys.argv[1:] if arguments is None else list(arguments)
    options = parser().parse_args(argv)
    problem = _problem(options)
    if problem:
        print(f"bench/run.py: error: {problem}", file=sys.stderr)
        return 2
    if options.threads:
        torch.set_num_threads(options.threads)
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    run = Run(options, argv)
    run.auto() if options.model is None else run.asked()
    return run.finish()


def _problem(options: argparse.Namespace) -> str | None:
    for name, least in (("lengths", 2), ("batch", 1), ("boundary", 1)):
        if any(value < least for value in getattr(options, name) or []):
            return f"--{name}: expected integers from {least}, got {getattr(options, name)}"
    for name, least in (("repeats", 1), ("warmup", 1), ("threads", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            return f"--{name}: expected at least {least}, got {value}"
    if options.device.partition(":")[0] not in ("cpu", "cuda"):
        return f"--device: expected cpu or cuda, got {options.device}"
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        return "--device: this torch finds no CUDA device"
    try:
        for text in options.tune:
            parse_options(text)
    except ValueError as error:
        return str(error)
    if options.calibrate and (options.via != "enable" or options.model is None):
        return "--calibrate: expected --model, and --via enable, the only way that respects min_tokens"
    if not options.device.startswith("cuda"):
        if options.cuda_graphs:
            return f"--cuda-graphs: expected --device cuda, got {options.device}"
        unknown = {name for text in options.tune for name in parse_options(text)} - {"gemm_blocks"}
        if unknown:
            return f"--tune: expected gemm_blocks, or --device cuda, got {', '.join(sorted(unknown))}"
    return None


class Run:
    """A run of the bench: options, start time and results."""

    def __init__(self, options: argparse.Namespace, argv: list[str]) -> None:
        self.started = time.monotonic()
        self.options = options
        self.device = torch.device(options.device)
        self.dtype = _DTYPES[_SHORT.get(options.dtype, options.dtype)]
        self.failed = False
        self._rate: float | None = None
        self._paying: dict[tuple[str, Plan], int] = {}
        facts = environment(self.device)
        print(report.environment_text(facts))
        self.report: dict[str, Any] = {
            "schema": report.SCHEMA,
            "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "arguments": argv,
            "environment": facts,
            "cases": [],
            "kernels": [],
            "profiles": [],
            "left_out": [],
            "failed_models": [],
        }

    def left(self, budget: float | None, share: float = 1.0) -> float | None:
        """Return a share of the seconds that are left of the budget; None without a budget."""
        return None if budget is None else max(0.0, share * (budget - (time.monotonic() - self.started)))

    def asked(self) -> None:
        """Run the models, cases, kernels and profiles that the arguments name."""
        options = self.options
        compiled = options.compile_mode if options.compile else None
        if options.cases and not compiled:
            print("hf-compile is left out; --compile includes it (minutes of compiling for each length)")
        shapes = [(batch, tokens) for tokens in options.lengths for batch in options.batch]
        cases = shapes if options.cases else []
        each = len(cases) + bool(options.kernels) + bool(options.profile)
        for index, name in enumerate(options.model):
            model = self.load(name)
            if model is None:
                continue
            to_do = each * (len(options.model) - index)  # the rest of the budget is divided equally
            if options.kernels:
                self.kernels(model, options.lengths, self.left(options.budget, 1 / to_do))
                to_do -= 1
            if options.profile:
                for batch, tokens in shapes:
                    if self.fits(model, batch, tokens, self.left(options.budget, 1 / to_do)):
                        for products in (None, *(name for name in ("fp8", "int8") if getattr(options, name))):
                            self.profile(model, batch, tokens, products)
                to_do -= 1
            for batch, tokens in cases:
                mode = compiled if tokens in (options.compile_lengths or [tokens]) else None
                budget = self.left(options.budget, 1 / to_do)
                if self.fits(model, batch, tokens, budget):
                    self.case(model, batch, tokens, mode, budget)
                to_do -= 1
            if cases:
                print("\n" + report.length_text(self.report["cases"], model.name), flush=True)
            self.release(model)

    def auto(self) -> None:
        """Run a selection that ends within three minutes on two cores: quick cases first, then those that fit."""
        options = self.options
        budget = options.budget or _AUTO_BUDGET
        print(f"no --model: the demo model, then llama-3.2-1b, within about {budget:.0f} s")
        compiled = options.compile_mode if options.compile else None
        if not compiled:
            print("hf-compile is left out, its compile time does not fit; --compile includes it")
        slow = False
        demo = self.load("demo")
        if demo is not None:
            before = time.monotonic()
            self.case(demo, 1, 512, compiled, self.left(budget, 0.07))
            slow = time.monotonic() - before > _SLOW
            if not slow:
                self.case(demo, 1, 1024, compiled, self.left(budget, 0.1))
            self.release(demo)
        if slow:
            print("this machine is slow or busy: demo at 1024 tokens and kernels at 2048 are left out")
        large = self.load("llama-3.2-1b")
        if large is None:
            return
        if options.kernels is not False:
            self.kernels(large, [512] if slow else [512, 2048], self.left(budget, 0.2))
        tokens = self.fitting_length(large, self.left(budget) or 0.0)
        if tokens < _AUTO_LENGTHS[0]:
            print(f"{_AUTO_LENGTHS[0]} tokens would take too long here: {tokens}")
        self.case(large, 1, tokens, compiled, self.left(budget))
        self.release(large)

    def load(self, name: str) -> BenchModel | None:
        """Load a model. On failure print the reason and return None."""
        try:
            model = load_model(name, self.dtype, self.device, self.options.random_weights)
            describe(model.model)
            return model
        except (ValueError, OSError, RuntimeError) as error:
            failure = failed_model(name, error)
            print(f"\n{name} failed: {failure['failed']}")
            self.report["failed_models"].append(failure)
            self.failed = True
            return None

    def release(self, model: BenchModel) -> None:
        """Free a model's weights before the next one is loaded."""
        model.model = None
        torch.compiler.reset()
        gc.collect()
        release_memory(self.device)

    def plans(self, model: BenchModel) -> list[Plan]:
        """Return the plans that the arguments name, else the model's preset or its deepest third.

        Raises:
            ValueError: a file holds no plan, or a plan for another depth.
        """
        options, config = self.options, model.model.config
        depth = config.num_hidden_layers
        plans = [Plan.load(path) for path in options.plan]
        plans += [Plan(depth, parse_layers(text)) for text in options.omit]
        plans += [Plan.last(depth, count=count) for count in options.count]
        plans = plans or [preset_or_third(config)]
        if options.boundary:
            plans = [plan.replace(boundary=boundary) for plan in plans for boundary in options.boundary]
        if options.calibrate:
            return [plan.replace(min_tokens=self.paying(model, plan)) for plan in plans]
        return [plan.replace(min_tokens=0) for plan in plans]  # plans are timed at every length

    def paying(self, model: BenchModel, plan: Plan) -> int:
        """Return the shortest of the run's lengths at which a plan is faster; beyond the longest if it never is."""
        if (model.name, plan) not in self._paying:
            batch, longest = min(self.options.batch), max(self.options.lengths)
            found = shortest_paying(model.model, plan, self.options.lengths, batch=batch)
            self._paying[model.name, plan] = longest + 1 if found is None else found
            print(f"{model.name}, {layers_text(plan)}: min_tokens {self._paying[model.name, plan]}", flush=True)
        return self._paying[model.name, plan]

    def case(self, model: BenchModel, batch: int, tokens: int, compiled: str | None, budget: float | None) -> None:
        """Run one case, print it and add it to the report."""
        options = self.options
        tunings = tuple(parse_options(text) for text in options.tune)
        copies = tuple(name for name in ("fp8", "int8", "prepack") if getattr(options, name))
        settings = Settings(
            options.repeats,
            options.warmup,
            compiled,
            options.via,
            tunings,
            copies,
            options.cuda_graphs,
            quiet=options.quiet,
        )
        try:
            spec, plans = describe(model.model).spec, self.plans(model)
            case = run_case(model, spec, batch, tokens, plans, settings, budget, make_arms)
        except (ValueError, OSError, RuntimeError) as error:
            self.fail(model, f"{tokens} tokens, batch {batch}", error)
            return
        print("\n" + report.case_text(case), flush=True)
        self.report["cases"].append(report.case_json(case))
        self.failed |= _has_failure(case)

    def kernels(self, model: BenchModel, lengths: list[int], budget: float | None) -> None:
        """Measure the kernel table, print it and add it to the report."""
        options = self.options
        try:
            native = load(model.model, self.plans(model)[0])
            found = measure_kernels(model.name, native, lengths, options.repeats, budget, options.quiet)
        except (ValueError, OSError, RuntimeError) as error:
            self.fail(model, "kernels", error)
            return
        print("\n" + report.kernel_text(found), flush=True)
        self.report["kernels"].append(report.kernel_json(found))
        self.failed |= any(row.failed is not None for row in found.rows)

    def profile(self, model: BenchModel, batch: int, tokens: int, products: str | None) -> None:
        """Profile native-full and every plan by stages, print the profiles and add them to the report."""
        try:
            spec = describe(model.model).spec
            ids = torch.randint(0, spec.vocab_size, (batch, tokens), generator=torch.Generator().manual_seed(0))
            plans = [Plan(spec.num_layers, ()), *self.plans(model)]
            found = profile_plans(model.model, ids.to(self.device), plans, products=products)
        except (ValueError, OSError, RuntimeError) as error:
            kind = f" {products}" if products else ""
            self.fail(model, f"profile{kind}, {tokens} tokens, batch {batch}", error)
            return
        print("\n" + "\n\n".join(profile_text(item) for item in found), flush=True)
        dtype = str(self.dtype).removeprefix("torch.")
        self.report["profiles"] += profile_json(model.name, dtype, found)

    def fits(self, model: BenchModel, batch: int, tokens: int, budget: float | None) -> bool:
        """Return whether the fewest rounds of a case fit the budget; if not, print that the case is left out."""
        if budget is None:
            return True
        spec, plans = describe(model.model).spec, self.plans(model)
        stock = stock_flops(spec, batch, tokens)
        arms = [stock, *(plan_flops(spec, plan, batch, tokens) for plan in (Plan(spec.num_layers, ()), *plans))]
        calls = self.options.warmup + FEWEST_REPEATS
        needed = calls * _OVERHEAD * sum(arms) / self.rate(spec)
        if needed <= budget:
            return True
        what = f"{model.name}, batch {batch}, {tokens} tokens"
        print(f"\n{what}: left out, it would take {needed:.0f} s and {budget:.0f} s are left for it")
        self.report["left_out"].append({"case": what, "needed_s": needed, "budget_s": budget})
        return False

    def rate(self, spec: Any) -> float:
        """Return FLOP/s of one of the model's matrix products, measured at the first call."""
        if self._rate is None:
            probe = make_gemm("probe", 512, spec.intermediate_size, spec.hidden_size, self.dtype, self.device)
            probe.warm_up()
            clock = WallClock(self.device)
            seconds = min((clock.time(probe.run) for _ in range(3)), default=1.0) if not probe.failed else 1.0
            self._rate = probe.flops / seconds
        return self._rate

    def fail(self, model: BenchModel, what: str, error: Exception) -> None:
        """Print a failure and add it to the report."""
        failure = failed_model(f"{model.name}, {what}", error)
        print(f"\n{failure['model']} failed: {failure['failed']}")
        self.report["failed_models"].append(failure)
        self.failed = True

    def fitting_length(self, model: BenchModel, seconds: float) -> int:
        """Return the longest of a few prompt lengths whose rounds should take at most ``seconds``, else the shortest.

        The time is estimated from the rate of a matrix product.
        """
        spec, plans = describe(model.model).spec, self.plans(model)
        rate = self.rate(spec)
        rounds = self.options.warmup + MIN_REPEATS
        for tokens in _AUTO_LENGTHS:
            flops = stock_flops(spec, 1, tokens) + sum(
                plan_flops(spec, plan, 1, tokens) for plan in (Plan(spec.num_layers, ()), *plans)
            )
            if rounds * _OVERHEAD * flops / rate <= seconds:
                return tokens
        return _AUTO_LENGTHS[-1]

    def finish(self) -> int:
        """Save the report, and return the exit status."""
        self.report["seconds"] = round(time.monotonic() - self.started, 1)
        stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
        path = self.options.json or RESULTS / f"local-{stamp}.json"
        report.write_json(path, self.report)
        print(f"\n{self.report['seconds']:.0f} s; every sample is in {path}")
        return 1 if self.failed else 0


def _has_failure(case: Case) -> bool:
    return any(arm.failed is not None for arm in case.arms)


def parse_options(text: str) -> dict[str, int]:
    """Parse backend options: "early_launch=1,sdpa_rows=0" -> ``{"early_launch": 1, "sdpa_rows": 0}``.

    Raises:
        ValueError: the text has another form.
    """
    options = {}
    for part in text.split(","):
        name, sign, value = part.strip().partition("=")
        if not name or not sign or not value.isdigit():
            raise ValueError(f'--tune: expected options such as "early_launch=1,sdpa_rows=0", got {text!r}')
        options[name] = int(value)
    return options
