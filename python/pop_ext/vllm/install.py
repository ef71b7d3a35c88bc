"""Hook pruning into vLLM: replace the three functions of ``HOOKS`` that an engine passes through.

Each replacement calls the original and returns at once unless the engine's configuration asks for pruning.
"""

from __future__ import annotations

import functools
from typing import Any

from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from pop_ext.plans.plan import Plan
from pop_ext.utils.layer_ranges import format_layers
from pop_ext.vllm.attention import REQUESTS
from pop_ext.vllm.decoder import PrunedPrefill, prune
from pop_ext.vllm.settings import check_engine, engine_boundary, engine_settings, logger

_MARK = "pop_ext"


def install() -> None:
    """Replace the functions; further calls change nothing."""
    if getattr(BaseModelLoader.load_model, _MARK, False):
        return
    VllmConfig.try_verify_and_update_config = _mark(_after_verify(VllmConfig.try_verify_and_update_config))
    BaseModelLoader.load_model = _mark(_after_load(BaseModelLoader.load_model))
    GPUModelRunner.execute_model = _mark(_around_step(GPUModelRunner.execute_model))


def _mark(function: Any) -> Any:
    setattr(function, _MARK, True)
    return function


def _after_verify(original: Any) -> Any:
    @functools.wraps(original)
    def try_verify_and_update_config(self: Any) -> Any:
        found = original(self)
        settings = engine_settings(self)
        if settings is not None:
            try:
                check_engine(self)
            except ValueError as error:
                if settings.strict:
                    raise
                _decline(self, error)
        return found

    return try_verify_and_update_config


def _after_load(original: Any) -> Any:
    @functools.wraps(original)
    def load_model(self: Any, vllm_config: Any, model_config: Any, *args: Any, **kwargs: Any) -> Any:
        model = original(self, vllm_config, model_config, *args, **kwargs)
        settings = engine_settings(vllm_config)
        # A drafter's model comes the same way.
        if settings is None or model_config is not vllm_config.model_config:
            return model
        try:
            plan = check_engine(vllm_config)
            boundary = engine_boundary(vllm_config, plan)
            _announce(vllm_config, plan, boundary, prune(model, vllm_config, plan, boundary))
        except Exception as error:  # the engine was asked to run in any case
            if settings.strict:
                raise
            _decline(vllm_config, error)
        return model

    return load_model


def _around_step(original: Any) -> Any:
    @functools.wraps(original)
    def execute_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        REQUESTS.batch, REQUESTS.declined = self.input_batch, False
        try:
            return original(self, *args, **kwargs)
        finally:
            REQUESTS.batch = None

    return execute_model


def _announce(vllm_config: Any, plan: Plan, boundary: int, found: PrunedPrefill) -> None:
    """Log what runs, in one line; a second one for each run that no single product projects."""
    if get_tensor_model_parallel_rank() > 0:
        return
    omitted = format_layers(plan.omit) if plan.omit else "none"
    fit = "no fit" if plan.projections is None else f"fitted K and V in {len(plan.projections.matrices)} layers"
    logger.info(
        "pop_ext: prefills of %s omit %d of %d layers (%s) for all tokens of a chunk but the last %d; min_tokens %d; "
        "%s; context rows skip %.0f %% of the layers' products (ceiling %.2fx); folded weights take %.1f MiB",
        vllm_config.model_config.model,
        len(plan.omit),
        plan.num_layers,
        omitted,
        boundary,
        plan.min_tokens,
        fit,
        100 * found.skipped,
        1 / (1 - found.skipped),
        sum(projection.extra_bytes for projection in found.projections) / 2**20,
    )
    for projection in found.projections:
        if projection.reason is not None:
            logger.info("pop_ext: layers run their own K and V modules, which is slower: %s", projection.reason)


def _decline(vllm_config: Any, error: Exception) -> None:
    logger.warning_once("pop_ext: %s runs at full depth: %s", vllm_config.model_config.model, error)
