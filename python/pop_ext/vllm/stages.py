"""Part of a vLLM decoder, run as a stage of a pipeline.

Each model of vLLM can run as one of several pipeline stages: its forward takes the first and last layer from
attributes, embeds tokens only on the first rank, applies the final norm only on the last, and hands on a dictionary of
tensors in between. A stage here is a shallow copy of the decoder with other bounds, on the same rank. So a family's own
code decides how layers are called, and a stage compiles as vLLM compiles the whole.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from vllm.compilation.backends import set_model_tag
from vllm.compilation.wrapper import TorchCompileWithNoGuardsWrapper
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.model_executor.models.utils import PPMissingLayer
from vllm.sequence import IntermediateTensors

# What a compiled module learns when it is first called; a copy must learn it anew.
_COMPILED = ("aot_compiled_fn", "_compiled_bytecode", "_bytecode_hook_handle", "_aot_compilation_path")


class StagePlace:
    """Stand in for vLLM's pipeline group while a stage runs: only its place is asked for."""

    def __init__(self, group: Any, is_first_rank: bool, is_last_rank: bool) -> None:
        self.group, self.is_first_rank, self.is_last_rank = group, is_first_rank, is_last_rank

    def __getattr__(self, name: str) -> Any:
        return getattr(self.group, name)


class Stage:
    """Layers ``start`` to ``stop`` of a decoder.

    Args:
        decoder: The module whose forward runs the layers (``find_decoder``).
        start: Number of the first layer.
        stop: One more than the number of the last layer. Without layers, a stage embeds its tokens.
        is_first: True if it embeds tokens, False if it takes what another stage handed on.
        is_last: True if it applies the final norm.
        vllm_config: The engine's configuration; None: never compile.
        tag: Name of the stage in vLLM's compile cache, unique for each kind of stage of an engine.
    """

    def __init__(
        self,
        decoder: torch.nn.Module,
        start: int,
        stop: int,
        is_first: bool,
        is_last: bool,
        vllm_config: VllmConfig | None,
        tag: str,
    ) -> None:
        self.layers = range(start, stop)
        self._place = StagePlace(parallel_state.get_pp_group(), is_first, is_last)
        inner = getattr(decoder, "model", None)
        if hasattr(decoder, "pp_group") and inner is not None:  # vLLM's backend for Transformers models
            self._module = shallow_copy(decoder)
            self._module._modules = dict(decoder._modules)
            self._module.pp_group = self._place
            part = _with_own_forward(inner, tag)
            part._modules = dict(inner._modules)
            kept = [layer if number in self.layers else PPMissingLayer() for number, layer in enumerate(inner.layers)]
            part._modules["layers"] = torch.nn.ModuleList(kept)
            if not is_last:
                part._modules["norm"] = PPMissingLayer()
            self._module._modules["model"] = part
        else:
            self._module = part = _with_own_forward(decoder, tag)
            part.start_layer, part.end_layer = start, stop
        _compile_anew(part, vllm_config, tag)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layers; arguments and result are those of the decoder as one stage of a pipeline."""
        with self._in_place():
            return self._module(*args, **kwargs)

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        group = parallel_state._PP
        parallel_state._PP = self._place
        try:
            yield
        finally:
            parallel_state._PP = group


def find_decoder(model: Any) -> Any:
    """Return the module of a vLLM model whose forward runs the layers: of a vision model, that of its language model.

    Raises:
        ValueError: The model has no such module, or cannot run as a stage of a pipeline.
    """
    language = model.get_language_model() if hasattr(model, "get_language_model") else model
    inner = getattr(language, "model", None)
    decoder = language if hasattr(language, "pp_group") else inner
    layers = getattr(inner, "layers", None)
    if not isinstance(layers, torch.nn.ModuleList) or not (
        hasattr(decoder, "pp_group") or hasattr(decoder, "start_layer")
    ):
        raise ValueError(
            f"model: expected a vLLM model that can be one of several pipeline stages, got {type(model).__name__}"
        )
    return decoder


def layers_of(decoder: Any) -> torch.nn.ModuleList:
    """Return all decoder layers of the model; those of other ranks are placeholders."""
    found = decoder.model.layers if hasattr(decoder, "pp_group") else decoder.layers
    assert isinstance(found, torch.nn.ModuleList)
    return found


def local_layers(decoder: Any) -> range:
    """Return the numbers of the layers that this rank of a pipeline runs."""
    if hasattr(decoder, "start_layer"):
        return range(decoder.start_layer, decoder.end_layer)
    numbers = [at for at, layer in enumerate(layers_of(decoder)) if not isinstance(layer, PPMissingLayer)]
    return range(numbers[0], numbers[-1] + 1)


def tensors_of(found: Any) -> dict[str, Any]:
    """Return the tensors that a stage hands on."""
    return dict(found.tensors)


def handed_on(tensors: dict[str, Any]) -> IntermediateTensors:
    """Return tensors in the form that stages take."""
    return IntermediateTensors(tensors)


def shallow_copy(module: torch.nn.Module) -> Any:
    """Return a module with the same submodules, whose own attributes can be changed.

    The dictionary of submodules is shared: where the engine later replaces one by a layer with adapters, a copy has it.
    """
    copied = object.__new__(type(module))
    copied.__dict__.update(module.__dict__)
    for name in _COMPILED:
        copied.__dict__.pop(name, None)
    return copied


def _with_own_forward(module: torch.nn.Module, tag: str) -> Any:
    """Return a shallow copy whose class has a forward of its own.

    vLLM finds compiled code by the class's forward: by its code object in a process, by its qualified name on disk.
    """
    cls = type(module)
    forward: Any = cls.forward
    code = forward.__code__
    if hasattr(code, "co_qualname"):
        code = code.replace(co_qualname=f"{code.co_qualname}_{tag}")
    own = types.FunctionType(code, forward.__globals__, forward.__name__, forward.__defaults__, forward.__closure__)
    own.__kwdefaults__ = forward.__kwdefaults__
    own.__annotations__ = forward.__annotations__
    own.__qualname__ = f"{forward.__qualname__}_{tag}"
    own.__module__ = forward.__module__
    copied = shallow_copy(module)
    copied.__class__ = type(f"{cls.__name__}_{tag}", (cls,), {"forward": own, "__module__": cls.__module__})
    return copied


def _compile_anew(module: Any, vllm_config: VllmConfig | None, tag: str) -> None:
    """Let a copy of a compiled module be compiled by itself at its first call, as vLLM's decorator does."""
    if vllm_config is None:
        module.do_not_compile = True
    if getattr(module, "do_not_compile", True):
        return
    module.was_aot_compile_fn_loaded_from_disk = False
    module._compile_tag = tag
    with set_current_vllm_config(vllm_config), set_model_tag(tag):
        TorchCompileWithNoGuardsWrapper.__init__(module)
