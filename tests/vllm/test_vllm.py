"""A vLLM engine with pruned prefills equals the oracle in logits, cache and decoding.

Needs vLLM (0.32, here its CPU build): `make vllm`.
"""

from __future__ import annotations

import importlib.util

import models
import pop_ext
import pytest
import torch
from tolerance import assert_close_fp32, assert_low_precision
from vllm_engine import GAPS, engine, prompt, turns

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vllm (make vllm)"),
]
if importlib.util.find_spec("vllm") is not None:
    from vllm.exceptions import VLLMValidationError
    from vllm_engine import GAPS, engine, prompt, turns

FAMILIES = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma2", "gemma3", "phi3", "olmo2")


def model_of(family: str, **over):
    """Return a model with sizes that vLLM supports: Qwen2 ignores head_dim, CPU kernels need multiples of 32."""
    model = models.shared(family, **({"hidden": 256} if family == "qwen2" else {}), **over)
    # vLLM's backend for Transformers models decorates their classes, those of the oracle's model, too.
    model.model.do_not_compile = True
    return model


def assert_cache(found, cache) -> None:
    positions = found.positions()
    assert len(positions) > models.WINDOW
    for number, layer in enumerate(cache.layers):
        for kind, ours, theirs in zip("KV", found.cache(number, positions), (layer.keys, layer.values), strict=True):
            assert_close_fp32(ours, theirs[:, :, positions], f"{kind} of layer {number}")


