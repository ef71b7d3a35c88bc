"""Test that a family that is described wrongly is refused, and how a family is registered."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pop_ext
import pytest
import torch
from models import hyperclovax, llama, shared, tokens
from other_families import other
from pop_ext import Plan, UnsupportedModelError
from pop_ext._core import ModelSpec
from pop_ext.hf import families, native_trial, weight_map
from pop_ext.hf.family import LLAMA_LAYER
from pop_ext.portable import trial
from torch import nn
from transformers import VaultGemmaConfig, VaultGemmaForCausalLM
from transformers.models.gpt_oss import modeling_gpt_oss

PLAN = Plan(6, (4, 5))


@pytest.fixture(autouse=True)
def fresh(no_trials_yet) -> Iterator[None]:
    """Give back the table of families."""
    before = dict(families.FAMILIES)
    yield
    families.FAMILIES.clear()
    families.FAMILIES.update(before)
    families.find_family.cache_clear()


def described_as(model: nn.Module, **differences: Any) -> nn.Module:
    """Describe the family of a model otherwise than it is."""
    name = model.config.model_type
    families.FAMILIES[name] = families.replace(families.FAMILIES[name], **differences)
    families.find_family.cache_clear()
    return model


def _never(config: Any, layer: int) -> bool:
    return False


def _experts_of(name: str, dtype: torch.dtype, **differences: Any) -> nn.Module:
    return described_as(
        other(name, dtype=dtype), experts=families.replace(families.FAMILIES[name].experts, **differences)
    )


def weighs_by_biased_scores(dtype: torch.dtype) -> nn.Module:
    """Return a GLM-4.5 whose own router has the bias in the weights of experts, too."""
    model = other("glm4_moe", dtype=dtype)

    def forward(self: Any, hidden_states: Any) -> Any:
        logits, _, chosen = type(self).__base__.forward(self, hidden_states)
        weights = (logits.sigmoid() + self.e_score_correction_bias).gather(1, chosen)
        return logits, weights / weights.sum(-1, keepdim=True) * self.routed_scaling_factor, chosen

    for layer in model.model.layers[1:]:
        router = type(layer.mlp.gate)
        layer.mlp.gate.__class__ = type(router.__name__, (router,), {"forward": forward})
    return model


WRONG = {
    "RoPE in every layer": lambda dtype: described_as(other("smollm3", dtype=dtype), rotates=lambda *_: True),
    "RoPE in no layer": lambda dtype: described_as(llama(dtype=dtype), rotates=_never),
    "an offset of norms": lambda dtype: described_as(llama(dtype=dtype), norm_weight_offset=1.0),
    "gate and up exchanged": lambda dtype: described_as(
        llama(dtype=dtype),
        layer={**LLAMA_LAYER, "gate_proj": "mlp.up_proj.weight", "up_proj": "mlp.gate_proj.weight"},
    ),
    "gate before up in experts": lambda dtype: with_experts(dtype, interleaved=False),
    "another activation of experts": lambda dtype: with_experts(dtype, activation=None),
    "no soft cap of logits": lambda dtype: described_as(shared("gemma2", dtype=dtype), caps_logits=False),
    "multipliers": lambda dtype: described_as(other("granite", dtype=dtype), multipliers=False),
    "pairs of RoPE": lambda dtype: described_as(other("glm4", dtype=dtype), rope_interleaved=False),
    "pairs of RoPE, the other way round": lambda dtype: described_as(llama(dtype=dtype), rope_interleaved=True),
    "norms before RoPE": lambda dtype: described_as(other("hunyuan_v1_dense", dtype=dtype), norms_after_rope=False),
    "no factor of routed experts": lambda dtype: _experts_of("glm4_moe", dtype, scale=None),
    "no sum of one": lambda dtype: _experts_of("glm4_moe", dtype, norm_topk=lambda _: False),
    "a bias in the weights of experts": weighs_by_biased_scores,
    "normalised probabilities": lambda dtype: _experts_of("qwen2_moe", dtype, norm_topk=lambda _: True),
    "sigmoids in the place of probabilities": lambda dtype: _experts_of("qwen2_moe", dtype, scores="sigmoid"),
}


def with_experts(dtype: torch.dtype, **differences: Any) -> nn.Module:
    experts = families.replace(families.FAMILIES["gpt_oss"].experts, **differences)
    return described_as(other("gpt_oss", dtype=dtype), experts=experts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mistake", WRONG)
def test_a_family_that_is_described_wrongly_is_refused(mistake, dtype):
    model = WRONG[mistake](dtype)
    with pytest.raises(UnsupportedModelError, match="in a trial of 7 tokens the .* differ"):
        pop_ext.load(model, PLAN)
    with pop_ext.enabled(model, PLAN), torch.no_grad():
        model(tokens(model, 1, 20), use_cache=True, logits_to_keep=1)
        assert pop_ext.last_call(model).backend == "portable"


def leave_out_the_sinks(monkeypatch: Any) -> None:
    make_spec = weight_map.make_spec

    def without_sinks(family: Any, model: Any, refs: dict[str, Any]) -> ModelSpec:
        fields = json.loads(make_spec(family, model, refs).to_json())
        for slot in [slot for slot in refs if slot.endswith(".sinks")]:
            del refs[slot]
        return ModelSpec.from_json(json.dumps({**fields, "attention_sinks": False}))

    monkeypatch.setattr(weight_map, "make_spec", without_sinks)


def gate_without_one(monkeypatch: Any) -> None:
    """Let the stock experts multiply by up instead of up + 1."""
    apply = modeling_gpt_oss.GptOssExperts._apply_gate

    def without_one(self: Any, gate_up: torch.Tensor) -> torch.Tensor:
        gate_up = gate_up.clone()
        gate_up[..., 1::2] -= 1
        return apply(self, gate_up)

    monkeypatch.setattr(modeling_gpt_oss.GptOssExperts, "_apply_gate", without_one)


@pytest.mark.parametrize("plant", [leave_out_the_sinks, gate_without_one])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_gpt_oss_that_computes_something_else_is_refused(dtype, plant, monkeypatch):
    model = other("gpt_oss", dtype=dtype)
    plant(monkeypatch)
    with pytest.raises(UnsupportedModelError, match="in a trial of 7 tokens the .* differ"):
        pop_ext.load(model, PLAN)


def test_a_kind_of_model_is_tried_once(monkeypatch):
    tried = []
    find_difference = native_trial.find_difference
    monkeypatch.setattr(native_trial, "find_difference", lambda *args: tried.append(find_difference(*args)))
    for seed in (0, 1):
        pop_ext.load(llama(seed=seed), PLAN)
    pop_ext.load(llama(dtype=torch.bfloat16), PLAN)
    assert len(tried) == 2


def test_a_model_with_hooks_or_in_training_is_tried_without_them():
    """Its head may have hooks, too: none sees the tokens of the trial."""
    model, seen = llama(attention_dropout=0.5), []
    for module in (model.model.layers[0], model.model.layers[0].mlp, model.lm_head, model.model.embed_tokens):
        module.register_forward_hook(lambda *_: seen.append(1))
    model.train()
    pop_ext.load(model, PLAN)
    assert len(native_trial._passed) == 1
    assert not seen
    assert model.model.layers[0].training


@pytest.mark.parametrize(
    "prepare", [nn.Module.train, lambda model: model.lm_head.register_forward_hook(lambda *_: None)]
)
def test_a_wrong_family_is_refused_in_training_and_with_hooks(prepare):
    model = described_as(llama(), norm_weight_offset=1.0)
    prepare(model)
    with pytest.raises(UnsupportedModelError, match="in a trial of 7 tokens"):
        pop_ext.load(model, PLAN)


def test_a_refused_kind_is_refused_again_without_a_trial(monkeypatch):
    model = described_as(llama(), norm_weight_offset=1.0)
    with pytest.raises(UnsupportedModelError, match='in a trial of .*backend="portable" works'):
        pop_ext.load(model, PLAN)
    monkeypatch.setattr(native_trial, "run_second_form", None)
    with pytest.raises(UnsupportedModelError, match="in a trial of"):
        pop_ext.load(model, PLAN)
    pop_ext.enable(model, PLAN)


def test_a_model_that_attends_in_both_directions_is_not_loaded():
    model = llama()
    model.config.is_causal = False
    with pytest.raises(UnsupportedModelError, match="config.is_causal: expected a causal model, got False"):
        pop_ext.load(model, PLAN)


def test_one_row_that_differs_is_enough(monkeypatch):
    run = native_trial.run_second_form

    def planted(*args):
        expected = run(*args)
        expected.logits[:, -1] = torch.randn_like(expected.logits[:, -1])
        return expected

    monkeypatch.setattr(native_trial, "run_second_form", planted)
    with pytest.raises(UnsupportedModelError, match="the logits differ"):
        pop_ext.load(llama(), PLAN)


def test_a_trial_omits_layers_before_a_retained_one():
    native = pop_ext.load(llama(), PLAN)
    count = native_trial._layers_to_try(native, native_trial.find_decoder(native.description.model()))
    assert count == 4
    assert tuple(trial.trial_plan(count).omit) == (1, 3)
    assert [tuple(trial.trial_plan(n).omit) for n in (1, 2, 3)] == [(), (0,), (1,)]


def test_a_precision_of_products_that_torch_reports_by_library_is_understood():
    before = torch.backends.mkldnn.matmul.fp32_precision
    try:
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        pop_ext.load(llama(), PLAN)
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before


CANNOT_BE_READ = {
    "like qwen2": {"like": "qwen2"},
    "another activation": {"activation": "hidden_activation"},
    "caps": {"caps_scores": True},
    "kinds of RoPE": {"rope_kinds": ("full_attention",)},
    "a path": {"layer": {**LLAMA_LAYER, "q_proj": "attention.q.weight"}},
    "norms left out": {"layer": {name: path for name, path in LLAMA_LAYER.items() if name != "post_norm"}},
}


@pytest.mark.parametrize("mistake", CANNOT_BE_READ)
def test_a_description_that_cannot_be_read_is_refused_and_falls_back(mistake):
    pop_ext.register_family("hyperclovax", "HyperCLOVAX", **CANNOT_BE_READ[mistake])
    model = hyperclovax()
    with pytest.raises(UnsupportedModelError):
        pop_ext.load(model, PLAN)
    with pop_ext.enabled(model, PLAN), torch.no_grad():
        model(tokens(model, 1, 20), use_cache=True, logits_to_keep=1)
        assert pop_ext.last_call(model).backend == "portable"


@pytest.mark.parametrize("backend", ["native", "portable"])
def test_what_a_handler_of_signals_raises_in_a_trial_passes(backend, monkeypatch):
    class Alarm(Exception):
        pass

    def interrupted(*_: object) -> None:
        raise Alarm

    monkeypatch.setattr(trial, "_passed", set())
    for module in (trial, native_trial):
        monkeypatch.setattr(module, "run_second_form", interrupted)
    model = llama()
    with pytest.raises(Alarm):
        pop_ext.enable(model, PLAN, backend=backend)
    monkeypatch.undo()
    pop_ext.enable(model, PLAN, backend=backend)


def test_a_form_that_failed_once_is_tried_again(monkeypatch):
    def failing(*_: object) -> None:
        raise RuntimeError("for once")

    monkeypatch.setattr(native_trial, "run_second_form", failing)
    with pytest.raises(UnsupportedModelError, match="a trial of 7 tokens to run, got for once"):
        pop_ext.load(llama(), PLAN)
    monkeypatch.undo()
    pop_ext.load(llama(), PLAN)


def test_a_parameter_that_nothing_reads_is_refused():
    model = llama()
    model.model.layers[2].mlp.scale = nn.Parameter(torch.ones(1))
    with pytest.raises(UnsupportedModelError, match="weight model.layers.2.mlp.scale: expected none of this name"):
        pop_ext.load(model, PLAN)


def test_the_trial_changes_nothing_and_takes_the_first_layers_of_each_kind():
    model = other("smollm3", layers=12, no_rope_layers=[1, 1, 1, 0] * 3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = model.config.to_dict()
    native = pop_ext.load(model, Plan(12, (11,)))
    assert native_trial._layers_to_try(native, native_trial.find_decoder(model)) == 4
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.config.to_dict() == config
    assert len(model.model.layers) == 12


@pytest.mark.parametrize("backend", ["native", "portable"])
def test_weights_that_are_not_finite_are_tried_once_and_do_not_fail_the_trial(backend, monkeypatch):
    monkeypatch.setattr(trial, "_passed", set())
    tried = []
    run_second_form = trial.run_second_form

    def counted(*args):
        tried.append(1)
        return run_second_form(*args)

    for module in (trial, native_trial):
        monkeypatch.setattr(module, "run_second_form", counted)
    model = llama()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
        pop_ext.enable(model, PLAN, backend=backend)
        for _ in range(2):
            model(tokens(model, 1, 20), use_cache=True, logits_to_keep=1)
    assert pop_ext.last_call(model).backend == backend
    assert len(tried) == 1
    assert not native_trial._passed | trial._passed


def test_a_registered_family_runs_natively():
    pop_ext.register_family(
        "vaultgemma",
        "VaultGemma",
        like="gemma2",
        embedding="VaultGemmaTextScaledWordEmbedding",
        layer={**LLAMA_LAYER, "post_norm": "pre_feedforward_layernorm.weight"},
    )
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6, "vocab_size": 263, "head_dim": 16}
    config = VaultGemmaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    model = VaultGemmaForCausalLM._from_config(config, attn_implementation="eager").eval()
    ids = tokens(model, 1, 20)
    logits, _ = pop_ext.reference.prefill(model, ids, PLAN)
    found = pop_ext.load(model, PLAN).prefill(ids).logits
    torch.testing.assert_close(found, logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        ({"model_type": "llama", "prefix": "Llama"}, ValueError, "model_type: expected an architecture that pop_ext"),
        ({"model_type": "llava", "prefix": "Llava"}, ValueError, "model_type: expected an architecture that pop_ext"),
        ({"model_type": "new", "prefix": "New", "like": "old"}, ValueError, "like: expected one of .*llama.*, got old"),
        (
            {"model_type": "new", "prefix": "New", "windows": 3},
            TypeError,
            "differences: .*window.*got windows",
        ),
        ({"model_type": "new", "prefix": "New", "vision": None}, TypeError, "differences: .* got vision"),
        ({"model_type": "new", "prefix": "New", "rotates": "x"}, TypeError, "rotates: expected a value like"),
        ({"model_type": "new", "prefix": "New", "layer": 3}, TypeError, "layer: expected a value like"),
        ({"model_type": "", "prefix": "New"}, TypeError, "model_type: expected a text, got ''"),
        ({"model_type": "new", "prefix": None}, TypeError, "prefix: expected a text, got None"),
    ],
)
def test_bad_arguments_of_register_family(call, error, text):
    before = dict(families.FAMILIES)
    with pytest.raises(error, match=text):
        pop_ext.register_family(**call)
    assert before == families.FAMILIES
