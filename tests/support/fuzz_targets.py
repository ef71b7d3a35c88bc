"""The operators of torch.ops.pop and the public Python entries, as calls with valid arguments by name."""

from __future__ import annotations

from typing import Any

import pop_ext
import torch
from fuzz_target import Target
from models import llama, tokens
from op_calls import int32, op_call
from pop_ext import Plan, _core
from transformers import DynamicCache

pop = torch.ops.pop
NOT_FUZZED = {
    "set_interrupt_check": "takes the address of a function, which it cannot check",
    "set_foreign": "says which schema a torch operator has; a wrong one is a wrong call later, by contract",
}
"""Operators that only pop_ext itself calls, while it is imported."""


def rows_ops() -> list[Target]:
    """Return the operators over rows."""
    x, weight, norm = torch.randn(5, 32), torch.randn(16, 32), torch.rand(32)

    def of(name: str, **arguments: Any) -> Target:
        def fresh() -> dict[str, Any]:
            return {
                key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in arguments.items()
            }

        return Target(name, getattr(pop, name), fresh)

    def fold() -> dict[str, Any]:
        weights = [torch.ones(16, 32), torch.full((16, 32), 0.5)]
        return {"k_proj": weights, "v_proj": [w * 2 for w in weights], "input_norm": [norm + 0] * 2, "norm_offset": 0.0}

    int8_weight, int8_scale = pop.quantize_rows(weight, "int8")
    return [
        of("linear", x=x, weight=weight),
        of("rms_norm", x=x, weight=norm, eps=1e-6, weight_offset=0.0),
        of(
            "add_rms_norm",
            x=x,
            delta=x + 1,
            weight=norm,
            eps=1e-6,
            delta_bias=norm + 1,
            delta_norm=None,
            delta_scale=0.5,
        ),
        of(
            "gated_act",
            gate=x,
            up=x + 1,
            activation="gelu",
            gate_bias=norm,
            up_bias=None,
            swiglu_alpha=1.0,
            swiglu_limit=7.0,
        ),
        of("quantize_rows", x=x, products="int8"),
        of("int8_linear", x=x, weight=int8_weight, weight_scale=int8_scale),
        of("fp8_linear", x=x, weight=weight.to(torch.float8_e4m3fn), weight_scale=torch.ones(16)),
        Target("fold_kv", pop.fold_kv, fold),
    ]


def cache_ops() -> list[Target]:
    """Return the operators over caches: two sequences, of 3 tokens after 2 and of 2 tokens."""
    rows, cos = torch.randn(5, 2, 16), torch.rand(5, 16)

    def common() -> dict[str, Any]:
        lengths = {"cu_seqlens": int32([0, 3, 5]), "past_lens": int32([2, 0]), "cache_start": int32([1, 0])}
        return {**lengths, "slot_table": torch.arange(8, dtype=torch.int32).repeat(2, 1)}

    def caches() -> dict[str, Any]:
        generator = torch.Generator().manual_seed(2)
        keys, values = torch.randn(2, 2, 2, 8, 16, generator=generator)
        return {"key_cache": keys.clone(), "value_cache": values.clone()}

    form = {"norm_offset": 0.0, "interleaved": True, "norm_after": False}

    def attention() -> dict[str, Any]:
        blocks = torch.tensor([[0, 0, 2]], dtype=torch.int32)
        more = {"scale": 0.25, "window": 0, "softcap": 0.0, "blocks": blocks, "sinks": torch.ones(2)}
        return {"query": rows.clone(), **caches(), **common(), **more}

    def write() -> dict[str, Any]:
        norms = {"q_norm": torch.ones(16), "k_norm": torch.ones(16), "norm_eps": 1e-6, **form}
        new = {"query": rows.clone(), "key": rows + 1, "value": rows + 2, "cos": cos.clone(), "sin": cos + 1}
        return {**new, **caches(), **common(), **norms}

    def project() -> dict[str, Any]:
        lists = {name: [cache] for name, cache in caches().items()}
        biases = {"k_bias": [torch.ones(32)], "v_bias": [torch.ones(32)], "k_norm": [torch.ones(16)]}
        new = {"hidden": torch.ones(5, 32), "weight": torch.ones(64, 32), "cos": cos.clone(), "sin": cos + 1}
        return {**new, **lists, **common(), **biases, "eps": 1e-6, **form}

    calls = {"attention": attention, "rope_cache_write": write, "kv_project": project}
    return [Target(name, getattr(pop, name), arguments) for name, arguments in calls.items()]


