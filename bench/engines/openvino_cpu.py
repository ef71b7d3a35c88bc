"""OpenVINO on the CPU: the model as exported by optimum-intel, with a K/V cache, cut to one row of logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from bench.engines.conversion import in_new_process
from bench.engines.log_probs import log_probs_of

_ARM = "openvino"
_LAST_ROW = ([-1], [np.iinfo(np.int64).max], [1], [1])  # start, stop, step, axis of Slice


class Engine:
    """Run OpenVINO. Takes no job options. It computes in the precision that OpenVINO chooses for this processor."""

    def load(self, job: dict[str, Any]) -> tuple[dict[str, str], list[str]]:
        import openvino as ov

        path = Path(job["work"]) / "ir" / "openvino_model.xml"
        if not path.exists():
            in_new_process(__name__, "export", job["weights"], str(path.parent), job["dtype"])
        core = ov.Core()
        model = core.read_model(path)
        keep_last_row(model)
        settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": job["threads"], "NUM_STREAMS": 1}
        compiled = core.compile_model(model, "CPU", settings)
        self._inputs = {name for port in compiled.inputs for name in port.get_names()}
        self._request = compiled.create_infer_request()
        precision = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
        how = f"one inference from an empty state, one row of logits; it computes in {precision}"
        return {_ARM: how}, ["openvino", "optimum-intel"]

    def prefill(self, arm: str, ids: list[int]) -> Any:
        rows = np.array([ids], dtype=np.int64)
        given = {
            "input_ids": rows,
            "attention_mask": np.ones_like(rows),
            "position_ids": np.arange(len(ids), dtype=np.int64)[None],
            "beam_idx": np.zeros(1, dtype=np.int32),
        }
        self._request.reset_state()
        self._request.infer({name: value for name, value in given.items() if name in self._inputs})
        return self._request.get_tensor("logits").data

    def log_probs(self, arm: str, ids: list[int], keep: int | None) -> dict[int, float]:
        return log_probs_of(self.prefill(arm, ids)[0, -1], keep)


def export(weights: str, folder: str, dtype: str) -> None:
    """Convert a checkpoint; the weights keep their dtype."""
    import torch
    from optimum.intel import OVModelForCausalLM

    model = OVModelForCausalLM.from_pretrained(
        weights, export=True, load_in_8bit=False, compile=False, dtype=getattr(torch, dtype)
    )
    model.save_pretrained(folder)


def keep_last_row(model: Any) -> None:
    """Change the model to compute logits of the last row only, as OpenVINO GenAI does with the same file.

    Raises:
        ValueError: there is no matrix product before the logits.
    """
    from openvino import opset13 as ops

    node = model.output("logits").get_node().input_value(0).get_node()
    while node.get_type_name() != "MatMul":
        if node.get_input_size() != 1:
            raise ValueError(f"openvino: expected a MatMul before the logits, got {node.get_type_name()}")
        node = node.input_value(0).get_node()
    rows = ops.slice(node.input_value(0), *(np.array(part, dtype=np.int64) for part in _LAST_ROW))
    node.input(0).replace_source_output(rows.output(0))
    model.validate_nodes_and_infer_types()
