"""Start the engines, check that their results agree, and time them in turn."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pop_ext
import torch
from pop_ext import _core
from pop_ext.plans.plan import Plan
from pop_ext.utils.progress import ProgressBar

from bench.arms import HF_EAGER, plan_flops, plan_name, stock_flops
from bench.engines.catalogue import HERE, PEERS, Peer
from bench.engines.environments import InstallError, venv_python
from bench.engines.process import Child, ChildError
from bench.measure import MIN_REPEATS, Timed, interleave
from bench.memory import available_bytes

KEPT = 20
"""Number of log-probabilities that are compared: those of an engine's most probable tokens."""
LARGEST_ERROR = 0.1  # of `logits_error` at full depth; rounding stays far below it
LARGEST_ERROR_QUANTISED = {8: 0.4, 4: 2.0}
"""The same by the bits of quantised weights, on random weights, which suffer most from rounding.

The shape of Llama-3.2-1B gave up to 0.15 with 8 bits (products of oneDNN without VNNI), and 1.14 with 4 bits (Q4_0 of
llama.cpp; six layers gave 0.45, and 0.42 in a simulation of its rounding). Logits of another model give 3 to 4. So with
4 bits only a grossly wrong conversion or kernel is noticed.
"""
INT8 = "int8"
_HERE = Peer(HERE, "bench.engines.here", (), memory=1.5)
_HERE_WITH_COPIES = 2.2  # `Peer.memory` with the int8 copies of native-full and of a plan beside 16-bit weights
OURS = {HERE, *(name for name, peer in PEERS.items() if peer.pop_ext)}
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Engines:
    """Settings of a comparison.

    Attributes:
        options: options of the command line.
        model: name of the model.
        origin: source of the weights.
        spec: shape of the model.
        plans: plans of the pruned arms.
        home: folder of the saved weights and of their conversions.
        size: bytes of the weights.
        cpus: processors that every engine uses, one thread on each.
    """

    options: argparse.Namespace
    model: str
    origin: str
    spec: _core.ModelSpec
    plans: tuple[Plan, ...]
    home: Path
    size: int
    cpus: list[int]


@dataclass(kw_only=True)
class PeerArm(Timed):
    """One way to prefill.

    Attributes:
        peer: name of its engine.
        what: the call in words.
        flops: FLOPs of one prefill by the cost model.
        full_depth: whether its result should equal the stock model's, up to rounding.
        bits: bits of an element of its quantised weights; None: the weights keep their dtype.
        warmup: seconds of the prefills before the timed ones; the first may compile.
        error: `logits_error` relative to hf-eager.
        same_token: whether its most probable token is hf-eager's.
        peak: peak memory of its process during a prefill, in bytes.
    """

    peer: str
    what: str
    flops: float
    full_depth: bool
    bits: int | None = None
    warmup: tuple[float, ...] = ()
    error: float | None = None
    same_token: bool | None = None
    peak: int | None = None


@dataclass
class Started:
    """An engine that has loaded the weights.

    Attributes:
        arms: name -> the call in words.
        versions: versions of its packages.
        bits: as of its `Peer`.
        resident: bytes resident after loading.
        seconds: time of loading, conversion included.
    """

    peer: str
    child: Child
    arms: dict[str, str]
    versions: dict[str, str]
    bits: int | None
    resident: int | None
    seconds: float


@dataclass
class PeerCase:
    """All arms at one length; ``missing`` maps an engine without arms to the reason."""

    engines: Engines
    tokens: int
    arms: list[PeerArm]
    started: list[Started]
    missing: dict[str, str]
    rounds: int = 0
    warnings: list[str] = field(default_factory=list)


class Reported:
    """Clock for calls that return the seconds they took."""

    def time(self, call: Callable[[], Any]) -> float:
        return float(call())


def run_peers(
    engines: Engines, lengths: Sequence[int], repeats: int, warmup: int, budget: float | None = None
) -> list[PeerCase]:
    """Start every engine once, and run the arms of all engines in turn at each length."""
    cases: list[PeerCase] = []
    with ExitStack() as stack:
        started, missing = _start_all(engines, stack)
        for tokens in lengths:
            case = PeerCase(engines, tokens, _arms(engines, started, tokens), started, missing)
            run_case(case, repeats, warmup, budget)
            cases.append(case)
    return cases


def _start_all(engines: Engines, stack: ExitStack) -> tuple[list[Started], dict[str, str]]:
    """Start the engines; return those that run, and the reasons why others do not."""
    started: list[Started] = []
    missing: dict[str, str] = {}
    here = replace(_HERE, memory=_HERE_WITH_COPIES) if engines.options.int8 else _HERE
    for peer in (here, *(PEERS[name] for name in engines.options.peers)):
        try:
            started.append(_start(engines, peer, stack))
        except (InstallError, ChildError, OSError) as error:
            missing[peer.name] = " ".join(str(error).split())
            _say(engines, f"{peer.name}: not measured: {missing[peer.name]}")
    return started, missing


