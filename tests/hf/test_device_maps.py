"""Test models that accelerate placed or offloaded.

On one device they run natively, otherwise portably.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pop_ext
import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook, dispatch_model
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from enabled_models import PLAN, T, assert_same_bits, generate
from models import llama, tokens
from pop_ext import UnsupportedModelError, reference
from tolerance import assert_close_fp32, compare_caches
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import AutoModelForCausalLM

PLACES = ("model.embed_tokens", *(f"model.layers.{i}" for i in range(6)), "model.norm", "model.rotary_emb", "lm_head")


@pytest.fixture
def mesh() -> Iterator[Any]:
    """Yield a device mesh of one process."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.fixture
def load(tmp_path: Path) -> Any:
    llama().save_pretrained(tmp_path)

    def with_map(device_map: Any) -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(
            tmp_path, device_map=device_map, offload_folder=tmp_path / "offloaded", dtype=torch.float32
        )

    return with_map


def split(offloaded: tuple[str, ...]) -> dict[str, str]:
    return {place: "disk" if place in offloaded else "cpu" for place in PLACES}


OFFLOADS = {
    "an omitted and a retained layer": ("model.layers.3", "model.layers.4"),
    "embeddings, norms and head": ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"),
    "everything but a layer": tuple(place for place in PLACES if place != "model.layers.2"),
}


@torch.no_grad()
def assert_runs(model: nn.Module, backend: str) -> None:
    ids = tokens(llama(), 2, T)
    expected, cache = reference.prefill(llama(), ids, PLAN)
    stock = generate(model, ids, 8)
    pop_ext.enable(model, PLAN, strict=True, backend=backend)
    output = model(ids, logits_to_keep=1)
    assert pop_ext.last_call(model).backend == backend
    assert_close_fp32(output.logits, expected, "logits")
    compare_caches(output.past_key_values, cache)
    pruned = generate(model, ids, 8)
    assert torch.equal(pruned, generate(pop_ext.enable(llama(), PLAN, strict=True), ids, 8))
    pop_ext.disable(model)
    assert torch.equal(generate(model, ids, 8), stock)


@pytest.mark.parametrize("device_map", [{"": "cpu"}, dict.fromkeys(PLACES, "cpu")], ids=["whole", "by parts"])
@torch.no_grad()
def test_a_map_to_one_device_runs_natively(load, device_map):
    model = pop_ext.enable(load(device_map), PLAN, strict=True)
    ids = tokens(model, 2, T)
    assert_close_fp32(model(ids, logits_to_keep=1).logits, reference.prefill(llama(), ids, PLAN)[0], "logits")
    assert pop_ext.last_call(model).native


BACKENDS = pytest.mark.parametrize("backend", ["portable", "reference"])


@BACKENDS
@pytest.mark.parametrize("offloaded", OFFLOADS)
def test_a_map_that_offloads_a_part_is_refused_natively_and_runs_otherwise(load, offloaded, backend):
    model = load(split(OFFLOADS[offloaded]))
    before = dict(model.__dict__)
    with pytest.raises(UnsupportedModelError, match=r'weight .*offloaded by a device_map.*backend="portable"'):
        pop_ext.enable(model, PLAN, backend="native")
    assert model.__dict__ == before
    assert_runs(model, backend)


@pytest.mark.parametrize("preloaded_classes", [None, ["LlamaDecoderLayer"]], ids=["by module", "by layer"])
@BACKENDS
def test_a_cpu_offloaded_model_runs(preloaded_classes, backend):
    assert_runs(cpu_offload(llama(), execution_device="cpu", preload_module_classes=preloaded_classes), backend)


@torch.no_grad()
def test_hooks_that_move_arguments_between_devices_are_left_to_the_stock_forward_by_name():
    model = dispatch_model(llama(), {"": "cpu"}, force_hooks=True)
    ids = tokens(model, 1, T)
    expected = model(ids, logits_to_keep=1)
    pop_ext.enable(model, PLAN, backend="native")
    with pytest.warns(UserWarning, match=r"a hook of accelerate \(AlignDevicesHook\) on model"):
        assert_same_bits(model(ids, logits_to_keep=1), expected)
    assert pop_ext.last_call(model).rule == "hooks"
    for backend in ("portable", "reference"):
        assert_runs(pop_ext.disable(model), backend)


