"""The cost model against a count row by row, and the ceilings that the project quotes."""

from __future__ import annotations

import itertools

import pytest
from pop_ext import Plan
from pop_ext._core import ModelSpec, SequenceShape, plan_cost, stock_cost

STAGES = ("qkv", "attention", "o_proj", "mlp", "kv_project", "boundary", "lm_head")


def spec(
    layers: int, hidden: int, heads: int, kv_heads: int, head_dim: int, inner: int, vocab: int, **more
) -> ModelSpec:
    return ModelSpec(
        architecture="any",
        dtype="bfloat16",
        num_layers=layers,
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=inner,
        vocab_size=vocab,
        **more,
    )


SMALL = spec(6, 24, 6, 2, 8, 40, 100, window=[0, 5, 1, 0, 5, 3])
EXPERTS = dict(num_experts=5, experts_per_token=2, moe_intermediate_size=12)
SPARSE = spec(6, 24, 6, 2, 8, 40, 100, window=[0, 5, 1, 0, 5, 3], sparse=[1, 0, 1, 0, 1, 1], **EXPERTS)
SHARED = spec(
    *(6, 24, 6, 2, 8, 40, 100), sparse=[1, 0, 1, 0, 1, 1], **EXPERTS, shared_intermediate_size=16, shared_gate=True
)
LLAMA_8B = spec(32, 4096, 32, 8, 128, 14336, 128256)
LLAMA_1B = spec(16, 2048, 32, 8, 64, 8192, 128256)
QWEN3_VL_8B = spec(36, 4096, 32, 8, 128, 12288, 151936, qk_norm=True)
# Norms count no FLOPs here, so a spec without Gemma's four norms per layer has its cost.
GEMMA_12B = spec(
    48, 3840, 16, 8, 256, 15360, 262208, qk_norm=True, window=[0 if i % 6 == 5 else 1024 for i in range(48)]
)


def flops(cost: dict) -> dict[str, float]:
    return {name: stage["flops"] for name, stage in cost["stages"].items() if stage["flops"]}


def count(model: ModelSpec, plan: Plan | None, batch: list[SequenceShape]) -> dict[str, float]:
    """Count FLOPs by stage, one row and one layer at a time. Without a plan, count those of the stock model."""
    by_stage = dict.fromkeys(STAGES, 0)
    kv = 2 * model.hidden_size * 2 * model.kv_dim
    for sequence, layer in itertools.product(batch, range(model.num_layers)):
        for row in range(sequence.tokens):
            position = sequence.past + row
            seen = min(position + 1, model.window[layer] or position + 1)
            parts = {
                "qkv": kv + 2 * model.hidden_size * model.q_dim,
                "attention": 4 * model.q_dim * seen,
                "o_proj": 2 * model.hidden_size * model.q_dim,
                "mlp": 3 * 2 * model.hidden_size * model.intermediate_size,
            }
            if model.sparse[layer]:
                inner = model.experts_per_token * model.moe_intermediate_size + model.shared_intermediate_size
                parts["mlp"] = 2 * model.hidden_size * (model.num_experts + model.shared_gate + 3 * inner)
            from_end = sequence.tokens - row
            if plan is None:
                role = "full"
            elif from_end > sequence.boundary:  # a context row
                role = "kv" if layer in plan.omit or layer == model.num_layers - 1 else "full"
            elif layer == model.num_layers - 1 and from_end > sequence.logits_to_keep:
                role = "boundary kv"
            else:
                role = "full"
            boundary = plan is not None and layer in plan.omit
            if role == "full":
                for stage, work in parts.items():
                    by_stage["boundary" if boundary else stage] += work
            elif role == "boundary kv":
                by_stage["boundary" if boundary else "qkv"] += kv
            else:
                by_stage["kv_project"] += kv
    for sequence in batch:
        by_stage["lm_head"] += 2 * sequence.logits_to_keep * model.hidden_size * model.vocab_size
    return {stage: work for stage, work in by_stage.items() if work}


