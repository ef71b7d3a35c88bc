"""Read what an engine's configuration asks for, and refuse configurations that pruned prefills do not support."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm import envs
from vllm.logger import init_logger
from vllm.platforms import current_platform

from pop_ext.hf.native_model import check_plan
from pop_ext.plans.default import choose_plan, default_plan, plan_beside
from pop_ext.plans.plan import Plan
from pop_ext.vllm.names import ARCHITECTURES, SECTION

logger = init_logger("vllm.pop_ext")  # vLLM shows the lines of loggers below its own

# Other methods draft from hidden states of every row of a prompt, which a pruned prefill does not compute, or with a
# model that would have to be pruned as well.
_DRAFTS = ("ngram", "ngram_gpu", "suffix")

# These take a model's weights past the loader that the plugin extends.
_OTHER_LOADERS = ("tensorizer", "ipc_cache", "modelexpress")


@dataclass(frozen=True)
class EngineSettings:
    """What an engine is asked to do.

    Attributes:
        plan: The plan as the configuration names it: a path, ``"third"`` or ``"preset"``; None: the default.
        strict: True if the engine is to refuse a model or a version of vLLM that cannot be pruned, False if it is to
            run all layers then.
        asked: True if the configuration asks for pruning, False if a plan beside the checkpoint does.
    """

    plan: str | None = None
    strict: bool = True
    asked: bool = True


def engine_settings(vllm_config: Any) -> EngineSettings | None:
    """Return what an engine's configuration asks for; None: an engine of plain vLLM.

    ``additional_config["pop_ext"]`` is an object with the members of ``EngineSettings`` ``plan`` and ``strict``, or
    false. Without it, an engine prunes if it was told to use a class of ``pop_ext.vllm.models``, or if there is a plan
    with measured figures beside the checkpoint.

    Raises:
        ValueError: A member is unknown, or the section's name is misspelt.
        TypeError: The plan is no string, or ``strict`` no bool.
    """
    model, more = vllm_config.model_config, vllm_config.additional_config
    if model is None:
        return None
    more = more if isinstance(more, dict) else {}
    for name in more:
        if name != SECTION and re.sub("[^a-z]", "", str(name).lower()) in ("pop", "popext"):
            raise ValueError(f"additional_config: expected the key {SECTION!r}, got {name!r}")
    if SECTION not in more:
        if model.architecture in ARCHITECTURES.values():
            return EngineSettings()
        beside = plan_beside(model.hf_text_config, str(model.model), getattr(model, "revision", None))
        return None if beside is None else EngineSettings(strict=False, asked=False)
    section = more[SECTION]
    if section is False:
        return None
    if not isinstance(section, dict) or section.keys() - {"plan", "strict"}:
        raise ValueError(
            f"additional_config[{SECTION!r}]: expected false, or an object with members 'plan' and 'strict' alone, "
            f"got {section!r}"
        )
    plan, strict = section.get("plan"), section.get("strict", True)
    if plan is not None and not isinstance(plan, str):
        raise TypeError(
            f"additional_config[{SECTION!r}]['plan']: expected a saved plan's path, 'third' or 'preset', got {plan!r}"
        )
    if not isinstance(strict, bool):
        raise TypeError(f"additional_config[{SECTION!r}]['strict']: expected true or false, got {strict!r}")
    return EngineSettings(plan, strict)


def engine_plan(vllm_config: Any) -> Plan:
    """Return an engine's plan: the one that its configuration names, else what ``pop_ext.enable`` runs without one.

    Raises:
        ValueError: the plan is for another model, its fit lies in the model's folder, or a setting is unknown.
        TypeError: the plan is no string.
        OSError: the plan cannot be read.
    """
    settings = engine_settings(vllm_config) or EngineSettings()
    config, path = vllm_config.model_config.hf_text_config, settings.plan
    if path is None:
        return _default(vllm_config)
    plan = check_plan(choose_plan(path, config).plan, config.num_hidden_layers, config)
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    if plan.projections is not None and folder.resolve() == Path(vllm_config.model_config.model).resolve():
        raise ValueError(
            f"additional_config[{SECTION!r}]['plan']: expected a fitted plan outside the model's folder, where vLLM "
            f"takes every .safetensors for weights of the model, got {path}"
        )
    return plan


def _default(vllm_config: Any) -> Plan:
    """Return the plan of an engine that is given none; log a line if no measured plan is known of its model."""
    model = vllm_config.model_config
    chosen = default_plan(model.hf_text_config, str(model.model), getattr(model, "revision", None))
    if chosen.unmeasured:
        logger.warning_once("pop_ext: %s", chosen.advice(str(model.model)))
    return chosen.plan


def engine_boundary(vllm_config: Any, plan: Plan) -> int:
    """Return how many last rows of a chunk run at full depth.

    At least the plan's boundary, and at least the rows of a request whose drafts are verified.
    """
    speculative = vllm_config.speculative_config
    return max(plan.boundary, 1 if speculative is None else 1 + speculative.num_speculative_tokens)


def check_engine(vllm_config: Any) -> Plan:
    """Check the configuration of an engine that prunes, before there are workers and in each of them; return its plan.

    Raises:
        ValueError: names the setting, the expected value and the value found.
    """
    _check(vllm_config)
    plan = engine_plan(vllm_config)
    if plan.projections is not None and vllm_config.lora_config is not None:
        raise ValueError(
            f"additional_config[{SECTION!r}]['plan']: expected no fitted projections with enable_lora, whose adapters "
            f"they were not fitted with, got {len(plan.projections.matrices)}"
        )
    _refuse_prompt_logprobs(vllm_config)
    return plan


def _check(vllm_config: Any) -> None:
    """Reject configurations whose results would silently differ from those asked for."""
    parallel, speculative = vllm_config.parallel_config, vllm_config.speculative_config
    offload = vllm_config.offload_config
    refused = {
        "device": (current_platform.is_cpu() or current_platform.is_cuda(), True),
        "VLLM_BATCH_INVARIANT": (envs.VLLM_BATCH_INVARIANT, False),
        # It replays a whole captured step, so that no step is looked at.
        "VLLM_USE_BREAKABLE_CUDAGRAPH": (bool(getattr(envs, "VLLM_USE_BREAKABLE_CUDAGRAPH", False)), False),
        "decode_context_parallel_size": (parallel.decode_context_parallel_size, 1),
        "prefill_context_parallel_size": (parallel.prefill_context_parallel_size, 1),
        "enable_dbo, ubatch_size": (parallel.use_ubatching, False),
        "cpu_offload_gb": (offload.uva.cpu_offload_gb, 0),
        "offload_group_size": (offload.prefetch.offload_group_size, 0),
        "weight_transfer_config": (vllm_config.weight_transfer_config, None),
        "return_sampling_mask": (vllm_config.model_config.return_sampling_mask, False),
        "runner": (vllm_config.model_config.runner_type, "generate"),
    }
    for name, (got, expected) in refused.items():
        if got != expected:
            raise ValueError(f"{name}: expected {expected!r} with pruned prefills, got {got!r}")
    load_format = str(vllm_config.load_config.load_format)
    if load_format in _OTHER_LOADERS:
        raise ValueError(
            f"load_format: expected none of {', '.join(_OTHER_LOADERS)} with pruned prefills, got {load_format}"
        )
    if parallel.data_parallel_size > 1 and vllm_config.model_config.get_num_experts() > 0:
        raise ValueError(
            f"data_parallel_size: expected 1 with pruned prefills of a mixture of experts, whose ranks run the "
            f"same rows, got {parallel.data_parallel_size}"
        )
    if speculative is not None and speculative.method not in _DRAFTS:
        raise ValueError(
            f"speculative_config.method: expected one of {', '.join(_DRAFTS)} with pruned prefills, got "
            f"{speculative.method!r}"
        )


def _refuse_prompt_logprobs(vllm_config: Any) -> None:
    """Install the logits processor that refuses requests for log-probabilities of prompt tokens.

    Their rows are pruned. vLLM's V1 runner with drafts takes no logits processors; there such a request gets NaN.
    """
    if vllm_config.speculative_config is not None and not vllm_config.use_v2_model_runner:
        return
    name = f"pop_ext.vllm.requests:NoPromptLogprobs{'V2' if vllm_config.use_v2_model_runner else 'V1'}"
    model = vllm_config.model_config
    if name not in (model.logits_processors or ()):
        model.logits_processors = [*(model.logits_processors or ()), name]
