"""vLLM's models under names that ask for pruned prefills, for ``--hf-overrides '{"architectures": [...]}'``.

They are vLLM's classes unchanged. What prunes a model of any class is ``pop_ext.vllm.decoder.prune``.
"""

from __future__ import annotations

from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM


class POPLlamaForCausalLM(LlamaForCausalLM):
    """vLLM's Llama with pruned prefills."""


class POPMistralForCausalLM(MistralForCausalLM):
    """vLLM's Mistral with pruned prefills."""


class POPQwen2ForCausalLM(Qwen2ForCausalLM):
    """vLLM's Qwen2 and Qwen2.5 with pruned prefills."""


class POPQwen3ForCausalLM(Qwen3ForCausalLM):
    """vLLM's Qwen3 with pruned prefills."""
