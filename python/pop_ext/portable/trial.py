"""Try the portable backend on a few tokens of a model, against a second form of the same prefill.

Layers keep more between calls than K and V, return more than hidden states, or norm the rows of others; nobody can list
what the next architecture will do. In the second form each omitted layer runs in full over all rows, then gives its
context rows their input back. It shares neither the capture of K and V nor the cutting of arguments with the backend.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from pop_ext.hf.compat import cache_of, parameters_of, text_config, with_cache
from pop_ext.hf.modules import Module, input_device, rounds_inputs
from pop_ext.hf.restore import module_restored
from pop_ext.plans.plan import Plan
from pop_ext.portable.arguments import bind
from pop_ext.portable.decoder import Clones, Decoder, clone_module
from pop_ext.portable.forward import run_forward
from pop_ext.portable.layers import Rows
from pop_ext.utils.tensors import is_out_of_memory

TOKENS, BOUNDARY = 7, 2
TOLERANCE = 1e-3
"""Largest RMS of the difference of logits, relative to that of the logits."""
TOLERANCE_LOW = 0.2
"""The same for products of lower precision, whose roundings differ with the number of rows. A wrong layer gives some
0.5."""
ROW_TOLERANCE, ROW_TOLERANCE_LOW = 1e-3, 0.1
"""Largest RMS of the difference of one row of logits, K or V, relative to the row, and the same for products of less
than 32 bits."""

_MODEL_ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What the code of a model that does not fit may raise. Others are passed on, such as those of a handler of signals."""

_refused: dict[tuple[Any, ...], str] = {}
_passed: set[tuple[Any, ...]] = set()


def try_portable(model: Module, decoder: Decoder) -> bool:
    """Compare a portable prefill of a few tokens, and a decode step after it, with the second form.

    A model of the same kind (``trial_key``) passes without being tried again in this process. The four calls cost about
    what four decode steps do, and run on a clone, so that the model stays as it is.

    Returns:
        False for a model that could not be tried, and should be later: in training mode, where dropout may be random.
        True also for results that are not finite, which say nothing.

    Raises:
        ValueError: The results differ, or the model cannot run them. The text says which.
    """
    taken = parameters_of(type(model).forward)
    if "logits_to_keep" not in taken:
        raise ValueError(f"model: expected a forward that takes logits_to_keep, got {type(model).__name__}")
    if model.training:
        return False
    key = trial_key(model, decoder)
    if key in _passed:
        return True
    if key in _refused:
        raise ValueError(_refused[key])
    try:
        passed = _compare_forms(model, decoder)
    except _Mismatch as error:
        _refused[key] = str(error)
        raise
    if passed:
        _passed.add(key)
    return True


class _Mismatch(ValueError):
    """Raised for results that differ: a model of the same kind need not be tried again."""


def _compare_forms(model: Module, decoder: Decoder) -> bool:
    """Compare the two forms. Return False if their results are not finite, which says nothing.

    Raises:
        ValueError: As for ``try_portable``.
    """
    prompt = trial_prompt(model)
    rotary = getattr(decoder.module, "rotary_emb", None)
    restored = module_restored(rotary) if isinstance(rotary, nn.Module) else nullcontext()
    named = errors_of_models(ValueError, f"model: expected a prefill of {TOKENS} tokens to run, got {{}}")
    with torch.no_grad(), restored, named:
        expected = _run_second_form(fresh_clone(model, decoder), decoder, prompt)
        rounds = rounds_inputs(decoder.module)
        found = _run_portable(fresh_clone(model, decoder), decoder, prompt)
    if not all(bool(logits.isfinite().all()) for logits in expected):
        return False
    for what, ours, theirs in zip(("the last token", "the next token"), found, expected, strict=True):
        difference = relative_difference(ours, theirs)
        if not difference <= (TOLERANCE if is_precise(ours.dtype) and not rounds else TOLERANCE_LOW):
            raise _Mismatch(
                f"model: expected layers that depend on context rows by their cache alone, got {type(model).__name__} "
                f"(logits of {what} differ by {difference:.2g} of their size in a trial)"
            )
    return True


