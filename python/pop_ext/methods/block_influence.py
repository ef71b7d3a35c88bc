"""ShortGPT's measure of a layer (arXiv 2403.03853): how little its output turns away from its input."""

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
    checked,
    count_sequences,
    decoder_layers,
    first_of,
    hidden_states_of,
    stock_model,
    undisturbed,
)
from pop_ext.plans.origin import Origin, origin_of
from pop_ext.plans.plan import Plan
from pop_ext.plans.selection import ranked_plan
from pop_ext.utils.progress import Progress, reporting


@dataclass(frozen=True)
class BlockInfluence:
    """What ``pop_ext.block_influence`` returns.

    Attributes:
        influence: ``1 - E[cos(h_in, h_out)]`` of each layer, over all tokens; it knows no stage.
        error: standard errors over the samples, NaN for a single one.
        origin: the model, and the number of samples.
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
        """Omits the layers of least influence, by default each for itself, as ShortGPT does. As ``Importance.plan``."""
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
        """Writes it as JSON."""
        errors = [None if math.isnan(value) else value for value in self.error]  # JSON has no NaN
        members = {"origin": self.origin.to_dict(), "influence": list(self.influence), "error": errors}
        Path(path).write_text(json.dumps(members, indent=2) + "\n", encoding="utf-8")


def block_influence(model: Any, batches: Batches, *, progress: Progress = False) -> BlockInfluence:
    """Scores every layer by ``1 - cos(h_in, h_out)``, averaged over the tokens of each sequence and then over those.

    It is here for comparison: it looks at no loss, and does not tell the prompt from what follows.

    Args:
        model: any Hugging Face decoder, enabled or not. As before afterwards.
        batches: an iterable of input_ids, int [batch, T], without padding.
        progress: True for a bar, or a callback told (sequences done, all of them or None).

    Raises:
        TypeError, ValueError: a bad argument, named.

    Source: ShortGPT (arXiv 2403.03853), block influence.
    """
    model = stock_model(model)
    layers = decoder_layers(model)
    of_samples = []
    with undisturbed(model), torch.no_grad(), reporting(progress, "block influence", count_sequences(batches)) as done:
        for ids in checked(batches, model):
            of_samples.append(_influences(model, layers, ids))
            done(len(ids))
    if not of_samples:
        raise ValueError("batches: expected at least one sequence, got none")
    samples = torch.cat(of_samples)  # [samples, layers]
    count = len(samples)
    error = samples.std(0) / math.sqrt(count) if count > 1 else torch.full_like(samples[0], math.nan)
    origin = replace(origin_of(model, "block influence"), samples=count)
    return BlockInfluence(tuple(samples.mean(0).tolist()), tuple(error.tolist()), origin)


def _influences(model: Any, layers: list[Any], ids: Tensor) -> Tensor:
    """[batch, layers] float64, on the CPU."""
    found: list[Tensor] = [torch.empty(0)] * len(layers)
    with ExitStack() as stack:
        for index, layer in enumerate(layers):

            def left(module: Any, args: Any, kwargs: Any, output: Any, index: int = index) -> None:
                before, after = hidden_states_of(args, kwargs).float(), first_of(output).float()
                found[index] = 1 - torch.cosine_similarity(before, after, dim=-1).double().mean(1).cpu()

            stack.callback(layer.register_forward_hook(left, with_kwargs=True).remove)
        (model.get_decoder() if hasattr(model, "get_decoder") else model)(input_ids=ids, use_cache=False)
    return torch.stack(found, dim=1)