BATCHES = {
    "one row": [SequenceShape(1)],
    "shorter than every window": [SequenceShape(2)],
    "one sequence": [SequenceShape(19)],
    "boundary": [SequenceShape(19, boundary=7, logits_to_keep=3)],
    "boundary of all": [SequenceShape(19, boundary=19, logits_to_keep=19)],
    "past shorter than a window": [SequenceShape(11, past=2, boundary=2)],
    "past": [SequenceShape(11, past=40, boundary=2)],
    "several": [
        SequenceShape(1),
        SequenceShape(8, past=3, boundary=8),
        SequenceShape(13, boundary=5, logits_to_keep=2),
    ],
}
OMITTED = [(), (5,), (0,), (1, 2), (4, 5), (0, 2, 4), (1, 3, 4, 5), (0, 1, 2, 3, 4)]


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES.keys())
@pytest.mark.parametrize("omit", OMITTED, ids=str)
@pytest.mark.parametrize("model", [SMALL, SPARSE, SHARED], ids=["dense", "sparse", "shared expert"])
def test_plan_flops_equal_a_row_by_row_count(model, batch, omit):
    plan = Plan(6, omit)
    cost = plan_cost(model, plan, batch)
    assert flops(cost) == count(model, plan, batch)
    assert cost["flops"] == sum(flops(cost).values())


@pytest.mark.parametrize(("rows", "touched"), [(1, 2), (2, 4), (3, 5), (19, 5)])
def test_sparse_layer_bytes_count_the_reachable_experts(rows, touched):
    model = spec(1, 24, 6, 2, 8, 40, 100, sparse=[1], **EXPERTS)
    batch = [SequenceShape(rows, boundary=rows, logits_to_keep=rows)]
    router = rows * 24 + 5 * 24 + rows * 5
    activations = 2 * rows * (24 + 2 * 12 + 12 + 24)
    assert stock_cost(model, batch)["stages"]["mlp"]["bytes"] == 2 * (router + activations + touched * 3 * 12 * 24)


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES.keys())
def test_stock_flops_equal_a_row_by_row_count(batch):
    assert flops(stock_cost(SMALL, batch)) == count(SMALL, None, batch)


def test_stages_are_the_documented_ones():
    assert set(plan_cost(SMALL, Plan(6, [2, 3]), [SequenceShape(9)])["stages"]) == set(STAGES)
    assert set(stock_cost(SMALL, [SequenceShape(9)])["stages"]) == set(STAGES) - {"kv_project", "boundary"}


def test_omitting_only_the_last_layer_saves_nothing():
    batch = [SequenceShape(19, boundary=3)]
    assert plan_cost(SMALL, Plan(6, [5]), batch)["flops"] == plan_cost(SMALL, Plan(6, []), batch)["flops"]


def test_logits_of_all_rows_cost_the_stock_flops():
    batch = [SequenceShape(19, past=3, boundary=19, logits_to_keep=19)]
    for omit in OMITTED:
        assert plan_cost(SMALL, Plan(6, omit), batch)["flops"] == stock_cost(SMALL, batch)["flops"]


def ceilings(model: ModelSpec, plan: Plan, tokens: int = 2048) -> tuple[float, float]:
    """Return the plan's highest possible speed-up over the stock model and over the native full prefill."""
    batch = [SequenceShape(tokens)]
    native = plan_cost(model, plan.replace(omit=()), batch)["flops"]
    work = plan_cost(model, plan, batch)["flops"]
    return stock_cost(model, batch)["flops"] / work, native / work


@pytest.mark.parametrize(
    ("model", "omitted", "against_stock", "against_native"),
    [
        (LLAMA_8B, 10, 1.430, 1.39),
        (LLAMA_1B, 5, 1.43, 1.35),
        (QWEN3_VL_8B, 12, 1.469, None),
        (GEMMA_12B, 16, 1.451, None),
    ],
    ids=["Llama-3.1-8B", "Llama-3.2-1B", "Qwen3-VL-8B text", "Gemma-3-12B"],
)
def test_ceilings_at_2048_tokens_are_the_quoted_ones(model, omitted, against_stock, against_native):
    stock, native = ceilings(model, Plan.last(model.num_layers, omitted))
    assert stock == pytest.approx(against_stock, abs=0.005 if against_stock == 1.43 else 0.001)
    if against_native is not None:
        assert native == pytest.approx(against_native, abs=0.005)


