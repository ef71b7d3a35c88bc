"""Hugging Face's model with torchao's int8 weights and inputs rounded to int8 row by row, under torch.compile."""

from __future__ import annotations

from typing import Any

from bench.engines.log_probs import log_probs_of


class Engine:
    """Run ``Int8DynamicActivationInt8WeightConfig`` on the decoder layers; embedding and head keep their dtype.

    Constants are frozen (``torch._inductor.config.freezing``), without which Inductor does not choose oneDNN's products
    of integers. It chooses them for float32 only, so a model in another dtype is widened where the processor has no
    products in that dtype; else torch multiplies integers by plain loops.

    Job option: ``compile_mode`` of ``torch.compile``; None: "default".
    """

    def load(self, job: dict[str, Any]) -> tuple[dict[str, str], list[str]]:
        import torch
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
            quantize_(layer.to(dtype), Int8DynamicActivationInt8WeightConfig())
        self._model = model.to(dtype).eval()
        self._mode = job["options"].get("compile_mode") or "default"
        self._tokens = 0
        how = (
            "model(input_ids, use_cache=True, logits_to_keep=1), sdpa, no_grad, "
            f'torch.compile(mode="{self._mode}", dynamic=False), frozen, in {dtype}; '
            "Int8DynamicActivationInt8WeightConfig for the decoder layers"
        )
        return {"torchao-int8": how}, ["torch", "torchao", "transformers"]

    def prefill(self, arm: str, ids: list[int]) -> Any:
        import torch

        if len(ids) != self._tokens:
            torch.compiler.reset()  # also drops the code of the shape before this one
            self._call = torch.compile(self._model, mode=self._mode, dynamic=False)
            self._tokens = len(ids)
        with torch.no_grad():
            return self._call(input_ids=torch.tensor([ids]), use_cache=True, logits_to_keep=1)

    def log_probs(self, arm: str, ids: list[int], keep: int | None) -> dict[int, float]:
        return log_probs_of(self.prefill(arm, ids).logits[0, -1].float().numpy(), keep)
