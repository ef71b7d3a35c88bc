"""Tensors that are not plain memory: lazily negated, expanded, sparse, nested, freed, or inside torch.func."""

from __future__ import annotations

import pop_ext
import pytest
import torch
from enabled_models import enabled_twin
from hostile_values import Subclass, freed
from models import llama, tokens
from pop_ext import Plan, reference
from pop_ext.utils.tensors import check_memory, resolved
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call
from transformers import DynamicCache, StaticCache

pytestmark = pytest.mark.cpu

LAYERS, CONTEXT = 4, 12
PLAN = Plan(LAYERS, (1, 2))


@pytest.fixture(scope="module")
def model():
    return llama(num_hidden_layers=LAYERS)


@pytest.fixture
def enabled(model):
    return enabled_twin(model, PLAN)


@pytest.fixture(scope="module")
def ids(model) -> Tensor:
    return tokens(model, 2, CONTEXT)


@pytest.fixture(scope="module")
def embeds(model, ids) -> Tensor:
    return model.model.embed_tokens(ids).detach()


# Inside torch.func


def test_vmap_over_an_enabled_model_equals_the_stock_model(model, enabled, embeds):
    def logits_of(one):
        def call(row: Tensor) -> Tensor:
            arguments = {"inputs_embeds": row[None], "use_cache": False}
            return functional_call(one, dict(one.named_parameters()), (), arguments).logits

        return torch.func.vmap(call, randomness="different")(embeds)

    assert torch.equal(logits_of(enabled), logits_of(model))


def test_gradients_per_sample_of_an_enabled_model_equal_stock_ones(model, enabled, ids):
    def gradients_of(one):
        def loss(parameters, row):
            return functional_call(one, parameters, (row[None],), {"labels": row[None], "use_cache": False}).loss

        parameters = {name: parameter.detach() for name, parameter in one.named_parameters()}
        return torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0), randomness="different")(parameters, ids)

    expected = gradients_of(model)
    for name, gradient in gradients_of(enabled).items():
        assert torch.equal(gradient, expected[name]), name


@torch.no_grad()
def test_a_prefill_inside_a_transform_is_declined_by_name(enabled, embeds):
    torch.func.vmap(lambda row: enabled(inputs_embeds=row[None], logits_to_keep=1).logits, randomness="same")(embeds)
    assert pop_ext.last_call(enabled).rule == "transform"
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(embeds, embeds)
        assert pop_ext.explain(enabled, inputs_embeds=dual, logits_to_keep=1).rule == "transform"
    enabled(inputs_embeds=embeds, logits_to_keep=1)
    assert pop_ext.last_call(enabled).native


@torch.no_grad()
def test_native_prefill_names_a_tensor_inside_a_transform(model, embeds):
    native = pop_ext.load(model, PLAN)
    with pytest.raises(ValueError, match="inputs_embeds: expected a dense tensor, got one inside a transform"):
        torch.func.vmap(lambda row: native.prefill(inputs_embeds=row[None]).logits)(embeds)


# Tensors that torch resolves


LAZY = {
    "negated": lambda t: torch._neg_view(t.clone()),
    "zero": lambda t: torch._efficientzerotensor(tuple(t.shape)),
    "expanded": lambda t: t[..., :1].expand(t.shape),
    "column-major": lambda t: t.transpose(0, 2).contiguous().transpose(0, 2),
}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("form", LAZY)
@torch.no_grad()
def test_embeddings_that_lie_otherwise_give_the_same_bits(model, enabled, embeds, form, padded):
    lazy = LAZY[form](embeds)
    plain = torch.zeros_like(embeds).add_(lazy)
    mask = torch.ones(2, CONTEXT, dtype=torch.long)
    mask[0, :3] = int(not padded)
    native = pop_ext.load(model, PLAN)
    for call in (native.prefill, enabled):
        expected = call(inputs_embeds=plain, attention_mask=mask, logits_to_keep=1).logits
        assert torch.equal(call(inputs_embeds=lazy, attention_mask=mask, logits_to_keep=1).logits, expected)
    assert pop_ext.last_call(enabled).native


