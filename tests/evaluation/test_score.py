"""pop_ext.score: log-likelihoods under the enabled plan, against the oracle, the stock model and generate."""

from __future__ import annotations

import copy
import functools

import pop_ext
import pytest
import torch
from against_oracle import GAPS, LAST, plan_of, run_stock
from models import FAMILIES, llama, tokens
from pop_ext import Plan, reference

# (tokens of the context, tokens of the continuation)
LENGTHS = [(40, 5), (1, 1), (1, 9), (19, 1), (2, 3), (33, 30), (111, 2)]
TOLERANCE = 5e-4  # for sums of up to 30 log-probabilities


@functools.cache
def shared(family: str = "llama"):
    """Return a model that tests must not change."""
    return FAMILIES[family]()


def pairs(model) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    contexts = [tokens(model, length, seed=i) for i, (length, _) in enumerate(LENGTHS)]
    return contexts, [tokens(model, length, seed=50 + i) for i, (_, length) in enumerate(LENGTHS)]


def of_rows(logits: torch.Tensor, continuation: torch.Tensor) -> tuple[float, bool]:
    """Return log-likelihood and greediness of a continuation from the logits [n, vocab] that predict its n tokens."""
    total, greedy = 0.0, True
    for row, token in zip(logits.double(), continuation, strict=True):
        total += float(row[token] - row.logsumexp(0))
        greedy = greedy and int(row.argmax()) == int(token)
    return total, greedy


def by_the_oracle(model, plan, context, continuation) -> tuple[float, bool]:
    ids = torch.cat([context, continuation[:-1]])
    boundary = min(plan.boundary - 1 + len(continuation), len(ids))
    logits, _ = reference.prefill(model, ids[None], plan, len(continuation), boundary=boundary)
    return of_rows(logits[0], continuation)


@pytest.mark.parametrize("boundary", [1, 2, 17, 200])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_a_score_equals_the_oracles(family, boundary):
    model, plan = shared(family), plan_of(shared(family), GAPS, boundary)
    contexts, continuations = pairs(model)
    with pop_ext.enabled(model, plan):
        scores = pop_ext.score(model, contexts, continuations)
    for score, context, continuation in zip(scores, contexts, continuations, strict=True):
        total, greedy = by_the_oracle(model, plan, context, continuation)
        assert score.log_likelihood == pytest.approx(total, abs=TOLERANCE)
        assert score.is_greedy == greedy


@pytest.mark.parametrize("plan", [(), (5,)], ids=["nothing omitted", "last layer omitted"])
def test_scores_without_pruning_equal_the_stock_models(plan):
    model = shared()
    contexts, continuations = pairs(model)
    with pop_ext.enabled(model, plan_of(model, plan)):
        scores = pop_ext.score(model, contexts, continuations)
    for score, context, continuation in zip(scores, contexts, continuations, strict=True):
        logits, _ = run_stock(model, torch.cat([context, continuation])[None])
        total, greedy = of_rows(logits[0, len(context) - 1 : -1], continuation)
        assert score.log_likelihood == pytest.approx(total, abs=TOLERANCE)
        assert score.is_greedy == greedy


def test_pruning_changes_a_score():
    model = shared()
    contexts, continuations = pairs(model)
    scores = {}
    for omit in ((), LAST):
        with pop_ext.enabled(model, plan_of(model, omit)):
            scores[omit] = pop_ext.score(model, contexts[:1], continuations[:1])[0].log_likelihood
    assert abs(scores[()] - scores[LAST]) > 0.01


