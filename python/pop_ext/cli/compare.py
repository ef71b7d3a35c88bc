"""Time, text and likelihood of one prompt prefilled by the stock model, natively in full, and pruned.

Of a model without a native form: by the stock model, and pruned portably.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from pop_ext import _core
from pop_ext.hf.architectures import UnsupportedModelError
from pop_ext.hf.compat import cache_of, with_cache
from pop_ext.hf.decision import Products
from pop_ext.hf.enable import enable, enabled
from pop_ext.hf.load import load
from pop_ext.hf.loaded import check_runs_without_int8
from pop_ext.plans.plan import Plan
from pop_ext.utils.roofline import Peaks, measure_peaks

Prefill = Callable[[torch.Tensor, int], tuple[torch.Tensor, Any]]
"""Maps ids [1, T] and a number of last rows to their logits [1, rows, vocab] and the filled KV cache."""

WARM_UPS = 2
STOCK, FULL, PRUNED = "Hugging Face full", "native full", "POP"


class Prompt(NamedTuple):
    """Token ids of a text, split into the prompt and its true continuation."""

    context: list[int]
    truth: list[int]


@dataclass
class Arm:
    """One way to prefill, and its measurements.

    Attributes:
        name: Label in tables.
        prefill: Prefills a prompt.
        cost: FLOPs and bytes of prefilling the prompt, by the cost model; None for a model without a native form.
        products: "int8" or "fp8" if its products are in 8 bits; else None.
        seconds: Time to first token of each repeat: prefill and argmax of the last row.
        continuation: Greedy tokens after the prompt, decoded by the stock model.
        log_likelihood: Mean log-probability of the true continuation's tokens, in nats; None without a continuation.
    """

    name: str
    prefill: Prefill
    cost: dict[str, Any] | None
    products: Products | None = None
    seconds: list[float] = field(default_factory=list)
    continuation: list[int] = field(default_factory=list)
    log_likelihood: float | None = None

    @property
    def flops(self) -> float | None:
        """Return the FLOPs of prefilling the prompt; None if they are not known."""
        return None if self.cost is None else float(self.cost["flops"])

    @property
    def median(self) -> float:
        """Return the median time to first token in seconds."""
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class Comparison:
    """The arms of one prompt, in this order: stock, native full if the model has a native form, pruned.

    With 8-bit products, native full and pruned follow once more with these.

    Attributes:
        peaks: what the device reached in this run; None for a model without a native form.
    """

    prompt: Prompt
    plan: Plan
    arms: list[Arm]
    peaks: Peaks | None = None

    def speedup(self, arm: int, baseline: int) -> float:
        """Return the measured ratio of median times to first token."""
        return self.arms[baseline].median / self.arms[arm].median

    def ceiling(self, arm: int, baseline: int) -> float | None:
        """Return the ratio of FLOPs, which is the speed-up from omitted work alone; None where they are not known."""
        ours, theirs = self.arms[arm].flops, self.arms[baseline].flops
        return None if ours is None or theirs is None else theirs / ours

    def roofline(self, arm: int, baseline: int) -> float | None:
        """Return the ratio of least times by FLOPs and bytes at this run's peaks; None where they are not known.

        The peaks are those of the model's dtype, so nothing is known of 8-bit products.
        """
        costs = [self.arms[i].cost for i in (arm, baseline) if self.arms[i].products is None]
        if len(costs) < 2 or costs[0] is None or costs[1] is None or self.peaks is None:
            return None
        return self.peaks.roofline(costs[0], costs[1])

    def agreement(self, arm: int) -> int:
        """Return how many leading tokens of the greedy continuation equal those of the stock model."""
        pairs = zip(self.arms[0].continuation, self.arms[arm].continuation, strict=False)
        return next((i for i, (a, b) in enumerate(pairs) if a != b), len(self.arms[arm].continuation))


def split_prompt(
    ids: Sequence[int], continuation: int, prompt_tokens: int | None, limit: int | None, max_new_tokens: int = 0
) -> Prompt:
    """Split a text into a prompt and its true continuation.

    Args:
        ids: Token ids of the whole text.
        continuation: Number of tokens after the prompt that are its true continuation; 0 for none.
        prompt_tokens: Length of the prompt, from the start of the text. None: as long as text and model allow.
        limit: Longest sequence that the model takes, in tokens; None for no limit.
        max_new_tokens: Number of tokens to generate after the prompt, which must fit into ``limit``, too.

    Raises:
        ValueError: The text is too short, or the limit too small.
    """
    most, reason = len(ids) - continuation, f"the text has {len(ids)} tokens"
    if most < 1:
        raise ValueError(f"prompt: expected more than the {continuation} tokens of --continuation, got {len(ids)}")
    following = max(continuation, max_new_tokens)
    if limit is not None and limit - following < most:
        most, reason = limit - following, f"the model takes {limit} tokens"
    if most < 1:
        raise ValueError(
            f"--continuation, --max-new-tokens: expected fewer than the {limit} tokens that the model takes, "
            f"got {following}"
        )
    wanted = most if prompt_tokens is None else prompt_tokens
    if wanted > most:
        raise ValueError(f"--prompt-tokens: expected at most {most} ({reason}), got {wanted}")
    return Prompt(list(ids[:wanted]), list(ids[wanted : wanted + continuation]))


def compare(
    model: Any,
    prompt: Prompt,
    plan: Plan,
    repeats: int,
    max_new_tokens: int,
    progress: Callable[[str], None] = lambda stage: None,
    products: Products | None = None,
) -> Comparison:
    """Run the arms on one prompt.

    After two warm-up rounds each of ``repeats`` rounds times every arm once, in turn. The plan is executed as given,
    whatever its ``min_tokens``.

    Args:
        model: Hugging Face causal language model, not enabled.
        prompt: Prompt and true continuation.
        plan: Plan of the pruned arm.
        repeats: Number of timed rounds.
        max_new_tokens: Number of tokens to generate greedily after the prompt.
        progress: Called with a description before each of ``count_steps`` steps, or fewer.
        products: 8-bit products of two more arms; None for no such arms.

    Raises:
        UnsupportedModelError: Neither the native nor the portable backend runs the model, or the native one not with
            these products.
        ValueError: The plan does not fit the model.
    """
    ids = torch.tensor([prompt.context], device=model.device)
    arms = _arms(model, plan, ids.shape[1], products)
    peaks = measure_peaks(model.device, model.dtype) if arms[0].cost is not None else None
    comparison = Comparison(prompt, plan, arms, peaks)
    with torch.no_grad():
        for round_number in range(WARM_UPS + repeats):
            for arm in arms:
                progress(f"{arm.name}: {'timing' if round_number >= WARM_UPS else 'warm-up'}")
                seconds = _time_to_first_token(arm.prefill, ids)
                if round_number >= WARM_UPS:
                    arm.seconds.append(seconds)
        for arm in arms:
            progress(f"{arm.name}: {max_new_tokens} tokens")
            arm.continuation = _greedy(model, arm.prefill, ids, max_new_tokens)
            if prompt.truth:
                progress(f"{arm.name}: likelihood")
                arm.log_likelihood = _mean_log_likelihood(arm.prefill, ids, prompt.truth)
    return comparison


def count_steps(prompt: Prompt, repeats: int, products: Products | None = None) -> int:
    """Return how often ``compare`` calls ``progress`` for a model with a native form."""
    return (3 if products is None else 5) * (WARM_UPS + repeats + (2 if prompt.truth else 1))


def _arms(model: Any, plan: Plan, tokens: int, products: Products | None) -> list[Arm]:
    nothing = Plan.last(plan.num_layers, count=0)
    if products == "int8":
        check_runs_without_int8(model)
    try:
        full = load(model, nothing)
    except UnsupportedModelError:
        if products is not None:
            raise
        with enabled(model, plan):  # raises if neither backend runs the model
            return [Arm(STOCK, _stock_prefill(model), None), Arm(PRUNED, _portable_prefill(model, plan), None)]
    rows = [_core.SequenceShape(tokens, boundary=min(plan.boundary, tokens))]
    costs = {name: _core.plan_cost(full.spec, one, rows) for name, one in {FULL: nothing, PRUNED: plan}.items()}
    arms = [
        Arm(STOCK, _stock_prefill(model), _core.stock_cost(full.spec, rows)),
        Arm(FULL, _native_prefill(full), costs[FULL]),
        Arm(PRUNED, _native_prefill(load(model, plan)), costs[PRUNED]),
    ]
    for name, one in {FULL: nothing, PRUNED: plan}.items() if products else ():
        native = load(model, one, fp8=products == "fp8", int8=products == "int8")
        arms.append(Arm(f"{name}, {products}", _native_prefill(native), costs[name], products))
    return arms


def _stock_prefill(model: Any) -> Prefill:
    def prefill(ids: torch.Tensor, wanted: int) -> tuple[torch.Tensor, Any]:
        out = model(input_ids=ids, use_cache=True, logits_to_keep=wanted)
        return out.logits, cache_of(out)

    return prefill


def _portable_prefill(model: Any, plan: Plan) -> Prefill:
    views: dict[int, Any] = {}  # by boundary: copies that share modules and weights, enabled outside of what is timed

    def prefill(ids: torch.Tensor, wanted: int) -> tuple[torch.Tensor, Any]:
        boundary = min(plan.boundary - 1 + wanted, ids.shape[1])
        if boundary not in views:
            views[boundary] = copy.copy(model)
            executed = plan.replace(boundary=boundary, min_tokens=0)
            enable(views[boundary], executed, strict=wanted < ids.shape[1], backend="portable")
        return _stock_prefill(views[boundary])(ids, wanted)

    return prefill


def _native_prefill(native: Any) -> Prefill:
    def prefill(ids: torch.Tensor, wanted: int) -> tuple[torch.Tensor, Any]:
        # As in `score`, the boundary ends with the prompt, and the continuation after it runs through all layers.
        boundary = min(native.plan.boundary - 1 + wanted, ids.shape[1])
        out = native.prefill(ids, boundary=boundary, logits_to_keep=wanted)
        return out.logits, out.past_key_values

    return prefill


def _time_to_first_token(prefill: Prefill, ids: torch.Tensor) -> float:
    start = time.perf_counter()
    logits, _ = prefill(ids, 1)
    logits[0, -1].argmax().item()
    return time.perf_counter() - start


def _greedy(model: Any, prefill: Prefill, ids: torch.Tensor, count: int) -> list[int]:
    """Prefill, then decode up to ``count`` tokens with the stock model; stop after an end-of-sequence token."""
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    tokens: list[int] = []
    logits, cache = prefill(ids, 1)
    while len(tokens) < count:
        token = logits[:, -1].argmax(-1, keepdim=True)
        tokens.append(int(token))
        if tokens[-1] in ends or len(tokens) == count:
            break
        logits = model(input_ids=token, **with_cache(model, cache), use_cache=True, logits_to_keep=1).logits
    return tokens


def _mean_log_likelihood(prefill: Prefill, ids: torch.Tensor, truth: list[int]) -> float:
    target = torch.tensor(truth, device=ids.device)
    logits, _ = prefill(torch.cat([ids, target[None, :-1]], dim=1), len(truth))
    return float(logits[0].float().log_softmax(-1).gather(1, target[:, None]).mean())
