"""Processors of tiny vision models, and a vLLM engine's answers to prompts with images, beside the oracle's."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any

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


def save_processor(model: Any, folder: Any) -> None:
    """Save the tokenizer and the image processor of a tiny vision model."""
    from tokenizers import Tokenizer, models
    from transformers import (
        Gemma3ImageProcessor,
        Gemma3Processor,
        PreTrainedTokenizerFast,
        Qwen2VLImageProcessor,
        Qwen3VLProcessor,
        Qwen3VLVideoProcessor,
    )

    family, vision = model.config.model_type, model.config.vision_config
    special = {**_NEWLINES, **_NAMES[family]}
    taken = {number: name for name, number in special.items()}
    vocab = {taken.get(number, f"<{number}>"): number for number in range(model.config.text_config.vocab_size)}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<0>"))
    inner.add_special_tokens(list(special))
    named = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    more = {"extra_special_tokens": named} if family == "gemma3" else {}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<0>", pad_token="<0>", **more)
    if family == "gemma3":
        images = Gemma3ImageProcessor(size={"height": vision.image_size, "width": vision.image_size})
        processor: Any = Gemma3Processor(images, tokenizer, image_seq_length=model.config.mm_tokens_per_image)
    else:
        sizes = dict(
            patch_size=vision.patch_size,
            temporal_patch_size=vision.temporal_patch_size,
            merge_size=vision.spatial_merge_size,
            size={"shortest_edge": 64, "longest_edge": 1536},
        )
        processor = Qwen3VLProcessor(Qwen2VLImageProcessor(**sizes), tokenizer, Qwen3VLVideoProcessor(**sizes))
    processor.save_pretrained(folder)


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
    """Return what transformers' model takes besides the ids ``[1, T]`` of a prompt: pixels of its images."""
    from transformers import AutoImageProcessor

    gemma = model.config.model_type == "gemma3"
    given = {"token_type_ids" if gemma else "mm_token_type_ids": (ids == IMAGE).int()}
    images = prompt.get("multi_modal_data", {}).get("image")
    if images:
        pixels = AutoImageProcessor.from_pretrained(folder)(images, return_tensors="pt")
        given |= {name: pixels[name] for name in ("pixel_values", "image_grid_thw") if name in pixels}
    return given
