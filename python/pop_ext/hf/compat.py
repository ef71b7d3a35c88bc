"""What transformers calls the cache: ``past_key_values``, and ``cache`` from 5.24 on.

Either name works with either version here; what transformers is called with, and what it gets back, is the one
that its own signature has, so that it has nothing to warn about.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import ModelOutput

OURS, NEW = "past_key_values", "cache"


@lru_cache(maxsize=256)
def cache_argument(forward: Callable[..., Any]) -> str:
    """The name of the cache among the arguments of a ``forward`` (an unbound one: it is kept)."""
    return NEW if NEW in inspect.signature(forward).parameters else OURS


def with_cache(module: nn.Module, cache: Any) -> dict[str, Any]:
    """The cache as a keyword argument of a module's stock forward."""
    return {cache_argument(type(module).forward): cache}


def field_of_cache(output: type[Any], cache: Any) -> dict[str, Any]:
    """The cache as a field of a ``ModelOutput``."""
    return {NEW if NEW in names_of(output) else OURS: cache}


def names_of(output: type[Any]) -> set[str]:
    """The fields of a ``ModelOutput``."""
    return {field.name for field in dataclasses.fields(output)}


@lru_cache(maxsize=256)
def output_class(forward: Callable[..., Any]) -> type[Any]:
    """The ``ModelOutput`` that an unbound ``forward`` returns, as it says; else that of plain causal models."""
    annotation: Any = inspect.signature(forward).return_annotation
    usable = isinstance(annotation, type) and issubclass(annotation, ModelOutput) and "logits" in names_of(annotation)
    return annotation if usable else CausalLMOutputWithPast


def cache_of(output: Any) -> Any:
    """The cache in a ``ModelOutput`` or a ``PrefillOutput``; None where there is none."""
    return getattr(output, NEW) if hasattr(output, NEW) else getattr(output, OURS, None)


def rename_cache(arguments: dict[str, Any], signature: inspect.Signature) -> None:
    """Gives a bound call's cache the name ``past_key_values``; of two, transformers takes the new name."""
    if NEW in signature.parameters and NEW in arguments:
        arguments[OURS] = arguments.pop(NEW)


def check_module(model: object) -> None:
    """Raises TypeError unless it is a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a Hugging Face model, got {type(model).__name__}")


def uncompiled(model: Any) -> Any:
    """The model inside the wrapper of ``torch.compile``; any other object as it is."""
    return getattr(model, "_orig_mod", model)


def text_config(model: nn.Module) -> Any:
    """Return the config of the language model, which a multimodal config keeps inside; None without a config."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def new_cache(config: Any) -> DynamicCache:
    """Make the cache that the stock forward would make."""
    with torch.device("cpu"):  # a sliding layer makes a tensor at once and moves it to its device later
        return DynamicCache(config=config)
