"""The operators refuse tensors without memory, in other layouts, lazily negated, or over memory that they write."""

from __future__ import annotations

import pop_ext
import pytest
import torch
from models import llama
from op_calls import int32, op_call, run_op

pop = torch.ops.pop
LENGTHS = int32([0, 5]), int32([0]), int32([0])
COS = torch.rand(5, 16)


def freed(*shape: int) -> torch.Tensor:
    tensor = torch.randn(shape)
    tensor.untyped_storage().resize_(0)
    return tensor


def shrunk(*shape: int) -> torch.Tensor:
    tensor = torch.randn(shape)
    tensor.untyped_storage().resize_(tensor.numel() * 4 - 4)
    return tensor


def caches() -> list[torch.Tensor]:
    return [torch.zeros(1, 2, 8, 16), torch.zeros(1, 2, 8, 16)]


def project(x: torch.Tensor | None = None, keys: torch.Tensor | None = None, **more) -> None:
    key, value = caches()
    x = torch.randn(5, 32) if x is None else x
    pop.kv_project(x, torch.ones(64, 32), COS, COS, *LENGTHS, 1e-6, [key if keys is None else keys], [value], **more)


def write(*, query=None, key=None, cache=None, **more) -> None:
    keys, values = caches()
    query = torch.randn(5, 2, 16) if query is None else query
    key = torch.randn(5, 2, 16) if key is None else key
    pop.rope_cache_write(query, key, key.clone(), COS, COS, *LENGTHS, keys if cache is None else cache, values, **more)


@pytest.mark.parametrize("without_memory", [freed, shrunk])
def test_a_tensor_without_memory_is_refused(without_memory):
    memory = "expected a tensor with memory for its elements"
    with pytest.raises(RuntimeError, match=f"pop::linear: x: {memory}"):
        pop.linear(without_memory(5, 32), torch.ones(16, 32))
    with pytest.raises(RuntimeError, match=f"pop::kv_project: hidden: {memory}"):
        project(without_memory(5, 32))
    with pytest.raises(RuntimeError, match=f"pop::kv_project: key_cache: {memory}"):
        project(keys=without_memory(1, 2, 8, 16))
    for name, width in {"k_bias": 32, "v_bias": 32, "k_norm": 16}.items():
        with pytest.raises(RuntimeError, match=rf"pop::kv_project: {name}\[0\]: {memory}"):
            project(**{name: [without_memory(width)]})


def test_a_zero_tensor_without_memory_is_refused_in_a_list():
    with pytest.raises(RuntimeError, match=r"k_norm\[0\]: expected a tensor with memory"):
        project(k_norm=[torch._efficientzerotensor((16,))])


def test_a_weight_that_was_freed_before_load_is_refused():
    model = llama()
    native = pop_ext.load(model, "third")
    weights = [ref.tensor.detach().clone() for ref in native.description.weights]
    weights[3].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"pop::load: weight layers\.0\.q_proj: expected a tensor with memory"):
        pop.load(native.spec.to_json(), native.plan.to_json(), weights)
    parameter = model.model.layers[1].mlp.up_proj.weight
    parameter.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"weight layers\.1\.up_proj: expected a tensor with memory"):
        pop_ext.load(model, "third")


def test_features_without_memory_are_refused():
    native = pop_ext.load(llama(), "third")
    spec = native.spec
    keys, values = ([torch.zeros(1, spec.num_kv_heads, 2, spec.head_dim) for _ in range(spec.num_layers)] for _ in "kv")
    tables = [torch.ones(2, spec.rotary_dim)] * 2
    ones = int32([1])
    for features in (freed(2, spec.hidden_size), torch._efficientzerotensor((2, spec.hidden_size))):
        with pytest.raises(RuntimeError, match=r"features\[0\]: expected a tensor with memory"):
            pop.prefill(
                native.handle, torch.tensor([1, 2]), *tables, int32([0, 2]), int32([0]), int32([0]), ones, ones, keys,
                values, feature_index=torch.tensor([0, 1]), features=[features],
            )  # fmt: skip


@pytest.mark.parametrize("name", ["k_bias", "v_bias", "k_norm"])
def test_a_lazily_negated_tensor_in_a_list_is_refused(name):
    with pytest.raises(RuntimeError, match=rf"pop::kv_project: {name}\[0\]: expected resolved values"):
        project(**{name: [torch._neg_view(torch.ones(16 if name == "k_norm" else 32))]})


