"""What becomes of an enabled model: enabled again, copied, saved, compiled, changed, deleted, used by two threads."""

from __future__ import annotations

import copy
import gc
import io
import json
import pickle
import threading
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import models
import pop_ext
import pytest
import torch
from models import gemma3, llama, mistral, qwen2, qwen3, tokens
from pop_ext import Plan, UnsupportedModelError, reference
from pop_ext.forward import PrefillForward
from pop_ext.native import _Loaded
from tolerance import assert_close_fp32, compare_caches
from torch import Tensor, nn
from transformers import CompileConfig, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, LlamaModel

T = 19
LAYERS = 6
PLAN = Plan(LAYERS, (2, 4, 5))
OTHER = Plan(LAYERS, (1, 3))


@torch.no_grad()
def prefill(model: nn.Module, ids: Tensor) -> Any:
    """A call that must run natively."""
    output = model(ids, logits_to_keep=1, use_cache=True)
    assert pop_ext.last_call(model).native
    return output


def assert_equals_oracle(model: nn.Module, ids: Tensor, plan: Plan = PLAN) -> None:
    output = prefill(model, ids)
    logits, cache = reference.prefill(model, ids, plan)
    assert_close_fp32(output.logits, logits, "logits")
    compare_caches(output.past_key_values, cache)


def generate(model: nn.Module, ids: Tensor, new: int = 12) -> Tensor:
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, pad_token_id=0)


def handle_of(model: nn.Module) -> int:
    return model.forward.native.handle


def is_alive(handle: int) -> bool:
    try:
        torch.ops.pop.info(handle)
    except RuntimeError:
        return False
    return True


# enable, disable, enabled


def test_enable_returns_the_same_object():
    model = llama()
    assert pop_ext.enable(model, PLAN) is model
    assert pop_ext.disable(model) is model


def test_enabling_again_replaces_plan_strict_and_backend():
    model = llama()
    ids = tokens(model, 1, T)
    pop_ext.enable(model, PLAN)
    assert_equals_oracle(model, ids, PLAN)
    pop_ext.enable(model, OTHER, strict=True)
    assert_equals_oracle(model, ids, OTHER)
    with pytest.raises(pop_ext.PrefillDeclined), torch.no_grad():
        model(ids)
    pop_ext.enable(model, PLAN, backend="reference")
    with torch.no_grad():
        model(ids, logits_to_keep=1)
    assert pop_ext.last_call(model).backend == "reference"


def test_disable_restores_the_model_exactly():
    model = llama()
    ids = tokens(model, 1, T)
    before, expected = dict(model.__dict__), generate(model, ids)
    pop_ext.enable(model, PLAN)
    pop_ext.enable(model, OTHER)
    pop_ext.disable(model)
    assert model.__dict__ == before
    assert model.forward.__func__ is LlamaForCausalLM.forward
    assert torch.equal(generate(model, ids), expected)
    with pytest.raises(ValueError, match="not"):
        pop_ext.explain(model, ids)


def test_disabling_a_model_that_is_not_enabled_changes_nothing():
    model = llama()
    before = dict(model.__dict__)
    pop_ext.disable(model)
    assert model.__dict__ == before


def test_a_forward_that_was_replaced_before_enable_runs_and_comes_back():
    model = llama()
    ids = tokens(model, 1, T)
    original = model.forward
    seen = []

    def mine(*args: Any, **kwargs: Any) -> Any:
        seen.append(1)
        return original(*args, **kwargs)

    mine.__signature__ = __import__("inspect").signature(original)
    model.forward = mine
    pop_ext.enable(model, PLAN)
    with pytest.warns(match="replaced forward"), torch.no_grad():
        model(ids, logits_to_keep=1)
    assert seen
    pop_ext.disable(model)
    assert model.__dict__["forward"] is mine


def test_a_forward_wrapped_after_enable_is_named():
    import functools

    model = pop_ext.enable(llama(), PLAN)
    model.forward = functools.update_wrapper(functools.partial(model.forward), model.forward)
    for act in (pop_ext.enable, pop_ext.disable, pop_ext.last_call):
        with pytest.raises(RuntimeError, match="replaced after pop_ext.enable"):
            act(model)


