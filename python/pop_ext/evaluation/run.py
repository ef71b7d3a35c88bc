"""``evaluate``: run every arm over every set of prompts and record each prompt's samples."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from pop_ext import env_info
from pop_ext.evaluation.arms import DEFAULT_KINDS, FITTED, FULL, POP, Arm, backend_of, make_arms
from pop_ext.evaluation.prompts import PromptSet
from pop_ext.evaluation.results import SCHEMA, Evaluation
from pop_ext.evaluation.states import FullStates
from pop_ext.evaluation.turns import SECOND_TURN_KINDS, set_logits
from pop_ext.hf.loaded import check_option_supported
from pop_ext.hf.modules import find_decoder_modules, input_device, rope_follows_length
from pop_ext.hf.native_model import check_plan
from pop_ext.hf.weight_map import describe
from pop_ext.methods.calibration import check_vocabulary, stock_evaluation, stock_model
from pop_ext.plans.origin import config_hash, public_name, weights_hash
from pop_ext.plans.plan import Plan
from pop_ext.utils.divergence import kl_divergence
from pop_ext.utils.progress import Progress, reporting

DIGITS = 5
"""Decimal digits that are kept of a sample."""


def evaluate(
    model: Any,
    sets: Sequence[PromptSet],
    plans: Sequence[Plan],
    *,
    kinds: Sequence[str] = DEFAULT_KINDS,
    greedy_tokens: int = 16,
    batch_size: int = 8,
    reuse_states: bool = False,
    resume: str | PathLike[str] | None = None,
    progress: Progress = False,
) -> Evaluation:
    """Measure what each plan, and each of its ablations, costs on prompts with a known continuation.

    For every prompt this measures the loss of its continuation, the loss of the first token, the KL divergence from the
    full model over the continuation, and the leading share of the full model's greedy continuation that an arm keeps.
    The arm does not generate for that: its greedy continuation equals the full model's for as long as each token is the
    most probable one after the tokens before it. The plans' ``min_tokens`` is ignored.

    The full model's logits of one set at a time are held in memory: [prompts, continuation, vocab] in its dtype.

    Args:
        model: Hugging Face causal language model with eager or sdpa attention, enabled or not. It is left unchanged.
            Without a native form, ``pop`` runs portably.
        sets: Sets of prompts from ``text_sets``, ``recall_sets``, ``retrieval_sets`` and ``second_turn_sets``, at least
            one. Second turns are measured for ``full``, ``pop``, ``pop-fitted`` and ``dropped``.
        plans: Plans. Each makes an arm of every kind.
        kinds: Kinds of arms from ``KINDS``. The full model is always measured.
        greedy_tokens: Length of the greedy continuations; 0 for none.
        batch_size: Prompts per forward. It changes memory, not results.
        reuse_states: Run the full model once per set of prompts, and compute ``full``, ``pop`` and ``pop-fitted`` from
            its states by the reference. An arm then costs its omitted layers alone, not a prefill. It takes prompts *
            tokens * hidden values of memory on the CPU for each first omitted layer.
        resume: JSON file that takes the state after each arm of each set. What it already holds is not measured again.
        progress: True for a progress bar, or a callback that takes (arms of sets done, their number).

    Returns:
        The samples of every set and arm.

    Raises:
        ValueError: An argument has a bad value, or an id is outside the vocabulary. A plan is for another model. The
            file of ``resume`` is of another model, other prompts or another number of greedy tokens. An fp8 or
            int8 kind is asked for, and the model cannot have such products.
        TypeError: An argument has the wrong type.
    """
    model = stock_model(model)
    if not sets:
        raise ValueError("sets: expected at least one set of prompts, got none")
    if isinstance(greedy_tokens, bool) or not isinstance(greedy_tokens, int) or greedy_tokens < 0:
        raise ValueError(f"greedy_tokens: expected an int from 0, got {greedy_tokens!r}")
    for prompts in sets:
        for pair in (*prompts.first_turns, *prompts.pairs):
            check_vocabulary("sets", torch.cat(list(pair)), model, tokenized=True)
    arms = make_arms(plans, kinds)
    for plan in plans:  # ablations are plain PyTorch, which would accept any plan
        check_plan(plan, model.config.get_text_config().num_hidden_layers, model.config)
    if reuse_states:
        try:
            find_decoder_modules(model)
        except ValueError as error:
            raise ValueError(f"reuse_states: expected a model that the oracle runs, got {error}") from error
    backend = "reference" if reuse_states else backend_of(model)
    for products in {arm.products for arm in arms} - {None}:
        check_option_supported(str(products), describe(model))  # fail now rather than after hours of other arms
    evaluation = Evaluation(_facts(model, sets, greedy_tokens, backend))
    if resume is not None and Path(resume).exists():
        evaluation.take(Evaluation.load(resume), str(resume))
    with reporting(progress, "evaluating", len(sets) * len(arms)) as advance:
        for number, prompts in enumerate(sets):
            wanted = [arm for arm in arms if not prompts.first_turns or arm.kind in SECOND_TURN_KINDS]
            missing = [arm for arm in wanted if not evaluation.has(number, arm)]
            layers = {layer for arm in missing if arm.kind in (POP, FITTED) for layer in arm.plan.omit[:1]}
            run = _Prompts(model, prompts, batch_size, backend, layers if reuse_states else None)
            greedy: _Prompts | None = None
            full: dict[int, Tensor] = {}
            for arm in arms:
                if arm in missing:
                    if greedy is None and not prompts.has_answers and greedy_tokens:
                        greedy = run.greedy(greedy_tokens)
                    full = full or {index: rows.cpu() for index, rows in run.logits(arms[0])}
                    evaluation.add(number, arm, _measure(run, arm, greedy, full))
                    if resume is not None:
                        evaluation.save(resume)
                advance(1)
    return evaluation


def _facts(model: Any, sets: Sequence[PromptSet], greedy_tokens: int, backend: str) -> dict[str, Any]:
    """Return the ``facts`` of an evaluation: model, versions, hardware and sets of prompts."""
    installed, name = env_info.installation(), getattr(model.config, "_name_or_path", None)
    digest = hashlib.sha256(" ".join([*(prompts.digest for prompts in sets), str(greedy_tokens)]).encode())
    return {
        "schema": SCHEMA,
        "model": public_name(name) if name else None,
        "config_hash": config_hash(model.config),
        "weights": weights_hash(model),
        "num_layers": model.config.get_text_config().num_hidden_layers,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "backend": backend,
        "environment": {
            "processor": env_info.processor(),
            "hardware": env_info.hardware(model.device, model.dtype),
            "system": platform.system(),
            "threads": torch.get_num_threads(),
            **{name: installed[name] for name in ("pop_ext", "torch", "transformers", "python", "cpu_isa")},
        },
        "greedy_tokens": greedy_tokens,
        "digest": digest.hexdigest(),
        "sets": [{"kind": s.kind, "length": s.length, "prompts": len(s.pairs)} for s in sets],
    }


class _Prompts:
    """A set of prompts, and what computes the logits of arms on them.

    Args:
        model: Stock model.
        prompts: The set.
        batch_size: Prompts per forward.
        backend: As of ``backend_of``, for arms that do not run from states.
        layers: First omitted layers of all arms, to run these from states of the full model; None to run each arm by
            itself.
    """

    def __init__(
        self, model: Any, prompts: PromptSet, batch_size: int, backend: str, layers: Collection[int] | None
    ) -> None:
        self.model, self.prompts, self.batch_size = model, prompts, batch_size
        self.backend, self.layers = backend, layers
        self._states: FullStates | None = None

    def _turns_run_apart(self) -> bool:
        """Return whether a first turn has other states in a call of its own, because RoPE follows the length."""
        return bool(self.prompts.first_turns) and rope_follows_length(find_decoder_modules(self.model).rotary)

    def logits(self, arm: Arm) -> Iterator[tuple[int, Tensor]]:
        """Yield the index of each prompt and the logits [n, vocab] of its continuation, in any order."""
        if self.layers is None or arm.kind not in (FULL, POP, FITTED) or self._turns_run_apart():
            backend = "native" if arm.kind == FULL else self.backend
            yield from set_logits(self.model, arm, self.prompts, self.batch_size, backend)
            return
        if self._states is None:
            pairs, first_turns = self.prompts.pairs, self.prompts.first_turns
            self._states = FullStates(self.model, pairs, self.layers, self.batch_size, first_turns=first_turns)
        yield from self._states.logits(arm.plan)

    def greedy(self, tokens: int) -> _Prompts:
        """Return the same prompts with the full model's greedy continuations of at most ``tokens`` tokens."""
        prompts = _greedy(self.model, self.prompts, tokens)
        return _Prompts(self.model, prompts, self.batch_size, self.backend, self.layers)


