"""Test PEFT adapters: merged ones run natively, others portably."""

from __future__ import annotations

from typing import Any

import pop_ext
import pytest
import torch
from enabled_models import LAYERS, PLAN, T, assert_enabled_equals_oracle, generate
from models import llama, mixtral, pad, phi3, qwen3_moe, tokens
from pop_ext import reference
from pop_ext.hf.architectures import UnsupportedModelError
from pop_ext.plans.plan import Plan
from tolerance import assert_close_fp32, compare_caches

peft = pytest.importorskip("peft", reason="PEFT is not installed")

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def lora(*targets: str) -> Any:
    return peft.LoraConfig(r=2, lora_alpha=4, target_modules=list(targets), init_lora_weights=False)


def adapted(*targets: str):
    """Wrap a Llama in PEFT adapters that change its result."""
    return peft.get_peft_model(llama(), lora(*targets)).eval()


@pytest.mark.parametrize("target", TARGETS)
def test_an_adapter_on_any_projection_is_refused_with_its_class(target):
    model = adapted(target)
    for given in (model, model.get_base_model()):
        with pytest.raises(UnsupportedModelError, match=rf"{target}: .*peft.*merge_and_unload.*backend=.portable."):
            pop_ext.enable(given, PLAN, backend="native")
    assert "forward" not in model.get_base_model().__dict__


# Adapters on other weights than the projections of a Llama: the model, and the arguments of LoraConfig.
ELSEWHERE: dict[str, Any] = {
    "experts of Mixtral": (mixtral, {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}),
    "experts of Qwen3-MoE": (qwen3_moe, {"target_parameters": ["mlp.experts.down_proj"]}),
    "a router": (mixtral, {"target_parameters": ["mlp.gate.weight"]}),
    "fused matrices": (phi3, {"target_modules": ["qkv_proj", "gate_up_proj"]}),
    "embeddings": (llama, {"target_modules": ["embed_tokens"]}),
    "a norm beside an adapter": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}),
    "magnitudes beside directions": (llama, {"target_modules": ["v_proj"], "use_dora": True}),
}


@pytest.mark.parametrize("where", ELSEWHERE)
@torch.no_grad()
def test_an_adapter_elsewhere_runs_portably_and_natively_once_merged(where):
    build, targets = ELSEWHERE[where]
    model = peft.get_peft_model(build(), peft.LoraConfig(r=2, init_lora_weights=False, **targets)).eval()
    ids = tokens(model.get_base_model(), 1, T)
    with pytest.raises(UnsupportedModelError, match=r"got peft\..*merge_and_unload.*backend=.portable."):
        pop_ext.enable(model, PLAN, backend="native")
    with pop_ext.enabled(model, PLAN, strict=True, backend="reference"):
        expected = model(input_ids=ids, logits_to_keep=1).logits
        assert pop_ext.last_call(model).backend == "reference"
    with pop_ext.enabled(model, PLAN, strict=True):
        assert_close_fp32(model(input_ids=ids, logits_to_keep=1).logits, expected, "logits")
        assert pop_ext.last_call(model).backend == "portable"
    merged = pop_ext.enable(model.merge_and_unload(), PLAN, strict=True)
    assert_close_fp32(merged(ids, logits_to_keep=1).logits, expected, "logits")
    assert pop_ext.last_call(merged).native
    plain = pop_ext.enable(build(), PLAN)(ids, logits_to_keep=1).logits
    assert (where == "a norm beside an adapter") or (plain - expected).abs().max() > 0.1, "the adapter changes nothing"


@torch.no_grad()
def test_an_adapter_on_the_head_runs_natively():
    model = peft.get_peft_model(llama(), lora("lm_head")).eval()
    ids = tokens(model.get_base_model(), 1, T)
    expected = reference.prefill(model.get_base_model(), ids, PLAN)[0]
    pop_ext.enable(model, PLAN, strict=True)
    assert_close_fp32(model(input_ids=ids, logits_to_keep=1).logits, expected, "logits")
    assert (reference.prefill(llama(), ids, PLAN)[0] - expected).abs().max() > 0.1