def test_enabled_restores_a_stock_model():
    model = llama()
    before = dict(model.__dict__)
    with pop_ext.enabled(model, PLAN) as same:
        assert same is model
        assert_equals_oracle(model, tokens(model, 1, T))
    assert model.__dict__ == before


def test_enabled_restores_the_model_after_an_exception():
    model = llama()
    before = dict(model.__dict__)
    with pytest.raises(KeyError), pop_ext.enabled(model, PLAN):
        raise KeyError
    assert model.__dict__ == before


def test_enabled_blocks_nest():
    model = llama()
    ids = tokens(model, 1, T)
    pop_ext.enable(model, PLAN)
    outermost = model.forward
    with pop_ext.enabled(model, OTHER):
        middle = model.forward
        with pop_ext.enabled(model, PLAN.replace(boundary=3), strict=True):
            prefill(model, ids)
            assert pop_ext.last_call(model).boundary == (3,)
            pop_ext.disable(model)
        assert model.forward is middle
        assert_equals_oracle(model, ids, OTHER)
    assert model.forward is outermost
    assert_equals_oracle(model, ids, PLAN)


def test_enable_without_a_plan_omits_the_deepest_third():
    model = pop_ext.enable(llama())
    prefill(model, tokens(model, 1, T))
    assert pop_ext.last_call(model).plan == Plan(LAYERS, (4, 5))


# Copies and files


def test_a_deepcopy_is_an_independent_enabled_model():
    model = pop_ext.enable(llama(), PLAN, strict=True)
    ids = tokens(model, 1, T)
    expected = prefill(model, ids).logits
    twin = copy.deepcopy(model)
    assert twin.forward.model is twin
    assert twin.forward.strict
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.1)
    assert_equals_oracle(twin, ids)
    assert torch.equal(prefill(model, ids).logits, expected)
    assert handle_of(twin) != handle_of(model)
    pop_ext.disable(model)
    assert_equals_oracle(twin, ids)


def test_a_deepcopy_outlives_the_original():
    model = pop_ext.enable(llama(), PLAN)
    twin = copy.deepcopy(model)
    gone = weakref.ref(model)
    del model
    assert gone() is None
    assert_equals_oracle(twin, tokens(twin, 1, T))


def test_a_shallow_copy_prefills_as_the_original_with_whose_weights_it_shares():
    model = pop_ext.enable(llama(), PLAN, strict=True)
    ids = tokens(model, 1, T)
    twin = copy.copy(model)
    multiply_in_place(model)
    assert_equals_oracle(twin, ids)
    assert_equals_oracle(model, ids)


def test_disabling_or_enabling_a_shallow_copy_leaves_the_original_alone():
    model = pop_ext.enable(llama(), PLAN, strict=True)
    ids, before = tokens(model, 1, T), model.forward
    twin = copy.copy(model)
    pop_ext.enable(twin, OTHER)
    assert_equals_oracle(twin, ids, OTHER)
    assert_equals_oracle(model, ids, PLAN)
    pop_ext.disable(twin)
    with pytest.raises(ValueError, match="expected an enabled model"):
        pop_ext.last_call(twin)
    assert model.forward is before
    assert_equals_oracle(model, ids, PLAN)


def test_disabling_the_original_leaves_a_shallow_copy_enabled():
    model = pop_ext.enable(llama(), PLAN, strict=True)
    twin = copy.copy(model)
    pop_ext.disable(model)
    assert_equals_oracle(twin, tokens(model, 1, T))


THROUGH = [lambda model: model, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]


@pytest.mark.parametrize("through", THROUGH, ids=["itself", "deepcopy", "pickle"])
def test_a_shallow_copy_outlives_the_original(through):
    model = through(pop_ext.enable(llama(), PLAN, strict=True))
    gone = weakref.ref(model)
    twin = copy.copy(model)
    del model
    assert gone() is None
    ids = tokens(twin, 1, T)
    assert_equals_oracle(twin, ids)
    assert generate(twin, ids).shape == (1, T + 12)
    again = through(twin)
    del twin
    multiply_in_place(again)
    assert_equals_oracle(again, ids)


