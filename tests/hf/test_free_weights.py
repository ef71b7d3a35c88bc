"""``free_weights``: the matrices that int8 rounds are kept in integers alone."""

from __future__ import annotations

import copy
import pickle
import warnings

import pop_ext
import pytest
import torch
from against_oracle import plan_of
from enabled_models import generate
from int8_checkpoints import int8_checkpoint
from models import llama, shared, tokens
from pop_ext import Plan, UnsupportedModelError
from pop_ext.hf.free_weights import int8_linear_of
from pop_ext.hf.int8_linear import Int8Linear
from pop_ext.plans.origin import weights_hash
from tolerance import rms

pytestmark = pytest.mark.cpu
PLAN = Plan(6, (3, 4, 5))


def nbytes(model) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def integers_of(model) -> dict[str, Int8Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Int8Linear)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["llama", "phi3", "qwen2"])
def test_a_prefill_has_the_bits_of_int8_with_copies(family, dtype):
    model, ids = shared(family, dtype=dtype), tokens(shared(family), 2, 40)
    copies = pop_ext.load(model, PLAN, int8=True)
    freed = copy.deepcopy(model)
    native = pop_ext.load(freed, PLAN, int8=True, free_weights=True)
    assert torch.equal(native.prefill(ids).logits, copies.prefill(ids).logits)
    # A matrix of q, k and v keeps its dtype, and q is copied: 3 layers, a scale for each row.
    q_bytes = 3 * 256 * (96 + 4) if family == "phi3" else 0
    assert native.extra_bytes == pop_ext.load(model, PLAN).extra_bytes + q_bytes
    kept = sum(linear.weight.nbytes + linear.scale.nbytes for linear in integers_of(freed).values())
    removed = sum(linear.weight.numel() * dtype.itemsize for linear in integers_of(freed).values())
    assert nbytes(freed) == nbytes(model) - removed + kept


def test_only_what_int8_rounds_in_layers_that_context_rows_pass_is_replaced():
    model = llama()
    pop_ext.load(model, PLAN, int8=True, free_weights=True)
    names = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    assert set(integers_of(model)) == {f"model.layers.{layer}.{name}" for layer in range(3) for name in names}


def test_decode_and_the_disabled_model_multiply_by_the_rounded_matrices():
    model, ids = llama(), tokens(llama(), 1, 40)
    stock = copy.deepcopy(model)
    pop_ext.enable(model, PLAN, strict=True, int8=True, free_weights=True)
    assert torch.equal(generate(model, ids, 6), generate(model, ids, 6))
    assert pop_ext.last_call(model).int8
    pop_ext.disable(model)
    for name, linear in integers_of(model).items():
        weight = linear.weight.float() * linear.scale[:, None]
        given = stock.get_submodule(name).weight
        assert (weight - given).abs().max() <= 0.51 * linear.scale.max()
        stock.get_submodule(name).weight = torch.nn.Parameter(weight)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, stock(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 3, 30, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_an_int8_linear_equals_the_product_with_its_matrix(dtype, rows):
    torch.manual_seed(0)
    plain = torch.nn.Linear(517, 70).to(dtype)
    linear = int8_linear_of(plain)
    x = torch.randn(2, rows, 517, dtype=dtype)
    expected = x.double() @ (linear.weight.double() * linear.scale.double()[:, None]).T + plain.bias.double()
    with torch.no_grad():
        error = linear(x).double() - expected
    # float16 and bfloat16 round the sum of the bias once more.
    assert rms(error) <= 4 * torch.finfo(dtype).eps * rms(expected)


def test_gradients_pass_through_the_rounded_matrix():
    torch.manual_seed(0)
    plain = torch.nn.Linear(64, 32)
    linear = int8_linear_of(plain)
    x = torch.randn(5, 64, requires_grad=True)
    linear(x).sum().backward()
    expected = (linear.weight.float() * linear.scale[:, None]).sum(0).expand(5, 64)
    torch.testing.assert_close(x.grad, expected)
    assert linear.bias.grad is not None


def test_a_layer_in_two_places_stays_one():
    model = llama().eval()
    model.model.layers[1].mlp.down_proj = model.model.layers[0].mlp.down_proj
    pop_ext.load(model, PLAN, int8=True, free_weights=True)
    shared_linear = model.model.layers[0].mlp.down_proj
    assert isinstance(shared_linear, Int8Linear)
    assert model.model.layers[1].mlp.down_proj is shared_linear
    assert not shared_linear.training


def test_copies_pickles_and_conversions():
    model = llama(dtype=torch.bfloat16)
    pop_ext.enable(model, PLAN, strict=True, int8=True, free_weights=True)
    ids = tokens(model, 1, 40)
    with torch.no_grad():
        expected = model(ids, logits_to_keep=1).logits
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(ids, logits_to_keep=1).logits, expected)
    before = {name: (linear.weight.clone(), linear.scale.clone()) for name, linear in integers_of(model).items()}
    model.half().bfloat16()
    for name, linear in integers_of(model).items():
        assert torch.equal(linear.weight, before[name][0])
        assert torch.equal(linear.scale, before[name][1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "phi3", "qwen2"])
