"""Requests of all kinds in one engine with pruned prefills: adapters, preemption, sampling, stops, aborts, many."""

from __future__ import annotations

import copy
import importlib.util
import json
import re

import models
import pop_ext
import pytest
import torch
from tolerance import assert_close_fp32
from vllm_engine import GAPS, engine, prompt, turns

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vllm (make vllm)"),
]
if importlib.util.find_spec("vllm") is not None:
    from safetensors.torch import save_file
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import StructuredOutputsParams

RANK = 4


def adapter(model, names: list[str], folder, seed: int):
    """Save a LoRA adapter of some projections of all layers; return it, and a copy of the model with it merged."""
    generator = torch.Generator().manual_seed(seed)
    merged, tensors = copy.deepcopy(model), {}
    for number, layer in enumerate(merged.model.layers):
        for name in names:
            part = "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "self_attn"
            weight = getattr(getattr(layer, part), name).weight
            a = torch.randn(RANK, weight.shape[1], generator=generator) / weight.shape[1] ** 0.5
            b = torch.randn(weight.shape[0], RANK, generator=generator) / 4
            prefix = f"base_model.model.model.layers.{number}.{part}.{name}"
            tensors[f"{prefix}.lora_A.weight"], tensors[f"{prefix}.lora_B.weight"] = a, b
            weight.data += b @ a
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"r": RANK, "lora_alpha": RANK, "target_modules": names, "peft_type": "LORA", "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return LoRARequest(folder.name, seed, str(folder)), merged


def test_adapters_of_one_batch_run_as_merged_models(tmp_path):
    model = models.shared("llama")
    everywhere = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    whole, merged_whole = adapter(model, everywhere, tmp_path / "whole", 1)
    mlp, merged_mlp = adapter(model, ["gate_proj", "up_proj", "down_proj"], tmp_path / "mlp", 2)
    # All have one: vLLM's CPU build gives rows without an adapter the last one's, beside rows with one.
    cases = [(whole, merged_whole), (mlp, merged_mlp), (whole, merged_whole)]
    prompts = [prompt(length, length) for length in (33, 57, 21)]
    with engine(model, tmp_path, GAPS, enable_lora=True, max_loras=2, max_lora_rank=8) as found:
        requests = [request for request, _ in cases]
        outputs = found.generate(prompts, 4, lora_request=requests)
        [(_, alone)] = found.generate(prompts[:1])  # no adapter in this step
    for ids, (_, expected), (tokens, log_probs) in zip(prompts, cases, outputs, strict=True):
        want, table, _ = turns(expected, GAPS, [ids], 4)
        assert_close_fp32(log_probs, table, f"prompt of {len(ids)}")
        assert tokens == want
    assert_close_fp32(alone, turns(model, GAPS, [prompts[0]])[1], "without adapters")


def test_a_preempted_request_continues_as_if_it_had_not_been(tmp_path):
    model, plan = models.shared("llama"), GAPS.replace(boundary=2)
    prompts = [prompt(60, seed) for seed in range(4)]
    with engine(model, tmp_path, plan, num_gpu_blocks_override=10, max_num_seqs=4) as found:
        scheduler = found.llm.llm_engine.engine_core.engine_core.scheduler
        preempt, count = scheduler._preempt_request, []
        scheduler._preempt_request = lambda *args, **kwargs: (count.append(1), preempt(*args, **kwargs))[1]
        outputs = found.generate(prompts, 40)
    assert count, "expected the cache to be too small for all requests"
    for ids, (tokens, log_probs) in zip(prompts, outputs, strict=True):
        want, table, _ = turns(model, plan, [ids], 40)
        assert tokens == want
        assert_close_fp32(log_probs, table, "log-probabilities")


def test_32_requests_at_once_equal_the_oracle(tmp_path):
    model, prompts = models.shared("llama"), [prompt(20 + length, length) for length in range(32)]
    with engine(model, tmp_path, GAPS, max_num_batched_tokens=2048, max_num_seqs=32) as found:
        outputs = found.generate(prompts, 3)
    for ids, (tokens, log_probs) in zip(prompts, outputs, strict=True):
        want, table, _ = turns(model, GAPS, [ids], 3)
        assert tokens == want
        assert_close_fp32(log_probs, table, f"prompt of {len(ids)}")