@pytest.mark.parametrize("how", ["pickle", "torch"])
def test_a_pickled_model_comes_back_enabled(how):
    model = pop_ext.enable(llama(), PLAN, strict=True)
    ids = tokens(model, 1, T)
    expected = prefill(model, ids).logits
    if how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    assert isinstance(twin.forward, PrefillForward)
    assert (twin.forward.plan, twin.forward.strict, twin.forward.backend) == (PLAN, True, "native")
    assert torch.equal(prefill(twin, ids).logits, expected)
    del model
    assert_equals_oracle(twin, ids)


def test_saved_files_carry_no_trace_and_load_as_a_stock_model(tmp_path: Path):
    model = llama()
    model.save_pretrained(tmp_path / "stock")
    pop_ext.enable(model, PLAN)
    prefill(model, tokens(model, 1, T))
    model.save_pretrained(tmp_path / "enabled")
    names = sorted(path.name for path in (tmp_path / "stock").iterdir())
    assert sorted(path.name for path in (tmp_path / "enabled").iterdir()) == names
    for name in names:
        assert (tmp_path / "enabled" / name).read_bytes() == (tmp_path / "stock" / name).read_bytes()
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "enabled")
    assert "forward" not in loaded.__dict__


def test_the_state_dict_is_unchanged():
    model = llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = list(model.named_modules())
    pop_ext.enable(model, PLAN)
    prefill(model, tokens(model, 1, T))
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert list(model.named_modules()) == modules


# torch.compile


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def tiny() -> LlamaForCausalLM:
    return llama(layers=2)


TINY_PLAN = Plan(2, (0,))


def prefill_and_decode(model: nn.Module, ids: Tensor) -> list[Tensor]:
    """Logits of a prefill and of two decode steps."""
    with torch.no_grad():
        output = model(ids, logits_to_keep=1, use_cache=True)
        steps = [output.logits]
        for token in (3, 5):
            ids = torch.full((len(ids), 1), token)
            output = model(ids, logits_to_keep=1, past_key_values=output.past_key_values, use_cache=True)
            steps.append(output.logits)
    return steps


def assert_compiled_prefills_natively(compiled: nn.Module, model: nn.Module) -> None:
    ids = tokens(model, 2, T)
    expected = prefill_and_decode(pop_ext.enable(copy.deepcopy(tiny()), TINY_PLAN), ids)
    for actual, wanted in zip(prefill_and_decode(compiled, ids), expected, strict=True):
        assert_close_fp32(actual, wanted, "logits")
    assert pop_ext.last_call(compiled).native
    assert pop_ext.last_call(compiled).tokens == (T, T)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_model_compiled_after_enable_prefills_natively(backend):
    model = pop_ext.enable(tiny(), TINY_PLAN, strict=True)
    compiled = torch.compile(model, backend=backend)
    assert_compiled_prefills_natively(compiled, model)


@pytest.mark.usefixtures("fresh_compiler")
def test_a_model_compiled_and_run_before_enable_prefills_natively():
    model = tiny()
    compiled = torch.compile(model, backend="eager")
    ids = tokens(model, 2, T)
    stock = prefill_and_decode(compiled, ids)
    assert pop_ext.enable(compiled, TINY_PLAN, strict=True) is compiled
    assert_compiled_prefills_natively(compiled, model)
    pop_ext.disable(compiled)
    for actual, wanted in zip(prefill_and_decode(compiled, ids), stock, strict=True):
        assert_close_fp32(actual, wanted, "logits")


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("first", ["compile", "enable"])
def test_model_compile_keeps_the_native_prefill(first):
    model = tiny()
    if first == "compile":
        model.compile(backend="eager")
        prefill_and_decode(model, tokens(model, 2, T))
    pop_ext.enable(model, TINY_PLAN, strict=True)
    if first == "enable":
        model.compile(backend="eager")
    assert_compiled_prefills_natively(model, model)