def test_a_saved_model_loads_as_a_stock_one_of_the_rounded_matrices(tmp_path, family, dtype):
    model = copy.deepcopy(shared(family, dtype=dtype))
    names = set(model.state_dict())
    pop_ext.enable(model, PLAN, strict=True, int8=True, free_weights=True)
    assert set(model.state_dict()) == names
    model.save_pretrained(tmp_path)
    stock = type(model).from_pretrained(tmp_path)
    for name, linear in integers_of(model).items():
        saved = stock.get_submodule(name).weight
        assert saved.dtype == dtype
        assert torch.equal(saved, (linear.weight.float() * linear.scale[:, None]).to(dtype))
    # What is loaded is rounded to the same integers: a row's largest magnitude is a multiple of 127 in any dtype.
    expected = pop_ext.load(model, PLAN, int8=True)
    found = pop_ext.load(stock, PLAN, int8=True)
    ids = tokens(model, 2, 40)
    assert torch.equal(found.prefill(ids).logits, expected.prefill(ids).logits)


@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict_rounds_the_weights_and_the_change_is_noticed(assign):
    other = llama(seed=1)
    expected = pop_ext.load(copy.deepcopy(other), PLAN, int8=True)
    model = llama()
    pop_ext.enable(model, PLAN, strict=True, int8=True, free_weights=True)
    ids = tokens(model, 1, 40)
    with torch.no_grad():
        model(ids, logits_to_keep=1)
        assert not model.load_state_dict(other.state_dict(), assign=assign).missing_keys
        assert len(integers_of(model)) == 15
        found = model(ids, logits_to_keep=1).logits
    assert pop_ext.last_call(model).int8
    assert torch.equal(found, expected.prefill(ids).logits)


def test_a_state_dict_follows_conversions_and_keeps_scales_of_groups():
    torch.manual_seed(0)
    scale = torch.rand(3, 2) + 0.5
    values = torch.randint(-127, 128, (3, 64), dtype=torch.int8)
    values[:, ::32] = 127
    linear = Int8Linear(values, scale, dtype=torch.float32).bfloat16()
    assert linear.state_dict()["weight"].dtype == torch.bfloat16
    linear.load_state_dict(linear.float().state_dict())
    assert torch.equal(linear.weight, values)
    torch.testing.assert_close(linear.scale, scale, rtol=1e-6, atol=0)
    assert linear.double().state_dict()["weight"].dtype == torch.float64


def test_a_state_dict_that_does_not_fit_is_refused_and_changes_nothing():
    linear = int8_linear_of(torch.nn.Linear(64, 32))
    before = linear.weight.clone(), linear.scale.clone()
    fitting = linear.state_dict()
    for changed, message in (
        ({"weight": torch.zeros(32, 63)}, "size mismatch for weight"),
        ({"weight": torch.zeros(32, 64, dtype=torch.int8)}, "weight: expected floats .*, got torch.int8"),
        ({"weight": torch.zeros(32, 64, device="meta")}, "weight: expected floats .*, got a tensor without values"),
        ({"scale": torch.ones(32)}, r'Unexpected key\(s\) in state_dict: "scale"'),
    ):
        with pytest.raises(RuntimeError, match=message):
            linear.load_state_dict({**fitting, **changed})
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "weight"\.'):
        linear.load_state_dict({"bias": fitting["bias"]})
    assert torch.equal(linear.weight, before[0])
    assert torch.equal(linear.scale, before[1])