# Prompt tuning puts its virtual tokens before the padding, which leaves a hole in the mask, so that case has none.
# Prefix tuning puts them into the cache.
@pytest.mark.parametrize(("kind", "padding"), [("PromptTuningConfig", 0), ("PrefixTuningConfig", 4)])
@torch.no_grad()
def test_virtual_tokens_before_the_prompt_run_natively(kind, padding):
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = peft.get_peft_model(llama(), config).eval()
    ids, mask = pad([tokens(model.get_base_model(), n, seed=n) for n in (T, T - padding)], "left")
    call = {"input_ids": ids, "attention_mask": mask, "logits_to_keep": 1}
    expected = model(**call).logits
    with pop_ext.enabled(model, Plan(LAYERS, (LAYERS - 1,)), strict=True):
        assert_close_fp32(model(**call).logits, expected, "logits")
        assert pop_ext.last_call(model).native
    pruned = []
    for backend in ("native", "reference"):
        with pop_ext.enabled(model, PLAN, strict=True, backend=backend):
            pruned.append(model(**call).logits)
    assert_close_fp32(*pruned, "logits")
    assert (pruned[0] - expected).abs().max() > 0.1


@torch.no_grad()
def test_merged_adapters_run_natively():
    model = adapted(*TARGETS)
    ids = tokens(model, 1, T)
    before = model(input_ids=ids).logits
    merged = model.merge_and_unload()
    assert_close_fp32(merged(ids).logits, before, "merged logits")
    assert (llama()(ids).logits - before).abs().max() > 0.1
    assert_enabled_equals_oracle(pop_ext.enable(merged, PLAN, strict=True), ids)


@pytest.mark.parametrize("backend", ["portable", "reference"])
@pytest.mark.parametrize("enabled_through", ["PEFT's wrapper", "the model itself"])
@torch.no_grad()
def test_the_other_backends_run_adapters(enabled_through, backend):
    model = adapted(*TARGETS)
    base = model.get_base_model()
    ids = tokens(base, 1, T)
    expected, cache = reference.prefill(base, ids, PLAN)
    pop_ext.enable(model if enabled_through == "PEFT's wrapper" else base, PLAN, strict=True, backend=backend)
    output = model(input_ids=ids, logits_to_keep=1)
    assert pop_ext.last_call(model).backend == backend
    assert pop_ext.last_call(model) is pop_ext.last_call(base)
    assert_close_fp32(output.logits, expected, "logits")
    compare_caches(output.past_key_values, cache)
    generated = generate(model, ids, 3)
    pop_ext.disable(model)
    assert "forward" not in base.__dict__
    assert generated.shape == (1, T + 3)


@torch.no_grad()
def test_an_adapter_added_after_enable_is_left_to_the_portable_backend():
    model = pop_ext.enable(llama(), PLAN, strict=True)
    ids = tokens(model, 1, T)
    model(ids, logits_to_keep=1)
    assert pop_ext.last_call(model).native
    peft.inject_adapter_in_model(lora("k_proj"), model)
    with_adapter = model(ids, logits_to_keep=1)
    assert pop_ext.last_call(model).backend == "portable"
    assert_close_fp32(with_adapter.logits, reference.prefill(model, ids, PLAN)[0], "logits")
    pop_ext.enable(model, PLAN, backend="portable")
    with pop_ext.enabled(llama(), PLAN, backend="native") as native:
        peft.inject_adapter_in_model(lora("k_proj"), native)
        with pytest.warns(UserWarning, match="k_proj: expected a plain torch.nn.Linear, got peft"):
            native(ids, logits_to_keep=1)
        assert pop_ext.last_call(native).rule == "model"


def test_a_published_preset_does_not_run_by_itself_on_adapted_weights(monkeypatch):
    from pop_ext.hf.choice import plan_for
    from pop_ext.plans import default
    from pop_ext.plans.presets import Preset

    name = "someone/model"
    preset = Preset((name,), {"model_type": "llama"}, PLAN, True, "a paper")
    monkeypatch.setattr(default, "find_preset", lambda config: preset)
    model = llama()
    model.config._name_or_path = name
    assert plan_for(model).plan == PLAN
    wrapped = peft.get_peft_model(model, lora("q_proj"))
    assert plan_for(wrapped.get_base_model()).plan == Plan(LAYERS, ())
    with pytest.warns(pop_ext.NoPlanWarning):
        pop_ext.enable(wrapped, backend="reference")
    assert plan_for(wrapped.merge_and_unload()).plan == PLAN
