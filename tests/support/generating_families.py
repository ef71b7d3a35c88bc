"""The families whose generation is compared with the oracle, and their plan."""

from models import gemma2, gemma3, llama, mistral, mixtral, olmo2, phi3, qwen2, qwen3, qwen3_moe
from pop_ext import Plan

T = 30
LAYERS = 6
PLAN = Plan(LAYERS, (3, 4, 5))
FAMILIES = {
    "llama": llama,
    "mistral": mistral,
    "qwen2": lambda: qwen2(use_sliding_window=True),
    "qwen3": qwen3,
    "phi3": phi3,
    "gemma2": lambda: gemma2(tied=False),  # with random weights, tied and scaled embeddings repeat one token
    "gemma3": lambda: gemma3(tied=False),
    "olmo2": olmo2,
    "mixtral": mixtral,
    "qwen3_moe": qwen3_moe,
}
