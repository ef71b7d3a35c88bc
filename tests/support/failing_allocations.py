"""Let each allocation of the public entries fail in turn, with fail_allocations.cpp preloaded.

Prints a line a failure that was not handled: an exception of another type, another result afterwards, or a changed
cache; and one line ``entry: count`` for each entry. A crash ends the process.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from collections.abc import Callable
from typing import Any

import pop_ext
import torch
from models import hyperclovax, llama, qwen3, tokens
from pop_ext import _core, reference
from pop_ext.hf import native_trial
from pop_ext.portable import trial
from transformers import DynamicCache, StaticCache

INNER = pop_ext.Plan(4, [1, 2])
KINDS = {"new": 0, "tensor": 1, "new of operators": 2}
_LIBRARY = ctypes.CDLL(os.environ["FAIL_ALLOCATIONS"])
_LIBRARY.fail_allocation.argtypes = (ctypes.c_int, ctypes.c_int64)
_LIBRARY.stop_failing.restype = ctypes.c_int64


def count_of(kind: int, call: Callable[[], Any]) -> int:
    """Return how many allocations of a kind a call makes."""
    _LIBRARY.fail_allocation(kind, 0)
    try:
        call()
    finally:
        count = _LIBRARY.stop_failing()
    return int(count)


def fail_each(
    name: str,
    kind: str,
    call: Callable[[], Any],
    state: Callable[[], Any],
    *,
    undo: Callable[[], None] = lambda: None,
    step: int = 1,
    leave_out: int = 0,
    every: int = 16,
) -> None:
    """Let each allocation of ``call`` fail, but the last ``leave_out``, and check that ``state`` is as before.

    Args:
        name: of the entry.
        kind: of allocations, a key of ``KINDS``.
        call: the entry.
        state: what a failed call must not change.
        undo: takes back what a call that succeeds does.
        step: from one allocation that fails to the next one.
        leave_out: so many of the last ones do not fail.
        every: compare the state after so many failures, and after the last one.
    """
    call()
    undo()
    expected_state, number = state(), KINDS[kind]
    count = count_of(number, call) - leave_out
    undo()
    handled = 0
    for nth in range(1, count + 1, step):
        _LIBRARY.fail_allocation(number, nth)
        try:
            call()
        except (MemoryError, RuntimeError) as error:
            caught: BaseException | None = error
        except Exception as error:
            caught = error
            _LIBRARY.stop_failing()
            print(f"FAULT {name}, {kind} {nth} of {count}: {type(error).__name__}: {error}")
        else:
            caught = None
        _LIBRARY.stop_failing()
        if caught is None:
            undo()
        handled += caught is not None
        del caught
        failures = (nth - 1) // step + 1
        if (failures % every == 0 or nth + step > count) and not same(state(), expected_state):
            print(f"FAULT {name}, {kind} {nth} of {count}: the state changed")
    print(json.dumps({"entry": name, "kind": kind, "allocations": count, "raised": handled}), flush=True)


def same(one: Any, other: Any) -> bool:
    """Compare nested lists of tensors and other values."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)


