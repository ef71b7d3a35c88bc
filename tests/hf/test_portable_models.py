"""Test which models the portable backend takes, in which state, and the trial that finds it out."""

from __future__ import annotations

import copy
import gc

import accelerate
import pop_ext
import pytest
import torch
from against_oracle import GAPS, plan_of
from models import FAMILIES, hyperclovax, llama, pad, tokens
from pop_ext import Plan
from pop_ext.hf.compat import cache_of, with_cache
from pop_ext.portable import trial
from portable_calls import Broken, T, architecture, fitted, run_portable
from tolerance import assert_close_fp32
from torch import Tensor, nn
from vision_models import VISION


class Counting(nn.Module):
    """A layer that keeps something between calls beside K and V: the sum of all rows that it has seen."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp, self.seen = mlp, 0.0

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.seen + x.sum(1, keepdim=True)
        return self.mlp(x) + 0.1 * self.seen


def test_a_model_with_a_state_outside_its_cache_is_refused_by_a_trial():
    model = llama()
    model.model.layers[3].mlp = Counting(model.model.layers[3].mlp)
    with pytest.raises(ValueError, match=r"depend on context rows by their cache alone, got LlamaForCausalLM \(logits"):
        pop_ext.enable(model, Plan(6, (3,)), backend="portable")
    with pytest.raises(pop_ext.UnsupportedModelError, match="The portable backend: model: expected"):
        pop_ext.enable(model, Plan(6, (3,)))
    assert "forward" not in vars(model)


def test_a_trial_is_made_once_for_a_kind_of_model(monkeypatch):
    calls = []
    original = trial.run_forward
    monkeypatch.setattr(trial, "_passed", set())
    monkeypatch.setattr(trial, "_refused", {})
    monkeypatch.setattr(trial, "run_forward", lambda *args: calls.append(1) or original(*args))
    for model in (llama(), llama(), llama(num_hidden_layers=4)):
        pop_ext.enable(model, Plan(model.config.num_hidden_layers, (2,)), backend="portable")
    assert len(calls) == 2


def test_scores_are_those_of_the_oracle():
    model = llama()
    plan = plan_of(model, GAPS, 2)
    contexts = [tokens(model, n, seed=n) for n in (20, 13, 18, 18)]
    continuations = [tokens(model, n, seed=n + 50) for n in (3, 10, 5, 5)]
    scores = {}
    for backend in ("portable", "reference"):
        with pop_ext.enabled(model, plan, backend=backend):
            scores[backend] = pop_ext.score(model, contexts, continuations)
    for ours, theirs in zip(scores["portable"], scores["reference"], strict=True):
        assert ours.log_likelihood == pytest.approx(theirs.log_likelihood, abs=1e-4)
        assert ours.is_greedy == theirs.is_greedy


@torch.no_grad()
def test_a_trial_leaves_the_model_as_it_was(monkeypatch):
    monkeypatch.setattr(trial, "_passed", set())
    monkeypatch.setattr(trial, "_refused", {})
    model = VISION["qwen3_vl"]()
    model.model.rope_deltas = torch.tensor([[7]])
    before = [dict(vars(module)) for module in model.modules()]
    trial.try_portable(model, pop_ext.portable.find_decoder(model))
    assert trial._passed
    assert [dict(vars(module)) for module in model.modules()] == before


@pytest.mark.parametrize("inner", ["layers", "attentions", "the decoder", "the final norm"])
def test_compiled_inner_modules_are_pruned_all_the_same(inner):
    model = llama()
    plan, ids = fitted("llama", 2), tokens(model, 2, T)
    expected = run_portable(model, plan, ids).logits
    modules = {
        "layers": list(model.model.layers),
        "attentions": [layer.self_attn for layer in model.model.layers],
        "the decoder": [model.model],
        "the final norm": [model.model.norm],
    }
    for module in modules[inner]:
        module.compile(backend="eager")
    assert_close_fp32(run_portable(model, plan, ids).logits, expected, "logits")


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@torch.no_grad()
def test_a_fit_runs_on_offloaded_weights_and_is_compared_with_them(family, monkeypatch):
    model, plan = FAMILIES[family](), fitted(family, 2)
    ids = tokens(model, 2, T)
    expected = run_portable(model, plan, ids).logits
    offloaded = accelerate.cpu_offload(FAMILIES[family](), execution_device="cpu")
    monkeypatch.setattr(trial, "_passed", set())  # the trial itself runs on offloaded weights
    with pop_ext.enabled(offloaded, plan, strict=True):
        assert_close_fp32(offloaded(ids, logits_to_keep=1).logits, expected, "logits")
        assert pop_ext.last_call(offloaded).backend == "portable"
    other = FAMILIES[family]()
    other.model.layers[GAPS[0]].self_attn.k_proj.weight.mul_(2)
    with pytest.raises(ValueError, match=f"layer {GAPS[0]}"):
        pop_ext.enable(accelerate.cpu_offload(other, execution_device="cpu"), plan, backend="portable")


@torch.no_grad()
def test_rows_that_a_decoder_cuts_by_itself_keep_their_depths():
    # Gemma 4 takes the last rows before the layers that share K and V.
    model = architecture("gemma4_text", "Gemma4ForCausalLM")
    ids, mask = pad([tokens(model, n, seed=n) % 250 + 3 for n in (20, 6)], "left")
    plan = Plan(6, (3, 4, 5), 1, min_tokens=8)
    with pop_ext.enabled(model, plan, strict=True):
        both = model(ids, attention_mask=mask, logits_to_keep=1, use_cache=True).logits
        assert pop_ext.last_call(model).boundary == (1, 6)
    stock = model(ids[1:, 14:], logits_to_keep=1, use_cache=True).logits
    assert_close_fp32(both[1:], stock, "logits of the short sequence")


@pytest.mark.parametrize("name", ["falcon_h1:FalconH1ForCausalLM", "qwen3_5_text:Qwen3_5ForCausalLM"])
@torch.no_grad()
def test_a_failed_prefill_restores_recurrent_states(name):
    model = architecture(*name.split(":"))
    plan = Plan(6, (3, 4))
    first, second = (tokens(model, 1, 9, seed=seed) % 250 + 3 for seed in (1, 2))
    with pop_ext.enabled(model, plan, strict=True):
        cache = cache_of(model(first, logits_to_keep=1, use_cache=True))
        expected = model(second, logits_to_keep=1, **with_cache(model, copy.deepcopy(cache))).logits
        head, model.lm_head = model.lm_head, Broken()
        with pytest.raises(RuntimeError, match="broken"):
            model(second, logits_to_keep=1, **with_cache(model, cache))
        model.lm_head = head
        assert torch.equal(model(second, logits_to_keep=1, **with_cache(model, cache)).logits, expected)


def test_a_model_enabled_in_training_mode_is_tried_later():
    model = llama()
    model.model.layers[3].mlp = Counting(model.model.layers[3].mlp)
    model.train()
    pop_ext.enable(model, Plan(6, (3,)), backend="portable")
    model.eval()
    with torch.no_grad(), pytest.warns(UserWarning, match="by their cache alone"):
        model(tokens(model, 1, T), logits_to_keep=1)
    assert pop_ext.last_call(model).backend == "stock"


def test_a_trial_that_gives_no_numbers_vouches_for_no_other_model(monkeypatch):
    monkeypatch.setattr(trial, "_passed", set())
    monkeypatch.setattr(trial, "_refused", {})
    for norm in (float("nan"), 1.0):
        model = llama()
        model.model.layers[3].mlp = Counting(model.model.layers[3].mlp)
        with torch.no_grad():
            model.model.norm.weight.mul_(norm)
        if norm == 1.0:
            with pytest.raises(ValueError, match="by their cache alone"):
                pop_ext.enable(model, Plan(6, (3,)), backend="portable")
        else:
            pop_ext.enable(model, Plan(6, (3,)), backend="portable")


@pytest.mark.parametrize("special", [[1, 2, 5], 2, None, list(range(200))])
def test_a_trial_takes_any_form_of_special_ids(special, monkeypatch):
    monkeypatch.setattr(trial, "_passed", set())
    monkeypatch.setattr(trial, "_refused", {})
    model = hyperclovax()
    model.config.eos_token_id = special
    pop_ext.enable(model, Plan(6, (3,)))
    assert trial._passed


@torch.no_grad()
def test_a_trial_does_not_depend_on_the_last_call(monkeypatch):
    monkeypatch.setattr(trial, "_passed", set())
    monkeypatch.setattr(trial, "_refused", {})
    model = VISION["qwen3_vl"]()
    model.model.rope_deltas = torch.tensor([[7], [3]])
    pop_ext.enable(model, Plan(6, (3,)), backend="portable")
    assert model.model.rope_deltas.tolist() == [[7], [3]]


@torch.no_grad()
def test_a_model_that_lost_its_native_form_says_why_and_is_scored():
    model = pop_ext.enable(llama(), plan_of(llama(), GAPS)).double()
    model(tokens(model, 1, T), logits_to_keep=1)
    decision = pop_ext.last_call(model)
    assert decision.backend == "portable"
    assert decision.reason.endswith(
        "(not native: model: expected float32, bfloat16 or float16 weights, got torch.float64)"
    )
    assert pop_ext.explain(model, tokens(model, 1, T), logits_to_keep=1).reason == decision.reason
    context, continuation = [tokens(model, 20)], [tokens(model, 3, seed=9)]
    ours = pop_ext.score(model, context, continuation)[0].log_likelihood
    with pop_ext.enabled(model, plan_of(model, GAPS), backend="reference"):
        assert ours == pytest.approx(pop_ext.score(model, context, continuation)[0].log_likelihood, abs=1e-6)
    model.model.layers[4].mlp.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"prefills run portably, got hooks on model\.layers\.4\.mlp"):
        pop_ext.score(model, context, continuation)


@torch.no_grad()
def test_a_prefill_of_offloaded_weights_leaves_no_cycles():
    model = accelerate.cpu_offload(llama(), execution_device="cpu")
    ids = tokens(llama(), 1, T)
    with pop_ext.enabled(model, Plan(6, GAPS), strict=True):
        for _ in range(2):
            model(ids, logits_to_keep=1)
        gc.collect()
        model(ids, logits_to_keep=1)
        kept = [one for one in gc.get_objects() if isinstance(one, Tensor) and one.shape == (1, T, 96)]
    assert kept == []