def test_an_operator_that_writes_refuses_negated_tensors_before_it_writes():
    query = torch.randn(5, 2, 16)
    before, cache = query.clone(), torch.zeros(1, 2, 8, 16)
    with pytest.raises(RuntimeError, match="pop::rope_cache_write: key_cache: expected resolved values in a"):
        write(query=query, cache=torch._neg_view(cache))
    assert torch.equal(query, before)
    assert not cache.any()
    with pytest.raises(RuntimeError, match="pop::add_rms_norm: x: expected resolved values"):
        pop.add_rms_norm(torch._neg_view(torch.ones(2, 32)), torch.ones(2, 32), torch.ones(32), 1e-6)
    with pytest.raises(RuntimeError, match=r"pop::kv_project: key_cache\[0\]: expected resolved values"):
        project(keys=torch._neg_view(cache))


def test_an_operator_that_writes_resolves_negated_tensors_that_it_reads():
    x, keys, table = torch.randn(5, 32), torch.zeros(1, 2, 8, 16), int32([0, -1, -2, -3, -4])[None]
    project(-x, keys := torch.zeros(1, 2, 8, 16), slot_table=-table)
    project(torch._neg_view(x), negated := torch.zeros(1, 2, 8, 16), slot_table=torch._neg_view(table))
    assert keys.any()
    assert torch.equal(negated, keys)
    with pytest.raises(RuntimeError, match=r"pop::kv_project: k_norm\[0\]: expected resolved values"):
        project(torch._neg_view(x), k_norm=[torch._neg_view(torch.ones(16))])
    native = pop_ext.load(llama(), "third")
    embeds = torch.randn(5, native.spec.hidden_size)
    calls = [op_call(native, [torch.arange(5)]) for _ in "xy"]
    expected = run_op({**calls[0], "input": -embeds})
    assert torch.equal(run_op({**calls[1], "input": torch._neg_view(embeds)}), expected)
    features = {"feature_index": torch.arange(5), "features": [torch._neg_view(embeds)]}
    with pytest.raises(RuntimeError, match=r"pop::prefill: features\[0\]: expected resolved values"):
        run_op({**calls[1], "input": torch._neg_view(embeds), **features})


def test_a_written_tensor_may_hold_what_a_negated_one_is_a_view_of():
    rows, weight = torch.randn(5, 32), torch.ones(32)
    x, expected = rows.clone(), rows.clone()
    pop.add_rms_norm(expected, -rows, weight, 1e-6)
    pop.add_rms_norm(x, torch._neg_view(x), weight, 1e-6)
    assert torch.equal(x, expected)


def test_an_operator_that_only_reads_takes_negated_and_zero_tensors():
    x, weight = torch.randn(5, 32), torch.randn(16, 32)
    assert torch.equal(pop.linear(torch._neg_view(x), weight), -pop.linear(x, weight))
    assert not pop.linear(torch._efficientzerotensor((5, 32)), weight).any()


@pytest.mark.parametrize("convert", [torch.Tensor.to_sparse, torch.Tensor.to_sparse_csr, torch.Tensor.to_mkldnn])
@pytest.mark.filterwarnings("ignore:Sparse")
def test_another_layout_is_refused(convert):
    x, weight = torch.randn(5, 32), torch.randn(16, 32)
    with pytest.raises(RuntimeError, match="pop::linear: x: expected a dense tensor"):
        pop.linear(convert(x), weight)
    with pytest.raises(RuntimeError, match="pop::linear: weight: expected a dense tensor"):
        pop.linear(x, convert(weight))
    with pytest.raises(RuntimeError, match=r"pop::fold_kv: v_proj\[0\]: expected a dense tensor"):
        pop.fold_kv([weight], [convert(weight)], [])


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_a_quantised_tensor_is_refused():
    x = torch.quantize_per_tensor(torch.randn(5, 32), 0.1, 0, torch.qint8)
    with pytest.raises(RuntimeError, match="pop::linear: x: expected float32, bfloat16 or float16, got another dtype"):
        pop.linear(x, torch.randn(16, 32))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_none_is_refused_by_every_device(device):
    with pytest.raises(RuntimeError, match="pop::linear: weight: expected a tensor, got None"):
        pop.linear(torch.ones(2, 32, device=device), None)


def test_add_rms_norm_refuses_what_it_reads_in_what_it_writes():
    rows = torch.randn(5, 96)
    x, delta, norm = rows[:, :32], rows[:, 32:64], torch.ones(32)
    expected = x + delta
    pop.add_rms_norm(x, delta, norm, 1e-6)  # rows that interleave share nothing
    assert torch.equal(x, expected)
    for name, arguments in {
        "delta": (x, rows[:, 16:48], norm),
        "weight": (x, delta, x[0]),
        "delta_bias": (x, delta, norm, 1e-6, x[1]),
        "delta_norm": (x, delta, norm, 1e-6, None, x[2]),
    }.items():
        with pytest.raises(RuntimeError, match=f"{name}: expected memory of its own, got memory shared with x"):
            pop.add_rms_norm(*arguments, *(() if len(arguments) > 3 else (1e-6,)))


