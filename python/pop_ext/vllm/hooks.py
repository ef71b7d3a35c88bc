"""Every private name of vLLM that this plugin uses, in one place, and the check that this vLLM has them all.

Public names (``vllm.LLM``, ``vllm.config``, the plugin entry point) are not listed. A name that moved, or a function
whose parameters changed, is reported by ``missing_hooks``; then no engine is pruned. Nothing else in the package
imports from vLLM's private modules by a name that is not in ``HOOKS``.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any


@dataclass(frozen=True)
class Hook:
    """A name in vLLM that the plugin replaces, subclasses, calls or reads.

    Attributes:
        module: Module of vLLM.
        name: Qualified name within the module.
        parameters: Parameters that the plugin passes, or accepts in its own version; for a dataclass, fields that it
            reads. None: the name is only read.
        use: What the plugin does with it, in a few words.
    """

    module: str
    name: str
    parameters: tuple[str, ...] | None
    use: str

    def complaint(self) -> str | None:
        """Return what this vLLM lacks of the hook; None if it has all."""
        try:
            found: Any = importlib.import_module(self.module)
            for part in self.name.split("."):
                found = getattr(found, part)
        except (ImportError, AttributeError):
            return f"{self.module}.{self.name} is missing"
        if self.parameters is None:
            return None
        known = getattr(found, "__dataclass_fields__", None) or inspect.signature(found).parameters
        if any(getattr(p, "kind", None) is inspect.Parameter.VAR_KEYWORD for p in known.values()):
            return None
        lacking = [name for name in self.parameters if name not in known]
        if lacking:
            return f"{self.module}.{self.name} has no {', '.join(lacking)}"
        return None


_ATTENTION = "vllm.v1.attention.backend"
_CONTEXT = "vllm.forward_context"
_COMPILATION = "vllm.compilation"
_LAYERS = "vllm.model_executor.layers"

HOOKS = (
    # replaced
    Hook("vllm.config", "VllmConfig.try_verify_and_update_config", ("self",), "check an engine that prunes"),
    Hook(
        "vllm.model_executor.model_loader.base_loader",
        "BaseModelLoader.load_model",
        ("self", "vllm_config", "model_config"),
        "prune a loaded model",
    ),
    Hook("vllm.v1.worker.gpu_model_runner", "GPUModelRunner.execute_model", ("self",), "know the prompts of a step"),
    # subclassed
    Hook(_ATTENTION, "subclass_attention_backend", ("name_prefix", "attention_backend_cls", "builder_cls"), "metadata"),
    Hook(_ATTENTION, "AttentionBackend.get_builder_cls", None, "metadata of boundary rows"),
    Hook(_ATTENTION, "AttentionMetadataBuilder.build", ("common_prefix_len", "common_attn_metadata"), "metadata"),
    Hook(_ATTENTION, "AttentionMetadataBuilder.get_cudagraph_support", None, "no graph of a whole prefill"),
    Hook(_ATTENTION, "AttentionCGSupport.UNIFORM_BATCH", None, "no graph of a whole prefill"),
    Hook(
        _ATTENTION,
        "CommonAttentionMetadata",
        (
            "query_start_loc",
            "query_start_loc_cpu",
            "num_actual_tokens",
            "max_query_len",
            "slot_mapping",
            "positions",
            "logits_indices_padded",
            "num_logits_indices",
            "_num_computed_tokens_cache",
            "_token_to_req_indices_cache",
        ),
        "metadata of boundary rows",
    ),
    # called
    Hook(_CONTEXT, "get_forward_context", (), "metadata and cache slots of a step"),
    Hook(_CONTEXT, "is_forward_context_available", (), "the same"),
    Hook(_CONTEXT, "override_forward_context", ("forward_context",), "slots of boundary rows"),
    Hook(
        _CONTEXT,
        "ForwardContext",
        (
            "attn_metadata",
            "slot_mapping",
            "cudagraph_runtime_mode",
            "batch_descriptor",
            "is_padding",
            "all_moe_layers",
        ),
        "the same",
    ),
    Hook(f"{_COMPILATION}.wrapper", "TorchCompileWithNoGuardsWrapper.__init__", ("self",), "compile a stage"),
    Hook(f"{_COMPILATION}.backends", "set_model_tag", ("tag",), "name a stage in vLLM's compile cache"),
    Hook("vllm.distributed.parallel_state", "get_pp_group", (), "the rank's place in the pipeline"),
    Hook("vllm.distributed.parallel_state", "_PP", None, "tell a stage its place in the pipeline"),
    Hook("vllm.distributed", "get_tensor_model_parallel_rank", (), "this rank's heads of a fit"),
    Hook("vllm.model_executor.models.utils", "PPMissingLayer", None, "layers of other stages"),
    Hook("vllm.sequence", "IntermediateTensors", ("tensors",), "what stages hand on"),
    Hook("vllm.utils.torch_utils", "async_tensor_h2d", None, "copy row numbers to the device"),
    # read
    Hook("vllm.v1.worker.gpu_input_batch", "InputBatch", None, "prompts and progress of a step's requests"),
    Hook(f"{_ATTENTION}", "AttentionImpl", None, "its do_kv_cache_update writes K and V"),
    Hook(f"{_LAYERS}.attention", "Attention", None, "attention of a layer: heads, cache, backend"),
    Hook(f"{_LAYERS}.layernorm", "RMSNorm", None, "norms that the fused projection computes"),
    Hook(f"{_LAYERS}.layernorm", "GemmaRMSNorm", None, "the same"),
    Hook(f"{_LAYERS}.linear", "QKVParallelLinear", None, "K and V weights"),
    Hook(f"{_LAYERS}.linear", "LinearBase", None, "count what a plan saves"),
    Hook(f"{_LAYERS}.rotary_embedding.base", "RotaryEmbeddingBase", None, "RoPE of the fused projection"),
    Hook("vllm.lora.punica_wrapper.punica_base", "PunicaWrapperBase.token_lora_indices", None, "adapters of rows"),
    Hook("vllm.v1.sample.logits_processor", "LogitsProcessor", None, "refuse prompt_logprobs"),
    Hook("vllm.v1.worker.gpu.sample.logits_processor.interface", "LogitsProcessor", None, "the same"),
    Hook("vllm.exceptions", "VLLMValidationError", None, "the same"),
)
"""Read in vLLM 0.31 and 0.32, and in the sources of 0.33. tests/vllm/test_vllm_hooks.py holds each of them."""


@cache
def missing_hooks() -> tuple[str, ...]:
    """Return what this vLLM lacks of ``HOOKS``, a phrase for each; empty if pruning is possible."""
    return tuple(complaint for hook in HOOKS if (complaint := hook.complaint()) is not None)


def hooks_table() -> Iterator[str]:
    """Yield the lines of the table in docs/vllm.md."""
    yield "| module | name | used to |"
    yield "|---|---|---|"
    for hook in HOOKS:
        yield f"| `{hook.module}` | `{hook.name}` | {hook.use} |"
