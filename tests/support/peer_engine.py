"""A made-up engine for bench/peers.py: Hugging Face with right, rounded and wrong results, errors, and an early end."""

from __future__ import annotations

import os
from typing import Any


class Engine:
    """Has the arms "right", "wrong" (other logits) and "raises"; under the name "dying" the arm "dies".

    With the job option ``bits`` it has the arms "rounded" and "wrong" instead, their names followed by the bits.
    """

    def load(self, job: dict[str, Any]) -> tuple[dict[str, str], list[str]]:
        import torch
        from transformers import AutoModelForCausalLM

        print("a line that is no answer")
        torch.set_num_threads(job["threads"])
        self._model = AutoModelForCausalLM.from_pretrained(job["weights"], dtype=getattr(torch, job["dtype"])).eval()
        bits = job["options"].get("bits")
        if bits is not None:
            return {f"{name} {bits}": f"weights in {job['shared']}" for name in ("rounded", "wrong")}, ["torch"]
        arms = ("dies",) if job["work"].endswith("dying") else ("right", "wrong", "raises")
        return dict.fromkeys(arms, "a call"), ["torch", "no-such-package"]

    def prefill(self, arm: str, ids: list[int]) -> Any:
        import torch

        if arm == "dies":
            os._exit(3)
        if arm == "raises":
            raise RuntimeError("no such kernel")
        with torch.no_grad():
            return self._model(torch.tensor([ids]), use_cache=True, logits_to_keep=1).logits[0, -1]

    def log_probs(self, arm: str, ids: list[int], keep: int | None) -> dict[int, float]:
        from bench.engines.log_probs import log_probs_of

        logits = self.prefill(arm, ids)
        if arm.startswith("rounded"):  # by about as much as integers of 8 bits do, beyond what floats do
            logits = logits + 0.2 * logits.std() * (-1.0) ** logits.argsort().argsort()
        if arm.startswith("wrong"):
            logits = logits.roll(1) if arm == "wrong" else -logits
        return log_probs_of(logits, keep)
