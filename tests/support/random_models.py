"""Random small models of every native family, and random plans for them, as strategies of hypothesis.

A model is drawn as options of `models.FAMILIES`, which a failing example prints, and built once for equal options.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from against_oracle import NATIVE
from hypothesis import strategies as st
from models import FAMILIES, rope_parameters
from op_operands import DTYPES
from pop_ext import Plan

LAYER_TYPES = ("full_attention", "sliding_attention")
ROPE_KINDS = ("default", "linear", "yarn", "llama3", "proportional")
"""Scalings that keep no state between calls: "dynamic" and "longrope" follow the longest prompt of a model."""


@dataclass(frozen=True)
class RandomModel:
    """A model by family and options. Options are a tuple of pairs, so that models can be remembered."""

    family: str
    options: tuple[tuple[str, Any], ...]

    @property
    def layers(self) -> int:
        return dict(self.options)["layers"]

    @property
    def dtype(self) -> torch.dtype:
        return dict(self.options)["dtype"]

    @property
    def window(self) -> int | None:
        """Tokens of the sliding window; None without one."""
        return dict(self.options).get("sliding_window")

    def build(self) -> torch.nn.Module:
        return _build(self, torch.get_default_device())


@functools.lru_cache(maxsize=8)
def _build(model: RandomModel, _device: torch.device) -> torch.nn.Module:
    options = {name: list(value) if isinstance(value, tuple) else value for name, value in model.options}
    if "rope_kind" in options:
        options["rope"] = options.pop("rope_kind")
    if "rotary_fraction" in options:
        fraction = options.pop("rotary_fraction")
        options["rope_parameters"] = {**rope_parameters("default", 0), "partial_rotary_factor": fraction}
    return FAMILIES[model.family](**options)


@st.composite
def shapes(draw: st.DrawFn) -> dict[str, Any]:
    """Draw the options that every family has.

    Hidden sizes are at least 48: below, a bfloat16 row has too few channels for a comparison of two rounding errors.
    """
    kv_heads = draw(st.integers(1, 3))
    heads = kv_heads * draw(st.integers(1, 4))
    return {
        "layers": draw(st.integers(2, 5)),
        "hidden": draw(st.integers(-(-48 // heads), 130 // heads)) * heads,  # the configs refuse others
        "kv_heads": kv_heads,
        "heads": heads,
        "head_dim": draw(st.sampled_from((8, 16, 24, 32, 64, 72, 80, 96, 128, 256))),
        "intermediate": draw(st.integers(40, 130)),
        "vocab": draw(st.integers(50, 150)),
        "seed": draw(st.integers(0, 3)),
        "dtype": draw(st.sampled_from((torch.float32, *DTYPES))),
        "attn_implementation": draw(st.sampled_from(("sdpa", "eager"))),
    }


@st.composite
def options_of(draw: st.DrawFn, family: str) -> dict[str, Any]:
    """Draw the options of one family."""
    options = draw(shapes())
    windows = st.integers(1, 24)
    if family in ("llama", "mistral", "qwen2", "qwen3"):
        options["rope_kind"] = draw(st.sampled_from(ROPE_KINDS))
    if family in ("gemma2", "gemma3", "qwen2"):
        kinds = st.lists(st.sampled_from(LAYER_TYPES), min_size=options["layers"], max_size=options["layers"])
        options["layer_types"] = tuple(draw(kinds))
        options["sliding_window"] = draw(windows)
    if family in ("mistral", "phi3", "mixtral"):
        options["sliding_window"] = draw(st.one_of(st.none(), windows))
    options |= draw(OWN_OPTIONS.get(family, st.just({})))
    if family in ("mixtral", "qwen3_moe"):  # grouped products of torch, which the oracle uses, refuse other sizes
        options["hidden"] = 8 * options["heads"] * -(-options["hidden"] // (8 * options["heads"]))
        options["intermediate"] = 8 * draw(st.integers(6, 16))
    if family == "qwen3_moe":
        layers = st.integers(0, options["layers"] - 1)
        options["mlp_only_layers"] = tuple(sorted(draw(st.sets(layers, max_size=options["layers"] - 1))))
    return options


def of(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(fields)


SOFT_CAPS = st.sampled_from((None, 1.5, 30.0))
FLAGS = st.booleans()
OWN_OPTIONS = {
    "llama": of(
        attention_bias=FLAGS,
        mlp_bias=FLAGS,
        tied=FLAGS,
        hidden_act=st.sampled_from(("silu", "gelu", "gelu_pytorch_tanh")),
    ),
    "qwen2": of(use_sliding_window=st.just(True)),
    "qwen3": of(attention_bias=FLAGS),
    "phi3": of(rotary_fraction=st.sampled_from((0.25, 0.5, 0.75, 1.0))),
    "gemma2": of(
        attn_implementation=st.just("eager"),  # other implementations omit soft caps
        attn_logit_softcapping=SOFT_CAPS,
        final_logit_softcapping=SOFT_CAPS,
        query_pre_attn_scalar=st.sampled_from((16, 64)),
        tied=FLAGS,
    ),
    "gemma3": of(query_pre_attn_scalar=st.sampled_from((16, 64)), tied=FLAGS),
    "mixtral": st.integers(2, 6).flatmap(
        lambda experts: of(num_local_experts=st.just(experts), num_experts_per_tok=st.integers(1, experts))
    ),
    "qwen3_moe": st.integers(2, 9).flatmap(
        lambda experts: of(
            num_experts=st.just(experts),
            num_experts_per_tok=st.integers(1, experts),
            moe_intermediate_size=st.integers(5, 10).map(lambda n: 8 * n),
            norm_topk_prob=FLAGS,
        )
    ),
}
"""What a family has beside the shapes, its windows and its layers."""


@st.composite
def models(draw: st.DrawFn, families: tuple[str, ...] = NATIVE) -> RandomModel:
    """Draw a model of one of `families`."""
    family = draw(st.sampled_from(families))
    options = draw(options_of(family))
    return RandomModel(family, tuple(sorted(options.items())))


@st.composite
def plans(draw: st.DrawFn, layers: int) -> Plan:
    """Draw a plan for a model of this depth: any set of omitted layers but all."""
    omit = draw(st.sets(st.integers(0, layers - 1), max_size=layers - 1))
    return Plan(layers, sorted(omit), boundary=draw(st.integers(1, 12)), min_tokens=draw(st.integers(0, 40)))


def least_tokens(model: RandomModel) -> int:
    """Return how many tokens one sequence of a call has: some, where two rounding errors are compared."""
    return 1 if model.dtype == torch.float32 else 8