@pytest.mark.parametrize(
    "plan", [GAPS, GAPS.replace(boundary=9), pop_ext.Plan(6, [])], ids=["gaps", "boundary", "none"]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_cache_and_decoding_equal_the_oracle(family, plan, tmp_path):
    model = model_of(family)
    ids = prompt(61)
    tokens, table, cache = turns(model, plan, [ids], 12)
    with engine(model, tmp_path, plan) as found:
        [(got, log_probs)] = found.generate([ids], 12)
        assert_close_fp32(log_probs, table, "log-probabilities")
        assert got == tokens
        assert len(set(tokens)) > 1 or family in ("gemma2", "gemma3"), "these repeat a token"
        assert_cache(found, cache)


def test_each_sequence_of_a_batch_runs_as_alone(tmp_path):
    model, prompts = models.shared("llama"), [prompt(length, length) for length in (33, 1, 2, 80, 7)]
    plan = GAPS.replace(boundary=4)
    with engine(model, tmp_path, plan) as found:
        for ids, (tokens, log_probs) in zip(prompts, found.generate(prompts, 6), strict=True):
            expected, table, _ = turns(model, plan, [ids], 6)
            assert tokens == expected
            assert_close_fp32(log_probs, table, f"prompt of {len(ids)}")


def test_each_chunk_of_a_prompt_keeps_its_boundary(tmp_path):
    model, ids = models.shared("llama"), prompt(100)
    with engine(model, tmp_path, GAPS, max_num_batched_tokens=32, max_num_seqs=4) as found:
        [(tokens, log_probs)] = found.generate([ids], 6)
        expected, table, cache = turns(model, GAPS, list(ids.split(32)), 6)
        assert tokens == expected
        assert_close_fp32(log_probs, table, "log-probabilities")
        assert_cache(found, cache)
        _, whole, _ = turns(model, GAPS, [ids])
        assert (whole - table[:1]).abs().max() > 0.01, "chunks of another size make another cache"


def test_a_prefix_hit_is_a_second_turn(tmp_path):
    model, plan = models.shared("llama"), GAPS.replace(boundary=9)
    first, second = prompt(64), prompt(20, 1)  # two full blocks of 32; the first turn's boundary lies in the last one
    with engine(model, tmp_path, plan, enable_prefix_caching=True) as found:
        found.generate([first])
        [(tokens, log_probs)] = found.generate([torch.cat([first, second])], 6)
    expected, table, _ = turns(model, plan, [first, second], 6)
    assert tokens == expected
    assert_close_fp32(log_probs, table, "after the hit")
    _, alone, _ = turns(model, plan, [torch.cat([first, second])])
    assert (alone - table[:1]).abs().max() > 0.01, "the first turn's boundary shows"


def test_short_chunks_run_at_full_depth_by_min_tokens(tmp_path):
    model, plan = models.shared("llama"), GAPS.replace(min_tokens=40)
    with engine(model, tmp_path, plan) as found:
        short, long = found.generate([prompt(39), prompt(40)])
    assert_close_fp32(short[1], turns(model, pop_ext.Plan(6, []), [prompt(39)])[1], "39 tokens")
    assert_close_fp32(long[1], turns(model, GAPS, [prompt(40)])[1], "40 tokens")


def test_stages_and_decoding_are_compiled_if_the_engine_compiles(tmp_path, monkeypatch):
    """Compiled when the engine starts, each once, for any number of rows; then no step runs a layer's own Python."""
    from vllm.compilation.counter import compilation_counter
    from vllm.model_executor.models.llama import LlamaDecoderLayer

    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    model, plan, ids = models.shared("llama"), pop_ext.Plan(6, omit=[3, 4], boundary=9), prompt(61)
    tokens, table, _ = turns(model, plan, [ids], 6)
    compiled = compilation_counter.num_aot_compiles
    with engine(model, tmp_path, plan, enforce_eager=False, max_num_seqs=1) as found:
        assert compilation_counter.num_aot_compiles == compiled + 3, "the whole, layers 0 to 3, layers 3 to 6"
        calls: list[int] = []
        monkeypatch.setattr(LlamaDecoderLayer, "forward", lambda *_: calls.append(1))
        [(got, log_probs)] = found.generate([ids], 6)
        assert compilation_counter.num_aot_compiles == compiled + 3
    assert not calls
    assert got == tokens
    assert_close_fp32(log_probs, table, "log-probabilities")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_as_exact_as_the_oracle(dtype, tmp_path):
    ids, plan = prompt(61), GAPS.replace(boundary=3)
    same, exact = models.shared("qwen3", dtype=dtype), models.qwen3()
    exact.load_state_dict({name: value.float() for name, value in same.state_dict().items()})
    with engine(same, tmp_path, plan) as found:
        [(_, log_probs)] = found.generate([ids])
        _, theirs, coarse = turns(same, plan, [ids])
        _, truth, fine = turns(exact, plan, [ids])
        assert_low_precision(log_probs.to(dtype), theirs.to(dtype), truth, "log-probabilities")
        for number in range(6):
            for ours, low, high in zip(
                found.cache(number, list(range(61))),
                (coarse.layers[number].keys[:, :, :61], coarse.layers[number].values[:, :, :61]),
                (fine.layers[number].keys[:, :, :61], fine.layers[number].values[:, :, :61]),
                strict=True,
            ):
                assert_low_precision(ours, low, high, f"cache of layer {number}")


def test_fitted_projections_are_read_from_the_plans_file(tmp_path):
    model = model_of("qwen2")
    plan = pop_ext.fit(model, GAPS, [prompt(60, seed)[None] for seed in range(6)], lambdas=[0.1])
    with engine(model, tmp_path, plan) as found:
        [(tokens, log_probs)] = found.generate([prompt(61)], 6)
        expected, table, cache = turns(model, plan, [prompt(61)], 6)
        assert tokens == expected
        assert_close_fp32(log_probs, table, "log-probabilities")
        assert_cache(found, cache)
    assert (turns(model, GAPS, [prompt(61)])[1] - table[:1]).abs().max() > 0.01


def test_a_fit_on_other_weights_is_refused(tmp_path):
    plan = pop_ext.fit(models.shared("llama"), GAPS, [prompt(60)[None]], lambdas=[0.1])
    with (
        pytest.raises(ValueError, match="fit on the weights that the model has, got one on others"),
        engine(models.shared("llama", seed=1), tmp_path, plan),
    ):
        pass


def test_a_plan_of_another_depth_is_refused(tmp_path):
    with (
        pytest.raises(Exception, match="num_layers=6 like the model, got 5"),
        engine(models.shared("llama"), tmp_path, pop_ext.Plan.last(5)),
    ):
        pass


def test_log_probabilities_of_the_prompt_are_refused(tmp_path):
    with engine(models.shared("llama"), tmp_path, GAPS) as found:
        with pytest.raises(VLLMValidationError, match="prompt_logprobs: expected None"):
            found.generate([prompt(20)], prompt_logprobs=1)
        assert found.generate([prompt(20)])[0][0] == turns(models.shared("llama"), GAPS, [prompt(20)])[0]
