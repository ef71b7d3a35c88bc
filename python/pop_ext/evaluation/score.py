"""``pop_ext.score``: the log-likelihood of given continuations under a pruned model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from pop_ext import reference
from pop_ext.hf.architectures import UnsupportedModelError
from pop_ext.hf.dispatch import Backend
from pop_ext.hf.enable import require_enabled
from pop_ext.hf.forward import PrefillForward
from pop_ext.hf.inputs import make_request
from pop_ext.hf.modules import find_decoder_modules, input_device, rope_follows_length
from pop_ext.hf.native_backend import NativeBackend
from pop_ext.hf.native_model import NativeModel
from pop_ext.hf.portable_backend import PortableBackend
from pop_ext.utils.tensors import check_dense, is_out_of_memory

Pair = tuple[torch.Tensor, torch.Tensor]
"""A context and its continuation, int64 [n] each."""
Ids = Sequence[int] | torch.Tensor
"""One sequence of token ids."""


class Score(NamedTuple):
    """Score of one continuation.

    Attributes:
        log_likelihood: Sum of the log-probabilities of its tokens, in nats.
        is_greedy: True if each of its tokens is the most probable one at its position.
    """

    log_likelihood: float
    is_greedy: bool


def score(
    model: nn.Module, context_ids: Sequence[Ids], continuation_ids: Sequence[Ids], batch_size: int = 8
) -> list[Score]:
    """Compute the log-likelihood of continuations after their contexts, under the model's enabled plan.

    The context is pruned as in a prefill of it: the plan's boundary counts back from the start of the continuation.
    The continuation itself runs at full depth, like the decode that it stands for. Under ``fp8`` the continuation is
    computed with products in 8-bit floats, too, unlike a decode. The plan's ``min_tokens`` is ignored.

    Args:
        model: Enabled model.
        context_ids: One sequence of ids per pair, a list or a 1-D tensor, none empty.
        continuation_ids: Likewise.
        batch_size: Pairs per forward. It changes memory, not results.

    Returns:
        One score per pair.

    Raises:
        ValueError: The model is not enabled, a sequence is empty, the lists differ in length, or an id is outside the
            vocabulary.
        TypeError: An argument has the wrong type, or ids are not integers.
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
    """Yield the logits that predict each continuation, computed as in ``score``.

    Args:
        model: Enabled model.
        context_ids: As for ``score``.
        continuation_ids: As for ``score``.
        batch_size: As for ``score``.

    Yields:
        (logits [n, vocab], the n tokens of the continuation), in the order of the pairs.

    Raises:
        ValueError: As for ``score``.
        TypeError: As for ``score``.
    """
    forward = require_enabled(model)
    inner: Any = forward.model
    if isinstance(batch_size, bool) or not isinstance(batch_size, int):
        raise TypeError(f"batch_size: expected an int, got {type(batch_size).__name__} {batch_size!r}")
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    pairs = _pairs(context_ids, continuation_ids, inner.get_input_embeddings().weight.shape[0])
    backend, loaded = _scoring_backend(forward)
    portable = isinstance(backend, PortableBackend)
    for batch in _batches(pairs, batch_size, portable or rope_follows_length(find_decoder_modules(inner).rotary)):
        # The last token of a continuation is left out: nothing after it is scored.
        inputs = [torch.cat([context, continuation[:-1]]) for context, continuation in batch]
        num_logits = [len(continuation) for _, continuation in batch]
        boundary = [
            min(forward.plan.boundary - 1 + count, len(ids)) for count, ids in zip(num_logits, inputs, strict=True)
        ]
        device = input_device(inner)
        ids = torch.nn.utils.rnn.pad_sequence(inputs, batch_first=True).to(device)
        columns = torch.arange(ids.shape[1], device="cpu")
        mask = (columns[None] < torch.tensor([len(row) for row in inputs], device="cpu")[:, None]).long().to(device)
        if isinstance(backend, NativeBackend):
            # Keep what load returns: another thread may load anew meanwhile, or a disable free it.
            native, loaded = loaded or backend.load(forward.model), None
            request = make_request(native, ids, attention_mask=mask, boundary=boundary, logits_to_keep=num_logits)
            logits = native.run(request).logits
        elif isinstance(backend, PortableBackend):
            logits = backend.packed_logits(inner, ids, boundary, num_logits)
        else:
            with forward.stock_inside():
                logits, _ = reference.prefill(
                    forward.model, ids, forward.plan, num_logits, attention_mask=mask, boundary=boundary
                )
        for row, (_, continuation) in zip(logits.split(num_logits), batch, strict=True):
            yield row, continuation.to(row.device)


def _scoring_backend(forward: PrefillForward) -> tuple[Backend, NativeModel | None]:
    """Return the backend of an enabled model, or the one that it falls back to if the model has no native form now.

    Returns:
        The backend, and what it has loaded for the first batch, if it is native.
    """
    backend = forward.backend
    if not isinstance(backend, NativeBackend):
        return backend, None
    try:
        return backend, backend.load(forward.model)
    except UnsupportedModelError:
        if backend.fallback is None:
            raise
        return backend.fallback, None


def _batches(pairs: Sequence[Pair], batch_size: int, one_length: bool) -> Iterator[Sequence[Pair]]:
    """Yield at most ``batch_size`` neighbouring pairs at a time, with ``one_length`` only such of equal length."""
    begin = 0
    while begin < len(pairs):
        end = min(begin + batch_size, len(pairs))
        if one_length:
            length = sum(map(len, pairs[begin]))
            end = next((i for i in range(begin, end) if sum(map(len, pairs[i])) != length), end)
        yield pairs[begin:end]
        begin = end


def _pairs(context_ids: Sequence[Ids], continuation_ids: Sequence[Ids], vocab_size: int) -> list[Pair]:
    """Check contexts and continuations, and return them as pairs of int64 tensors [n] on the CPU."""
    lists: dict[str, Any] = {"context_ids": context_ids, "continuation_ids": continuation_ids}
    check_dense(lists)
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
    """Check the sequence of argument ``name`` for pair ``index``, and return it as int64 [n] on the CPU."""
    if not isinstance(ids, (Sequence, torch.Tensor)) or isinstance(ids, (str, bytes)):
        raise TypeError(f"{name}: expected one sequence of ids per pair, got {type(ids).__name__} for pair {index}")
    check_dense({f"{name}[{index}]": ids})
    try:
        tensor = torch.as_tensor(ids, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:  # not numbers, ragged lists, or a tensor without data
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            raise
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
