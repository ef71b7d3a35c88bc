"""Tiny random vision-language models, and prompts of text, images and videos."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from models import WINDOW, draw_weights
from torch import Tensor
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

START, END, IMAGE, VIDEO = 258, 259, 260, 261
"""Token ids below this are text."""
TEXT = 258

_SHAPE = {
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 263,
    "rms_norm_eps": 1e-5,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def qwen3_vl(dtype: torch.dtype = torch.float32, layers: int = 6, features: int = 3, **over: Any) -> Any:
    """Return a Qwen3-VL: M-RoPE over time, height and width, and DeepStack.

    The features of `features` vision layers are added after as many of the first text layers. `over` is passed to the
    text config.
    """
    rope = {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [12, 10, 10],
        "mrope_interleaved": True,
    }
    config = Qwen3VLConfig(
        text_config={**_SHAPE, "num_hidden_layers": layers, "rope_parameters": rope, **over},
        vision_config={
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": 96,
            "deepstack_visual_indexes": list(range(features)),
            "num_position_embeddings": 64,
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
        tie_word_embeddings=False,
    )
    return _build(Qwen3VLForConditionalGeneration, config, dtype)


def gemma3_vl(dtype: torch.dtype = torch.float32, layers: int = 6, tied: bool = True, **over: Any) -> Any:
    """Return a Gemma 3 with vision: 16 tokens an image, as long as the window, which attend to each other."""
    rope = {
        "full_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
    }
    text = {
        "num_hidden_layers": layers,
        "layer_types": ["full_attention" if i % 3 == 2 else "sliding_attention" for i in range(layers)],
        "sliding_window": WINDOW,
        "rope_parameters": rope,
        "query_pre_attn_scalar": 64,
        "tie_word_embeddings": tied,
    }
    config = Gemma3Config(
        text_config={**_SHAPE, **text, **over},
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 4,
        },
        mm_tokens_per_image=16,
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
        tie_word_embeddings=tied,
    )
    return _build(Gemma3ForConditionalGeneration, config, dtype)


def _build(model_class: type, config: Any, dtype: torch.dtype) -> Any:
    with torch.random.fork_rng(devices=[]):
        model = model_class._from_config(config, dtype=dtype, attn_implementation="sdpa")
    draw_weights(model, seed=0)
    return model.eval()


VISION = {"qwen3_vl": qwen3_vl, "gemma3": gemma3_vl}


@dataclass
class Prompt:
    """A batch: ids and mask [batch, T], padded on the left, and further arguments of `forward`."""

    ids: Tensor
    mask: Tensor
    vision: dict[str, Any] = field(default_factory=dict)

    @property
    def call(self) -> dict[str, Any]:
        """Arguments of `forward` other than the ids."""
        return {"attention_mask": self.mask, **self.vision}


def prompt(model: Any, *sequences: list[int | str], seed: int = 0) -> Prompt:
    """Return a batch of sequences, each of text (a number of tokens), "image"s and "video"s."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    build = QwenPrompt if model.config.model_type == "qwen3_vl" else GemmaPrompt
    return prompt_by(build(model, generator), *sequences)


class Builder(Protocol):
    """Build the images of a prompt, and what `forward` takes besides."""

    generator: torch.Generator

    def add(self, kind: str) -> list[int]:
        """Return the ids that stand for the next image or video."""

    def arguments(self, ids: Tensor) -> dict[str, Any]:
        """Return further arguments of `forward` for the ids of the whole batch."""


def prompt_by(builder: Builder, *sequences: list[int | str]) -> Prompt:
    """Return a batch of sequences, padded on the left, whose images come from a builder."""
    generator, rows = builder.generator, []
    for sequence in sequences:
        ids: list[int] = []
        for piece in sequence:
            if isinstance(piece, int):
                ids += torch.randint(0, TEXT, (piece,), generator=generator, device="cpu").tolist()
            else:
                ids += builder.add(piece)
        rows.append(ids)
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return Prompt(ids, mask, builder.arguments(ids))


class QwenPrompt:
    def __init__(self, model: Any, generator: torch.Generator) -> None:
        self._vision = model.config.vision_config
        self._dtype, self.generator = model.dtype, generator
        self._grids: dict[str, list[list[int]]] = {"image": [], "video": []}

    def add(self, kind: str) -> list[int]:
        number = len(self._grids[kind])
        grid = [1 if kind == "image" else 2, 4 + 2 * (number % 2), 6]
        self._grids[kind].append(grid)
        frame = [START, *[IMAGE if kind == "image" else VIDEO] * (grid[1] * grid[2] // 4), END]
        return frame * grid[0]

    def arguments(self, ids: Tensor) -> dict[str, Any]:
        arguments: dict[str, Any] = {"mm_token_type_ids": (ids == IMAGE).int() + 2 * (ids == VIDEO).int()}
        for kind, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
            if not self._grids[kind]:
                continue
            grid = torch.tensor(self._grids[kind])
            width = 3 * self._vision.temporal_patch_size * self._vision.patch_size**2
            values = torch.randn(int(grid.prod(1).sum()), width, generator=self.generator, device="cpu")
            arguments |= {pixels: values.to(ids.device, self._dtype), f"{kind}_grid_thw": grid}
        return arguments


class GemmaPrompt:
    def __init__(self, model: Any, generator: torch.Generator) -> None:
        self._config, self._dtype, self.generator, self._images = model.config, model.dtype, generator, 0

    def add(self, kind: str) -> list[int]:
        assert kind == "image"
        self._images += 1
        return [START, *[IMAGE] * self._config.mm_tokens_per_image, END]

    def arguments(self, ids: Tensor) -> dict[str, Any]:
        arguments: dict[str, Any] = {"token_type_ids": (ids == IMAGE).long()}
        if self._images:
            size = self._config.vision_config.image_size
            values = torch.randn(self._images, 3, size, size, generator=self.generator, device="cpu")
            arguments["pixel_values"] = values.to(ids.device, self._dtype)
        return arguments


# Batches whose sequences have no image, one or several, at the start and at the end.
BATCHES = {
    "no image": ([20], [7]),
    "one image": ([7, "image", 5],),
    "an image first and last": (["image", 6], [9, "image", 1]),
    "0, 1 and 2 images": ([30], [7, "image", 5], [3, "image", 4, "image", 9]),
}
