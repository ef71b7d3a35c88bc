"""Compress the KV cache after a pruned prefill, with presses of kvpress.

    python examples/kv_compression.py --model meta-llama/Llama-3.2-1B-Instruct --prompt-file prompt.txt
    python examples/kv_compression.py --model ... --prompt-file ... --press kvpress.SnapKVPress --hidden-states

``pressed`` replaces kvpress's ``with press(model):``, which hooks every attention module. A native prefill does not
call these modules, and the reference calls them twice. ``pressed`` calls the press once for each layer, omitted layers
included, when the whole prompt is in the cache. docs/composition.md describes what each kind of press sees.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import pop_ext
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import DynamicLayer


@dataclass
class KeyNormPress:
    """Drops the positions with the largest keys, as kvpress's KnormPress does (Devoto et al., arXiv 2406.11430).

    It has the part of the interface of kvpress's presses that ``pressed`` uses.
    """

    compression_ratio: float = 0.5

    def post_init_from_model(self, model: nn.Module) -> None: ...

    def forward_hook(self, module: Any, input: list[Any], kwargs: dict[str, Any], output: list[Any]) -> list[Any]:
        layer = kwargs["past_key_values"].layers[module.layer_idx]
        kept = max(1, int(layer.keys.shape[2] * (1 - self.compression_ratio)))
        norms = torch.linalg.vector_norm(layer.keys, dim=-1, dtype=torch.float32)
        index = norms.topk(kept, largest=False).indices.sort().values[..., None].expand(-1, -1, -1, module.head_dim)
        layer.keys, layer.values = layer.keys.gather(2, index), layer.values.gather(2, index)
        return output


class NotKept:
    """Stands for hidden states that were not kept. It has their shape; reading more raises an error."""

    def __init__(self, *shape: int) -> None:
        self.shape = torch.Size(shape)

    @staticmethod
    def _refuse(*_: Any, **__: Any) -> Any:
        raise ValueError(
            "press: it reads hidden states, which a native prefill does not hand out; enable the model with "
            'backend="reference" and say hidden_states=True'
        )

    __getattr__ = __getitem__ = __iter__ = __torch_function__ = _refuse


class Press:
    """Applies a press to the calls of one model: keeps the layers' inputs, and compresses after a prefill."""

    def __init__(self, model: Any, press: Any) -> None:
        decoder = model.get_decoder()
        self.model, self.press, self.layers = model, press, decoder.layers
        self.read: list[list[Tensor]] = [
            [] for _ in self.layers
        ]  # inputs of each layer, [1 or batch, rows, hidden] a call
        self.rope: list[list[tuple[Tensor, Tensor]]] = [[] for _ in self.layers]

    def begin(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Drop what earlier calls left; a pre-hook of the whole model."""
        for parts in (*self.read, *self.rope):
            parts.clear()
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        if cache is None or cache.get_seq_length() == 0:
            for layer in self.layers:  # AdaKV marks dropped positions by head; its masks are of the previous prompt
                layer.self_attn.__dict__.pop("masked_key_indices", None)

    def record(self, index: int) -> Callable[..., None]:
        """Keep a layer's input; a pre-hook, which the oracle calls for context rows and for boundary rows."""

        def before(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.read[index].append(args[0] if args else kwargs["hidden_states"])
            self.rope[index].append(kwargs["position_embeddings"])

        return before

    def after(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Apply the press once to each layer if the cache has this call's tokens only; a hook of the whole model."""
        tokens = kwargs.get("input_ids", args[0] if args else None)
        tokens = kwargs["inputs_embeds"] if tokens is None else tokens
        cache = getattr(output, "cache", None) or output.past_key_values
        batch, length = tokens.shape[:2]
        if length == 1 or cache.get_seq_length() != length:
            return  # a decode step or a later turn: as in kvpress, only a first prefill is compressed
        mask = kwargs.get("attention_mask")
        if mask is not None and not bool(mask.all()):
            raise ValueError("attention_mask: expected no padding, since a press takes it for tokens")
        for index, layer in enumerate(self.layers):
            held = cache.layers[index]
            if getattr(held, "is_sliding", False):
                continue  # the layer keeps only a window already
            if type(held) is not DynamicLayer:
                raise ValueError(f"past_key_values: expected a DynamicCache, got a {type(held).__name__}")
            self._press(layer, index, cache, batch, length)

    def _press(self, layer: Any, index: int, cache: Any, batch: int, length: int) -> None:
        hidden_states, rope = NotKept(batch, length, self.model.config.hidden_size), NotKept()
        if self.read[index]:
            # The oracle runs one sequence after the other, the stock forward all in one call.
            rows = torch.cat(self.read[index], dim=1).view(batch, length, -1)
            hidden_states = layer.input_layernorm(rows)
            rope = tuple(torch.cat(parts, dim=1)[:, :length] for parts in zip(*self.rope[index], strict=True))
        arguments = {
            "hidden_states": hidden_states,
            "past_key_values": cache,
            "cache_position": torch.arange(length, device=cache.layers[index].keys.device),
            "position_embeddings": rope,
        }
        self.press.forward_hook(layer.self_attn, [], arguments, [None, None])


@contextmanager
def pressed(model: Any, press: Any, hidden_states: bool = False) -> Iterator[None]:
    """Apply a press to every layer's K and V after each first prefill within the block, also in ``generate``.

    Args:
        model: a Hugging Face causal language model, enabled with either backend, or not enabled.
        press: a press of kvpress, or an object with the ``post_init_from_model`` and ``forward_hook`` of
            ``KeyNormPress``.
        hidden_states: keep the layers' inputs for presses that use them (SnapKV, ExpectedAttention). This needs hooks
            on the layers, so the model must be enabled with ``backend="reference"`` or not enabled: with the native
            backend, such calls run in the stock forward.

    Raises:
        ValueError: a call has padding or another cache than a DynamicCache, or the press needs hidden states that were
            not kept.
    """
    press.post_init_from_model(model)
    state, rotary = Press(model, press), model.get_decoder().rotary_emb
    with ExitStack() as stack:
        handles = [model.register_forward_pre_hook(state.begin, with_kwargs=True)]
        handles.append(model.register_forward_hook(state.after, with_kwargs=True))
        for index, layer in enumerate(state.layers):
            # kvpress looks for it here. It is not registered as a submodule: the native prefill accepts no new ones.
            layer.self_attn.__dict__["rotary_emb"] = rotary
            stack.callback(layer.self_attn.__dict__.pop, "rotary_emb", None)
            if hidden_states:
                handles.append(layer.register_forward_pre_hook(state.record(index), with_kwargs=True))
        for handle in handles:
            stack.callback(handle.remove)
        yield


def find_press(name: str) -> type[Any]:
    """Return the class of a press: "KeyNormPress" of this file, or a name such as "kvpress.SnapKVPress"."""
    module, _, kind = name.rpartition(".")
    found: type[Any] = getattr(importlib.import_module(module), kind) if module else globals()[kind]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hugging Face name")
    parser.add_argument("--prompt-file", required=True)
    parser.add_argument(
        "--press", default="KeyNormPress", help="a class of this file, or of a module: kvpress.SnapKVPress"
    )
    parser.add_argument("--ratio", type=float, default=0.5, help="share of the cache to drop")
    parser.add_argument(
        "--hidden-states", action="store_true", help="keep hidden states for the press, with the slow reference backend"
    )
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto")
    with open(options.prompt_file, encoding="utf-8") as file:
        inputs = tokenizer(file.read(), return_tensors="pt", truncation=True)
    pop_ext.enable(model, "third", strict=True, backend="reference" if options.hidden_states else "native")
    press = find_press(options.press)(compression_ratio=options.ratio)
    with pressed(model, press, options.hidden_states):
        out = model.generate(**inputs, max_new_tokens=24, do_sample=False, return_dict_in_generate=True)
    cache = getattr(out, "cache", None) or out.past_key_values
    print(pop_ext.last_call(model))
    print("positions left of", out.sequences.shape[1] - 1, [layer.keys.shape[2] for layer in cache.layers])
    print(repr(tokenizer.decode(out.sequences[0, inputs["input_ids"].shape[1] :])))


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
