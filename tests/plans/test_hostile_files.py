"""Files that are no plan, card, importance or evaluation: a ValueError or OSError that names the path, soon."""

from __future__ import annotations

import hashlib
import json
import tracemalloc

import pop_ext
import pytest
import torch
from models import shared
from pop_ext import Plan
from pop_ext.evaluation import Evaluation
from pop_ext.methods.importance import Importance
from pop_ext.plans.folder import CARD_FILE, PLAN_FILE
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
