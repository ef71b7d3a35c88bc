"""Names that an engine's configuration uses. This module needs no vLLM."""

from __future__ import annotations

SECTION = "pop_ext"
"""Key in vLLM's ``additional_config``; its member ``plan`` is the path of a plan that ``Plan.save`` wrote."""

ARCHITECTURES = {
    name: f"POP{name}" for name in ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
}
"""vLLM's model class -> the class with pruned prefills."""
