"""Vision models in a vLLM engine with pruned prefills equal the oracle: text, images between text, several requests.

Needs vLLM (0.32, here its CPU build) and a torchvision that imports: `make vllm`.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
from enabled_models import enabled_twin, generate
from hook_reference import context_rows, held_back_forward
from pop_ext import Plan, reference
from tolerance import assert_close_fp32
from vision_models import IMAGE, gemma3_vl, qwen3_vl
from vllm_images import Checkpoint, arguments, ask, attention_in_both_directions, image, missing, prompt_with

pytestmark = [pytest.mark.cpu, pytest.mark.skipif(missing() is not None, reason=missing() or "")]
if missing() is None:
    from vllm_engine import engine

DEEP = Plan(6, [3, 4])
"""Omits layers after those that take image features."""


@contextlib.contextmanager
def engine_of(model, folder, plan, **options):
    limits = {"image": 2, "video": 0} if model.config.model_type == "qwen3_vl" else {"image": 2}
    defaults = dict(skip_tokenizer_init=False, limit_mm_per_prompt=limits)
    with engine(Checkpoint(model), folder, plan, **{**defaults, **options}) as found:
        yield found


def two_images(model):
    """Return a prompt with two images of several sizes between text."""
    return prompt_with(model, 9, image(24, 16, 0), 6, image(24, 32, 1), 8)


def assert_equals_oracle(found, model, plan, prompt, folder, causal=False) -> None:
    """Compare 8 greedy tokens, log-probabilities of the first, and K and V of all layers.

    Args:
        found: The engine.
        model: The model.
        plan: The engine's plan.
        prompt: The prompt.
        folder: The folder of the engine.
        causal: True if the tokens of an image do not see those after them.
    """
    [(ids, tokens, table)] = ask(found, prompt, count=8)
    ids = torch.tensor([ids])
    call = arguments(model, folder / "model", ids, prompt)
    if causal:
        call["token_type_ids"] = torch.zeros_like(ids)
    logits, cache = reference.prefill(model, ids, plan, **call)
    assert_close_fp32(table[:1], logits[0, -1:].float().log_softmax(-1), "log-probabilities")
    positions = [position for position in found.positions() if position < ids.shape[1]]
    assert len(positions) > 8
    for number, layer in enumerate(cache.layers):
        for kind, ours, theirs in zip("KV", found.cache(number, positions), (layer.keys, layer.values), strict=True):
            assert_close_fp32(ours, theirs[:, :, positions], f"{kind} of layer {number}")
    twin = enabled_twin(model, plan, strict=True, backend="reference")
    assert tokens == generate(twin, ids, 8, **call)[0, ids.shape[1] :].tolist()
    assert len(set(tokens)) > 1
    unpruned, _ = reference.prefill(model, ids, Plan(6, []), **call)
    assert (unpruned - logits).abs().max() > 0.01, "the plan shows"


@pytest.mark.parametrize("plan", [DEEP, Plan(6, [3, 5], boundary=4)], ids=["deep", "gaps"])
def test_qwen3_vl_equals_the_oracle(plan, tmp_path):
    model = qwen3_vl()
    with engine_of(model, tmp_path, plan) as found:
        assert all(part.reason is None for part in found.model().get_language_model().model.pruned_prefill.projections)
        assert_equals_oracle(found, model, plan, two_images(model), tmp_path)


def test_each_sequence_of_a_batch_runs_as_alone(tmp_path):
    model, plan = qwen3_vl(), DEEP.replace(boundary=3)
    pictures = image(24, 16, 2), image(16, 32, 3)
    prompts = [
        prompt_with(model, 30),
        prompt_with(model, pictures[0], 5, seed=1),
        prompt_with(model, 3, pictures[1], 4, pictures[0], 9, seed=2),
        prompt_with(model, 1, seed=3),
        prompt_with(model, 9, pictures[1], seed=4),
    ]
    with engine_of(model, tmp_path, plan) as found:
        answers = ask(found, *prompts)
    for prompt, (ids, _, table) in zip(prompts, answers, strict=True):
        ids = torch.tensor([ids])
        logits, _ = reference.prefill(model, ids, plan, **arguments(model, tmp_path / "model", ids, prompt))
        assert_close_fp32(table, logits[0, -1:].float().log_softmax(-1), f"prompt of {ids.shape[1]}")


def test_chunks_may_divide_an_image(tmp_path):
    model = qwen3_vl()
    prompt = prompt_with(model, 9, image(24, 16, 4), 12, image(24, 32, 5), 7)
    with engine_of(model, tmp_path, DEEP, max_num_batched_tokens=32, max_num_seqs=4) as found:
        [(ids, _, table)] = ask(found, prompt)
    assert ids[31:33] == [IMAGE, IMAGE]
    ids = torch.tensor([ids])
    context = torch.ones_like(ids, dtype=torch.bool)
    context[0, [31, -1]] = False  # each chunk has its boundary
    call = arguments(model, tmp_path / "model", ids, prompt)
    logits, _ = held_back_forward(model, ids, DEEP.omit, context, **call)
    assert_close_fp32(table, logits[0, -1:].float().log_softmax(-1), "log-probabilities")


def test_compiled_stages_take_image_features(tmp_path):
    model = qwen3_vl()
    with engine_of(model, tmp_path, DEEP, enforce_eager=False) as found:
        assert_equals_oracle(found, model, DEEP, two_images(model), tmp_path)


def test_layers_that_take_image_features_cannot_be_omitted(tmp_path):
    text = "omit no layer before 3 of Qwen3VLForConditionalGeneration, which adds image features there, got 2"
    with pytest.raises(ValueError, match=text), engine_of(qwen3_vl(), tmp_path, Plan(6, [2, 3])):
        pass


def test_fewer_layers_with_image_features_leave_more_to_omit(tmp_path):
    model, plan = qwen3_vl(features=1), Plan(6, [1, 2, 4])
    with engine_of(model, tmp_path, plan) as found:
        assert_equals_oracle(found, model, plan, two_images(model), tmp_path)


@pytest.mark.parametrize("plan", [DEEP, Plan(6, [1, 3, 4], boundary=4)], ids=["deep", "gaps"])
def test_gemma3_equals_the_oracle(plan, tmp_path):
    model = gemma3_vl(tied=False)
    with attention_in_both_directions(), engine_of(model, tmp_path, plan) as found:
        assert_equals_oracle(found, model, plan, two_images(model), tmp_path)


def test_gemma3_equals_the_oracle_by_the_cpus_own_attention(tmp_path):
    """It is causal, within images, too: so is plain vLLM on a CPU."""
    model = gemma3_vl(tied=False)
    with engine_of(model, tmp_path, DEEP) as found:
        assert_equals_oracle(found, model, DEEP, two_images(model), tmp_path, causal=True)


def test_a_boundary_may_begin_inside_an_image(tmp_path):
    """The engine leaves it there; `enable` and the oracle would begin with the image."""
    model, plan = gemma3_vl(tied=False), DEEP.replace(boundary=16)
    prompt = two_images(model)
    with attention_in_both_directions(), engine_of(model, tmp_path, plan) as found:
        [(ids, _, table)] = ask(found, prompt)
    ids = torch.tensor([ids])
    call = arguments(model, tmp_path / "model", ids, prompt)
    begin = ids.shape[1] - plan.boundary
    assert call["token_type_ids"][0, begin - 1 : begin + 1].tolist() == [1, 1]
    context = context_rows(torch.ones_like(ids), [plan.boundary])
    logits, _ = held_back_forward(model, ids, plan.omit, context, **call)
    assert_close_fp32(table, logits[0, -1:].float().log_softmax(-1), "log-probabilities")