@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_forward_is_kept_for_decode():
    model = tiny()
    compiled: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(1)
        return graph.forward

    model.forward = torch.compile(model.forward, backend=backend)
    pop_ext.enable(model, TINY_PLAN, strict=True)
    assert_compiled_prefills_natively(model, model)
    assert compiled


@pytest.mark.usefixtures("fresh_compiler")
def test_a_decode_step_compiles_to_one_graph():
    model = pop_ext.enable(tiny(), TINY_PLAN, strict=True)
    ids = tokens(model, 1, T)
    cache = prefill(model, ids).past_key_values
    step = {"past_key_values": cache, "logits_to_keep": 1, "use_cache": True}
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        expected = model(ids[:, :1], **copy.deepcopy(step)).logits
        assert_close_fp32(compiled(ids[:, :1], **step).logits, expected, "logits")


@pytest.mark.usefixtures("fresh_compiler")
def test_generate_of_a_compiled_model_prefills_natively():
    model = pop_ext.enable(tiny(), TINY_PLAN, strict=True)
    ids = tokens(model, 1, T)
    expected = generate(model, ids, 4)
    model.compile(backend="eager")
    assert torch.equal(generate(model, ids, 4), expected)
    assert torch.equal(generate(torch.compile(model, backend="eager"), ids, 4), expected)


@pytest.mark.usefixtures("fresh_compiler")
def test_generate_that_compiles_decode_for_a_static_cache_prefills_natively():
    model = pop_ext.enable(tiny(), TINY_PLAN, strict=True)
    ids = tokens(model, 1, T)
    expected = generate(model, ids, 4)
    config = CompileConfig(backend="eager", mode=None)
    config._compile_all_devices = True  # else only on accelerators
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=4,
        do_sample=False,
        pad_token_id=0,
        cache_implementation="static",
        compile_config=config,
    )
    assert torch.equal(output, expected)
    assert pop_ext.last_call(model).tokens == (T,)
    assert hasattr(model, "_compiled_call")


def test_inference_mode_gives_the_same_bits():
    model = pop_ext.enable(llama(), PLAN, strict=True)
    ids = tokens(model, 2, T)
    expected = prefill(model, ids).logits
    with torch.inference_mode():
        output = model(ids, logits_to_keep=1)
        assert torch.equal(output.logits, expected)
        more = model(ids, past_key_values=output.past_key_values, logits_to_keep=1)
    assert pop_ext.last_call(model).native
    assert more.past_key_values.get_seq_length() == 2 * T


# Weights that change


def multiply_in_place(model: nn.Module) -> None:
    with torch.no_grad():
        model.model.layers[4].self_attn.k_proj.weight.mul_(1.5)


def change_data(model: nn.Module) -> None:
    model.model.layers[4].self_attn.k_proj.weight.data.mul_(1.5)
    model.model.layers[2].input_layernorm.weight.data.mul_(0.5)


def change_a_retained_layer(model: nn.Module) -> None:
    model.model.layers[1].mlp.down_proj.weight.data.mul_(1.5)


def reassign_a_parameter(model: nn.Module) -> None:
    projection = model.model.layers[5].self_attn.v_proj
    projection.weight = nn.Parameter(projection.weight.detach() * 1.5)


def replace_a_module(model: nn.Module) -> None:
    old = model.model.layers[3].mlp.up_proj
    new = nn.Linear(old.in_features, old.out_features, bias=False)
    model.model.layers[3].mlp.up_proj = new


def replace_a_layer(model: nn.Module) -> None:
    model.model.layers[3] = copy.deepcopy(model.model.layers[1])
    model.model.layers[3].self_attn.layer_idx = 3


def load_another_state(model: nn.Module) -> None:
    model.load_state_dict(llama(seed=1).state_dict())


def assign_another_state(model: nn.Module) -> None:
    model.load_state_dict(llama(seed=1).state_dict(), assign=True)


def shrink_the_embeddings(model: nn.Module) -> None:
    model.resize_token_embeddings(200)


