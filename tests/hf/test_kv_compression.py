"""Test examples/kv_compression.py: a press sees the whole prompt once in every layer, after the prefill."""

from __future__ import annotations

import importlib.util
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pop_ext
import pytest
import torch
from enabled_models import LAYERS, PLAN, generate
from model_folder import save_tiny_llama
from models import gemma2, gemma3, llama, mistral, olmo2, pad, phi3, qwen3, tokens
from pop_ext.hf.compat import cache_of, with_cache
from pop_ext.reference import project_kv
from tolerance import assert_close_fp32, compare_caches
from transformers import DynamicCache, StaticCache

EXAMPLE = Path(__file__).parents[2] / "examples" / "kv_compression.py"
T = 40
BACKENDS = ("native", "reference", "stock")


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLE))


def enabled(model: Any, backend: str, plan: pop_ext.Plan = PLAN) -> Any:
    return nullcontext() if backend == "stock" else pop_ext.enabled(model, plan, strict=True, backend=backend)


class RecordingPress:
    """Press that records its arguments and drops nothing."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, dict[str, Any], Any, Any]] = []

    def post_init_from_model(self, model: Any) -> None: ...

    def forward_hook(self, module: Any, _input: Any, kwargs: dict[str, Any], output: Any) -> Any:
        layer = kwargs["past_key_values"].layers[module.layer_idx]
        self.seen.append((module, kwargs, layer.keys, layer.values))
        return output


@torch.no_grad()
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_press_sees_each_layer_once_with_the_whole_prompt(example, backend):
    model, press = llama(), RecordingPress()
    with enabled(model, backend), example["pressed"](model, press):
        cache = cache_of(model(tokens(model, 2, T), logits_to_keep=1, use_cache=True))
        assert backend == "stock" or pop_ext.last_call(model).backend == backend
    assert [module.layer_idx for module, *_ in press.seen] == list(range(LAYERS))
    for module, kwargs, keys, values in press.seen:
        assert kwargs["past_key_values"] is cache
        assert keys.shape[2] == values.shape[2] == T
        assert int(kwargs["cache_position"][-1]) + 1 == kwargs["hidden_states"].shape[1] == T  # kvpress: a prefill
        assert keys is cache.layers[module.layer_idx].keys


# The hidden states are right if projecting them gives the K and V in the cache, also in omitted layers.
@torch.no_grad()
@pytest.mark.parametrize("boundary", [1, 7])
@pytest.mark.parametrize("build", [llama, qwen3, phi3, gemma2], ids=lambda build: build.__name__)
@pytest.mark.parametrize("backend", ["reference", "stock"])
def test_hidden_states_reproduce_the_keys_and_values_of_each_layer(example, build, boundary, backend):
    over = {} if build in (llama, qwen3) else {"sliding_window": None if build is phi3 else 4 * T}
    model, press = build(**over), RecordingPress()
    cache = DynamicCache()
    with enabled(model, backend, PLAN.replace(boundary=boundary)), example["pressed"](model, press, hidden_states=True):
        model(tokens(model, 2, T), **with_cache(model, cache), logits_to_keep=1, use_cache=True)
    assert len(press.seen) == LAYERS
    for module, kwargs, keys, values in press.seen:
        layer = WithoutNorm(module)
        expected = project_kv(layer, kwargs["hidden_states"], *kwargs["position_embeddings"])
        for ours, theirs, name in zip((keys, values), expected, ("keys", "values"), strict=True):
            assert_close_fp32(ours, theirs, f"{name} of layer {module.layer_idx}")


class WithoutNorm:
    """Decoder layer for `project_kv` without an input norm: presses get normalised hidden states."""

    def __init__(self, attention: Any) -> None:
        self.self_attn = attention


@torch.no_grad()
@pytest.mark.parametrize("build", [llama, olmo2], ids=lambda build: build.__name__)
def test_native_and_reference_backends_leave_the_same_compressed_cache(example, build):
    model, caches = build(), []
    press = example["KeyNormPress"](compression_ratio=0.25)
    # Every token occurs once: in layer 0 the key norm of a token is the same at all positions, up to rounding.
    ids = torch.randperm(model.config.vocab_size, device=model.device)[: 2 * T].view(2, T)
    for backend in ("native", "reference"):
        with enabled(model, backend), example["pressed"](model, press):
            caches.append(cache_of(model(ids, logits_to_keep=1, use_cache=True)))
    assert {layer.keys.shape[2] for layer in caches[0].layers} == {T * 3 // 4}
    compare_caches(caches[0], caches[1])


@torch.no_grad()
def decode(model: Any, ids: torch.Tensor, cache: Any, logits: torch.Tensor, new: int) -> list[int]:
    """Return `new` greedy tokens of the stock model over a cache, with the positions of the uncompressed text."""
    found = [int(logits[0, -1].argmax())]
    for position in range(ids.shape[1], ids.shape[1] + new - 1):
        call = {"position_ids": torch.tensor([[position]], device=ids.device), **with_cache(model, cache)}
        logits = model(torch.tensor([found[-1:]], device=ids.device), **call, use_cache=True).logits
        found.append(int(logits[0, -1].argmax()))
    return found


@pytest.mark.parametrize("backend", BACKENDS)
def test_generate_continues_over_the_compressed_cache_at_text_positions(example, backend):
    model, press = llama(), example["KeyNormPress"](compression_ratio=0.5)
    ids = tokens(model, 1, T)
    with enabled(model, backend), example["pressed"](model, press), torch.no_grad():
        written = generate(model, ids)[0, T:].tolist()
        out = model(ids, logits_to_keep=1, use_cache=True)
    assert written == decode(model, ids, cache_of(out), out.logits, 16)
    with enabled(model, backend):
        assert written != generate(model, ids)[0, T:].tolist()
    assert len(set(written)) > 8


@torch.no_grad()
def test_later_turns_and_decode_steps_are_not_compressed(example):
    model, press = llama(), RecordingPress()
    with enabled(model, "native"), example["pressed"](model, press):
        cache = cache_of(model(tokens(model, 1, T), logits_to_keep=1, use_cache=True))
        model(tokens(model, 1, 9), **with_cache(model, cache), logits_to_keep=1, use_cache=True)
        model(tokens(model, 1, 1), **with_cache(model, cache), logits_to_keep=1, use_cache=True)
        assert pop_ext.last_call(model).tokens == (9,)
    assert len(press.seen) == LAYERS


@torch.no_grad()
@pytest.mark.parametrize("build", [mistral, gemma3], ids=lambda build: build.__name__)
def test_layers_with_a_sliding_window_cache_are_not_compressed(example, build):
    model, press = build(), RecordingPress()
    with enabled(model, "native"), example["pressed"](model, press):
        model(tokens(model, 1, T), logits_to_keep=1, use_cache=True)
    kinds = getattr(model.config, "layer_types", None) or ["sliding_attention"] * LAYERS
    full = [layer for layer, kind in enumerate(kinds) if kind == "full_attention"]
    assert [module.layer_idx for module, *_ in press.seen] == full


@torch.no_grad()
def test_the_press_is_removed_and_the_model_keeps_its_handle(example):
    model = pop_ext.enable(llama(), PLAN, strict=True)
    model.model.layers[1].self_attn.masked_key_indices = (torch.tensor([0]),) * 3  # as AdaKV leaves it after a prompt
    handle = model.forward.backend.native.handle
    with example["pressed"](model, example["KeyNormPress"]()):
        model(tokens(model, 1, T), logits_to_keep=1, use_cache=True)
        assert model.model.layers[0].self_attn.rotary_emb is model.model.rotary_emb
    out = model(tokens(model, 1, T), logits_to_keep=1, use_cache=True)
    assert pop_ext.last_call(model).native
    assert model.forward.backend.native.handle == handle
    assert not hasattr(model.model.layers[0].self_attn, "rotary_emb")
    assert cache_of(out).get_seq_length() == T


class ReadingPress(RecordingPress):
    """Press that applies `read` to the hidden states and position embeddings of each layer."""

    def __init__(self, read: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.read = read

    def forward_hook(self, module: Any, _input: Any, kwargs: dict[str, Any], output: Any) -> Any:
        self.read(kwargs["hidden_states"], kwargs["position_embeddings"])
        return output


@torch.no_grad()
@pytest.mark.parametrize(
    "read",
    [lambda h, _: h[:, -4:], lambda h, _: torch.relu(h), lambda h, _: h.norm(dim=-1), lambda _, rope: (*rope,)],
    ids=["slice", "function", "method", "rope"],
)
def test_a_press_reading_hidden_states_natively_raises(example, read):
    model = llama()
    with (
        enabled(model, "native"),
        example["pressed"](model, ReadingPress(read)),
        pytest.raises(ValueError, match='press: it reads hidden states.*backend="reference"'),
    ):
        model(tokens(model, 1, T), logits_to_keep=1, use_cache=True)


@torch.no_grad()
def test_padding_and_static_caches_are_refused(example):
    model = llama()
    ids, mask = pad([tokens(model, T), tokens(model, 9)], "left")
    static = StaticCache(config=model.config, max_cache_len=2 * T)
    with enabled(model, "native"), example["pressed"](model, RecordingPress()):
        with pytest.raises(ValueError, match="attention_mask: expected no padding"):
            model(ids, attention_mask=mask, logits_to_keep=1, use_cache=True)
        with pytest.raises(ValueError, match="past_key_values: expected a DynamicCache, got a StaticLayer"):
            model(tokens(model, 1, T), **with_cache(model, static), logits_to_keep=1, use_cache=True)


@contextmanager
def hooked_attentions(model: Any):
    """Halve the cache of a layer at the end of each attention call, as the hooks of kvpress do."""

    def halve(module: Any, _args: Any, kwargs: dict[str, Any], output: Any) -> None:
        layer = kwargs.get("cache", kwargs.get("past_key_values")).layers[module.layer_idx]
        if layer.keys.shape[2] == kwargs["hidden_states"].shape[1] > 1:
            layer.keys, layer.values = layer.keys[:, :, ::2], layer.values[:, :, ::2]

    handles = [layer.self_attn.register_forward_hook(halve, with_kwargs=True) for layer in model.model.layers]
    yield
    for handle in handles:
        handle.remove()


@torch.no_grad()
@pytest.mark.parametrize("boundary", [1, 3, T])
def test_hooks_that_compress_during_the_call_are_refused_or_declined(example, boundary):
    model = llama()
    ids = tokens(model, 1, T)
    with hooked_attentions(model):
        expected = model(ids, logits_to_keep=1, use_cache=True)
        plan = PLAN.replace(boundary=boundary)
        with enabled(model, "reference", plan), pytest.raises(ValueError, match="hooks that leave the cache as it is"):
            model(ids, logits_to_keep=1, use_cache=True)
        with pop_ext.enabled(model, plan), pytest.warns(UserWarning, match="hooks on model.layers.0.self_attn"):
            actual = model(ids, logits_to_keep=1, use_cache=True)
    assert torch.equal(actual.logits, expected.logits)
    assert {layer.keys.shape[2] for layer in cache_of(actual).layers} == {T // 2}


@pytest.mark.skipif(importlib.util.find_spec("kvpress") is None, reason="needs kvpress (pip install --no-deps)")
@pytest.mark.parametrize("press", ["KnormPress", "SnapKVPress --hidden-states"])
def test_presses_of_kvpress_run_after_a_pruned_prefill(press, tmp_path):
    save_tiny_llama(tmp_path / "model")
    (tmp_path / "prompt.txt").write_text("def square(x):\n    return x * x\n" * 20)
    command = [sys.executable, EXAMPLE, "--model", tmp_path / "model", "--prompt-file", tmp_path / "prompt.txt"]
    paths = [str(Path(pop_ext.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    run = subprocess.run(  # in its own process: importing kvpress wraps transformers' attention functions
        [*command, "--press", *f"kvpress.{press}".split()],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert ("reference" if "hidden" in press else "native") + " prefill" in run.stdout


@torch.no_grad()
def test_a_later_turn_over_a_compressed_cache_uses_given_positions(example):
    model, press = llama(), example["KeyNormPress"](compression_ratio=0.5)
    more = tokens(model, 1, 9, seed=1)
    positions = torch.arange(T, T + 9, device=model.device)[None]
    logits, caches = [], []
    for plan in (pop_ext.Plan(LAYERS, ()), None):
        with enabled(model, "native"), example["pressed"](model, press):
            cache = cache_of(model(tokens(model, 1, T), logits_to_keep=1, use_cache=True))
        with nullcontext() if plan is None else pop_ext.enabled(model, plan, strict=True):
            call = {"position_ids": positions, "logits_to_keep": 1, "use_cache": True, **with_cache(model, cache)}
            logits.append(model(more, **call).logits)
        caches.append(cache)
    assert_close_fp32(logits[0], logits[1], "logits")
    compare_caches(caches[0], caches[1])


@torch.no_grad()
def test_a_cache_with_uneven_layers_runs_the_stock_forward(example):
    model = llama()
    with pop_ext.enabled(model, PLAN):
        cache = cache_of(model(tokens(model, 1, T), logits_to_keep=1, use_cache=True))
        for layer in cache.layers[1:]:  # as PyramidKV, which keeps less in deeper layers
            layer.keys, layer.values = layer.keys[:, :, ::2], layer.values[:, :, ::2]
        call = {"past_key_values": cache, "logits_to_keep": 1}
        decision = pop_ext.explain(model, tokens(model, 1, 9), **call)
    assert (decision.backend, decision.rule) == ("stock", "cache")
