"""pop_ext.fit: choice of lambda, holdout, the model afterwards, progress, origin and refusals."""

from __future__ import annotations

import dataclasses
import functools
import math

import pop_ext
import pytest
import torch
from against_oracle import GAPS, LAST, plan_of
from models import FAMILIES, batches, hyperclovax, llama, shared, tokens
from pop_ext import Plan
from pop_ext.methods.fit_moments import HOLD_EVERY
from pop_ext.methods.ridge import RunMoments
from tolerance import assert_close_fp32

INF = math.inf

# Choosing lambda


def test_lambda_has_the_lowest_held_out_loss():
    model = FAMILIES["mistral"]()
    held = [tokens(model, 4, 33, seed=70)]
    plan = pop_ext.fit(model, plan_of(model, LAST, 2), batches(model), holdout=held, lambdas=[0.01, 1, INF])
    report = plan.projections.report
    assert [row[0] for row in report.losses] == [0.01, 1.0, INF]
    assert report.ridge == min(report.losses, key=lambda row: row[1])[0]
    assert report.holdout == 4
    pop_ext.enable(model, pop_ext.fit(model, plan_of(model, LAST, 2), batches(model), lambdas=[1]))
    scores = pop_ext.score(model, list(held[0][:, :25]), list(held[0][:, 25:]))
    expected = -torch.tensor([score.log_likelihood for score in scores]) / 8
    assert report.losses[1][1] == pytest.approx(float(expected.mean()), abs=1e-4)
    assert report.losses[1][2] == pytest.approx(float(expected.std() / 2), abs=1e-4)


def test_every_eighth_sequence_is_held_out_by_default():
    model = shared("llama")
    whole = tokens(model, 20, 24, seed=4)
    out = torch.arange(20) % HOLD_EVERY == HOLD_EVERY - 1
    plan = plan_of(model, LAST)
    ours = pop_ext.fit(model, plan, whole.split(3), lambdas=[0.1, 10])
    theirs = pop_ext.fit(model, plan, [whole[~out]], holdout=[whole[out]], lambdas=[0.1, 10])
    for layer in LAST:
        assert_close_fp32(ours.projections.matrices[layer], theirs.projections.matrices[layer], "W", 1e-4)
    assert ours.projections.report.holdout == theirs.projections.report.holdout == 2
    assert ours.projections.report.sequences == 18
    for one, other in zip(ours.projections.report.losses, theirs.projections.report.losses, strict=True):
        assert one == pytest.approx(other, abs=1e-4)


@pytest.mark.parametrize(("count", "size"), [(2, 2), (2, 1), (5, 2), (7, 7)])
def test_the_last_of_fewer_than_eight_sequences_is_held_out(count, size):
    model = shared("llama")
    whole = tokens(model, count, 24, seed=4)
    plan, told = plan_of(model, LAST), []
    ours = pop_ext.fit(model, plan, whole.split(size), lambdas=[0.1, 10], progress=lambda *x: told.append(x))
    theirs = pop_ext.fit(model, plan, [whole[:-1]], holdout=[whole[-1:]], lambdas=[0.1, 10])
    for layer in LAST:
        assert_close_fp32(ours.projections.matrices[layer], theirs.projections.matrices[layer], "W", 1e-4)
    assert (ours.projections.report.holdout, ours.projections.report.sequences) == (1, count - 1)
    assert told[-1] == (count + 1, count + 1)  # count - 1 sequences read, and one scored for each lambda


def test_iterators_and_lists_hold_out_the_same_sequences():
    model = shared("llama")
    parts = [tokens(model, 2, 24, seed=1), tokens(model, 1, 16, seed=2), tokens(model, 2, 20, seed=3)]
    plan = plan_of(model, LAST)
    ours = pop_ext.fit(model, plan, iter(parts), lambdas=[0.1, 10])
    theirs = pop_ext.fit(model, plan, [*parts[:2], parts[2][:1]], holdout=[parts[2][1:]], lambdas=[0.1, 10])
    for layer in LAST:
        assert_close_fp32(ours.projections.matrices[layer], theirs.projections.matrices[layer], "W", 1e-4)
    assert (ours.projections.report.holdout, ours.projections.report.sequences) == (1, 4)


def test_a_nan_names_the_batch_that_has_it():
    model = llama()
    whole = tokens(model, 3, 12).clamp_min(1)
    whole[0, 3] = 0
    model.model.embed_tokens.weight.data[0] = float("nan")
    with pytest.raises(ValueError, match="got NaN or infinity in batch 0"):
        pop_ext.fit(model, plan_of(model, LAST), whole.split(1), lambdas=[0.1, 10])


def test_a_single_lambda_needs_no_holdout():
    model = shared("llama")
    report = pop_ext.fit(model, plan_of(model, LAST), [tokens(model, 1, 9)], lambdas=[0.5]).projections.report
    assert (report.ridge, report.holdout, report.losses, report.sequences, report.tokens) == (0.5, 0, (), 1, 7)


def test_fewer_rows_than_channels_are_enough_for_a_ridge():
    model = shared("llama")
    plan = pop_ext.fit(model, plan_of(model, LAST), [tokens(model, 1, 2)], lambdas=[0.1])
    assert plan.projections.matrices[5].isfinite().all()
    assert plan.projections.report.condition[0] == pytest.approx(1 + 96 / 0.1, rel=0.3)


def test_grouping_into_batches_does_not_change_a_fit():
    model = shared("qwen2")
    whole, plan = tokens(model, 6, 24, seed=4), plan_of(shared("qwen2"), GAPS)
    one, other = (pop_ext.fit(model, plan, whole.split(n), lambdas=[0.1]).projections for n in (6, 1))
    for layer in GAPS:
        assert_close_fp32(one.matrices[layer], other.matrices[layer], f"layer {layer}", 1e-4)
    again = pop_ext.fit(model, plan, whole.split(6), lambdas=[0.1])
    assert again.projections == one