def model_ops(native: pop_ext.NativeModel) -> list[Target]:
    """Return the operators over a loaded model."""
    spec, plan = native.spec.to_json(), native.plan.to_json()
    weights = [ref.tensor.detach() for ref in native.description.weights]

    def load(**arguments: Any) -> None:
        pop.unload(pop.load(**arguments))

    def load_arguments() -> dict[str, Any]:
        options = {"projections": None, "fp8": False, "prepack": False, "int8": False}
        return {"spec": spec, "plan": plan, "weights": [w.clone() for w in weights], **options}

    def prefill() -> dict[str, Any]:
        prompts = [tokens(native.model, n, seed=n) for n in (9, 4)]
        call = op_call(native, prompts, past=[0, 3], start=[1, 0], capacity=14)
        size = call["key_cache"][0].shape[2]
        table = torch.arange(size, dtype=torch.int32).repeat(2, 1)
        flags = {"restore_on_error": True, "window_only": False}
        features = {"feature_index": torch.tensor([0, 1, *[-1] * 11]), "features": [torch.ones(2, 64)]}
        local = {"cos_local": None, "sin_local": None, "blocks": None}
        for cache in (*call["key_cache"], *call["value_cache"]):
            cache.zero_()
        return {**call, "slot_table": table, **flags, **features, **local}

    def restore_tune(option: Any, value: Any) -> None:
        before = pop.tune(option, value)
        native.prefill(tokens(native.model, 1, 40))
        pop.tune(option, before)

    def unload(model: Any) -> None:
        if not (isinstance(model, (int, float)) and 0 < model < 10):  # handles of the models here
            pop.unload(model)

    def handle() -> dict[str, Any]:
        return {"model": native.handle}

    queries = ("info", "extra_bytes", "stale_index", "stale_weight")
    return [
        Target("load", load, load_arguments),
        Target("prefill", pop.prefill, prefill),
        Target("prefill", pop.prefill, prefill),
        *(Target(name, getattr(pop, name), handle) for name in queries),
        Target("unload", unload, lambda: {"model": pop.load(spec, plan, weights)},
               lambda out, arguments: out),
        Target("device_missing", pop.device_missing, lambda: {"like": torch.ones(2)}),
        Target("products_missing", pop.products_missing,
               lambda: {"products": "int8", "spec": spec, "like": torch.ones(2)}),
        Target("prepack_missing", pop.prepack_missing, lambda: {"spec": spec, "like": torch.ones(2)}),
        Target("tune", restore_tune, lambda: {"option": "gemm_blocks", "value": 0}),
    ]  # fmt: skip


def core_entries(native: pop_ext.NativeModel) -> list[Target]:
    """Return plans and specs."""
    spec, plan = native.spec.to_json(), native.plan.to_json()
    shape = {"tokens": 9, "past": 1, "boundary": 2, "logits_to_keep": 1}
    return [
        Target("Plan", Plan, lambda: {"num_layers": 4, "omit": [1, 2], "boundary": 2, "min_tokens": 3}),
        Target("Plan.last", Plan.last, lambda: {"num_layers": 4, "count": None, "fraction": 0.5, "boundary": 1}),
        Target("Plan.preset", Plan.preset, lambda: {"name": next(iter(pop_ext.supported_models()))}),
        Target("Plan.replace", native.plan.replace, lambda: {"omit": [1], "boundary": 2, "min_tokens": 0}),
        Target("Plan.from_json", Plan.from_json, lambda: {"text": plan}),
        Target("ModelSpec.from_json", _core.ModelSpec.from_json, lambda: {"text": spec},
               lambda out, arguments: out.to_json()),
        Target("SequenceShape", _core.SequenceShape, lambda: dict(shape), lambda out, arguments: out.tokens),
        Target("plan_cost", _core.plan_cost,
               lambda: {"spec": native.spec, "plan": native.plan, "batch": [_core.SequenceShape(9)]},
               lambda out, arguments: repr(out)),
    ]  # fmt: skip


