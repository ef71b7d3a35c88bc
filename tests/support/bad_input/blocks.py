"""Cases of the building blocks of `torch.ops.pop`."""

from __future__ import annotations

from typing import Any

import torch
from op_calls import int32

from bad_input.fixture import Case, pop


def rope_arguments(**over: Any) -> dict[str, Any]:
    """Return valid arguments of rope_cache_write."""
    call = {
        "query": torch.zeros(3, 4, 64),
        "key": torch.zeros(3, 2, 64),
        "value": torch.zeros(3, 2, 64),
        "cos": torch.zeros(3, 64),
        "sin": torch.zeros(3, 64),
        "cu_seqlens": int32([0, 3]),
        "past_lens": int32([0]),
        "cache_start": int32([0]),
        "key_cache": torch.zeros(1, 2, 3, 64),
        "value_cache": torch.zeros(1, 2, 3, 64),
    }
    return {**call, **over}


def attention_arguments(**over: Any) -> dict[str, Any]:
    """Return valid arguments of attention."""
    names = ("query", "key_cache", "value_cache", "cu_seqlens", "past_lens", "cache_start")
    return {**{name: value for name, value in rope_arguments().items() if name in names}, "scale": 1.0, **over}


def kv_project_arguments(**over: Any) -> dict[str, Any]:
    """Return valid arguments of kv_project for two layers."""
    names = ("cos", "sin", "cu_seqlens", "past_lens", "cache_start")
    call = {name: value for name, value in rope_arguments().items() if name in names}
    caches = torch.zeros(2, 2, 1, 2, 3, 64)
    own = {"hidden": torch.zeros(3, 9), "weight": torch.zeros(2 * 2 * 128, 9), "eps": 1e-5}
    return {**call, **own, "key_cache": list(caches[0]), "value_cache": list(caches[1]), **over}


ONE_CACHE = torch.zeros(1, 2, 3, 64)


def fp8_linear(weight: Any = None, scale: Any = None) -> Any:
    values, scales = pop.quantize_rows(torch.ones(32, 16))
    return pop.fp8_linear(torch.zeros(3, 16), values if weight is None else weight, scales if scale is None else scale)


