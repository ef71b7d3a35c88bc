"""Run the stock forward of a model with its omitted layers as ``PartialLayer``."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pop_ext.hf.modules import Module
from pop_ext.hf.restore import module_restored_on_error
from pop_ext.plans.plan import Plan
from pop_ext.portable.decoder import Clones, Decoder, clone_module
from pop_ext.portable.layers import PartialLayer, Rows


def run_forward(model: Module, decoder: Decoder, plan: Plan, rows: Rows, arguments: dict[str, Any]) -> Any:
    """Run a pruned prefill: one forward of the model, in which context rows skip the omitted layers.

    Layers, weights and hooks of the model are those of the stock forward, and it is not changed during the call, so
    other threads may use it. The last layer is always partial, since nobody reads its context rows.

    Args:
        model: the model.
        decoder: its language model (``find_decoder``).
        plan: layers to omit.
        rows: of this call.
        arguments: of the model's ``forward``, with a cache and ``logits_to_keep``.

    Returns:
        What the stock forward returns.
    """
    fitted = {} if plan.projections is None else plan.projections.matrices
    last = plan.num_layers - 1
    layers: dict[str, nn.Module] = {}
    for index in sorted({*plan.omit, last}):
        layer, omitted = decoder.layers[index], index in plan.omit
        compute = rows.num_logits if index == last else rows.columns
        partial = PartialLayer(layer, rows, compute, fitted.get(index) if omitted else None)
        layers[str(index)] = clone_module(layer, partial)
    norm = decoder.module._modules.get("norm")
    children = {} if norm is None else {"norm": clone_module(norm, FinalNorm(norm, rows))}
    try:
        return run_with_layers(model, decoder, layers, children, arguments)
    finally:
        rows.merged = None


def run_with_layers(
    model: Module,
    decoder: Decoder,
    layers: dict[str, nn.Module],
    children: dict[str, nn.Module],
    arguments: dict[str, Any],
) -> Any:
    """Run the stock forward over clones of the modules around the layers.

    Args:
        model: the model. It is not changed during the call.
        decoder: its language model.
        layers: what stands in the place of decoder layers, by their number.
        children: what stands in the place of other children of the language model.
        arguments: of the model's ``forward``.

    Returns:
        What the stock forward returns.
    """
    clones = Clones()
    around = {decoder.list_name: clones.of(decoder.layers, **layers), **children}
    clone = clones.around(model, decoder.path, clones.of(decoder.module, **around))
    rotary: Any = getattr(decoder.module, "rotary_emb", None)
    try:
        with module_restored_on_error(rotary if isinstance(rotary, nn.Module) else decoder.layers):
            output = type(model).forward(clone, **arguments)
    finally:
        for made in layers.values():  # a clone inside a hook refers to itself, and would wait for the garbage collector
            made.__dict__.pop("forward", None)
    clones.give_back()
    return output


class FinalNorm:
    """Normalise only the rows whose logits are wanted, after the last layer. Some models norm their embeddings, too."""

    def __init__(self, norm: Module, rows: Rows) -> None:
        self.norm, self.rows = norm, rows

    def __call__(self, hidden_states: Tensor) -> Tensor:
        if hidden_states is self.rows.merged:
            hidden_states = hidden_states[..., -self.rows.num_logits :, :]
        output: Tensor = type(self.norm).forward(self.norm, hidden_states)
        return output