def test_plain_tensors_are_not_copied(embeds):
    assert resolved(embeds) is embeds


# Sparse and nested tensors


UNUSUAL = {
    "sparse": (lambda t: t.to_sparse(), "layout torch.sparse_coo"),
    "nested": (lambda t: torch.nested.nested_tensor(list(t)), "a nested tensor"),
    "jagged": (lambda t: torch.nested.nested_tensor(list(t), layout=torch.jagged), "a nested tensor"),
}
ENTRIES = {
    "native ids": (lambda model, t: pop_ext.load(model, PLAN).prefill(t), "input_ids"),
    "native boundary": (
        lambda model, t: pop_ext.load(model, PLAN).prefill(tokens(model, 2, 9), boundary=t),
        "boundary",
    ),
    "reference ids": (lambda model, t: reference.prefill(model, t, PLAN), "input_ids"),
    "reference boundary": (lambda model, t: reference.prefill(model, tokens(model, 2, 9), PLAN, t), "logits_to_keep"),
    "native mask": (
        lambda model, t: pop_ext.load(model, PLAN).prefill(tokens(model, 2, CONTEXT), attention_mask=t),
        "attention_mask",
    ),
    "reference mask": (
        lambda model, t: reference.prefill(model, tokens(model, 2, CONTEXT), PLAN, attention_mask=t),
        "attention_mask",
    ),
    "importance": (lambda model, t: pop_ext.importance(model, [t]), r"batches\[0\]"),
    "fit": (lambda model, t: pop_ext.fit(model, PLAN, [t]), r"batches\[0\]"),
    "score": (lambda model, t: pop_ext.score(enabled_twin(model, PLAN), t, [[1], [2]]), "context_ids"),
}


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("form", UNUSUAL)
def test_sparse_and_nested_tensors_are_refused_by_name(model, ids, form, entry):
    (make, found), (call, name) = UNUSUAL[form], ENTRIES[entry]
    with pytest.raises(ValueError, match=f"^{name}: expected a dense tensor, got .*{found}"):
        call(model, make(ids))


def test_a_sparse_sequence_of_score_is_refused_by_name(enabled, ids):
    with pytest.raises(ValueError, match=r"^continuation_ids\[1\]: expected a dense tensor"):
        pop_ext.score(enabled, ids, [[1], ids[0].to_sparse()])


@pytest.mark.parametrize("form", UNUSUAL)
@torch.no_grad()
def test_an_enabled_model_declines_sparse_and_nested_tensors(enabled, ids, form):
    make, found = UNUSUAL[form]
    with pytest.raises(Exception, match=r"."):  # of the stock forward
        enabled(make(ids), logits_to_keep=1)
    assert pop_ext.last_call(enabled).rule == "inputs"
    assert found in pop_ext.last_call(enabled).reason
    mask = make(torch.ones(2, CONTEXT))
    for masks in (mask, {"full_attention": mask}):
        decision = pop_ext.explain(enabled, ids, attention_mask=masks, logits_to_keep=1)
        assert (decision.rule, decision.reason[:15]) == (
            "inputs",
            "attention_mask[" if masks is not mask else decision.reason[:15],
        )


@pytest.mark.parametrize("flag", ["is_causal", "use_cache", "output_attentions", "return_dict"])
@torch.no_grad()
def test_a_tensor_in_the_place_of_a_flag_is_declined(enabled, ids, flag):
    decision = pop_ext.explain(enabled, ids, logits_to_keep=1, **{flag: torch.tensor([True, False])})
    assert decision.declined
    assert decision.reason == f"{flag}: expected a bool, got a Tensor"


@torch.no_grad()
def test_a_complex_mask_is_refused(model, enabled, ids):
    mask = torch.ones(2, CONTEXT, dtype=torch.complex64)
    for call in (pop_ext.load(model, PLAN).prefill, lambda *a, **k: reference.prefill(model, *a, PLAN, **k)):
        with pytest.raises(TypeError, match=r"^attention_mask: expected .*torch.complex64"):
            call(ids, attention_mask=mask)
    assert pop_ext.explain(enabled, ids, attention_mask=mask, logits_to_keep=1).rule == "mask"


