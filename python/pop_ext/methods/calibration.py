"""Calibration: access to the stock model and its decoder layers, and checks of the batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from pop_ext.hf.compat import unwrapped
from pop_ext.hf.forward import find_prefill_forward
from pop_ext.hf.restore import evaluation_mode
from pop_ext.utils.forks import check_threads
from pop_ext.utils.tensors import check_dense, resolved, unusual_kind

Batches = Iterable[Tensor]
"""Calibration sequences: tensors of ids, int [batch, T] without padding. T may differ between batches."""


def stock_model(model: Any) -> Any:
    """Return the Hugging Face model, unwrapped from ``torch.compile`` and PEFT.

    Raises:
        TypeError: ``model`` is not a module with a config.
        RuntimeError: It is on the CPU, and the process was forked from one with OpenMP threads (``check_threads``).
    """
    inner = unwrapped(model)
    if not isinstance(inner, nn.Module) or not hasattr(inner, "config"):
        raise TypeError(f"model: expected a Hugging Face causal language model, got {type(inner).__name__}")
    if next((parameter.device.type for parameter in inner.parameters()), "cpu") == "cpu":
        check_threads()
    return inner


def decoder_layers(model: Any) -> list[Any]:
    """Return the decoder layers of a Hugging Face causal language model of any family.

    Raises:
        ValueError: The decoder does not have exactly one list of ``config.num_hidden_layers`` layers.
    """
    depth = model.config.get_text_config().num_hidden_layers
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    lists = [child for child in (decoder or model).children() if isinstance(child, nn.ModuleList)]
    lists = [layers for layers in lists if len(layers) == depth]
    if len(lists) != 1:
        raise ValueError(
            f"model: expected one list of {depth} decoder layers in {type(decoder or model).__name__}, got {len(lists)}"
        )
    return list(lists[0])


@contextmanager
def stock_evaluation(model: nn.Module) -> Iterator[None]:
    """Run the block with the stock forward, in evaluation mode and without parameter gradients, then restore the model.

    An enabled model runs its stock forward inside, too.

    Raises:
        ValueError: A parameter was made in inference mode, so no backward can use it.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_inference():
            raise ValueError(f"model: expected parameters made outside inference mode, got {name} made within")
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    forward = find_prefill_forward(model)
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        with evaluation_mode(model), nullcontext() if forward is None else forward.stock_inside():
            yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def check_batches(batches: Batches, model: Any, least: int = 1) -> Iterator[Tensor]:
    """Yield each batch as int64 [batch, T] on the model's device, after a check.

    Args:
        batches: The batches, read once.
        model: Hugging Face model.
        least: Smallest number of tokens per sequence.

    Raises:
        TypeError: ``batches`` is not an iterable, or a batch is not an int64 or int32 tensor.
        ValueError: A batch is not [batch, T], is empty, is too short, or has ids outside the vocabulary.
    """
    if isinstance(batches, Tensor) or not isinstance(batches, Iterable):
        raise TypeError(f"batches: expected an iterable of input_ids [batch, T], got {type(batches).__name__}")
    weight = model.get_input_embeddings().weight
    for index, ids in enumerate(batches):
        if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32):
            kind = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
            raise TypeError(f"batches: expected int64 or int32 tensors, got {kind} in batch {index}")
        check_dense({f"batches[{index}]": ids})
        if ids.ndim != 2 or ids.shape[0] == 0 or ids.shape[1] < least:
            raise ValueError(
                f"batches: expected [batch, T] with at least {least} tokens, got {list(ids.shape)} in batch {index}"
            )
        check_vocabulary("batches", ids, model, f" in batch {index}")
        ids = ids.clone() if ids.is_inference() and not torch.is_inference_mode_enabled() else ids
        yield resolved(ids.to(weight.device, torch.int64))


def check_vocabulary(name: str, ids: Tensor, model: Any, where: str = "", tokenized: bool = False) -> None:
    """Raise ValueError for an id outside the vocabulary of a model.

    Args:
        name: Argument to name in the error.
        ids: Ids of any shape.
        model: Hugging Face model.
        where: End of the error.
        tokenized: Whether a tokenizer made the ids, which may be that of another model.
    """
    size = model.get_input_embeddings().weight.shape[0]
    low, high = (int(bound) for bound in ids.aminmax()) if ids.numel() else (0, 0)
    if low < 0 or high >= size:
        expected = f"ids from 0 to {size - 1}" + ", those of the model's tokenizer" * tokenized
        raise ValueError(f"{name}: expected {expected}, got {low if low < 0 else high}{where}")


def longest_input(model: Any) -> int | None:
    """Return the number of positions that a model was made for; None if its config does not say."""
    limit: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return limit if limit and limit > 0 else None  # XLNet's is -1


def count_sequences(batches: Batches) -> int | None:
    """Return the number of sequences, or None for a generator, which can only be counted by reading it."""
    if not isinstance(batches, Sequence):
        return None
    tensors = [ids for ids in batches if isinstance(ids, Tensor) and unusual_kind(ids) is None]
    return sum(len(ids) for ids in tensors if ids.ndim > 0)


def input_hidden_states(arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Tensor:
    """Return the hidden states [batch, T, hidden_size] among the arguments of a decoder layer's call."""
    states: Tensor = arguments[0] if arguments else keywords["hidden_states"]
    return states


def output_hidden_states(output: Any) -> Tensor:
    """Return the hidden states [batch, T, hidden_size] that a layer returned, alone or first in a tuple."""
    states: Tensor = output[0] if isinstance(output, tuple) else output
    return states


def with_hidden_states(output: Any, hidden_states: Tensor) -> Any:
    """Return what a layer returned with other hidden states, alone or first in a tuple, as its decoder expects them."""
    return (hidden_states, *output[1:]) if isinstance(output, tuple) else hidden_states
