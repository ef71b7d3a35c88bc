"""Names and shapes of published models, with how many layers their preset omits.

Plain data that does not import ``Plan``, so that ``Plan.preset`` can import it.
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_PAPER = "POP, arXiv 2602.03295"


@dataclass(frozen=True)
class PresetEntry:
    """Models of one shape, and how many of their deepest layers a prefill omits.

    Attributes:
        names: Hugging Face names of the models.
        config: Members of the models' (text) config that tell their shape.
        num_layers: Depth of the models.
        omitted: Number of deepest layers to omit; None for our suggestion, a third.
        source: Where that number comes from.
    """

    names: tuple[str, ...]
    config: Mapping[str, Any]
    num_layers: int
    omitted: int | None
    source: str

    @property
    def published(self) -> bool:
        """True if the paper gives the number of omitted layers for this model."""
        return self.omitted is not None


def find_entry(name: str) -> PresetEntry:
    """Return the entry of a Hugging Face name.

    Raises:
        ValueError: ``name`` has no preset. The text lists the nearest names that have one.
    """
    entries = {known: entry for entry in ENTRIES for known in entry.names}
    if isinstance(name, str) and name in entries:
        return entries[name]
    near = difflib.get_close_matches(str(name), entries, n=3, cutoff=0.5) or sorted(entries)
    raise ValueError(f"preset: expected a name like {', '.join(near)}, got {reprlib.repr(name)}")


def _entry(
    names: tuple[str, ...],
    model_type: str,
    layers: int,
    hidden: int,
    intermediate: int,
    heads: tuple[int, int],
    vocab: int,
    published: int | None = None,
    **more: int,
) -> PresetEntry:
    config = {
        "model_type": model_type,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "vocab_size": vocab,
        **more,
    }
    source = "pop_ext's suggestion, the deepest third" if published is None else _PAPER
    return PresetEntry(names, config, layers, published, source)


def _and_instruct(*names: str) -> tuple[str, ...]:
    return tuple(name + suffix for name in names for suffix in ("", "-Instruct"))


def _mistral(version: str) -> tuple[str, ...]:
    return f"mistralai/Mistral-7B-{version}", f"mistralai/Mistral-7B-Instruct-{version}"


def _gemma3(size: str) -> tuple[str, ...]:
    return f"google/gemma-3-{size}-pt", f"google/gemma-3-{size}-it"


def _qwen3_vl(size: str) -> tuple[str, ...]:
    return f"Qwen/Qwen3-VL-{size}-Instruct", f"Qwen/Qwen3-VL-{size}-Thinking"


ENTRIES = (
    _entry(_and_instruct("meta-llama/Llama-3.1-8B"), "llama", 32, 4096, 14336, (32, 8), 128256, published=10),
    _entry(
        (*_and_instruct("meta-llama/Llama-3.1-70B"), "meta-llama/Llama-3.3-70B-Instruct"),
        *("llama", 80, 8192, 28672, (64, 8), 128256),
    ),
    _entry(_and_instruct("meta-llama/Llama-3.2-1B"), "llama", 16, 2048, 8192, (32, 8), 128256),
    _entry(_and_instruct("meta-llama/Llama-3.2-3B"), "llama", 28, 3072, 8192, (24, 8), 128256),
    _entry((*_mistral("v0.1"), "mistralai/Mistral-7B-Instruct-v0.2"), "mistral", 32, 4096, 14336, (32, 8), 32000),
    _entry(_mistral("v0.3"), "mistral", 32, 4096, 14336, (32, 8), 32768),
    _entry(_and_instruct("Qwen/Qwen2-0.5B", "Qwen/Qwen2.5-0.5B"), "qwen2", 24, 896, 4864, (14, 2), 151936),
    _entry(_and_instruct("Qwen/Qwen2-1.5B", "Qwen/Qwen2.5-1.5B"), "qwen2", 28, 1536, 8960, (12, 2), 151936),
    _entry(_and_instruct("Qwen/Qwen2.5-3B"), "qwen2", 36, 2048, 11008, (16, 2), 151936),
    _entry(_and_instruct("Qwen/Qwen2-7B", "Qwen/Qwen2.5-7B"), "qwen2", 28, 3584, 18944, (28, 4), 152064),
    _entry(("Qwen/Qwen3-0.6B",), "qwen3", 28, 1024, 3072, (16, 8), 151936),
    _entry(("Qwen/Qwen3-1.7B",), "qwen3", 28, 2048, 6144, (16, 8), 151936),
    _entry(("Qwen/Qwen3-4B",), "qwen3", 36, 2560, 9728, (32, 8), 151936),
    _entry(("Qwen/Qwen3-8B",), "qwen3", 36, 4096, 12288, (32, 8), 151936),
    _entry(("Qwen/Qwen3-14B",), "qwen3", 40, 5120, 17408, (40, 8), 151936),
    _entry(("Qwen/Qwen3-32B",), "qwen3", 64, 5120, 25600, (64, 8), 151936),
    _entry(
        tuple(f"Qwen/Qwen3-30B-A3B{suffix}" for suffix in ("", "-Base", "-Instruct-2507", "-Thinking-2507")),
        *("qwen3_moe", 48, 2048, 6144, (32, 4), 151936),
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
    ),
    _entry(
        ("mistralai/Mixtral-8x7B-v0.1", "mistralai/Mixtral-8x7B-Instruct-v0.1"),
        *("mixtral", 32, 4096, 14336, (32, 8), 32000),
        num_experts=8,
        num_experts_per_tok=2,
    ),
    *(
        _entry(
            (f"openai/gpt-oss-{size}",),
            *("gpt_oss", layers, 2880, 2880, (64, 8), 201088),
            num_local_experts=experts,
            num_experts_per_tok=4,
        )
        for size, layers, experts in (("20b", 24, 32), ("120b", 36, 128))
    ),
    _entry(
        ("Qwen/Qwen1.5-MoE-A2.7B", "Qwen/Qwen1.5-MoE-A2.7B-Chat"),
        *("qwen2_moe", 24, 2048, 5632, (16, 16), 151936),
        num_experts=60,
        num_experts_per_tok=4,
        moe_intermediate_size=1408,
    ),
    _entry(
        ("zai-org/GLM-4.5-Air", "zai-org/GLM-4.5-Air-Base"),
        *("glm4_moe", 46, 4096, 10944, (96, 8), 151552),
        n_routed_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=1408,
    ),
    _entry(
        ("MiniMaxAI/MiniMax-M2",),
        *("minimax_m2", 62, 3072, 1536, (48, 8), 200064),
        num_local_experts=256,
        num_experts_per_tok=8,
    ),
    _entry(
        ("Qwen/Qwen3-VL-30B-A3B-Instruct", "Qwen/Qwen3-VL-30B-A3B-Thinking"),
        *("qwen3_vl_moe_text", 48, 2048, 6144, (32, 4), 151936),
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
    ),
    _entry(("Qwen/Qwen2-VL-7B-Instruct",), "qwen2_vl_text", 28, 3584, 18944, (28, 4), 152064),
    _entry(_qwen3_vl("2B"), "qwen3_vl_text", 28, 2048, 6144, (16, 8), 151936),
    _entry(_qwen3_vl("4B"), "qwen3_vl_text", 36, 2560, 9728, (32, 8), 151936),
    _entry(_qwen3_vl("8B"), "qwen3_vl_text", 36, 4096, 12288, (32, 8), 151936, published=12),
    _entry(_gemma3("1b"), "gemma3_text", 26, 1152, 6912, (4, 1), 262144),
    _entry(_gemma3("4b"), "gemma3_text", 34, 2560, 10240, (8, 4), 262208),
    _entry(_gemma3("12b"), "gemma3_text", 48, 3840, 15360, (16, 8), 262208, published=16),
    _entry(_gemma3("27b"), "gemma3_text", 62, 5376, 21504, (32, 16), 262208),
    _entry(("google/gemma-2-2b", "google/gemma-2-2b-it"), "gemma2", 26, 2304, 9216, (8, 4), 256000),
    _entry(("google/gemma-2-9b", "google/gemma-2-9b-it"), "gemma2", 42, 3584, 14336, (16, 8), 256000),
    _entry(("google/gemma-2-27b", "google/gemma-2-27b-it"), "gemma2", 46, 4608, 36864, (32, 16), 256000),
    _entry(_and_instruct("allenai/OLMo-2-0425-1B"), "olmo2", 16, 2048, 8192, (16, 16), 100352),
    _entry(_and_instruct("allenai/OLMo-2-1124-7B"), "olmo2", 32, 4096, 11008, (32, 32), 100352),
    _entry(_and_instruct("allenai/OLMo-2-1124-13B"), "olmo2", 40, 5120, 13824, (40, 40), 100352),
    _entry(_and_instruct("allenai/OLMo-2-0325-32B"), "olmo2", 64, 5120, 27648, (40, 8), 100352),
    _entry(("microsoft/Phi-3-mini-4k-instruct",), "phi3", 32, 3072, 8192, (32, 32), 32064),
    _entry(("microsoft/phi-4",), "phi3", 40, 5120, 17920, (40, 10), 100352),
    _entry(("HuggingFaceTB/SmolLM3-3B", "HuggingFaceTB/SmolLM3-3B-Base"), "smollm3", 36, 2048, 11008, (16, 4), 128256),
    _entry(("facebook/cwm",), "cwm", 64, 6144, 21504, (48, 8), 128256),
    _entry(("google/gemma-7b", "google/gemma-7b-it"), "gemma", 28, 3072, 24576, (16, 16), 256000),
    _entry(
        ("mistralai/Mistral-Small-3.1-24B-Instruct-2503", "mistralai/Mistral-Small-3.2-24B-Instruct-2506"),
        *("mistral", 40, 5120, 32768, (32, 8), 131072),
    ),
    _entry(
        tuple(f"mistralai/Ministral-3-8B-{kind}-2512" for kind in ("Base", "Instruct", "Reasoning")),
        *("ministral3", 34, 4096, 14336, (32, 8), 131072),
    ),
    _entry(("zai-org/GLM-4-9B-0414",), "glm4", 40, 4096, 13696, (32, 2), 151552),
    _entry(("baidu/ERNIE-4.5-0.3B-PT", "baidu/ERNIE-4.5-0.3B-Base-PT"), "ernie4_5", 18, 1024, 3072, (16, 2), 103424),
    _entry(("Qwen/Qwen2.5-VL-7B-Instruct",), "qwen2_5_vl_text", 28, 3584, 18944, (28, 4), 152064),
    _entry(("Qwen/Qwen2.5-VL-72B-Instruct",), "qwen2_5_vl_text", 80, 8192, 29568, (64, 8), 152064),
    _entry(_and_instruct("Qwen/Qwen2.5-14B"), "qwen2", 48, 5120, 13824, (40, 8), 152064),
    _entry(_and_instruct("Qwen/Qwen2.5-32B"), "qwen2", 64, 5120, 27648, (40, 8), 152064),
    _entry(_and_instruct("Qwen/Qwen2-72B", "Qwen/Qwen2.5-72B"), "qwen2", 80, 8192, 29568, (64, 8), 152064),
)
