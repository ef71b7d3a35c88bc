"""Find the decoder layers of a model, and clone the modules around them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any

from torch import nn

from pop_ext.hf.compat import check_module, parameters_of, text_config
from pop_ext.hf.restore import shallow_clone

LAYER_LISTS = ("layers", "h", "blocks")
"""Names of the list of decoder layers."""
CACHE_NAMES = ("cache", "past_key_values", "past_key_value", "cache_params", "layer_past")
"""Names under which modules of transformers take the cache."""


@dataclass(frozen=True)
class Decoder:
    """The language model inside a model.

    Attributes:
        path: names of the modules from the model to its language model; empty if the model has no head of its own.
        module: the language model without its head.
        list_name: name of the list of its decoder layers.
    """

    path: tuple[str, ...]
    module: Any
    list_name: str

    @property
    def layers(self) -> Any:
        """Its decoder layers, an ``nn.ModuleList``."""
        return getattr(self.module, self.list_name)


def find_decoder(model: nn.Module) -> Decoder:
    """Return the decoder of a model.

    Raises:
        ValueError: The model has no decoder with one module per layer, or no language-model head.
        TypeError: ``model`` is no ``nn.Module``.
    """
    check_module(model)
    get_decoder: Any = getattr(model, "get_decoder", None)
    found: Any = getattr(model, "model", None) if get_decoder is None else get_decoder()
    name = type(model).__name__
    while found is not None and _list_name(found) is None:  # get_decoder may return a model with a head
        found = getattr(found, "model", None)
    list_name = None if found is None else _list_name(found)
    if list_name is None:
        raise ValueError(f"model: expected a decoder with a list of layers, got {name} without one")
    head: Any = model.get_output_embeddings  # type checkers take it for a submodule
    if head() is None:
        raise ValueError(f"model: expected a language-model head, got {name} without one")
    expected = text_config(model).num_hidden_layers
    path = next((path for path, module in model.named_modules() if module is found), "")
    decoder = Decoder(tuple(path.split(".")) if path else (), found, list_name)
    if len(decoder.layers) != expected:
        raise ValueError(
            f"model: expected {expected} decoder layers (config.num_hidden_layers), got {len(decoder.layers)}"
        )
    return decoder


def _list_name(module: nn.Module) -> str | None:
    """Return the name of a module's list of decoder layers; None without one."""
    return next((name for name in LAYER_LISTS if isinstance(getattr(module, name, None), nn.ModuleList)), None)


def cache_name(module: nn.Module) -> str | None:
    """Return the name of the argument by which a module's ``forward`` takes the cache; None if it takes none."""
    parameters = parameters_of(type(module).forward)
    return next((name for name in CACHE_NAMES if name in parameters), None)


def clone_module(module: nn.Module, forward: Callable[..., Any] | None = None, **children: nn.Module) -> Any:
    """Make a shallow copy of a module with another ``forward``, inside the hook that accelerate has put around it.

    Args:
        module: the original, which stays as it is.
        forward: of the clone, without ``self``; None for that of its class.
        children: submodules to replace in the clone, by name. All others are shared.
    """
    clone = shallow_clone(module, **children)
    hooked: Any = module.__dict__.get("forward")
    if "_hf_hook" in module.__dict__ and isinstance(hooked, partial):
        clone.__dict__["_old_forward"] = forward or MethodType(type(module).forward, clone)
        clone.__dict__["forward"] = partial(hooked.func, clone)
    elif forward is not None:
        clone.__dict__["forward"] = forward
    return clone


def check_layers(model: nn.Module) -> Decoder:
    """Return the decoder of a model whose layers the portable backend can omit, as far as can be told without a call.

    Raises:
        ValueError: It has no layers that can be omitted, or attends in both directions.
    """
    decoder = find_decoder(model)
    bidirectional = getattr(text_config(model), "use_bidirectional_attention", False)
    if bidirectional and bidirectional != "vision":  # within images alone, which the stock masks say
        raise ValueError(f"config.use_bidirectional_attention: expected a causal model, got {bidirectional}")
    for index, layer in enumerate(decoder.layers):
        if cache_name(layer) is None:
            raise ValueError(
                f"model: expected layers whose forward takes the cache, got {type(layer).__name__} (layer {index})"
            )
    return decoder


def check_weights(model: nn.Module) -> bool:
    """Return whether one of a model's weights is on a GPU.

    Raises:
        ValueError: No forward of one process can use a weight by itself.
    """
    on_meta, on_gpu = None, False
    for name, parameter in model.named_parameters():
        on_gpu |= parameter.is_cuda
        if type(parameter.data).__name__ == "DTensor":
            raise ValueError(f"weight {name}: expected a whole tensor, got a DTensor (of a tensor-parallel model?)")
        if parameter.is_meta:
            on_meta = on_meta or name
    if on_meta is not None and not any("_hf_hook" in vars(module) for module in model.modules()):
        raise ValueError(f"weight {on_meta}: expected loaded weights, got the meta device and no hooks that load them")
    return on_gpu


def may_run_portably(model: nn.Module) -> bool:
    """Return whether to advise the portable backend: whether layers and weights of a model seem fit for it.

    Matrices of several dtypes may be those of a quantised checkpoint, or may not be multiplied at all.
    """
    try:
        check_layers(model)
        check_weights(model)
    except ValueError:
        return False
    return len({one.dtype for one in model.parameters() if one.ndim > 1 and one.is_floating_point()}) < 2


class Clones:
    """Shallow copies of the modules on the path to the layers of a model.

    A forward may assign attributes to its module, such as the position offset of later tokens. They land on the clone,
    and ``give_back`` copies them to the original.
    """

    def __init__(self) -> None:
        self._made: list[tuple[nn.Module, Any, dict[str, Any]]] = []

    def around(self, module: nn.Module, path: tuple[str, ...], inner: nn.Module) -> Any:
        """Return a clone of ``module`` in which ``inner`` stands at ``path``; ``inner`` itself for an empty path."""
        if not path:
            return inner
        child = self.around(module._modules[path[0]], path[1:], inner)  # type: ignore[arg-type]
        return self.of(module, **{path[0]: child})

    def of(self, module: nn.Module, **children: nn.Module) -> Any:
        """Return a clone of ``module`` with other children."""
        clone = clone_module(module, **children)
        self._made.append((module, clone, dict(clone.__dict__)))
        return clone

    def made(self) -> list[Any]:
        """Return all clones."""
        return [clone for _, clone, _ in self._made]

    def give_back(self) -> None:
        """Copy attributes that have been assigned since to the originals."""
        for original, clone, before in self._made:
            for name, value in clone.__dict__.items():
                if value is not before.get(name):
                    original.__dict__[name] = value
