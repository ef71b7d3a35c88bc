"""OpenVINO on the CPU: the model as exported by optimum-intel, with a K/V cache, cut to one row of logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from bench.engines.conversion import in_new_process
from bench.engines.log_probs import log_probs_of

_ARM = "openvino"
_GROUP = 32  # inputs of a product that share a scale under dynamic quantisation: OpenVINO's default
_LAST_ROW = ([-1], [np.iinfo(np.int64).max], [1], [1])  # start, stop, step, axis of Slice


class Engine:
    """Run OpenVINO. It computes in the precision that OpenVINO chooses for this processor.

    Job option: ``int8``, whether weights are int8 and dynamic quantisation of inputs is on.
    """

    def load(self, job: dict[str, Any]) -> tuple[dict[str, str], list[str]]:
        import openvino as ov

        int8 = bool(job["options"].get("int8"))
        path = Path(job["shared"]) / ("ir-int8" if int8 else "ir") / "openvino_model.xml"
        if not path.exists():
            in_new_process(__name__, "export", job["weights"], str(path.parent), job["dtype"], "int8" if int8 else "")
        core = ov.Core()
        model = core.read_model(path)
        keep_last_row(model)
        settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": job["threads"], "NUM_STREAMS": 1}
        if int8:  # products with inputs in float32 alone are quantised dynamically
            settings |= {"DYNAMIC_QUANTIZATION_GROUP_SIZE": _GROUP, "INFERENCE_PRECISION_HINT": "f32"}
        compiled = core.compile_model(model, "CPU", settings)
        self._inputs = {name for port in compiled.inputs for name in port.get_names()}
        self._request = compiled.create_infer_request()
        precision = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
        how = f"one inference from an empty state, one row of logits; it computes in {precision}"
        if not int8:
            return {_ARM: how}, ["openvino", "optimum-intel"]
        group = compiled.get_property("DYNAMIC_QUANTIZATION_GROUP_SIZE")
        how = f"{how}; int8 weights, a scale for each channel; DYNAMIC_QUANTIZATION_GROUP_SIZE is {group}"
        self.prefill("", [0] * _GROUP)  # kernels are chosen for a shape, by the first inference
        kernels = ", ".join(product_kinds(compiled.get_runtime_model()))
        vnni = "with" if has_vnni(Path("/proc/cpuinfo").read_text()) else "without"
        how = f"{how}, on a processor {vnni} the VNNI that dynamic quantisation needs; products run by {kernels}"
        return {f"{_ARM}-int8": how}, ["openvino", "optimum-intel", "nncf"]

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


def export(weights: str, folder: str, dtype: str, form: str) -> None:
    """Convert a checkpoint; the weights keep their dtype, or with ``form`` "int8" nncf rounds them to int8."""
    import torch
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

    how = {"quantization_config": OVWeightQuantizationConfig(bits=8, sym=True)} if form else {"load_in_8bit": False}
    model = OVModelForCausalLM.from_pretrained(weights, export=True, compile=False, dtype=getattr(torch, dtype), **how)
    model.save_pretrained(folder)


def product_kinds(model: Any) -> list[str]:
    """Return the kernels of the products with weights in a compiled model, such as "brgemm_avx2_f32"."""
    facts = [node.get_rt_info() for node in model.get_ordered_ops()]
    products = [item for item in facts if item["layerType"].astype(str) == "FullyConnected"]
    return sorted({item["primitiveType"].astype(str) for item in products}) or ["no FullyConnected"]


def has_vnni(cpuinfo: str) -> bool:
    """Return whether /proc/cpuinfo names VNNI for 256 or 512 bits.

    OpenVINO quantises inputs dynamically only with it. Without it the group size has no effect: weights are widened
    and products run in float32.
    """
    return bool({"avx_vnni", "avx512_vnni"} & set(cpuinfo.split()))


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
