"""Names that an engine's configuration uses. This module needs no vLLM."""

from __future__ import annotations

SECTION = "pop_ext"
"""Key in vLLM's ``additional_config``; ``engine_settings`` describes its members."""

ARCHITECTURES = {
    name: f"POP{name}" for name in ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
}
"""vLLM's model class -> a class of the same model that asks for pruning by its name (``--hf-overrides``)."""
