"""The documentation works: its Python blocks and examples run, and its links resolve.

Blocks of one file share a namespace and run in order. Hugging Face names of models are replaced by the path of a tiny
Llama, and the working folder has a prompt.txt of some hundred tokens.
"""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import models
import pop_ext
import pytest
import torch
from model_folder import save_tiny_llama

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
HUB_NAME = re.compile(r'"(meta-llama|Qwen|mistralai)/[^"]+"')


def python_blocks(page: Path) -> list[tuple[int, str]]:
    """Return the first line number and the text of each Python block."""
    text = page.read_text()
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, match.start(1)), match[1]) for match in found]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Create a folder with a tiny model and a prompt, and make it the working folder."""
    save_tiny_llama(tmp_path / "model")
    (tmp_path / "prompt.txt").write_text("def square(x):\n    return x * x\n" * 10)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(page)], ids=lambda page: page.name)
def test_every_python_block_runs(page, place):
    namespace: dict[str, object] = {"__name__": "__main__"}
    for line, block in python_blocks(page):
        source = "\n" * line + HUB_NAME.sub(repr(str(place / "model")), block)
        exec(compile(source, str(page), "exec"), namespace)


def test_the_readme_has_a_quick_start_and_the_op():
    blocks = "".join(block for _, block in python_blocks(ROOT / "README.md"))
    assert "pop_ext.enable(model)" in blocks
    assert "torch.ops.pop.prefill(" in blocks
    assert len((ROOT / "README.md").read_text().splitlines()) <= 125


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_resolves(page):
    links = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL))
    local = [link.partition("#")[0] for link in links if not link.startswith(("http://", "https://", "#"))]
    assert [link for link in local if not (page.parent / link).exists()] == []


def test_every_op_has_its_schema_in_the_reference():
    library = (ROOT / "cpp" / "torch" / "library.cpp").read_text()
    strings = re.findall(r"m\.def\(\s*((?:\"(?:[^\"\\]|\\.)*\"\s*)+)\)", library)
    schemas = ["".join(re.findall(r"\"((?:[^\"\\]|\\.)*)\"", text)).replace('\\"', '"') for text in strings]
    assert len(schemas) > 10
    page = " ".join((ROOT / "docs" / "ops.md").read_text().split()).replace("( ", "(")
    assert [schema for schema in schemas if " ".join(schema.split()) not in page] == []


def test_every_rule_of_enable_is_in_the_semantics():
    sources = "".join((ROOT / "python" / "pop_ext" / name).read_text() for name in ("hf/dispatch.py", "hf/forward.py"))
    rules = set(re.findall(r'(?:_Stock\(|return|else \(|reason =)\s*"(\w+)",', sources))
    page = (ROOT / "docs" / "semantics.md").read_text()
    assert sorted(rule for rule in rules if f"`{rule}`" not in page) == []


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_every_example_runs(example, place):
    command = [sys.executable, str(example), "--model", str(place / "model"), "--prompt-file", "prompt.txt"]
    environment = {**os.environ, "PYTHONPATH": str(Path(pop_ext.__file__).parents[1])}
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert run.returncode == 0, run.stderr
    assert run.stdout


@torch.no_grad()
def test_the_example_engine_generates_the_tokens_of_generate():
    engine_module = runpy.run_path(str(ROOT / "examples" / "own_engine.py"))
    model = models.llama()
    plan = pop_ext.Plan.last(6, boundary=3)
    prompts = [models.tokens(model, 40), models.tokens(model, 2, seed=1), models.tokens(model, 17, seed=2)]
    engine = engine_module["Engine"](pop_ext.load(model, plan), len(prompts), capacity=64)
    steps = [engine.step(prompts)]
    while len(steps) < 8:
        steps.append(engine.step(list(steps[-1][:, None])))
    pop_ext.enable(model, plan, strict=True)
    for prompt, new in zip(prompts, torch.stack(steps, dim=1), strict=True):
        expected = model.generate(prompt[None], max_new_tokens=8, do_sample=False)[0, len(prompt) :]
        assert new.tolist() == expected.tolist()


def test_the_figure_equals_its_scripts_output(tmp_path):
    script = tmp_path / "cells.py"
    script.write_text((ROOT / "docs" / "figures" / "cells.py").read_text())
    subprocess.run([sys.executable, str(script)], check=True)
    assert (tmp_path / "cells.svg").read_text() == (ROOT / "docs" / "figures" / "cells.svg").read_text()
