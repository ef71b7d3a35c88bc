"""Files of pop_ext.importance: save, load, resume, and refusal of files of another run or model."""

from __future__ import annotations

import json

import pop_ext
import pytest
import torch
from models import FAMILIES, shared, uneven_batches
from pop_ext.methods.importance import Importance


def test_load_returns_what_save_wrote(tmp_path):
    model = shared("llama")
    for count, branches in ((8, True), (1, False)):
        found = pop_ext.importance(model, [torch.cat(uneven_batches(model))[:count]], branches=branches)
        found.save(tmp_path / "importance.json")
        loaded = Importance.load(tmp_path / "importance.json")
        assert repr(loaded) == repr(found)  # by repr, because NaN, the error of a single sample, does not equal itself
        assert "NaN" not in (tmp_path / "importance.json").read_text()
    assert loaded.origin.config_hash is not None
    assert [path.name for path in tmp_path.iterdir()] == ["importance.json"]


class Stop(Exception):
    pass


def stopping_after(given, count):
    yield from given[:count]
    raise Stop


@pytest.mark.parametrize("after", [1, 2])
@pytest.mark.parametrize("regrouped", [False, True])
def test_a_stopped_run_resumes_where_it_stopped(tmp_path, after, regrouped):
    model = shared("llama")
    given, path = uneven_batches(model), tmp_path / "importance.json"
    whole = pop_ext.importance(model, given, branches=True)
    with pytest.raises(Stop):
        pop_ext.importance(model, stopping_after(given, after), branches=True, resume=path)
    assert Importance.load(path).samples == sum(len(ids) for ids in given[:after])
    again = list(torch.cat(given).split(2)) if regrouped else given
    rows = []
    hook = model.model.layers[0].register_forward_hook(lambda m, args, out: rows.append(len(out)))
    resumed = pop_ext.importance(model, again, branches=True, resume=path)
    hook.remove()
    assert sum(rows) == 8 - sum(len(ids) for ids in given[:after])  # samples in the file are not computed again
    for kind, scores in whole.gates().items():
        for values, expected in zip(vars(resumed.gates()[kind]).values(), vars(scores).values(), strict=True):
            assert values == pytest.approx(expected, rel=1e-4, abs=1e-9)
    assert (resumed.digest, resumed.samples) == (whole.digest, 8)
    finished = path.read_bytes()
    assert pop_ext.importance(model, again, branches=True, resume=path) == Importance.load(path)
    assert path.read_bytes() == finished


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (dict(seed=1), "resume: expected seed 1 in PATH, got 0"),
        (dict(continuation=4), "resume: expected continuation 4 in PATH, got None"),
        (dict(branches=True), r"resume: expected gates ('layer', 'attention', 'mlp') in PATH, got ('layer',)"),
        (dict(others=True), "resume: expected batches to begin with the 8 sequences of the file, got other sequences"),
        (dict(fewer=True), "resume: expected batches to begin with the 8 sequences of the file, got 3"),
    ],
    ids=["seed", "continuation", "gates", "other sequences", "fewer sequences"],
)
def test_resume_refuses_and_keeps_files_of_other_runs(tmp_path, change, text):
    model, path = shared("llama"), tmp_path / "importance.json"
    pop_ext.importance(model, uneven_batches(model), resume=path)
    before = path.read_bytes()
    given = uneven_batches(model)
    if change.pop("others", False):
        given[1] = given[1] + 1
    if change.pop("fewer", False):
        given = given[:1]
    with pytest.raises(ValueError, match="resume") as error:
        pop_ext.importance(model, given, resume=path, **change)
    assert str(error.value) == text.replace("PATH", str(path))
    assert path.read_bytes() == before


def test_resume_refuses_a_file_of_another_model(tmp_path):
    path = tmp_path / "importance.json"
    pop_ext.importance(shared("llama"), uneven_batches(shared("llama")), resume=path)
    other = FAMILIES["llama"](intermediate=128)
    with pytest.raises(ValueError, match="expected one made with a model of config hash"):
        pop_ext.importance(other, uneven_batches(other), resume=path)


def test_resume_refuses_a_file_of_other_weights(tmp_path):
    path, model = tmp_path / "importance.json", FAMILIES["llama"]()
    pop_ext.importance(model, uneven_batches(model), resume=path)
    before = path.read_bytes()
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.mul_(1.01)
    with pytest.raises(ValueError, match="resume: expected weights '.*' in .*importance.json, got '"):
        pop_ext.importance(model, uneven_batches(model), resume=path)
    assert path.read_bytes() == before


def test_resume_refuses_a_file_of_another_dtype(tmp_path):
    path, model = tmp_path / "importance.json", FAMILIES["llama"]()
    pop_ext.importance(model, uneven_batches(model), resume=path)
    with pytest.raises(ValueError, match=r"expected weights '\w+ bfloat16' in .*, got '\w+ float32"):
        pop_ext.importance(model.to(torch.bfloat16), uneven_batches(model), resume=path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"gates": {"layer": {"prefill": 3}}}'])
def test_load_refuses_other_files_by_name(tmp_path, text):
    path = tmp_path / "importance.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"importance.json: expected an importance as Importance.save writes it"):
        Importance.load(path)


def test_the_file_holds_model_and_number_of_samples(tmp_path):
    found = pop_ext.importance(shared("llama"), uneven_batches(shared("llama")), branches=True)
    found.save(tmp_path / "importance.json")
    members = json.loads((tmp_path / "importance.json").read_text())
    assert members["origin"]["samples"] == 8
    assert members["origin"]["config_hash"] == found.origin.config_hash
    assert set(members["gates"]) == {"layer", "attention", "mlp"}
