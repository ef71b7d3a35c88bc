"""Differences between transformers versions and model wrappers, in one place.

transformers calls the KV cache ``past_key_values``, and ``cache`` from 5.24 on. Callers of this package may use
either name with either version. Calls into transformers, and outputs returned to it, use the name in transformers' own
signature, so that it has no reason to warn.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, get_args

import torch
from torch import nn
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import ModelOutput

OLD_CACHE_NAME, NEW_CACHE_NAME = "past_key_values", "cache"


@lru_cache(maxsize=256)
def cache_argument(forward: Callable[..., Any]) -> str:
    """Return the name of the cache argument of ``forward``.

    Args:
        forward: an unbound method. A bound one would keep its model alive in the memo of this function.
    """
    return NEW_CACHE_NAME if NEW_CACHE_NAME in inspect.signature(forward).parameters else OLD_CACHE_NAME


def with_cache(module: nn.Module, cache: Any) -> dict[str, Any]:
    """Return the cache as a keyword argument for a module's stock forward."""
    return {cache_argument(type(module).forward): cache}


def cache_field(output: type[Any], cache: Any) -> dict[str, Any]:
    """Return the cache as a keyword argument for the constructor of a ``ModelOutput`` class."""
    return {NEW_CACHE_NAME if NEW_CACHE_NAME in field_names(output) else OLD_CACHE_NAME: cache}


def field_names(output: type[Any]) -> set[str]:
    """Return the names of the fields of a ``ModelOutput`` class."""
    return {field.name for field in dataclasses.fields(output)}


@lru_cache(maxsize=256)
def output_class(forward: Callable[..., Any]) -> type[Any]:
    """Return the ``ModelOutput`` class in the return annotation of ``forward``, which may be a union with ``tuple``.

    Args:
        forward: an unbound method. A bound one would keep its model alive in the memo of this function.

    Returns:
        The annotated class, or ``CausalLMOutputWithPast`` if the annotation has no ``ModelOutput`` with logits.
    """
    annotation: Any = inspect.signature(forward).return_annotation
    for member in get_args(annotation) or (annotation,):
        if isinstance(member, type) and issubclass(member, ModelOutput) and "logits" in field_names(member):
            return member
    return CausalLMOutputWithPast


def is_causal(config: Any) -> bool:
    """Return whether a config lets every token attend to earlier ones alone, as far as ``is_causal`` says."""
    return getattr(config, "is_causal", None) in (None, True)


def cache_of(output: Any) -> Any:
    """Return the cache in a ``ModelOutput`` or a ``PrefillOutput``, or None without one."""
    if hasattr(output, NEW_CACHE_NAME):
        return getattr(output, NEW_CACHE_NAME)
    return getattr(output, OLD_CACHE_NAME, None)


def rename_cache(arguments: dict[str, Any], signature: inspect.Signature) -> None:
    """Rename the cache among the arguments of a call to ``past_key_values``, in place.

    If a call gives both names, the new one wins, as in transformers.

    Args:
        arguments: by name, as bound to ``signature``.
        signature: of the stock forward.
    """
    if NEW_CACHE_NAME in signature.parameters and NEW_CACHE_NAME in arguments:
        arguments[OLD_CACHE_NAME] = arguments.pop(NEW_CACHE_NAME)


@lru_cache(maxsize=1024)
def parameters_of(forward: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of an unbound ``forward`` by name, without ``self``."""
    return dict(list(inspect.signature(forward).parameters.items())[1:])


def check_module(model: object) -> None:
    """Raise TypeError unless ``model`` is an ``nn.Module``."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a Hugging Face model, got {type(model).__name__}")


def uncompiled(model: Any) -> Any:
    """Return the model inside the wrapper of ``torch.compile``; any other object is returned as it is."""
    return getattr(model, "_orig_mod", model)


def unwrapped(model: Any) -> Any:
    """Return the model inside the wrappers of ``torch.compile`` and PEFT, which call its ``forward``."""
    inner = uncompiled(model)
    if type(inner).__module__.startswith("peft.") and hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()
    return inner


def text_config(model: nn.Module) -> Any:
    """Return the config of the language model, which may be nested in a multimodal config; None without a config."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def new_cache(config: Any) -> DynamicCache:
    """Make the cache that the stock forward would make for a model with this config."""
    # A sliding layer creates a tensor here and moves it to the model's device later.
    with torch.device("cpu"):
        return DynamicCache(config=config)
