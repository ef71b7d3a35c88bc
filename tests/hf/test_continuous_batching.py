"""An enabled model under transformers' continuous batching: its prefills are pruned, and equal the oracle's.

Text is greedy, and K and V are those of every layer and position.
"""

from __future__ import annotations

import copy
import warnings

import batched_requests
import models
import pop_ext
import pytest
import torch
from batched_requests import NEW, answers, assert_equals_oracle, generate_batch
from pop_ext import Plan
from pop_ext.hf import native_step
from torch import nn
from transformers import CompileConfig, ContinuousBatchingConfig, GenerationConfig

pytestmark = pytest.mark.cpu
pytest.importorskip("transformers", minversion="5.24")  # whose pages the comparison reads

PLAN = Plan(6, (2, 3, 5), 2)
FAMILIES = {
    "llama": lambda: models.llama(),
    "llama, paged eager": lambda: models.llama(attn_implementation="eager"),
    "qwen2": lambda: models.qwen2(),
    "qwen3": lambda: models.qwen3(),
    "qwen3, head_dim 80": lambda: models.qwen3(head_dim=80),
    "mistral, window": lambda: models.mistral(),
    "qwen2, windows": lambda: models.qwen2(use_sliding_window=True),
    "gemma3, windows": lambda: models.gemma3(),
    "phi3, window": lambda: models.phi3(),
    "olmo2": lambda: models.olmo2(),
    "mixtral": lambda: models.mixtral(),
    "qwen3_moe": lambda: models.qwen3_moe(),
}


def prompts_of(model, *lengths):
    vocabulary = model.config.vocab_size
    generator = torch.Generator().manual_seed(sum(lengths))
    return [torch.randint(0, vocabulary, (length,), generator=generator).tolist() for length in lengths]


@pytest.fixture(params=["native", "portable"])
def backend(request):
    return request.param


def assert_pruned(model, prompts, plan, backend="auto", **batching):
    """Run prompts, and compare each with the oracle. Return what was recorded."""
    stock = copy.deepcopy(model)
    pop_ext.enable(model, plan, strict=True, backend=backend)
    texts, requests = generate_batch(model, prompts, **batching)
    for prompt, text, request in zip(prompts, texts, requests, strict=True):
        assert_equals_oracle(stock, plan, prompt, text, request)
    return requests


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_of_one_chunk_equal_the_oracle(family, backend):
    model = FAMILIES[family]()
    requests = assert_pruned(model, prompts_of(model, 41, 18, 14), PLAN, backend)
    assert [request.chunks[0] for request in requests] == [(0, 41), (0, 18), (0, 14)]
    assert pop_ext.stats(model) == {"decode": NEW - 1, "prefill": 1}
    assert pop_ext.last_call(model).backend == backend


@pytest.mark.parametrize("family", ["llama", "mistral, window", "gemma3, windows", "qwen3"])
def test_chunks_keep_their_own_boundary_rows_beside_requests_that_decode(family, backend):
    model = FAMILIES[family]()
    requests = assert_pruned(model, prompts_of(model, 9, 70, 40), PLAN, backend, max_batch_tokens=32)
    assert any(len([1 for _, new in request.chunks if new > 1]) > 2 for request in requests)
    decoding = {past for past, new in requests[0].chunks if new == 1}
    assert decoding
    assert max(partners for request in requests for partners in request.partners) > 1


@pytest.mark.parametrize(
    ("omit", "boundary"), [((), 1), ((5,), 7), ((0, 2, 3), 1), ((0, 2, 3), 100), ((1, 2, 3, 4, 5), 7)]
)
def test_any_layers_and_boundary_equal_the_oracle(omit, boundary, backend):
    model = models.llama()
    assert_pruned(model, prompts_of(model, 33, 12), Plan(6, omit, boundary), backend, max_batch_tokens=40)


def test_pruning_changes_the_text_so_that_the_comparison_can_fail():
    model = models.llama()
    prompts = prompts_of(model, 41, 18)
    plain, _ = generate_batch(copy.deepcopy(model), prompts)
    pruned, _ = generate_batch(pop_ext.enable(model, PLAN), prompts)
    assert plain != pruned


@pytest.mark.parametrize("boundary", [1, 1000])
def test_nothing_omitted_or_all_boundary_rows_equal_the_stock_model(boundary):
    plan = PLAN.replace(boundary=boundary) if boundary > 1 else Plan(6, ())
    model = models.qwen3()
    prompts = prompts_of(model, 33, 12)
    plain, _ = generate_batch(copy.deepcopy(model), prompts)
    assert generate_batch(pop_ext.enable(model, plan, strict=True), prompts)[0] == plain