def grow_the_embeddings(model: nn.Module) -> None:
    model.resize_token_embeddings(300, mean_resizing=False)


CHANGES = [
    multiply_in_place,
    change_data,
    change_a_retained_layer,
    reassign_a_parameter,
    replace_a_module,
    replace_a_layer,
    load_another_state,
    assign_another_state,
    shrink_the_embeddings,
    grow_the_embeddings,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changed_weights_are_taken_up(change):
    model = pop_ext.enable(llama(), PLAN, strict=True)
    ids = tokens(model, 1, T) % 200
    before = prefill(model, ids).logits
    change(model)
    assert_equals_oracle(model, ids)
    after = prefill(model, ids).logits
    assert after.shape != before.shape or not torch.allclose(after, before, atol=1e-3)


def test_the_weights_are_looked_at_once_a_call(monkeypatch):
    model = pop_ext.enable(llama(), PLAN, strict=True)
    ids, looks = tokens(model, 1, T), []
    look = _Loaded.stale_weight
    monkeypatch.setattr(_Loaded, "stale_weight", lambda loaded: looks.append(1) or look(loaded))
    prefill(model, ids)
    assert len(looks) == 1
    pop_ext.score(model, ids, [[1]])
    assert len(looks) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_moved_to_another_dtype_runs_in_it(dtype):
    model = pop_ext.enable(llama(), PLAN, strict=True)
    ids = tokens(model, 1, T)
    prefill(model, ids)
    model.to(dtype)
    output = prefill(model, ids)
    assert output.logits.dtype == output.past_key_values.layers[0].keys.dtype == dtype
    fresh = pop_ext.load(copy.deepcopy(pop_ext.disable(model)), PLAN).prefill(ids)
    assert torch.equal(output.logits, fresh.logits)


class LowRank(nn.Linear):
    """A Linear with a low-rank addition that shares the weight of the one it replaces, as adapters do."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base.in_features, base.out_features, bias=False, device="meta")
        self.weight = base.weight
        self.down = nn.Parameter(torch.randn(2, base.in_features) * 0.1)
        self.up = nn.Parameter(torch.randn(base.out_features, 2) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.down.T @ self.up.T


class Wrapped(nn.Module):
    """A module that wraps the Linear it replaces."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) * 1.1


@pytest.mark.parametrize("adapter", [LowRank, Wrapped])
@torch.no_grad()
def test_adapters_put_on_after_enable_leave_the_prefill_to_the_stock_model(adapter):
    model = llama()
    ids = tokens(model, 1, T)
    pop_ext.enable(model, PLAN)
    prefill(model, ids)
    attention = model.model.layers[1].self_attn
    base, adapted = attention.q_proj, adapter(attention.q_proj)
    attention.q_proj = adapted
    with pytest.warns(match=f"expected a plain Linear, got {adapter.__name__}"):
        actual = model(ids, logits_to_keep=1).logits
    assert pop_ext.last_call(model).rule == "model"
    attention.q_proj = base
    assert_equals_oracle(model, ids)
    attention.q_proj = adapted
    assert torch.equal(actual, pop_ext.disable(model)(ids, logits_to_keep=1).logits)


# Models that have no native form


def quantised() -> nn.Module:
    model = llama()
    model.config.quantization_config = {"quant_method": "gptq"}
    return model


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=50))


def one_layer_on_meta() -> nn.Module:
    model = llama()
    model.model.layers[3].mlp.to("meta")
    return model


def offloaded_by_accelerate() -> nn.Module:
    from accelerate import cpu_offload

    return cpu_offload(llama(), execution_device="cpu")


def of_mixed_dtype() -> nn.Module:
    model = llama()
    model.model.layers[3].mlp.to(torch.bfloat16)
    return model


def in_float64() -> nn.Module:
    return llama().to(torch.float64)


def with_an_adapter() -> nn.Module:
    model = llama()
    model.model.layers[0].mlp.up_proj = LowRank(model.model.layers[0].mlp.up_proj)
    return model