BLOCKS = [
    Case(
        "`fp8_linear` with a weight that is not quantised",
        lambda f: fp8_linear(weight=torch.zeros(32, 16)),
        RuntimeError,
        "pop::fp8_linear: weight: expected dtype float8_e4m3fn, got float32",
    ),
    Case(
        "`fp8_linear` with a weight of another width",
        lambda f: fp8_linear(weight=pop.quantize_rows(torch.ones(32, 32))[0]),
        RuntimeError,
        r"pop::fp8_linear: weight: expected shape \[\*, 16\], got \[32, 32\]",
    ),
    Case(
        "`fp8_linear` with a weight whose size is no multiple of 16",
        lambda f: pop.fp8_linear(torch.zeros(3, 8), *pop.quantize_rows(torch.ones(32, 8))),
        RuntimeError,
        r"pop::fp8_linear: weight: expected multiples of 16, got \[32, 8\]",
    ),
    Case(
        "`fp8_linear` with one scale for all rows",
        lambda f: fp8_linear(scale=torch.ones(1)),
        RuntimeError,
        r"pop::fp8_linear: weight_scale: expected shape \[32\], got \[1\]",
    ),
    Case(
        "`int8_linear` with the weight of another width",
        lambda f: pop.int8_linear(torch.zeros(3, 16), *pop.quantize_rows(torch.ones(32, 48), "int8")),
        RuntimeError,
        r"pop::int8_linear: weight: expected shape \[\*, 16\], got \[32, 48\]",
        on_cuda=False,
    ),
    Case(
        "`int8_linear` with a weight that is not quantised",
        lambda f: pop.int8_linear(torch.zeros(3, 16), torch.ones(32, 16), torch.ones(32)),
        RuntimeError,
        "pop::int8_linear: weight: expected dtype int8, got float32",
        on_cuda=False,
    ),
    Case(
        "`quantize_rows` to another type",
        lambda f: pop.quantize_rows(torch.zeros(3, 8), "int4"),
        RuntimeError,
        "pop::quantize_rows: products: expected fp8 or int8, got 'int4'",
    ),
    Case(
        "`quantize_rows` of integers",
        lambda f: pop.quantize_rows(torch.zeros(3, 8).int()),
        RuntimeError,
        "pop::quantize_rows: x: expected float32, bfloat16 or float16",
    ),
    Case(
        "`rms_norm` with a weight of another width",
        lambda f: pop.rms_norm(torch.zeros(3, 8), torch.zeros(7), 1e-5),
        RuntimeError,
        r"pop::rms_norm: weight: expected shape \[8\], got \[7\]",
    ),
    Case(
        "`rms_norm` of integers",
        lambda f: pop.rms_norm(torch.zeros(3, 8).int(), torch.zeros(8), 1e-5),
        RuntimeError,
        "pop::rms_norm: x: expected float32, bfloat16 or float16",
    ),
    Case(
        "`rms_norm` with a weight of another dtype",
        lambda f: pop.rms_norm(torch.zeros(3, 8), torch.zeros(8).half(), 1e-5),
        RuntimeError,
        "pop::rms_norm: weight: expected dtype float32, got float16",
    ),
    Case(
        "`rms_norm` with a weight on another device",
        lambda f: pop.rms_norm(torch.zeros(3, 8), torch.zeros(8, device="meta"), 1e-5),
        RuntimeError,
        "pop::rms_norm: weight: expected device cpu like x, got meta",
    ),
    Case(
        "`rms_norm` without a weight",
        lambda f: pop.rms_norm(torch.zeros(3, 8), None, 1e-5),
        RuntimeError,
        "pop::rms_norm: weight: expected a tensor, got None",
    ),
    Case(
        "`add_rms_norm` with a bias on another device",
        lambda f: pop.add_rms_norm(*torch.zeros(2, 3, 8), torch.zeros(8), 1e-5, torch.zeros(8, device="meta")),
        RuntimeError,
        "pop::add_rms_norm: delta_bias: expected device cpu like x, got meta",
    ),
    Case(
        "`add_rms_norm` with a delta of another shape",
        lambda f: pop.add_rms_norm(torch.zeros(3, 8), torch.zeros(2, 8), torch.zeros(8), 1e-5),
        RuntimeError,
        r"pop::add_rms_norm: delta: expected shape \[3, 8\], got \[2, 8\]",
    ),
    Case(
        "`gated_act` with another activation",
        lambda f: pop.gated_act(torch.zeros(3, 8), torch.zeros(3, 8), "relu"),
        RuntimeError,
        "pop::gated_act: activation: expected one of silu.*got relu",
    ),
    Case(
        "`gated_act` with up of another shape",
        lambda f: pop.gated_act(torch.zeros(3, 8), torch.zeros(3, 7)),
        RuntimeError,
        r"pop::gated_act: up: expected shape \[3, 8\], got \[3, 7\]",
    ),
    Case(
        "`rope_cache_write` with keys and values in the same memory",
        lambda f: pop.rope_cache_write(**rope_arguments(key_cache=ONE_CACHE, value_cache=ONE_CACHE)),
        RuntimeError,
        "pop::rope_cache_write: value_cache: expected memory of its own, got memory shared with key_cache",
    ),
    Case(
        "`gated_act` with up on another device",
        lambda f: pop.gated_act(torch.zeros(3, 8), torch.zeros(3, 8, device="meta")),
        RuntimeError,
        "pop::gated_act: up: expected device cpu like gate, got meta",
    ),
    Case(
        "`rope_cache_write` with sin on another device",
        lambda f: pop.rope_cache_write(**rope_arguments(sin=torch.zeros(3, 64, device="meta"))),
        RuntimeError,
        "pop::rope_cache_write: sin: expected device cpu like query, got meta",
    ),
    Case(
        "`rope_cache_write` with lengths on another device",
        lambda f: pop.rope_cache_write(**rope_arguments(past_lens=int32([0]).to("meta"))),
        RuntimeError,
        "pop::rope_cache_write: past_lens: expected a tensor on the CPU .*, got meta",
    ),
    Case(
        "`rope_cache_write` with tables wider than a head",
        lambda f: pop.rope_cache_write(**rope_arguments(cos=torch.zeros(3, 66), sin=torch.zeros(3, 66))),
        RuntimeError,
        r"cos: expected shape \[3, rotary_dim\] with an even rotary_dim <= 64, got \[3, 66\]",
    ),
    Case(
        "`rope_cache_write` to a cache that is too small",
        lambda f: pop.rope_cache_write(**rope_arguments(past_lens=int32([1]))),
        RuntimeError,
        "pop::rope_cache_write: key_cache: expected capacity of at least 4 .*got 3",
    ),
    Case(
        "`attention` with a head_dim of 20",
        lambda f: pop.attention(
            **attention_arguments(
                query=torch.zeros(3, 4, 20), key_cache=torch.zeros(1, 2, 3, 20), value_cache=torch.zeros(1, 2, 3, 20)
            )
        ),
        RuntimeError,
        "pop::attention: query: expected a head_dim that is a multiple of 8 up to 256, got 20",
    ),
    Case(
        "`attention` with query heads that are no multiple of the KV heads",
        lambda f: pop.attention(**attention_arguments(query=torch.zeros(3, 3, 64))),
        RuntimeError,
        r"pop::attention: query: expected a multiple of 2 heads \(those of key_cache\), got 3",
    ),
    Case(
        "`attention` with a negative window",
        lambda f: pop.attention(**attention_arguments(window=-1)),
        RuntimeError,
        "pop::attention: window: expected .*0.*got -1",
    ),
    Case(
        "`attention` with a value cache of another shape",
        lambda f: pop.attention(**attention_arguments(value_cache=torch.zeros(1, 1, 3, 64))),
        RuntimeError,
        r"pop::attention: value_cache: expected shape \[\*, 2, \*, 64\], got \[1, 1, 3, 64\]",
    ),
    Case(
        "`kv_project` with a weight for another number of layers",
        lambda f: pop.kv_project(**kv_project_arguments(weight=torch.zeros(256, 9))),
        RuntimeError,
        r"pop::kv_project: weight: expected shape \[512, 9\], got \[256, 9\]",
    ),
    Case(
        "`attention` over a cache on another device",
        lambda f: pop.attention(**attention_arguments(key_cache=torch.zeros(1, 2, 3, 64, device="meta"))),
        RuntimeError,
        "pop::attention: key_cache: expected device cpu like query, got meta",
    ),
    Case(
        "`attention` with lengths on another device",
        lambda f: pop.attention(**attention_arguments(cu_seqlens=int32([0, 3]).to("meta"))),
        RuntimeError,
        "pop::attention: cu_seqlens: expected a tensor on the CPU .*, got meta",
    ),
    Case(
        "`kv_project` with a bias on another device",
        lambda f: pop.kv_project(**kv_project_arguments(v_bias=[torch.zeros(128), torch.zeros(128, device="meta")])),
        RuntimeError,
        r"pop::kv_project: v_bias\[1\]: expected device cpu like the rest of the call, got meta",
    ),
    Case(
        "`kv_project` with lengths on another device",
        lambda f: pop.kv_project(**kv_project_arguments(cache_start=int32([0]).to("meta"))),
        RuntimeError,
        "pop::kv_project: cache_start: expected a tensor on the CPU .*, got meta",
    ),
    Case(
        "`kv_project` with two layers in the same memory",
        lambda f: pop.kv_project(**kv_project_arguments(key_cache=[ONE_CACHE, ONE_CACHE])),
        RuntimeError,
        r"pop::kv_project: key_cache\[1\]: expected memory of its own, got memory shared with key_cache\[0\]",
    ),
    Case(
        "`kv_project` with one bias missing",
        lambda f: pop.kv_project(**kv_project_arguments(k_bias=[torch.zeros(128)])),
        RuntimeError,
        r"pop::kv_project: k_bias: expected 2 tensors \(one a layer\), got 1",
    ),
    Case(
        "`fold_kv` with a norm on another device",
        lambda f: pop.fold_kv([torch.zeros(4, 8)], [torch.zeros(4, 8)], [torch.zeros(8, device="meta")]),
        RuntimeError,
        r"pop::fold_kv: input_norm\[0\]: expected device cpu like k_proj\[0\], got meta",
    ),
    Case(
        "`fold_kv` with one norm missing",
        lambda f: pop.fold_kv([torch.zeros(4, 8)] * 2, [torch.zeros(4, 8)] * 2, [torch.zeros(8)]),
        RuntimeError,
        "pop::fold_kv: expected k_proj, v_proj and input_norm of one length > 0, got 2, 2 and 1",
    ),
]
