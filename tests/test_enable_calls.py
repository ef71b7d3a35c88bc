"""Which calls of an enabled model run natively, and that every other call means what it meant before."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import pop_ext
import pytest
import torch
from models import llama, mistral, pad, qwen2, tokens
from pop_ext import Plan, reference
from pop_ext.replaced import foreign_code, inner_modules
from tolerance import assert_close_fp32, compare_caches, stored_layers
from torch import nn
from transformers import AttentionInterface, DynamicCache, StaticCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, create_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

T = 19
LAYERS = 6
OMIT = (2, 4, 5)
PLAN = Plan(LAYERS, OMIT)


def enabled_twin(model: nn.Module, plan: Plan = PLAN, **how: Any) -> nn.Module:
    """A copy of the model, enabled."""
    return pop_ext.enable(copy.deepcopy(model), plan, **how)


def assert_same_bits(actual: Any, expected: Any) -> None:
    """Two outputs of a model: logits, loss, recorded states and, where there is a cache, its every byte."""
    assert type(actual) is type(expected)
    assert list(actual) == list(expected)
    for name in expected:
        if name == "past_key_values":
            assert_same_cache(actual[name], expected[name])
            continue
        ours, theirs = (x[name] if isinstance(x[name], tuple) else (x[name],) for x in (actual, expected))
        for a, e in zip(ours, theirs, strict=True):
            assert torch.equal(a, e) if isinstance(e, torch.Tensor) else a is e, name


def assert_same_cache(actual: Any, expected: Any) -> None:
    for a, e in zip(stored_layers(actual), stored_layers(expected), strict=True):
        assert a.length == e.length
        assert torch.equal(a.keys, e.keys)
        assert torch.equal(a.values, e.values)


def filled_cache(model: nn.Module, length: int = 7, batch: int = 1) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(tokens(model, batch, length, seed=5), past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


# What each reason needs: an edit of the model, a surrounding, and the arguments of the call.


def set_config(**values: Any) -> Callable[[nn.Module], None]:
    def edit(model: nn.Module) -> None:
        for name, value in values.items():
            setattr(model.config, name, value)

    return edit


def hook_attention(model: nn.Module) -> None:
    model.model.layers[3].self_attn.register_forward_hook(lambda module, args, output: (output[0] * 0.5, output[1]))


def pre_hook_layer(model: nn.Module) -> None:
    model.model.layers[1].register_forward_pre_hook(lambda module, args: (args[0] * 2, *args[1:]))


def hook_decoder(model: nn.Module) -> None:
    model.model.register_forward_hook(lambda module, args, output: None)


def hook_rotary(model: nn.Module) -> None:
    model.model.rotary_emb.register_forward_hook(lambda module, args, output: (output[0] * 0.9, output[1]))


def replace_forward(model: nn.Module) -> None:
    mlp = model.model.layers[2].mlp
    original = type(mlp).forward
    mlp.forward = lambda x: original(mlp, x) * 0.5


def offload_with_accelerate(model: nn.Module) -> None:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    for layer in model.model.layers:
        add_hook_to_module(layer, AlignDevicesHook(execution_device="cpu"))


def train_with_dropout(model: nn.Module) -> None:
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.train()


def train_with_checkpointing(model: nn.Module) -> None:
    # Renamed in transformers 5.23.
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    model.train()


def half_attention(module: nn.Module, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
    output, weights = ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, **kwargs)
    return output * 0.5, weights


def custom_attention(model: nn.Module) -> None:
    AttentionInterface.register("half", half_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register("half", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.set_attn_implementation("half")


@contextmanager
def another_sdpa() -> Iterator[None]:
    original = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def half(*args: Any, **kwargs: Any) -> Any:
        output, weights = original(*args, **kwargs)
        return output * 0.5, weights

    AttentionInterface.register("sdpa", half)
    try:
        yield
    finally:
        AttentionInterface.register("sdpa", original)


@contextmanager
def global_hook(register: Callable[..., Any]) -> Iterator[None]:
    handle = register(lambda *_: None)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def patched_class() -> Iterator[None]:
    """A class-level patch, as kernel libraries apply them."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    original = LlamaMLP.forward
    LlamaMLP.forward = lambda self, x: original(self, x) * 0.5
    try:
        yield
    finally:
        LlamaMLP.forward = original