def with_a_layer_less() -> nn.Module:
    model = llama()
    del model.model.layers[5]
    return model


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=50, n_positions=32)).eval()


def without_a_head() -> nn.Module:
    return LlamaModel(LlamaConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=50))


class MyLlama(LlamaForCausalLM):
    """Somebody's own model, which may compute something else."""


def of_a_subclass() -> nn.Module:
    return models.build(MyLlama, LlamaConfig, {})


UNSUPPORTED = {
    quantised: "unquantised weights.*gptq",
    on_meta: "meta device",
    one_layer_on_meta: "layers.3.gate_proj.*meta device",
    offloaded_by_accelerate: "meta device",
    of_mixed_dtype: "layers.3.gate_proj.*torch.bfloat16",
    in_float64: "float32, bfloat16 or float16.*float64",
    with_an_adapter: "plain Linear, got LowRank",
    with_a_layer_less: "6 decoder layers.*got 5",
    gpt2: "expected an architecture of llama, mistral.*got gpt2",
    gemma3: "got gemma3_text",
    without_a_head: "expected a LlamaForCausalLM, got LlamaModel",
    of_a_subclass: "expected a LlamaForCausalLM, got MyLlama",
}


@pytest.mark.parametrize("build", UNSUPPORTED, ids=lambda build: build.__name__)
def test_a_model_without_a_native_form_is_refused_and_stays_as_it_was(build):
    model = build()
    before = dict(model.__dict__)
    with pytest.raises(UnsupportedModelError, match=UNSUPPORTED[build]) as error:
        pop_ext.enable(model)
    assert 'backend="reference"' in str(error.value)
    assert model.__dict__ == before


def test_a_refused_model_stays_enabled_as_it_was():
    model = pop_ext.enable(llama(), PLAN)
    before = model.forward
    with pytest.raises(ValueError, match="num_layers=6"):
        pop_ext.enable(model, Plan(4, (3,)))
    assert model.forward is before
    assert_equals_oracle(model, tokens(model, 1, T))


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"plan": Plan(4, (3,))}, ValueError, "expected num_layers=6 like the model, got 4"),
        ({"plan": (3, 4)}, TypeError, "expected a pop_ext.Plan, got tuple"),
        ({"backend": "cuda"}, ValueError, "expected one of native, reference, got 'cuda'"),
        ({"plan": Plan(4, (3,)), "backend": "reference"}, ValueError, "expected num_layers=6"),
    ],
)
def test_bad_arguments_of_enable_are_named(arguments, error, text):
    model = llama()
    with pytest.raises(error, match=text):
        pop_ext.enable(model, **arguments)
    assert "forward" not in model.__dict__


@pytest.mark.parametrize("what", [None, "meta-llama/Llama-3.1-8B", nn.Linear(2, 2)])
def test_something_that_is_no_hugging_face_model_is_refused(what):
    with pytest.raises(TypeError, match="expected a Hugging Face model"):
        pop_ext.enable(what)


@pytest.mark.parametrize("build", [qwen3, gemma3])
@torch.no_grad()
def test_the_reference_backend_runs_families_beyond_the_native_ones(build):
    model = build()
    ids = tokens(model, 2, T)
    pop_ext.enable(model, PLAN, strict=True, backend="reference")
    output = model(ids, logits_to_keep=1)
    assert pop_ext.last_call(model).backend == "reference"
    logits, cache = reference.prefill(model, ids, PLAN)
    assert_close_fp32(output.logits, logits, "logits")
    compare_caches(output.past_key_values, cache)
    assert generate(model, ids).shape == (2, T + 12)


@pytest.mark.parametrize("build", [gpt2, without_a_head])
def test_the_reference_backend_refuses_what_it_cannot_run(build):
    model = build()
    with pytest.raises(ValueError, match="model: expected"):
        pop_ext.enable(model, backend="reference")
    assert "forward" not in model.__dict__


def test_an_unpruned_reference_backend_generates_as_the_stock_model():
    model = gemma3()
    ids = tokens(model, 1, 40)
    expected = generate(model, ids)
    pop_ext.enable(model, Plan(LAYERS, ()), strict=True, backend="reference")
    assert torch.equal(generate(model, ids), expected)


