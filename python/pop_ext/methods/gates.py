"""Virtual gates: the derivative of a loss with respect to a scalar gate g = 1 on a residual branch.

With ``h_out = h_in + g * branch`` the derivative is ``dL/dg = <branch, dL/dh_out>``, so the model needs no change. For
a gate on some rows only, the inner product runs over those rows (POP, arXiv 2602.03295, section 3).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pop_ext.hf.restore import replaced_forward
from pop_ext.methods.calibration import decoder_layers, input_hidden_states, output_hidden_states

LAYER, ATTENTION, MLP = "layer", "attention", "mlp"
"""Kinds of gates: on a layer's whole residual branch, on its attention branch, or on its MLP branch."""


def gate_derivatives(
    model: Any, ids: Tensor, loss_rows: int, uniforms: Tensor, branches: bool = False, recompute: bool = False
) -> dict[str, Tensor]:
    """Compute the derivative of each sequence's loss with respect to its own gates, in one forward and one backward.

    The loss of a sequence is the sum over its last ``loss_rows`` rows of -log p(y), with y drawn from the model's own p
    at each row. One backward serves the whole batch: no row of a sequence reads a row of another one, so the gradient
    of the summed loss at a sequence's rows is the gradient of its own loss.

    Args:
        model: Model inside ``stock_evaluation``.
        ids: int [batch, rows], all ids that the model reads.
        loss_rows: Number of last rows that the loss sums over.
        uniforms: float64 [batch, loss_rows] in [0, 1), from which the targets y are drawn.
        branches: True to add gates on the attention and MLP branches.
        recompute: True to keep hidden states only and run each layer again in the backward.

    Returns:
        Kind of gate -> derivatives, [batch, 2, layers] float64 on the CPU. Index 0 holds gates on context rows, index 1
        gates on loss rows.

    Raises:
        ValueError: With ``branches``, a layer whose MLP does not read the sum of the layer's input and its attention.
    """
    layers = decoder_layers(model)
    found: dict[str, list[Tensor | None]] = {kind: [None] * len(layers) for kind in gate_kinds(branches)}
    with ExitStack() as stack, torch.inference_mode(False), torch.enable_grad():
        if recompute:
            for layer in layers:
                stack.enter_context(replaced_forward(layer, partial(_checkpointed, layer.forward)))
        with _record_derivatives(model, layers, ids.shape[1] - loss_rows, found):
            loss = _sampled_loss(last_logits(model, ids, loss_rows), uniforms)
        loss.backward()
    derivatives = {}
    for kind, rows in found.items():
        # A branch that the loss does not depend on gets no gradient, such as the last layer's MLP on context rows.
        per_layer = [row.cpu() if row is not None else torch.zeros(len(ids), 2, dtype=torch.float64) for row in rows]
        derivatives[kind] = torch.stack(per_layer, dim=-1)
    return derivatives


def gate_kinds(branches: bool) -> tuple[str, ...]:
    """Return the kinds of gates to score, with or without the attention and MLP branches."""
    return (LAYER, ATTENTION, MLP) if branches else (LAYER,)


def _checkpointed(forward: Any, *args: Any, **kwargs: Any) -> Any:
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


@contextmanager
def _record_derivatives(
    model: Any, layers: list[Any], context: int, found: dict[str, list[Tensor | None]]
) -> Iterator[None]:
    """Hook the forward inside the block, so that its backward writes the derivatives of every gate into ``found``."""
    branches = ATTENTION in found
    middle: dict[int, Tensor] = {}  # the running layer's hidden state between attention and MLP
    with ExitStack() as stack:
        # No parameter requires a gradient, so the embeddings must: without one there is no graph.
        embedded = model.get_input_embeddings().register_forward_hook(lambda module, args, out: out.requires_grad_())
        stack.callback(embedded.remove)
        for index, layer in enumerate(layers):

            def keep_middle(norm: nn.Module, args: Any, kwargs: Any, index: int = index) -> None:
                middle[index] = input_hidden_states(args, kwargs)

            def watch_layer(module: nn.Module, args: Any, kwargs: Any, output: Any, index: int = index) -> None:
                before, after = input_hidden_states(args, kwargs), output_hidden_states(output)
                _watch_branch(before, after, context, partial(found[LAYER].__setitem__, index))
                if branches:
                    between = middle.pop(index)
                    _watch_branch(before, between, context, partial(found[ATTENTION].__setitem__, index))
                    _watch_branch(between, after, context, partial(found[MLP].__setitem__, index))

            stack.callback(layer.register_forward_hook(watch_layer, with_kwargs=True).remove)
            if branches:
                norm = _norm_between(layer, index)
                stack.callback(norm.register_forward_pre_hook(keep_middle, with_kwargs=True).remove)
        yield


def _watch_branch(before: Tensor, after: Tensor, context: int, keep: Callable[[Tensor], None]) -> None:
    """Call ``keep`` with the derivatives [batch, 2] of the gates on ``after - before``, once the backward reaches it.

    Args:
        before: Hidden states before the branch, [batch, rows, hidden_size].
        after: Hidden states after the branch.
        context: Number of context rows; the rows behind them are loss rows.
        keep: Receives the derivatives, float64.
    """
    # A hook that held the tensor itself would be a reference cycle, so it holds detached ones.
    start, end = before.detach(), after.detach()

    def hook(gradient: Tensor) -> None:
        branch = end.float() - start.float()
        rows = (branch * gradient.float()).sum(-1).double()  # [batch, rows]
        keep(torch.stack([rows[:, :context].sum(1), rows[:, context:].sum(1)], dim=1))

    after.register_hook(hook)


def _norm_between(layer: Any, index: int) -> nn.Module:
    """Return the norm that reads the sum of the layer's input and its attention branch."""
    norms = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
    before, middle, sandwich, after = (getattr(layer, name, None) for name in norms)
    if sandwich is not None:
        middle = sandwich
    elif after is not None:  # post_attention_layernorm normalises the branch here, not the sum
        middle = None
    if before is None or middle is None:
        raise ValueError(
            f"branches: expected layers that add attention first and MLP second, each after its own norm, got "
            f"{type(layer).__name__} as layer {index}"
        )
    return middle


def last_logits(model: Any, ids: Tensor, rows: int) -> Tensor:
    """Return the logits [batch, rows, vocab] of the last rows of ``ids`` [batch, T]."""
    takes_keep = "logits_to_keep" in inspect.signature(type(model).forward).parameters
    keep = {"logits_to_keep": rows} if takes_keep else {}
    logits: Tensor = model(input_ids=ids, use_cache=False, return_dict=True, **keep).logits
    return logits[:, -rows:]


def _sampled_loss(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Return the sum of -log p(y) over all rows, with y drawn from p by inverting its cumulative distribution.

    The same uniforms draw the same targets on every device and however sequences are grouped into batches.

    Args:
        logits: [batch, rows, vocab].
        uniforms: float64 [batch, rows] in [0, 1).
    """
    log_p = logits.float().log_softmax(-1)
    below = log_p.detach().double().exp().cumsum(-1)
    at = uniforms.to(below.device)[..., None] * below[..., -1:]
    targets = torch.searchsorted(below, at, right=True).clamp_max(logits.shape[-1] - 1)
    return -log_p.gather(-1, targets).sum()
