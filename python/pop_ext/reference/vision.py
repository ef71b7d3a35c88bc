"""Vision-language models for the oracle: what the wrapper hands to its language model, sequence by sequence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast

from pop_ext.hf.compat import with_cache
from pop_ext.hf.modules import DecoderModules, Module
from pop_ext.hf.restore import replaced_forward


@dataclass(frozen=True)
class Images:
    """The images of one sequence of `T_i` new tokens.

    Attributes:
        marked: bool [T_i], tokens of images that see each other in both directions; None: everything is causal.
        featured: bool [T_i], tokens that features are added to after the first layers; None: none.
        features: for each of the first layers [featured tokens, hidden].
    """

    marked: Tensor | None = None
    featured: Tensor | None = None
    features: tuple[Tensor, ...] = ()

    def start(self, context: int) -> int:
        """`context` rows, or as many fewer as it takes not to cut an image."""
        while (
            self.marked is not None and 0 < context < len(self.marked) and self.marked[context - 1 : context + 1].all()
        ):
            context -= 1
        return context

    def arguments(self, start: int, stop: int, past: int, config: Any, dtype: torch.dtype) -> dict[str, Any]:
        """What a call of the language model for new tokens [start, stop) takes besides the rows themselves."""
        arguments: dict[str, Any] = {}
        if self.featured is not None:
            before, here = int(self.featured[:start].sum()), int(self.featured[start:stop].sum())
            arguments["visual_pos_masks"] = self.featured[None, start:stop]
            arguments["deepstack_visual_embeds"] = [layer[before : before + here] for layer in self.features]
        if self.marked is not None and bool(self.marked.any()):
            arguments["attention_mask"] = self._masks(start, stop, past, config.sliding_window, dtype)
        return arguments

    def _masks(self, start: int, stop: int, past: int, window: int, dtype: torch.dtype) -> dict[str, Tensor]:
        """Masks [1, 1, rows, keys] to add to scores, by kind of layer."""
        assert self.marked is not None
        begins = self.marked & ~torch.nn.functional.pad(self.marked, (1, 0))[:-1]
        image = torch.where(self.marked, begins.cumsum(0), 0)  # a number for each, 0 for text
        image = torch.nn.functional.pad(image, (past, 0))[: past + stop]
        key = torch.arange(past + stop, device=image.device)
        row = key[past + start :, None]
        seen = (key <= row) | ((image[row] == image[key]) & (image[row] > 0))
        kinds = {"full_attention": seen, "sliding_attention": seen & (key > row - window)}
        lowest = torch.finfo(dtype).min
        return {
            name: torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, lowest)[None, None]
            for name, mask in kinds.items()
        }


@dataclass(frozen=True)
class Wrapped:
    """What a wrapper handed to its language model for a padded batch.

    Attributes:
        embeds: [batch, T, hidden], features of images in their places.
        positions: [batch, T] or [3, batch, T]; None: the wrapper left them to the language model.
        featured: bool [batch, T] or None; features: for each of the first layers [featured tokens, hidden].
        marked: bool [batch, T] or None, as in `Images`.
    """

    embeds: Tensor
    positions: Tensor | None
    featured: Tensor | None
    features: tuple[Tensor, ...]
    marked: Tensor | None

    def images(self, sequence: int, columns: Tensor) -> Images:
        """Those of one sequence, whose real tokens are in `columns`."""
        marked = None if self.marked is None else self.marked[sequence, columns]
        if self.featured is None:
            return Images(marked)
        before = int(self.featured[:sequence].sum())
        here = int(self.featured[sequence].sum())
        features = tuple(layer[before : before + here] for layer in self.features)
        return Images(marked, self.featured[sequence, columns], features)


def is_wrapped(model: Module, parts: DecoderModules) -> bool:
    """Whether `model.model` is a wrapper around the language model."""
    return getattr(getattr(model, "model", None), "language_model", None) is parts.decoder


def run_wrapper(model: Module, parts: DecoderModules, **arguments: Any) -> Wrapped:
    """Runs the wrapper as it is, but for its language model; `arguments` are of its forward, the cache apart."""
    seen: list[dict[str, Any]] = []
    types = arguments.get("token_type_ids")

    def forward(**call: Any) -> BaseModelOutputWithPast:
        seen.append(call)
        return BaseModelOutputWithPast(last_hidden_state=call["inputs_embeds"])

    cache = with_cache(model.model, arguments.pop("past_key_values"))
    with replaced_forward(parts.decoder, forward):
        model.model(**arguments, **cache)
    (call,) = seen
    embeds, positions, mask = call["inputs_embeds"], call.get("position_ids"), call.get("visual_pos_masks")
    if positions is not None:
        positions = positions[1:] if len(positions) == 4 and positions.dim() == 3 else positions
        positions = positions[..., -embeds.shape[1] :]  # counted from a mask they begin with the past
        positions = positions.expand(*positions.shape[:-2], *embeds.shape[:2])
    features = tuple(layer.to(embeds.dtype) for layer in call.get("deepstack_visual_embeds") or ())
    marked = None if types is None else types[:, -embeds.shape[1] :] == 1
    return Wrapped(embeds, positions, mask if features else None, features, marked)
