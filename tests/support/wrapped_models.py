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
from vision_models import END, IMAGE, START, TEXT, VIDEO, VISION, Prompt

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
    model_class = getattr(transformers, f"{WRAPPERS[name].prefix}ForConditionalGeneration")
    with torch.random.fork_rng(devices=[]):
        model = model_class._from_config(config, dtype=dtype, attn_implementation="sdpa")
    draw_weights(model, seed=0)
    return model.eval()


def image_prompt(model: Any, *sequences: list[int | str], seed: int = 0) -> Prompt:
    """Return a batch of sequences, padded on the left, each of text (a number of tokens) and "image"s."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    count = sum(sequence.count("image") for sequence in sequences)
    vision = _images(model, count, generator) if count else {}
    lengths = iter(_features_per_image(model, vision) if count else [])
    rows = []
    for sequence in sequences:
        ids: list[int] = []
        for piece in sequence:
            if piece == "image":
                ids += [START, *[IMAGE] * next(lengths), END]
            else:
                ids += torch.randint(0, TEXT, (piece,), generator=generator, device="cpu").tolist()
        rows.append(ids)
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    if WRAPPERS[model.config.model_type].uses_mrope:
        vision["mm_token_type_ids"] = (ids == IMAGE).int()
    return Prompt(ids, mask, vision)


def _images(model: Any, count: int, generator: torch.Generator) -> dict[str, Any]:
    vision, name = model.config.vision_config, model.config.model_type

    def pixels(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cpu").to(model.dtype)

    if WRAPPERS[name].uses_mrope:
        grid = torch.tensor([[1, 4 + 2 * (number % 2), 6] for number in range(count)])
        width = 3 * vision.temporal_patch_size * vision.patch_size**2
        return {"pixel_values": pixels(int(grid.prod(1).sum()), width), "image_grid_thw": grid}
    size = vision.image_size if isinstance(vision.image_size, int) else vision.image_size[0]
    sizes = {"image_sizes": torch.tensor([[size, size]] * count)}
    if name in ("idefics3", "smolvlm"):
        return {"pixel_values": pixels(count, 1, 3, size, size)}
    if name in ("llava_next", "llava_onevision"):  # the whole image, and the parts of its best resolution
        return {"pixel_values": pixels(count, 3, 3, size, size), **sizes}
    return {"pixel_values": pixels(count, 3, size, size), **(sizes if name == "mistral3" else {})}


@torch.no_grad()
def _features_per_image(model: Any, vision: dict[str, Any]) -> list[int]:
    features = model.model.get_image_features(**vision)
    return [len(one) for one in getattr(features, "pooler_output", features)]
