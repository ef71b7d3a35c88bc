"""A pruned prefill, then a smaller KV cache: presses of kvpress after the prefill of an enabled model.

    python examples/kv_compression.py --model meta-llama/Llama-3.2-1B-Instruct --prompt-file prompt.txt
    python examples/kv_compression.py --model ... --prompt-file ... --press kvpress.SnapKVPress --hidden-states

``pressed`` stands in the place of kvpress's own ``with press(model):``. That one hooks every attention, which a native
prefill does not call and the reference calls twice; this one calls the press once for each layer, omitted ones
included, when the whole prompt is in the cache. docs/composition.md says what each kind of press sees.
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

    It has the interface of kvpress's presses, as far as ``pressed`` needs it.
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
    """In the place of hidden states that nobody kept: their shape. A press that reads more is told what to do."""

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
    """A press on the calls of one model: what its layers read, and what is done when a prefill is through."""

    def __init__(self, model: Any, press: Any) -> None:
        decoder = model.get_decoder()
        self.model, self.press, self.layers = model, press, decoder.layers
        self.read: list[list[Tensor]] = [[] for _ in self.layers]  # [1 or batch, rows, hidden], call by call
        self.rope: list[list[tuple[Tensor, Tensor]]] = [[] for _ in self.layers]

    def begin(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A pre-hook of the whole model: nothing is left of the call before, nor of the prompt before."""
        for parts in (*self.read, *self.rope):
            parts.clear()
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        if cache is None or cache.get_seq_length() == 0:
            for layer in self.layers:  # by head, AdaKV drops positions so; its masks are of another prompt
                layer.self_attn.__dict__.pop("masked_key_indices", None)

    def record(self, index: int) -> Callable[..., None]:
        """A pre-hook of a layer: the oracle calls it for context rows and for boundary rows, omitted or not."""

        def before(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.read[index].append(args[0] if args else kwargs["hidden_states"])
            self.rope[index].append(kwargs["position_embeddings"])

        return before

    def after(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """A hook of the whole model: the press, once, on each layer of a cache that holds this call's tokens alone."""
        tokens = kwargs.get("input_ids", args[0] if args else None)
        tokens = kwargs["inputs_embeds"] if tokens is None else tokens
        cache = getattr(output, "cache", None) or output.past_key_values
        batch, length = tokens.shape[:2]
        if length == 1 or cache.get_seq_length() != length:
            return  # a decode step, or a later turn: as in kvpress, only a first prefill is compressed
        mask = kwargs.get("attention_mask")
        if mask is not None and not bool(mask.all()):
            raise ValueError("attention_mask: expected no padding, since a press takes it for tokens")
        for index, layer in enumerate(self.layers):
            held = cache.layers[index]
            if getattr(held, "is_sliding", False):
                continue  # it keeps a window already
            if type(held) is not DynamicLayer:
                raise ValueError(f"past_key_values: expected a DynamicCache, got a {type(held).__name__}")
            self._press(layer, index, cache, batch, length)

    def _press(self, layer: Any, index: int, cache: Any, batch: int, length: int) -> None:
        hidden_states, rope = NotKept(batch, length, self.model.config.hidden_size), NotKept()
        if self.read[index]:
            # The oracle computes sequence by sequence; the stock forward all in one call.
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
    """Within it, each first prefill of a text model, ``generate``'s too, ends with the press on every layer's K and V.

    Args:
        model: a Hugging Face causal language model, enabled with either backend, or not at all.
        press: of kvpress, or with ``post_init_from_model`` and ``forward_hook`` as ``KeyNormPress`` has them.
        hidden_states: keep what the layers read, for presses that score by it (SnapKV, ExpectedAttention). That takes
            hooks on the layers, so the model has to be enabled with ``backend="reference"``, or not at all: a native
            prefill would be left to the stock forward.

    Raises:
        ValueError: in a call: padding, another cache than a DynamicCache, or hidden states that were not kept.
    """
    press.post_init_from_model(model)
    state, rotary = Press(model, press), model.get_decoder().rotary_emb
    with ExitStack() as stack:
        handles = [model.register_forward_pre_hook(state.begin, with_kwargs=True)]
        handles.append(model.register_forward_hook(state.after, with_kwargs=True))
        for index, layer in enumerate(state.layers):
            # Where kvpress looks for it. Not as a submodule: the native prefill is bound to those that it found.
            layer.self_attn.__dict__["rotary_emb"] = rotary
            stack.callback(layer.self_attn.__dict__.pop, "rotary_emb", None)
            if hidden_states:
                handles.append(layer.register_forward_pre_hook(state.record(index), with_kwargs=True))
        for handle in handles:
            stack.callback(handle.remove)
        yield


def find_press(name: str) -> type[Any]:
    """ "KeyNormPress", or "kvpress.SnapKVPress"."""
    module, _, kind = name.rpartition(".")
    found: type[Any] = getattr(importlib.import_module(module), kind) if module else globals()[kind]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hugging Face name")
    parser.add_argument("--prompt-file", required=True)
    parser.add_argument("--press", default="KeyNormPress", help="of this file, or of a module: kvpress.SnapKVPress")
    parser.add_argument("--ratio", type=float, default=0.5, help="share of the cache to drop")
    parser.add_argument("--hidden-states", action="store_true", help="keep them for the press: plain PyTorch, slow")
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto")
    with open(options.prompt_file, encoding="utf-8") as file:
        inputs = tokenizer(file.read(), return_tensors="pt", truncation=True)
    pop_ext.enable(model, strict=True, backend="reference" if options.hidden_states else "native")
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
