"""Configurations of vLLM that are refused, and those that are changed, for pruned prefills."""

from __future__ import annotations

import importlib.util
from functools import reduce
from types import SimpleNamespace

import models
import pop_ext
import pytest
import torch

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vllm (make vllm)"),
]
if importlib.util.find_spec("vllm") is not None:
    from pop_ext.vllm import projection, requests, settings
    from pop_ext.vllm.settings import EngineSettings, check_engine, engine_boundary, engine_plan, engine_settings
    from vllm.exceptions import VLLMValidationError


def config(**changes):
    """Return the members of an engine's configuration that are read; a key `a.b` changes a nested member."""
    text = models.shared("llama").config
    found = SimpleNamespace(
        additional_config={},
        model_config=SimpleNamespace(
            hf_text_config=text,
            model="/nowhere",
            architecture="LlamaForCausalLM",
            get_num_experts=lambda: 0,
            runner_type="generate",
            logits_processors=None,
            return_sampling_mask=False,
        ),
        parallel_config=SimpleNamespace(
            decode_context_parallel_size=1,
            prefill_context_parallel_size=1,
            use_ubatching=False,
            data_parallel_size=1,
        ),
        load_config=SimpleNamespace(load_format="auto"),
        offload_config=SimpleNamespace(
            uva=SimpleNamespace(cpu_offload_gb=0), prefetch=SimpleNamespace(offload_group_size=0)
        ),
        weight_transfer_config=None,
        speculative_config=None,
        lora_config=None,
        use_v2_model_runner=False,
    )
    for name, value in changes.items():
        *parts, member = name.split("__")
        setattr(reduce(getattr, parts, found), member, value)
    return found


def drafts(method, count=4):
    return SimpleNamespace(method=method, num_speculative_tokens=count)


REFUSED = {
    "decode_context_parallel_size: expected 1": dict(parallel_config__decode_context_parallel_size=2),
    "prefill_context_parallel_size: expected 1": dict(parallel_config__prefill_context_parallel_size=2),
    "enable_dbo, ubatch_size: expected False": dict(parallel_config__use_ubatching=True),
    "cpu_offload_gb: expected 0": dict(offload_config__uva__cpu_offload_gb=2.0),
    "offload_group_size: expected 0": dict(offload_config__prefetch__offload_group_size=8),
    "weight_transfer_config: expected None": dict(weight_transfer_config="a transfer"),
    "return_sampling_mask: expected False": dict(model_config__return_sampling_mask=True),
    "runner: expected 'generate'.*got 'pooling'": dict(model_config__runner_type="pooling"),
    "speculative_config.method: expected one of ngram.*got 'eagle3'": dict(
        speculative_config=SimpleNamespace(method="eagle3", num_speculative_tokens=4)
    ),
    "additional_config.'pop_ext'.: expected false, or an object with members 'plan' and 'strict'": dict(
        additional_config={"pop_ext": {"plans": "x"}}
    ),
    "additional_config: expected the key 'pop_ext', got 'pop-ext'": dict(additional_config={"pop-ext": {}}),
    "'strict'.: expected true or false, got 'no'": dict(additional_config={"pop_ext": {"strict": "no"}}),
    "load_format: expected none of tensorizer.*got tensorizer": dict(load_config__load_format="tensorizer"),
    "data_parallel_size: expected 1 .*got 2": dict(
        parallel_config__data_parallel_size=2, model_config__get_num_experts=lambda: 8
    ),
    "'plan'.: expected a saved plan's path, 'third' or 'preset', got 3": dict(
        additional_config={"pop_ext": {"plan": 3}}
    ),
}


@pytest.mark.parametrize("text", REFUSED)
def test_unsupported_settings_are_refused_by_name(text):
    with pytest.raises((ValueError, TypeError), match=text):
        check_engine(config(**REFUSED[text]))


def test_an_engine_prunes_only_if_it_is_told_to(monkeypatch):
    assert engine_settings(config()) is None
    assert engine_settings(config(additional_config={"other_plugin": {}})) is None
    assert engine_settings(config(additional_config={"pop_ext": False})) is None
    assert engine_settings(config(additional_config={"pop_ext": {}})) == EngineSettings()
    assert engine_settings(config(model_config__architecture="POPQwen3ForCausalLM")) == EngineSettings()
    asked = config(additional_config={"pop_ext": {"plan": "third", "strict": False}})
    assert engine_settings(asked) == EngineSettings("third", strict=False)
    monkeypatch.setattr(settings, "plan_beside", lambda *_: pop_ext.Plan.last(6))
    assert engine_settings(config()) == EngineSettings(None, strict=False, asked=False)
    assert engine_settings(config(additional_config={"pop_ext": False})) is None


