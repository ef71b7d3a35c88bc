"""Test plans with fitted projections: files, equality, copies, and models they were not fitted on."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import math
import pickle
import warnings

import pop_ext
import pytest
import torch
from against_oracle import GAPS, assert_equals_oracle, plan_of, run_native
from models import llama, shared, tokens
from pop_ext import Plan, reference
from pop_ext.plans.origin import Origin
from pop_ext.plans.projections import FitMismatch, FitReport, Projections
from safetensors.torch import load_file, save_file
from tolerance import assert_close_fp32
from torch import nn


@functools.cache
def fitted(family="llama", dtype=torch.float32):
    model = shared(family, dtype=dtype)
    return pop_ext.fit(model, plan_of(model, GAPS, 2), [tokens(model, 16, 30, seed=1)], lambdas=[0.1, math.inf])


def with_matrices(plan, **changes):
    """Return the plan with new `Projections`, some matrices replaced by `changes["matrices"]`."""
    fit = plan.projections
    return plan.replace(
        projections=Projections({**fit.matrices, **changes.pop("matrices", {})}, fit.samples, fit.report)
    )


# Files


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_saved_plan_loads_bit_for_bit(tmp_path, dtype):
    plan = fitted(dtype=dtype)
    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again == plan
    assert again.projections.dtype == dtype
    assert again.projections.report == plan.projections.report
    assert again.origin == plan.origin
    for layer in GAPS:
        assert torch.equal(again.projections.samples[layer], plan.projections.samples[layer])


def test_a_plan_file_names_its_matrices_and_their_digest(tmp_path):
    plan = fitted()
    plan.save(tmp_path / "some.plan.json")
    members = json.loads((tmp_path / "some.plan.json").read_text())["projections"]
    matrix_file = tmp_path / members["file"]
    assert matrix_file == tmp_path / "some.plan.safetensors"
    assert members["sha256"] == hashlib.sha256(matrix_file.read_bytes()).hexdigest()
    assert members["losses"][1][0] is None  # JSON has no infinity
    assert set(load_file(matrix_file)) == {f"layers.{layer}.{kind}" for layer in GAPS for kind in ("kv", "sample")}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["some.plan.json", "some.plan.safetensors"]


def test_a_plan_is_not_saved_over_a_models_weights(tmp_path):
    weights = tmp_path / "model.safetensors"
    save_file({"lm_head.weight": torch.zeros(2)}, weights, {"format": "pt"})
    before = weights.read_bytes()
    for content in (before, b"no safetensors"):
        weights.write_bytes(content)
        with pytest.raises(ValueError, match="projections: expected no other file in the place of .*model.safetensors"):
            fitted().save(tmp_path / "model.json")
        assert weights.read_bytes() == content
        assert not (tmp_path / "model.json").exists()
    fitted().save(tmp_path / "plan.json")
    fitted().save(tmp_path / "plan.json")  # replaces its own file


def test_both_files_may_move_together(tmp_path):
    (tmp_path / "a").mkdir()
    fitted().save(tmp_path / "a" / "plan.json")
    (tmp_path / "a").rename(tmp_path / "b")
    assert Plan.load(tmp_path / "b" / "plan.json") == fitted()


def test_missing_matrices_are_named(tmp_path):
    fitted().save(tmp_path / "plan.json")
    (tmp_path / "plan.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"projections: expected the plan's matrices in .*plan.safetensors"):
        Plan.load(tmp_path / "plan.json")


def test_matrices_of_another_plan_are_refused(tmp_path):
    fitted().save(tmp_path / "plan.json")
    file = tmp_path / "plan.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file)
    with pytest.raises(ValueError, match=r"plan.json: projections: expected plan.safetensors with SHA-256 \w+, .* got"):
        Plan.load(tmp_path / "plan.json")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"file": "../plan.safetensors"}, "projections: expected a file beside the plan and its SHA-256, got '../plan"),
        ({"file": None}, "projections: expected a file beside the plan"),
        ({"file": None, "sha256": None}, "projections: expected a plan file that Plan.save wrote"),
        (
            {"losses": 3},
            "of a fit, got ValueError('losses: expected a list, got 3')",
        ),
        ({"tokens": None}, "projections: expected what Plan.save writes of a fit"),
    ],
)
def test_a_malformed_plan_file_is_named(tmp_path, change, text):
    fitted().save(tmp_path / "plan.json")
    members = json.loads((tmp_path / "plan.json").read_text())
    members["projections"].update(change)
    (tmp_path / "plan.json").write_text(json.dumps(members))
    with pytest.raises(ValueError, match="plan.json: projections: expected") as error:
        Plan.load(tmp_path / "plan.json")
    assert text in str(error.value)


def test_json_text_without_matrices_is_refused():
    text = fitted().to_json()
    assert json.loads(text)["projections"]["sequences"] == 14
    with pytest.raises(ValueError, match="projections: expected a plan file that Plan.save wrote, with its matrices"):
        Plan.from_json(text)


def test_a_plan_is_not_saved_over_its_own_matrices(tmp_path):
    with pytest.raises(ValueError, match=r"path: expected another ending than .safetensors for a plan"):
        fitted().save(tmp_path / "plan.safetensors")
    assert not list(tmp_path.iterdir())


# Values


def test_plans_are_equal_if_their_matrices_are():
    plan = fitted()
    matrix = plan.projections.matrices[4]
    assert plan == with_matrices(plan)
    assert hash(plan) == hash(with_matrices(plan))
    assert plan != with_matrices(plan, matrices={4: matrix + 1e-6})
    assert plan != plan.replace(projections=None)
    assert plan.replace(projections=None) == plan_of(shared("llama"), GAPS, 2)
    halved = Projections(
        {k: m.half() for k, m in plan.projections.matrices.items()}, plan.projections.samples, plan.projections.report
    )
    assert plan != plan.replace(projections=halved)
    assert len({plan, with_matrices(plan), plan.replace(projections=None)}) == 2


def test_a_repr_says_that_a_plan_is_fitted():
    assert repr(fitted()).endswith(
        f", projections=<3 fitted matrices [256, 96], lambda {fitted().projections.report.ridge:g}>)"
    )
    assert "projections" not in repr(fitted().replace(projections=None))


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, lambda plan: pickle.loads(pickle.dumps(plan))])
def test_a_copied_plan_keeps_its_fit(way):
    twin = way(fitted())
    assert twin == fitted()
    assert twin.projections.report == fitted().projections.report
    assert twin.origin == fitted().origin


def test_replace_keeps_the_fit_unless_the_layers_change():
    plan = fitted()
    assert plan.replace(boundary=32, min_tokens=64).projections is plan.projections
    assert plan.replace(boundary=32).origin == plan.origin
    assert plan.replace(omit=GAPS[::-1]).projections is plan.projections
    assert plan.replace(omit=(3, 4)).projections is None
    assert plan.replace(num_layers=7).projections is None
    assert plan.replace(omit=(3, 4)).origin == Origin(config_hash=plan.origin.config_hash)
    bare = plan.replace(projections=None)
    assert (bare.origin.fit, bare.origin.fit_samples) == (None, None)
    assert bare.origin.config_hash == plan.origin.config_hash


def test_projections_must_match_the_omitted_layers():
    fit = fitted().projections
    with pytest.raises(
        ValueError, match=r"projections: expected matrices of layers \(4, 5\), those of omit, got \(1, 3"
    ):
        Plan(6, (4, 5), projections=fit)
    with pytest.raises(TypeError, match="projections: expected what pop_ext.fit makes, got dict"):
        Plan(6, GAPS, projections=dict(fit.matrices))


@pytest.mark.parametrize(
    "matrices",
    [
        {},
        {1: torch.ones(2)},
        {1: torch.ones(2, 3), 2: torch.ones(2, 4)},
        {1: torch.ones(2, 3), 2: torch.ones(2, 3).half()},
        {1: torch.ones(2, 3).long()},
    ],
)
def test_matrices_must_share_shape_and_dtype(matrices):
    with pytest.raises(ValueError, match="projections: expected matrices"):
        Projections(matrices, {layer: torch.ones(1) for layer in matrices}, FitReport(0.1, 1, 1))


# Models


def test_a_fit_serves_the_same_weights_in_another_dtype():
    plan, model = fitted(), llama(dtype=torch.bfloat16)
    native = pop_ext.load(model, plan)
    assert native.dtype == torch.bfloat16
    exact = run_native(shared("llama"), plan, tokens(model, 1, 20)).logits
    plain = run_native(shared("llama"), plan.replace(projections=None), tokens(model, 1, 20)).logits
    found = native.prefill(tokens(model, 1, 20)).logits.float()
    assert (found - exact).norm() < 0.3 * (plain - exact).norm()


def change_a_key_of_an_omitted_layer(model):
    model.model.layers[3].self_attn.k_proj.weight.data.mul_(1.001)


def assign_other_values(model):
    linear = model.model.layers[1].self_attn.v_proj
    linear.weight = nn.Parameter(linear.weight.detach() * 1.01)


def change_the_norm(model):
    model.model.layers[4].input_layernorm.weight.data.add_(0.01)


CHANGES = [change_a_key_of_an_omitted_layer, assign_other_values, change_the_norm]
TEXT = "plan.projections: expected a fit on the weights that the model has, got one on others"


@pytest.mark.parametrize("change", CHANGES)
def test_a_fit_on_other_weights_is_refused(change):
    model = llama()
    change(model)
    ids = tokens(model, 1, 9)
    for call in (
        lambda: pop_ext.load(model, fitted()),
        lambda: pop_ext.enable(model, fitted()),
        lambda: pop_ext.enable(model, fitted(), backend="reference"),
        lambda: reference.prefill(model, ids, fitted()),
    ):
        with pytest.raises(FitMismatch, match=TEXT):
            call()
    assert "forward" not in model.__dict__


@pytest.mark.parametrize("change", CHANGES)
def test_refresh_after_changing_fitted_weights_raises_fit_mismatch(change):
    model = llama()
    native, ids = pop_ext.load(model, fitted()), tokens(model, 1, 12)
    before, handle = native.prefill(ids).logits, native.handle
    saved = copy.deepcopy(model.state_dict())
    change(model)
    with pytest.raises(RuntimeError, match=r"weight layers.\d.\w+: expected .*native.refresh\(\)"):
        native.prefill(ids)
    with pytest.raises(FitMismatch, match=TEXT):
        native.refresh()
    assert native.handle == handle
    model.load_state_dict(saved)
    native.refresh()
    assert torch.equal(native.prefill(ids).logits, before)


@pytest.mark.parametrize("backend", ["native", "reference"])
@torch.no_grad()
def test_a_model_changed_after_its_fit_runs_the_stock_forward(backend):
    model, ids = llama(), tokens(llama(), 1, 12)
    pop_ext.enable(model, fitted(), backend=backend)
    model(ids, logits_to_keep=1)
    assert pop_ext.last_call(model).backend == backend
    change_a_key_of_an_omitted_layer(model)
    with pytest.warns(UserWarning, match=f"the stock forward runs: {TEXT}"):
        ours = model(ids, logits_to_keep=1).logits
    assert pop_ext.last_call(model).rule == "model"
    assert torch.equal(ours, pop_ext.disable(model)(ids, logits_to_keep=1).logits)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pop_ext.enable(model, fitted().replace(projections=None), strict=True, backend=backend)
        model(ids, logits_to_keep=1)


def test_weights_outside_the_fit_may_change():
    model = llama()
    native, ids = pop_ext.load(model, fitted()), tokens(model, 1, 12)
    model.model.layers[0].mlp.up_proj.weight.data = 1.1 * model.model.layers[0].mlp.up_proj.weight.data
    native.refresh()
    assert_equals_oracle(model, fitted(), ids)


def test_a_fit_of_another_shape_is_refused():
    model = llama(kv_heads=1)
    plan = fitted().replace(origin=None)
    with pytest.raises(
        FitMismatch, match=r"plan.projections: expected a matrix \[128, 96\] for layer 1 .* \[256, 96\]"
    ):
        pop_ext.load(model, plan)
    with pytest.raises(ValueError, match="plan: expected one made with a model of config hash"):
        pop_ext.load(model, fitted())


@torch.no_grad()
def test_a_fitted_model_and_its_copies_equal_the_oracle():
    model, ids = llama(), tokens(llama(), 2, 25)
    pop_ext.enable(model, fitted(), strict=True)
    ours = model(ids, logits_to_keep=1).logits
    theirs, _ = reference.prefill(model, ids, fitted())
    assert_close_fp32(ours, theirs, "logits")
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(ids, logits_to_keep=1).logits, ours)
    plain = pop_ext.enable(model, fitted().replace(projections=None))(ids, logits_to_keep=1).logits
    assert not torch.allclose(plain, ours, atol=1e-2)


def test_a_fit_needs_no_extra_memory():
    model = shared("llama")
    plain = pop_ext.load(model, fitted().replace(projections=None))
    assert pop_ext.load(model, fitted()).extra_bytes == plain.extra_bytes
