"""pop_ext.fit(method="distill"): the trained logits against the oracle, gradients, and what training changes."""

from __future__ import annotations

import copy
import inspect
import math
from pathlib import Path

import pop_ext
import pytest
import torch
from against_oracle import GAPS, LAST, NATIVE, assert_equals_oracle, plan_of
from models import FAMILIES, batches, shared, tokens
from pop_ext import reference
from pop_ext.methods import distill
from pop_ext.methods.calibration import stock_evaluation
from pop_ext.methods.distill import HeldOut, Judgement, Trainer, Training, judge, kl_per_row
from pop_ext.methods.fit_arguments import hold_out_tasks
from pop_ext.methods.student import Student, record_examples
from pop_ext.plans.projections import FitReport, Projections
from tolerance import assert_close_fp32
from transformers import AutoModelForCausalLM, AutoTokenizer

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo_model"
STEPS = 24


def tasks(model, count=9, prompt=20, answer=3, seed=90):
    rows = tokens(model, count, prompt + answer, seed=seed)
    return [(row[:prompt], row[prompt:]) for row in rows]


def distilled(model, plan, **more):
    """Fit on random tokens, some of which also judge, because what is learnt from them helps on no others."""
    seen = batches(model, count=8)
    options = {"method": "distill", "lambdas": [0.1], "steps": STEPS, "learning_rate": 3e-3, "holdout": seen[:2]}
    return pop_ext.fit(model, plan, seen, **{**options, **more})


def any_matrices(model, plan):
    """Return fitted matrices that differ from the original ones."""
    return pop_ext.fit(model, plan, batches(model), lambdas=[0.1]).projections


# The student


def example_of(student, ids, answer=0):
    (example,) = record_examples(student.model, [student], ids, answer)
    return example


@pytest.mark.parametrize("omit", [LAST, GAPS, (0,), (0, 2, 4)])
@pytest.mark.parametrize("family", NATIVE)
@torch.no_grad()
def test_the_student_equals_the_oracle(family, omit):
    model = shared(family)
    plan = plan_of(model, omit, 2)
    fitted = any_matrices(model, plan)
    ids = tokens(model, 3, 33, seed=5)
    with stock_evaluation(model):
        student = Student(model, plan)
        ours = student.logits(example_of(student, ids), 25, 8, fitted.matrices)
        few = Student(model, plan, torch.tensor([3, 50, 7]))
        narrow = few.logits(example_of(few, ids), 25, 8, fitted.matrices)
    oracle, _ = reference.prefill(model, ids[:, :-1], plan.replace(projections=fitted), 8, boundary=2 - 1 + 8)
    assert_close_fp32(ours, oracle, "logits")
    assert_close_fp32(narrow, oracle[..., [3, 50, 7]], "logits of three ids")


@pytest.mark.parametrize("family", NATIVE)
@torch.no_grad()
def test_the_teacher_equals_the_full_model(family):
    model = shared(family)
    ids = tokens(model, 2, 33, seed=6)
    with stock_evaluation(model):
        student = Student(model, plan_of(model, LAST))
        example = example_of(student, ids)
        assert example.final.shape[1] < 33  # no more rows than a split can ask for
        ours = student.teacher_logits(example, 24, 8)
        full = model(ids).logits
    assert_close_fp32(ours, full[:, 24:32], "logits")


@pytest.mark.parametrize("omit", [LAST, GAPS])
def test_gradients_equal_finite_differences(omit):
    model = shared("qwen3")  # with k_norm
    plan = plan_of(model, omit)
    ids = tokens(model, 2, 24, seed=7)
    with stock_evaluation(model):
        student = Student(model, plan)
        example = example_of(student, ids)
        training = Training(steps=8, learning_rate=1e-3, seed=0)
        trainer = Trainer(student, any_matrices(model, plan).matrices, [[example]], training)

        def loss():
            rows = example.rows
            return kl_per_row(
                student.teacher_logits(example, 15, rows), student.logits(example, 16, rows, trainer.matrices)
            ).mean()

        loss().backward()
        for layer, matrix in trainer.matrices.items():
            direction = matrix.grad / matrix.grad.norm()
            assert matrix.grad.norm() > 0, layer
            with torch.no_grad():
                sides = []
                for sign in (1, -1):
                    matrix += sign * 0.02 * direction
                    sides.append(float(loss()))
                    matrix -= sign * 0.02 * direction
            assert (sides[0] - sides[1]) / 0.04 == pytest.approx(float(matrix.grad.norm()), rel=0.02), layer
    assert all(parameter.grad is None for parameter in model.parameters())