def test_batches_may_differ_in_length_and_be_a_generator():
    model = shared("llama")
    given = [tokens(model, 2, n, seed=n) for n in (9, 30)]
    plan = plan_of(model, LAST)
    once = pop_ext.fit(model, plan, (ids for ids in given), lambdas=[0.1])
    assert once.projections == pop_ext.fit(model, plan, given, lambdas=[0.1]).projections
    assert once.projections.report.tokens == 2 * 39 - 2 * 9  # the last quarter has weight 0


# The model


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_fitting_an_enabled_training_model_leaves_it_unchanged(backend):
    model = llama()
    expected = pop_ext.fit(model, plan_of(model, GAPS), batches(model), lambdas=[0.1])
    pop_ext.enable(model, plan_of(model, (0, 1, 2)), backend=backend)
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    forward = model.forward
    assert pop_ext.fit(model, plan_of(model, GAPS), batches(model), lambdas=[0.1]).projections == expected.projections
    assert model.training
    assert model.forward is forward
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__ for m in model.model.modules())


def test_a_decoder_without_a_native_form_is_fitted_for_the_oracle():
    model = hyperclovax()
    plan = pop_ext.fit(model, plan_of(model, LAST), batches(model), lambdas=[0.1])
    ids = tokens(model, 1, 20)
    ours, _ = pop_ext.reference.prefill(model, ids, plan)
    plain, _ = pop_ext.reference.prefill(model, ids, plan_of(model, LAST))
    assert not torch.allclose(ours, plain, atol=1e-3)


def test_progress_counts_sequences_read_and_scored():
    model, told = shared("llama"), []
    held = [tokens(model, 3, 20, seed=1)]
    pop_ext.fit(
        model, plan_of(model, LAST), batches(model), holdout=held, lambdas=[1, 2], progress=lambda *x: told.append(x)
    )
    assert told == [(3, 12), (6, 12), *((n, 12) for n in range(7, 13))]
    told.clear()  # two of 16 sequences are held out
    given = [tokens(model, 8, 20, seed=seed) for seed in (1, 2)]
    pop_ext.fit(model, plan_of(model, LAST), given, lambdas=[1, 2], progress=lambda *x: told.append(x))
    assert told == [(7, 18), (14, 18), *((n, 18) for n in range(15, 19))]


def test_the_origin_states_the_fit():
    model = shared("llama")
    chosen = pop_ext.block_influence(model, batches(model)).plan(count=2)
    plan = pop_ext.fit(model, chosen, batches(model), lambdas=[0.25])
    assert (plan.origin.method, plan.origin.samples) == (chosen.origin.method, chosen.origin.samples)
    assert plan.origin.fit == "ridge towards the original projections, lambda 0.25, rows weighted by attention"
    assert plan.origin.fit_samples == 6
    by_hand = pop_ext.fit(model, Plan(6, LAST), batches(model), lambdas=[0.25])
    assert by_hand.origin.method is None
    assert by_hand.origin.config_hash == plan.origin.config_hash


# Refusals


@pytest.mark.parametrize("boundary", [1, 2, 70])
def test_other_kv_projections_are_refused_by_name(boundary):
    model = llama()
    attention = model.model.layers[5].self_attn
    forward = attention.forward
    attention.forward = lambda hidden_states, **call: forward(2 * hidden_states, **call)
    with pytest.raises(ValueError, match="model: expected .* but LlamaAttention of layer 5 computes something else"):
        pop_ext.fit(model, plan_of(model, LAST, boundary), batches(model), lambdas=[0.1])


def test_attention_without_weights_is_refused_by_name(monkeypatch):
    model = llama()
    attention = type(model.model.layers[4].self_attn)
    forward = attention.forward
    monkeypatch.setattr(attention, "forward", lambda self, *args, **kwargs: (forward(self, *args, **kwargs)[0], None))
    with pytest.raises(ValueError, match="weighting: expected attention weights from LlamaAttention of layer 4, got"):
        pop_ext.fit(model, Plan.last(6, 2), batches(model), lambdas=[0.1])
    assert model.config._attn_implementation == "sdpa"
    pop_ext.fit(model, Plan.last(6, 2), batches(model), lambdas=[0.1], weighting="uniform")


def test_a_nan_loss_never_chooses_lambda(monkeypatch):
    model, given = shared("llama"), {0.01: math.nan, 1.0: 2.0, 10.0: 3.0}
    monkeypatch.setattr(
        "pop_ext.methods.fitting._held_out_loss", lambda model, plan, *_: (given[plan.projections.report.ridge], 0.1)
    )
    batches = [tokens(model, 9, 20)]
    fit = functools.partial(pop_ext.fit, model, plan_of(model, LAST), batches, lambdas=list(given))
    assert fit().projections.report.ridge == 1.0
    given.update(dict.fromkeys(given, math.nan))
    with pytest.raises(ValueError, match="holdout: expected finite losses, got nan, nan, nan"):
        fit()


def test_projections_beyond_the_dtype_are_refused(monkeypatch):
    model = llama(dtype=torch.float16)
    solve = RunMoments.solve

    def large(self, ridge):
        solution = solve(self, ridge)
        return dataclasses.replace(
            solution, changes={layer: 1e6 + change for layer, change in solution.changes.items()}
        )

    monkeypatch.setattr(RunMoments, "solve", large)
    with pytest.raises(
        ValueError, match=r"lambdas: expected a ridge whose projections float16 can hold, got 0.1 \(layer"
    ):
        pop_ext.fit(model, plan_of(model, LAST), batches(model), lambdas=[0.1])
