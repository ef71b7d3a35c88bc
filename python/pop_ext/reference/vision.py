"""Vision-language models for the oracle: the inputs that the wrapper passes to its language model, by sequence."""

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
    """The images of one sequence of ``T_i`` new tokens.

    Attributes:
        bidirectional: bool [T_i], tokens of images that attend to each other in both directions. None if all
            attention is causal.
        feature_mask: bool [T_i], tokens that features are added to after the first layers. None if there are none.
        features: One [tokens with features, hidden] for each of the first layers.
    """

    bidirectional: Tensor | None = None
    feature_mask: Tensor | None = None
    features: tuple[Tensor, ...] = ()

    def snap_to_image_start(self, context: int) -> int:
        """Lower a number of context rows until the boundary does not split an image."""
        both = self.bidirectional
        while both is not None and 0 < context < len(both) and both[context - 1 : context + 1].all():
            context -= 1
        return context

    def arguments(self, start: int, stop: int, past: int, config: Any, dtype: torch.dtype) -> dict[str, Any]:
        """Return the extra arguments of the language model for the new tokens in [start, stop).

        Args:
            start: First new token.
            stop: One past the last new token.
            past: Number of past positions.
            config: Text config of the model.
            dtype: Dtype of the masks.
        """
        arguments: dict[str, Any] = {}
        if self.feature_mask is not None:
            before, here = int(self.feature_mask[:start].sum()), int(self.feature_mask[start:stop].sum())
            arguments["visual_pos_masks"] = self.feature_mask[None, start:stop]
            arguments["deepstack_visual_embeds"] = [layer[before : before + here] for layer in self.features]
        if self.bidirectional is not None and bool(self.bidirectional.any()):
            arguments["attention_mask"] = self._masks(start, stop, past, config.sliding_window, dtype)
        return arguments

    def _masks(self, start: int, stop: int, past: int, window: int, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return additive masks [1, 1, rows, keys] by kind of layer; 0 where a row may attend to a key."""
        assert self.bidirectional is not None
        begins = self.bidirectional & ~torch.nn.functional.pad(self.bidirectional, (1, 0))[:-1]
        image = torch.where(self.bidirectional, begins.cumsum(0), 0)  # number of each image from 1, 0 for text
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
class DecoderInputs:
    """The inputs of the language model for a padded batch, as the wrapper of a vision-language model passes them.

    Attributes:
        embeds: [batch, T, hidden], with the features of images in their places.
        positions: [batch, T] or [3, batch, T]. None if the wrapper leaves them to the language model.
        feature_mask: bool [batch, T] or None, as in ``Images``.
        features: One [tokens with features, hidden] for each of the first layers.
        bidirectional: bool [batch, T] or None, as in ``Images``.
    """

    embeds: Tensor
    positions: Tensor | None
    feature_mask: Tensor | None
    features: tuple[Tensor, ...]
    bidirectional: Tensor | None

    def images(self, sequence: int, columns: Tensor) -> Images:
        """Return the images of one sequence, whose real tokens are in ``columns`` [T_i]."""
        bidirectional = None if self.bidirectional is None else self.bidirectional[sequence, columns]
        if self.feature_mask is None:
            return Images(bidirectional)
        before = int(self.feature_mask[:sequence].sum())
        here = int(self.feature_mask[sequence].sum())
        features = tuple(layer[before : before + here] for layer in self.features)
        return Images(bidirectional, self.feature_mask[sequence, columns], features)


def has_wrapper(model: Module, parts: DecoderModules) -> bool:
    """Return True if ``model.model`` is a wrapper around the language model."""
    wrapper: Module = getattr(model, "model", None)
    if wrapper is None or wrapper is parts.decoder:
        return False
    return any(child is parts.decoder for child in wrapper.children())


def run_wrapper(model: Module, parts: DecoderModules, **arguments: Any) -> DecoderInputs:
    """Run the stock wrapper, but record the call of its language model instead of running it.

    Args:
        model: Vision-language model.
        parts: Its modules.
        **arguments: Arguments of the wrapper's forward; the cache is passed as ``past_key_values``.

    Returns:
        The inputs of the language model.
    """
    calls: list[dict[str, Any]] = []
    types = arguments.get("token_type_ids")

    def forward(**call: Any) -> BaseModelOutputWithPast:
        calls.append(call)
        return BaseModelOutputWithPast(last_hidden_state=call["inputs_embeds"])

    cache = with_cache(model.model, arguments.pop("past_key_values"))
    with replaced_forward(parts.decoder, forward):
        model.model(**arguments, **cache)
    (call,) = calls
    embeds, positions, mask = call["inputs_embeds"], call.get("position_ids"), call.get("visual_pos_masks")
    if positions is not None:
        positions = positions[1:] if len(positions) == 4 and positions.dim() == 3 else positions
        positions = positions[..., -embeds.shape[1] :]  # positions counted from a mask include the past
        positions = positions.expand(*positions.shape[:-2], *embeds.shape[:2])
    features = tuple(layer.to(embeds.dtype) for layer in call.get("deepstack_visual_embeds") or ())
    bidirectional = None if types is None else types[:, -embeds.shape[1] :] == 1
    return DecoderInputs(embeds, positions, mask if features else None, features, bidirectional)
