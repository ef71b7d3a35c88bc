"""What is put back: after a failed call attributes of modules, cache layers and tensors, after any call a `forward`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

Saved = list[tuple[torch.Tensor, torch.Tensor]]


def save(tensors: list[torch.Tensor]) -> Saved:
    """Tensors that a call may overwrite, with copies of what they hold. Expanded ones the operator refuses."""
    return [(tensor, tensor.clone()) for tensor in tensors if 0 not in tensor.stride()]


def restore(attributes: dict[str, Any], before: dict[str, Any], saved: Saved) -> None:
    """Gives an object's ``__dict__`` the entries that it had, and tensors their values."""
    # Never empty in between: another thread may be reading.
    for name in attributes.keys() - before.keys():
        del attributes[name]
    attributes.update(before)
    with torch.inference_mode():  # where a cache was made in it, nothing else may write to it
        for tensor, copy in saved:
            tensor.copy_(copy)


@contextmanager
def module_restored_on_error(module: nn.Module) -> Iterator[None]:
    """Undoes what a failing block assigned to a module: rotary modules keep frequencies for the length they saw last.

    Some versions of transformers assign other buffers, others write into those that are there.
    """
    before, buffers = dict(module.__dict__), dict(module._buffers)
    saved = save([buffer for buffer in buffers.values() if buffer is not None])
    try:
        yield
    except BaseException:
        restore(module.__dict__, before, [])
        restore(module._buffers, buffers, saved)
        raise


@contextmanager
def cache_restored_on_error(cache: Any) -> Iterator[None]:
    """Undoes what a failing block did to a cache of layers, one ``update`` at a time, say.

    Dynamic layers get back the tensors that they had; static ones, which are written in place, are copied first.
    """
    layers = list(cache.layers)
    states = []
    for layer in layers:
        in_place = [getattr(layer, name, None) for name in ("keys", "values", "cumulative_length")]
        static = hasattr(layer, "max_cache_len")
        saved = save([x for x in in_place if isinstance(x, torch.Tensor)]) if static else []
        states.append((layer, dict(layer.__dict__), saved))
    try:
        yield
    except BaseException:
        cache.layers[:] = layers
        for layer, before, saved in states:
            restore(layer.__dict__, before, saved)
        raise


def forward_place(module: nn.Module) -> str:
    """The attribute of an instance that holds its own ``forward``, or what stands for it.

    accelerate puts another in the place of ``forward``, which moves arguments and weights and calls the one that was
    there: what goes below it has its arguments on the right device, and its weights loaded.
    """
    return "_old_forward" if hasattr(module, "_hf_hook") and "_old_forward" in module.__dict__ else "forward"


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any], place: str = "forward") -> Iterator[None]:
    """Replace the `forward` of this one instance, or what is in another ``place``, and put back what was there."""
    before = module.__dict__.get(place)
    module.__dict__[place] = forward
    try:
        yield
    finally:
        del module.__dict__[place]
        if before is not None:
            module.__dict__[place] = before


def shallow_clone(module: nn.Module, **children: nn.Module) -> Any:
    """A shallow copy: the same modules but for ``children``, and the ``forward`` of its class.

    Whatever is assigned to it stays there. It holds no ``forward`` of ours, so that no cycle keeps it alive.
    """
    shell: nn.Module = object.__new__(type(module))
    shell.__dict__.update({name: value for name, value in module.__dict__.items() if name != "forward"})
    if children:
        shell.__dict__["_modules"] = {**module._modules, **children}
    return shell
