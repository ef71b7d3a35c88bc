"""Tiny random models of the wrappers that insert images into a language model, and prompts with images.

`vision_models` has those of Gemma 3 and Qwen3-VL, whose language models treat images in ways of their own.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import transformers
from models import draw_weights
from pop_ext.hf.families import WRAPPERS
from tiny_models import tiny_config
from torch import Tensor
from vision_models import END, IMAGE, START, VIDEO, VISION, Prompt, QwenPrompt, prompt_by

NAMES = sorted(WRAPPERS.keys() - VISION.keys())


@functools.cache
def wrapped(name: str, dtype: torch.dtype = torch.float32, text: str | None = None) -> Any:
    """Return a model of the wrapper that transformers calls `name`. Tests do not change it.

    Args:
        name: of the wrapper.
        dtype: of the weights.
        text: `model_type` of its language model; None for the default of its config.
    """
    config = tiny_config(name)
    if text is not None:
        config.text_config = tiny_config(text)
    for key, value in vars(config).items():
        if key.startswith("image_token"):
            setattr(config, key, IMAGE)
        elif key.startswith("video_token"):
            setattr(config, key, VIDEO)
        elif key.startswith(("vision_start", "boi_token")):
            setattr(config, key, START)
        elif key.startswith(("vision_end", "eoi_token")):
            setattr(config, key, END)
        elif key == "image_grid_pinpoints" and value:
            setattr(config, key, [[112, 56], [56, 112]])
    if isinstance(config.vision_config.patch_size, int):
        config.vision_config.patch_size = 14
    if hasattr(config.vision_config, "window_size"):
        config.vision_config.window_size = 56
    experts = getattr(config.get_text_config(), "num_experts", None)
    if experts and dtype != torch.float32:  # each token has all: near a tie, a choice among them may differ, correctly
        config.get_text_config().num_experts_per_tok = experts
    model_class = getattr(transformers, f"{WRAPPERS[name].prefix}ForConditionalGeneration")
    with torch.random.fork_rng(devices=[]):
        model = model_class._from_config(config, dtype=dtype, attn_implementation="sdpa")
    draw_weights(model, seed=0)
    return model.eval()


def image_prompt(model: Any, *sequences: list[int | str], seed: int = 0) -> Prompt:
    """Return a batch of sequences, padded on the left, each of text (a number of tokens) and "image"s."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    build = QwenPrompt if WRAPPERS[model.config.model_type].uses_mrope else _PixelPrompt
    return prompt_by(build(model, generator), *sequences)


class _PixelPrompt:
    """Build images of one size, as wrappers without a grid of patches take them."""

    def __init__(self, model: Any, generator: torch.Generator) -> None:
        self.generator, self._model, self._images = generator, model, 0

    def add(self, kind: str) -> list[int]:
        assert kind == "image"
        self._images += 1
        return [START, *[IMAGE] * _features_of_an_image(self._model), END]

    def arguments(self, ids: Tensor) -> dict[str, Any]:
        return _pixels(self._model, self._images, self.generator) if self._images else {}


def _pixels(model: Any, count: int, generator: torch.Generator) -> dict[str, Any]:
    """Return the arguments of `forward` for so many random images."""
    name, size = model.config.model_type, model.config.vision_config.image_size
    size = size if isinstance(size, int) else size[0]
    parts: tuple[int, ...] = ()
    if name in ("idefics3", "smolvlm"):
        parts = (1,)
    elif name in ("llava_next", "llava_onevision"):  # the whole image, and the parts of its best resolution
        parts = (3,)
    values = torch.randn(count, *parts, 3, size, size, generator=generator, device="cpu").to(model.dtype)
    sized = name in ("llava_next", "llava_onevision", "mistral3")
    return {"pixel_values": values, **({"image_sizes": torch.tensor([[size, size]] * count)} if sized else {})}


@torch.no_grad()
def _features_of_an_image(model: Any) -> int:
    features = model.model.get_image_features(**_pixels(model, 1, torch.Generator(device="cpu")))
    return len(getattr(features, "pooler_output", features)[0])
