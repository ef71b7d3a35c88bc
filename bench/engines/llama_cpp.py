"""llama.cpp through llama-cpp-python, with the weights in the model's dtype or in a format of llama.cpp."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path
from typing import Any

from bench.engines.conversion import converted
from bench.engines.log_probs import log_probs_of

_ARM = "llama.cpp"
_MARGIN = 16  # positions beyond the prompt
_BUFFER = re.compile(r"(\S+) model buffer size = +([\d.]+ MiB)")


class Engine:
    """Run llama.cpp. The K/V cache is float16, llama.cpp's default.

    Job option: ``form``, the format of quantised weights, such as "q8_0" or "q4_k_m". Without it they keep their dtype.
    """

    def load(self, job: dict[str, Any]) -> tuple[dict[str, str], list[str]]:
        import llama_cpp

        form = job["options"].get("form")
        path = weights_file(job, form)
        self._lines: list[str] = []

        @llama_cpp.llama_log_callback
        def keep(level: int, text: bytes, data: Any) -> None:
            self._lines.append(text.decode(errors="replace"))

        llama_cpp.llama_log_set(keep, ctypes.c_void_p(0))
        self._keep = keep  # llama.cpp holds no reference
        self._model = llama_cpp.Llama(
            str(path),
            n_ctx=job["max_tokens"] + _MARGIN,
            n_batch=max(job["max_tokens"], 512),
            n_threads=job["threads"],
            n_threads_batch=job["threads"],
            flash_attn=True,  # off by default in llama-cpp-python, where llama.cpp itself turns it on; it is faster
            logits_all=False,
            verbose=False,
        )
        how = [
            "llama_decode of the prompt, logits of its last row; micro-batches of 512, flash attention",
            *([f"weights quantised to {form} by llama.cpp"] if form else []),
            f"weights in {buffers_text(self._lines)}",
            f"built for {features_text(llama_cpp.llama_print_system_info().decode())}",
        ]
        return {f"{_ARM}-{form}" if form else _ARM: "; ".join(how)}, ["llama-cpp-python"]

    def prefill(self, arm: str, ids: list[int]) -> Any:
        self._model.reset()
        self._model.eval(ids)

    def log_probs(self, arm: str, ids: list[int], keep: int | None) -> dict[int, float]:
        self.prefill(arm, ids)
        count = self._model.n_vocab()
        return log_probs_of(self._model._ctx.get_logits_ith(-1)[:count], keep)


def weights_file(job: dict[str, Any], form: str | None) -> Path:
    """Return the GGUF file of a job; write it, and the plain one that a quantised one is made from, if missing."""
    plain = Path(job["shared"]) / "model.gguf"
    path = plain.with_name(f"model-{form}.gguf") if form else plain
    if path.exists():
        return path
    converted(plain, "bench.engines.gguf_file", "write_gguf", job["weights"])
    return converted(path, __name__, "quantise", str(plain), form, str(job["threads"])) if form else plain


def quantise(plain: str, form: str, threads: str, out: str) -> None:
    """Quantise a GGUF file by llama.cpp's own quantiser, with its defaults for a format.

    Args:
        plain: the file in the model's dtype.
        form: name of the format: "q8_0" is ``LLAMA_FTYPE_MOSTLY_Q8_0``.
        threads: number of threads.
        out: the file to write.

    Raises:
        ValueError: llama.cpp has no such format.
        RuntimeError: the quantiser failed; its messages are in the log.
    """
    import llama_cpp

    kind = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{form.upper()}", None)
    if kind is None:
        raise ValueError(f"form: expected a format of llama.cpp, got {form}")
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.nthread = kind, int(threads)
    code = llama_cpp.llama_model_quantize(plain.encode(), out.encode(), ctypes.byref(settings))
    if code:
        raise RuntimeError(f"llama_model_quantize ended with code {code}")


def buffers_text(lines: list[str]) -> str:
    """Return where llama.cpp holds the weights, from its log: "CPU_Mapped 105.0 MiB, CPU_REPACK 72.6 MiB".

    CPU_REPACK and AMX hold the weights that it has rearranged for the kernels of this processor.
    """
    found = _BUFFER.findall("".join(lines))
    return ", ".join(f"{name} {size}" for name, size in found) or "unknown buffers"


def features_text(info: str) -> str:
    """Return the features in llama.cpp's description of its build: "AVX2 = 1 | FMA = 1 | ..." -> "AVX2, FMA"."""
    return ", ".join(re.findall(r"(\w+) = 1\b", info)) or "no named instruction set"