def model_entries(native: pop_ext.NativeModel) -> list[Target]:
    """Return the entries that take a model."""
    model = native.model
    enabled, other, stock = (llama(**SMALL) for _ in range(3))
    plan = native.plan
    pop_ext.enable(enabled, plan)
    filled = native.prefill(tokens(model, 2, 3)).past_key_values

    def past() -> DynamicCache:
        cache = DynamicCache()
        for index, layer in enumerate(filled.layers):
            cache.update(layer.keys.clone(), layer.values.clone(), index)
        return cache

    def prefill() -> dict[str, Any]:
        mask = torch.ones(2, 12, dtype=torch.long)
        mask[1, 9:] = 0
        positions = torch.arange(3, 12).repeat(2, 1)
        given = {"input_ids": tokens(model, 2, 9), "inputs_embeds": None, "attention_mask": mask}
        counts = {"boundary": [2, 3], "logits_to_keep": [1, 2], "window_only": False}
        return {**given, "position_ids": positions, "past_key_values": past(), **counts}

    def forward() -> dict[str, Any]:
        mask = torch.ones(2, 9, dtype=torch.long)
        given = {"input_ids": tokens(model, 2, 9), "inputs_embeds": None, "attention_mask": mask, "position_ids": None}
        return {**given, "past_key_values": DynamicCache(), "logits_to_keep": 1, "use_cache": True, "labels": None}

    def enable(model: Any, **options: Any) -> None:
        try:
            pop_ext.enable(model, **options)
        finally:
            pop_ext.disable(other)

    def load_arguments() -> dict[str, Any]:
        return {"model": other, "plan": plan, "fp8": False, "prepack": False, "int8": False, "cuda_graphs": 0}

    def score() -> dict[str, Any]:
        ids = {"context_ids": [[1, 2, 3], tokens(model, 5)], "continuation_ids": [[4, 5], tokens(model, 2)]}
        return {"model": enabled, **ids, "batch_size": 2}

    def fit() -> dict[str, Any]:
        options = {"method": "ridge", "lambdas": [0.1], "weighting": "attention", "seed": 0}
        return {"model": other, "plan": plan, "batches": [tokens(model, 2, 24)], **options}

    def logits(out: Any, arguments: dict[str, Any]) -> Any:
        return out.logits

    def nothing(out: Any, arguments: dict[str, Any]) -> None:
        return None

    return [
        Target("native.prefill", native.prefill, prefill, logits),
        Target("native.prefill", native.prefill, prefill, logits),
        Target("enabled forward", torch.no_grad()(enabled.forward), forward, logits, torch.no_grad()(stock.forward)),
        Target("explain", lambda **call: pop_ext.explain(enabled, **call), forward, lambda out, arguments: str(out)),
        Target("pop_ext.load", pop_ext.load, load_arguments, nothing),
        Target("enable", enable, lambda: {**load_arguments(), "strict": True, "backend": "native"}, nothing),
        Target("score", pop_ext.score, score, lambda out, arguments: out),
        Target("fit", pop_ext.fit, fit, nothing),
    ]


SMALL = {"layers": 4, "hidden": 64, "heads": 4, "kv_heads": 2, "head_dim": 16, "intermediate": 48, "vocab": 50}


def targets() -> list[Target]:
    """Return all targets; a name may be there twice, to be drawn more often."""
    native = pop_ext.load(llama(**SMALL), Plan(4, (1, 3), boundary=2))
    found = [*rows_ops(), *cache_ops(), *model_ops(native), *core_entries(native), *model_entries(native)]
    every = {name.removeprefix("pop::") for name in torch._C._dispatch_get_all_op_names() if name.startswith("pop::")}
    every = {name.removesuffix("_utf8") for name in every}  # called by the operator that decodes their result
    missing = every - {target.name for target in found} - NOT_FUZZED.keys() - WITHOUT_ARGUMENTS
    assert not missing, f"operators without a target: {sorted(missing)}"
    return found


WITHOUT_ARGUMENTS = {"cpu_isa", "foreign_schemas", "int8_isa"}