@pytest.mark.parametrize("shortest", [12, 13, 33, 34])
def test_a_chunk_shorter_than_min_tokens_runs_at_full_depth(shortest):
    model = models.llama()
    requests = assert_pruned(model, prompts_of(model, 33, 12), PLAN.replace(min_tokens=shortest))
    assert [request.chunks[0][1] for request in requests] == [33, 12]
    decision = pop_ext.last_call(model)
    assert decision.boundary == tuple(n if n < shortest else 2 for n in decision.tokens)


def test_a_prefix_hit_takes_the_pages_of_the_first_request(backend):
    model, stock = models.llama(), models.llama()
    (first,) = prompts_of(model, 40)
    second = first[:27] + prompts_of(model, 30)[0]
    pop_ext.enable(model, PLAN, strict=True, backend=backend)
    requests: dict[str, batched_requests.Request] = {}
    config = GenerationConfig(max_new_tokens=NEW, do_sample=False, pad_token_id=0, eos_token_id=-1)
    batching = ContinuousBatchingConfig(num_blocks=64, page_size=8, max_batch_tokens=128)
    manager = model.init_continuous_batching(generation_config=config, continuous_batching_config=batching)
    texts = []
    with batched_requests.recorded_steps(requests):
        manager.start()
        for name, prompt in (("first", first), ("second", second)):
            manager.add_request(prompt, request_id=name, max_new_tokens=NEW)
            texts.append(manager.get_result(timeout=60).generated_tokens)
        manager.stop()
    cache = assert_equals_oracle(stock, PLAN, first, texts[0], requests["first"])
    assert requests["second"].chunks[0] == (24, len(second) - 24)  # three pages of 8 are shared
    cache.crop(24 - cache.get_seq_length())
    assert_equals_oracle(stock, PLAN, second, texts[1], requests["second"], cache)


def test_a_fitted_plan_projects_context_rows_by_its_fit(backend):
    model = models.qwen3()
    plan = pop_ext.fit(model, Plan(6, (3, 4, 5), 2), [models.tokens(model, 16, 30)], lambdas=[0.1])
    own = model.model.layers[3].self_attn.k_proj.weight
    assert float((plan.projections.matrices[3][: len(own)] - own).norm() / own.norm()) > 0.1
    assert_pruned(model, prompts_of(model, 41, 18), plan, backend, max_batch_tokens=32)


def test_several_answers_of_one_prompt_share_its_prefill():
    model = models.llama()
    (prompt,) = prompts_of(model, 30)
    config = GenerationConfig(
        max_new_tokens=NEW, do_sample=True, top_k=1, num_return_sequences=3, pad_token_id=0, eos_token_id=-1
    )
    batching = ContinuousBatchingConfig(num_blocks=64, page_size=8, max_batch_tokens=128)
    stock = copy.deepcopy(model)
    pop_ext.enable(model, PLAN, strict=True)
    outputs = model.generate_batch(
        [prompt], generation_config=config, continuous_batching_config=batching, warmup=False
    )
    oracle = batched_requests.OracleRequest(stock, PLAN, prompt)
    oracle.step(0, 29)  # transformers forks a request before the last token of its prompt
    for position in range(29, 29 + NEW):
        oracle.step(position, 1)
    assert [output.generated_tokens for output in outputs.values()] == [oracle.ids[30:]] * 3


def test_rows_of_one_request_do_not_depend_on_the_others():
    model = pop_ext.enable(models.qwen3(), PLAN, strict=True)
    prompts = prompts_of(model, 41, 18, 27)
    together, _ = generate_batch(model, prompts)
    alone = [generate_batch(model, [prompt])[0][0] for prompt in prompts]
    assert together == alone


def test_a_step_runs_natively_where_it_can_and_else_portably():
    for model, expected in ((models.llama(), "native"), (models.llama(dtype=torch.float64), "portable")):
        pop_ext.enable(model, PLAN, strict=True)
        generate_batch(model, prompts_of(model, 20))
        decision = pop_ext.last_call(model)
        assert decision.backend == expected
        assert "continuous batching" in decision.reason
        assert (decision.tokens, decision.boundary) == ((20,), (2,))


def test_a_long_request_that_decodes_beside_many_short_ones_runs_portably(monkeypatch):
    monkeypatch.setattr(native_step, "MOST_PADDING", 1.5)
    model = models.llama()
    assert_pruned(model, prompts_of(model, 70, 9, 8, 7), PLAN)
    assert "of 7 to 70 positions in one step" in pop_ext.last_call(model).reason


def test_the_model_prefills_natively_again_afterwards():
    model = pop_ext.enable(models.llama(), PLAN, strict=True)
    generate_batch(model, prompts_of(model, 20))
    model.generate(torch.tensor(prompts_of(model, 20)), max_new_tokens=1, pad_token_id=0)
    assert pop_ext.last_call(model).native


