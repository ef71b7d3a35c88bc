"""Test that reasons of `explain` and `last_call` name what decided, for calls that break several rules at once."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pop_ext
import pytest
import torch
from enabled_models import PLAN, T, generate
from models import gemma3, llama, tokens
from pop_ext import Plan
from transformers import LlamaForCausalLM
from transformers.utils import TransformersKwargs


@contextmanager
def forward_of_the_class_replaced() -> Iterator[None]:
    """Replace the forward of the model class by one with other arguments, as Liger does."""
    original = LlamaForCausalLM.forward

    def forward(self: Any, input_ids: Any = None, skip_logits: Any = None, **kwargs: Any) -> Any:
        return original(self, input_ids, **kwargs)

    LlamaForCausalLM.forward = forward
    try:
        yield
    finally:
        LlamaForCausalLM.forward = original


def test_a_replaced_forward_of_the_class_is_named_whatever_arguments_generate_passes():
    model = llama()
    ids = tokens(model, 1, T)
    expected = generate(model, ids, 3)
    with forward_of_the_class_replaced():
        pop_ext.enable(model, PLAN)
        with pytest.warns(match=r"a replaced forward of LlamaForCausalLM, from .*test_reasons"):
            assert torch.equal(generate(model, ids, 3), expected)
        assert pop_ext.last_call(model).rule == "model"
    generate(model, ids, 3)
    assert pop_ext.last_call(model).native


# What `generate` checks no further, since any forward may take it, and hands on. None: the call is pruned.
HANDED_ON = {
    "is_causal=True": ({"is_causal": True}, None),
    "is_causal=False": ({"is_causal": False}, "is_causal=False: a pruned prefill is causal"),
    "num_items_in_batch": ({"num_items_in_batch": torch.tensor(3)}, None),
    "output_router_logits=False": ({"output_router_logits": False}, None),
    "output_attentions=False": ({"output_attentions": False}, None),
    "output_hidden_states=False": ({"output_hidden_states": False}, None),
    "debug_io=False": ({"debug_io": False}, None),
    "no features": ({"mm_encoder_outputs": {}}, None),
    "features": ({"mm_encoder_outputs": {"image": 1}}, "does not know: mm_encoder_outputs"),
    "position_ids": ({"position_ids": torch.arange(T)[None]}, None),
    "cu_seq_lens_q": ({"cu_seq_lens_q": torch.tensor([0, 9, T])}, "^cu_seq_lens_q: expected padded sequences"),
    "cu_seq_lens_k": ({"cu_seq_lens_k": torch.tensor([0, 9, T])}, "^cu_seq_lens_k: expected padded sequences"),
    "max_length_q": ({"max_length_q": T, "max_length_k": T}, "^max_length_k, max_length_q: expected padded"),
    "seq_idx": ({"seq_idx": torch.zeros(1, T, dtype=torch.int32)}, "^seq_idx: expected padded sequences"),
}


@pytest.mark.cpu
@pytest.mark.filterwarnings("ignore:pop_ext")
@pytest.mark.parametrize("case", HANDED_ON)
@torch.no_grad()
def test_what_generate_hands_on_is_pruned_or_declined_by_name(case):
    arguments, reason = HANDED_ON[case]
    model = llama()
    ids = tokens(model, 1, T)
    stock = model(ids, logits_to_keep=1, **arguments).logits
    pop_ext.enable(model, PLAN)
    output = model(ids, logits_to_keep=1, **arguments).logits
    decision = pop_ext.last_call(model)
    if reason is None:
        assert decision.native
        assert torch.equal(output, model(ids, logits_to_keep=1).logits)
    else:
        assert decision.declined
        assert re.search(reason, decision.reason)
        assert torch.equal(output, stock)


def test_every_model_agnostic_argument_of_generate_is_known():
    # A new one needs a rule, and a case in HANDED_ON.
    handed_on = {name for arguments, _ in HANDED_ON.values() for name in arguments}
    assert set(TransformersKwargs.__optional_keys__) <= handed_on


@pytest.mark.parametrize(
    ("plan", "depth"),
    [
        (PLAN.replace(min_tokens=T), f"{T - 1} of them omit 3 of 6 layers"),
        (PLAN.replace(min_tokens=T + 1), "all of them run all 6 layers"),
        (PLAN.replace(boundary=T), "all of them run all 6 layers"),
        (Plan(6, ()), "all of them run all 6 layers"),
    ],
)
@torch.no_grad()
def test_the_sentence_says_how_many_tokens_omit_layers(plan, depth):
    model = pop_ext.enable(llama(), plan, strict=True)
    model(tokens(model, 1, T), logits_to_keep=1)
    assert str(pop_ext.last_call(model)).endswith(f"1 sequence(s), {T} new tokens, {depth}")


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize(("name", "value"), [("is_causal", False), ("use_bidirectional_attention", True)])
@torch.no_grad()
def test_a_config_that_makes_attention_bidirectional_after_enable_is_named(name, value, backend):
    model = pop_ext.enable(gemma3(), PLAN, backend=backend)
    setattr(model.config, name, value)
    decision = pop_ext.explain(model, tokens(model, 1, T), logits_to_keep=1)
    assert (decision.rule, decision.reason) == ("attention", f"config.{name}={value}: a pruned prefill is causal")