def causal_4d(columns: int, slots: int | None = None) -> torch.Tensor:
    slots = columns if slots is None else slots
    return torch.ones(columns, slots, dtype=torch.bool).tril(slots - columns)[None, None]


def prefix_4d(columns: int) -> torch.Tensor:
    """Causal, but the first five tokens see each other."""
    mask = causal_4d(columns)
    mask[..., :5, :5] = True
    return mask


def banded_4d(columns: int) -> torch.Tensor:
    return causal_4d(columns).triu(-4)


@dataclass
class Case:
    rule: str
    call: Callable[[nn.Module], dict[str, Any]] = lambda model: {"logits_to_keep": 1}
    edit: Callable[[nn.Module], None] = lambda model: None
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    build: Callable[..., nn.Module] = llama
    batch: int = 1
    grad: bool = False


def keep_one(**call: Any) -> Callable[[nn.Module], dict[str, Any]]:
    return lambda model: {"logits_to_keep": 1, **call}


class OtherCache(DynamicCache):
    """A cache that does something of its own with what it is given."""

    def update(self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        return super().update(key_states * 0.5, value_states, layer_idx, *args, **kwargs)


RIGHT_PADDED = torch.tensor([[1] * T, [1] * (T - 3) + [0] * 3])
HOLES = torch.tensor([[1] * 5 + [0] * 2 + [1] * (T - 7)])
HOLES_IN_PAST = torch.tensor([[1] * 3 + [0] * 2 + [1] * (T + 2)])
PACKED = torch.cat([torch.arange(8), torch.arange(T - 8)])[None]

DECLINED = {
    "labels": Case("labels", lambda model: {"labels": tokens(model, 1, T)}),
    "grad mode": Case("grad", grad=True),
    "autocast": Case("autocast", around=lambda: torch.autocast("cpu", torch.bfloat16)),
    "use_cache=False": Case("use_cache", keep_one(use_cache=False)),
    "use_cache=False in the config": Case("use_cache", edit=set_config(use_cache=False)),
    "logits_to_keep left out": Case("logits_to_keep", lambda model: {}),
    "logits_to_keep=0": Case("logits_to_keep", keep_one(logits_to_keep=0)),
    "logits_to_keep is a tensor": Case("logits_to_keep", keep_one(logits_to_keep=torch.tensor([3, 5]))),
    "logits_to_keep is T": Case("logits_to_keep", keep_one(logits_to_keep=T)),
    "logits_to_keep above T": Case("logits_to_keep", keep_one(logits_to_keep=T + 4)),
    "logits_to_keep below 0": Case("logits_to_keep", keep_one(logits_to_keep=-2)),
    "logits_to_keep above a sequence's tokens": Case(
        "logits_to_keep",
        keep_one(logits_to_keep=5, attention_mask=torch.tensor([[1] * T, [0] * (T - 3) + [1] * 3])),
        batch=2,
    ),
    "output_attentions": Case(
        "output_attentions", keep_one(output_attentions=True), build=lambda: llama(attn_implementation="eager")
    ),
    "output_attentions in the config": Case(
        "output_attentions", edit=set_config(output_attentions=True), build=lambda: llama(attn_implementation="eager")
    ),
    "output_hidden_states": Case("output_hidden_states", keep_one(output_hidden_states=True)),
    "output_hidden_states in the config": Case("output_hidden_states", edit=set_config(output_hidden_states=True)),
    "some output_hidden_states": Case("output_hidden_states", keep_one(output_hidden_states=[1, 2])),
    "a 4-D mask that is not causal": Case("mask", keep_one(attention_mask=prefix_4d(T))),
    "a 4-D mask of a band": Case("mask", keep_one(attention_mask=banded_4d(T))),
    "a 4-D mask of scores": Case("mask", keep_one(attention_mask=-torch.rand(1, 1, T, T))),
    "a causal 4-D mask for a sliding window": Case("mask", keep_one(attention_mask=causal_4d(T)), build=mistral),
    "a dict of masks": Case(
        "mask",
        keep_one(attention_mask={"full_attention": prefix_4d(T), "sliding_attention": banded_4d(T)}),
        build=lambda: qwen2(use_sliding_window=True),
    ),
    "a dict with a mask that is not causal": Case(
        "mask", keep_one(attention_mask={"full_attention": prefix_4d(T)}), build=qwen2
    ),
    "holes in the new tokens": Case("mask", keep_one(attention_mask=HOLES)),
    "mask values other than 0 and 1": Case("mask", keep_one(attention_mask=torch.full((1, T), 2))),
    "holes in the past of a sliding window": Case(
        "mask",
        lambda model: {
            "past_key_values": filled_cache(model),
            "attention_mask": HOLES_IN_PAST[:, : T + 7],
            "logits_to_keep": 1,
        },
        build=mistral,
    ),
    "right padding": Case("right_padding", keep_one(attention_mask=RIGHT_PADDED), batch=2),
    "a hook on an attention": Case("hooks", edit=hook_attention),
    "a pre-hook on a layer": Case("hooks", edit=pre_hook_layer),
    "a hook on the decoder": Case("hooks", edit=hook_decoder),
    "a hook on the rotary module": Case("hooks", edit=hook_rotary),
    "a replaced forward of an inner module": Case("hooks", edit=replace_forward),
    "accelerate's hooks": Case("hooks", edit=offload_with_accelerate),
    "a patched class": Case("hooks", around=patched_class),
    "a global hook": Case("hooks", around=lambda: global_hook(nn.modules.module.register_module_forward_hook)),
    "a global pre-hook": Case("hooks", around=lambda: global_hook(nn.modules.module.register_module_forward_pre_hook)),
    "a custom attention implementation": Case("attention", edit=custom_attention),
    "another sdpa": Case("attention", around=another_sdpa),
    "bidirectional attention": Case("attention", edit=set_config(is_causal=False)),
    "dropout in training": Case("training", edit=train_with_dropout),
    "gradient checkpointing in training": Case("training", edit=train_with_checkpointing),
    "an unknown argument": Case("arguments", keep_one(my_flag=True)),
    "packed sequences": Case("position_ids", keep_one(position_ids=PACKED)),
    "a window cache for full attention": Case(
        "cache",
        lambda model: {"past_key_values": DynamicCache(config=mistral().config), "logits_to_keep": 1},
    ),
    "a cache of another kind": Case("cache", lambda model: {"past_key_values": OtherCache(), "logits_to_keep": 1}),
}


def run(model: nn.Module, ids: torch.Tensor, call: dict[str, Any], grad: bool) -> Any:
    torch.manual_seed(3)
    with torch.set_grad_enabled(grad):
        return model(ids, **copy.deepcopy(call))


@pytest.fixture(params=DECLINED)
def declined(request: pytest.FixtureRequest) -> Iterator[tuple[Case, nn.Module, torch.Tensor, dict[str, Any]]]:
    case = DECLINED[request.param]
    model = case.build()
    call = case.call(model)
    with ExitStack() as stack:
        case.edit(model)
        stack.enter_context(case.around())
        yield case, model, tokens(model, case.batch, T), call


# copy.deepcopy leaves replaced forwards and accelerate's partials bound to the original: enable that one itself.
def test_a_declined_call_gives_the_bits_of_the_stock_model(declined):
    case, model, ids, call = declined
    expected = run(model, ids, call, case.grad)
    pop_ext.enable(model, PLAN)
    with pytest.warns(UserWarning, match="the stock forward runs"):
        actual = run(model, ids, call, case.grad)
    assert_same_bits(actual, expected)
    assert pop_ext.last_call(model).rule == case.rule


def test_a_declined_call_warns_once(declined):
    case, model, ids, call = declined
    pop_ext.enable(model, PLAN)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(model, ids, call, case.grad)
        run(model, ids[:, :], call, case.grad)
    ours = [w for w in caught if str(w.message).startswith("pop_ext")]
    assert len(ours) == 1
    assert ours[0].filename == __file__


def test_explain_gives_the_reason_of_a_declined_call_and_runs_nothing(declined):
    case, model, ids, call = declined
    pop_ext.enable(model, PLAN)
    before = copy.deepcopy(call)
    ran = []
    model.lm_head.register_forward_hook(lambda *_: ran.append(1))
    with warnings.catch_warnings(), torch.set_grad_enabled(case.grad):
        warnings.simplefilter("error")
        decision = pop_ext.explain(model, ids, **call)
    assert (decision.backend, decision.rule, decision.declined) == ("stock", case.rule, True)
    assert not ran
    assert pop_ext.last_call(model) is None
    if "past_key_values" in call:
        assert_same_cache(call["past_key_values"], before["past_key_values"])


def test_a_declined_call_is_an_error_under_strict(declined):
    case, model, ids, call = declined
    pop_ext.enable(model, PLAN, strict=True)
    with pytest.raises(pop_ext.PrefillDeclined, match="strict=True") as error:
        run(model, ids, call, case.grad)
    with torch.set_grad_enabled(case.grad):
        assert pop_ext.explain(model, ids, **call).reason in str(error.value)


@torch.no_grad()
def test_flex_attention_is_declined():
    model = llama()
    pop_ext.enable(model, PLAN)
    model.config._attn_implementation = "flex_attention"  # not run: it would compile
    decision = pop_ext.explain(model, tokens(model, 1, T), logits_to_keep=1)
    assert (decision.rule, decision.declined) == ("attention", True)
    assert "flex_attention" in str(decision)


@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3", "eager", "sdpa"])
@torch.no_grad()
def test_eager_sdpa_and_flash_attention_are_known(name):
    model = pop_ext.enable(llama(), PLAN)
    model.config._attn_implementation = name
    assert pop_ext.explain(model, tokens(model, 1, T), logits_to_keep=1).native


@torch.no_grad()
def test_a_bad_call_raises_as_the_stock_model_does():
    model = pop_ext.enable(llama(), PLAN)
    with (
        pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"),
        pytest.warns(match="exactly one"),
    ):
        model(attention_mask=torch.ones(1, 3))


# Calls that are no prefill


def assert_silent_stock(model: nn.Module, rule: str, ids: torch.Tensor, **call: Any) -> None:
    """Strict or not, with the bits of the un-enabled model."""
    expected = model(ids, **copy.deepcopy(call))
    for strict in (False, True):
        twin = enabled_twin(model, strict=strict)
        decision = pop_ext.explain(twin, ids, **call)
        assert (decision.backend, decision.rule, decision.declined) == ("stock", rule, False)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            actual = twin(ids, **copy.deepcopy(call))
        assert_same_bits(actual, expected)
        assert pop_ext.last_call(twin) is None


@pytest.mark.parametrize("keep", [0, 1])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("past", [0, 7])
def test_a_decode_step_never_warns_or_raises(keep, grad, past):
    model = llama()
    cache = filled_cache(model, past) if past else DynamicCache()
    with torch.set_grad_enabled(grad):
        call = {"past_key_values": cache, "logits_to_keep": keep, "output_hidden_states": True}
        assert_silent_stock(model, "decode", tokens(model, 1, 1), **call)


@torch.no_grad()
def test_a_decode_step_by_embeddings_never_warns_or_raises():
    model = llama()
    embeds = model.get_input_embeddings()(tokens(model, 1, 1))
    expected = model(inputs_embeds=embeds, past_key_values=filled_cache(model), use_cache=False)
    twin = enabled_twin(model, strict=True)
    assert_same_bits(twin(inputs_embeds=embeds, past_key_values=filled_cache(model), use_cache=False), expected)


@pytest.mark.parametrize("keep", [0, 4, 9])
@torch.no_grad()
def test_the_verification_of_candidates_never_warns_or_raises(keep):
    model = llama()
    assert_silent_stock(
        model, "verification", tokens(model, 1, 4), past_key_values=filled_cache(model), logits_to_keep=keep
    )


@torch.no_grad()
def test_the_verification_of_candidates_in_a_static_cache_never_warns_or_raises():
    model = llama()
    cache = StaticCache(config=model.config, max_cache_len=32)
    model(tokens(model, 1, 7), past_key_values=cache, logits_to_keep=1)
    assert_silent_stock(model, "verification", tokens(model, 1, 4), past_key_values=cache, logits_to_keep=4)


# What is harmless


@torch.no_grad()
def test_transformers_own_recording_hooks_are_harmless():
    model = pop_ext.enable(llama(), PLAN)
    ids = tokens(model, 1, T)
    with pytest.warns(UserWarning, match="output_hidden_states"):
        recorded = model(ids, logits_to_keep=1, output_hidden_states=True)
    assert len(recorded.hidden_states) == LAYERS + 1
    assert any(layer._forward_hooks for layer in model.model.layers)
    model(ids, logits_to_keep=1)
    assert pop_ext.last_call(model).native


@torch.no_grad()
def test_what_accelerate_leaves_behind_when_its_hooks_are_removed_is_harmless():
    from accelerate.hooks import remove_hook_from_submodules

    model = llama()
    offload_with_accelerate(model)
    remove_hook_from_submodules(model)
    assert "forward" in model.model.layers[0].__dict__
    pop_ext.enable(model, PLAN, strict=True)
    model(tokens(model, 1, T), logits_to_keep=1)
    assert pop_ext.last_call(model).native


@torch.no_grad()
def test_hooks_on_the_model_and_its_head_fire_as_before():
    model = llama()
    ids, seen = tokens(model, 2, T), []
    model.register_forward_hook(lambda module, args, output: seen.append(output.logits.shape))
    model.lm_head.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    model(ids, logits_to_keep=2)
    expected, seen[:] = list(seen), []
    pop_ext.enable(model, PLAN, strict=True)
    model(ids, logits_to_keep=2)
    assert seen == expected


@pytest.mark.parametrize("build", [llama, mistral, qwen2])
def test_a_fresh_model_carries_no_foreign_code(build):
    assert foreign_code(inner_modules(build())) is None


def test_inner_modules_are_all_modules_below_the_decoder():
    model = llama()
    assert {id(m) for _, m in inner_modules(model)} == {id(m) for m in model.model.modules()}
    assert dict(inner_modules(model)) == dict(model.model.named_modules(prefix="model"))


def test_the_signature_of_forward_stays_visible():
    model = llama()
    expected = inspect.signature(model.forward)
    pop_ext.enable(model, PLAN)
    assert inspect.signature(model.forward) == expected
    assert "logits_to_keep" in inspect.signature(model.forward).parameters


# Calls that run natively mean what they meant


def assert_equals_stock(model: nn.Module, *args: Any, real: torch.Tensor | None = None, **call: Any) -> None:
    """With nothing pruned: the stock model's logits, and its K/V wherever `real` [batch, slots]."""
    expected = model(*copy.deepcopy(args), **copy.deepcopy(call))
    for omit in ((), (LAYERS - 1,)):
        twin = enabled_twin(model, Plan(LAYERS, omit), strict=True)
        actual = twin(*copy.deepcopy(args), **copy.deepcopy(call))
        assert pop_ext.last_call(twin).native
        assert_close_fp32(actual.logits, expected.logits, "logits")
        ours = stored_layers(actual.past_key_values)
        for index, (a, e) in enumerate(zip(ours, stored_layers(expected.past_key_values), strict=True)):
            assert (a.length, a.first) == (e.length, e.first)
            mask = torch.ones(a.keys.shape[0], a.length) if real is None else real
            rows = mask[:, a.first : a.length].bool()
            for kind in ("keys", "values"):
                kept = [getattr(x, kind).transpose(1, 2)[rows] for x in (a, e)]
                assert_close_fp32(kept[0], kept[1], f"layer {index} {kind}")


BUILDS = {"llama": llama, "mistral": mistral, "qwen2": lambda: qwen2(use_sliding_window=True)}


@pytest.mark.parametrize("keep", [1, 3])
@pytest.mark.parametrize("family", BUILDS)
@torch.no_grad()
def test_an_unpruned_prefill_equals_the_stock_model(family, keep):
    model = BUILDS[family]()
    assert_equals_stock(model, tokens(model, 2, T), logits_to_keep=keep)


@pytest.mark.parametrize("family", BUILDS)
@torch.no_grad()
def test_positions_of_a_left_padded_batch_count_by_column_as_in_the_stock_model(family):
    model = BUILDS[family]()
    ids, mask = pad([tokens(model, n, seed=n) for n in (5, T, 12)], "left")
    assert_equals_stock(model, ids, attention_mask=mask, logits_to_keep=1, real=mask)


@torch.no_grad()
def test_given_positions_are_used():
    model = llama()
    ids, mask = pad([tokens(model, n, seed=n) for n in (5, T)], "left")
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    assert_equals_stock(model, ids, attention_mask=mask, position_ids=positions, logits_to_keep=1, real=mask)
    shifted = torch.arange(T)[None] + 40
    assert_equals_stock(model, ids, attention_mask=mask, position_ids=shifted, logits_to_keep=1, real=mask)


@torch.no_grad()
def test_embeddings_as_input_equal_the_stock_model():
    model = llama()
    embeds = torch.randn(2, T, model.config.hidden_size)
    assert_equals_stock(model, inputs_embeds=embeds, logits_to_keep=1)


@pytest.mark.parametrize("family", BUILDS)
@torch.no_grad()
def test_a_second_turn_equals_the_stock_model(family):
    model = BUILDS[family]()
    cache = filled_cache(model, 23, batch=2)
    assert_equals_stock(model, tokens(model, 2, T), past_key_values=cache, logits_to_keep=1)


@torch.no_grad()
def test_a_second_turn_after_left_padding_equals_the_stock_model():
    model = llama()
    ids, mask = pad([tokens(model, n, seed=n) for n in (5, T)], "left")
    cache = model(ids, attention_mask=mask, logits_to_keep=1).past_key_values
    longer = torch.cat([mask, torch.ones(2, 8, dtype=torch.long)], dim=1)
    assert_equals_stock(
        model, tokens(model, 2, 8), past_key_values=cache, attention_mask=longer, logits_to_keep=1, real=longer
    )


@pytest.mark.parametrize("kind", ["bool", "float"])
@torch.no_grad()
def test_a_causal_4d_mask_is_read_as_the_padding_it_was_made_from(kind):
    model = llama()
    ids, mask = pad([tokens(model, n, seed=n) for n in (5, T)], "left")
    model.config._attn_implementation = "sdpa" if kind == "bool" else "eager"
    embeds = model.get_input_embeddings()(ids)
    causal = create_causal_mask(model.config, embeds, mask, None)
    assert causal.ndim == 4
    assert_equals_stock(model, ids, attention_mask=causal, logits_to_keep=1, real=mask)


@torch.no_grad()
def test_a_causal_4d_mask_over_a_static_cache_is_read_as_the_padding_it_was_made_from():
    model = llama()
    ids, mask = pad([tokens(model, n, seed=n) for n in (5, T)], "left")
    cache = StaticCache(config=model.config, max_cache_len=50)
    model(ids, attention_mask=mask, past_key_values=cache, logits_to_keep=1)
    longer = torch.cat([mask, torch.ones(2, 8, dtype=torch.long)], dim=1)
    embeds = torch.empty(2, 8, 0)
    causal = create_causal_mask(model.config, embeds, longer, cache)
    assert causal.shape == (2, 1, 8, 50)
    assert_equals_stock(
        model, tokens(model, 2, 8), past_key_values=cache, attention_mask=causal, logits_to_keep=1, real=longer
    )


@torch.no_grad()
def test_a_dict_with_one_causal_mask_is_read_as_the_padding_it_was_made_from():
    model = qwen2()
    ids, mask = pad([tokens(model, n, seed=n) for n in (5, T)], "left")
    causal = create_causal_mask(model.config, model.get_input_embeddings()(ids), mask, None)
    for masks in ({"full_attention": causal}, {"full_attention": None}):
        real = None if masks["full_attention"] is None else mask
        assert_equals_stock(model, ids, attention_mask=masks, logits_to_keep=1, real=real)


@torch.no_grad()
def test_return_dict_false_gives_the_stock_model_s_tuple():
    model = llama()
    ids = tokens(model, 1, T)
    expected = model(ids, logits_to_keep=1, return_dict=False)
    actual = enabled_twin(model, Plan(LAYERS, ()), strict=True)(ids, logits_to_keep=1, return_dict=False)
    assert type(actual) is type(expected) is tuple
    assert len(actual) == len(expected) == 2
    assert_close_fp32(actual[0], expected[0], "logits")
    compare_caches(actual[1], expected[1])


@torch.no_grad()
def test_arguments_by_position_are_understood():
    model = llama()
    ids, mask = pad([tokens(model, n, seed=n) for n in (5, T)], "left")
    assert_equals_stock(model, ids, mask, None, DynamicCache(), logits_to_keep=1, real=mask)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("kind", ["none", "dynamic", "static"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
@torch.no_grad()
def test_the_cache_of_the_call_is_the_one_that_is_filled(family, kind, backend):
    model = BUILDS[family]()
    ids = tokens(model, 2, T)

    def cache() -> Any:
        makers = {
            "none": lambda: None,
            "dynamic": lambda: DynamicCache(config=model.config),
            "static": lambda: StaticCache(config=model.config, max_cache_len=40),
        }
        return makers[kind]()

    stock = model(ids, past_key_values=cache(), logits_to_keep=1).past_key_values
    given = cache()
    twin = enabled_twin(model, strict=True, backend=backend)
    filled = twin(ids, past_key_values=given, logits_to_keep=1).past_key_values
    if given is not None:
        assert filled is given
    assert type(filled) is type(stock)
    assert [type(layer) for layer in filled.layers] == [type(layer) for layer in stock.layers]
    for ours, theirs in zip(stored_layers(filled), stored_layers(stock), strict=True):
        assert (ours.length, ours.first, ours.keys.shape) == (theirs.length, theirs.first, theirs.keys.shape)
    compare_caches(filled, reference.prefill(model, ids, PLAN)[1])


@torch.no_grad()
def test_a_prefill_of_a_pruned_model_equals_the_oracle():
    model = llama()
    ids, mask = pad([tokens(model, n, seed=n) for n in (5, T, 1)], "left")
    positions = torch.arange(T)[None]
    twin = enabled_twin(model, PLAN.replace(boundary=2), strict=True)
    actual = twin(ids, attention_mask=mask, logits_to_keep=1)
    expected, cache = reference.prefill(
        model, ids, PLAN.replace(boundary=2), attention_mask=mask, position_ids=positions
    )
    assert_close_fp32(actual.logits, expected, "logits")
    compare_caches(actual.past_key_values, cache, mask=mask)


# min_tokens, batch mates, last_call


@torch.no_grad()
def test_min_tokens_is_judged_for_each_sequence():
    model = llama()
    ids, mask = pad([tokens(model, n, seed=n) for n in (9, T, 10)], "left")
    twin = enabled_twin(model, PLAN.replace(min_tokens=10), strict=True)
    actual = twin(ids, attention_mask=mask, logits_to_keep=1)
    assert pop_ext.last_call(twin).tokens == (9, T, 10)
    assert pop_ext.last_call(twin).boundary == (9, 1, 1)
    expected, cache = reference.prefill(
        model, ids, PLAN, attention_mask=mask, position_ids=torch.arange(T)[None], boundary=[9, 1, 1]
    )
    assert_close_fp32(actual.logits, expected, "logits")
    compare_caches(actual.past_key_values, cache, mask=mask)


@torch.no_grad()
def test_a_prompt_below_min_tokens_equals_the_stock_model():
    model = llama()
    ids = tokens(model, 1, T)
    twin = enabled_twin(model, PLAN.replace(min_tokens=T + 1), strict=True)
    expected = model(ids, logits_to_keep=1)
    assert_close_fp32(twin(ids, logits_to_keep=1).logits, expected.logits, "logits")
    assert "full depth" in pop_ext.last_call(twin).reason


@torch.no_grad()
def test_batch_mates_do_not_change_a_result():
    model = llama()
    sequences = [tokens(model, n, seed=n) for n in (4, T, 12, 1)]
    ids, mask = pad(sequences, "left")
    twin = enabled_twin(model, PLAN.replace(min_tokens=5), strict=True)
    together = twin(ids, attention_mask=mask, logits_to_keep=1, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    for i, sequence in enumerate(sequences[:3]):
        alone = twin(sequence[None], logits_to_keep=1)
        assert_close_fp32(together.logits[i : i + 1], alone.logits, f"sequence {i}")


@torch.no_grad()
def test_rows_whose_logits_are_wanted_run_at_full_depth():
    model = llama()
    ids = tokens(model, 1, T)
    twin = enabled_twin(model, strict=True)
    actual = twin(ids, logits_to_keep=4)
    assert pop_ext.last_call(twin).boundary == (4,)
    expected, _ = reference.prefill(model, ids, PLAN, logits_to_keep=4)
    assert_close_fp32(actual.logits, expected, "logits")


@torch.no_grad()
def test_last_call_is_the_latest_prefill_and_not_a_decode_step():
    model = pop_ext.enable(llama(), PLAN)
    assert pop_ext.last_call(model) is None
    output = model(tokens(model, 2, T), logits_to_keep=1)
    prefill = pop_ext.last_call(model)
    assert (prefill.backend, prefill.tokens, prefill.boundary, prefill.plan) == ("native", (T, T), (1, 1), PLAN)
    model(tokens(model, 2, 1), past_key_values=output.past_key_values, logits_to_keep=1)
    assert pop_ext.last_call(model) is prefill
    with pytest.warns(match="logits_to_keep=0"):
        model(tokens(model, 1, T))
    assert pop_ext.last_call(model).rule == "logits_to_keep"


@torch.no_grad()
def test_explain_says_what_a_prefill_would_run_and_leaves_the_cache_alone():
    model = pop_ext.enable(llama(), PLAN)
    cache = filled_cache(model)
    before = copy.deepcopy(cache)
    decision = pop_ext.explain(model, tokens(model, 1, T), past_key_values=cache, logits_to_keep=1)
    assert decision.native
    assert (
        str(decision) == f"native prefill: a prefill; 1 sequence(s), {T} new tokens, {T - 1} of them omit 3 of 6 layers"
    )
    assert_same_cache(cache, before)


def test_explain_of_a_model_that_is_not_enabled_raises():
    with pytest.raises(ValueError, match="expected an enabled model"):
        pop_ext.explain(llama(), torch.zeros(1, 3))
    with pytest.raises(ValueError, match="expected an enabled model"):
        pop_ext.last_call(llama())