def test_fitted_projections_are_refused_with_adapters(tmp_path):
    plan = pop_ext.fit(models.shared("llama"), pop_ext.Plan.last(6), [torch.arange(40)[None]], lambdas=[1.0])
    plan.save(tmp_path / "plan.json")
    asked = config(additional_config={"pop_ext": {"plan": str(tmp_path / "plan.json")}}, lora_config=object())
    with pytest.raises(ValueError, match="expected no fitted projections with enable_lora"):
        check_engine(asked)


def test_without_a_plan_every_layer_runs():
    assert engine_plan(config()) == pop_ext.Plan(6, ())


def test_a_plan_may_be_named_by_a_word():
    assert engine_plan(config(additional_config={"pop_ext": {"plan": "third"}})) == pop_ext.Plan.last(6)


def test_a_plan_of_another_model_is_refused(tmp_path):
    origin = pop_ext.Plan(6, [3]).replace(origin=None)
    path = tmp_path / "plan.json"
    origin.replace(origin=pop_ext.plans.origin.Origin("elsewhere", "0" * 16)).save(path)
    with pytest.raises(ValueError, match="made with elsewhere"):
        check_engine(config(additional_config={"pop_ext": {"plan": str(path)}}))


def test_a_fitted_plan_among_the_models_weights_is_refused(tmp_path):
    plan = pop_ext.fit(models.shared("llama"), pop_ext.Plan.last(6), [torch.arange(40)[None]], lambdas=[1.0])
    for folder, refused in ((tmp_path, True), (tmp_path / "plans", False)):
        folder.mkdir(exist_ok=True)
        plan.save(folder / "plan.json")
        section = {"pop_ext": {"plan": str(folder / "plan.json")}}
        engine = config(additional_config=section, model_config__model=str(tmp_path))
        if refused:
            with pytest.raises(ValueError, match="expected a fitted plan outside the model's folder"):
                engine_plan(engine)
        else:
            assert engine_plan(engine) == plan


def test_drafts_are_verified_at_full_depth():
    plan = pop_ext.Plan.last(6, boundary=3)
    assert engine_boundary(config(), plan) == 3
    assert engine_boundary(config(speculative_config=drafts("ngram", 4)), plan) == 5
    assert engine_boundary(config(speculative_config=drafts("ngram", 1)), plan) == 3


@pytest.mark.parametrize("runner", [False, True])
def test_requests_for_prompt_log_probabilities_are_checked_early(runner):
    engine = config(use_v2_model_runner=runner, model_config__logits_processors=["own:Processor"])
    check_engine(engine)
    own, added = engine.model_config.logits_processors
    assert own == "own:Processor"
    assert added == f"pop_ext.vllm.requests:NoPromptLogprobsV{1 + runner}"


def test_the_v1_runner_gets_no_logits_processors_with_drafts():
    engine = config(speculative_config=drafts("ngram"))
    check_engine(engine)
    assert engine.model_config.logits_processors is None
    engine = config(speculative_config=drafts("ngram"), use_v2_model_runner=True)
    check_engine(engine)
    assert engine.model_config.logits_processors == ["pop_ext.vllm.requests:NoPromptLogprobsV2"]


@pytest.mark.parametrize("name", ["prompt_logprobs", "prompt_logprob_token_ids"])
def test_both_runners_refuse_logits_of_prompt_rows(name):
    nothing = dict(prompt_logprobs=None, prompt_logprob_token_ids=None)
    for processor in (requests.NoPromptLogprobsV1, requests.NoPromptLogprobsV2):
        processor.validate_params(SimpleNamespace(**nothing))
        with pytest.raises(VLLMValidationError, match=f"{name}: expected None"):
            processor.validate_params(SimpleNamespace(**nothing | {name: [1]}))


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_each_rank_takes_its_own_heads_of_a_fit(ranks, monkeypatch):
    heads, head_dim, hidden = 4, 3, 5
    matrix = torch.randn(2 * heads * head_dim, hidden)
    k, v = matrix.view(2, heads, head_dim, hidden)
    for rank in range(ranks):
        monkeypatch.setattr(projection, "get_tensor_model_parallel_rank", lambda rank=rank: rank)
        own = max(1, heads // ranks)
        linear = SimpleNamespace(
            num_kv_heads=own, head_size=head_dim, total_num_kv_heads=heads, num_kv_head_replicas=max(1, ranks // heads)
        )
        first = rank * heads // ranks
        expected = torch.cat([part[first : first + own].reshape(-1, hidden) for part in (k, v)])
        assert torch.equal(projection._TensorParallelPart(linear).of_stack(matrix), expected)