def test_kv_projection_has_the_published_share_of_its_layers():
    cost = plan_cost(LLAMA_8B, Plan.last(32), [SequenceShape(2048)])
    per_layer = (stock_cost(LLAMA_8B, [SequenceShape(2048)])["flops"] - flops(cost)["lm_head"]) / 32
    share = flops(cost)["kv_project"] / (10 * per_layer)
    assert share == pytest.approx(0.0385, rel=0.05)  # by weights; attention scores lower it slightly


def test_the_boundary_step_of_llama_8b_streams_4_36_gb():
    stage = plan_cost(LLAMA_8B, Plan.last(32), [SequenceShape(512)])["stages"]["boundary"]
    assert stage["bytes"] == pytest.approx(4.36e9, rel=0.01)


def test_bytes_count_weights_once_per_batch():
    one = stock_cost(LLAMA_8B, [SequenceShape(1)])
    eight = stock_cost(LLAMA_8B, [SequenceShape(1)] * 8)
    weights = 2 * (32 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 4096 * 14336) + 128256 * 4096)
    assert weights < one["bytes"] < eight["bytes"] < 1.01 * weights
    assert eight["flops"] == 8 * one["flops"]


def test_run_bytes_read_hidden_states_once():
    rows, kv = 99, 2 * SMALL.kv_dim
    for layers in (1, 3):
        stages = plan_cost(SMALL, Plan(6, range(1, 1 + layers)), [SequenceShape(rows + 1)])["stages"]
        run = 2 * (rows * 24 + layers * kv * 24 + rows * layers * kv)
        last = 2 * (rows * 24 + kv * 24 + rows * kv)
        assert stages["kv_project"]["bytes"] == run + last


def test_attention_bytes_count_only_visible_keys_and_values():
    model = spec(1, 24, 6, 2, 8, 40, 100, window=[5])
    batch = [SequenceShape(3, past=10, boundary=3, logits_to_keep=3)]
    # The rows at 10, 11 and 12 see positions 6 to 12.
    assert stock_cost(model, batch)["stages"]["attention"]["bytes"] == 2 * (2 * 3 * 48 + 2 * 7 * 16)


def test_float32_moves_twice_the_bytes_of_bfloat16():
    batch = [SequenceShape(19, boundary=3)]
    wide = ModelSpec.from_json(SMALL.to_json().replace("bfloat16", "float32"))
    assert plan_cost(wide, Plan(6, [3, 4]), batch)["bytes"] == 2 * plan_cost(SMALL, Plan(6, [3, 4]), batch)["bytes"]


@pytest.mark.parametrize(
    ("sequence", "text"),
    [
        (SequenceShape(0), "tokens: expected an integer >= 1, got 0"),
        (SequenceShape(4, past=-1), "past: expected an integer >= 0, got -1"),
        (SequenceShape(4, logits_to_keep=0), "logits_to_keep: expected an integer >= 1, got 0"),
        (SequenceShape(4, boundary=1, logits_to_keep=2), "boundary: expected an integer >= 2, got 1"),
        (SequenceShape(4, boundary=5), "tokens: expected an integer >= 5, got 4"),
    ],
)
def test_impossible_sequences_are_refused(sequence, text):
    with pytest.raises(ValueError, match="expected") as error:
        stock_cost(SMALL, [sequence])
    assert str(error.value) == text


def test_a_plan_for_another_depth_is_refused():
    with pytest.raises(ValueError, match="^plan: expected num_layers=6 like the model, got 7$"):
        plan_cost(SMALL, Plan(7, []), [SequenceShape(4)])
