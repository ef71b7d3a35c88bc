"""Run prompts through transformers' continuous batching, record its steps, and repeat them with the oracle.

A step brings a chunk of some prompts and one token of each request that decodes. The oracle repeats each chunk as a
prefill over the request's own cache, and each decoded token by the stock model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pop_ext
import torch
from pop_ext import Plan
from pop_ext.hf.compat import with_cache
from torch import Tensor
from transformers import ContinuousBatchingConfig, DynamicCache, GenerationConfig
from transformers.generation.continuous_batching.model_runner import ModelRunner

NEW = 6
"""New tokens of each request."""


@dataclass
class Request:
    """What was recorded of one request.

    Attributes:
        chunks: (positions before, new rows) of each of its steps.
        partners: number of requests in each of these steps.
        pages: (keys, values) of each layer, ``[kv_heads, positions, head_dim]``, when its last step had ended. A layer
            with a sliding window keeps its last positions alone.
    """

    chunks: list[tuple[int, int]] = field(default_factory=list)
    partners: list[int] = field(default_factory=list)
    pages: list[tuple[Tensor, Tensor]] = field(default_factory=list)


@contextmanager
def recorded_steps(requests: dict[str, Request]) -> Iterator[None]:
    """Record the requests of each step inside the block, by their ids."""
    stock = ModelRunner.compute_batch

    def record(runner: Any, model: Any, batch_data: dict[str, Any]) -> None:
        stock(runner, model, batch_data)
        states = runner.inputs_and_outputs.requests_in_batch
        for one in states:
            request = requests.setdefault(one.state.request_id, Request())
            end = one.state.position_offset
            request.chunks.append((end - one.query_length, one.query_length))
            request.partners.append(len(states))
            request.pages = [
                read_pages(runner.cache, one.state.request_id, layer, end) for layer in range(len(model.model.layers))
            ]

    ModelRunner.compute_batch = record
    try:
        yield
    finally:
        ModelRunner.compute_batch = stock


def read_pages(cache: Any, request_id: str, layer: int, positions: int) -> tuple[Tensor, Tensor]:
    """Return the K and V of a request that the pages of a layer hold, ``[kv_heads, positions, head_dim]`` each."""
    allocator = cache.layer_to_allocator[layer]
    if allocator.layer_type == "sliding_attention":
        kept = min(positions, allocator.sliding_window)
        index = allocator._token_indices_to_physical_indices(request_id, positions - kept, kept)
    else:
        index = allocator.get_read_indices(request_id, 0, positions)
    keys, values = (view[torch.tensor(index)].transpose(0, 1) for view in allocator._kv_token_views[layer])
    return keys.clone(), values.clone()


def generate_batch(model: Any, prompts: list[list[int]], **batching: Any) -> tuple[list[list[int]], list[Request]]:
    """Return the new tokens of each prompt and what was recorded of its request. Raise if one failed.

    Args:
        model: the model.
        prompts: ids.
        batching: fields of ``ContinuousBatchingConfig``.
    """
    requests: dict[str, Request] = {}
    with recorded_steps(requests):
        outputs = answers(model, prompts, **batching)
    assert [output.error for output in outputs.values()] == [None] * len(prompts)
    return [output.generated_tokens for output in outputs.values()], [requests[name] for name in outputs]


def answers(model: Any, prompts: list[list[int]], **batching: Any) -> dict[str, Any]:
    """Return what ``generate_batch`` returns."""
    defaults = {"num_blocks": 64, "page_size": 8, "max_batch_tokens": 128}
    config = GenerationConfig(max_new_tokens=NEW, do_sample=False, pad_token_id=0, eos_token_id=-1)
    chosen = ContinuousBatchingConfig(**{**defaults, **batching})
    outputs: dict[str, Any] = model.generate_batch(
        prompts, generation_config=config, continuous_batching_config=chosen, warmup=False
    )
    return outputs


class OracleRequest:
    """Repeat the steps of one request with the oracle.

    Args:
        model: the stock model.
        plan: layers to omit.
        prompt: ids.
        cache: of the positions that the request found in shared pages; None without any.
    """

    def __init__(self, model: Any, plan: Plan, prompt: list[int], cache: DynamicCache | None = None) -> None:
        self.model, self.plan, self.ids, self.cache, self.prompt = model, plan, list(prompt), cache, len(prompt)

    @torch.no_grad()
    def step(self, past: int, new: int) -> None:
        """Run the rows ``past`` to ``past + new``."""
        ids = torch.tensor([self.ids[past : past + new]])
        if past < self.prompt:
            # min_tokens: a shorter chunk runs at full depth. The oracle executes the plan as it is.
            boundary = new if new < self.plan.min_tokens else min(new, self.plan.boundary)
            call = {"past_key_values": self.cache, "boundary": boundary}
            logits, self.cache = pop_ext.reference.prefill(self.model, ids, self.plan, **call)
        else:
            logits = self.model(input_ids=ids, use_cache=True, **with_cache(self.model, self.cache)).logits
        if past + new >= self.prompt:
            self.ids.append(int(logits[0, -1].argmax()))


def assert_equals_oracle(
    model: Any, plan: Plan, prompt: list[int], tokens: list[int], request: Request, cache: Any = None
) -> DynamicCache:
    """Compare greedy text, and K and V of every layer, with the oracle's; return its cache."""
    oracle = OracleRequest(model, plan, prompt, cache)
    for past, new in request.chunks:
        oracle.step(past, new)
    assert tokens == oracle.ids[len(prompt) :]
    for layer, pages in enumerate(request.pages):
        expected = oracle.cache.layers[layer]
        for name, found, wanted in zip(("K", "V"), pages, (expected.keys, expected.values), strict=True):
            wanted = wanted[0, :, -found.shape[1] :]
            worst = float((found - wanted).abs().max())
            assert worst <= 1e-4 * max(1.0, float(wanted.abs().max())), f"{name} of layer {layer}: {worst}"
    return oracle.cache
