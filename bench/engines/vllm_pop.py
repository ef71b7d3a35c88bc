"""vLLM's CPU build with pop_ext's plugin: the same calls with pruned prefills."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.engines import vllm_cpu


class Engine(vllm_cpu.Engine):
    """Run vLLM's CPU build with pruned prefills.

    Job option: ``plans``, a list with one JSON text; more plans are refused.
    """

    def arm_and_arguments(self, job: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        import pop_ext.vllm
        from pop_ext.plans.plan import Plan

        from bench.arms import plan_name

        pop_ext.vllm.register()  # pop_ext is on the path only: vLLM finds no entry point of it
        if len(job["options"]["plans"]) != 1:
            raise ValueError(f"plans: expected one for an engine of vLLM, got {len(job['options']['plans'])}")
        plan = Plan.from_json(job["options"]["plans"][0])
        path = Path(job["work"]) / "plan.json"
        plan.save(path)
        return f"vllm {plan_name(plan)}", pop_ext.vllm.engine_arguments(job["weights"], path)
