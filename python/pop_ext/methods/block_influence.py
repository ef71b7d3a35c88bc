"""Block influence (ShortGPT, arXiv 2403.03853): score a layer by the angle between its input and its output."""

from __future__ import annotations

import json
import math
from contextlib import ExitStack
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from pop_ext.methods.calibration import (
    Batches,
    check_batches,
    count_sequences,
    decoder_layers,
    input_hidden_states,
    output_hidden_states,
    stock_evaluation,
    stock_model,
)
from pop_ext.plans.origin import Origin, origin_of
from pop_ext.plans.plan import Plan
from pop_ext.plans.selection import ranked_plan
from pop_ext.utils.progress import Progress, reporting


@dataclass(frozen=True)
class BlockInfluence:
    """Block influence of every layer, as ``pop_ext.block_influence`` returns it.

    Attributes:
        influence: ``1 - E[cos(h_in, h_out)]`` of each layer, over all tokens of prompt and continuation alike.
        error: Standard error of each value over the samples; NaN for a single sample.
        origin: The model and the number of samples.
    """

    influence: tuple[float, ...]
    error: tuple[float, ...]
    origin: Origin

    def plan(
        self,
        count: SupportsIndex | None = None,
        fraction: float | None = None,
        *,
        contiguous: bool = False,
        boundary: SupportsIndex = 1,
        min_tokens: SupportsIndex = 0,
    ) -> Plan:
        """Return the plan that omits the layers of least influence.

        Args:
            count: Number of layers to omit.
            fraction: Fraction of the layers to omit, in place of ``count``. With neither, a third is omitted.
            contiguous: True to omit consecutive layers, those of the lowest sum. False, as in ShortGPT, to choose each
                layer on its own.
            boundary: As for ``Plan``.
            min_tokens: As for ``Plan``.

        Raises:
            ValueError: As for ``Plan.last``.
            TypeError: As for ``Plan.last``.
        """
        return ranked_plan(
            self.influence,
            self.origin,
            count,
            fraction,
            contiguous=contiguous,
            boundary=boundary,
            min_tokens=min_tokens,
        )

    def save(self, path: str | PathLike[str]) -> None:
        """Write influence, errors and origin to a JSON file.

        Raises:
            OSError: The file cannot be written.
        """
        errors = [None if math.isnan(value) else value for value in self.error]  # JSON has no NaN
        members = {"origin": self.origin.to_dict(), "influence": list(self.influence), "error": errors}
        Path(path).write_text(json.dumps(members, indent=2) + "\n", encoding="utf-8")


def block_influence(model: Any, batches: Batches, *, progress: Progress = False) -> BlockInfluence:
    """Score every layer by ``1 - cos(h_in, h_out)``, averaged over the tokens of a sequence and then over sequences.

    The score is meant for comparison with ``pop_ext.importance``. It reads no loss, and it does not tell a prompt from
    its continuation.

    Args:
        model: Hugging Face decoder of any family, enabled or not. It is left unchanged.
        batches: Iterable of input_ids, int [batch, T], without padding.
        progress: True for a progress bar, or a callback that takes (sequences done, their number or None).

    Returns:
        The scores with their standard errors.

    Raises:
        ValueError: ``batches`` is empty, or a batch has a bad shape or bad ids.
        TypeError: An argument has the wrong type.

    Source: ShortGPT (arXiv 2403.03853), block influence.
    """
    model = stock_model(model)
    layers = decoder_layers(model)
    per_batch = []
    with (
        stock_evaluation(model),
        torch.no_grad(),
        reporting(progress, "block influence", count_sequences(batches)) as advance,
    ):
        for ids in check_batches(batches, model):
            per_batch.append(_influences(model, layers, ids))
            advance(len(ids))
    if not per_batch:
        raise ValueError("batches: expected at least one sequence, got none")
    samples = torch.cat(per_batch)  # [samples, layers]
    count = len(samples)
    error = samples.std(0) / math.sqrt(count) if count > 1 else torch.full_like(samples[0], math.nan)
    origin = replace(origin_of(model, "block influence"), samples=count)
    return BlockInfluence(tuple(samples.mean(0).tolist()), tuple(error.tolist()), origin)


def _influences(model: Any, layers: list[Any], ids: Tensor) -> Tensor:
    """Return the influence of each layer on each sequence, [batch, layers] float64 on the CPU."""
    found: list[Tensor] = [torch.empty(0)] * len(layers)
    with ExitStack() as stack:
        for index, layer in enumerate(layers):

            def record(module: Any, args: Any, kwargs: Any, output: Any, index: int = index) -> None:
                before, after = input_hidden_states(args, kwargs).float(), output_hidden_states(output).float()
                found[index] = 1 - torch.cosine_similarity(before, after, dim=-1).double().mean(1).cpu()

            stack.callback(layer.register_forward_hook(record, with_kwargs=True).remove)
        (model.get_decoder() if hasattr(model, "get_decoder") else model)(input_ids=ids, use_cache=False)
    return torch.stack(found, dim=1)
