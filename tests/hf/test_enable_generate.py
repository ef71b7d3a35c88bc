"""Test ``generate`` and ``pipeline`` on an enabled model against the oracle, with every way to decode."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pop_ext
import pytest
import torch
from enabled_models import generate, native_and_oracle, recorded
from generating_families import FAMILIES, LAYERS, PLAN, T
from models import llama, mistral, pad, tokens
from pop_ext import Plan, reference
from tolerance import assert_close_fp32, compare_caches
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    PreTrainedTokenizerFast,
    StaticCache,
    pipeline,
)
from transformers.generation.streamers import BaseStreamer


def assert_generates_as_the_oracle(
    model: nn.Module, ids: Tensor, new: int = 16, plan: Plan = PLAN, **how: Any
) -> Tensor:
    native, oracle = native_and_oracle(model, plan)
    actual, expected = (generate(twin, ids, new, **copy.deepcopy(how)) for twin in (native, oracle))
    assert torch.equal(actual, expected)
    assert pop_ext.last_call(native).native
    assert pop_ext.last_call(oracle).backend == "reference"
    return actual


@pytest.mark.parametrize("family", FAMILIES)
def test_64_greedy_tokens_are_those_of_the_oracle(family):
    model = FAMILIES[family]()
    ids = tokens(model, 1, T)
    output = assert_generates_as_the_oracle(model, ids, 64)
    new = output[0, T:]
    assert len(new) == 64
    assert len(set(new.tolist())) >= 16
    assert not torch.equal(generate(model, ids, 64), output), "the plan changes nothing"


def test_sampled_tokens_are_those_of_the_oracle():
    model = llama()
    assert_generates_as_the_oracle(model, tokens(model, 2, T), 32, do_sample=True, temperature=0.8, top_k=40)


def test_beams_are_those_of_the_oracle():
    model = llama()
    output = assert_generates_as_the_oracle(model, tokens(model, 2, T), num_beams=3, num_return_sequences=2)
    assert output.shape == (4, T + 16)


def test_several_returned_sequences_are_those_of_the_oracle():
    model = llama()
    output = assert_generates_as_the_oracle(model, tokens(model, 2, T), do_sample=True, num_return_sequences=3)
    assert output.shape == (6, T + 16)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_left_padded_batch_generates_as_the_oracle(family):
    model = FAMILIES[family]()
    ids, mask = pad([tokens(model, n, seed=n) for n in (5, T, 21)], "left")
    assert_generates_as_the_oracle(model, ids, attention_mask=mask)


def test_a_batch_generates_what_its_sequences_generate_alone():
    model = pop_ext.enable(llama(), PLAN, strict=True)
    sequences = [tokens(model, n, seed=n) for n in (5, T, 21)]
    ids, mask = pad(sequences, "left")
    together = generate(model, ids, attention_mask=mask)
    for row, sequence in zip(together, sequences, strict=True):
        assert torch.equal(row[T:], generate(model, sequence[None])[0, len(sequence) :])


def test_one_new_token_is_that_of_the_oracle():
    model = llama()
    assert assert_generates_as_the_oracle(model, tokens(model, 3, T), new=1).shape == (3, T + 1)


def test_a_prompt_of_one_token_generates_as_the_stock_model():
    model = llama()
    ids = tokens(model, 1, 1)
    twin = pop_ext.enable(copy.deepcopy(model), PLAN, strict=True)
    assert torch.equal(generate(twin, ids), generate(model, ids))
    assert pop_ext.last_call(twin) is None


def test_a_plan_that_omits_nothing_generates_as_the_stock_model():
    model = llama()
    ids, mask = pad([tokens(model, n, seed=n) for n in (5, T)], "left")
    twin = pop_ext.enable(copy.deepcopy(model), Plan(LAYERS, ()), strict=True)
    expected = generate(model, ids, 32, attention_mask=mask)
    assert torch.equal(generate(twin, ids, 32, attention_mask=mask), expected)
    assert pop_ext.last_call(twin).native


def test_embeddings_as_prompt_generate_as_the_oracle():
    model = llama()
    embeds = model.get_input_embeddings()(tokens(model, 2, T)).detach()
    native, oracle = native_and_oracle(model, PLAN)
    actual, expected = (
        twin.generate(inputs_embeds=embeds, max_new_tokens=12, do_sample=False, pad_token_id=0)
        for twin in (native, oracle)
    )
    assert torch.equal(actual, expected)
    assert pop_ext.last_call(native).native


def test_generate_returns_the_oracles_logits_and_cache():
    model = llama()
    ids = tokens(model, 1, T)
    native, oracle = native_and_oracle(model, PLAN)
    how = {"return_dict_in_generate": True, "output_logits": True, "output_scores": True}
    actual, expected = (generate(twin, ids, 4, **how) for twin in (native, oracle))
    assert torch.allclose(torch.stack(actual.logits), torch.stack(expected.logits), atol=1e-4)
    compare_caches(actual.past_key_values, expected.past_key_values)
    assert actual.past_key_values.get_seq_length() == T + 3


# Caches


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("family", "attention"),
    [*((name, "eager") for name in FAMILIES), *((name, "sdpa") for name in FAMILIES if name != "gemma2")],
)
def test_a_static_cache_is_prefilled_natively(family, attention, padded):
    model = FAMILIES[family]()
    model.set_attn_implementation(attention)
    ids, mask = pad([tokens(model, n, seed=n) for n in ((5, T) if padded else (T, T))], "left")
    twin = pop_ext.enable(model, PLAN, strict=True)
    expected = generate(twin, ids, attention_mask=mask)
    decisions = recorded(twin)
    actual = generate(twin, ids, attention_mask=mask, cache_implementation="static", return_dict_in_generate=True)
    assert torch.equal(actual.sequences, expected)
    assert isinstance(actual.past_key_values, StaticCache)
    assert [d.backend for d in decisions] == ["native"]


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
def test_a_static_cache_of_prompt_length_is_prefilled_natively(family):
    model = pop_ext.enable(FAMILIES[family](), PLAN, strict=True)
    for length in (9, T):  # within the window, where transformers may create no mask, and beyond it
        ids = tokens(model, 2, length)
        assert torch.equal(generate(model, ids, 1, cache_implementation="static"), generate(model, ids, 1))
        assert pop_ext.last_call(model).tokens == (length, length)


def test_a_static_cache_is_reused_for_another_prompt():
    model = pop_ext.enable(llama(), PLAN, strict=True)
    cache = StaticCache(config=model.config, max_cache_len=64)
    for seed in (1, 2):
        ids, mask = pad([tokens(model, n, seed=seed + n) for n in (5, T - seed)], "left")
        cache.reset()
        actual = generate(model, ids, attention_mask=mask, past_key_values=cache)
        assert torch.equal(actual, generate(model, ids, attention_mask=mask))


@pytest.mark.parametrize("with_config", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_given_dynamic_cache_is_filled(family, with_config):
    model = FAMILIES[family]()
    cache = DynamicCache(config=model.config) if with_config else DynamicCache()
    native = pop_ext.enable(model, PLAN, strict=True)
    ids = tokens(model, 1, T)
    assert torch.equal(generate(native, ids, past_key_values=cache), generate(native, ids))
    assert cache.get_seq_length() == T + 15


def two_turns(model: nn.Module, first: Tensor, mask: Tensor, second: Tensor, **how: Any) -> Tensor:
    """Generate twice: the second call gets all ids so far and the cache of the first."""
    one = generate(model, first, 9, attention_mask=mask, return_dict_in_generate=True, **how)
    ids = torch.cat([one.sequences, second], dim=1)
    mask = torch.cat([mask, mask.new_ones(len(ids), ids.shape[1] - mask.shape[1])], dim=1)
    return generate(model, ids, 16, attention_mask=mask, past_key_values=one.past_key_values)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_second_turn_generates_as_the_oracle(family, padded):
    model = FAMILIES[family]()
    first, mask = pad([tokens(model, n, seed=n) for n in ((23, T) if padded else (T, T))], "left")
    second = tokens(model, 2, 13, seed=9)
    native, oracle = native_and_oracle(model, PLAN)
    decisions = recorded(native)
    assert torch.equal(two_turns(native, first, mask, second), two_turns(oracle, first, mask, second))
    # The last token of the first turn is not in the cache yet, so the second turn prefills 14 tokens.
    assert [d.tokens for d in decisions] == [tuple(mask.sum(1).tolist()), (14, 14)]
    assert all(d.native and d.boundary == (1, 1) for d in decisions)


@pytest.mark.parametrize("family", FAMILIES)
def test_second_turns_in_static_and_dynamic_caches_generate_alike(family):
    model = pop_ext.enable(FAMILIES[family](), PLAN, strict=True)
    first, mask = pad([tokens(model, n, seed=n) for n in (11, T)], "left")
    second = tokens(model, 2, 13, seed=9)
    expected = two_turns(model, first, mask, second)
    decisions = recorded(model)
    cache = StaticCache(config=model.config, max_cache_len=96)
    assert torch.equal(two_turns(model, first, mask, second, past_key_values=cache), expected)
    assert len(decisions) == 2
    assert all(d.native for d in decisions)


@torch.no_grad()
def test_a_copied_cache_serves_several_prompts_with_one_prefix():
    model = llama()
    prefix = tokens(model, 1, 17)
    results = []
    for twin in native_and_oracle(model, PLAN):
        cache = twin(prefix, logits_to_keep=1).past_key_values
        outputs = []
        for seed in (1, 2):
            ids = torch.cat([prefix, tokens(model, 1, 12, seed=seed)], dim=1)
            outputs.append(generate(twin, ids, past_key_values=copy.deepcopy(cache)))
        assert cache.get_seq_length() == 17
        results.append(torch.cat(outputs))
    assert torch.equal(*results)
    assert not torch.equal(results[0][0, -16:], results[0][1, -16:])


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@torch.no_grad()
def test_a_full_depth_turn_over_a_pruned_one_keeps_both_depths(family):
    model = FAMILIES[family]()
    first, second = tokens(model, 2, T), tokens(model, 2, 13, seed=9)
    _, expected = reference.prefill(model, first, PLAN)
    cache = DynamicCache()  # keeps every position, so that all can be compared
    with pop_ext.enabled(model, PLAN, strict=True):
        model(first, past_key_values=cache, logits_to_keep=1)
    pruned = copy.deepcopy(cache)
    compare_caches(pruned, expected)
    ours = model(second, past_key_values=cache, logits_to_keep=1).logits
    theirs = model(second, past_key_values=expected, logits_to_keep=1).logits
    assert_close_fp32(ours, theirs, "logits")
    compare_caches(cache, expected)
    cache.crop(-13)
    compare_caches(cache, pruned, atol=0.0)


@torch.no_grad()
def test_a_cropped_cache_serves_another_prompt_with_the_same_prefix():
    model = llama()
    prompt = tokens(model, 1, T)
    other = torch.cat([prompt[:, :20], tokens(model, 1, 12, seed=4)], dim=1)
    results = []
    for twin in native_and_oracle(model, PLAN):
        cache = twin(prompt, logits_to_keep=1).past_key_values
        cache.crop(-(T - 20))
        results.append(generate(twin, other, past_key_values=cache))
        assert cache.get_seq_length() == other.shape[1] + 15
    assert torch.equal(*results)


# Ways to prefill and to decode


@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}], ids=["dynamic", "static"])
@pytest.mark.parametrize("size", [7, 16, 29])  # 29 leaves a chunk of one token
@pytest.mark.parametrize("family", FAMILIES)
def test_a_chunked_prefill_prunes_each_chunk_as_the_oracle(family, size, cache):
    model = FAMILIES[family]()
    ids = tokens(model, 1, T)
    native, oracle = native_and_oracle(model, PLAN)
    decisions = recorded(native)
    actual, expected = (generate(twin, ids, prefill_chunk_size=size, **cache) for twin in (native, oracle))
    assert torch.equal(actual, expected)
    chunks = [min(size, T - begin) for begin in range(0, T, size)]
    assert [d.tokens for d in decisions] == [(n,) for n in chunks if n > 1]


def test_requesting_hidden_states_keeps_the_stock_prefill():
    model = llama()
    ids = tokens(model, 1, T)
    how = {"output_hidden_states": True, "return_dict_in_generate": True}
    expected = generate(model, ids, **how)
    pop_ext.enable(model, PLAN)
    with pytest.warns(UserWarning, match="output_hidden_states"):
        actual = generate(model, ids, **how)
    assert pop_ext.last_call(model).rule == "output_hidden_states"
    assert torch.equal(actual.sequences, expected.sequences)
    for step, stock in zip(actual.hidden_states, expected.hidden_states, strict=True):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(step, stock, strict=True))


@pytest.mark.parametrize("length", [15, 16, 17, 40])
def test_prompts_around_the_sliding_window_generate_as_the_oracle(length):
    model = mistral()
    assert_generates_as_the_oracle(model, tokens(model, 1, length), 24)


def test_a_boundary_of_several_rows_generates_as_the_oracle():
    model = llama()
    ids, mask = pad([tokens(model, n, seed=n) for n in (5, T)], "left")
    assert_generates_as_the_oracle(model, ids, plan=PLAN.replace(boundary=8), attention_mask=mask)


class Recorder(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


def test_stop_strings_and_their_tokenizer_stop_a_pruned_generation():
    folder = Path(__file__).parents[2] / "examples" / "demo_model" / "model"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer("import os\nimport sys\n\ndef main(path):\n" * 3, return_tensors="pt")
    with pop_ext.enabled(model, "third", strict=True):
        how = {"tokenizer": tokenizer, "assistant_tokenizer": tokenizer, "max_new_tokens": 24, "do_sample": False}
        stopped = model.generate(**prompt, **how, stop_strings=["\n"])
        whole = model.generate(**prompt, max_new_tokens=24, do_sample=False)
        assert pop_ext.last_call(model).native
    assert stopped.shape[1] < whole.shape[1]
    assert torch.equal(whole[:, : stopped.shape[1]], stopped)
    assert "\n" in tokenizer.decode(stopped[0, -1])


def test_a_streamer_gets_every_token():
    model = pop_ext.enable(llama(), PLAN, strict=True)
    streamer = Recorder()
    output = generate(model, tokens(model, 1, T), streamer=streamer)
    assert streamer.tokens == output[0].tolist()
    assert streamer.ended


def tiny_tokenizer(size: int) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({f"w{i:03}": i for i in range(size)}, unk_token="w001"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="w001",
        pad_token="w000",
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )


def test_a_text_generation_pipeline_equals_the_oracle():
    model = llama()
    prompts = [" ".join(f"w{i:03}" for i in tokens(model, n, seed=n).tolist()) for n in (9, T)]
    texts = []
    for twin in native_and_oracle(model, PLAN):
        pipe = pipeline("text-generation", model=twin, tokenizer=tiny_tokenizer(263), device=twin.device)
        texts.append(pipe(prompts, max_new_tokens=12, do_sample=False, batch_size=2))
        assert pop_ext.last_call(twin).tokens == (9, T)
    assert texts[0] == texts[1]
    assert texts[0][1][0]["generated_text"].startswith(prompts[1])


# Options of generate that decline a prefill


@pytest.mark.parametrize("how", [{"use_cache": False}, {"output_hidden_states": True, "return_dict_in_generate": True}])
def test_generate_options_that_decline_give_the_stock_tokens(how):
    model = llama()
    ids = tokens(model, 1, T)
    expected = generate(model, ids, 6, **how)
    twin = pop_ext.enable(copy.deepcopy(model), PLAN)
    with pytest.warns(match=next(iter(how))) as caught:
        actual = generate(twin, ids, 6, **how)
    assert sum(str(w.message).startswith("pop_ext") for w in caught) == 1
    if how.get("return_dict_in_generate"):
        actual, expected = actual.sequences, expected.sequences
    assert torch.equal(actual, expected)


def test_guidance_prunes_the_prompt_and_keeps_the_stock_prefill_of_a_negative_one():
    model = llama()
    ids, negative = tokens(model, 1, T), tokens(model, 1, 9, seed=4)
    how = {"guidance_scale": 1.5, "negative_prompt_ids": negative}
    outputs = []
    for backend in ("native", "reference"):
        twin = pop_ext.enable(copy.deepcopy(model), PLAN, backend=backend)
        decisions = recorded(twin)
        with pytest.warns(match="logits_to_keep=0"):
            outputs.append(generate(twin, ids, **how))
        assert [(d.backend, d.rule) for d in decisions] == [(backend, "prefill"), ("stock", "logits_to_keep")]
    assert torch.equal(*outputs)
