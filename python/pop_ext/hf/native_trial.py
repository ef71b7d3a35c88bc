"""Try the native form of a model on a few tokens, against the stock modules.

An entry of ``architectures.FAMILIES`` says how a family differs from Llama. One that leaves something out, such as a
multiplier or another order of norm and RoPE, would run without an error and compute something else. So would a model
whose code has changed since the entry was written.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pop_ext.hf.architectures import UnsupportedModelError
from pop_ext.hf.compat import text_config
from pop_ext.hf.native_model import NativeModel, PrefillOutput
from pop_ext.hf.patches import unsupported_reason
from pop_ext.hf.restore import module_restored
from pop_ext.portable.decoder import Clones, Decoder, clone_module, find_decoder
from pop_ext.portable.trial import (
    BOUNDARY,
    TOKENS,
    find_difference,
    run_second_form,
    trial_key,
    trial_plan,
    trial_prompt,
)
from pop_ext.utils.tensors import is_out_of_memory

_passed: set[tuple[Any, ...]] = set()


def try_native(native: NativeModel) -> bool:
    """Compare logits and every K and V of a native prefill of a few tokens with those of the stock modules.

    Only the first layers take part, up to one that is like each of the others. A model of the same classes and config
    passes without being tried again in this process.

    Args:
        native: a loaded model. Nothing of it changes.

    Returns:
        False for a model that could not be tried, and should be later: a part of it is in training mode, where dropout
        may be random, or its prefills are declined as it is, because of hooks, say. True also for results that are not
        finite, which say nothing.

    Raises:
        UnsupportedModelError: The results differ, or the stock modules cannot run the tokens.
    """
    model: Any = native.description.model()
    decoder = find_decoder(model)
    if any(module.training for module in decoder.module.modules()):
        return False
    if not getattr(text_config(model), "is_causal", True) or unsupported_reason(model, native.inner) is not None:
        return False
    key = (*trial_key(model, decoder), repr(native.family), native.device, native.spec.to_json())
    if key in _passed:
        return True
    prompt, rotary = trial_prompt(model), decoder.module.rotary_emb
    with torch.no_grad(), torch.autocast(native.device.type, enabled=False), module_restored(rotary):
        found = _run_native(native, model, decoder, prompt)
        try:
            expected = run_second_form(*_first_layers(native, model, decoder), prompt)
        except Exception as error:  # whatever a model that does not fit may raise
            if is_out_of_memory(error):
                raise
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UnsupportedModelError(
                f"model: expected a stock prefill of {TOKENS} tokens to run, got {reason}"
            ) from error
        if not bool(expected.logits.isfinite().all()):
            return True
        difference = find_difference(found.logits, found.past_key_values, expected)
        if difference is not None:
            raise UnsupportedModelError(
                f"model: expected layers of {native.family.model_type} as pop_ext knows them, got others: in a trial "
                f"of {TOKENS} tokens the {difference}"
            )
    _passed.add(key)
    return True


def _run_native(native: NativeModel, model: Any, decoder: Decoder, prompt: Tensor) -> PrefillOutput:
    first, inner = _first_layers(native, model, decoder)
    return NativeModel(first, trial_plan(len(inner.layers))).prefill(prompt, logits_to_keep=BOUNDARY)


def _first_layers(native: NativeModel, model: Any, decoder: Decoder) -> tuple[Any, Decoder]:
    """Return a clone of a model that ends after a few layers, and its decoder. Weights are shared."""
    count = _layers_to_try(native, decoder)
    clones = Clones()
    layers = nn.ModuleList(clone_module(layer) for layer in decoder.layers[:count])
    inner = clones.of(decoder.module, **{decoder.list_name: layers})
    clone = clones.around(model, decoder.path, inner)
    text = text_config(model)
    short = _shorten(text, count)
    outer = short if text is model.config else copy.copy(model.config)
    for name, value in vars(outer).items():
        if value is text:
            vars(outer)[name] = short
    for module in clones.made():
        module.config = short if module.config is text else outer
        if hasattr(module, "rope_deltas"):
            module.rope_deltas = None
    return clone, Decoder(decoder.path, inner, decoder.list_name)


def _layers_to_try(native: NativeModel, decoder: Decoder) -> int:
    """Return the smallest number of first layers with one of each kind among them, but at least two."""
    spec, model = native.spec, native.description.model()
    assert model is not None
    lists: list[Sequence[Any]] = [spec.window, spec.rope_table, spec.sparse]
    lists += [value for value in vars(text_config(model)).values() if isinstance(value, (list, tuple))]
    kinds = []
    for index, layer in enumerate(decoder.layers):
        given = [repr(values[index]) for values in lists if len(values) == spec.num_layers]
        modules = [(name, type(module), _simple_attributes(module)) for name, module in layer.named_modules()]
        kinds.append(repr((given, modules)))
    return max(min(2, len(kinds)), *(kinds.index(kind) + 1 for kind in set(kinds)))


def _simple_attributes(module: nn.Module) -> list[tuple[str, Any]]:
    """Return the numbers, flags and texts of a module, without those that say which layer it is in."""
    simple = (bool, int, float, str, type(None))
    return sorted(
        (name, value)
        for name, value in vars(module).items()
        if isinstance(value, simple) and name not in ("layer_idx", "layer_id", "_is_hf_initialized")
    )


def _shorten(config: Any, count: int) -> Any:
    """Return a copy of a config for its first layers."""
    short, depth = copy.copy(config), config.num_hidden_layers
    for name, value in vars(config).items():
        if isinstance(value, (list, tuple)) and len(value) == depth:
            vars(short)[name] = value[:count]
    vars(short)["num_hidden_layers"] = count
    return short
