"""Read the plan from an engine's configuration, and refuse configurations that pruned prefills do not support."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm import envs
from vllm.config import CUDAGraphMode
from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform

from pop_ext.hf.native_model import check_plan
from pop_ext.plans.default import choose_plan, default_plan
from pop_ext.plans.plan import Plan
from pop_ext.vllm.names import SECTION

logger = init_logger(__name__)

# Other methods draft from hidden states of every row of a prompt, which a pruned prefill does not compute, or with a
# model that would have to be pruned as well.
_DRAFTS = ("ngram", "ngram_gpu", "suffix")


def engine_plan(vllm_config: Any) -> Plan:
    """Return an engine's plan: ``additional_config["pop_ext"]["plan"]``, else what ``pop_ext.enable`` runs without one.

    Raises:
        ValueError: the plan is for another model, its fit lies in the model's folder, or a setting is unknown.
        TypeError: the plan is no string.
        OSError: the plan cannot be read.
    """
    more = vllm_config.additional_config
    settings = more.get(SECTION, {}) if isinstance(more, dict) else more
    if not isinstance(settings, dict) or settings.keys() - {"plan"}:
        raise ValueError(
            f"additional_config[{SECTION!r}]: expected an object with member 'plan' alone, got {settings!r}"
        )
    config, path = vllm_config.model_config.hf_text_config, settings.get("plan")
    if path is None:
        return _default(vllm_config)
    if not isinstance(path, str):
        raise TypeError(
            f"additional_config[{SECTION!r}]['plan']: expected a saved plan's path, 'third' or 'preset', got {path!r}"
        )
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


class PrunedConfig(VerifyAndUpdateConfig):
    """Check an engine's configuration; vLLM calls it for pop_ext's model classes, before there are workers."""

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        _check(vllm_config)
        engine_plan(vllm_config)
        _refuse_prompt_logprobs(vllm_config)
        # Which rows omitted layers compute is decided in the model's forward. A graph of a whole step that may prefill
        # would skip that decision.
        if vllm_config.optimization_level > 0 and vllm_config.compilation_config.cudagraph_mode != CUDAGraphMode.NONE:
            vllm_config.compilation_config.cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY


def _check(vllm_config: Any) -> None:
    """Reject configurations whose results would silently differ from those asked for.

    Raises:
        ValueError: names the setting, the expected value and the value found.
    """
    parallel, speculative = vllm_config.parallel_config, vllm_config.speculative_config
    offload = vllm_config.offload_config
    refused = {
        "device": (current_platform.is_cpu() or current_platform.is_cuda(), True),
        "VLLM_BATCH_INVARIANT": (envs.VLLM_BATCH_INVARIANT, False),
        "pipeline_parallel_size": (parallel.pipeline_parallel_size, 1),
        "decode_context_parallel_size": (parallel.decode_context_parallel_size, 1),
        "prefill_context_parallel_size": (parallel.prefill_context_parallel_size, 1),
        "enable_dbo, ubatch_size": (parallel.use_ubatching, False),
        "enable_lora": (vllm_config.lora_config is not None, False),
        "kv_transfer_config": (vllm_config.kv_transfer_config, None),
        "kv_offloading_size": (vllm_config.cache_config.kv_offloading_size, None),
        "cpu_offload_gb": (offload.uva.cpu_offload_gb, 0),
        "offload_group_size": (offload.prefetch.offload_group_size, 0),
        "weight_transfer_config": (vllm_config.weight_transfer_config, None),
        "enable_sleep_mode": (vllm_config.model_config.enable_sleep_mode, False),
        "return_sampling_mask": (vllm_config.model_config.return_sampling_mask, False),
        "runner": (vllm_config.model_config.runner_type, "generate"),
    }
    for name, (got, expected) in refused.items():
        if got != expected:
            raise ValueError(f"{name}: expected {expected!r} with pruned prefills, got {got!r}")
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
    kind = "V2" if vllm_config.use_v2_model_runner else "V1"
    model = vllm_config.model_config
    model.logits_processors = [*(model.logits_processors or ()), f"pop_ext.vllm.requests:NoPromptLogprobs{kind}"]
