"""Roll back modules and caches after a failed call, and replace a module's ``forward`` for the time of a block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from pop_ext.utils.tensors import check_memory

Saved = list[tuple[torch.Tensor, torch.Tensor]]
"""(tensor, copy of its values) of tensors that a call may overwrite."""


def save(tensors: list[torch.Tensor]) -> Saved:
    """Copy the values of tensors that a call may overwrite.

    Expanded tensors (a stride of 0) are left out: nothing can be copied back into them, and the operator refuses them.
    """
    return [(tensor, tensor.clone()) for tensor in tensors if 0 not in tensor.stride()]


def restore(attributes: dict[str, Any], before: dict[str, Any], saved: Saved) -> None:
    """Give an object its former attributes back, and tensors their former values.

    Args:
        attributes: the object's ``__dict__``, changed in place.
        before: a copy of it, from before the call.
        saved: from ``save``.
    """
    # Do not clear the dict first: another thread may be reading it.
    for name in attributes.keys() - before.keys():
        del attributes[name]
    attributes.update(before)
    # Tensors that were made in inference mode can only be written in it.
    with torch.inference_mode():
        for tensor, copy in saved:
            tensor.copy_(copy)


@contextmanager
def module_restored_on_error(module: nn.Module) -> Iterator[None]:
    """Restore a module's attributes and buffers if the block fails.

    Needed for rotary modules, which keep frequencies for the length that they saw last. Some versions of transformers
    assign new buffers for them, others write into the existing ones.

    Raises:
        ValueError: The memory of a buffer was freed.
    """
    check_memory({f"model: {type(module).__name__}.{name}": buffer for name, buffer in module._buffers.items()})
    put_back = _state_of(module)
    try:
        yield
    except BaseException:
        put_back()
        raise


@contextmanager
def module_restored(module: nn.Module) -> Iterator[None]:
    """Restore attributes and buffers of a module after the block. Its children keep their own."""
    put_back = _state_of(module)
    try:
        yield
    finally:
        put_back()


def _state_of(module: nn.Module) -> Callable[[], None]:
    """Return a function that gives a module its present attributes and buffers back."""
    before, buffers = dict(module.__dict__), dict(module._buffers)
    saved = save([buffer for buffer in buffers.values() if buffer is not None])

    def put_back() -> None:
        restore(module.__dict__, before, [])
        restore(module._buffers, buffers, saved)

    return put_back


@contextmanager
def cache_restored_on_error(cache: Any, new: int) -> Iterator[None]:
    """Restore a cache of layers if the block fails, even if some layers were updated and others were not.

    Dynamic layers get their former tensors back. What static layers write in place, and the states of recurrent ones,
    which lie in dicts, is copied before the block.

    Args:
        cache: the cache.
        new: columns that the block adds to each layer. A static layer may have room for many more.
    """
    layers = list(cache.layers)
    states = []
    static = next((layer for layer in layers if _is_static(layer)), None)
    past = 0 if static is None else int(static.get_seq_length())  # of all of them; on a GPU each look would wait for it
    for layer in layers:
        dicts = [(value, dict(value)) for value in vars(layer).values() if isinstance(value, dict)]
        written = [value for _, items in dicts for value in items.values()]
        written += _written_in_place(layer, slice(past, past + new)) if hasattr(layer, "max_cache_len") else []
        saved = save([tensor for tensor in written if isinstance(tensor, torch.Tensor)])
        states.append((layer, dict(layer.__dict__), dicts, saved))
    try:
        yield
    except BaseException:
        cache.layers[:] = layers
        for layer, before, dicts, saved in states:
            for own, items in dicts:
                own.clear()
                own.update(items)
            restore(layer.__dict__, before, saved)
        raise


def _is_static(layer: Any) -> bool:
    """Return whether a layer of a cache writes new columns into tensors that have room for more."""
    tensors = (getattr(layer, name, None) for name in ("keys", "values"))
    filled = all(isinstance(tensor, torch.Tensor) for tensor in tensors)
    return hasattr(layer, "max_cache_len") and filled and not getattr(layer, "is_sliding", False)


def _written_in_place(layer: Any, columns: slice) -> list[Any]:
    """Return the tensors that a static layer overwrites, or the parts of them that hold the new columns."""
    keys: Any = getattr(layer, "keys", None)
    values: Any = getattr(layer, "values", None)
    length = getattr(layer, "cumulative_length", None)
    if _is_static(layer):
        keys, values = keys[:, :, columns], values[:, :, columns]
    return [keys, values, length]


def forward_attribute(module: nn.Module) -> str:
    """Return the name of the instance attribute to replace in order to replace a module's ``forward``.

    accelerate sets its own ``forward``, which moves arguments and loads weights, and then calls the former one in
    ``_old_forward``. A function put there gets its arguments on the right device and finds the weights loaded.

    Returns:
        "_old_forward" if accelerate has hooked the module, else "forward".
    """
    return "_old_forward" if hasattr(module, "_hf_hook") and "_old_forward" in module.__dict__ else "forward"


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any], attribute: str = "forward") -> Iterator[None]:
    """Replace the ``forward`` of one module instance inside the block.

    Args:
        module: the instance. Others of its class are not affected.
        forward: called instead, without ``self``.
        attribute: the instance attribute to replace, from ``forward_attribute``.
    """
    before = module.__dict__.get(attribute)
    module.__dict__[attribute] = forward
    try:
        yield
    finally:
        del module.__dict__[attribute]
        if before is not None:
            module.__dict__[attribute] = before


def shallow_clone(module: nn.Module, **children: nn.Module) -> Any:
    """Make a shallow copy of a module that runs the ``forward`` of its class.

    Assignments to the clone do not reach the original. The instance's own ``forward`` is left out: that of an enabled
    model refers to the clone, and the two would keep each other alive. So is the call that ``module.compile()`` made,
    which is bound to the original.

    Args:
        module: the original.
        children: submodules to replace in the clone, by name. All others are shared.
    """
    clone: nn.Module = object.__new__(type(module))
    left_out = ("forward", "_compiled_call_impl")
    clone.__dict__.update({name: value for name, value in module.__dict__.items() if name not in left_out})
    if children:
        clone.__dict__["_modules"] = {**module._modules, **children}
    return clone


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Run the block in evaluation mode, then give each module back the mode that it had."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True
