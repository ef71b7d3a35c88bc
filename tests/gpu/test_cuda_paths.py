"""Every path through the CUDA backend gives the oracle's result, and the memory of a call is bounded."""

from __future__ import annotations

import pop_ext
import pytest
import torch
from against_oracle import GAPS, assert_equals_oracle, plan_of, run_native, run_oracle, run_stock
from attention_calls import assert_equals_reference, make_call
from models import llama, pad, shared, tokens
from op_operands import DTYPES
from pop_ext import Plan
from tolerance import assert_close_fp32, assert_low_precision, compare_caches
from torch.profiler import ProfilerActivity, profile
from tuning import tuned

pytestmark = pytest.mark.cuda

LOW = (torch.bfloat16, torch.float16)
FLASH, SDPA = "aten::_flash_attention_forward", "aten::scaled_dot_product_attention"

# Options of torch.ops.pop.tune that select another path to the same result.
PATHS = {
    "default": {},
    "no skinny products": {"skinny_rows": 0},
    "every product of up to 64 rows skinny": {"skinny_rows": 64},
    "few rows on tensor cores": {"skinny_mma_rows": 64},
    "own attention": {"library_attention": 0},
    "sdpa": {"sdpa_rows": 1},
    "sdpa for some rows": {"sdpa_rows": 64},
    "fused projection": {"fused_kv_project": 1},
    "fused projection, its row scales first": {"fused_kv_project": 2},
    "fused projection, its last round in halves": {"fused_kv_project": 1, "kv_project_halves": 1},
    "projection layer by layer": {"kv_project_kib": 1},
    "projection of two layers at a time": {"kv_project_kib": 400},
    "early launches": {"early_launch": 1},
}


def supported_model(dtype: torch.dtype):
    """Return a model whose shape every kernel of the backend supports."""
    return shared("qwen3", dtype=dtype, hidden=256, heads=4, kv_heads=2, head_dim=64, intermediate=512)


# Paths


@pytest.mark.parametrize("boundary", [1, 8, 9, 17, 64, 65, 149, 150])
@pytest.mark.parametrize("options", PATHS.values(), ids=PATHS.keys())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_path_equals_the_oracle_at_any_boundary(dtype, options, boundary):
    model = supported_model(dtype)
    ids, mask = pad([tokens(model, n, seed=n) for n in (150, 150, 40)], "left")
    with tuned(**options):
        assert_equals_oracle(model, plan_of(model, GAPS, boundary), ids, mask=mask)


@pytest.mark.parametrize("options", PATHS.values(), ids=PATHS.keys())
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_every_path_continues_a_cache(family, options):
    model = shared(family, dtype=torch.bfloat16)
    plan = plan_of(model, GAPS, 2)
    past = run_oracle(model, plan, tokens(model, 2, 77, seed=1)).cache
    with tuned(**options):
        assert_equals_oracle(model, plan, tokens(model, 2, 131), past=past)


def kernels_of(call) -> str:
    """Return the names of the kernels and of torch's operators that ran."""
    call()  # warms up, and builds the plans of libraries
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize()
    return " ".join(event.key for event in seen.key_averages())


def test_the_fused_projection_runs_when_selected():
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")
    model = supported_model(torch.bfloat16)
    ids = tokens(model, 1, 150)
    native = pop_ext.load(model, plan_of(model, GAPS))
    assert "kv_project_sm90" not in kernels_of(lambda: native.prefill(ids))
    with tuned(fused_kv_project=1):
        assert "kv_project_sm90" in kernels_of(lambda: native.prefill(ids))


@pytest.mark.parametrize(
    ("options", "present", "absent"),
    [
        ({"sdpa_rows": 0}, {FLASH}, {SDPA}),
        ({"sdpa_rows": 100}, {SDPA}, {FLASH}),
        ({"sdpa_rows": 64}, {SDPA, FLASH}, set()),
        ({"library_attention": 0}, {"attention"}, {FLASH, SDPA}),
    ],
    ids=["flash", "sdpa", "sdpa, then flash", "own"],
)
def test_the_selected_attention_runs(options, present, absent):
    providers = pop_ext.ops.attention_providers()["cuda"]
    if "FlashAttention" in providers and options.get("library_attention", 1):
        pytest.skip("needs an environment without flash-attn, which goes before torch's attention")
    if options.get("sdpa_rows") and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")
    model = shared(dtype=torch.bfloat16, layers=1)
    native, ids = pop_ext.load(model, Plan(1, ())), tokens(model, 2, 200)
    with tuned(**options):
        names = kernels_of(lambda: native.prefill(ids, logits_to_keep=200))
    # torch may choose the flash kernel behind sdpa. Then its name does not show that rows were left to it.
    chosen = {name for name in (FLASH, SDPA, "attention") if name in names}
    assert present <= chosen
    if not (SDPA in present and "cudnn" not in names):
        assert not absent & chosen