# The end


def test_disable_frees_the_native_handle():
    model = pop_ext.enable(llama(), PLAN)
    handle = handle_of(model)
    assert json.loads(torch.ops.pop.info(handle))
    pop_ext.disable(model)
    assert not is_alive(handle)


def test_enabling_again_frees_the_native_handle():
    model = pop_ext.enable(llama(), PLAN)
    handle = handle_of(model)
    pop_ext.enable(model, OTHER)
    assert not is_alive(handle)
    assert is_alive(handle_of(model))


def test_taking_up_changed_weights_frees_the_native_handle():
    model = pop_ext.enable(llama(), PLAN)
    handle = handle_of(model)
    multiply_in_place(model)
    prefill(model, tokens(model, 1, T))
    assert not is_alive(handle)


def test_a_deleted_model_is_freed_at_once():
    gc.disable()
    try:
        model = pop_ext.enable(llama(), PLAN)
        output = prefill(model, tokens(model, 1, T))
        handle, gone = handle_of(model), weakref.ref(model)
        weight = weakref.ref(model.model.layers[0].mlp.up_proj.weight)
        del model, output
        assert gone() is None
        assert weight() is None
        assert not is_alive(handle)
    finally:
        gc.enable()


def test_a_forward_outlives_its_model_as_a_bound_method_does():
    model = pop_ext.enable(llama(), PLAN)
    ids = tokens(model, 1, T)
    expected = prefill(model, ids).logits
    forward = model.forward
    del model
    with torch.no_grad():
        assert torch.equal(forward(ids, logits_to_keep=1).logits, expected)


# Several at once


def test_two_enabled_models_do_not_disturb_each_other():
    one, two = pop_ext.enable(llama(), PLAN), pop_ext.enable(qwen2(), OTHER)
    ids = tokens(one, 1, T)
    for _ in range(2):
        assert_equals_oracle(one, ids, PLAN)
        assert_equals_oracle(two, ids, OTHER)
    pop_ext.disable(one)
    assert_equals_oracle(two, ids, OTHER)


def run_in_threads(*work: Any) -> list[Any]:
    """Runs functions side by side, from one start signal; their results, or the first exception."""
    results: list[Any] = [None] * len(work)
    errors: list[BaseException] = []
    barrier = threading.Barrier(len(work))

    def run(index: int) -> None:
        try:
            torch.set_num_threads(1)
            barrier.wait()
            results[index] = work[index]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


@pytest.mark.parametrize("build", [llama, mistral])
def test_two_threads_generate_at_once_on_one_model(build):
    model = pop_ext.enable(build(), PLAN, strict=True)
    prompts = [tokens(model, 1, n, seed=n) for n in (T, 33)]
    expected = [generate(model, prompt) for prompt in prompts]
    actual = run_in_threads(*(lambda prompt=prompt: [generate(model, prompt) for _ in range(4)] for prompt in prompts))
    for outputs, wanted in zip(actual, expected, strict=True):
        assert all(torch.equal(output, wanted) for output in outputs)


def test_two_threads_may_make_the_first_call_of_a_copy():
    model = pop_ext.enable(llama(), PLAN, strict=True)
    ids = tokens(model, 1, T)
    expected = prefill(model, ids).logits
    for _ in range(3):
        twin = copy.deepcopy(model)
        for output in run_in_threads(*[lambda twin=twin: prefill(twin, ids).logits] * 2):
            assert torch.equal(output, expected)


def test_the_oracle_on_one_thread_leaves_the_native_prefill_of_another_alone():
    model = pop_ext.enable(llama(), PLAN, strict=True)
    with model.forward.stock_inside():
        assert run_in_threads(lambda: prefill(model, tokens(model, 1, T)).logits)


def test_an_enabled_model_makes_no_noise():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = pop_ext.enable(llama(), PLAN)
        generate(model, tokens(model, 1, T), 3)
        pop_ext.disable(model)