@torch.no_grad()
def main() -> None:
    """Fail the allocations of every entry."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = qwen3(num_hidden_layers=4) if "qwen3" in sys.argv[1:] else llama(num_hidden_layers=4)
    # Layers in the middle: a plan that omits the last one alone computes what the full model does.
    native = pop_ext.load(model, INNER)
    spec, plan = native.spec, native.plan
    spec_text, plan_text = spec.to_json(), plan.to_json()
    weights = [ref.tensor.detach() for ref in native.description.weights]
    ids = tokens(model, 2, 12)
    handle, shapes = native.handle, [_core.SequenceShape(9)]

    def nothing() -> None:
        return None

    def load_and_free() -> None:
        torch.ops.pop.unload(torch.ops.pop.load(spec_text, plan_text, weights))

    def prefilled() -> list[torch.Tensor]:
        return [native.prefill(ids).logits]

    for kind in ("new", "tensor"):
        fail_each("Plan.to_json", kind, plan.to_json, nothing)
        fail_each("Plan.from_json", kind, lambda: _core.Plan.from_json(plan_text), nothing)
        # The last is pybind11's: it registers a constructed object where no exception is caught (3.1.0).
        fail_each("Plan", kind, lambda: _core.Plan(8, [5, 6, 7]), nothing, leave_out=kind == "new")
        fail_each("ModelSpec.to_json", kind, spec.to_json, nothing)
        fail_each("ModelSpec.from_json", kind, lambda: _core.ModelSpec.from_json(spec_text), nothing)
        fail_each("ModelSpec.weight_slots", kind, spec.weight_slots, nothing)
        fail_each("plan_cost", kind, lambda: _core.plan_cost(spec, plan, shapes), nothing)
        fail_each("info", kind, lambda: torch.ops.pop.info(handle), prefilled)
        fail_each("stale_weight", kind, lambda: torch.ops.pop.stale_weight(handle), prefilled)
        fail_each("load, unload", kind, load_and_free, prefilled)
        blocks(kind)

    # Through Python these also construct objects of _core (see above), so only the operators' allocations fail.
    for kind in ("new of operators", "tensor"):
        fail_each("pop_ext.load", kind, lambda: pop_ext.load(model, INNER), prefilled)
        cache = native.prefill(tokens(model, 2, 9, seed=3)).past_key_values

        def contents(cache: Any = cache) -> list[Any]:
            return [[layer.keys.clone(), layer.values.clone()] for layer in cache.layers]

        def second_turn(cache: Any = cache) -> None:
            native.prefill(ids, past_key_values=cache)

        def crop(cache: Any = cache) -> None:
            cache.crop(-ids.shape[1])

        fail_each("prefill", kind, second_turn, contents, undo=crop, every=1)
        fail_each("native.stale_weight", kind, native.stale_weight, prefilled)
        pop_ext.enable(model, INNER, strict=True)
        fail_each("enabled forward", kind, lambda: model(ids, logits_to_keep=1), prefilled)
        fail_each("generate", kind, lambda: model.generate(ids, max_new_tokens=2, do_sample=False), prefilled, step=7)
        fail_each("explain", kind, lambda: pop_ext.explain(model, ids, logits_to_keep=1), prefilled)
        fail_each("score", kind, lambda: pop_ext.score(model, ids, ids), prefilled)
        pop_ext.disable(model)
        in_python(kind, model, ids, prefilled)
        portably(kind, ids)


def portably(kind: str, ids: torch.Tensor) -> None:
    """Fail the allocations of the portable backend, and of both trials."""
    model, native = hyperclovax(layers=4), llama(layers=4)
    pop_ext.enable(model, INNER, strict=True)
    for name, cache in {
        "dynamic": DynamicCache(config=model.config),
        "static": StaticCache(config=model.config, max_cache_len=40),
    }.items():
        model(ids, past_key_values=cache, logits_to_keep=1)
        length = int(cache.get_seq_length())

        def contents(cache: Any = cache) -> list[Any]:
            return [[layer.keys.clone(), layer.values.clone()] for layer in cache.layers]

        def second_turn(cache: Any = cache) -> None:
            model(ids, past_key_values=cache, logits_to_keep=1)

        def undo(cache: Any = cache, length: int = length) -> None:
            if isinstance(cache, DynamicCache):
                cache.crop(-ids.shape[1])
                return
            for layer in cache.layers:
                layer.keys[:, :, length:] = layer.values[:, :, length:] = 0
                layer.cumulative_length.fill_(length)

        fail_each(f"portable forward, {name} cache", kind, second_turn, contents, undo=undo, every=1, step=3)

    def fresh(enabled: Any) -> Callable[[], None]:
        def call() -> None:
            native_trial._passed.clear()
            trial._passed.clear()
            pop_ext.enable(enabled, INNER)

        return call

    def logits() -> list[torch.Tensor]:
        return [model(ids).logits, native(ids).logits]

    fail_each("enable portably, with its trial", kind, fresh(model), logits, step=9)
    fail_each("enable natively, with its trial", kind, fresh(native), logits, step=9)


def in_python(kind: str, model: Any, ids: torch.Tensor, prefilled: Callable[[], Any]) -> None:
    """Fail the allocations of entries that run the modules of the stock model, some of their many.

    Not of Plan.load: it takes no memory of tensors, and what it takes in C++ is that of from_json and of Plan.
    """
    weights = model.state_dict()

    def state() -> list[Any]:
        return [prefilled(), list(weights.values()), model(ids).logits]

    fail_each("reference.prefill", kind, lambda: reference.prefill(model, ids, INNER), state, step=3)
    fail_each("importance", kind, lambda: pop_ext.importance(model, [ids]), state, step=37)
    fail_each("block_influence", kind, lambda: pop_ext.block_influence(model, [ids]), state, step=7)
    fail_each("fit", kind, lambda: pop_ext.fit(model, INNER, [ids, ids], lambdas=[1.0]), state, step=37)


def blocks(kind: str) -> None:
    """Fail the allocations of the building blocks."""
    pop = torch.ops.pop
    x, weight, norm = torch.randn(5, 32), torch.randn(16, 32), torch.rand(32)
    rows, cos = torch.randn(5, 2, 16), torch.rand(5, 16)
    lengths = torch.tensor([0, 5], dtype=torch.int32), *torch.zeros(2, 1, dtype=torch.int32)
    caches = [torch.zeros(1, 2, 8, 16) for _ in range(2)]
    table = torch.arange(8, dtype=torch.int32)[None]

    def state() -> list[torch.Tensor]:
        return [x.clone(), rows.clone(), *(cache.clone() for cache in caches)]

    fail_each("linear", kind, lambda: pop.linear(x, weight), state)
    fail_each("rms_norm", kind, lambda: pop.rms_norm(x, norm, 1e-6), state)
    fail_each("gated_act", kind, lambda: pop.gated_act(x, x, "gelu"), state)
    fail_each("quantize_rows", kind, lambda: pop.quantize_rows(x), state)
    fail_each("fold_kv", kind, lambda: pop.fold_kv([weight], [weight], [norm]), state)
    fail_each("attention", kind, lambda: pop.attention(rows, *caches, *lengths, 0.25, slot_table=table), state)

    # These write, and a call that fails must not have begun to.
    query, stack, one = rows.clone(), torch.ones(64, 32), x.clone()

    def written() -> list[torch.Tensor]:
        return [query.clone(), one.clone(), *(cache.clone() for cache in caches)]

    def undo() -> None:
        query.copy_(rows)
        one.copy_(x)
        for cache in caches:
            cache.zero_()

    def project() -> None:
        pop.kv_project(x, stack, cos, cos, *lengths, 1e-6, [caches[0]], [caches[1]], slot_table=table)

    def write() -> None:
        pop.rope_cache_write(query, rows, rows, cos, cos, *lengths, *caches)

    for name, call in {
        "kv_project": project,
        "rope_cache_write": write,
        "add_rms_norm": lambda: pop.add_rms_norm(one, x, norm, 1e-6),
    }.items():
        fail_each(name, kind, call, written, undo=undo, every=1)


if __name__ == "__main__":
    main()
