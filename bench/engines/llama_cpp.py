"""llama.cpp through llama-cpp-python; the GGUF file has the weights in the model's dtype."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.engines.conversion import in_new_process
from bench.engines.log_probs import log_probs_of

_ARM = "llama.cpp"
_MARGIN = 16  # positions beyond the prompt


class Engine:
    """Run llama.cpp. Takes no job options. The K/V cache is float16, llama.cpp's default."""

    def load(self, job: dict[str, Any]) -> tuple[dict[str, str], list[str]]:
        from llama_cpp import Llama

        path = Path(job["work"]) / "model.gguf"
        if not path.exists():
            in_new_process("bench.engines.gguf_file", "write_gguf", job["weights"], str(path))
        self._model = Llama(
            str(path),
            n_ctx=job["max_tokens"] + _MARGIN,
            n_batch=max(job["max_tokens"], 512),
            n_threads=job["threads"],
            n_threads_batch=job["threads"],
            logits_all=False,
            verbose=False,
        )
        return {_ARM: "llama_decode of the prompt, logits of its last row; micro-batches of 512"}, ["llama-cpp-python"]

    def prefill(self, arm: str, ids: list[int]) -> Any:
        self._model.reset()
        self._model.eval(ids)

    def log_probs(self, arm: str, ids: list[int], keep: int | None) -> dict[int, float]:
        self.prefill(arm, ids)
        count = self._model.n_vocab()
        return log_probs_of(self._model._ctx.get_logits_ith(-1)[:count], keep)
