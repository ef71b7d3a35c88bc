"""Survey Prefill-Only Pruning over one architecture, for `architectures.py`: build, run, compare with an oracle."""

from __future__ import annotations

import inspect
import time
import traceback
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pop_ext
import torch
import transformers
from tiny_models import FIRST_SPECIAL_TOKEN, build, tiny_config

TOKENS = 23
"""Length of the prompt, which is the size of no other axis."""
NEW_TOKENS = 8
TOLERANCE = 1e-4

DECODERS = ("evolla", "gpt_neox", "gpt_neox_japanese")
"""Decoders whose config says `is_decoder=False`."""


@dataclass
class Row:
    """Report one architecture.

    Attributes:
        name: as transformers calls it.
        model_class: name of the class.
        outcome: "native", "portable" or "stock", whichever ran `generate`; "refused" by `enable`; "raises" in
            `generate` where stock does not; "differs" from the oracle; "stock fails"; "not decoder-only".
        reason: why, in one line.
        layers: of the model.
        omit: layers of the plan.
        difference: of logits and of K, V and states of any layer from the oracle; None where it was not measured.
        difference_logits: of the logits alone.
        full_difference: of the logits from stock where the plan omits nothing.
        effect: of the plan on the logits: a mistake in an omitted layer shows only if it has one.
        same_tokens: whether `generate` returns the tokens of stock where the plan omits nothing.
        errors: exceptions, by what was tried, with the lines that raised.
        seconds: how long it took.
    """

    name: str
    model_class: str
    outcome: str = ""
    reason: str = ""
    layers: int | None = None
    omit: list[int] = field(default_factory=list)
    difference: float | None = None
    difference_logits: float | None = None
    full_difference: float | None = None
    effect: float | None = None
    same_tokens: bool | None = None
    errors: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def __str__(self) -> str:
        difference = "" if self.difference is None else f"{self.difference:.1e}"
        full = "" if self.full_difference is None else f"{self.full_difference:.1e}"
        line = f"{self.name:24} {self.outcome:16} {difference:8} {full:8} {self.seconds:5.1f} s  {self.reason}"
        return "\n".join([line, *(f"    {what}: {error}" for what, error in self.errors.items())])


def survey(key: str) -> Row:
    """Run one architecture, `NAME:CLASS`, and report it, whatever it raises."""
    name, model_class = key.split(":")
    row, start = Row(name, model_class), time.perf_counter()
    try:
        config = tiny_config(name)
        encoder = getattr(config, "is_decoder", None) is False and name not in DECODERS
        if config.is_encoder_decoder or encoder:
            row.outcome, row.reason = "not decoder-only", "encoder, or encoder and decoder"
            return row
        cls = getattr(transformers, model_class)
        text = config.get_text_config(decoder=True)
        if not isinstance(config, cls.config_class) and isinstance(text, cls.config_class):
            config = text  # a text model under the name of the whole
        model = build(cls, config)
        generator = torch.Generator().manual_seed(2)
        ids = torch.randint(3, FIRST_SPECIAL_TOKEN, (1, TOKENS), generator=generator)
        expected_tokens = _generate(model, ids)
        with torch.no_grad():
            stock_logits = _forward(model, ids)[0]
    except Exception as error:
        row.outcome, row.reason, row.errors["stock"] = "stock fails", _one_line(error), _trace(error)
        row.seconds = time.perf_counter() - start
        return row
    try:
        _try_plans(row, model, ids, expected_tokens, stock_logits)
    except Exception as error:
        row.outcome, row.reason, row.errors["survey"] = "raises", _one_line(error), _trace(error)
    row.seconds = time.perf_counter() - start
    return row


