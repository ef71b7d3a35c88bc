"""Tiny vision models for vLLM: checkpoints with processors, prompts with images, attention in both directions."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from vision_models import END, IMAGE, START, TEXT, VIDEO

_NEWLINES = {"\n" * count: count for count in (1, 2, 3, 4)}
"""Tokens that vLLM looks up for Gemma 3, with their ids."""

_NAMES = {
    "qwen3_vl": {"<|vision_start|>": START, "<|vision_end|>": END, "<|image_pad|>": IMAGE, "<|video_pad|>": VIDEO},
    "gemma3": {"<start_of_image>": START, "<end_of_image>": END, "<image_soft_token>": IMAGE},
}


@functools.cache
def missing() -> str | None:
    """Say what the tests lack. vLLM imports image processors of transformers that need torchvision."""
    if importlib.util.find_spec("vllm") is None:
        return "needs vllm (make vllm)"
    try:
        importlib.import_module("torchvision.transforms.v2.functional")
    except (ImportError, RuntimeError):  # RuntimeError: it was built for another torch
        return "needs a torchvision that imports (make vllm)"
    return None


class Checkpoint:
    """A tiny vision model that ``vllm_engine.engine`` saves with a tokenizer and an image processor."""

    def __init__(self, model: Any) -> None:
        self.model, self.dtype, self.config = model, model.dtype, model.config

    def save_pretrained(self, folder: Any) -> None:
        self.model.save_pretrained(folder)
        _as_published(folder / "model.safetensors")
        self._processor().save_pretrained(folder)

    def _tokenizer(self) -> Any:
        from tokenizers import Tokenizer, models
        from transformers import PreTrainedTokenizerFast

        special = {**_NEWLINES, **_NAMES[self.config.model_type]}
        taken = {number: name for name, number in special.items()}
        vocab = {taken.get(number, f"<{number}>"): number for number in range(self.config.text_config.vocab_size)}
        inner = Tokenizer(models.WordLevel(vocab, unk_token="<0>"))
        inner.add_special_tokens(list(special))
        named = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
        more = {"extra_special_tokens": named} if self.config.model_type == "gemma3" else {}
        return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<0>", pad_token="<0>", **more)

    def _processor(self) -> Any:
        from transformers import (
            Gemma3ImageProcessor,
            Gemma3Processor,
            Qwen2VLImageProcessor,
            Qwen3VLProcessor,
            Qwen3VLVideoProcessor,
        )

        vision, tokenizer = self.config.vision_config, self._tokenizer()
        if self.config.model_type == "gemma3":
            images = Gemma3ImageProcessor(size={"height": vision.image_size, "width": vision.image_size})
            return Gemma3Processor(images, tokenizer, image_seq_length=self.config.mm_tokens_per_image)
        sizes = dict(
            patch_size=vision.patch_size,
            temporal_patch_size=vision.temporal_patch_size,
            merge_size=vision.spatial_merge_size,
            size={"shortest_edge": 64, "longest_edge": 1536},
        )
        return Qwen3VLProcessor(Qwen2VLImageProcessor(**sizes), tokenizer, Qwen3VLVideoProcessor(**sizes))


def _as_published(weights: Any) -> None:
    """Rename the tensors of a vision tower as published checkpoints do; later versions of transformers leave out one
    level, which vLLM expects.
    """
    from safetensors.torch import load_file, save_file

    old, new = "vision_tower.", "vision_tower.vision_model."
    tensors = load_file(weights)
    if any(old in name and new not in name for name in tensors):
        tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
        save_file(tensors, weights, metadata={"format": "pt"})


def image(width: int, height: int, seed: int) -> Any:
    """Return an image of random pixels."""
    from PIL import Image

    pixels = torch.randint(256, (height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.numpy())


def prompt_with(model: Any, *pieces: int | Any, seed: int = 0) -> dict[str, Any]:
    """Return a prompt for vLLM of text (a number of tokens) and images, each by one token that vLLM expands."""
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = []
    images = []
    for piece in pieces:
        if isinstance(piece, int):
            ids += torch.randint(5, TEXT, (piece,), generator=generator).tolist()  # no newlines
        else:
            ids += [START] if model.config.model_type == "gemma3" else [START, IMAGE, END]
            images.append(piece)
    return {"prompt_token_ids": ids, **({"multi_modal_data": {"image": images}} if images else {})}


def ask(found: Any, *prompts: dict[str, Any], count: int = 1) -> list[tuple[list[int], list[int], Tensor]]:
    """Generate greedily; return each prompt's ids, images expanded, the new tokens and their log-probabilities."""
    from vllm import SamplingParams

    parameters = SamplingParams(max_tokens=count, temperature=0.0, logprobs=-1, detokenize=False, ignore_eos=True)
    answers = []
    for output in found.llm.generate(list(prompts), parameters, use_tqdm=False):
        [answer] = output.outputs
        table = [[step[token].logprob for token in range(len(step))] for step in answer.logprobs]
        answers.append((list(output.prompt_token_ids), list(answer.token_ids), torch.tensor(table)))
    return answers


def arguments(model: Any, folder: Any, ids: Tensor, prompt: dict[str, Any]) -> dict[str, Any]:
    """Return what transformers' model takes besides the ids ``[1, T]`` of a prompt: pixels of its images.

    Args:
        model: The model.
        folder: The folder that its checkpoint was saved to.
        ids: The ids as vLLM expanded them.
        prompt: The prompt (``prompt_with``).
    """
    from transformers import AutoImageProcessor

    gemma = model.config.model_type == "gemma3"
    given = {"token_type_ids" if gemma else "mm_token_type_ids": (ids == IMAGE).int()}
    images = prompt.get("multi_modal_data", {}).get("image")
    if images:
        pixels = AutoImageProcessor.from_pretrained(folder)(images, return_tensors="pt")
        given |= {name: pixels[name] for name in ("pixel_values", "image_grid_thw") if name in pixels}
    return given


@contextlib.contextmanager
def attention_in_both_directions() -> Iterator[None]:
    """Let engines run vLLM's FlexAttention, which lets the tokens of an image see each other.

    vLLM offers its CPU build one backend, which does not. Two things that FlexAttention calls are missing on a CPU, and
    are replaced: the kernel that writes the cache, and compiled attention for 32 bits.
    """
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.attention import selector
    from vllm.v1.attention.backends import flex_attention as flex
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    def attend(*args: Any, kernel_options: Any = None, **kwargs: Any) -> Any:
        return flex.flex_attention(*args, **kwargs)

    def write(self: Any, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
        blocks = kv_cache.transpose(1, 2)
        taken = slot_mapping >= 0
        slots = slot_mapping[taken]
        pairs = torch.cat([key, value], -1)[: len(slot_mapping)][taken]
        blocks[slots // blocks.shape[1], slots % blocks.shape[1]] = pairs

    def path(*_: Any, **__: Any) -> str:
        return AttentionBackendEnum.FLEX_ATTENTION.get_path()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CpuPlatform, "get_attn_backend_cls", path)
        patch.setattr(flex, "flex_attention_compiled", attend)
        patch.setattr(flex.FlexAttentionImpl, "do_kv_cache_update", write)
        selector._cached_get_attn_backend.cache_clear()
        yield
    selector._cached_get_attn_backend.cache_clear()