@contextmanager
def errors_of_models(kind: type[ValueError], text: str) -> Iterator[None]:
    """Raise what the code of a model raises inside the block as ``kind``. An allocation that failed stays as it is.

    Args:
        kind: class of the error.
        text: of the error, with ``{}`` for the first line of the other's.
    """
    try:
        yield
    except _MODEL_ERRORS as error:
        if is_out_of_memory(error):
            raise
        raise kind(text.format(str(error).partition("\n")[0] or type(error).__name__)) from error


def fresh_clone(model: Module, decoder: Decoder) -> Module:
    """Return a clone of the modules around the decoder, without the offset of positions that the last call left."""
    clones = Clones()
    clone = clones.around(model, decoder.path, decoder.module) if decoder.path else clones.of(model)
    for module in clones.made():
        if hasattr(module, "rope_deltas"):
            module.rope_deltas = None
    return clone


def trial_key(model: Module, decoder: Decoder) -> tuple[Any, ...]:
    """Return what models of one kind share: classes, dtypes, config, and the numbers, flags and texts of each layer."""
    dtypes = frozenset(parameter.dtype for parameter in model.parameters())
    modules = [("", decoder.module), *(pair for layer in decoder.layers for pair in layer.named_modules())]
    made = tuple(
        (name, type(module), type(module._parameters.get("weight")), *simple_attributes(module))
        for name, module in modules
    )
    attention = getattr(text_config(model), "_attn_implementation", None)  # which the text of a config leaves out
    return type(model), made, dtypes, str(model.config), attention


def simple_attributes(module: nn.Module) -> list[tuple[str, Any]]:
    """Return the numbers, flags and texts of a module, but not which layer it is in and how it is used."""
    simple = (bool, int, float, str, type(None))
    left_out = ("layer_idx", "layer_id", "_is_hf_initialized", "training", "gradient_checkpointing")
    return sorted(
        (name, value) for name, value in vars(module).items() if isinstance(value, simple) and name not in left_out
    )