# Training


@pytest.mark.parametrize("omit", [LAST, GAPS])
def test_training_lowers_the_divergence_that_it_trains_on(omit):
    model = shared("llama")
    seen = batches(model, count=8)
    plan = distilled(model, plan_of(model, omit, 2))
    report = plan.projections.report
    first, best = report.training[0], min(report.training, key=lambda row: row[1])
    assert first[0] == 0
    assert best[1] < 0.9 * first[1]
    assert report.method == "distill"
    assert report.steps == best[0] > 0
    assert plan.origin.fit == report.describe()
    assert f"then {best[0]} steps of KL divergence" in plan.origin.fit
    with stock_evaluation(model):  # the plan holds the matrices that were judged best
        student = Student(model, plan)
        found = judge(student, plan.projections.matrices, [example_of(student, ids) for ids in seen[:2]])
    assert sum(found.kl) / len(found.kl) == pytest.approx(best[1], rel=1e-3)


def test_training_on_text_helps_on_other_text():
    model = AutoModelForCausalLM.from_pretrained(DEMO / "model", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
    files = sorted((DEMO / "heldout").glob("*.txt"))
    ids = [tokenizer(path.read_text(), return_tensors="pt")["input_ids"][0] for path in files]
    *used, other = [row.unfold(0, 128, 128)[:24] for row in ids]
    plan = pop_ext.Plan.last(12, 6)
    fitted = pop_ext.fit(
        model, plan, used, method="distill", holdout=[other], lambdas=[0.1], steps=30, learning_rate=1e-3
    )
    first, best = fitted.projections.report.training[0], fitted.projections.report.training[-1]
    assert best[1] < 0.95 * first[1]


def test_a_distilled_plan_runs_natively_like_the_oracle():
    model = FAMILIES["gemma3"]()
    plan = distilled(model, plan_of(model, GAPS, 3), tasks=tasks(model))
    ids = tokens(model, 2, 29, seed=8)
    assert_equals_oracle(model, plan, ids)


def test_the_model_is_left_as_it_was():
    model = FAMILIES["llama"]()
    before = copy.deepcopy(model.state_dict())
    distilled(model, plan_of(model, LAST), tasks=tasks(model))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert "forward" not in model.model.layers[0].__dict__
    assert "forward" not in model.get_output_embeddings().__dict__


def test_a_training_that_only_harms_keeps_the_ridge():
    model = shared("llama")
    plan = plan_of(model, LAST)
    ridge = pop_ext.fit(model, plan, batches(model, count=8), lambdas=[0.1], holdout=[tokens(model, 2, 40, seed=1)])
    harmed = distilled(model, plan, learning_rate=10.0, holdout=[tokens(model, 2, 40, seed=1)])
    assert harmed.projections.report.steps == 0
    assert harmed.projections == ridge.projections
    judged = [row[0] for row in harmed.projections.report.training]
    assert len(judged) == distill.PATIENCE + 1  # and it ends early


def test_tasks_are_trained_on_and_judged():
    model = shared("llama")
    given = tasks(model, count=9)
    plan = distilled(model, plan_of(model, LAST), tasks=given)
    report = plan.projections.report
    assert report.tasks == 8
    assert len(hold_out_tasks(given)[1]) == 1
    assert hold_out_tasks(given)[1][0] is given[7]
    assert report.training[-1][2] != report.training[0][2]
    assert all(row[3] in (0.0, 1.0) for row in report.training)
    without = distilled(model, plan_of(model, LAST))
    assert without.projections != plan.projections
    assert math.isnan(without.projections.report.training[0][2])


def trainer_of(model, *mixture, **settings):
    plan = plan_of(model, LAST)
    student = Student(model, plan)
    parts = [[example_of(student, ids, answer) for ids, answer in part] for part in mixture]
    training = Training(**{"steps": 8, "learning_rate": 1e-3, "seed": 0, **settings})
    return Trainer(student, any_matrices(model, plan).matrices, parts, training)


def test_a_task_is_split_where_its_answer_begins_and_a_text_anywhere():
    model = shared("llama")
    with stock_evaluation(model):
        trainer = trainer_of(model, [(tokens(model, 2, 40), 0)], [(tokens(model, 2, 23), 3)])
        drawn = [found for _ in range(300) for found in trainer._next()]
    assert {prompt for example, prompt, _ in drawn if example.answer} == {20}
    # 10 of 40 tokens are the continuation.
    assert {prompt for example, prompt, _ in drawn if not example.answer} == set(range(15, 31))


def test_a_step_reads_four_texts_and_four_tasks_whatever_batches_they_come_in():
    model = shared("llama")
    texts = [(row[None], 0) for row in tokens(model, 8, 40, seed=1)]
    answers = (2, 3, 3, 4, 2, 3, 5, 2)
    given = [(tokens(model, 1, 20 + answer, seed=20 + i), answer) for i, answer in enumerate(answers)]
    with stock_evaluation(model):
        trainer = trainer_of(model, texts, given)
        seen = []
        for _ in range(2):
            step = list(trainer._next())
            for part in (0, 1):
                group = [(example, share) for example, _, share in step if bool(example.answer) == bool(part)]
                assert sum(len(example) for example, _ in group) == 4
                assert [share for _, share in group] == [len(example) / 4 for example, _ in group]
                seen += [tuple(ids.tolist()) for example, _ in group for ids in example.ids]
    assert len(set(seen)) == len(seen) == 16  # all of them in a round


def test_a_group_of_unequal_tasks_has_the_mean_of_their_gradients():
    model = shared("llama")
    given = [(tokens(model, 1, 20 + answer, seed=answer), answer) for answer in (2, 3, 4, 5)]
    with stock_evaluation(model):
        trainer = trainer_of(model, given)
        student, matrices = trainer.student, trainer.matrices
        losses = [
            kl_per_row(student.teacher_logits(e, 19, e.answer), student.logits(e, 20, e.answer, matrices)).mean()
            for e in (example_of(student, *one) for one in given)
        ]
        assert trainer.train() == pytest.approx(float(sum(losses)) / 4, rel=1e-5)


def test_masters_are_float32():
    model = FAMILIES["llama"](dtype=torch.bfloat16)
    with stock_evaluation(model):
        trainer = trainer_of(model, [(tokens(model, 4, 40), 0)], learning_rate=1e-6)
        before = {layer: matrix.detach().clone() for layer, matrix in trainer.matrices.items()}
        trainer.train()
    for layer, matrix in trainer.matrices.items():
        assert matrix.dtype == torch.float32
        moved = (matrix - before[layer]).abs().max()  # less than bfloat16 holds
        assert 0 < moved < 1e-5


def test_a_training_that_diverges_is_refused(monkeypatch):
    model = shared("llama")
    train = Trainer.train

    def poisoned(trainer):
        with torch.no_grad():
            next(iter(trainer.matrices.values()))[0, 0] = math.nan
        return train(trainer)

    monkeypatch.setattr(Trainer, "train", poisoned)
    with pytest.raises(ValueError, match="learning_rate: expected one with which the divergence stays finite, got 0"):
        distilled(model, plan_of(model, LAST))


def test_matrices_that_the_dtype_cannot_hold_are_refused():
    model = FAMILIES["llama"](dtype=torch.float16)
    with pytest.raises(ValueError, match="learning_rate: expected one"):
        distilled(model, plan_of(model, LAST), learning_rate=1e4)


def test_the_same_seed_trains_the_same_matrices():
    model = shared("llama")
    first, again, other = (distilled(model, plan_of(model, LAST), seed=seed) for seed in (1, 1, 2))
    assert first.projections == again.projections != other.projections


def test_low_precision_trains_too():
    model = FAMILIES["llama"](dtype=torch.bfloat16)
    plan = distilled(model, plan_of(model, LAST), learning_rate=1e-3)
    report = plan.projections.report
    assert plan.projections.dtype == torch.bfloat16
    assert min(row[1] for row in report.training) < report.training[0][1]


# Resuming


def test_a_stopped_training_goes_on_to_the_same_result(tmp_path, monkeypatch):
    model, plan, path = shared("llama"), plan_of(shared("llama"), LAST), tmp_path / "state.pt"
    whole = distilled(model, plan, tasks=tasks(model))
    taken = []

    def stop(trainer, train=Trainer.train):
        taken.append(trainer.step)
        if len(taken) == STEPS // 2 + 2:
            raise KeyboardInterrupt
        return train(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train", stop)
        with pytest.raises(KeyboardInterrupt):
            distilled(model, plan, tasks=tasks(model), resume=path)
    monkeypatch.setattr(Trainer, "train", lambda self, train=Trainer.train: (taken.append(self.step), train(self))[1])
    taken.clear()
    resumed = distilled(model, plan, tasks=tasks(model), resume=path)
    assert taken == list(range(STEPS // 2, STEPS))  # judged every third step
    assert resumed.projections == whole.projections
    assert resumed.projections.report == whole.projections.report


def test_the_state_of_another_training_is_refused(tmp_path):
    model, path = shared("llama"), tmp_path / "state.pt"
    distilled(model, plan_of(model, LAST), steps=4, resume=path)
    with pytest.raises(ValueError, match=r"resume: expected a training on the same weights.*state\.pt"):
        distilled(model, plan_of(model, LAST), steps=4, seed=5, resume=path)
    missing = tmp_path / "none" / "state.pt"
    with pytest.raises(ValueError, match="resume: expected a file in a folder that exists, got .*none/state.pt"):
        distilled(model, plan_of(model, LAST), steps=4, resume=missing)
    path.write_bytes(b"no state")
    with pytest.raises(ValueError, match=r"resume: expected a state that a training wrote, got .*state\.pt"):
        distilled(model, plan_of(model, LAST), steps=4, resume=path)


@pytest.mark.parametrize("change", ["lm_head", "model.layers.5.mlp.down_proj", "model.layers.0.input_layernorm"])
def test_the_state_of_a_training_on_other_weights_is_refused(change, tmp_path):
    model, path = FAMILIES["llama"](), tmp_path / "state.pt"
    distilled(model, plan_of(model, LAST), steps=4, resume=path)
    with torch.no_grad():
        model.get_submodule(change).weight *= 1.5
    with pytest.raises(ValueError, match="resume: expected a training on the same weights"):
        distilled(model, plan_of(model, LAST), steps=4, resume=path)


@pytest.mark.parametrize("keep", [(), ("trainer",), ("trainer", "best")])
def test_a_state_with_parts_missing_is_refused_with_its_path(keep, tmp_path):
    model, path = shared("llama"), tmp_path / "state.pt"
    distilled(model, plan_of(model, LAST), steps=4, resume=path)
    state = torch.load(path, weights_only=True)
    torch.save({name: state[name] for name in ("digest", *keep)}, path)
    with pytest.raises(ValueError, match=r"resume: expected a whole state of a training, got .*state\.pt \(no member"):
        distilled(model, plan_of(model, LAST), steps=4, resume=path)
    torch.save({**state, "best": {4: torch.zeros(2, 2), 5: torch.zeros(2, 2)}}, path)
    with pytest.raises(ValueError, match=r"resume: .* got .*state\.pt, which holds parts of one"):
        distilled(model, plan_of(model, LAST), steps=4, resume=path)


# Reports and refusals


def test_a_report_survives_its_file(tmp_path):
    model = shared("llama")
    plan = distilled(model, plan_of(model, LAST))
    plan.save(tmp_path / "plan.json")
    found = pop_ext.Plan.load(tmp_path / "plan.json").projections.report
    assert found.to_dict() == plan.projections.report.to_dict()
    assert found.method == "distill"


def test_a_distilled_plan_says_so():
    model = shared("llama")
    plan = distilled(model, plan_of(model, LAST), steps=4)
    steps = plan.projections.report.steps
    assert repr(plan.projections) == f"<2 fitted matrices [256, 96], lambda 0.1, distilled in {steps} steps>"
    assert repr(any_matrices(model, plan)) == "<2 fitted matrices [256, 96], lambda 0.1>"


def test_a_report_of_an_earlier_version_is_of_a_ridge():
    members = FitReport(0.1, 3, 40).to_dict()
    for name in ("method", "tasks", "steps", "training"):
        del members[name]
    assert FitReport.from_dict(members).method == "ridge"


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"method": "adam"}, ValueError, "method: expected one of ridge, distill, got 'adam'"),
        ({"steps": 0}, ValueError, "steps: expected an int >= 1, got 0"),
        ({"steps": 2.0}, TypeError, "steps: expected an int, got float 2.0"),
        ({"seed": -1}, ValueError, "seed: expected an int >= 0, got -1"),
        ({"learning_rate": 0}, ValueError, "learning_rate: expected a finite number > 0, got 0"),
        ({"learning_rate": "1"}, TypeError, "learning_rate: expected a number, got str '1'"),
        (
            {"resume": Path("x"), "method": "ridge", "steps": 120, "learning_rate": 3e-4},
            ValueError,
            "resume: expected None with method=\"ridge\", which does not train, got 'x'",
        ),
        ({"method": "ridge"}, ValueError, 'steps: expected it with method="distill" only, got 2'),
        (
            {"method": "ridge", "steps": 120, "seed": 3, "learning_rate": 3e-4},
            ValueError,
            "seed: expected it with .* 3",
        ),
        ({"tasks": "ab"}, TypeError, r"tasks: expected a sequence of \(prompt, answer\), got str"),
        ({"tasks": [torch.ones(3)]}, TypeError, "tasks: expected a pair of int64 or int32 tensors"),
        (
            {"tasks": [(torch.tensor([1]), torch.tensor([2]))]},
            ValueError,
            r"tasks: expected a prompt \[n\] of more tokens than the boundary 1 .*got \[1\] and \[1\] in task 0",
        ),
        (
            {"tasks": [(torch.tensor([1, 2]), torch.tensor([2_000_000]))]},
            ValueError,
            "tasks: expected ids from 0 to .*, got 2000000 in task 0",
        ),
    ],
)
def test_bad_arguments_are_named(arguments, error, text):
    model = shared("llama")
    with pytest.raises(error, match=text):
        distilled(model, plan_of(model, LAST), **{"steps": 2, **arguments})


