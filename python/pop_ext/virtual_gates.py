"""How much each layer matters in prefill and in decode, by virtual gates (paper, section 3).

A virtual gate multiplies what a layer adds to the residual stream, ``x + g * branch(x)``, at ``g = 1``. Removing
the layer is a step from 1 to 0; to second order it costs half of ``E[(dL/dg)^2]`` where the targets of ``L`` are drawn
from the model itself (Fisher information). No gate is built: ``dL/dg = <branch, dL/d(output)>``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute_in_backward

from pop_ext.importance_result import Importance
from pop_ext.reference import replaced_forward
from pop_ext.reference_checks import check_ids, check_inputs, find_parts


def importance(
    model: nn.Module,
    batches: Iterable[Tensor],
    *,
    continuation: int | None = None,
    seed: int = 0,
    checkpointing: bool = False,
    state: str | PathLike[str] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Importance:
    """Scores each layer by the second-order effect of removing it, apart for prefill and decode.

    A sample is a prompt and its continuation, the last tokens of a row. The *loss rows* predict the continuation, so
    the last token of the prompt is the first of them; the *context rows* are all before. The loss of a sample is the
    sum over its loss rows of ``-log p(y)``, ``y`` drawn from the model's own ``p`` at that row. ``prefill[l]`` is the
    mean over samples of the squared derivative by a gate on the context rows of layer ``l``, ``decode[l]`` by one on
    its loss rows. Rows of a batch do not see each other, so one backward gives the derivatives of every sample.

    Weights, gradients and the training mode of the model stay as they are.

    Args:
        model: any Hugging Face decoder that ``pop_ext.reference`` knows, on CPU or GPU, in eval mode.
        batches: ``input_ids [batch, T]`` without padding; ``T`` may differ from batch to batch.
        continuation: how many last tokens of a row are its continuation, 1 to ``T - 2``; by default a quarter of the
            row, at most 32.
        seed: of the drawn targets. Those of batch i depend on ``seed`` and i only.
        checkpointing: hold the activations inside one layer at a time, for a second forward of each layer.
        state: a JSON file written after every batch; where it exists, its batches are skipped and the rest follow.
        progress: called after each batch with the number of samples so far.

    Raises:
        ValueError, TypeError: a model in training mode, no batch, ids of another shape or outside the vocabulary,
            a continuation that leaves no context row, or a state of another model or of other arguments.
    """
    if model.training:
        raise ValueError("model: expected eval mode, got training mode; call model.eval()")
    if continuation is not None and (isinstance(continuation, bool) or not isinstance(continuation, int)):
        raise TypeError(f"continuation: expected an int or None, got {continuation!r}")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed: expected an int, got {seed!r}")
    result = Importance.empty(_name(model), len(find_parts(model).layers), seed, continuation)
    if state is not None and Path(state).exists():
        result = Importance.load(state).require_same_run(result, str(state))
    done = result.batches
    for index, ids in enumerate(batches):
        if index < done:
            continue
        split = _continuation(model, ids, continuation)
        generator = torch.Generator("cpu").manual_seed((seed * 1_000_003 + index) % 2**63)
        result = result.extended(*gate_derivatives(model, ids, split, generator, checkpointing))
        if state is not None:
            result.save(state)
        if progress is not None:
            progress(result.samples)
    if result.batches == 0:
        raise ValueError("batches: expected at least one batch of input_ids [batch, T], got none")
    return result


def gate_derivatives(
    model: nn.Module, ids: Tensor, continuation: int, generator: torch.Generator, checkpointing: bool = False
) -> tuple[Tensor, Tensor]:
    """``dL/dg`` of every sample and layer: context gates and loss-row gates, each float64 ``[batch, L]`` on the CPU.

    The last token of a row is a target of nothing here, so ``ids[:, :-1]`` is what the model reads.
    """
    parts = find_parts(model)
    inner: Any = model
    embedding = inner.get_input_embeddings()
    ids = ids.to(embedding.weight.device)
    loss_start = ids.shape[1] - 1 - continuation
    found: dict[int, Tensor] = {}  # layer -> <branch, gradient> [batch, T - 1]
    with _frozen(model), torch.enable_grad(), ExitStack() as stack:
        for index, layer in enumerate(parts.layers):
            if checkpointing:
                stack.enter_context(replaced_forward(layer, _checkpointed(layer.forward)))
            handle = layer.register_forward_hook(_gate(index, found), with_kwargs=True)
            stack.callback(handle.remove)
        handle = embedding.register_forward_hook(lambda module, args, output: output.detach().requires_grad_())
        stack.callback(handle.remove)
        # The class's forward: an enabled model's own would look for a prefill.
        stock_forward = type(inner).forward
        logits = stock_forward(inner, input_ids=ids[:, :-1], use_cache=False, logits_to_keep=continuation).logits
        log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        drawn = torch.multinomial(log_p.detach().float().exp().flatten(0, 1).cpu(), 1, generator=generator)
        targets = drawn.view(len(ids), continuation, 1).to(log_p.device)
        (-log_p.gather(-1, targets).sum()).backward()  # every leaf but the embeddings' output is frozen
    rows = torch.stack([found[index] for index in range(len(parts.layers))], dim=1)  # [batch, L, T - 1]
    return rows[..., :loss_start].sum(-1), rows[..., loss_start:].sum(-1)


def _gate(index: int, found: dict[int, Tensor]) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        before = args[0] if args else kwargs["hidden_states"]
        after = output[0] if isinstance(output, tuple) else output
        branch = (after - before).detach()

        def keep(gradient: Tensor) -> None:
            found[index] = (branch.double() * gradient.double()).sum(-1).cpu()

        after.register_hook(keep)

    return hook


def _checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return recompute_in_backward(forward, *args, use_reentrant=False, **kwargs)

    return wrapped


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No gradient for any weight inside; those that asked for one ask again after."""
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


def _continuation(model: nn.Module, ids: Any, wanted: int | None) -> int:
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.shape[0] < 1 or ids.shape[1] < 3:
        found = f"shape {list(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(f"batches: expected input_ids [batch, T] of at least 3 tokens a row, got {found}")
    check_inputs(model, ids, None)
    check_ids(model, ids, torch.ones_like(ids, dtype=torch.bool))
    length = ids.shape[1]
    split = max(1, min(32, length // 4)) if wanted is None else wanted
    if not 1 <= split <= length - 2:
        raise ValueError(f"continuation: expected 1...{length - 2} for a row of {length} tokens, got {split}")
    return split


def _name(model: nn.Module) -> str:
    """What tells models apart in a state file: kind and sizes, no path."""
    config: Any = model.config
    text = config.get_text_config()
    return (
        f"{text.model_type} of {text.num_hidden_layers} layers, hidden size {text.hidden_size}, "
        f"vocabulary {text.vocab_size}"
    )
