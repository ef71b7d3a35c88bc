"""The shell lines of the documentation work: `pop-ext` commands run, extras, targets, options and scripts exist."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pop_ext
import pytest
import uvicorn
from pop_ext.cli.app import app
from typer.testing import CliRunner

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # installed with pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
DEMO = ROOT / "examples" / "demo_model"
# Options that make the commands quick; of an option given twice, the last one counts.
QUICK = {
    "generate": "--prompt-tokens 64 --repeats 3 --max-new-tokens 4",
    "calibrate": "--samples 2 --tokens 32 --pays-from 16",
    "fit": "--samples 2 --tokens 32",
    "eval": "--dtype float32 --samples 2 --counts 2 --lengths 24 --continuation 4 --greedy 2 --recall 32 "
    "--time-lengths 16 --repeats 3",
}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def shell_lines(page: Path) -> list[list[str]]:
    """Return the words of each line of blocks without a language and of each code span, without comments."""
    text = page.read_text()
    lines = [line for language, block in FENCE.findall(text) if language in ("", "sh") for line in block.splitlines()]
    spans = re.findall(r"`([^`]+)`", FENCE.sub("", text))
    found = []
    for line in lines + [" ".join(span.split()) for span in spans]:
        try:
            found.append(shlex.split(line, comments=True))
        except ValueError:  # an unpaired quotation mark: not shell
            continue
    return [words for words in found if words]


def commands(program: str) -> list[tuple[str, list[str]]]:
    """Return (page, words after the program) of every line that calls a program with arguments."""
    found = [(page.name, words[1:]) for page in PAGES for words in shell_lines(page) if words[0] == program]
    return [(page, words) for page, words in found if words]


def makefile() -> str:
    return (ROOT / "Makefile").read_text()


@pytest.fixture(scope="module")
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


# pop-ext


# `pop-ext generate` without options is a name in a sentence, not a command to run.
CLI_LINES = {" ".join(words): words for _, words in commands("pop-ext") if len(words) > 1 or words == ["info"]}
SERVE_LINES = {line: words for line, words in CLI_LINES.items() if words[0] == "serve"}  # these do not end
CLI_LINES = {line: words for line, words in CLI_LINES.items() if line not in SERVE_LINES}


def test_the_readme_shows_both_commands_on_a_model():
    shown = [words[:2] for page, words in commands("pop-ext") if page == "README.md"]
    assert ["generate", "--model"] in shown
    assert ["info", "--model"] in shown


def test_patterns_of_files_are_quoted():
    """A shell would expand them to several words, of which an option takes the first."""
    lines = [line for page in PAGES for line in page.read_text().splitlines() if "pop-ext" in line and "*" in line]
    lines = [line for line in lines if re.match(r"(\$ )?pop-ext ", line)]
    assert lines
    assert [line for line in lines if "*" in re.sub(r"'[^']*'", "", line)] == []


# Every line runs with --json. The first line of each command runs with text output as well.
FIRST = list({words[0]: line for line, words in reversed(CLI_LINES.items())}.values())
FORMS = [(line, "json") for line in CLI_LINES] + [(line, "text") for line in FIRST]


@pytest.mark.parametrize(("line", "form"), FORMS)
def test_every_line_of_pop_ext_runs(line, form, tmp_path, monkeypatch):
    prompt = tmp_path / "prompt.txt"
    prompt.write_text((DEMO / "heldout" / "pprint.py.txt").read_text()[:6000])
    folder = tmp_path / "results"
    folder.mkdir()
    for path in (tmp_path / "plan.json", folder / "plan.json", folder / "fitted.json"):
        pop_ext.Plan.last(12).save(path)
    places = {"NAME": str(DEMO / "model"), "FILE": str(prompt), "PLAN.json": str(tmp_path / "plan.json")}
    words = [places.get(word, re.sub("^DIR", str(folder), word)) for word in CLI_LINES[line]]
    monkeypatch.chdir(ROOT)
    words += QUICK.get(words[0], "").split()
    result = CliRunner().invoke(app, [*words, "--json"] if form == "json" else words)
    assert result.exit_code == 0, result.output
    assert result.stdout.strip()
    if form == "json":
        assert json.loads(result.stdout)


@pytest.mark.parametrize("line", SERVE_LINES)
def test_every_line_of_pop_ext_serve_starts_a_server(line, monkeypatch):
    started = []
    monkeypatch.setattr(uvicorn.Server, "run", lambda server: started.append(server.config.port))
    monkeypatch.setattr(os, "execv", lambda _, command: started.append(command))
    if "vllm" in line:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    places = {"NAME": str(DEMO / "model"), "PLAN": "third", "DIR": "third"}
    result = CliRunner().invoke(app, [places.get(word, word) for word in SERVE_LINES[line]])
    assert result.exit_code == 0, result.output
    assert len(started) == 1
    assert "pop-ext: " in result.stderr


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_demo_compares_three_arms_on_the_demo_model(monkeypatch):
    """Run the command that `make -n demo` prints in this process, with quick settings."""
    outer = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "PYTHON", "TESTS")  # set by a make that runs these tests
    environment = {name: value for name, value in os.environ.items() if name not in outer}
    make = ["make", "-n", "demo", f"DEMO={QUICK['generate']} --json"]
    printed = subprocess.run(make, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    [line] = re.findall(r"^.* -m pop_ext (generate .*)$", printed.replace("\\\n", " "), re.MULTILINE)
    monkeypatch.chdir(ROOT)
    result = CliRunner().invoke(app, shlex.split(line))
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert [arm["name"] for arm in report["arms"]] == ["Hugging Face full", "native full", "POP"]


# Installing


def test_every_extra_that_is_installed_exists(project):
    lines = [" ".join(words) for _, words in commands("pip")] + [" ".join(words) for _, words in commands("python")]
    asked = {extra for line in lines for names in re.findall(r"\.\[([\w,]+)\]", line) for extra in names.split(",")}
    assert {"hf", "cli"} <= asked
    assert asked <= set(project["optional-dependencies"])


def test_the_command_is_installed_by_the_name_that_the_pages_use(project):
    module, _, function = project["scripts"]["pop-ext"].partition(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_the_commands_of_a_page_are_those_of_pop_ext():
    known = {command.name or command.callback.__name__ for command in app.registered_commands}
    assert {words[0] for _, words in commands("pop-ext")} <= known


def test_the_oldest_torch_and_python_are_those_of_the_build(project):
    [torch] = [line for line in project["dependencies"] if line.startswith("torch")]
    minimum = torch.removeprefix("torch>=")
    readme, building = ((ROOT / page).read_text() for page in ("README.md", "docs/building.md"))
    assert f"torch (>= {minimum})" in readme
    assert f"torch >= {minimum}" in building
    assert f"Python {project['requires-python'].replace('>=', '>= ')}" in building


def test_the_language_standard_is_that_of_the_build():
    [standard] = re.findall(r"CMAKE_CXX_STANDARD (\d+)", (ROOT / "CMakeLists.txt").read_text())
    for page in ("README.md", "docs/building.md"):
        assert f"C++{standard} compiler" in (ROOT / page).read_text()


# Making


def test_every_target_and_variable_of_make_exists():
    words = [word for _, words in commands("make") for word in words]
    targets = {word for word in words if "=" not in word}
    assert {"demo", "test", "lint", "dev"} <= targets
    assert [target for target in targets if not re.search(rf"^{target}:", makefile(), re.MULTILINE)] == []
    variables = {word.partition("=")[0] for word in words if "=" in word}
    assert {"TORCH", "PYTHON", "TESTS"} <= variables
    assert [name for name in variables if f"$({name})" not in makefile()] == []


def test_every_build_option_exists():
    options = {option for page in PAGES for option in re.findall(r"cmake\.define\.(\w+)=", page.read_text())}
    assert "POP_CUDA" in options
    text = (ROOT / "CMakeLists.txt").read_text()
    assert [option for option in options if not re.search(rf"^(set|option)\({option} ", text, re.MULTILINE)] == []


def test_every_script_that_a_page_runs_exists():
    lines = [words for page in PAGES for words in shell_lines(page)]
    scripts = {words[1] for words in lines if words[0] == "python" and len(words) > 1 and words[1].endswith(".py")}
    scripts |= {words[0] for words in lines if words[0].startswith(".ci/")}
    assert {"bench/run.py", ".ci/run"} <= scripts
    assert [script for script in scripts if not (ROOT / script).is_file()] == []


def test_a_test_file_that_a_page_runs_exists():
    named = {path for page in PAGES for path in re.findall(r"tests/[\w/]+\.py", page.read_text())}
    assert named
    assert [path for path in named if not (ROOT / path).is_file()] == []
