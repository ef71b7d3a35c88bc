"""Virtual gates: derivatives of a loss in scalars that would multiply the layers' residual branches.

A gate ``g = 1`` on a branch, ``h_out = h_in + g * branch``, has the derivative ``dL/dg = <branch, dL/dh_out>``: no gate
need be there. A gate that acts on some rows only has the same sum over those rows (POP, arXiv 2602.03295, section 3).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pop_ext.hf.restore import replaced_forward
from pop_ext.methods.calibration import decoder_layers, first_of, hidden_states_of

LAYER, ATTENTION, MLP = "layer", "attention", "mlp"
"""What a gate may act on: a layer's whole residual branch, or that of its attention or MLP."""


def gate_derivatives(
    model: Any, ids: Tensor, loss_rows: int, uniforms: Tensor, branches: bool = False, recompute: bool = False
) -> dict[str, Tensor]:
    """Derivatives of each sequence's loss in its own gates, by one forward and one backward.

    The loss is the sum over the last ``loss_rows`` rows of -log p(y), with y drawn from the model's own p at each row.
    The batch needs one backward only: no row of one sequence reads a row of another, so the gradient of the summed
    loss in a sequence's rows is that of its own loss.

    Args:
        model: stock forward, evaluation mode, no parameter that asks for a gradient.
        ids: [batch, rows] that the model reads.
        uniforms: [batch, loss_rows] float64 in [0, 1) that draw the targets.
        branches: also the gates of attention and MLP branches.
        recompute: hold hidden states only, and run each layer once more in the backward.

    Returns:
        per kind of gate, [batch, 2, layers] float64 on the CPU: gates on the context rows, gates on the loss rows.

    Raises:
        ValueError: ``branches``, and a layer whose MLP does not read the sum of its input and its attention.
    """
    layers = decoder_layers(model)
    found: dict[str, list[Tensor | None]] = {kind: [None] * len(layers) for kind in kinds(branches)}
    with ExitStack() as stack, torch.inference_mode(False), torch.enable_grad():
        if recompute:
            for layer in layers:
                stack.enter_context(replaced_forward(layer, partial(_checkpointed, layer.forward)))
        with _gates(model, layers, ids.shape[1] - loss_rows, found):
            loss = _sampled_loss(last_logits(model, ids, loss_rows), uniforms)
        loss.backward()
    derivatives = {}
    for kind, rows in found.items():
        # A branch that no loss depends on never gets a gradient: the last layer's MLP on context rows, say.
        per_layer = [row.cpu() if row is not None else torch.zeros(len(ids), 2, dtype=torch.float64) for row in rows]
        derivatives[kind] = torch.stack(per_layer, dim=-1)
    return derivatives


def kinds(branches: bool) -> tuple[str, ...]:
    """What gates there are."""
    return (LAYER, ATTENTION, MLP) if branches else (LAYER,)


def _checkpointed(forward: Any, *args: Any, **kwargs: Any) -> Any:
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


@contextmanager
def _gates(model: Any, layers: list[Any], context: int, found: dict[str, list[Tensor | None]]) -> Iterator[None]:
    """A backward of what was computed inside writes into ``found`` the derivatives of every gate."""
    branches = ATTENTION in found
    middle: dict[int, Tensor] = {}  # hidden state between attention and MLP, of the layer that is running
    with ExitStack() as stack:
        # The weights ask for no gradient, so that something must.
        embedded = model.get_input_embeddings().register_forward_hook(lambda module, args, out: out.requires_grad_())
        stack.callback(embedded.remove)
        for index, layer in enumerate(layers):

            def entered(norm: nn.Module, args: Any, kwargs: Any, index: int = index) -> None:
                middle[index] = hidden_states_of(args, kwargs)

            def left(module: nn.Module, args: Any, kwargs: Any, output: Any, index: int = index) -> None:
                before, after = hidden_states_of(args, kwargs), first_of(output)
                _watch(before, after, context, partial(found[LAYER].__setitem__, index))
                if branches:
                    between = middle.pop(index)
                    _watch(before, between, context, partial(found[ATTENTION].__setitem__, index))
                    _watch(between, after, context, partial(found[MLP].__setitem__, index))

            stack.callback(layer.register_forward_hook(left, with_kwargs=True).remove)
            if branches:
                norm = _norm_between(layer, index)
                stack.callback(norm.register_forward_pre_hook(entered, with_kwargs=True).remove)
        yield


def _watch(before: Tensor, after: Tensor, context: int, keep: Any) -> None:
    """Once the gradient at ``after`` is there, keeps the derivatives [batch, 2] of the gates on ``after - before``."""
    # Detached, so that the tensor's hook holds no reference to the tensor.
    start, end = before.detach(), after.detach()

    def hook(gradient: Tensor) -> None:
        branch = end.float() - start.float()
        rows = (branch * gradient.float()).sum(-1).double()  # [batch, rows]
        keep(torch.stack([rows[:, :context].sum(1), rows[:, context:].sum(1)], dim=1))

    after.register_hook(hook)


def _norm_between(layer: Any, index: int) -> nn.Module:
    """The norm whose input is the sum of the layer's input and its attention branch."""
    norms = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
    before, middle, sandwich, after = (getattr(layer, name, None) for name in norms)
    if sandwich is not None:
        middle = sandwich
    elif after is not None:  # the norm behind the attention normalises the branch, not the sum
        middle = None
    if before is None or middle is None:
        raise ValueError(
            f"branches: expected layers that add attention first and MLP second, behind a norm each, got "
            f"{type(layer).__name__} as layer {index}"
        )
    return middle


def last_logits(model: Any, ids: Tensor, rows: int) -> Tensor:
    """[batch, rows, vocab] of the last rows."""
    takes_keep = "logits_to_keep" in inspect.signature(type(model).forward).parameters
    keep = {"logits_to_keep": rows} if takes_keep else {}
    logits: Tensor = model(input_ids=ids, use_cache=False, return_dict=True, **keep).logits
    return logits[:, -rows:]


def _sampled_loss(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Sum of -log p(y) over all rows of ``logits`` [batch, rows, vocab], y drawn from p by inverting its distribution.

    The same uniforms draw the same targets on every device and in every grouping into batches.
    """
    log_p = logits.float().log_softmax(-1)
    below = log_p.detach().double().exp().cumsum(-1)
    at = uniforms.to(below.device)[..., None] * below[..., -1:]
    targets = torch.searchsorted(below, at, right=True).clamp_max(logits.shape[-1] - 1)
    return -log_p.gather(-1, targets).sum()