# Attention alone


@pytest.mark.parametrize(
    "options",
    [{"sdpa_rows": 0}, {"sdpa_rows": 1}, {"sdpa_rows": 64}, {"library_attention": 0}],
    ids=["flash", "sdpa", "both", "own"],
)
@pytest.mark.parametrize("window", [0, 40, 129])
@pytest.mark.parametrize(
    ("lengths", "pasts"), [([65], [0]), ([129, 129], [0, 0]), ([500], [77]), ([200, 200], [64, 64])]
)
@pytest.mark.parametrize("shape", [(4, 4, 64), (8, 2, 128), (8, 1, 80), (2, 1, 256), (6, 2, 96)], ids=str)
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_every_attention_equals_the_reference(dtype, shape, lengths, pasts, window, options):
    with tuned(**options):
        assert_equals_reference(make_call(shape, lengths, pasts, dtype, window, one_start=True))


# Long prompts


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_a_prompt_of_40000_tokens_equals_the_stock_model_and_the_oracle(dtype):
    model = llama(layers=3, heads=2, kv_heads=1, dtype=dtype)
    truth_model = llama(layers=3, heads=2, kv_heads=1, dtype=dtype).float()
    ids = tokens(model, 1, 40_000)
    stock, stock_cache = run_stock(model, ids, logits_to_keep=1)
    truth, truth_cache = run_stock(truth_model, ids, logits_to_keep=1)
    ours = run_native(model, Plan(3, ()), ids)
    assert_low_precision(ours.logits, stock, truth, "logits")
    compare_caches(ours.cache, stock_cache, oracle_fp32=truth_cache)
    assert_equals_oracle(model, Plan(3, (1,), boundary=5), ids)


def test_a_prompt_of_40000_tokens_in_chunks_equals_the_whole():
    model = llama(layers=3, heads=2, kv_heads=1, dtype=torch.float32)
    native, ids = pop_ext.load(model, Plan(3, ())), tokens(model, 1, 40_000)
    whole, cache = native.prefill(ids), None
    for chunk in ids.split([9_999, 20_001, 1, 9_999], dim=1):
        part = native.prefill(chunk, past_key_values=cache)
        cache = part.past_key_values
    assert_close_fp32(part.logits, whole.logits, "logits")
    compare_caches(cache, whole.past_key_values)


# Memory


@pytest.mark.parametrize("options", PATHS.values(), ids=PATHS.keys())
def test_memory_beside_cache_and_rows_is_bounded(options):
    # Rows of 128 channels: x, y, z, k, v and the tables grow with the prompt; MLP and projection run in chunks.
    model = llama(layers=6, hidden=128, heads=2, kv_heads=2, intermediate=4096, dtype=torch.bfloat16)
    native = pop_ext.load(model, Plan(6, (2, 3, 4, 5)))
    extra = []
    with tuned(**options):
        for length in (16_384, 32_768):
            ids = tokens(model, 1, length)
            native.prefill(ids)
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            out = native.prefill(ids)
            torch.cuda.synchronize()
            cache = sum(layer.keys.nbytes + layer.values.nbytes for layer in out.past_key_values.layers)
            extra.append(torch.cuda.max_memory_allocated() - before - cache)
            del out
    row = (3 * 128 + 2 * 128) * 2 + 4 + 2 * 32 * 4 + 3 * 8  # x, y, z, k, v; rstd; cos, sin; tables
    chunks = 2 * 2048 * 4096 * 2 + (96 << 20) + (17 << 20)  # gate and up; the projection; partial results
    # Outside the operator: ids, positions, RoPE tables of the prompt in float32, the attention result of a library.
    beside = 8 * 8 + 6 * 64 * 4 + 2 * 128 * 2
    for length, bytes_ in zip((16_384, 32_768), extra, strict=True):
        assert bytes_ <= length * (row + beside) + chunks, f"{length} tokens: {bytes_ / 2**20:.1f} MiB"