def test_requests_of_every_kind_share_an_engine(tmp_path):
    """Sampling of several, stop strings, structured output, and an abort in the midst of a prefill."""
    model = models.shared("llama")
    with engine(model, tmp_path, GAPS, skip_tokenizer_init=False, max_num_batched_tokens=128, max_num_seqs=4) as found:
        tokenizer = found.llm.get_tokenizer()
        ids = torch.tensor(tokenizer("The quick brown fox jumps over the lazy dog, and the dog sleeps.").input_ids)
        want, _, _ = turns(model, GAPS, [ids], 12)
        asked = {"prompt_token_ids": ids.tolist()}
        greedy = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
        [output] = found.llm.generate(asked, greedy, use_tqdm=False)
        assert list(output.outputs[0].token_ids) == want
        text = output.outputs[0].text
        stop = next(character for character in text if character.isascii() and character.isprintable())
        stopping = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, stop=[stop])
        [output] = found.llm.generate(asked, stopping, use_tqdm=False)
        assert output.outputs[0].text == text[: text.index(stop)]

        [output] = found.llm.generate(asked, SamplingParams(n=3, temperature=1.0, max_tokens=5), use_tqdm=False)
        assert len({tuple(one.token_ids) for one in output.outputs}) > 1

        digits = SamplingParams(
            temperature=0.0, max_tokens=8, structured_outputs=StructuredOutputsParams(regex="[0-9]{4}")
        )
        [output] = found.llm.generate(asked, digits, use_tqdm=False)
        assert re.fullmatch("[0-9]{4}", output.outputs[0].text)

        steps = found.llm.llm_engine
        steps.add_request("long", {"prompt_token_ids": prompt(127).tolist()}, greedy)
        steps.add_request("other", asked, greedy)
        steps.step()
        steps.abort_request(["long"])
        done = []
        while steps.has_unfinished_requests():
            done += [output for output in steps.step() if output.finished]
        assert [output.request_id.split("-")[0] for output in done] == ["other"]
        [output] = found.llm.generate(asked, greedy, use_tqdm=False)
        assert list(output.outputs[0].token_ids) == want


def test_weights_loaded_into_a_running_engine_are_folded_again(tmp_path):
    model, other, ids = models.shared("llama"), models.shared("llama", seed=1), prompt(61)
    with engine(model, tmp_path, GAPS) as found:
        found.generate([ids])
        other.save_pretrained(tmp_path / "model")
        found.llm.collective_rpc("reload_weights")
        [(tokens, log_probs)] = found.generate([ids], 6)
    want, table, _ = turns(other, GAPS, [ids], 6)
    assert_close_fp32(log_probs, table, "log-probabilities")
    assert tokens == want


def test_a_model_that_cannot_be_pruned_runs_at_full_depth_if_so_asked(tmp_path, monkeypatch):
    from pop_ext.vllm import decoder

    model, ids = models.shared("llama"), prompt(61)

    def refuse(_):
        raise ValueError("model: expected a form that it has not")

    monkeypatch.setattr(decoder, "find_decoder", refuse)
    with pytest.raises(ValueError, match="expected a form"), engine(model, tmp_path, GAPS):
        pass
    section = {"pop_ext": {"plan": str(tmp_path / "plan.json"), "strict": False}}
    with engine(model, tmp_path, GAPS, additional_config=section) as found:
        [(_, log_probs)] = found.generate([ids])
    assert_close_fp32(log_probs, turns(model, pop_ext.Plan(6, []), [ids])[1], "full depth")


def test_a_long_prompt_in_chunks_with_prefix_hits_equals_turns(tmp_path):
    model, ids = models.shared("qwen3"), prompt(100)
    with engine(model, tmp_path, GAPS, max_num_batched_tokens=32, max_num_seqs=4, enable_prefix_caching=True) as found:
        [(first, _)] = found.generate([ids], 4)
        [(again, _)] = found.generate([ids], 4)
    assert first == turns(model, GAPS, list(ids.split(32)), 4)[0]
    # A hit leaves out whole blocks of 32: the last of them, and what is computed anew, have boundaries of their own.
    assert len(again) == 4
