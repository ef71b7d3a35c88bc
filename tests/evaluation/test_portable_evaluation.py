"""Evaluations of models that run portably: hybrids, training mode, adapters, offloaded weights."""

from __future__ import annotations

import models
import pop_ext
import pytest
import torch
from pop_ext import Plan
from pop_ext.evaluation import evaluate
from pop_ext.evaluation.ablations import DROPPED, NO_BOUNDARY, NO_KV, ablated_logits
from pop_ext.evaluation.arms import backend_of
from pop_ext.evaluation.prompts import PromptSet
from pop_ext.plans.origin import config_hash, weights_hash
from portable_calls import architecture
from tolerance import assert_close_fp32

PLAN = Plan(6, (3, 4), 2)


def ids(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 250, shape, generator=torch.Generator().manual_seed(seed))


def text_set() -> PromptSet:
    return PromptSet("text", 20, ((ids(20), ids(5, seed=2)), (ids(20, seed=3), ids(5, seed=4))))


def losses(model, name: str = "pop 3-4 b2", **options) -> list[float]:
    result = evaluate(model, [text_set()], [PLAN], kinds=["pop"], greedy_tokens=0, **options)
    return result.find(0, name)["samples"]["loss"]


def test_a_model_in_training_mode_is_evaluated_without_dropout_and_tried():
    model = models.hyperclovax()
    expected = losses(model)
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    model.train()
    assert losses(model) == pytest.approx(expected, abs=1e-6)
    with pop_ext.enabled(model, PLAN, backend="portable"):
        scores = [pop_ext.score(model, [ids(20)], [ids(5, seed=2)])[0].log_likelihood for _ in range(2)]
    assert scores[0] == pytest.approx(-5 * expected[0], abs=1e-4)
    assert scores[0] == scores[1]
    assert all(module.training for module in model.modules())
    refused = architecture("recurrent_gemma", "RecurrentGemmaForCausalLM").train()
    assert backend_of(refused) == "reference"


@pytest.mark.parametrize(
    ("name", "model_class"), [("qwen3_5_text", "Qwen3_5ForCausalLM"), ("falcon_h1", "FalconH1ForCausalLM")]
)
def test_second_turns_of_hybrids(name, model_class):
    model = architecture(name, model_class)
    first = tuple((ids(18, seed=seed), ids(3, seed=seed + 1)) for seed in (5, 7))
    second = tuple((ids(6, seed=seed), ids(4, seed=seed + 1)) for seed in (9, 11))
    turns = PromptSet("second turn", 18, second, first)
    result = evaluate(model, [turns], [PLAN, PLAN.replace(boundary=30)], kinds=["pop"], greedy_tokens=0)
    full, pruned, all_rows = (result.find(0, arm)["samples"]["loss"] for arm in ("full", "pop 3-4 b2", "pop 3-4 b30"))
    assert all_rows == pytest.approx(full, abs=1e-5)  # every row of both turns is a boundary row
    assert pruned != pytest.approx(full, abs=1e-5)


def test_reused_states_need_the_oracle_and_say_so():
    model = architecture("qwen3_5_text", "Qwen3_5ForCausalLM")
    with pytest.raises(ValueError, match="reuse_states: expected a model that the oracle runs, got model: expected"):
        losses(model, reuse_states=True)


def test_ablations_cut_rows_where_layers_take_four_dimensions():
    model = architecture("gemma3n_text", "Gemma3nForCausalLM")
    context, continuation = ids(2, 20), ids(2, 5, seed=2)
    kept, dropped = (
        ablated_logits(model, kind, Plan(6, (2, 3)), context, continuation) for kind in (NO_BOUNDARY, DROPPED)
    )
    assert_close_fp32(kept[:, 0], dropped[:, 0], "first token")  # before it every row was a context row
    assert (kept[:, -1] - dropped[:, -1]).abs().max() > 1e-4  # the continuation runs at full depth


def test_an_ablation_that_a_model_cannot_run_is_named():
    model = architecture("bloom", "BloomForCausalLM")
    with pytest.raises(ValueError, match="kinds: expected none of no-kv for this model, whose layers need all rows"):
        ablated_logits(model, NO_KV, Plan(6, (3, 4), 2), ids(2, 20), ids(2, 5, seed=2))


def test_a_config_whose_layers_differ_has_a_hash():
    model = architecture("gemma4_text", "Gemma4ForCausalLM")
    before = config_hash(model.config)
    assert len(losses(model)) == 2
    assert config_hash(model.config) == before


def test_adapters_run_portably():
    peft = pytest.importorskip("peft")
    base = models.llama()
    adapted = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    assert backend_of(adapted) == "portable"
    found = losses(adapted)
    with pop_ext.enabled(adapted.get_base_model(), PLAN, backend="reference"):
        scores = pop_ext.score(adapted.get_base_model(), [ids(20)], [ids(5, seed=2)])
    assert found[0] == pytest.approx(-scores[0].log_likelihood / 5, abs=1e-5)


def test_offloaded_weights_are_scored():
    accelerate = pytest.importorskip("accelerate")
    expected = losses(models.llama())
    model = accelerate.cpu_offload(models.llama(), execution_device=torch.device("cpu"))
    assert weights_hash(model) == weights_hash(models.llama())
    assert losses(model) == pytest.approx(expected, abs=1e-5)
