"""One prompt, prefilled by the stock model, natively in full, and pruned: time, text and likelihood side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from pop_ext import _core
from pop_ext.hf.compat import cache_of, with_cache
from pop_ext.hf.native_model import load
from pop_ext.plans.plan import Plan

# Given the number of wanted rows: ids [1, T] -> logits [1, rows, vocab] and the filled cache.
Prefill = Callable[[torch.Tensor, int], tuple[torch.Tensor, Any]]

WARM_UPS = 2
STOCK, FULL, PRUNED = "Hugging Face full", "native full", "POP"


class Prompt(NamedTuple):
    """A text cut in two: what the model reads, and what truly follows."""

    context: list[int]
    truth: list[int]


@dataclass
class Arm:
    """One way to prefill, and what came of it.

    Attributes:
        flops: of its prefill of the prompt, by the cost model.
        seconds: time to first token of each repeat: prefill and the choice of the first token.
        continuation: greedy tokens after the prompt, decoded by the full model.
        log_likelihood: mean log-probability of the true continuation's tokens, in nats; None without one.
    """

    name: str
    prefill: Prefill
    flops: float
    seconds: list[float] = field(default_factory=list)
    continuation: list[int] = field(default_factory=list)
    log_likelihood: float | None = None

    @property
    def median(self) -> float:
        """Median time to first token in seconds."""
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class Comparison:
    """The arms of one prompt: stock, native full, pruned."""

    prompt: Prompt
    plan: Plan
    arms: list[Arm]

    def speedup(self, arm: int, baseline: int) -> float:
        """Measured: ratio of median times to first token."""
        return self.arms[baseline].median / self.arms[arm].median

    def ceiling(self, arm: int, baseline: int) -> float:
        """Ratio of FLOPs: what leaving out work alone can gain."""
        return self.arms[baseline].flops / self.arms[arm].flops

    def agreement(self, arm: int) -> int:
        """How many leading tokens of the greedy continuation are those of the stock model."""
        pairs = zip(self.arms[0].continuation, self.arms[arm].continuation, strict=False)
        return next((i for i, (a, b) in enumerate(pairs) if a != b), len(self.arms[arm].continuation))


def split_prompt(
    ids: Sequence[int], continuation: int, prompt_tokens: int | None, limit: int | None, max_new_tokens: int = 0
) -> Prompt:
    """Cuts a text into prompt and true continuation.

    Args:
        ids: tokens of the whole text.
        continuation: tokens that are held back as the true continuation; 0: none.
        prompt_tokens: tokens of the prompt, from the start of the text. None: all before the continuation.
        limit: how many tokens the model takes; None: any number.
        max_new_tokens: how many it is to generate after the prompt.

    Raises:
        ValueError: the text is too short, or the limit too small.
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
) -> Comparison:
    """Runs the three arms on one prompt.

    Times are taken after two warm-up rounds, the arms in turn within each of ``repeats`` rounds. The plan is
    executed as given, whatever its ``min_tokens``.

    Args:
        model: a Hugging Face causal language model, not enabled.
        progress: called with a description before each of ``count_steps`` steps.

    Raises:
        UnsupportedModelError, ValueError: a model or plan without a native form.
    """
    ids = torch.tensor([prompt.context], device=model.device)
    arms = _arms(model, plan, ids.shape[1])
    comparison = Comparison(prompt, plan, arms)
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


def count_steps(prompt: Prompt, repeats: int) -> int:
    """How often ``compare`` calls ``progress``."""
    return 3 * (WARM_UPS + repeats + (2 if prompt.truth else 1))


def _arms(model: Any, plan: Plan, tokens: int) -> list[Arm]:
    full = load(model, Plan.last(plan.num_layers, count=0))
    pruned = load(model, plan)
    rows = [_core.SequenceShape(tokens, boundary=min(plan.boundary, tokens))]
    return [
        Arm(STOCK, _stock_prefill(model), _core.stock_cost(full.spec, rows)["flops"]),
        Arm(FULL, _native_prefill(full), _core.plan_cost(full.spec, full.plan, rows)["flops"]),
        Arm(PRUNED, _native_prefill(pruned), _core.plan_cost(pruned.spec, plan, rows)["flops"]),
    ]


def _stock_prefill(model: Any) -> Prefill:
    def prefill(ids: torch.Tensor, wanted: int) -> tuple[torch.Tensor, Any]:
        out = model(input_ids=ids, use_cache=True, logits_to_keep=wanted)
        return out.logits, cache_of(out)

    return prefill


def _native_prefill(native: Any) -> Prefill:
    def prefill(ids: torch.Tensor, wanted: int) -> tuple[torch.Tensor, Any]:
        # As in `score`: the boundary counts from the end of the prompt, a continuation runs at full depth.
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
    """Prefill, then plain decode steps of the full model; ends early at an end-of-sequence token."""
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
