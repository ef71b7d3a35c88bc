"""vLLM's CPU build with int8 weights, and inputs of products that are rounded to int8 token by token (W8A8)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.engines import vllm_cpu
from bench.engines.conversion import converted


class Engine(vllm_cpu.Engine):
    """Run vLLM's CPU build on a W8A8 checkpoint that is made from the weights of the job. Takes no job options."""

    def load(self, job: dict[str, Any]) -> tuple[dict[str, str], list[str]]:
        folder = converted(Path(job["shared"]) / "w8a8", "bench.engines.w8a8_file", "write_w8a8", job["weights"])
        arms, packages = super().load(job | {"weights": str(folder)})
        how = f"W8A8, int8 weights in compressed-tensors; layers run by {', '.join(self._kernels())}"
        return {name: f"{what}; {how}" for name, what in arms.items()}, [*packages, "compressed-tensors"]

    def arm_and_arguments(self, job: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        return "vllm-int8", {}

    def _kernels(self) -> list[str]:
        """Return the names of vLLM's kernels for the quantised products."""
        [found] = self._engine.apply_model(kernel_names)
        return found


def kernel_names(model: Any) -> list[str]:
    """Return the classes of vLLM's int8 kernels in a model, and of each the method that it has chosen."""
    names = set()
    for module in model.modules():
        kernel = getattr(getattr(module, "scheme", None), "kernel", None)
        if kernel is not None:
            method = getattr(kernel, "linear_method", None)
            names.add(type(kernel).__name__ + (f".{method.__name__}" if method is not None else ""))
    return sorted(names) or ["no int8 kernel"]
