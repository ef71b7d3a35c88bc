"""Prefill-Only Pruning inside vLLM, through its plugin entry point (``vllm.general_plugins``).

With pop_ext installed beside vLLM, an engine prunes its prefills if it is configured to use pop_ext's model class::

    vllm serve MODEL --hf-overrides '{"architectures": ["POPLlamaForCausalLM"]}' \
        --additional-config '{"pop_ext": {"plan": "plan.json"}}'

or, in Python, ``LLM(MODEL, **pop_ext.vllm.engine_arguments(MODEL, "plan.json"))``. Other engines run as before. Written
for vLLM 0.32; docs/vllm.md describes the results and the configurations that are refused.
"""

from __future__ import annotations

import logging
from os import PathLike, fspath
from typing import Any

from pop_ext.vllm.names import ARCHITECTURES, SECTION


def register() -> None:
    """Register the model classes with vLLM, and the check of an engine's configuration.

    vLLM calls this entry point in every process of an engine, possibly several times, and imports a model class when
    an engine uses it. If this vLLM lacks a name that is imported here, a warning is logged and no engine is changed.
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
    """Return the arguments of ``vllm.LLM`` that make it prune the prefills of a model.

    Args:
        model: name or path of the model; its config.json names its class.
        plan: path of a plan that ``Plan.save`` wrote, or of a folder with a ``plan.json``; fitted projections are read
            from the file beside it. "third", "preset" or None: as in ``pop_ext.enable``.

    Returns:
        ``hf_overrides`` and ``additional_config``.

    Raises:
        ValueError: the architecture has no class with pruned prefills.
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
