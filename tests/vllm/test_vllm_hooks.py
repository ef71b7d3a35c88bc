"""The private names of vLLM that the plugin uses: each exists, and none is used that is not listed."""

from __future__ import annotations

import ast
import importlib.util
import logging
from pathlib import Path
from types import SimpleNamespace

import pop_ext.vllm
import pytest
from pop_ext.vllm import hooks

pytestmark = pytest.mark.cpu
needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vllm (make vllm)")
PUBLIC = {
    ("vllm", "ModelRegistry"),
    ("vllm", "envs"),
    ("vllm.config", "CUDAGraphMode"),
    ("vllm.config", "VllmConfig"),
    ("vllm.config", "set_current_vllm_config"),
    ("vllm.logger", "init_logger"),
    ("vllm.platforms", "current_platform"),
}
"""Documented for plugins, or used by every model outside vLLM's tree."""


@needs_vllm
@pytest.mark.parametrize("hook", hooks.HOOKS, ids=lambda hook: f"{hook.module}.{hook.name}")
def test_this_vllm_has(hook):
    assert hook.complaint() is None


def test_every_name_that_is_imported_is_listed():
    listed = {(hook.module, hook.name.split(".")[0]) for hook in hooks.HOOKS}
    listed |= {(f"{hook.module}.{hook.name}".rpartition(".")[0], hook.name.rpartition(".")[2]) for hook in hooks.HOOKS}
    found = set()
    for path in Path(pop_ext.vllm.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
                found |= {(node.module, name.name) for name in node.names}
    modules = {hook.module for hook in hooks.HOOKS}
    unlisted = {
        (module, name)
        for module, name in found - listed - PUBLIC
        if f"{module}.{name}" not in modules and path_of_model(module) is None
    }
    assert not unlisted


def path_of_model(module: str) -> str | None:
    """Return the name of a model's module, which ``--hf-overrides`` names; None if it is another."""
    package, _, name = module.rpartition(".")
    return name if package == "vllm.model_executor.models" and name != "utils" else None


@pytest.mark.parametrize(
    ("hook", "text"),
    [
        (hooks.Hook("json", "dump.elsewhere", None, ""), "json.dump.elsewhere is missing"),
        (hooks.Hook("no_such_module", "name", None, ""), "no_such_module.name is missing"),
        (hooks.Hook("ast", "parse", ("source", "depth"), ""), "ast.parse has no depth"),
        (hooks.Hook("json", "dump", ("obj", "anything"), ""), None),  # takes any keyword
    ],
)
def test_what_is_missing_is_named(hook, text):
    assert hook.complaint() == text


@needs_vllm
def test_another_vllm_stays_plain_with_a_line_that_says_why(monkeypatch, caplog):
    from vllm.config import VllmConfig

    monkeypatch.setattr(hooks, "HOOKS", (hooks.Hook("json", "gone", None, ""),))
    monkeypatch.setattr(VllmConfig, "try_verify_and_update_config", lambda self: "verified")
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    hooks.missing_hooks.cache_clear()
    with caplog.at_level(logging.WARNING):
        pop_ext.vllm.register()
    hooks.missing_hooks.cache_clear()
    assert "no prefill is pruned" in caplog.text
    assert "json.gone is missing" in caplog.text

    def verify(more):
        return VllmConfig.try_verify_and_update_config(SimpleNamespace(additional_config=more))

    for more in ({}, {"pop_ext": False}, {"pop_ext": {"plan": "third", "strict": False}}):
        assert verify(more) == "verified"
    with pytest.raises(ValueError, match="no prefill is pruned.*json.gone is missing.*runs all layers"):
        verify({"pop_ext": {"plan": "third"}})


def test_the_documented_table_is_the_list():
    page = (Path(__file__).parents[2] / "docs" / "vllm.md").read_text()
    assert "\n".join(hooks.hooks_table()) in page