# Freed memory


def freed_cache(model, kind: str, what: str):
    cache = DynamicCache() if kind == "dynamic" else StaticCache(config=model.config, max_cache_len=40)
    pop_ext.load(model, PLAN).prefill(tokens(model, 2, 5), past_key_values=cache)
    getattr(cache.layers[1], what).untyped_storage().resize_(0)
    return cache


@pytest.mark.parametrize("run", ["native", "enabled", "reference"])
@pytest.mark.parametrize(
    ("kind", "what"), [("dynamic", "keys"), ("dynamic", "values"), ("static", "keys"), ("static", "cumulative_length")]
)
@torch.no_grad()
def test_a_past_cache_without_memory_is_refused_by_layer(model, enabled, ids, kind, what, run):
    cache = freed_cache(model, kind, what)
    if run == "enabled":
        call = lambda: enabled(ids, past_key_values=cache, logits_to_keep=1)  # noqa: E731
    elif run == "native":
        call = lambda: pop_ext.load(model, PLAN).prefill(ids, past_key_values=cache)  # noqa: E731
    else:
        call = lambda: reference.prefill(model, ids, PLAN, past_key_values=cache)  # noqa: E731
    with pytest.raises(ValueError, match=f"^past_key_values: layer 1 {what}: expected a tensor with memory"):
        call()
    assert all(layer.keys.shape[2] in (5, 40) for layer in cache.layers)


@torch.no_grad()
def test_freed_arguments_and_buffers_are_refused_by_name(model, ids):
    native = pop_ext.load(model, PLAN)
    subclass = freed(torch.ones(2, CONTEXT)).as_subclass(Subclass)
    calls = {
        "input_ids": lambda: reference.prefill(model, freed(ids), PLAN),
        "attention_mask": lambda: native.prefill(ids, attention_mask=subclass),
        "boundary": lambda: native.prefill(ids, boundary=freed(torch.ones(2, dtype=torch.long))),
        "logits_to_keep": lambda: reference.prefill(model, ids, PLAN, freed(torch.ones(2, dtype=torch.long))),
        r"batches\[0\]": lambda: pop_ext.importance(model, [freed(ids)]),
    }
    other = llama(num_hidden_layers=LAYERS)
    loaded = pop_ext.load(other, PLAN)
    other.model.rotary_emb.inv_freq.untyped_storage().resize_(0)
    calls["model: LlamaRotaryEmbedding.inv_freq"] = lambda: loaded.prefill(ids)
    for name, call in calls.items():
        with pytest.raises(ValueError, match=f"^{name}: expected a tensor with memory for its elements, got shape"):
            call()


@pytest.mark.parametrize("backend", ["native", "portable", "auto"])
def test_freed_weights_and_buffers_are_refused_by_enable(backend):
    for path in ("model.layers.1.input_layernorm.weight", "lm_head.weight", "model.rotary_emb.inv_freq"):
        other = llama(num_hidden_layers=LAYERS)
        *parents, name = path.split(".")
        freed_in = other.get_submodule(".".join(parents))
        getattr(freed_in, name).untyped_storage().resize_(0)
        if backend != "portable" and name == "inv_freq":
            continue  # a call refuses it
        with pytest.raises((ValueError, RuntimeError), match="expected a tensor with memory|over a storage"):
            pop_ext.enable(other, PLAN, backend=backend)


@torch.no_grad()
def test_tensors_without_a_storage_of_their_own_pass_the_check_of_memory(ids):
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        fake = torch.ones(2, 3)
    nested = torch.nested.nested_tensor([ids[0], ids[1, :3]])
    check_memory({"fake": fake, "nested": nested, "sparse": ids.to_sparse(), "none": None, "text": "x"})
    torch.func.vmap(lambda row: check_memory({"row": row}) or row)(ids)
