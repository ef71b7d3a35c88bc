"""Every public entry as a call without arguments, on small models, for tests that call each of them many times.

Plans omit layers in the middle: the last layer's context rows give no more than K and V in any plan, so a plan that
omits it alone computes what the full model does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pop_ext
import torch
from models import hyperclovax, llama, tokens
from pop_ext import _core, env_info, reference
from transformers import StaticCache


def public_entries() -> dict[str, Callable[[], Any]]:
    """Return the calls by name. Each leaves things as they were."""
    model = llama(num_hidden_layers=4)
    inner, ids = pop_ext.Plan(4, [1, 2]), tokens(model, 2, 12)
    native = pop_ext.load(model, inner)
    spec, plan, handle = native.spec, native.plan, native.handle
    spec_text, plan_text = spec.to_json(), plan.to_json()
    weights = [ref.tensor.detach() for ref in native.description.weights]
    static = StaticCache(config=model.config, max_cache_len=32)
    enabled = llama(num_hidden_layers=4)
    pop_ext.enable(enabled, inner, strict=True)
    other = llama(num_hidden_layers=4)
    portable = pop_ext.enable(hyperclovax(layers=4), inner, strict=True)
    assert pop_ext.explain(portable, ids, logits_to_keep=1).backend == "portable"

    def load_and_free() -> None:
        torch.ops.pop.unload(torch.ops.pop.load(spec_text, plan_text, weights))

    def static_prefill() -> None:
        native.prefill(ids, past_key_values=static)
        static.reset()

    def portable_static_prefill() -> None:
        portable(ids, past_key_values=static, logits_to_keep=1)
        static.reset()

    def enable_and_disable() -> None:
        pop_ext.enable(other, inner)
        pop_ext.disable(other)

    def refused() -> None:
        try:
            native.prefill(ids, boundary=0)
        except ValueError:
            return

    def failed() -> None:
        try:
            torch.ops.pop.linear(ids, ids)
        except RuntimeError:
            return

    def refused_load() -> None:
        try:
            pop_ext.load(model, inner, prepack=True)  # float32: refused by each backend
        except ValueError:
            return

    return {
        "Plan": lambda: pop_ext.Plan.last(8, 3),
        "Plan.to_json, from_json": lambda: pop_ext.Plan.from_json(plan.to_json()),
        "ModelSpec.to_json, from_json": lambda: _core.ModelSpec.from_json(spec.to_json()),
        "plan_cost": lambda: _core.plan_cost(spec, plan, [_core.SequenceShape(9)]),
        "torch.ops.pop.load, unload": load_and_free,
        "pop_ext.load, fp8": lambda: pop_ext.load(model, inner, fp8=True),
        "pop_ext.load, int8": lambda: pop_ext.load(model, inner, int8=True),
        "pop_ext.load, refused": refused_load,
        "pop_ext.load": lambda: pop_ext.load(model, inner),
        "native.stale_weight": native.stale_weight,
        "torch.ops.pop.extra_bytes": lambda: torch.ops.pop.extra_bytes(handle),
        "torch.ops.pop.info": lambda: torch.ops.pop.info(handle),
        "torch.ops.pop.stale_weight": lambda: torch.ops.pop.stale_weight(handle),
        "torch.ops.pop.cpu_isa": torch.ops.pop.cpu_isa,
        "torch.ops.pop.foreign_schemas": torch.ops.pop.foreign_schemas,
        "torch.ops.pop.device_missing": lambda: torch.ops.pop.device_missing(ids),
        "torch.ops.pop.int8_isa": torch.ops.pop.int8_isa,
        "torch.ops.pop.products_missing": lambda: torch.ops.pop.products_missing("int8", spec_text, ids),
        "torch.ops.pop.prepack_missing": lambda: torch.ops.pop.prepack_missing(spec_text, ids),
        "env_info": env_info.installation,
        "native.prefill": lambda: native.prefill(ids),
        "native.prefill, static cache": static_prefill,
        "native.prefill, refused": refused,
        "an operator, refused": failed,
        "enable, disable": enable_and_disable,
        "enabled forward": lambda: enabled(ids, logits_to_keep=1),
        "generate": lambda: enabled.generate(ids, max_new_tokens=2, do_sample=False),
        "portable forward": lambda: portable(ids, logits_to_keep=1),
        "portable forward, static cache": portable_static_prefill,
        "portable generate": lambda: portable.generate(ids, max_new_tokens=2, do_sample=False),
        "portable score": lambda: pop_ext.score(portable, ids, ids),
        "explain": lambda: pop_ext.explain(enabled, ids),
        "last_call": lambda: pop_ext.last_call(enabled),
        "stats": lambda: pop_ext.stats(enabled),
        "score": lambda: pop_ext.score(enabled, ids, ids),
        "reference.prefill": lambda: reference.prefill(model, ids, plan),
        "importance": lambda: pop_ext.importance(model, [ids]),
        "block_influence": lambda: pop_ext.block_influence(model, [ids]),
        "fit": lambda: pop_ext.fit(model, inner, [ids, ids], lambdas=[1.0]),
        **blocks(),
    }


def blocks() -> dict[str, Callable[[], Any]]:
    """Return calls of the building blocks."""
    pop = torch.ops.pop
    x, weight, norm = torch.randn(5, 32), torch.randn(16, 32), torch.rand(32)
    rows, cos = torch.randn(5, 2, 16), torch.rand(5, 16)
    stack, key, value = torch.ones(64, 32), rows.clone(), rows.clone()
    lengths = torch.tensor([0, 5], dtype=torch.int32), *torch.zeros(2, 1, dtype=torch.int32)
    keys, values = torch.zeros(2, 1, 2, 8, 16)
    table = torch.arange(8, dtype=torch.int32)[None]
    return {
        "linear": lambda: pop.linear(x, weight),
        "rms_norm": lambda: pop.rms_norm(x, norm, 1e-6),
        "add_rms_norm": lambda: pop.add_rms_norm(x, x * 0, norm, 1e-6),
        "gated_act": lambda: pop.gated_act(x, x, "gelu"),
        "quantize_rows": lambda: pop.quantize_rows(x),
        "fold_kv": lambda: pop.fold_kv([weight], [weight], [norm]),
        "attention": lambda: pop.attention(rows, keys, values, *lengths, 0.25, slot_table=table),
        "rope_cache_write": lambda: pop.rope_cache_write(rows, key, value, cos, cos, *lengths, keys, values),
        "kv_project": lambda: pop.kv_project(
            x, stack, cos, cos, *lengths, 1e-6, [keys], [values], k_norm=[torch.ones(16)], slot_table=table
        ),
    }
