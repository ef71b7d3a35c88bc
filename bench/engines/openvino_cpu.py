"""OpenVINO on the CPU: the model as exported by optimum-intel, with a K/V cache, cut to one row of logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from bench.engines.conversion import converted
from bench.engines.log_probs import log_probs_of

_ARM = "openvino"
_MODEL = "openvino_model.xml"
_ROWS = 32  # of the inference for which kernels are read; AMX is chosen for as many
_CALIBRATION = (4, 512)  # prompts, and tokens of each
_LAST_ROW = ([-1], [np.iinfo(np.int64).max], [1], [1])  # start, stop, step, axis of Slice
_FORMS = {
    "int8": "int8 weights, a scale for each channel",
    "w8a8": "int8 weights, a scale for each channel; inputs rounded to int8 by constant scales (nncf, SmoothQuant)",
}


class Engine:
    """Run OpenVINO.

    Job options: ``form`` of quantised weights, "int8" or "w8a8", without which they keep their dtype; ``precision``
    ("f32" or "bf16") in which it computes, without which OpenVINO chooses one for this processor; ``group``, the number
    of inputs of a product that share a scale under dynamic quantisation. Only with ``precision`` "f32" are inputs
    quantised dynamically: in bf16 OpenVINO widens int8 weights instead, whatever the group.
    """

    def load(self, job: dict[str, Any]) -> tuple[dict[str, str], list[str]]:
        import openvino as ov

        options = job["options"]
        form, precision, group = options.get("form"), options.get("precision"), options.get("group")
        core = ov.Core()
        model = core.read_model(model_file(job, form))
        keep_last_row(model)
        settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": job["threads"], "NUM_STREAMS": 1}
        if precision:
            settings["INFERENCE_PRECISION_HINT"] = precision
        if group:
            settings["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = group
        compiled = core.compile_model(model, "CPU", settings)
        self._inputs = {name for port in compiled.inputs for name in port.get_names()}
        self._request = compiled.create_infer_request()
        computes = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
        how = [f"one inference from an empty state, one row of logits; it computes in {computes}"]
        if not form:
            return {_ARM: how[0]}, ["openvino", "optimum-intel"]
        how.append(_FORMS[form])
        if group:
            vnni = "with" if has_vnni(Path("/proc/cpuinfo").read_text()) else "without"
            found = compiled.get_property("DYNAMIC_QUANTIZATION_GROUP_SIZE")
            how.append(
                f"DYNAMIC_QUANTIZATION_GROUP_SIZE is {found}, on a processor {vnni} the VNNI that dynamic quantisation "
                "needs"
            )
        self.prefill("", [0] * _ROWS)  # kernels are chosen for a shape, by the first inference
        how.append(f"products run by {', '.join(product_kinds(compiled.get_runtime_model()))}")
        return {job["name"]: "; ".join(how)}, ["openvino", "optimum-intel", "nncf"]

    def prefill(self, arm: str, ids: list[int]) -> Any:
        self._request.reset_state()
        self._request.infer(inputs_of(ids, self._inputs))
        return self._request.get_tensor("logits").data

    def log_probs(self, arm: str, ids: list[int], keep: int | None) -> dict[int, float]:
        return log_probs_of(self.prefill(arm, ids)[0, -1], keep)


def model_file(job: dict[str, Any], form: str | None) -> Path:
    """Return the converted weights of a job in a form; convert them if they are missing."""
    folder = Path(job["shared"]) / (f"ir-{form}" if form else "ir")
    if form != "w8a8":
        return converted(folder, __name__, "export", job["weights"], job["dtype"], form or "") / _MODEL
    if not folder.exists():
        converted(folder, __name__, "quantise_inputs", str(model_file(job, None)))
    return folder / _MODEL


def export(weights: str, dtype: str, form: str, folder: str) -> None:
    """Convert a checkpoint; the weights keep their dtype, or with ``form`` "int8" nncf rounds them to int8."""
    import torch
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

    how = {"quantization_config": OVWeightQuantizationConfig(bits=8, sym=True)} if form else {"load_in_8bit": False}
    model = OVModelForCausalLM.from_pretrained(weights, export=True, compile=False, dtype=getattr(torch, dtype), **how)
    model.save_pretrained(folder)


def quantise_inputs(plain: str, folder: str) -> None:
    """Quantise weights and inputs of all products to int8 by nncf, with SmoothQuant and constant scales.

    The scales of inputs come from a few prompts of random tokens. For the time of a prefill the prompts do not matter;
    a real model would need real ones. "MIXED" gives inputs zero points, which costs neither accuracy nor time.
    """
    import nncf
    import openvino as ov

    model = ov.Core().read_model(plain)
    names = {name for port in model.inputs for name in port.get_names()}
    prompts, tokens = _CALIBRATION
    vocabulary = model.output("logits").get_partial_shape()[-1].get_length()
    random = np.random.default_rng(0)
    samples = [inputs_of(random.integers(0, vocabulary, tokens).tolist(), names) for _ in range(prompts)]
    quantised = nncf.quantize(
        model,
        nncf.Dataset(samples),
        subset_size=prompts,
        model_type=nncf.ModelType.TRANSFORMER,
        preset=nncf.QuantizationPreset.MIXED,
    )
    Path(folder).mkdir(parents=True, exist_ok=True)
    ov.save_model(quantised, Path(folder) / _MODEL, compress_to_fp16=False)


def inputs_of(ids: list[int], names: set[str]) -> dict[str, np.ndarray]:
    """Return the inputs of one inference from an empty state, of those that the model has."""
    rows = np.array([ids], dtype=np.int64)
    given = {
        "input_ids": rows,
        "attention_mask": np.ones_like(rows),
        "position_ids": np.arange(len(ids), dtype=np.int64)[None],
        "beam_idx": np.zeros(1, dtype=np.int32),
    }
    return {name: value for name, value in given.items() if name in names}


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
