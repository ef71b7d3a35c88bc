"""A small engine on ``torch.ops.pop.prefill``, with packed prompts and its own KV cache and decode loop.

    python examples/own_engine.py --model meta-llama/Llama-3.2-1B-Instruct --prompt-file prompt.txt

Hugging Face provides weights, RoPE tables and the language-model head; its forward is never called. Decode calls the
same op with one new token per sequence. That token is a boundary row, so no layer is omitted.
"""

from __future__ import annotations

import argparse

import pop_ext
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

CAPACITY = 4096


class Engine:
    """Generates greedily for a fixed batch. Caches are ``[batch, kv_heads, capacity, head_dim]``, one pair a layer."""

    def __init__(self, native: pop_ext.NativeModel, batch: int, capacity: int) -> None:
        self.native = native
        spec = native.spec
        shape = (batch, spec.num_kv_heads, capacity, spec.head_dim)
        self.keys = [torch.zeros(shape, dtype=native.dtype) for _ in range(spec.num_layers)]
        self.values = [torch.zeros(shape, dtype=native.dtype) for _ in range(spec.num_layers)]
        self.past = torch.zeros(batch, dtype=torch.int32)

    def step(self, tokens: list[Tensor]) -> Tensor:
        """Append new tokens ``[T_i]`` to each sequence, and return the next token of each, ``[batch]``."""
        model, lengths = self.native.model, torch.tensor([len(ids) for ids in tokens], dtype=torch.int32)
        positions = torch.cat([torch.arange(int(p), int(p + n)) for p, n in zip(self.past, lengths, strict=True)])
        cos, sin = model.model.rotary_emb(torch.empty(0), positions[None])
        hidden = torch.ops.pop.prefill(
            self.native.handle,
            torch.cat(tokens),
            cos[0],
            sin[0],
            torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32),
            self.past,
            torch.zeros_like(lengths),  # cache_start: every sequence begins in slot 0
            torch.minimum(lengths, torch.tensor(self.native.plan.boundary, dtype=torch.int32)),
            torch.ones_like(lengths),  # logits_to_keep: the last row of each sequence
            self.keys,
            self.values,
        )
        self.past = self.past + lengths
        next_tokens: Tensor = model.lm_head(hidden).argmax(-1)
        return next_tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hugging Face name")
    parser.add_argument("--prompt-file", required=True)
    parser.add_argument("--new-tokens", type=int, default=24)
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    native = pop_ext.load(AutoModelForCausalLM.from_pretrained(options.model, dtype="auto"), "third")
    with open(options.prompt_file, encoding="utf-8") as file:
        ids = torch.tensor(tokenizer(file.read())["input_ids"])[: CAPACITY - options.new_tokens]
    prompts = [ids, ids[: len(ids) // 2], ids[: len(ids) // 3]]

    engine = Engine(native, len(prompts), CAPACITY)
    latest = engine.step(prompts)
    generated = [latest]
    for _ in range(options.new_tokens - 1):
        latest = engine.step(list(latest[:, None]))
        generated.append(latest)
    for prompt, new in zip(prompts, torch.stack(generated, dim=1), strict=True):
        print(f"after {len(prompt)} tokens: {tokenizer.decode(new)!r}")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
