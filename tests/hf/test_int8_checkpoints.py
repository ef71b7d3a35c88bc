"""Native prefill of int8 checkpoints: by their own integers and scales, in place."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import gguf
import pop_ext
import pytest
import torch
from against_oracle import GAPS, LAST, plan_of, run_oracle
from enabled_models import generate
from int8_checkpoints import ROUNDING, WEIGHT_ONLY, dense_twin, int8_checkpoint, replace_linear, rounding_twin
from models import llama, shared, tokens
from pop_ext import UnsupportedModelError
from pop_ext.hf.free_weights import int8_linear_of
from pop_ext.hf.int8_linear import Int8Linear
from pop_ext.hf.int8_weights import int8_weight
from pop_ext.plans.origin import weights_hash
from tolerance import assert_close_fp32, assert_low_precision, compare_caches, rms, stored_layers
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from bench.engines.gguf_file import gguf_name  # noqa: E402

pop = torch.ops.pop
pytestmark = pytest.mark.cpu


def copied_bytes(native) -> int:
    """Return the bytes that a load has copied, but for the K/V matrices that every load folds."""
    spec = native.spec
    layers = sum(len(run) for run in native.plan.projected_runs)
    folded = layers * 2 * spec.num_kv_heads * spec.head_dim * spec.hidden_size * native.dtype.itemsize
    return native.extra_bytes - folded


@pytest.mark.parametrize("omit", [(), LAST, GAPS], ids=str)
@pytest.mark.parametrize("form", WEIGHT_ONLY)
def test_weight_only_integers_equal_the_oracle(form, omit, tmp_path):
    model = int8_checkpoint(form, shared(), tmp_path)
    plan, ids = plan_of(model, omit, 2), tokens(model, 2, 40)
    native = pop_ext.load(model, plan)
    expected = run_oracle(dense_twin(model), plan, ids, logits_to_keep=2)
    actual = native.prefill(ids, logits_to_keep=2)
    assert_close_fp32(actual.logits, expected.logits, "logits")
    compare_caches(actual.past_key_values, expected.cache)
    assert copied_bytes(native) == 0


@pytest.mark.parametrize("family", ["phi3", "qwen2", "gemma3", "olmo2"])
def test_fused_matrices_biases_and_other_norms(family, tmp_path):
    model = int8_checkpoint("torchao", shared(family), tmp_path)
    plan, ids = plan_of(model, GAPS, 2), tokens(model, 2, 40)
    expected = run_oracle(model, plan, ids)
    actual = pop_ext.load(model, plan).prefill(ids)
    assert_close_fp32(actual.logits, expected.logits, "logits")
    compare_caches(actual.past_key_values, expected.cache)


def test_only_the_rounded_rows_of_a_fused_matrix_are_copied(tmp_path):
    model = int8_checkpoint("compressed-tensors", shared("phi3"), tmp_path)
    native = pop_ext.load(model, plan_of(model, GAPS), int8=True)
    spec = native.spec
    q, hidden, inner = spec.num_heads * spec.head_dim, spec.hidden_size, spec.intermediate_size
    shapes = ((q, hidden), (hidden, q), (inner, hidden), (inner, hidden), (hidden, inner))  # q, o, gate, up, down
    # The last layer is retained, but not rounded. Each row has a scale.
    assert copied_bytes(native) == 2 * sum(rows * (width + 4) for rows, width in shapes)


@pytest.mark.parametrize("form", WEIGHT_ONLY)
def test_weight_only_integers_in_bfloat16(form, tmp_path):
    model = int8_checkpoint(form, shared(dtype=torch.bfloat16), tmp_path)
    plan, ids = plan_of(model, GAPS, 3), tokens(model, 2, 70)
    dense = dense_twin(model)
    truth = run_oracle(nn.Module.float(dense_twin(model)), plan, ids, logits_to_keep=2)
    same_dtype = run_oracle(dense, plan, ids, logits_to_keep=2)
    actual = pop_ext.load(model, plan).prefill(ids, logits_to_keep=2)
    assert_low_precision(actual.logits, same_dtype.logits, truth.logits, "logits")
    compare_caches(actual.past_key_values, same_dtype.cache, oracle_fp32=truth.cache)


@pytest.mark.parametrize("omit", [(), GAPS], ids=str)
@pytest.mark.parametrize(
    ("form", "family"),
    [*((form, "llama") for form in (*WEIGHT_ONLY, *ROUNDING)), ("torchao", "phi3"), ("compressed-tensors", "phi3")],
)
def test_int8_products_use_the_checkpoints_integers(form, family, omit, tmp_path):
    model = int8_checkpoint(form, shared(family), tmp_path)
    plan, ids = plan_of(model, omit, 2), tokens(model, 2, 40)
    native = pop_ext.load(model, plan, int8=True)
    exact, expected = (run_oracle(twin, plan, ids) for twin in (dense_twin(model), rounding_twin(model, plan)))
    actual = native.prefill(ids)
    # Some roundings tip over, which moves later layers; the first layer's K and V have none before them.
    caches = [stored_layers(cache) for cache in (actual.past_key_values, expected.cache, exact.cache)]
    for index, (ours, theirs, without) in enumerate(zip(*caches, strict=True)):
        first = max(ours.first, theirs.first)
        for kind in ("keys", "values"):
            a, b, c = (getattr(layer, kind)[:, :, first - layer.first :] for layer in (ours, theirs, without))
            part = 0.1 if index <= 1 else 0.7
            assert rms(a - b) <= part * rms(c - b) + 1e-6, f"layer {index}: {kind}"
    if form.startswith("compressed"):  # its floats are in the model, too
        copies = [ref.int8 for ref in native.description.weights if ref.int8 is not None]
        matrices = {id(one): one for one in copies}.values()  # gate and up of Phi-3 share one
        assert copied_bytes(native) == sum(one.values.nbytes + one.scale.nbytes for one in matrices) > 0
    else:
        assert copied_bytes(native) == 0


def test_integers_that_rounding_would_not_give_are_not_rounded_again():
    """The largest integer of a row is 50, not 127: rounding the floats again would give other integers and scales."""
    model = llama()

    def small(linear: nn.Linear) -> Int8Linear:
        scale = linear.weight.detach().abs().amax(1) / 50
        return Int8Linear((linear.weight.detach() / scale[:, None]).round().to(torch.int8), scale)

    replace_linear(model.model.layers, small)
    layer = model.model.layers[0].mlp.down_proj
    x = torch.randn(7, layer.in_features)
    values, scale = pop.quantize_rows(x, "int8")
    expected = (values.double() @ layer.weight.double().T).float() * layer.scale * scale[:, None]
    assert torch.equal(pop.int8_linear(x, layer.weight, layer.scale), expected)
    native = pop_ext.load(model, plan_of(model), int8=True)
    assert copied_bytes(native) == 0


@pytest.mark.parametrize("form", ROUNDING)
def test_a_checkpoint_that_rounds_inputs_asks_for_int8(form, tmp_path):
    model = int8_checkpoint(form, shared(), tmp_path)
    for options in ({}, {"backend": "native"}):
        if options:
            with pytest.raises(UnsupportedModelError, match=r"expected int8=True for a checkpoint .* got int8=False"):
                pop_ext.enable(model, plan_of(model), **options)
    pop_ext.enable(model, plan_of(model), strict=True)
    ids = tokens(model, 1, 40)
    with torch.no_grad():
        model(ids, logits_to_keep=1)
        assert pop_ext.last_call(model).backend == "portable"
        pop_ext.enable(model, plan_of(model), strict=True, int8=True)
        model(ids, logits_to_keep=1)
        assert pop_ext.last_call(model).backend == "native"


@pytest.mark.parametrize("form", ROUNDING)
def test_a_plan_that_omits_nothing_is_close_to_a_stock_model_that_rounds_inputs(form, tmp_path):
    model = int8_checkpoint(form, shared(), tmp_path)
    ids = tokens(model, 2, 40)
    with torch.no_grad():
        stock = copy.deepcopy(model)(ids, logits_to_keep=1).logits
        pop_ext.enable(model, plan_of(model, ()), strict=True, int8=True)
        assert rms(model(ids, logits_to_keep=1).logits - stock) < 0.08 * rms(stock)  # it rounds twice as much


@pytest.mark.parametrize("form", [*WEIGHT_ONLY, *ROUNDING])
def test_generation(form, tmp_path):
    model = int8_checkpoint(form, llama(), tmp_path)
    ids = tokens(model, 1, 40)
    pop_ext.enable(model, plan_of(model), strict=True, int8=form in ROUNDING)
    first = generate(model, ids, 6)
    assert torch.equal(generate(model, ids, 6), first)
    assert pop_ext.last_call(model).backend == "native"


@pytest.mark.parametrize("backend", ["auto", "portable"])
@pytest.mark.parametrize("form", ["compressed-tensors", "compressed-tensors, weights"])
def test_a_checkpoint_of_compressed_tensors_before_its_first_call(form, backend, tmp_path):
    """Its first call replaces the packed weights, so `enable` does."""
    plan, ids = plan_of(shared()), tokens(shared(), 1, 40)
    found = []
    for age in ("", ", fresh"):
        model = int8_checkpoint(form + age, shared(), tmp_path / f"checkpoint{age}")
        assert hasattr(model, "ct_decompress_hook") == bool(age)
        pop_ext.enable(model, plan, strict=True, int8=form in ROUNDING and backend == "auto", backend=backend)
        with torch.no_grad():
            found.append(model(ids, logits_to_keep=1).logits)
        assert pop_ext.last_call(model).backend == ("native" if backend == "auto" else "portable")
    assert torch.equal(*found)


@pytest.mark.parametrize("form", ["torchao", "Int8Linear"])
@pytest.mark.parametrize("part", ["values", "scale"])
@pytest.mark.parametrize("layer", [0, 4])
def test_integers_and_scales_that_change_in_place_are_noticed(form, part, layer, tmp_path):
    """K and V of an omitted layer are folded, so their kernels do not read the integers."""
    model, ids = int8_checkpoint(form, llama(), tmp_path), tokens(llama(), 1, 40)
    pop_ext.enable(model, plan_of(model, LAST, 2), strict=True)
    with torch.no_grad():
        before = model(ids, logits_to_keep=1).logits
        module = model.model.layers[layer].self_attn.v_proj
        names = {"values": ("qdata", "weight"), "scale": ("scale", "scale")}[part]
        tensor = getattr(module.weight, names[0]) if form == "torchao" else getattr(module, names[1])
        if part == "values":
            tensor[3].neg_()
        else:
            tensor.mul_(1.7)
        after = model(ids, logits_to_keep=1).logits
        assert not torch.equal(after, before)
        twin = pop_ext.enable(copy.deepcopy(model), plan_of(model, LAST, 2), strict=True)
        assert torch.equal(twin(ids, logits_to_keep=1).logits, after)


def test_replaced_integers_and_scales_are_noticed():
    model = llama()
    replace_linear(model.model.layers, int8_linear_of)
    ids = tokens(model, 1, 40)
    pop_ext.enable(model, plan_of(model), strict=True)
    with torch.no_grad():
        before = model(ids, logits_to_keep=1).logits
        linear = model.model.layers[0].mlp.up_proj
        for name in ("weight", "scale"):
            kept = getattr(linear, name).clone()
            setattr(linear, name, kept.flip(0).contiguous())
            after = model(ids, logits_to_keep=1).logits
            assert not torch.equal(after, before), name
            getattr(linear, name).copy_(kept)
            assert torch.equal(model(ids, logits_to_keep=1).logits, before), name


@pytest.mark.parametrize("option", ["fp8", "prepack"])
def test_other_options_want_plain_weights(option):
    model = llama(dtype=torch.bfloat16)
    replace_linear(model.model.layers, int8_linear_of)
    with pytest.raises(UnsupportedModelError, match=f"{option}: expected weights in the model's dtype, got int8"):
        pop_ext.load(model, plan_of(model), **{option: True})


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_a_model_with_experts_is_left_to_the_portable_backend(family, tmp_path):
    model = int8_checkpoint("torchao", shared(family), tmp_path)
    with pytest.raises(UnsupportedModelError, match="expected no integers in a model with experts, got int8"):
        pop_ext.load(model, plan_of(model))
    pop_ext.enable(model, plan_of(model), strict=True)
    with torch.no_grad():
        model(tokens(model, 1, 40), logits_to_keep=1)
    assert pop_ext.last_call(model).backend == "portable"


def test_weights_of_torchao_have_a_hash(tmp_path):
    model = int8_checkpoint("torchao", shared(), tmp_path)
    first = weights_hash(model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.qdata.neg_()
    assert weights_hash(model) != first


def test_a_zero_point_and_changed_floats_of_compressed_tensors_are_refused(tmp_path):
    model = int8_checkpoint("compressed-tensors", shared(), tmp_path)
    module = model.model.layers[1].mlp.up_proj
    module.register_parameter("weight_zero_point", nn.Parameter(torch.full((1,), 5, dtype=torch.int8), False))
    assert int8_weight(module) is None
    module.weight_zero_point = nn.Parameter(torch.zeros(1, dtype=torch.int8), False)
    assert int8_weight(module) is not None
    with torch.no_grad():
        module.weight[3] = 128 * module.weight_scale[3]  # 128 is no int8
    with pytest.raises(UnsupportedModelError, match=r"layers.1.up_proj: expected weights of compressed-tensors"):
        pop_ext.load(model, plan_of(model), int8=True)


def test_other_forms_of_torchao_are_left_to_the_portable_backend():
    torchao = pytest.importorskip("torchao.quantization")
    model = llama()
    torchao.quantize_(model.model, torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4))
    assert int8_weight(model.model.layers[0].mlp.up_proj) is None
    with pytest.raises(UnsupportedModelError, match="expected a plain tensor, got"):
        pop_ext.enable(model, plan_of(model), backend="native")
    pop_ext.enable(model, plan_of(model), strict=True)


def test_an_unknown_scheme_of_compressed_tensors_is_refused(tmp_path):
    model = int8_checkpoint("compressed-tensors", shared(), tmp_path)
    model.model.layers[1].mlp.up_proj.quantization_scheme.input_activations.symmetric = False
    with pytest.raises(UnsupportedModelError, match=r"expected weights of compressed-tensors in symmetric"):
        pop_ext.enable(model, plan_of(model), backend="native", int8=True)


def test_bad_scales_are_refused_by_name():
    native = pop_ext.load(shared(), plan_of(shared()))
    weights = [ref.tensor.detach() for ref in native.description.weights]
    slots = [slot for slot, _, _ in native.spec.weight_slots()]
    index = slots.index("layers.2.o_proj")
    values, scale = pop.quantize_rows(weights[index], "int8")
    none = [torch.empty(0) for _ in weights]

    def load(changed, **scales):
        given = [scales.get("at", {}).get(i, empty) for i, empty in enumerate(none)]
        return pop.load(native.spec.to_json(), native.plan.to_json(), changed, scales=given)

    integers = [values if i == index else weight for i, weight in enumerate(weights)]
    pop.unload(load(integers, at={index: scale}))
    for changed, at, message in (
        (weights, {index: scale}, "weight layers.2.o_proj: expected dtype int8 with a scale, got float32"),
        (integers, {}, "weight layers.2.o_proj: expected float32, bfloat16 or float16, got"),
        (integers, {index: scale[1:]}, r"scale of layers.2.o_proj: expected shape \[\d+\], got \[\d+\]"),
        (integers, {index: scale.double()}, "scale of layers.2.o_proj: expected .*float64"),
        (integers, {index: scale, 0: scale}, "weight embed_tokens: expected"),
    ):
        with pytest.raises(RuntimeError, match=message):
            load(changed, at=at)
    with pytest.raises(RuntimeError, match="scales: expected one tensor for each of .* weights, got 1"):
        pop.load(native.spec.to_json(), native.plan.to_json(), weights, scales=[scale])


# Scales for groups of inputs


@pytest.mark.parametrize("omit", [(), GAPS], ids=str)
@pytest.mark.parametrize("int8", [False, True])
def test_a_model_with_scales_for_groups_equals_the_oracle(int8, omit):
    model = llama(hidden=128, intermediate=160)

    def grouped_linear(linear: nn.Linear) -> Int8Linear:
        blocks = linear.weight.detach().view(linear.out_features, -1, 32)
        scale = blocks.abs().amax(-1) / 127
        values = (blocks / scale[:, :, None]).round().to(torch.int8).view_as(linear.weight)
        return Int8Linear(values, scale)

    replace_linear(model.model.layers, grouped_linear)
    plan, ids = plan_of(model, omit, 2), tokens(model, 2, 40)
    actual = pop_ext.load(model, plan, int8=int8).prefill(ids)
    exact = run_oracle(dense_twin(model), plan, ids)
    if not int8:
        assert_close_fp32(actual.logits, exact.logits, "logits")
        compare_caches(actual.past_key_values, exact.cache)
        return
    expected = run_oracle(rounding_twin(model, plan), plan, ids)
    assert rms(actual.logits - expected.logits) < 0.7 * rms(exact.logits - expected.logits)


# GGUF


def as_q8_0(model):
    """Return a copy whose matrices are those of a Q8_0 file, turned into floats as transformers does."""
    model = copy.deepcopy(model)
    model.config.quantization_config = {"quant_method": "gguf"}
    for layer in model.model.layers:
        for module in layer.modules():
            if isinstance(module, nn.Linear):
                blocks = module.weight.detach().view(module.out_features, -1, 32)
                scale = (blocks.abs().amax(-1, keepdim=True) / 127).half().float()
                scale = torch.where(scale == 0, torch.ones_like(scale), scale)
                largest = blocks.abs().amax(-1, keepdim=True)
                values = torch.where(
                    blocks.abs() == largest, 127 * blocks.sign(), (blocks / scale).round().clamp(-127, 127)
                )
                module.weight = nn.Parameter((values * scale).view_as(module.weight), requires_grad=False)
    return model


@pytest.mark.parametrize("free", [False, True])
def test_int8_computes_with_the_blocks_of_a_q8_0_file(free):
    model = as_q8_0(llama(hidden=128, intermediate=160))
    model.model.layers[0].mlp.up_proj.weight[3, 32:64] = 0  # a block of zeros has a scale of zero
    plan, ids = plan_of(model, GAPS, 2), tokens(model, 2, 40)
    floats = copy.deepcopy(model)
    native = pop_ext.load(model, plan, int8=True, free_weights=free)
    read = {ref.slot: ref.int8 for ref in native.description.weights if ref.int8 is not None}
    assert set(read) == {f"layers.{i}.{name}_proj" for i in (0, 2) for name in ("q", "o", "gate", "up", "down")}
    for slot, integers in read.items():
        kind = slot.rpartition(".")[2]
        module = floats.get_submodule(
            f"model.{slot.rpartition('.')[0]}.{'self_attn' if kind in ('q_proj', 'o_proj') else 'mlp'}.{kind}"
        )
        assert integers.scale.shape == (module.out_features, module.in_features // 32)
        assert torch.equal(integers.dense(torch.float32), module.weight)
    copies = sum(integers.values.nbytes + integers.scale.nbytes for integers in read.values())
    assert copied_bytes(native) == (0 if free else copies)
    actual = native.prefill(ids).logits
    exact, by_rows = (run_oracle(floats, plan, ids), pop_ext.load(_plain(floats), plan, int8=True).prefill(ids))
    assert rms(actual - exact.logits) < rms(by_rows.logits - exact.logits)


def _plain(model):
    del model.config.quantization_config
    return model


def test_other_floats_of_a_gguf_file_are_rounded_by_rows():
    model = llama(hidden=128, intermediate=160)
    model.config.quantization_config = {"quant_method": "gguf"}
    plan, ids = plan_of(model), tokens(model, 1, 40)
    native = pop_ext.load(model, plan, int8=True)
    assert all(ref.int8 is None for ref in native.description.weights)
    assert torch.equal(native.prefill(ids).logits, pop_ext.load(_plain(model), plan, int8=True).prefill(ids).logits)


def write_q8_0(model, path) -> None:
    """Write a Llama as a GGUF file whose matrices are Q8_0, without the permutation of rows of q and k."""
    config, kind = model.config, gguf.GGMLQuantizationType.Q8_0
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    for name, value in model.state_dict().items():
        array = value.numpy()
        if array.ndim == 1 or "layers" not in name:
            writer.add_tensor(gguf_name(name), array)
        else:
            writer.add_tensor(gguf_name(name), gguf.quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_real_q8_0_file_is_read_as_its_integers(tmp_path):
    sizes = {"hidden_size": 128, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(num_hidden_layers=6, vocab_size=300, **sizes)
    write_q8_0(LlamaForCausalLM(config), tmp_path / "model.gguf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32).eval()
    native = pop_ext.load(model, plan_of(model, GAPS, 2), int8=True)
    assert native.integer_weights == 10  # q, o, gate, up and down of layers 0 and 2
    for ref in native.description.weights:
        if ref.int8 is not None:
            assert torch.equal(ref.int8.dense(torch.float32), ref.find())
    floats = pop_ext.load(AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf"), "third", int8=True)
    assert floats.integer_weights in (0, 20)  # of another dtype than float32 they are rounded by rows
