"""Hugging Face and pop_ext in the bench's own environment: the arms of ``bench/run.py``, on the shared weights."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from pop_ext.hf.weight_map import describe
from pop_ext.plans.plan import Plan

from bench.arms import Arm, make_arms
from bench.engines.log_probs import log_probs_of

_ALL_LENGTHS = [[0, 0]]  # the names of arms do not depend on the prompt


class Engine:
    """Run Hugging Face and pop_ext.

    Job options: ``plans`` (JSON texts of the pruned arms), ``compile_mode`` (None: no hf-compile), ``copies`` (of
    weights, each with arms of its own: see `bench.arms.make_arms`).
    """

    def load(self, job: dict[str, Any]) -> tuple[dict[str, str], list[str]]:
        torch.set_num_threads(job["threads"])
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        dtype = getattr(torch, job["dtype"])
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            job["weights"], dtype=dtype, attn_implementation="sdpa"
        )
        self._model = model.eval()
        self._spec = describe(model).spec
        self._plans = [Plan.from_json(text) for text in job["options"]["plans"]]
        self._compile_mode = job["options"]["compile_mode"]
        self._copies = job["options"]["copies"]
        self._arms: dict[str, Arm] = {}
        self._prompt: list[int] = []
        named = self._make(torch.tensor(_ALL_LENGTHS))
        return {arm.name: arm.what for arm in named}, ["torch", "transformers"]

    def prefill(self, arm: str, ids: list[int]) -> Any:
        return self._arm(arm, ids).run()

    def log_probs(self, arm: str, ids: list[int], keep: int | None) -> dict[int, float]:
        logits = self.prefill(arm, ids).logits
        return log_probs_of(logits[0, -1].float().numpy(), keep)

    def _arm(self, name: str, ids: list[int]) -> Arm:
        """Return the arm for a prompt; the arms of another prompt are freed.

        Raises:
            RuntimeError: the arm cannot be built.
        """
        if ids != self._prompt:
            self._arms = {arm.name: arm for arm in self._make(torch.tensor([ids]))}
            self._prompt = ids
        arm = self._arms[name]
        if arm.call is None:
            arm.prepare()
        if arm.failed is not None:
            raise RuntimeError(arm.failed)
        return arm

    def _make(self, input_ids: torch.Tensor) -> list[Arm]:
        return make_arms(self._model, self._spec, input_ids, self._plans, self._compile_mode, copies=self._copies)