def test_sequences_that_the_boundary_covers_are_refused():
    model = shared("llama")
    with pytest.raises(ValueError, match="holdout: expected sequences longer than the boundary 40"):
        distilled(model, plan_of(model, LAST, 40))


def test_judgements_choose_by_text_and_tasks():
    both = Judgement.of(3, HeldOut(kl=[0.1, 0.3], task_kl=[1.0], exact=[1.0]))
    assert both.divergence == pytest.approx(1.2)
    assert str(both) == "after 3 steps: held-out KL 0.2000, of tasks 1.0000, exact 1.00"
    assert Judgement.of(0, HeldOut(kl=[0.5])).divergence == 0.5
    assert math.isnan(Judgement.of(0, HeldOut(kl=[math.nan])).divergence)
    assert math.isnan(Judgement.of(0, HeldOut(kl=[0.5], task_kl=[math.nan], exact=[0.0])).divergence)


def test_the_command_line_has_the_defaults_of_the_function():
    from pop_ext.cli import fit as command

    defaults = {name: one.default for name, one in inspect.signature(pop_ext.fit).parameters.items()}
    assert (defaults["steps"], defaults["learning_rate"]) == (command.STEPS, command.LEARNING_RATE)


def test_projections_of_the_result_are_checked_like_any(tmp_path):
    model = shared("llama")
    plan = distilled(model, plan_of(model, LAST), steps=2)
    assert isinstance(plan.projections, Projections)
    other = FAMILIES["llama"](seed=3)
    with pytest.raises(ValueError, match="expected a fit on the weights that the model has"):
        pop_ext.load(other, plan)