def _greedy(model: Any, prompts: PromptSet, tokens: int) -> PromptSet:
    """Return the prompts with the full model's greedy continuations, each up to its end-of-sequence token."""
    found = []
    device = input_device(model)
    with stock_evaluation(model), torch.no_grad(), _plain_generation(model):
        for context, _ in prompts.pairs:
            ids = context[None].to(device)
            options = {"max_new_tokens": tokens, "do_sample": False, "num_beams": 1, "return_dict_in_generate": False}
            made = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
            found.append((context, made[0, len(context) :].cpu()))
    return PromptSet(prompts.kind, prompts.length, tuple(found))


@contextmanager
def _plain_generation(model: Any) -> Iterator[None]:
    """Reduce the checkpoint's generation config to its special tokens while the block runs.

    A penalty, a suppressed token or a minimum length would give other tokens than the most probable ones. Passing a
    config to ``generate`` is not enough: it fills every unset member from the model's own config.
    """
    own = model.generation_config
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    model.generation_config = GenerationConfig(**{name: getattr(own, name, None) for name in names})
    try:
        yield
    finally:
        model.generation_config = own


def _measure(run: _Prompts, arm: Arm, greedy: _Prompts | None, full: dict[int, Tensor]) -> dict[str, list[float]]:
    """Measure one arm on one set of prompts.

    Args:
        run: The set.
        arm: The arm.
        greedy: The prompts with the full model's greedy continuations, or None.
        full: Index of each prompt -> the full model's logits of its continuation, [n, vocab].

    Returns:
        Measure -> one value per prompt: "loss", "first" and "kl" in nats per token, and "exact" for prompts with
        answers or "agreement" for others with greedy continuations.
    """
    prompts, count = run.prompts, len(run.prompts.pairs)
    loss, first, kl, exact, agreement = ([0.0] * count for _ in range(5))
    measured = full.items() if arm.kind == FULL else run.logits(arm)
    for index, rows in measured:
        target = prompts.pairs[index][1].to(rows.device)
        log_p = rows.float().log_softmax(-1)
        losses = -log_p.gather(1, target[:, None])[:, 0].double()
        loss[index], first[index] = round(float(losses.mean()), DIGITS), round(float(losses[0]), DIGITS)
        exact[index] = float((log_p.argmax(-1) == target).all())
        if arm.kind != FULL:
            log_full = full[index].to(rows.device).float().log_softmax(-1)
            kl[index] = round(float(kl_divergence(log_full, log_p).double().mean()), DIGITS)
    found = {"loss": loss, "first": first, "kl": kl}
    if prompts.has_answers:
        return {**found, "exact": exact}
    if greedy is None:
        return found
    if arm.kind == FULL:  # the greedy continuation is its own
        return {**found, "agreement": [1.0] * count}
    for index, rows in greedy.logits(arm):
        same = (rows.argmax(-1).cpu() == greedy.prompts.pairs[index][1]).tolist()
        leading = same.index(False) if False in same else len(same)
        agreement[index] = round(leading / len(same), DIGITS)
    return {**found, "agreement": agreement}
