"""Plan folders: written and read again, downloaded and uploaded, broken; cards as JSON and as markdown."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from types import SimpleNamespace

import huggingface_hub
import pop_ext
import pytest
import torch
from models import shared
from pop_ext import Plan, PlanCard
from pop_ext.plans.card import CardQuality, CardSpeed, CardText
from pop_ext.plans.card_markdown import render
from pop_ext.plans.origin import Origin

PLAN = Plan(6, (2, 4, 5), boundary=3, min_tokens=7, origin=Origin("someone/model", "ab" * 8, "by hand"))
CARD = PlanCard(
    num_layers=6,
    omit=(2, 4, 5),
    boundary=3,
    model="someone/model",
    config_hash="ab" * 8,
    weights_hash="cd" * 8,
    texts=(
        CardText("a.txt", "0" * 64, 1234, "calibration", "CC0-1.0"),
        CardText("b|c.txt", "1" * 64, 56, "held-out"),
    ),
    quality=(
        CardQuality("loss", 0.0123, 0.0045, "nats a token", 48),
        CardQuality("recall drop", 0.25, None, "share of answers", 12),
    ),
    speed=(CardSpeed(1024, 1.437, "native full prefill", "two cores, bfloat16"),),
    asked={"max_loss": 0.02},
    versions={"torch": "2.0"},
    created="2031-02-03",
)


@pytest.fixture(scope="module")
def fitted():
    return pop_ext.fit(shared("llama"), Plan(6, (2, 4, 5)), [torch.arange(40)[None]], lambdas=[1.0])


def test_a_plan_and_its_card_come_back_from_a_folder(tmp_path):
    PLAN.save_pretrained(tmp_path / "new" / "folder", card=CARD)
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == [
        "README.md",
        "card.json",
        "plan.json",
    ]
    found = Plan.from_pretrained(tmp_path / "new" / "folder")
    assert (found, found.origin, found.card) == (PLAN, PLAN.origin, CARD)


def test_a_fitted_plan_comes_back_with_its_matrices(fitted, tmp_path):
    fitted.save_pretrained(str(tmp_path))
    assert (tmp_path / "plan.safetensors").is_file()
    found = Plan.from_pretrained(str(tmp_path))
    assert found == fitted
    assert found.card.fit == fitted.origin.fit
    assert found.card.quality == ()


def test_a_plan_without_a_fit_leaves_no_matrices_of_the_one_before(fitted, tmp_path):
    fitted.save_pretrained(tmp_path)
    PLAN.save_pretrained(tmp_path)
    assert not (tmp_path / "plan.safetensors").exists()
    assert Plan.from_pretrained(tmp_path).projections is None


def test_a_place_that_no_folder_can_be_made_in_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match=r"^folder: expected a folder.*/file/new, where .*file is a file"):
        PLAN.save_pretrained(f"{tmp_path}/file/new")


def test_a_plan_is_found_in_the_sub_folder_of_a_checkpoint(tmp_path):
    PLAN.save_pretrained(tmp_path / "pop_ext", card=CARD)
    assert Plan.from_pretrained(tmp_path).card == CARD


def test_the_folder_of_a_checkpoint_itself_is_refused(fitted, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    text = rf"expected a folder without a config\.json, .* enable finds a plan in {tmp_path}/pop_ext"
    for call in (PLAN.save_pretrained, fitted.save_pretrained):
        with pytest.raises(ValueError, match=f"folder: {text}"):
            call(tmp_path)
    with pytest.raises(ValueError, match=f"path: {text}"):
        fitted.save(tmp_path / "plan.json")
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    PLAN.save(tmp_path / "plan.json")  # no matrices
    fitted.save_pretrained(tmp_path / "pop_ext")


def test_a_source_that_is_no_folder_is_named_without_the_hub(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    PLAN.save(tmp_path / "plan.json")
    with pytest.raises(ValueError, match=r"source: expected a folder .* got the file .*plan\.json, which Plan\.load"):
        Plan.from_pretrained(tmp_path / "plan.json")
    for missing in (tmp_path / "none", "./none", "some/where/else", "none/"):
        with pytest.raises(FileNotFoundError, match="source: expected a folder .* got no folder .*"):
            Plan.from_pretrained(missing)


def test_what_the_hub_refuses_is_said_with_the_source(monkeypatch):
    def refuse(*_, **__):
        raise ConnectionError("offline\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    text = r"source: expected a folder .* got 'missing_folder', which is no folder, .*\(ConnectionError: offline\)$"
    with pytest.raises(OSError, match=text):
        Plan.from_pretrained("missing_folder")


def test_a_folder_without_a_card_gives_a_plan_without_one(tmp_path):
    PLAN.save(tmp_path / "plan.json")
    found = Plan.from_pretrained(tmp_path)
    assert found == PLAN
    assert found.card is None


def test_a_saved_plan_without_a_card_says_that_nothing_was_measured(tmp_path):
    PLAN.save_pretrained(tmp_path)
    assert "**Not measured.**" in (tmp_path / "README.md").read_text()
    card = Plan.from_pretrained(tmp_path).card
    assert (card.model, card.config_hash, card.quality) == ("someone/model", "ab" * 8, ())
    assert card.versions["torch"] == torch.__version__


def test_a_card_names_no_folder_of_the_machine(tmp_path):
    plan = Plan(6, (1,), origin=Origin(str(tmp_path / "my-model")))
    assert PlanCard.of(plan).model == "my-model"
    plan.save_pretrained(tmp_path / "plan")
    assert Plan.from_pretrained(tmp_path / "plan").origin.model == "my-model"
    for file in ("plan.json", "card.json", "README.md"):
        assert str(tmp_path) not in (tmp_path / "plan" / file).read_text()


def test_cards_do_not_count_in_comparisons_and_follow_copies():
    measured = PLAN.replace(card=CARD)
    assert measured == PLAN
    assert hash(measured) == hash(PLAN)
    for same in (copy.deepcopy(measured), pickle.loads(pickle.dumps(measured)), measured.replace(min_tokens=99)):
        assert same.card == CARD
    for other in ({"boundary": 4}, {"omit": (1,)}, {"projections": None}):
        assert measured.replace(**other).card is None


def test_a_card_of_another_plan_is_refused(tmp_path):
    for other in (PLAN.replace(boundary=1), PLAN.replace(omit=(1,)), Plan(7, (2, 4, 5), boundary=3)):
        with pytest.raises(ValueError, match=r"card: .* figures of Plan\(.*got those of another plan \(3 of"):
            other.save_pretrained(tmp_path / "none", card=CARD)
    with pytest.raises(TypeError, match=r"card: expected a pop_ext.plans.card.PlanCard, got dict"):
        PLAN.save_pretrained(tmp_path / "none", card={})
    assert not (tmp_path / "none").exists()


def test_the_card_of_another_fit_is_refused(fitted, tmp_path):
    card = PlanCard.of(fitted, quality=CARD.quality)
    fitted.save_pretrained(tmp_path, card=card)
    again = pop_ext.fit(shared("llama"), Plan(6, (2, 4, 5)), [torch.arange(40)[None]], lambdas=[2.0])
    assert Plan.from_pretrained(tmp_path).card == card
    with pytest.raises(ValueError, match="card: expected the figures of .*, got those of another fit, made before"):
        again.replace(card=card)
    again.save(tmp_path / "plan.json")  # as pop-ext fit does; the card stays
    with pytest.raises(ValueError, match=r"card\.json: card: .* got those of another fit"):
        Plan.from_pretrained(tmp_path)
    again.save_pretrained(tmp_path)
    assert Plan.from_pretrained(tmp_path).card.quality == ()


def test_another_readme_is_never_replaced(tmp_path):
    (tmp_path / "README.md").write_text("# My project")
    with pytest.raises(ValueError, match=r"folder: expected no other README\.md in the place of the card"):
        PLAN.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
    PLAN.save_pretrained(tmp_path / "plan")
    PLAN.save_pretrained(tmp_path / "plan", card=CARD)
    assert "0.0123" in (tmp_path / "plan" / "README.md").read_text()


def test_json_and_card_agree_on_every_member():
    assert PlanCard.from_json(CARD.to_json()) == CARD
    members = json.loads(CARD.to_json())
    assert members["plan"] == "3 of 6 layers omitted (2, 4-5) for all tokens of a prompt but the last 3 tokens"
    assert PlanCard.from_json(json.dumps({**members, "later": 1})) == CARD


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"omit": [1, "x"]}, "card.omit: expected int, got str 'x'"),
        ({"omit": 3}, "card.omit: expected a list, got int"),
        ({"num_layers": True}, "card.num_layers: expected int, got bool True"),
        ({"texts": [1]}, "card.texts: expected an object, got int"),
        ({"quality": [{"name": "loss"}]}, "card.quality: missing 4 required positional arguments"),
        ({"versions": []}, "card.versions: expected dict, got list"),
        ({"model": 3}, "card.model: expected str or null, got int 3"),
    ],
)
def test_a_broken_card_is_refused_by_member(change, text, tmp_path):
    PLAN.save_pretrained(tmp_path, card=CARD)
    (tmp_path / "card.json").write_text(json.dumps({**json.loads(CARD.to_json()), **change}))
    with pytest.raises(ValueError, match=f"^{tmp_path / 'card.json'}: {text}"):
        Plan.from_pretrained(tmp_path)


def test_a_text_has_one_of_two_roles():
    broken = CARD.to_json().replace("held-out", "test")
    with pytest.raises(ValueError, match=r"card.texts.role: expected calibration or held-out, got 'test'"):
        PlanCard.from_json(broken)


def test_the_markdown_is_a_model_card():
    text = render(CARD)
    assert text.startswith(
        '---\nlibrary_name: pop_ext\nbase_model: "someone/model"\ntags:\n- pop_ext\n- prefill-only-pruning\n---\n'
    )
    for line in (
        "# Prefill plan for someone/model",
        "| loss | +0.0123 (0.0045) | nats a token | 48 | full depth |",
        "| recall drop | +0.2500 | share of answers | 12 | full depth |",
        "| 1024 | 1.44x | native full prefill | two cores, bfloat16 |",
        "| text | role | tokens of this part | licence | SHA-256 |",
        f"| a.txt | calibration | 1234 | CC0-1.0 | `{'0' * 64}` |",
        f"| b\\|c.txt | held-out | 56 | unknown | `{'1' * 64}` |",
        "| asked for | max_loss 0.02 |",
        "| created | 2031-02-03 |",
    ):
        assert f"\n{line}\n" in text
    assert "base_model" not in render(dataclasses.replace(CARD, model="my-model"))


def test_many_texts_are_summed_up_in_the_markdown():
    texts = [CardText(f"{i}.txt", "0" * 64, 10 + i, "calibration", None) for i in range(20)]
    texts.append(CardText("held.txt", "1" * 64, 7, "held-out", "CC0-1.0"))
    text = render(dataclasses.replace(CARD, texts=tuple(texts)))
    assert (
        "\n| 20 | calibration | 390 | unknown |\n| 1 | held-out | 7 | CC0-1.0 |\n\nThe file `card.json` names" in text
    )
    assert "19.txt" not in text
    assert "19.txt" in render(dataclasses.replace(CARD, texts=tuple(texts[:20])))


def test_a_missing_plan_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"expected a plan.json in {tmp_path} or in its pop_ext, got none"):
        Plan.from_pretrained(tmp_path)


def test_changed_matrices_are_refused(fitted, tmp_path):
    fitted.save_pretrained(tmp_path)
    file = tmp_path / "plan.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"plan\.json: .*plan\.safetensors"):
        Plan.from_pretrained(tmp_path)
    file.unlink()
    with pytest.raises(OSError, match=r"plan\.safetensors"):
        Plan.from_pretrained(tmp_path)


def test_a_hub_id_is_downloaded_and_read(monkeypatch, tmp_path):
    PLAN.save_pretrained(tmp_path / "pop_ext", card=CARD)
    calls = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: calls.append((a, k)) or str(tmp_path))
    found = Plan.from_pretrained("someone/plan", revision="v2", token="t", cache_dir="c", local_files_only=True)
    assert (found, found.card) == (PLAN, CARD)
    names = ("plan.json", "plan.safetensors", "card.json")
    patterns = [*names, *(f"pop_ext/{name}" for name in names)]
    how = {"revision": "v2", "token": "t", "cache_dir": "c", "local_files_only": True, "allow_patterns": patterns}
    assert calls == [(("someone/plan",), how)]


def test_a_name_that_is_no_hub_id_is_refused():
    with pytest.raises(ValueError, match="Repo id must"):
        Plan.from_pretrained("to be found", local_files_only=True)


def test_a_push_uploads_the_folder(monkeypatch, fitted):
    asked, uploaded = [], {}

    def create_repo(repo_id, **how):
        asked.append((repo_id, how))
        return SimpleNamespace(repo_id=f"me/{repo_id}")

    def upload_folder(*, folder_path, **how):
        asked.append(how)
        uploaded["plan"] = Plan.from_pretrained(folder_path)
        return SimpleNamespace(commit_url="https://hub/commit/1")

    monkeypatch.setattr(huggingface_hub, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub, "upload_folder", upload_folder)
    card = PlanCard.of(fitted, quality=CARD.quality)
    url = fitted.push_to_hub("plan", card=card, private=True, token="t", commit_message="m", path_in_repo="pop_ext")
    assert url == "https://hub/commit/1"
    assert asked == [
        ("plan", {"private": True, "token": "t", "exist_ok": True}),
        {"repo_id": "me/plan", "path_in_repo": "pop_ext", "token": "t", "commit_message": "m"},
    ]
    assert (uploaded["plan"], uploaded["plan"].card) == (fitted, card)


@pytest.mark.parametrize(
    ("exists", "file", "refused"), [(True, True, True), (True, False, False), (False, True, False)]
)
def test_a_plan_never_replaces_the_card_of_a_checkpoint(monkeypatch, exists, file, refused):
    asked = []

    def file_exists(repo_id, filename, **how):
        assert exists
        asked.append((repo_id, filename, how))
        return file

    monkeypatch.setattr(huggingface_hub, "repo_exists", lambda repo_id, **how: exists)
    monkeypatch.setattr(huggingface_hub, "file_exists", file_exists)
    monkeypatch.setattr(huggingface_hub, "create_repo", lambda repo_id, **how: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr(huggingface_hub, "upload_folder", lambda **how: SimpleNamespace(commit_url="uploaded"))
    if refused:
        with pytest.raises(
            ValueError, match=r'path_in_repo: expected "pop_ext" for me/model, which holds a checkpoint'
        ):
            PLAN.push_to_hub("me/model", token="t")
        assert asked == [("me/model", "config.json", {"token": "t"})]
        for root in ("/", ".", "./", "././/", "pop_ext/..", "/./"):
            with pytest.raises(ValueError, match='path_in_repo: expected "pop_ext" for me/model'):
                PLAN.push_to_hub("me/model", path_in_repo=root)
        assert PLAN.push_to_hub("me/model", path_in_repo="pop_ext") == "uploaded"
    else:
        assert PLAN.push_to_hub("me/model") == "uploaded"


def test_enable_runs_a_pushed_plan_with_figures_by_itself(tmp_path, recwarn):
    from model_folder import save_tiny_llama
    from transformers import AutoModelForCausalLM

    save_tiny_llama(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    from pop_ext.plans.origin import origin_of, weights_hash

    plan = Plan(6, (3,), origin=origin_of(model, "by hand"))
    card = PlanCard.of(plan, weights_hash=weights_hash(model), quality=CARD.quality)
    plan.save_pretrained(tmp_path / "pop_ext", card=card)
    assert pop_ext.load(model).plan == plan
    assert not [warning for warning in recwarn if warning.category is pop_ext.NoPlanWarning]