@pytest.mark.parametrize("family", ["llama", "gemma3, windows"])
def test_steps_padded_for_a_compiler_equal_the_oracle(family, backend, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # the padding is what is tested
    model = FAMILIES[family]()
    padded = []
    stock = batched_requests.ModelRunner.maybe_pad_inputs

    def pad(runner, *args, **kwargs):
        padded.append(stock(runner, *args, **kwargs) != args[:2])
        return stock(runner, *args, **kwargs)

    monkeypatch.setattr(batched_requests.ModelRunner, "maybe_pad_inputs", pad)
    assert_pruned(model, prompts_of(model, 41, 18, 70), PLAN, backend, max_batch_tokens=96, default_compile_level=1)
    assert any(padded)


@pytest.mark.filterwarnings("ignore:.*torch.compile")
def test_a_compiled_step_is_pruned():
    model = models.llama()
    compile_config = CompileConfig(backend="eager", fullgraph=False, dynamic=True)
    assert_pruned(model, prompts_of(model, 41, 18), PLAN, max_batch_tokens=96, varlen_compile_config=compile_config)
    assert "prefill" in pop_ext.stats(model)


# Declined


def hooked(model):
    model.model.layers[3].mlp.register_forward_hook(lambda *_: None)
    return model


DECLINED = {
    "hooks on a layer": (lambda: hooked(models.llama()), {}, "hooks"),
    "the oracle": (models.llama, {"backend": "reference"}, "continuous_batching"),
    "a soft cap that paged eager leaves out": (models.gemma2, {}, "attention"),
}


@pytest.mark.parametrize("case", DECLINED)
def test_a_declined_step_runs_the_stock_forward_and_says_why(case):
    make, how, rule = DECLINED[case]
    model = make()
    prompts = prompts_of(model, 20, 12)
    expected = [output.generated_tokens for output in answers(make(), prompts).values()]
    pop_ext.enable(model, PLAN, **how)
    with pytest.warns(match="the stock forward runs"):
        found = [output.generated_tokens for output in answers(model, prompts).values()]
    assert found == expected
    assert pop_ext.last_call(model).rule == rule
    assert "prefill" not in pop_ext.stats(model)


@pytest.mark.parametrize("case", DECLINED)
@pytest.mark.timeout(120)
def test_under_strict_every_request_of_a_declined_step_gets_the_reason_as_its_error(case):
    make, how, _ = DECLINED[case]
    model = pop_ext.enable(make(), PLAN, strict=True, **how)
    outputs = answers(model, prompts_of(model, 20, 12))
    assert len(outputs) == 2
    for output in outputs.values():
        assert output.generated_tokens == []
        assert "strict=True" in output.error
        assert pop_ext.last_call(model).reason in output.error


def test_decode_steps_alone_are_no_prefills():
    model = pop_ext.enable(models.llama(), PLAN, strict=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate_batch(model, prompts_of(model, 1, 1))
    assert pop_ext.stats(model) == {"decode": NEW}


def without_read_index(call):
    del call["read_index"]


def padded_for_a_graph(call):
    call["cu_seq_lens_q"] = torch.cat([call["cu_seq_lens_q"], call["cu_seq_lens_q"][-1:]])
    call["max_length_k"] = dict.fromkeys(call["max_length_k"], 1024)


@pytest.mark.parametrize(
    ("change", "reason"), [(without_read_index, "expected read_index"), (padded_for_a_graph, "CUDA graphs of prefills")]
)
def test_steps_of_unknown_arguments_or_for_cuda_graphs_are_declined(change, reason, monkeypatch):
    model = pop_ext.enable(models.llama(), PLAN)
    found = []
    stock = batched_requests.ModelRunner.compute_batch

    def explained(runner, model, batch_data):
        call = dict(batch_data)
        change(call)
        found.append(pop_ext.explain(model, **call))
        stock(runner, model, batch_data)

    monkeypatch.setattr(batched_requests.ModelRunner, "compute_batch", explained)
    answers(model, prompts_of(model, 20))
    assert (found[0].rule, found[0].declined) == ("continuous_batching", True)
    assert reason in found[0].reason


def test_a_failing_layer_gives_every_request_its_error_and_frees_the_pages():
    model = pop_ext.enable(models.llama(), PLAN, strict=True)

    class Failing(nn.Linear):
        def forward(self, _):
            raise RuntimeError("no memory left")

    model.model.layers[1].mlp.up_proj.__class__ = Failing
    outputs = answers(model, prompts_of(model, 20, 12))
    assert ["no memory left" in output.error for output in outputs.values()] == [True, True]
    model.model.layers[1].mlp.up_proj.__class__ = nn.Linear
    generate_batch(model, prompts_of(model, 20, 12))