def trial_plan(count: int) -> Plan:
    """Return a plan for ``count`` layers in which a retained layer follows an omitted one, if there are two."""
    if count < 4:
        return Plan(count, [count - 2] if count > 1 else [], BOUNDARY)
    return Plan(count, [layer for layer in range(1, count) if layer != count // 2], BOUNDARY)


def trial_prompt(model: Module) -> Tensor:
    """Return ids ``[1, TOKENS]`` that stand for no image, padding or end."""
    config = text_config(model)
    special: set[int] = set()
    for one in (model.config, config):
        for name, value in vars(one).items():
            if name.endswith(("_id", "_index")):
                values = value if isinstance(value, (list, tuple)) else [value]
                special |= {number for number in values if isinstance(number, int)}
    ids = [token for token in range(min(3, config.vocab_size), config.vocab_size) if token not in special]
    ids = (ids[:: max(1, min(5, len(ids) // TOKENS))] or [0]) * TOKENS
    device = input_device(model)
    # Where accelerate has offloaded the embedding, its hook takes ids from anywhere.
    return torch.tensor([ids[:TOKENS]], device="cpu" if device.type == "meta" else device)


def _arguments(prompt: Tensor) -> dict[str, Any]:
    # No mask: vision models count positions from it that they expect `generate` to have cut.
    return {"input_ids": prompt, "use_cache": True, "return_dict": True}


def _next(model: Module, prompt: Tensor, output: Any) -> tuple[Tensor, Tensor]:
    """Return the last logits of a prefill, and those of one decode step after it by the stock forward."""
    cache = cache_of(output)
    if cache is None:
        raise ValueError("a forward that returns no cache")
    after = type(model).forward(model, **_arguments(prompt[:, :1]), **with_cache(model, cache))
    return output.logits[:, -1], after.logits[:, -1]


def _run_portable(model: Module, decoder: Decoder, prompt: Tensor) -> tuple[Tensor, Tensor]:
    call = {**_arguments(prompt), "logits_to_keep": 1}
    plan = trial_plan(len(decoder.layers))
    return _next(model, prompt, run_forward(model, decoder, plan, Rows(BOUNDARY, 1), call))


def _run_second_form(model: Module, decoder: Decoder, prompt: Tensor) -> tuple[Tensor, Tensor]:
    return _next(model, prompt, run_second_form(model, decoder, prompt))


def run_second_form(model: Module, decoder: Decoder, prompt: Tensor) -> Any:
    """Run a pruned prefill of ``trial_plan`` in the second form.

    Args:
        model: the model. Attributes that its forward assigns to its modules stay.
        decoder: its language model.
        prompt: ids ``[1, TOKENS]``.

    Returns:
        What the stock forward returns, with a cache.
    """
    layers = {}
    for index in trial_plan(len(decoder.layers)).omit:
        layers[str(index)] = clone_module(decoder.layers[index], HoldBack(decoder.layers[index]))
    clones = Clones()
    inner = clones.of(decoder.module, **{decoder.list_name: clones.of(decoder.layers, **layers)})
    output = type(model).forward(clones.around(model, decoder.path, inner), **_arguments(prompt))
    clones.give_back()
    return output


class HoldBack:
    """Run a layer in full, and give its context rows their input back."""

    def __init__(self, layer: Module) -> None:
        self.layer = layer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call, name = bind(type(self.layer), args, kwargs)
        before: Tensor = call[name].clone()
        output = type(self.layer).forward(self.layer, **call)
        rows = output[0] if isinstance(output, tuple) else output
        held = torch.cat([before[..., :-BOUNDARY, :], rows[..., -BOUNDARY:, :]], dim=-2)
        return (held, *output[1:]) if isinstance(output, tuple) else held


def has_experts(decoder: Decoder) -> bool:
    """Return whether a layer has a mixture of experts."""
    return any("expert" in name or "router" in name for name, _ in decoder.layers.named_modules())


def is_precise(dtype: torch.dtype) -> bool:
    """Return whether products of a dtype are computed in at least 32 bits, as the process is set."""
    if dtype != torch.float32:
        return dtype == torch.float64
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # each library of torch was given a precision of its own
        return False


def relative_difference(ours: Tensor, theirs: Tensor) -> float:
    """Return the RMS of the difference over that of ``theirs``."""
    return float(row_differences(ours.flatten(), theirs.flatten()))


def row_differences(ours: Tensor, theirs: Tensor) -> Tensor:
    """Return the RMS of the difference over that of ``theirs``, of each row (last dimension)."""
    ours, theirs = ours.float(), theirs.float()
    return (ours - theirs).square().mean(-1).sqrt() / theirs.square().mean(-1).sqrt().clamp(min=1e-30)


def find_difference(
    logits: Tensor, cache: Any, expected: Any, routed: bool, windows: Sequence[int] | None = None
) -> str | None:
    """Compare a prefill of ``trial_plan`` with the second form: logits, and K and V of every layer.

    Args:
        logits: of the last ``BOUNDARY`` rows, ``[1, BOUNDARY, vocab]``.
        cache: with K and V of the prompt.
        expected: from ``run_second_form``. Layers of its cache with a sliding window may hold fewer positions.
        routed: whether tokens have experts. With products of less than 32 bits a row near a tie may then go to others,
            correctly, so the median of the rows counts in place of the largest difference.
        windows: sliding window of each layer in tokens, 0 for none. Positions that no later token sees do not count.
            None: all positions count.

    Returns:
        The first difference above the tolerance, for an error; None if there is none.
    """
    pairs = [("logits", logits, expected.logits[:, -BOUNDARY:])]
    for index, (ours, theirs) in enumerate(zip(cache.layers, cache_of(expected).layers, strict=True)):
        kept = min(ours.keys.shape[2], theirs.keys.shape[2])
        if windows is not None and windows[index] > 0:
            kept = min(kept, windows[index] - 1)
        for name in ("keys", "values"):
            last = (getattr(one, name)[0, :, one.keys.shape[2] - kept :] for one in (ours, theirs))
            pairs.append((f"{name} of layer {index}", *(part.transpose(0, 1).flatten(1) for part in last)))
    for what, found, wanted in pairs:
        if found.shape != wanted.shape:
            return f"{what} have the shape {list(found.shape)} in the place of {list(wanted.shape)}"
        if found.numel() == 0:
            continue
        precise, rows = is_precise(found.dtype), row_differences(found, wanted)
        difference = float(rows.median() if routed and not precise else rows.max())
        if not difference <= (ROW_TOLERANCE if precise else ROW_TOLERANCE_LOW):
            return f"{what} differ by {difference:.2g} of their size"
    return None