@pytest.mark.parametrize("boundary", [1, 4])
def test_a_score_equals_prefill_and_decode(boundary):
    # The continuation is the model's own greedy one, so every token is the most probable one.
    model = copy.deepcopy(shared())
    pop_ext.enable(model, plan_of(model, LAST, boundary), strict=True)
    context = tokens(model, 1, 33)
    generated = model.generate(
        context,
        attention_mask=torch.ones_like(context),
        max_new_tokens=12,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    continuation = generated.sequences[0, 33:]
    total, greedy = of_rows(torch.cat(generated.logits), continuation)
    (score,) = pop_ext.score(model, context, [continuation])
    assert greedy
    assert score.is_greedy
    assert score.log_likelihood == pytest.approx(total, abs=TOLERANCE)
    # Another token at the end or in the middle makes it no longer greedy.
    for place in (5, 11):
        other = continuation.clone()
        other[place] = (other[place] + 1) % model.config.vocab_size
        assert not pop_ext.score(model, context, [other])[0].is_greedy


# The RoPE of "longrope" follows a batch's longest sequence; that of "dynamic" also follows what the model saw before.
@pytest.mark.parametrize(
    ("rope", "batch_size"), [("default", 1), ("default", 2), ("default", 3), ("default", 100), ("longrope", 100)]
)
def test_batch_size_and_order_do_not_change_scores(rope, batch_size):
    model = shared() if rope == "default" else llama(rope=rope)
    contexts, continuations = pairs(model)
    with pop_ext.enabled(model, plan_of(model, GAPS, 2)):
        expected = [pop_ext.score(model, [a], [b])[0] for a, b in zip(contexts, continuations, strict=True)]
        forth = pop_ext.score(model, contexts, continuations, batch_size=batch_size)
        back = pop_ext.score(model, contexts[::-1], continuations[::-1], batch_size=batch_size)[::-1]
    for scores in (forth, back):
        for score, alone in zip(scores, expected, strict=True):
            assert score.log_likelihood == pytest.approx(alone.log_likelihood, abs=TOLERANCE)
            assert score.is_greedy == alone.is_greedy


def test_lists_and_integer_tensors_give_the_same_scores():
    model = shared()
    contexts, continuations = pairs(model)
    with pop_ext.enabled(model, plan_of(model)):
        expected = pop_ext.score(model, contexts, continuations)
        as_lists = pop_ext.score(model, [x.tolist() for x in contexts], [tuple(x.tolist()) for x in continuations])
        as_int32 = pop_ext.score(model, [x.int() for x in contexts], continuations)
    assert as_lists == as_int32 == expected
    assert isinstance(expected[0].log_likelihood, float)
    assert isinstance(expected[0].is_greedy, bool)


def test_reference_and_native_backends_give_the_same_scores():
    model, plan = shared(), plan_of(shared(), GAPS, 2)
    contexts, continuations = pairs(model)
    scores = {}
    for backend in ("native", "reference"):
        with pop_ext.enabled(model, plan, backend=backend):
            scores[backend] = pop_ext.score(model, contexts, continuations)
    for ours, theirs in zip(scores["native"], scores["reference"], strict=True):
        assert ours.log_likelihood == pytest.approx(theirs.log_likelihood, abs=TOLERANCE)
        assert ours.is_greedy == theirs.is_greedy


def test_a_score_ignores_min_tokens():
    model = shared()
    contexts, continuations = pairs(model)
    scores = []
    for min_tokens in (0, 10_000):
        with pop_ext.enabled(model, Plan(6, LAST, min_tokens=min_tokens)):
            scores.append(pop_ext.score(model, contexts, continuations))
    assert scores[0] == scores[1]


def test_a_score_keeps_the_model_it_loaded_while_another_thread_reloads():
    with pop_ext.enabled(shared(), plan_of(shared())) as model:
        contexts, continuations = pairs(model)
        expected = pop_ext.score(model, contexts, continuations)
        backend = model.forward.backend
        load = backend.load

        def load_and_lose(model):
            native = load(model, "third")
            backend.native = None  # as while another thread loads anew
            return native

        backend.load = load_and_lose
        assert pop_ext.score(model, contexts, continuations) == expected


def test_no_pairs_have_no_scores():
    with pop_ext.enabled(shared(), plan_of(shared())) as model:
        assert pop_ext.score(model, [], []) == []


def test_a_score_follows_changed_weights():
    model = pop_ext.enable(llama(), Plan.last(6))
    contexts, continuations = pairs(model)
    before = pop_ext.score(model, contexts[:1], continuations[:1])
    with torch.no_grad():
        model.model.layers[5].self_attn.v_proj.weight.mul_(3)
    after = pop_ext.score(model, contexts[:1], continuations[:1])
    total, _ = by_the_oracle(model, Plan.last(6), contexts[0], continuations[0])
    assert after != before
    assert after[0].log_likelihood == pytest.approx(total, abs=TOLERANCE)
