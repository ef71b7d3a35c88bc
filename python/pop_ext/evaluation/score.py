"""How well a pruned model does: log-likelihood of given continuations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from pop_ext import reference
from pop_ext.hf.enable import require_enabled
from pop_ext.hf.inputs import make_request
from pop_ext.hf.native_backend import NativeBackend
from pop_ext.hf.packing import lengths

Ids = Sequence[int] | torch.Tensor


class Score(NamedTuple):
    """Of one continuation.

    Attributes:
        log_likelihood: sum of its tokens' log-probabilities, in nats.
        is_greedy: whether each of its tokens is the most probable one at its place.
    """

    log_likelihood: float
    is_greedy: bool


def score(
    model: nn.Module, context_ids: Sequence[Ids], continuation_ids: Sequence[Ids], batch_size: int = 8
) -> list[Score]:
    """Log-likelihood of continuations after their contexts, under the model's enabled plan.

    The prompt is pruned as a prefill of it would be: the plan's boundary before the continuation
    counts, the continuation itself runs at full depth, like the decode it stands for; under ``fp8``
    with products in 8-bit floats, unlike it. The plan is executed as given, whatever its ``min_tokens``.

    Args:
        context_ids, continuation_ids: one sequence of ids (a list or a 1-D tensor) per pair, none empty.
        batch_size: pairs per forward; it changes memory, not results.

    Raises:
        ValueError, TypeError: a model that is not enabled, an empty sequence, lists of different length,
            ids that are no integers or outside the vocabulary.
    """
    scores: list[Score] = []
    for row, continuation in continuation_logits(model, context_ids, continuation_ids, batch_size):
        log_p = row.float().log_softmax(-1)
        likelihood = float(log_p.gather(1, continuation[:, None]).sum())
        scores.append(Score(likelihood, bool((log_p.argmax(-1) == continuation).all())))
    return scores


def continuation_logits(
    model: nn.Module, context_ids: Sequence[Ids], continuation_ids: Sequence[Ids], batch_size: int = 8
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Of each pair the logits [n, vocab] that predict its continuation's n tokens, and those tokens, as ``score`` does.

    Raises:
        ValueError, TypeError: as ``score``.
    """
    forward = require_enabled(model)
    inner: Any = forward.model
    if isinstance(batch_size, bool) or not isinstance(batch_size, int):
        raise TypeError(f"batch_size: expected an int, got {type(batch_size).__name__} {batch_size!r}")
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    pairs = _pairs(context_ids, continuation_ids, inner.get_input_embeddings().weight.shape[0])
    for begin in range(0, len(pairs), batch_size):
        batch = pairs[begin : begin + batch_size]
        # The last token of a continuation predicts nothing that is asked for.
        inputs = [torch.cat([context, continuation[:-1]]) for context, continuation in batch]
        keeps = [len(continuation) for _, continuation in batch]
        boundary = [min(forward.plan.boundary - 1 + keep, len(ids)) for keep, ids in zip(keeps, inputs, strict=True)]
        device = inner.get_input_embeddings().weight.device
        ids = torch.nn.utils.rnn.pad_sequence(inputs, batch_first=True).to(device)
        columns = torch.arange(ids.shape[1], device="cpu")
        mask = (columns[None] < lengths([len(row) for row in inputs])[:, None]).long().to(device)
        if isinstance(forward.backend, NativeBackend):
            # Keep what load returns: another thread may load anew meanwhile, or a disable free it.
            native = forward.backend.load(forward.model)
            request = make_request(native, ids, attention_mask=mask, boundary=boundary, logits_to_keep=keeps)
            logits = native.run(request).logits
        else:
            with forward.stock_inside():
                logits, _ = reference.prefill(
                    forward.model, ids, forward.plan, keeps, attention_mask=mask, boundary=boundary
                )
        for row, (_, continuation) in zip(logits.split(keeps), batch, strict=True):
            yield row, continuation.to(row.device)


def _pairs(
    context_ids: Sequence[Ids], continuation_ids: Sequence[Ids], vocab_size: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    lists: dict[str, Any] = {"context_ids": context_ids, "continuation_ids": continuation_ids}
    for name, given in lists.items():
        is_list = isinstance(given, Sequence) and not isinstance(given, (str, bytes))
        if not is_list and not (isinstance(given, torch.Tensor) and given.ndim > 0):
            found = "a tensor of shape []" if isinstance(given, torch.Tensor) else type(given).__name__
            raise TypeError(f"{name}: expected a list with one sequence of ids per pair, got {found}")
    if len(context_ids) != len(continuation_ids):
        raise ValueError(
            f"continuation_ids: expected {len(context_ids)} sequences like context_ids, got {len(continuation_ids)}"
        )
    contexts = [_as_ids("context_ids", i, ids, vocab_size) for i, ids in enumerate(context_ids)]
    continuations = [_as_ids("continuation_ids", i, ids, vocab_size) for i, ids in enumerate(continuation_ids)]
    return list(zip(contexts, continuations, strict=True))


def _as_ids(name: str, index: int, ids: Ids, vocab_size: int) -> torch.Tensor:
    if not isinstance(ids, (Sequence, torch.Tensor)) or isinstance(ids, (str, bytes)):
        raise TypeError(f"{name}: expected one sequence of ids per pair, got {type(ids).__name__} for pair {index}")
    try:
        tensor = torch.as_tensor(ids, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:  # not numbers, lists of different length, no data
        raise TypeError(f"{name}: expected one sequence of integer ids per pair, for pair {index}: {error}") from error
    if tensor.ndim != 1 or len(tensor) == 0:
        raise ValueError(f"{name}: expected at least one id for pair {index}, got shape {list(tensor.shape)}")
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(f"{name}: expected integer ids, got {tensor.dtype} for pair {index}")
    low, high = (int(bound) for bound in tensor.aminmax())
    if low < 0 or high >= vocab_size:
        found = low if low < 0 else high
        raise ValueError(f"{name}: expected ids from 0 to {vocab_size - 1}, got {found} for pair {index}")
    return tensor.to(torch.int64)
