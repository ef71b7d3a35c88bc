"""Test every reason to decline a prefill: stock bits, one warning, and what `explain` and `strict` report."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy
import pop_ext
import pytest
import torch
from enabled_models import PLAN, T, assert_same_bits, assert_same_cache, filled_cache, offload_with_accelerate
from models import llama, mistral, mixtral, qwen2, qwen3_moe, tokens
from torch import nn
from transformers import AttentionInterface, DynamicCache
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

# Ingredients of a case: an edit of the model, a context manager around the call, and arguments of the call.


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


def attention_of_one_layer(model: nn.Module) -> None:
    """Give one layer its own config with another attention, as users do for retained layers."""
    AttentionInterface.register("half", half_attention)
    attention = model.model.layers[3].self_attn
    attention.config = copy.deepcopy(attention.config)
    attention.config._attn_implementation = "half"


def attention_named_like_flash(model: nn.Module) -> None:
    AttentionInterface.register("flash_half", half_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register("flash_half", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.config._attn_implementation = "flash_half"


@contextmanager
def replaced_mask() -> Iterator[None]:
    original = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]

    def banded(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **{**kwargs, "allow_is_causal_skip": False}).triu(-4)

    ALL_MASK_ATTENTION_FUNCTIONS.register("sdpa", banded)
    try:
        yield
    finally:
        ALL_MASK_ATTENTION_FUNCTIONS.register("sdpa", original)


@contextmanager
def replaced_eager() -> Iterator[None]:
    from transformers.models.llama import modeling_llama

    original = modeling_llama.eager_attention_forward
    modeling_llama.eager_attention_forward = half_attention
    try:
        yield
    finally:
        modeling_llama.eager_attention_forward = original


def half_experts(module: nn.Module, hidden_states: Any, index: Any, weights: Any) -> Any:
    return ALL_EXPERTS_FUNCTIONS["batched_mm"](module, hidden_states, index, weights) * 0.5


def custom_experts(model: nn.Module) -> None:
    ExpertsInterface.register("half", half_experts)
    model.set_experts_implementation("half")


@contextmanager
def replaced_sdpa() -> Iterator[None]:
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
    """Patch the forward of a class, as kernel libraries do."""
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
    """Return a causal mask in which the first five tokens also see each other."""
    mask = causal_4d(columns)
    mask[..., :5, :5] = True
    return mask


def banded_4d(columns: int) -> torch.Tensor:
    return causal_4d(columns).triu(-4)


@dataclass
class Case:
    """A call that is declined.

    Attributes:
        rule: expected rule of the decision.
        call: returns the arguments of the call.
        edit: changes the model before it is enabled.
        context: surrounds `enable` and the call.
        build: builds the model.
        batch: number of sequences.
        grad: whether grad mode is on.
        backend: of `enable`. The portable backend runs some calls that the native one declines.
    """

    rule: str
    call: Callable[[nn.Module], dict[str, Any]] = lambda model: {"logits_to_keep": 1}
    edit: Callable[[nn.Module], None] = lambda model: None
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    build: Callable[..., nn.Module] = llama
    batch: int = 1
    grad: bool = False
    backend: str = "auto"


def keep_one(**call: Any) -> Callable[[nn.Module], dict[str, Any]]:
    def on_device(model: nn.Module) -> dict[str, Any]:
        def moved(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: moved(inner) for name, inner in value.items()}
            return value.to(model.device) if isinstance(value, torch.Tensor) else value

        return {"logits_to_keep": 1, **moved(call)}

    return on_device


class OtherCache(DynamicCache):
    """Cache whose update changes the keys that it stores."""

    def update(self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        return super().update(key_states * 0.5, value_states, layer_idx, *args, **kwargs)


RIGHT_PADDED = torch.tensor([[1] * T, [1] * (T - 3) + [0] * 3])
HOLES = torch.tensor([[1] * 5 + [0] * 2 + [1] * (T - 7)])
HOLES_IN_PAST = torch.tensor([[1] * 3 + [0] * 2 + [1] * (T + 2)])
PACKED = torch.cat([torch.arange(8), torch.arange(T - 8)])[None]
DECLINED = {
    "labels": Case("labels", lambda model: {"labels": tokens(model, 1, T)}),
    "grad mode": Case("grad", grad=True),
    "autocast": Case("autocast", context=lambda: torch.autocast(torch.get_default_device().type, torch.bfloat16)),
    "use_cache=False": Case("use_cache", keep_one(use_cache=False)),
    "use_cache=False in the config": Case("use_cache", edit=set_config(use_cache=False)),
    "logits_to_keep left out": Case("logits_to_keep", lambda model: {}),
    "use_cache=False, logits_to_keep left out": Case("use_cache", lambda model: {"use_cache": False}),
    "output_attentions, logits_to_keep left out": Case("output_attentions", lambda model: {"output_attentions": True}),
    "logits_to_keep=0": Case("logits_to_keep", keep_one(logits_to_keep=0)),
    "logits_to_keep is a tensor": Case("logits_to_keep", keep_one(logits_to_keep=torch.tensor([3, 5]))),
    "logits_to_keep is an int of NumPy, an index to the stock forward": Case(
        "logits_to_keep", keep_one(logits_to_keep=numpy.int64(1))
    ),
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
    "output_router_logits": Case("output_router_logits", keep_one(output_router_logits=True), build=mixtral),
    "output_router_logits in the config": Case(
        "output_router_logits", edit=set_config(output_router_logits=True), build=qwen3_moe
    ),
    "output_hidden_states as a list of layers": Case("output_hidden_states", keep_one(output_hidden_states=[1, 2])),
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
    "accelerate's hooks": Case("hooks", edit=offload_with_accelerate, backend="native"),
    "a patched class": Case("hooks", context=patched_class),
    "a global hook": Case("hooks", context=lambda: global_hook(nn.modules.module.register_module_forward_hook)),
    "a global pre-hook": Case("hooks", context=lambda: global_hook(nn.modules.module.register_module_forward_pre_hook)),
    "a custom attention implementation": Case("attention", edit=custom_attention),
    "a custom attention of one layer": Case("attention", edit=attention_of_one_layer),
    "a custom attention whose name begins with flash": Case("attention", edit=attention_named_like_flash),
    "a replaced sdpa": Case("attention", context=replaced_sdpa),
    "a replaced mask for sdpa": Case("attention", context=replaced_mask),
    "a replaced eager attention": Case(
        "attention", context=replaced_eager, build=lambda: llama(attn_implementation="eager")
    ),
    "a custom experts implementation": Case("experts", edit=custom_experts, build=mixtral, backend="native"),
    "bidirectional attention": Case("attention", edit=set_config(is_causal=False)),
    "dropout in training": Case("training", edit=train_with_dropout),
    "gradient checkpointing in training": Case("training", edit=train_with_checkpointing),
    "an unknown argument": Case("arguments", keep_one(my_flag=True)),
    "packed sequences": Case("position_ids", keep_one(position_ids=PACKED)),
    "a window cache for full attention": Case(
        "cache",
        lambda model: {"past_key_values": DynamicCache(config=mistral().config), "logits_to_keep": 1},
        backend="native",
    ),
    "a subclass of DynamicCache": Case("cache", lambda model: {"past_key_values": OtherCache(), "logits_to_keep": 1}),
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
        stack.enter_context(case.context())
        yield case, model, tokens(model, case.batch, T), call


# Enables the model itself: in a deepcopy, replaced forwards and accelerate's partials stay bound to the original.
def test_a_declined_call_gives_the_bits_of_the_stock_model(declined):
    case, model, ids, call = declined
    expected = run(model, ids, call, case.grad)
    pop_ext.enable(model, PLAN, backend=case.backend)
    with pytest.warns(UserWarning, match="the stock forward runs"):
        actual = run(model, ids, call, case.grad)
    assert_same_bits(actual, expected)
    assert pop_ext.last_call(model).rule == case.rule


def test_a_declined_call_warns_once(declined):
    case, model, ids, call = declined
    pop_ext.enable(model, PLAN, backend=case.backend)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(model, ids, call, case.grad)
        run(model, ids[:, :], call, case.grad)
    ours = [w for w in caught if str(w.message).startswith("pop_ext")]
    assert len(ours) == 1
    assert ours[0].filename == __file__


def test_explain_names_the_reason_for_a_decline_without_running(declined):
    case, model, ids, call = declined
    pop_ext.enable(model, PLAN, backend=case.backend)
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
    pop_ext.enable(model, PLAN, strict=True, backend=case.backend)
    with pytest.raises(pop_ext.PrefillDeclined, match="strict=True") as error:
        run(model, ids, call, case.grad)
    with torch.set_grad_enabled(case.grad):
        assert pop_ext.explain(model, ids, **call).reason in str(error.value)


@pytest.mark.parametrize("name", ["flex_attention", "paged|sdpa", "paged|flash_attention_2"])
@torch.no_grad()
def test_flex_attention_and_that_of_continuous_batching_are_declined(name):
    model = llama()
    pop_ext.enable(model, PLAN)
    model.config._attn_implementation = name  # only explained, since a run would compile
    decision = pop_ext.explain(model, tokens(model, 1, T), logits_to_keep=1)
    assert (decision.rule, decision.declined) == ("attention", True)
    assert name in str(decision)


@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3", "eager", "sdpa"])
@torch.no_grad()
def test_eager_sdpa_and_flash_attention_are_supported(name):
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