def test_operators_refuse_caches_that_hold_what_they_read():
    cache = torch.zeros(1, 2, 8, 16)
    with pytest.raises(RuntimeError, match="rope_cache_write: key: .*shared with key_cache"):
        write(key=cache[0, :, :5].transpose(0, 1), cache=cache)
    with pytest.raises(RuntimeError, match="rope_cache_write: k_norm: .*shared with key_cache"):
        write(cache=cache, k_norm=cache[0, 0, 0])
    with pytest.raises(RuntimeError, match="kv_project: hidden: .*shared with key_cache"):
        project(cache.view(-1)[:160].view(5, 32), keys=cache)
    with pytest.raises(RuntimeError, match=r"kv_project: k_bias\[0\]: .*shared with key_cache"):
        project(keys=cache, k_bias=[cache[0, 0, :2].view(32)])


@pytest.mark.parametrize("of", ["key_cache", "value_cache"])
def test_prefill_refuses_a_cache_in_a_weight(of):
    model = llama()
    native = pop_ext.load(model, pop_ext.Plan(6, [1, 2]))
    weights = {
        "layers.1.q_proj": model.model.layers[1].self_attn.q_proj.weight,
        "layers.2.k_proj": model.model.layers[2].self_attn.k_proj.weight,  # folded
        "embed_tokens": model.model.embed_tokens.weight,
        "norm": model.model.norm.weight,
    }
    for name, weight in weights.items():
        call = op_call(native, [torch.arange(5)])
        cache = torch.zeros(weight.numel() + call[of][2].numel())
        values = weight.detach().clone()
        cache[3 : 3 + weight.numel()] = values.view(-1)
        weight.data = cache[3 : 3 + weight.numel()].view_as(weight)
        native.refresh()
        call = op_call(native, [torch.arange(5)])
        call[of][2] = cache[: call[of][2].numel()].view_as(call[of][2])
        with pytest.raises(RuntimeError, match=rf"{of}\[2\]: expected memory .* shared with weight {name}"):
            run_op(call)
        assert torch.equal(weight, values)


def test_a_cache_may_lie_between_the_rows_of_a_weight():
    model = llama()
    weight, plan = model.model.layers[0].mlp.down_proj.weight, pop_ext.Plan(6, [1, 2])
    native = pop_ext.load(model, plan)
    expected = run_op(op_call(native, [torch.arange(5)]))
    heads, dim = native.spec.num_kv_heads, native.spec.head_dim
    rows, columns = weight.shape
    buffer = torch.zeros(rows, columns + heads * dim)
    buffer[:, :columns] = weight.detach()
    weight.data = buffer[:, :columns]
    native.refresh()
    call = op_call(native, [torch.arange(5)])
    call["key_cache"][0] = buffer[:, columns:].view(1, rows, heads, dim).transpose(1, 2)
    assert torch.equal(run_op(call), expected)
    call["key_cache"][0] = buffer[:, columns - 1 : -1].view(1, rows, heads, dim).transpose(1, 2)
    with pytest.raises(RuntimeError, match=r"key_cache\[0\]: .* shared with weight layers.0.down_proj"):
        run_op(call)


def test_query_key_and_value_may_be_views_of_one_tensor():
    fused = torch.randn(5, 3, 2, 16)
    apart = fused.clone()
    (key, value), (other_key, other_value) = caches(), caches()
    pop.rope_cache_write(fused[:, 0], fused[:, 1], fused[:, 2], COS, COS, *LENGTHS, key, value)
    query = apart[:, 0].clone()
    pop.rope_cache_write(query, apart[:, 1].clone(), apart[:, 2].clone(), COS, COS, *LENGTHS, other_key, other_value)
    assert torch.equal(fused[:, 0], query)
    assert torch.equal(key, other_key)
    assert torch.equal(value, other_value)


def test_a_slot_table_may_have_any_number_of_columns_beyond_those_in_use():
    rows, (key, value) = torch.randn(5, 2, 16), caches()
    wide = torch.zeros(1, 1, dtype=torch.int32).expand(1, 2**33)
    with pytest.raises(RuntimeError, match="slot_table: expected every position of sequence 0 in a slot of its own"):
        pop.attention(rows, key, value, *LENGTHS, 0.25, slot_table=wide)
    lengths = int32([0, 5]), int32([2**31 - 6]), int32([0])
    with pytest.raises(
        RuntimeError, match=r"past_lens: expected past and new tokens of at most 8 \(slots of a cache\)"
    ):
        pop.attention(rows, key, value, *lengths, 0.25, slot_table=wide)
