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

from torch import nn

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
    names = {field.name for field in dataclasses.fields(output)}
    return {NEW if NEW in names else OURS: cache}


def cache_of(output: Any) -> Any:
    """The cache in a ``ModelOutput`` or a ``PrefillOutput``; None where there is none."""
    return getattr(output, NEW) if hasattr(output, NEW) else getattr(output, OURS, None)


def rename_cache(arguments: dict[str, Any], signature: inspect.Signature) -> None:
    """Gives a bound call's cache the name ``past_key_values``; of two, transformers takes the new name."""
    if NEW in signature.parameters and NEW in arguments:
        arguments[OURS] = arguments.pop(NEW)