def test_integers_of_a_checkpoint_are_neither_saved_nor_replaced(tmp_path):
    model = int8_checkpoint("compressed-tensors", shared(), tmp_path)
    pop_ext.load(model, PLAN, int8=True, free_weights=True)
    folder = tmp_path / "saved"
    with pytest.raises(RuntimeError, match="weight: expected a matrix that was rounded by free_weights, got the int"):
        model.save_pretrained(folder)
    linear = next(iter(integers_of(model).values()))
    hashed, before = weights_hash(model), linear.weight.clone()
    with pytest.raises(RuntimeError, match="weight: expected floats .*, got the integers of a quantised checkpoint"):
        linear.load_state_dict({"weight": torch.zeros(linear.weight.shape)})
    assert torch.equal(linear.weight, before)
    linear.weight.neg_()
    assert weights_hash(model) != hashed


def test_dtypes_without_kernels_multiply_by_the_floats():
    model, ids = llama(), tokens(llama(), 1, 40)
    pop_ext.enable(model, PLAN, strict=True, int8=True, free_weights=True)
    pop_ext.disable(model)
    with torch.no_grad():
        expected = model(ids).logits
        torch.testing.assert_close(model.double()(ids).logits.float(), expected, rtol=1e-4, atol=1e-4)
        pop_ext.enable(model, PLAN, strict=True)
        model(ids, logits_to_keep=1)
    assert "portable prefill" in str(pop_ext.last_call(model))
    assert "got torch.float64" in str(pop_ext.last_call(model))


def test_the_integers_of_a_checkpoint_are_taken_over(tmp_path):
    model = int8_checkpoint("compressed-tensors", shared(), tmp_path)
    ids = tokens(model, 1, 40)
    expected = pop_ext.load(model, PLAN, int8=True).prefill(ids).logits
    size = nbytes(model)
    assert torch.equal(pop_ext.load(model, PLAN, int8=True, free_weights=True).prefill(ids).logits, expected)
    assert len(integers_of(model)) == 15
    assert nbytes(model) < size


def test_enabling_again_keeps_the_integers_and_adds_those_of_another_plan():
    model, ids = llama(), tokens(llama(), 1, 40)
    pop_ext.enable(model, PLAN, int8=True, free_weights=True)
    kept = integers_of(model)
    pop_ext.enable(model, Plan(6, (5,)), strict=True, int8=True, free_weights=True)
    assert kept.items() <= integers_of(model).items()
    assert len(integers_of(model)) == 25
    with torch.no_grad():
        model(ids, logits_to_keep=1)
    pop_ext.enable(model, PLAN, strict=True)  # without int8: the same matrices, and rows that are not rounded
    with torch.no_grad():
        model(ids, logits_to_keep=1)
    assert not pop_ext.last_call(model).int8


def test_bad_arguments_leave_the_model_as_it_was():
    model = llama()
    for call in (pop_ext.load, pop_ext.enable):
        with pytest.raises(ValueError, match="free_weights: expected False without int8=True"):
            call(model, PLAN, free_weights=True)
        with pytest.raises(TypeError, match="free_weights: expected a bool, got int"):
            call(model, PLAN, int8=True, free_weights=1)
        with pytest.raises(ValueError, match="num_layers"):
            call(model, Plan(4, (3,)), int8=True, free_weights=True)
        with pytest.raises(ValueError, match="free_weights: expected False with cuda_graphs"):
            call(model, PLAN, int8=True, free_weights=True, cuda_graphs=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(pop_ext.NoPlanWarning):
            pop_ext.enable(model, int8=True, free_weights=True)
    handle = model.model.layers[0].mlp.down_proj.register_forward_hook(lambda *_: None)
    with pytest.raises(UnsupportedModelError, match=r"free_weights: .* got hooks on model.layers.0.mlp.down_proj"):
        pop_ext.load(model, PLAN, int8=True, free_weights=True)
    handle.remove()
    experts = shared("mixtral")
    with pytest.raises(UnsupportedModelError, match="int8: expected a model without experts"):
        pop_ext.load(experts, plan_of(experts), int8=True, free_weights=True)
    assert not integers_of(model)
    assert not integers_of(experts)
