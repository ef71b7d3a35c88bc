"""A vLLM engine in this process, and a record of what it wrote to its cache."""

from __future__ import annotations

import contextlib
import gc
import os
import re
from dataclasses import dataclass, field
from typing import Any

import torch
from pop_ext import Plan, reference
from torch import Tensor

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",  # the tests access the model
    VLLM_NO_USAGE_STATS="1",
    VLLM_LOGGING_LEVEL=os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
)


GAPS = Plan(6, omit=[1, 3, 4])
VOCAB = 263


@dataclass
class Engine:
    """A vLLM engine with access to its cache.

    Attributes:
        llm: the ``vllm.LLM``.
        written: layer -> slot of the cache -> (K, V), ``[kv_heads, head_dim]`` each, the last ones written there.
        slots: layer -> cache slots of all rows, in their order.
    """

    llm: Any
    written: dict[int, dict[int, tuple[Tensor, Tensor]]] = field(default_factory=dict)
    slots: dict[int, list[int]] = field(default_factory=dict)

    def generate(
        self, prompts: list[Tensor], count: int = 1, lora_request: Any = None, **sampling: Any
    ) -> list[tuple[list[int], Tensor | None]]:
        """Generate greedily; return for each prompt ``[T]`` the tokens and the log-probabilities ``[count, vocab]``."""
        from vllm import SamplingParams

        parameters = SamplingParams(
            **dict(max_tokens=count, temperature=0.0, logprobs=-1, detokenize=False, ignore_eos=True) | sampling
        )
        asked = [{"prompt_token_ids": prompt.tolist()} for prompt in prompts]
        found = self.llm.generate(asked, parameters, use_tqdm=False, lora_request=lora_request)
        outputs = [output.outputs[0] for output in found]
        return [(list(output.token_ids), _table(output.logprobs)) for output in outputs]

    def positions(self) -> list[int]:
        """Return the positions of the only prompt that are still cached. Slots outside a window are reused."""
        last = ({slot: position for position, slot in enumerate(slots)} for slots in self.slots.values())
        return sorted(set.intersection(*(set(found.values()) for found in last)))

    def cache(self, layer: int, positions: list[int]) -> tuple[Tensor, Tensor]:
        """Return a layer's K and V of these positions, ``[1, kv_heads, len(positions), head_dim]``."""
        keys, values = zip(*(self.written[layer][self.slots[layer][position]] for position in positions), strict=True)
        return torch.stack(keys, 1)[None], torch.stack(values, 1)[None]

    def model(self) -> Any:
        return self.llm.llm_engine.model_executor.driver_worker.worker.model_runner.model

    def watch(self) -> None:
        """Record what every layer writes to its cache from now on."""
        from vllm.model_executor.layers.attention import Attention

        for module in self.model().modules():
            if isinstance(module, Attention):
                self._watch(module.impl, int(re.search(r"\b\d+\b", module.layer_name)[0]))

    def _watch(self, implementation: Any, number: int) -> None:
        write = implementation.do_kv_cache_update
        kept, order = self.written.setdefault(number, {}), self.slots.setdefault(number, [])
        step: set[int] = set()

        def and_keep(layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
            write(layer, key, value, kv_cache, slot_mapping)
            slots = slot_mapping.tolist()
            if not step.issuperset(slots):  # else boundary rows, after all rows of the step
                order.extend(slots)
                step.clear()
                step.update(slots)
            for slot, k, v in zip(slots, key.clone(), value.clone(), strict=False):
                kept[slot] = k, v

        implementation.do_kv_cache_update = and_keep


@contextlib.contextmanager
def engine(model: Any, folder: Any, plan: Any, **options: Any) -> Any:
    """Start an engine on a Hugging Face model, saved to a folder, with a plan; None: vLLM's own model."""
    import pop_ext.vllm
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    pop_ext.vllm.register()
    weights = folder / "model"
    model.save_pretrained(weights)
    more = {}
    if plan is not None:
        plan.save(folder / "plan.json")
        more = pop_ext.vllm.engine_arguments(weights, folder / "plan.json")
    if "skip_tokenizer_init" in options and not (weights / "tokenizer.json").exists():
        byte_tokenizer().save_pretrained(weights)
    defaults = dict(
        dtype=str(model.dtype).removeprefix("torch."),
        skip_tokenizer_init=True,
        enforce_eager=True,
        enable_prefix_caching=False,
        max_model_len=128,
        block_size=32,
        max_logprobs=-1,
        kv_cache_memory_bytes=16 << 20,  # vLLM does not free an engine's cache before the process ends
    )
    found = Engine(LLM(str(weights), **{**defaults, **more, **options}))
    try:
        found.watch()
        yield found
    finally:
        del found
        gc.collect()
        cleanup_dist_env_and_memory()


def prompt(length: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (length,), generator=torch.Generator().manual_seed(seed))


def turns(model, plan, prompts: list[Tensor], count: int = 1):
    """Run the oracle's prefills of some prompts in turn, then stock decoding.

    Returns:
        The new tokens, their log-probabilities ``[count, vocab]``, and the cache.
    """
    cache = None
    for part in prompts:
        logits, cache = reference.prefill(model, part[None], plan, past_key_values=cache)
    tokens, table = [], []
    for _ in range(count):
        table.append(logits[0, -1].float().log_softmax(-1))
        tokens.append(int(table[-1].argmax()))
        with torch.no_grad():
            logits = model(torch.tensor([tokens[-1:]]), past_key_values=cache).logits
    return tokens, torch.stack(table), cache


def byte_tokenizer() -> Any:
    """Return a tokenizer of 256 bytes and, as the models of the tests have 263 tokens, 7 special ones."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {token: number for number, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = Tokenizer(models.BPE(vocab, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = [f"<{number}>" for number in range(7)]
    inner.add_special_tokens(special)
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=special[0], pad_token=special[1])


def _table(logprobs: list[dict[int, Any]] | None) -> Tensor | None:
    return (
        None
        if logprobs is None
        else torch.tensor([[step[token].logprob for token in range(len(step))] for step in logprobs])
    )
