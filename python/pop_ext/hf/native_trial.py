"""Try the native form of a model on a few tokens, against the stock modules.

An entry of ``families.FAMILIES`` says how a family differs from Llama. One that leaves something out, such as a
multiplier or another order of norm and RoPE, would run without an error and compute something else. So would a model
whose code has changed since the entry was written.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from pop_ext.hf.architectures import PORTABLE_ADVICE, UnsupportedModelError, family_of
from pop_ext.hf.compat import is_causal, text_config
from pop_ext.hf.family import Family
from pop_ext.hf.int8_weights import is_integer_linear
from pop_ext.hf.modules import rounds_inputs
from pop_ext.hf.native_model import NativeModel, PrefillOutput
from pop_ext.hf.patches import has_global_hooks, is_patched_class, unsupported_reason
from pop_ext.hf.restore import module_restored, shallow_clone
from pop_ext.plans.projections import dense_weight
from pop_ext.portable.decoder import Clones, Decoder, find_decoder, may_run_portably
from pop_ext.portable.trial import (
    BOUNDARY,
    TOKENS,
    errors_of_models,
    find_difference,
    has_experts,
    run_second_form,
    simple_attributes,
    trial_key,
    trial_plan,
    trial_prompt,
)

_passed: set[tuple[Any, ...]] = set()
_refused: dict[tuple[Any, ...], str] = {}
"""Kind of model -> why it was refused."""


def try_native(native: NativeModel) -> bool:
    """Compare logits and every K and V of a native prefill of a few tokens with those of the stock modules.

    Only the first layers take part, up to one that is like each of the others. They run as clones in evaluation mode,
    without hooks. A model of the same kind (``trial_key``) passes without being tried again in this process, and a
    refused one is refused again.

    Args:
        native: a loaded model. Nothing of it changes.

    Returns:
        False for a model that could not be tried, and should be later: its prefills are declined as it is, because of a
        replaced forward of a class, say. True also for results that are not finite, which say nothing.

    Raises:
        UnsupportedModelError: The results differ, or one of the two forms cannot run the tokens.
    """
    model: Any = native.description.model()
    decoder = find_decoder(model)
    rule, _ = unsupported_reason(model, native.inner) or (None, "")
    if rule not in (None, "hooks") or not is_causal(text_config(model)):
        return False
    if has_global_hooks() or any(is_patched_class(type(module)) for _, module in native.inner.named):
        return False
    key = _key(model, decoder, native.family)
    if key in _passed:
        return True
    if key in _refused:
        raise UnsupportedModelError(_refused[key])
    found, expected = _run_both_forms(native, model, decoder)
    if not bool(expected.logits.isfinite().all()):
        return True
    cache, windows = found.past_key_values, native.spec.window
    difference = find_difference(found.logits, cache, expected, has_experts(decoder), windows)
    if difference is not None:
        advice = f". {PORTABLE_ADVICE}" if may_run_portably(model) else ""
        _refused[key] = (
            f"model: expected layers of {native.family.model_type} as pop_ext knows them, got others: in a trial of "
            f"{TOKENS} tokens the {difference}{advice}"
        )
        raise UnsupportedModelError(_refused[key])
    _passed.add(key)
    return True


def raise_if_refused(model: Any) -> None:
    """Raise UnsupportedModelError if a model of this kind was refused before, so that it need not be loaded."""
    family = family_of(getattr(model, "config", None)) if _refused else None
    if family is None:
        return
    try:
        decoder = find_decoder(model)
    except ValueError:  # another refusal follows
        return
    reason = _refused.get(_key(model, decoder, family))
    if reason is not None:
        raise UnsupportedModelError(reason)


def _key(model: Any, decoder: Decoder, family: Family) -> tuple[Any, ...]:
    return (*trial_key(model, decoder), repr(family), next(model.parameters()).device.type)


def _run_both_forms(native: NativeModel, model: Any, decoder: Decoder) -> tuple[PrefillOutput, Any]:
    """Prefill the prompt of a trial by the first layers, natively and in the second form.

    Raises:
        UnsupportedModelError: One of them fails.
    """
    count, prompt = _layers_to_try(native, decoder), trial_prompt(model)
    dense = native.dtype if rounds_inputs(decoder.module) else None
    named = errors_of_models(UnsupportedModelError, f"model: expected a trial of {TOKENS} tokens to run, got {{}}")
    uncast = torch.autocast(native.device.type, enabled=False)
    with torch.no_grad(), uncast, module_restored(decoder.module.rotary_emb), named:
        # Layers that round their inputs would differ by that alone, which is not what a trial is about.
        first, _ = _first_layers(model, decoder, count, dense)
        found = NativeModel(first, trial_plan(count)).prefill(prompt, logits_to_keep=BOUNDARY)
        return found, run_second_form(*_first_layers(model, decoder, count, dense), prompt)


def _first_layers(model: Any, decoder: Decoder, count: int, dense: torch.dtype | None) -> tuple[Any, Decoder]:
    """Return a clone of a model that ends after ``count`` layers, and its decoder. Weights are shared.

    ``dense``: dtype in which matrices of integers are copied as floats; None: they stay.
    """
    clones = Clones()
    layers = nn.ModuleList(_quiet_clone(layer, dense) for layer in decoder.layers[:count])
    others = {name: _quiet_clone(child) for name, child in decoder.module.named_children() if name != decoder.list_name}
    inner = clones.of(decoder.module, **{**others, decoder.list_name: layers})
    clone = clones.around(model, decoder.path, inner)
    text = text_config(model)
    short = _shorten(text, count)
    outer = short if text is model.config else copy.copy(model.config)
    for name, value in vars(outer).items():
        if value is text:
            vars(outer)[name] = short
    for module in clones.made():
        module.config = short if module.config is text else outer
        module.training = False
        if hasattr(module, "rope_deltas"):
            module.rope_deltas = None
    clone.__dict__["_modules"] = {**clone._modules, "lm_head": _quiet_clone(model.lm_head)}
    return clone, Decoder(decoder.path, inner, decoder.list_name)


def _quiet_clone(module: nn.Module, dense: torch.dtype | None = None) -> Any:
    """Return a clone of a module and of those inside it, in evaluation mode and without hooks. Weights are shared.

    With ``dense``, matrices of integers are copied as floats, and layers that round their inputs do not.
    """
    if dense is not None and is_integer_linear(module):
        # By other code than the runtime's, so that a misread format is found.
        return _dense_linear(dense_weight(module, dense).to(dense), module.bias)
    clone = shallow_clone(module, **{name: _quiet_clone(child, dense) for name, child in module.named_children()})
    clone.__dict__["training"] = False
    for hooks in ("_forward_hooks", "_forward_pre_hooks"):
        clone.__dict__[hooks] = OrderedDict()
    return clone


def _dense_linear(weight: torch.Tensor, bias: Any) -> nn.Linear:
    plain = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    plain.weight = nn.Parameter(weight, requires_grad=False)
    plain.bias = bias
    return plain.eval()


def _layers_to_try(native: NativeModel, decoder: Decoder) -> int:
    """Return the smallest number of first layers with one of each kind among them, but at least four."""
    spec, model = native.spec, native.description.model()
    assert model is not None
    lists: list[Sequence[Any]] = [spec.window, spec.rope_table, spec.sparse]
    lists += [value for value in vars(text_config(model)).values() if isinstance(value, (list, tuple))]
    kinds = []
    for index, layer in enumerate(decoder.layers):
        given = [repr(values[index]) for values in lists if len(values) == spec.num_layers]
        modules = [(name, type(module), simple_attributes(module)) for name, module in layer.named_modules()]
        kinds.append(repr((given, modules)))
    return max(min(4, len(kinds)), *(kinds.index(kind) + 1 for kind in set(kinds)))


def _shorten(config: Any, count: int) -> Any:
    """Return a copy of a config for its first layers."""
    short, depth = copy.copy(config), config.num_hidden_layers
    for name, value in vars(config).items():
        if isinstance(value, (list, tuple)) and len(value) == depth:
            vars(short)[name] = value[:count]
    vars(short)["num_hidden_layers"] = count
    return short
