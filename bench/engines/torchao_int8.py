"""Hugging Face's model with torchao's int8 weights and inputs rounded to int8 row by row, under torch.compile."""

from __future__ import annotations

from typing import Any

import torch

from bench.engines.log_probs import log_probs_of


class Engine:
    """Run ``Int8DynamicActivationInt8WeightConfig`` on the decoder layers; embedding and head keep their dtype.

    Constants are frozen (``torch._inductor.config.freezing``), without which Inductor does not choose oneDNN's products
    of integers. It chooses them for inputs in float32 only. So a quantised product of another dtype takes its input as
    float32, which Inductor fuses with the rounding; and where the processor has no products in that dtype, the whole
    model is widened.

    Job option: ``mode`` of ``torch.compile``, "default" without it.
    """

    def load(self, job: dict[str, Any]) -> tuple[dict[str, str], list[str]]:
        import torch._inductor.config
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(job["threads"])
        torch._inductor.config.freezing = True
        dtype = getattr(torch, job["dtype"])
        model: Any = AutoModelForCausalLM.from_pretrained(job["weights"], dtype=dtype, attn_implementation="sdpa")
        if dtype == torch.bfloat16 and not torch.cpu._is_avx512_bf16_supported():
            dtype = torch.float32
        for layer in model.model.layers:  # one by one: all of them, widened, may not fit into memory
            if dtype == torch.float32:
                layer.float()
            else:
                widen_products(layer)
            quantize_(layer, Int8DynamicActivationInt8WeightConfig())
        if dtype == torch.float32:
            model.float()
        self._model = model.eval()
        self._mode = job["options"].get("mode", "default")
        self._tokens = 0
        how = (
            "model(input_ids, use_cache=True, logits_to_keep=1), sdpa, no_grad, "
            f'torch.compile(mode="{self._mode}", dynamic=False), frozen, in {dtype}; '
            "Int8DynamicActivationInt8WeightConfig for the decoder layers, whose products take torch.float32"
        )
        return {"torchao-int8": how}, ["torch", "torchao", "transformers"]

    def prefill(self, arm: str, ids: list[int]) -> Any:
        if len(ids) != self._tokens:
            torch.compiler.reset()  # also drops the code of the shape before this one
            self._call = torch.compile(self._model, mode=self._mode, dynamic=False)
            self._tokens = len(ids)
        with torch.no_grad():
            return self._call(input_ids=torch.tensor([ids]), use_cache=True, logits_to_keep=1)

    def log_probs(self, arm: str, ids: list[int], keep: int | None) -> dict[int, float]:
        return log_probs_of(self.prefill(arm, ids).logits[0, -1].float().numpy(), keep)


class Widened(torch.nn.Module):
    """A layer that takes its input, and gives its result, as float32; both are converted here."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.inner(x.float())
        return result.to(x.dtype)


def widen_products(layer: torch.nn.Module) -> None:
    """Convert the products of a decoder layer to float32, in place, and leave its other operations as they are."""
    for parent in list(layer.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, torch.nn.Linear):
                setattr(parent, name, Widened(child.float()))
