"""scripts/code_metrics.py finds import cycles, returns and sizes in made-up packages."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "code_metrics.py"
SOURCES = {
    "__init__.py": "from pop_ext.leaf import value\n",
    "leaf.py": "import json\nvalue = 1\n",
    # Two modules that import each other, one of them for types only.
    "typed.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from pop_ext.eager import Name\n",
    "eager.py": "from pop_ext import leaf, typed\nfrom pop_ext._core import missing\n",
    # Three in a ring: an import inside a function, a relative one, and `import a.b`.
    "ring/__init__.py": "",
    "ring/first.py": "def later():\n    from pop_ext.ring import second\n",
    "ring/second.py": "from .third import name\n",
    "ring/third.py": "import pop_ext.ring.first\n",
    "ring/outside.py": "from pop_ext.ring.first import later\nfrom .. import leaf\n",
}


@pytest.fixture(scope="module")
def metrics():
    return runpy.run_path(str(SCRIPT))


@pytest.fixture
def checkout(tmp_path) -> Path:
    """Write SOURCES as the package of a checkout, and return the checkout."""
    for name, text in SOURCES.items():
        path = tmp_path / "python" / "pop_ext" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_graph_counts_type_only_nested_and_relative_imports(metrics, checkout):
    graph = metrics["import_graph"](checkout / "python" / "pop_ext")
    assert graph == {
        "pop_ext": {"pop_ext.leaf"},
        "pop_ext.leaf": set(),
        "pop_ext.typed": {"pop_ext.eager"},
        "pop_ext.eager": {"pop_ext.leaf", "pop_ext.typed"},
        "pop_ext.ring": set(),
        "pop_ext.ring.first": {"pop_ext.ring.second"},
        "pop_ext.ring.second": {"pop_ext.ring.third"},
        "pop_ext.ring.third": {"pop_ext.ring.first"},
        "pop_ext.ring.outside": {"pop_ext.ring.first", "pop_ext.leaf"},
    }


def test_cycles_are_found_and_nothing_else(checkout):
    command = [sys.executable, SCRIPT, "--cycles", "--root", checkout]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.stdout.splitlines()[1:] == [
        "  3 modules: pop_ext.ring.first, pop_ext.ring.second, pop_ext.ring.third",
        "  2 modules: pop_ext.eager, pop_ext.typed",
    ]
    assert run.returncode == 1


def test_a_package_without_cycles_passes(checkout):
    for name in ("typed.py", "ring/third.py"):
        (checkout / "python" / "pop_ext" / name).write_text("")
    command = [sys.executable, SCRIPT, "--cycles", "--root", checkout]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.endswith(": 0\n")


@pytest.mark.parametrize(
    ("files", "expected"), [("", 0), ("a", 0), ("aabb", 0), ("abc", 0), ("aba", 1), ("abacb", 2), ("ababab", 4)]
)
def test_returns_are_steps_into_a_file_left_before(metrics, files, expected):
    assert metrics["count_returns"](list(files)) == expected


def test_sizes_name_the_longest_file_and_function(metrics, checkout):
    long = "def short():\n    pass\n\n\ndef long():\n    one = 1\n    two = 2\n    return one, two\n"
    (checkout / "python" / "pop_ext" / "leaf.py").write_text(long)
    (checkout / "cuda").mkdir()
    (checkout / "cuda" / "kernel.cu").write_text("int x;\n" * 3)
    found = metrics["sizes"](checkout)
    assert found["longest_file"] == {"python": [8, "python/pop_ext/leaf.py"], "cpp": [3, "cuda/kernel.cu"]}
    assert found["longest_python_function"] == [4, "python/pop_ext/leaf.py:long"]
    assert found["lines"]["cpp"] == 3
