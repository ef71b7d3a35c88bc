"""Prefill-Only Pruning inside vLLM, through its plugin entry point (``vllm.general_plugins``).

With pop_ext installed beside vLLM, an engine prunes its prefills when it is told to take pop_ext's model class::

    vllm serve MODEL --hf-overrides '{"architectures": ["POPLlamaForCausalLM"]}' \
        --additional-config '{"pop_ext": {"plan": "plan.json"}}'

or, in Python, ``LLM(MODEL, **pop_ext.vllm.engine_arguments(MODEL, "plan.json"))``. Nothing changes for engines that are
not told so. Written against vLLM 0.32; docs/vllm.md has what it means and what it refuses.
"""

from __future__ import annotations

import logging
from os import PathLike, fspath
from typing import Any

SECTION = "pop_ext"
"""Of vLLM's ``additional_config``; its member ``plan`` is the path of what ``Plan.save`` wrote."""

ARCHITECTURES = {
    name: f"POP{name}" for name in ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
}
"""vLLM's model class -> the one that prunes."""


def register() -> None:
    """What the entry point calls, in every process of an engine and as often as it likes.

    Names the model classes to vLLM, which imports them when an engine wants one, and what checks such an engine's
    configuration. With a vLLM that lacks what this is written against, it says so and leaves every engine alone.
    """
    try:
        from vllm import ModelRegistry
        from vllm.model_executor.models import config

        from pop_ext.vllm.settings import PrunedConfig
    except ImportError as error:
        logging.getLogger(__name__).warning("no pruned prefills: written for vLLM 0.32, which has it all; %s", error)
        return

    for name in ARCHITECTURES.values():
        if name not in ModelRegistry.get_supported_archs():
            ModelRegistry.register_model(name, f"pop_ext.vllm.models:{name}")
        config.MODELS_CONFIG_MAP[name] = PrunedConfig


def engine_arguments(model: str | PathLike[str], plan: str | PathLike[str] | None = None) -> dict[str, Any]:
    """Arguments of ``vllm.LLM`` that make it prune the prefills of a model.

    Args:
        model: name or path of the model; its config.json says which class it is.
        plan: path of what ``Plan.save`` wrote, with fitted projections beside it if it has any. None: the preset whose
            config matches, else the deepest third of the layers.

    Returns:
        ``hf_overrides`` and ``additional_config``.

    Raises:
        ValueError: an architecture that has no pruned form here.
    """
    from transformers import AutoConfig

    found = AutoConfig.from_pretrained(model).architectures or []
    for name in found:
        if name in ARCHITECTURES:
            settings = {} if plan is None else {"plan": fspath(plan)}
            return {
                "hf_overrides": {"architectures": [ARCHITECTURES[name]]},
                "additional_config": {SECTION: settings},
            }
    raise ValueError(f"model: expected an architecture of {', '.join(ARCHITECTURES)}, got {', '.join(found) or 'none'}")
