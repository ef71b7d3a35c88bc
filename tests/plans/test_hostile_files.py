"""Files that are no plan, card, importance or evaluation: a ValueError or OSError that names the path, soon."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import tracemalloc

import pop_ext
import pytest
import torch
from models import shared
from pop_ext import Plan
from pop_ext.evaluation import Evaluation
from pop_ext.methods.importance import GateScores, Importance
from pop_ext.plans.folder import CARD_FILE, PLAN_FILE
from pop_ext.plans.origin import Origin
from pop_ext.utils.files import read_own_text

BROKEN = {
    "empty": b"",
    "latin-1": '{"num_layers": 3, "omit": [1], "origin": {"model": "café"}}'.encode("latin-1"),
    "truncated": b'{"num_layers": 3, "omi',
    "nested": b"[" * 100_000,
    "list": b"[]",
    "word": b"null",
    "binary": bytes(range(256)),
}
READERS = {"plan": Plan.load, "importance": Importance.load, "evaluation": Evaluation.load}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("content", BROKEN)
def test_a_broken_file_is_refused_by_its_path(reader, content, tmp_path):
    path = tmp_path / "file.json"
    path.write_bytes(BROKEN[content])
    with pytest.raises(ValueError, match="expected") as error:
        READERS[reader](path)
    assert str(error.value).startswith(f"{path}: ")
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("content", BROKEN)
def test_a_broken_card_is_refused_by_its_path(content, tmp_path):
    Plan(3, (1,)).save(tmp_path / PLAN_FILE)
    (tmp_path / CARD_FILE).write_bytes(BROKEN[content])
    with pytest.raises(ValueError, match="expected") as error:
        Plan.from_pretrained(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / CARD_FILE}: ")


@pytest.mark.parametrize("reader", ["plan", "importance"])
def test_a_device_without_an_end_is_read_up_to_a_limit(reader):
    with pytest.raises(ValueError, match="^/dev/zero: .*expected a file of at most 16777216 bytes, got more"):
        READERS[reader]("/dev/zero")


@pytest.mark.parametrize("reader", READERS)
def test_a_folder_is_no_file(reader, tmp_path):
    with pytest.raises(IsADirectoryError, match=str(tmp_path)):
        READERS[reader](tmp_path)


@pytest.fixture
def pipe(tmp_path):
    """Return the path of a pipe that nobody writes to."""
    path = tmp_path / "pipe.json"
    os.mkfifo(path)
    return path


@pytest.mark.timeout(60)
@pytest.mark.parametrize("reader", READERS)
def test_a_pipe_is_refused_instead_of_waited_for(reader, pipe):
    with pytest.raises(ValueError, match=r"expected a file, got a pipe") as error:
        READERS[reader](pipe)
    assert str(error.value).startswith(f"{pipe}: ")


@pytest.mark.timeout(60)
def test_fits_and_importances_do_not_resume_from_a_pipe(pipe):
    model, batches = shared("llama"), [torch.arange(40)[None] + n for n in range(3)]
    with pytest.raises(ValueError, match="expected a file, got a pipe"):
        pop_ext.importance(model, batches, resume=pipe)
    with pytest.raises(ValueError, match=f"^resume: expected a state that a training wrote, got {pipe}, which is no"):
        pop_ext.fit(model, Plan(6, (4, 5)), batches, method="distill", steps=1, resume=pipe)


def test_a_prompt_may_come_through_a_pipe(pipe):
    writer = threading.Thread(target=pipe.write_text, args=("a prompt",))
    writer.start()
    assert read_own_text(pipe) == "a prompt"
    writer.join()


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="Linux alone has this file")
@pytest.mark.parametrize("reader", READERS)
def test_an_error_while_reading_names_the_path(reader):
    with pytest.raises(OSError, match="/proc/self/mem"):
        READERS[reader]("/proc/self/mem")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda members: members.update(colour=1), "importance: 'colour': expected no such member, got 1"),
        (lambda members: members["gates"].update(heads={}), "gates: 'heads': expected no such member"),
        (lambda members: members["origin"].update(config_hsh="0"), "origin: 'config_hsh': expected no such member"),
        (lambda members: members.pop("seed"), "no member 'seed'"),
        (lambda members: members.update(seed={}), "seed: expected an integer of at least 0, got {}"),
        (lambda members: members.update(continuation=[[]]), "continuation: expected an integer of at least 1, got"),
        (lambda members: members.update(digest=3), "digest: expected a text, got 3"),
        (lambda members: members.update(weights=[]), "weights: expected a text"),
    ],
)
def test_unknown_and_missing_members_of_an_importance_are_named(change, text, tmp_path):
    path, scores = tmp_path / "importance.json", GateScores(*[(1.0, 2.0)] * 4)
    Importance(scores, None, None, Origin(samples=2), None, 0, "", "").save(path)
    assert Importance.load(path).samples == 2
    members = json.loads(path.read_text())
    change(members)
    path.write_text(json.dumps(members))
    with pytest.raises(ValueError, match=text):
        Importance.load(path)


@pytest.fixture(scope="module")
def fitted():
    return pop_ext.fit(shared("llama"), Plan(6, (2, 4, 5)), [torch.arange(40)[None]], lambdas=[1.0])


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "expected a safetensors file, got plan.safetensors"),
        (b"\xff" * 64, "expected a safetensors file, got plan.safetensors"),
        (b"\x02\x00\x00\x00\x00\x00\x00\x00{}", "expected layers.2.kv in plan.safetensors, got none"),
    ],
)
def test_matrices_that_are_no_safetensors_are_refused_by_the_plans_path(fitted, tmp_path, content, text):
    fitted.save(tmp_path / "plan.json")
    (tmp_path / "plan.safetensors").write_bytes(content)
    members = json.loads((tmp_path / "plan.json").read_text())
    members["projections"]["sha256"] = hashlib.sha256(content).hexdigest()
    (tmp_path / "plan.json").write_text(json.dumps(members))
    with pytest.raises(ValueError, match="projections") as error:
        Plan.load(tmp_path / "plan.json")
    assert str(error.value).startswith(f"{tmp_path / 'plan.json'}: projections: {text}")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda members: members.update(ridg=1.0), "projections: 'ridg': expected no such member, got 1.0"),
        (
            lambda members: members.pop("ridge"),
            "projections: expected what Plan.save writes of a fit, got no member 'ridge'",
        ),
    ],
)
def test_unknown_and_missing_members_of_a_fit_are_named(fitted, tmp_path, change, text):
    path = tmp_path / "plan.json"
    fitted.save(path)
    members = json.loads(path.read_text())
    change(members["projections"])
    path.write_text(json.dumps(members))
    with pytest.raises(ValueError, match="projections") as error:
        Plan.load(path)
    assert str(error.value) == f"{path}: {text}"


WRONG_MEMBERS = {
    "method": [{"a": 1}, 3],
    "weighting": [[[]], None],
    "sequences": [1.5, "3", True, -1, 2**60],
    "holdout": [-1e308, None],
    "condition": ["", [None, "x"], 3],
    "residuals": [{"1": "x"}, {"1": [1, 2]}, {"x": [1, 2, 3, 4]}, []],
    "losses": [[[1, 2]], [3]],
    "training": [[[1.5, 0, 0, 0]]],
    "ridge": [[], "1"],
}


@pytest.mark.parametrize("member", WRONG_MEMBERS)
def test_members_of_a_fit_of_a_wrong_type_are_refused_when_the_file_is_read(fitted, tmp_path, member):
    path = tmp_path / "plan.json"
    fitted.save(path)
    members = json.loads(path.read_text())
    for value in WRONG_MEMBERS[member]:
        path.write_text(json.dumps({**members, "projections": {**members["projections"], member: value}}))
        with pytest.raises(ValueError, match="projections: expected what Plan.save writes of a fit") as error:
            Plan.load(path)
        assert str(error.value).startswith(f"{path}: ")


def test_missing_matrices_are_named_after_the_path_of_the_plan(fitted, tmp_path):
    path = tmp_path / "plan.json"
    fitted.save(path)
    (tmp_path / "plan.safetensors").unlink()
    with pytest.raises(FileNotFoundError) as error:
        Plan.load(path)
    assert (
        str(error.value) == f"{path}: projections: expected the plan's matrices in plan.safetensors, got no such file"
    )


@pytest.mark.parametrize("name", ["../plan.safetensors", "/dev/zero", "", ".", "a/b"])
def test_matrices_outside_the_folder_are_refused(fitted, tmp_path, name):
    fitted.save(tmp_path / "plan.json")
    members = json.loads((tmp_path / "plan.json").read_text())
    members["projections"]["file"] = name
    (tmp_path / "plan.json").write_text(json.dumps(members))
    with pytest.raises(ValueError, match=r"plan\.json: projections: expected"):
        Plan.load(tmp_path / "plan.json")


def test_matrices_are_no_device(fitted, tmp_path):
    fitted.save(tmp_path / "plan.json")
    (tmp_path / "plan.safetensors").unlink()
    (tmp_path / "plan.safetensors").symlink_to("/dev/zero")
    with pytest.raises(ValueError, match="expected the plan's matrices in a file, got plan.safetensors, which is none"):
        Plan.load(tmp_path / "plan.json")


def test_texts_are_read_with_unix_ends_of_lines_and_little_memory(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"one\r\ntwo\rthree\n\xc3\xa9")
    tracemalloc.start()
    assert read_own_text(path) == "one\ntwo\nthree\né" == path.read_text(encoding="utf-8")
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()