class Reversing(ModelHook):
    """Hook of a whole model that reverses its input ids and counts its outputs."""

    def __init__(self) -> None:
        self.seen = 0

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return (args[0].flip(1), *args[1:]), kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        self.seen += 1
        return output


@pytest.mark.parametrize("first", ["hook", "enable"])
@torch.no_grad()
def test_a_hook_on_the_model_wraps_the_native_prefill(first):
    model, hook = llama(), Reversing()
    ids = tokens(model, 1, T)
    expected = reference.prefill(model, ids.flip(1), PLAN)[0]
    stock = model(ids.flip(1), logits_to_keep=1)
    steps = [lambda: add_hook_to_module(model, hook), lambda: pop_ext.enable(model, PLAN, strict=True)]
    for step in steps if first == "hook" else steps[::-1]:
        step()
    assert_close_fp32(model(ids, logits_to_keep=1).logits, expected, "logits")
    assert pop_ext.last_call(model).native
    with pop_ext.enabled(model, PLAN.replace(omit=())):
        assert_close_fp32(model(ids, logits_to_keep=1).logits, stock.logits, "logits")
    assert_close_fp32(model(ids, logits_to_keep=1).logits, expected, "logits")
    pop_ext.disable(model)
    assert_same_bits(model(ids, logits_to_keep=1), stock)
    assert hook.seen == 4


@torch.no_grad()
def test_a_model_stays_enabled_when_its_hooks_are_removed():
    model = llama()
    ids = tokens(model, 1, T)
    expected = reference.prefill(model, ids, PLAN)[0]
    add_hook_to_module(model, Reversing())
    pop_ext.enable(model, PLAN, strict=True)
    remove_hook_from_module(model)
    assert_close_fp32(model(ids, logits_to_keep=1).logits, expected, "logits")
    assert pop_ext.last_call(model).native
    stock = llama()(ids, logits_to_keep=1)
    assert_same_bits(pop_ext.disable(model)(ids, logits_to_keep=1), stock)


@torch.no_grad()
def test_a_model_that_is_moved_as_a_whole_for_each_call_runs_natively():
    model, hook = cpu_offload_with_hook(llama(), execution_device="cpu")
    ids = tokens(model, 1, T)
    pop_ext.enable(model, PLAN, strict=True)
    assert_close_fp32(model(ids, logits_to_keep=1).logits, reference.prefill(llama(), ids, PLAN)[0], "logits")
    assert pop_ext.last_call(model).native
    hook.offload()
    assert torch.equal(generate(model, ids, 8), generate(pop_ext.enable(llama(), PLAN), ids, 8))


def shard(linear: nn.Linear, mesh: Any) -> None:
    """Shard a projection by rows, as tensor parallelism does."""
    linear.weight = nn.Parameter(distribute_tensor(linear.weight.detach(), mesh, [Shard(0)]))


def test_a_tensor_parallel_model_is_refused_and_unchanged(mesh):
    model = llama()
    shard(model.model.layers[4].self_attn.k_proj, mesh)
    for refuse in (pop_ext.load, pop_ext.enable):
        with pytest.raises(UnsupportedModelError, match=r"layers.4.k_proj: .*DTensor.*tensor-parallel"):
            refuse(model, PLAN)
    assert "forward" not in model.__dict__


@torch.no_grad()
def test_a_model_made_tensor_parallel_runs_the_stock_forward(mesh):
    model = pop_ext.enable(llama(), PLAN)
    shard(model.model.layers[4].self_attn.k_proj, mesh)
    decision = pop_ext.explain(model, tokens(model, 1, T), logits_to_keep=1)
    assert (decision.backend, decision.rule) == ("stock", "model")
    assert "DTensor" in decision.reason


def test_a_shallow_copy_of_a_hooked_model_is_refused_and_a_deep_one_runs():
    """Its forward is the original's, so enabling it would change nothing, silently."""
    model = cpu_offload(llama(), execution_device="cpu")
    with pytest.raises(RuntimeError, match="expected the model that accelerate has hooked, got a copy"):
        pop_ext.enable(copy.copy(model), PLAN)
    deep = copy.deepcopy(model)
    with pop_ext.enabled(deep, PLAN, strict=True), torch.no_grad():
        deep(tokens(llama(), 1, 20), use_cache=True, logits_to_keep=1)
        assert pop_ext.last_call(deep).backend == "portable"