def _try_plans(row: Row, model: Any, ids: Any, expected_tokens: Any, stock_logits: Any) -> None:
    """Enable a model with two plans, and compare its results with those of the stock model and the oracle."""
    row.layers = count = model.config.get_text_config(decoder=True).num_hidden_layers
    row.omit = list(range(count - 1))[-max(1, count // 3) :]
    try:
        pop_ext.enable(model, pop_ext.Plan(num_layers=count, omit=row.omit), backend="auto")
    except ValueError as error:
        row.outcome, row.reason = "refused", _refusal(model, row) or _one_line(error)
        return
    try:
        _generate(model, ids)
        decision = pop_ext.last_call(model)
        row.outcome, row.reason = ("stock", "no call seen") if decision is None else (decision.backend, _why(decision))
    except Exception as error:
        row.outcome, row.reason, row.errors["generate"] = "raises", _one_line(error), _trace(error)
    with torch.no_grad():
        try:
            logits, states = _forward(model, ids)
            decision = pop_ext.last_call(model)
            if row.outcome != "raises" and (decision is None or decision.backend != row.outcome):
                row.errors["forward"] = f"ran {decision}"
        except Exception as error:
            row.errors["forward"] = _trace(error)
            logits = None
        pop_ext.disable(model)
        try:
            oracle_logits, oracle_states = _held_back_forward(model, ids, row.omit)
            row.effect = difference(oracle_logits, stock_logits)
            if logits is not None and row.outcome != "stock":
                row.difference_logits = difference(logits, oracle_logits)
                row.difference = max([row.difference_logits, *_state_differences(states, oracle_states, row)])
        except Exception as error:
            row.errors["oracle"] = _trace(error)
        try:
            with pop_ext.enabled(model, pop_ext.Plan(num_layers=count, omit=())):
                row.full_difference = difference(_forward(model, ids)[0], stock_logits)
                row.same_tokens = bool(torch.equal(_generate(model, ids), expected_tokens))
        except Exception as error:
            row.errors["full"] = _trace(error)
    wrong = max(row.difference or 0.0, row.full_difference or 0.0) > TOLERANCE or row.same_tokens is False
    if row.outcome in ("native", "portable") and (wrong or row.errors):
        row.reason, row.outcome = f"{row.outcome}: {row.reason}", "differs" if wrong else "raises"


def _refusal(model: Any, row: Row) -> str | None:
    """Return why the portable backend does not run a model, which it does for most."""
    try:
        plan = pop_ext.Plan(num_layers=row.layers or 0, omit=row.omit)
        pop_ext.enable(model, plan, backend="portable")
    except ValueError as error:
        return _one_line(error)
    return None


def _generate(model: Any, ids: Any) -> Any:

    model.generation_config.eos_token_id = None
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        use_cache=True,
        pad_token_id=0,
    )


def _forward(model: Any, ids: Any) -> tuple[Any, list[dict[str, Any]]]:
    """Return the logits of the last row, and the tensors in each layer of the cache."""
    taken = inspect.signature(type(model).forward).parameters
    keep = {"logits_to_keep": 1} if "logits_to_keep" in taken else {}
    output = model(ids, attention_mask=torch.ones_like(ids), use_cache=True, **keep)
    cache = next((output[name] for name in ("cache", "past_key_values", "cache_params") if name in output), None)
    return output.logits[:, -1:], [_tensors(layer) for layer in getattr(cache, "layers", ())]


def _tensors(layer: Any) -> dict[str, Any]:
    """Return the K, V and states in a layer of a cache."""
    found = {}
    for name, value in vars(layer).items():
        items = dict(enumerate(value)) if isinstance(value, (list, tuple)) else value
        if isinstance(items, dict):
            found.update({f"{name}[{key}]": item for key, item in items.items()})
        else:
            found[name] = items
    return {name: v for name, v in found.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}


def _held_back_forward(model: Any, ids: Any, omit: list[int]) -> tuple[Any, list[dict[str, Any]]]:
    """Run the stock forward with hooks that give the last row alone the output of the omitted layers."""

    def hold_back(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        before = args[0] if args else kwargs["hidden_states"]
        after = output[0] if isinstance(output, tuple) else output
        if TOKENS not in after.shape:  # transformers itself gives the layer the last row alone
            return output
        context = torch.arange(TOKENS) < TOKENS - 1
        shape = [1] * after.ndim
        shape[list(after.shape).index(TOKENS)] = TOKENS
        held = torch.where(context.view(shape), before, after)
        return (held, *output[1:]) if isinstance(output, tuple) else held

    with ExitStack() as stack:
        for index in omit:
            hook = _layers(model)[index].register_forward_hook(hold_back, with_kwargs=True)
            stack.callback(hook.remove)
        return _forward(model, ids)


def _layers(model: Any) -> Any:
    """Return the decoder layers."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model.model
    while not isinstance(getattr(decoder, "layers", None), torch.nn.ModuleList):
        for name in ("h", "blocks"):
            if hasattr(decoder, name):
                return getattr(decoder, name)
        decoder = decoder.model
    return decoder.layers


def difference(found: Any, expected: Any) -> float:
    if not expected.numel():
        return 0.0
    return float((found - expected).abs().max()) / max(float(expected.abs().max()), 1e-30)


def _state_differences(found: list[dict[str, Any]], expected: list[dict[str, Any]], row: Row) -> list[float]:
    """Return the difference of each tensor of two caches; note those that only one has, or in another shape."""
    differences: list[float] = []
    if not any(expected):
        row.errors["cache"] = "found no tensors to compare"
    for index, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        for name in sorted(ours.keys() | theirs.keys()):
            shapes = [None if name not in side else list(side[name].shape) for side in (ours, theirs)]
            if shapes[0] != shapes[1]:
                row.errors[f"cache layer {index} {name}"] = f"expected {shapes[1]}, got {shapes[0]}"
            else:
                differences.append(difference(ours[name], theirs[name]))
    return differences


def _why(decision: pop_ext.Decision) -> str:
    """Return why a backend runs a call, in short: of the portable one, what the native one lacks."""
    _, _, missing = decision.reason.removesuffix(")").partition(" (not native: ")
    return "no native family" if "expected an architecture that" in missing else missing or decision.reason


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


def _trace(error: BaseException) -> str:
    """Return an exception in one line, with the lines of pop_ext and transformers that raised it."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "scripts" not in f.filename]
    places = [f"{Path(*Path(f.filename).parts[-3:])}:{f.lineno} {f.name}" for f in frames]
    ours = [place for place, f in zip(places, frames, strict=True) if "pop_ext" in f.filename][-2:]
    return f"{_one_line(error)} [{' < '.join([*reversed(places[-2:]), *(p for p in ours if p not in places[-2:])])}]"
