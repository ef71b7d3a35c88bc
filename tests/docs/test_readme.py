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
import pop_ext.evaluation
import pytest
import torch
from model_folder import save_tiny_llama

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "bench" / "README.md"])
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
ENDINGS = {".py", ".h", ".cpp", ".cuh", ".cu", ".cmake", ".sh"}
SOURCES = ("python", "cpp", "cuda", "cmake", "bench", "examples", "scripts", "tests")
HUB_NAME = re.compile(r'"(meta-llama|Qwen|mistralai)/[^"]+"')


def name_of(page: Path) -> str:
    """Path of a page in the repository, as the id of its case."""
    return str(page.relative_to(ROOT))


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


@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(page)], ids=name_of)
def test_every_python_block_runs(page, place):
    namespace: dict[str, object] = {"__name__": "__main__"}
    for line, block in python_blocks(page):
        source = "\n" * line + HUB_NAME.sub(repr(str(place / "model")), block)
        exec(compile(source, str(page), "exec"), namespace)


@pytest.mark.parametrize(
    ("page", "call"), [("README.md", "pop_ext.enable(model)"), ("docs/own-engine.md", "torch.ops.pop.prefill(")]
)
def test_the_quick_start_and_the_op_are_shown(page, call):
    assert call in "".join(block for _, block in python_blocks(ROOT / page))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_relative_link_resolves(page):
    links = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL))
    local = [link.partition("#")[0] for link in links if not link.startswith(("http://", "https://", "#"))]
    assert [link for link in local if not (page.parent / link).exists()] == []


def test_every_page_that_a_source_names_exists():
    files = [path for folder in SOURCES for path in (ROOT / folder).rglob("*") if path.suffix in ENDINGS]
    named = {page for path in files for page in re.findall(r"docs/[\w/-]+\.md", path.read_text())}
    assert named
    assert [page for page in named if not (ROOT / page).is_file()] == []


def test_every_public_name_is_in_the_reference():
    names = {f"pop_ext.{name}" for name in pop_ext.__all__ if name not in ("__version__", "reference")}
    names |= {f"pop_ext.evaluation.{name}" for name in pop_ext.evaluation.__all__}
    pages = "".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    assert sorted(names - set(re.findall(r"^::: (\S+)$", pages, re.MULTILINE))) == []


def test_every_op_has_its_schema_in_the_reference():
    library = (ROOT / "cpp" / "torch" / "library.cpp").read_text()
    strings = re.findall(r"m\.def\(\s*((?:\"(?:[^\"\\]|\\.)*\"\s*)+)\)", library)
    schemas = ["".join(re.findall(r"\"((?:[^\"\\]|\\.)*)\"", text)).replace('\\"', '"') for text in strings]
    assert len(schemas) > 10
    page = " ".join((ROOT / "docs" / "ops.md").read_text().split()).replace("( ", "(")
    assert [schema for schema in schemas if " ".join(schema.split()) not in page] == []


def test_every_rule_of_enable_is_in_the_list_of_declined_calls():
    modules = ("rules", "dispatch", "packed_step", "patches", "native_backend", "reference_backend")
    sources = "".join((ROOT / "python" / "pop_ext" / "hf" / f"{name}.py").read_text() for name in modules)
    rules = set(re.findall(r'(?:Decline\(|_Reason\(|else \(|return)\s*"(\w+)"(?:,| if)', sources))
    assert {"labels", "mask", "cache", "hooks", "attention", "model", "verification"} <= rules
    page = (ROOT / "docs" / "declined.md").read_text()
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


@pytest.mark.parametrize("name", ["cells", "ttft"])
def test_a_figure_equals_its_scripts_output(name, tmp_path):
    script = ROOT / "docs" / "figures" / f"{name}.py"
    subprocess.run([sys.executable, str(script), str(tmp_path / "drawn.svg")], check=True)
    assert (tmp_path / "drawn.svg").read_text() == script.with_suffix(".svg").read_text()
