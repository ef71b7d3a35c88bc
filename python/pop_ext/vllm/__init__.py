"""Prefill-Only Pruning inside vLLM, through its plugin entry point (``vllm.general_plugins``).

With pop_ext installed beside vLLM, an engine prunes its prefills if its configuration names a plan::

    vllm serve MODEL --additional-config '{"pop_ext": {"plan": "plan.json"}}'

or, in Python, ``LLM(MODEL, **pop_ext.vllm.engine_arguments(MODEL, "plan.json"))``, or if a plan with measured figures
lies beside the checkpoint. Other engines run as before. docs/vllm.md describes models, versions, results and the
configurations that are refused.
"""

from __future__ import annotations

import logging
from os import PathLike, fspath
from typing import Any

from pop_ext.vllm.names import ARCHITECTURES, SECTION


def register() -> None:
    """Hook pruning into vLLM.

    vLLM calls this entry point in every process of an engine, possibly several times. If this vLLM lacks a name that
    the plugin uses (``pop_ext.vllm.hooks``), a warning says which, and no engine is changed. An engine that asks for a
    plan, and not for ``strict`` to be false, is refused.
    """
    from pop_ext.vllm.hooks import missing_hooks

    missing = missing_hooks()
    if missing:
        text = f"pop_ext: no prefill is pruned: made for vLLM 0.31 to 0.33, and in this one {'; '.join(missing)}"
        logging.getLogger("vllm.pop_ext").warning(text)
        _refuse_engines(text)
        return
    from vllm import ModelRegistry

    from pop_ext.vllm.install import install

    install()
    for name in ARCHITECTURES.values():
        if name not in ModelRegistry.get_supported_archs():
            ModelRegistry.register_model(name, f"pop_ext.vllm.models:{name}")


def _refuse_engines(why: str) -> None:
    """Let a vLLM that the plugin does not know refuse engines that ask for pruning."""
    from vllm.config import VllmConfig

    original = getattr(VllmConfig, "try_verify_and_update_config", None)
    if original is None:
        return

    def try_verify_and_update_config(self: Any) -> Any:
        more = self.additional_config
        section = more.get(SECTION) if isinstance(more, dict) else None
        if isinstance(section, dict) and section.get("strict", True):
            raise ValueError(f'{why}. {{"{SECTION}": {{"strict": false}}}} runs all layers')
        return original(self)

    VllmConfig.try_verify_and_update_config = try_verify_and_update_config


def engine_arguments(
    model: str | PathLike[str], plan: str | PathLike[str] | None = None, strict: bool = True
) -> dict[str, Any]:
    """Return the arguments of ``vllm.LLM`` that make it prune the prefills of a model.

    Args:
        model: Name or path of the model. Not read: every model of vLLM that can be several pipeline stages will do.
        plan: Path of a plan that ``Plan.save`` wrote, or of a folder with a ``plan.json``; fitted projections are read
            from the file beside it. "third", "preset" or None: as in ``pop_ext.enable``.
        strict: False: run all layers, with a warning, where the engine or the model does not support pruning.

    Returns:
        ``additional_config``.
    """
    settings: dict[str, Any] = {} if plan is None else {"plan": fspath(plan)}
    if not strict:
        settings["strict"] = False
    return {"additional_config": {SECTION: settings}}