def _start(engines: Engines, peer: Peer, stack: ExitStack) -> Started:
    options = engines.options
    say = partial(_say, engines)
    package = Path(pop_ext.__file__).resolve().parent
    if peer.name == HERE:
        python, path = Path(sys.executable), package.parent
    else:
        python, path = venv_python(peer, options.folder.resolve(), torch.__version__, options.install, say), None
    wider = 1.0 if peer.bits is None else torch.bfloat16.itemsize / getattr(torch, options.dtype).itemsize
    needed, free = peer.memory * wider * engines.size, available_bytes(_CPU)
    if free is not None and needed > free:
        raise ChildError(f"it takes about {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free")
    work, shared = engines.home.resolve() / peer.name, engines.home.resolve() / peer.home
    for folder in (work, shared):
        folder.mkdir(parents=True, exist_ok=True)
    if peer.pop_ext:
        path = _alone(package, work / "path")
    say(f"{peer.name}: loading")
    begin = time.monotonic()
    child = Child(python, peer.module, engines.cpus, work / "log.txt", path and str(path))
    stack.callback(child.close)
    answer = child.ask(
        options.timeout,
        op="load",
        name=peer.name,
        weights=str(engines.home.resolve() / "weights"),
        work=str(work),
        shared=str(shared),
        dtype=options.dtype,
        threads=len(engines.cpus),
        max_tokens=max(options.lengths),
        options={
            "plans": [plan.to_json() for plan in engines.plans],
            "compile_mode": options.compile_mode if options.compile else None,
            "copies": [INT8] if options.int8 else [],
            **peer.options,
        },
    )
    seconds = time.monotonic() - begin
    return Started(peer.name, child, answer["arms"], answer["versions"], peer.bits, answer["resident"], seconds)


def _alone(package: Path, folder: Path) -> Path:
    """Make a folder with a link to the package alone, so that a venv does not see other packages beside it."""
    folder.mkdir(exist_ok=True)
    link = folder / package.name
    link.unlink(missing_ok=True)
    link.symlink_to(package)
    return folder


def _arms(engines: Engines, started: Sequence[Started], tokens: int) -> list[PeerArm]:
    spec = engines.spec
    plans = {plan_name(plan): plan for plan in engines.plans}
    arms = []
    for engine in started:
        for name, what in engine.arms.items():
            plan = plans.get(name.removeprefix("vllm ").removesuffix(f" {INT8}"), Plan(spec.num_layers, ()))
            bits = 8 if engine.peer == HERE and name.endswith(f" {INT8}") else engine.bits
            ours = engine.peer in OURS and not name.startswith("hf-")
            flops = plan_flops(spec, plan, 1, tokens) if ours else stock_flops(spec, 1, tokens)
            full = set(plan.omit) <= {spec.num_layers - 1}
            arms.append(PeerArm(name=name, peer=engine.peer, what=what, flops=flops, full_depth=full, bits=bits))
    return arms


def run_case(case: PeerCase, repeats: int, warmup: int, budget: float | None) -> None:
    """Warm up, check and time every arm of a case."""
    engines = case.engines
    vocabulary, generator = engines.spec.vocab_size, torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (case.tokens,), generator=generator).tolist()
    children = {engine.peer: engine.child for engine in case.started}
    deadline = None if budget is None else time.monotonic() + budget
    title = f"{engines.model}, {case.tokens} tokens"
    with ProgressBar(title, len(case.arms) * (1 + repeats), quiet=engines.options.quiet) as bar:
        bar.log(title)
        reference: dict[int, float] | None = None
        for arm in case.arms:
            ask = partial(children[arm.peer].ask, engines.options.timeout, arm=arm.name, ids=ids)
            arm.call = lambda ask=ask: ask(op="time")["seconds"]
            found = arm.attempt(partial(_warm_up, arm, ask, warmup))
            if arm.name == HF_EAGER:
                reference = found
            elif found is not None and reference is not None:
                _check(arm, found, reference)
            bar.advance(label=f"{arm.name}, warm-up")
            if arm.failed:
                bar.log(f"  {arm.name} failed: {arm.failed}")
        case.rounds = interleave(
            case.arms, Reported(), repeats, deadline, step=lambda item: bar.advance(label=item.name)
        )
    if case.rounds < MIN_REPEATS:
        case.warnings.append(f"only {case.rounds} repeats, fewer than {MIN_REPEATS}: indicative figures")
    if reference is None:
        case.warnings.append(f"{HF_EAGER} has failed: nothing was checked against it")


def _warm_up(arm: PeerArm, ask: Callable[..., dict[str, Any]], calls: int) -> dict[int, float]:
    """Call an arm untimed; return its log-probabilities."""
    for _ in range(calls):
        arm.warmup = (*arm.warmup, ask(op="time")["seconds"])
    answer = ask(op="check", keep=None if arm.name == HF_EAGER else KEPT)
    arm.peak = answer["peak"]
    return {int(token): float(value) for token, value in answer["log_probs"]}


def _check(arm: PeerArm, found: dict[int, float], reference: dict[int, float]) -> None:
    """Set an arm's error, and mark it as failed if it computes something else than hf-eager."""
    arm.error = logits_error(found, reference)
    arm.same_token = max(found, key=found.__getitem__) == max(reference, key=reference.__getitem__)
    if arm.full_depth and not arm.error <= largest_error(arm.bits):
        arm.failed = f"its log-probabilities differ from {HF_EAGER}'s by {100 * arm.error:.1f} % (RMS), at full depth"


def largest_error(bits: int | None) -> float:
    """Return the largest `logits_error` that an arm at full depth may have; ``bits``: see `PeerArm`."""
    return LARGEST_ERROR if bits is None else LARGEST_ERROR_QUANTISED[bits]


def logits_error(found: dict[int, float], reference: dict[int, float]) -> float:
    """Return the RMS difference of log-probabilities over the tokens of ``found``.

    It is relative to the standard deviation of all log-probabilities of the reference: 0 for equal logits, about 1 or
    more for those of another model.
    """
    mean = sum(reference.values()) / len(reference)
    variance = sum((value - mean) ** 2 for value in reference.values()) / len(reference)
    squares = [(value - reference[token]) ** 2 for token, value in found.items()]
    return math.sqrt(sum(squares) / len(squares) / variance)


def _say(engines: Engines, text: str) -> None:
    if not engines.options.quiet:
        print(text, file=sys.stderr, flush=True)
