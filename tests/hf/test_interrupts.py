"""Test Ctrl+C during a native prefill: it ends after the layer that runs, and the cache is as before."""

from __future__ import annotations

import signal
import threading

import pop_ext
import pytest
import torch
from models import hyperclovax, llama, tokens
from op_calls import op_call, run_op
from pop_ext import _core, ops
from pop_ext.hf import native_model
from seconds import seconds_of
from torch.profiler import ProfilerActivity, profile
from transformers import DynamicCache, StaticCache

LAYERS = 16


@pytest.fixture(autouse=True)
def ctrl_c_raises():
    """Handle SIGINT as Python does by itself. A process that a shell started in the background ignores it."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


def slow_model():
    """Return a model whose prefill of 1,500 tokens takes a quarter of a second or more."""
    return llama(num_hidden_layers=LAYERS, hidden_size=256, intermediate_size=2048)


def signal_after(seconds: float, number: int) -> threading.Timer:
    """Start a timer that sends a signal to this process."""
    timer = threading.Timer(seconds, signal.raise_signal, (number,))
    timer.start()
    return timer


@pytest.mark.parametrize("enabled", [False, True], ids=["prefill", "enabled forward"])
def test_an_interrupted_prefill_ends_early_and_changes_nothing(enabled, monkeypatch):
    model = slow_model()
    native = pop_ext.load(model, "third")
    cache = native.prefill(tokens(model, 1, 9)).past_key_values
    before = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
    ids = tokens(model, 1, 1500)
    seconds = seconds_of(lambda: native.prefill(ids))
    if enabled:
        pop_ext.enable(model, "third", strict=True)

    def call():
        if enabled:
            return model(ids, past_key_values=cache, logits_to_keep=1).logits
        return native.prefill(ids, past_key_values=cache).logits

    with torch.no_grad():
        timers, rope = [], native_model.rope_tables

        def rope_and_signal(*arguments):
            timers.append(signal_after(seconds / 4, signal.SIGINT))  # the operator comes next
            return rope(*arguments)

        monkeypatch.setattr(native_model, "rope_tables", rope_and_signal)
        with pytest.raises(KeyboardInterrupt), profile(activities=[ProfilerActivity.CPU]) as profiled:
            call()
        monkeypatch.undo()
        timers[0].join()
        assert sum(event.name == "pop::attention" for event in profiled.events()) < LAYERS
        for layer, (keys, values) in zip(cache.layers, before, strict=True):
            assert torch.equal(layer.keys, keys)
            assert torch.equal(layer.values, values)
        uninterrupted = native.prefill(tokens(model, 1, 9)).past_key_values
        expected = pop_ext.load(model, "third").prefill(ids, past_key_values=uninterrupted)
        assert torch.equal(call(), expected.logits)


def test_what_another_handler_raises_arrives():
    class Alarm(Exception):
        pass

    def handler(number, frame):
        raise Alarm

    model = slow_model()
    native, ids = pop_ext.load(model, "third"), tokens(model, 1, 1500)

    def prefill_many() -> None:
        for _ in range(100):
            native.prefill(ids)

    previous = signal.signal(signal.SIGUSR1, handler)
    timer = signal_after(0.2, signal.SIGUSR1)
    try:
        with pytest.raises(Alarm):
            prefill_many()
    finally:
        timer.join()
        signal.signal(signal.SIGUSR1, previous)


def test_a_handler_that_raises_nothing_lets_the_prefill_go_on():
    seen = []
    model = slow_model()
    native, ids = pop_ext.load(model, "third"), tokens(model, 1, 1500)
    with torch.no_grad():
        expected = native.prefill(ids).logits
        seconds = seconds_of(lambda: native.prefill(ids))
        previous = signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))
        timer = signal_after(seconds / 4, signal.SIGUSR1)
        try:
            assert torch.equal(native.prefill(ids).logits, expected)
        finally:
            timer.join()
            signal.signal(signal.SIGUSR1, previous)
    assert seen == [signal.SIGUSR1]


def test_what_a_handler_raises_keeps_its_cause(monkeypatch):
    reason = KeyError("the cause")
    try:
        raise KeyboardInterrupt from reason
    except KeyboardInterrupt as error:
        interrupt = error
    monkeypatch.setattr(ops._core, "take_interrupt", lambda: interrupt)
    with pytest.raises(KeyboardInterrupt) as caught:
        ops.raise_interrupt(RuntimeError("pop::prefill: interrupted by a signal"))
    assert caught.value.__cause__ is reason
    assert caught.value.__suppress_context__


def test_an_interrupted_raw_operator_raises_the_interrupt_next():
    model = slow_model()
    native = pop_ext.load(model, "third")
    call = op_call(native, [torch.arange(1500) % 50])
    seconds = seconds_of(lambda: run_op(call))

    def catch_the_error() -> None:
        try:
            run_op(call)
        except RuntimeError as error:
            str(error)
            str(error)

    timer = signal_after(seconds / 4, signal.SIGINT)
    try:
        with pytest.raises(KeyboardInterrupt) as caught:
            catch_the_error()
    finally:
        timer.join()
        torch.set_grad_enabled(True)  # the interrupt may come inside the end of a torch.no_grad(), which then stays on
    assert "pop::prefill: interrupted by a signal" in str(caught.value.__context__)
    assert _core.take_interrupt() is None


def contents(cache) -> list[torch.Tensor]:
    return [tensor.clone() for layer in cache.layers for tensor in (layer.keys, layer.values)]


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("backend", ["native", "portable"])
def test_an_interrupt_from_python_code_changes_nothing(backend, static):
    """A head, or a layer of a portable prefill, may be where the signal arrives."""
    model = llama(layers=4)
    pop_ext.enable(model, pop_ext.Plan(4, (1, 2)), strict=True, backend=backend)
    cache = StaticCache(config=model.config, max_cache_len=64) if static else DynamicCache(config=model.config)
    ids = tokens(model, 2, 9)
    with torch.no_grad():
        model(ids, past_key_values=cache, logits_to_keep=1)
        before, length = contents(cache), int(cache.get_seq_length())
        hook = model.lm_head.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(ids, past_key_values=cache, logits_to_keep=1)
        hook.remove()
        assert all(map(torch.equal, contents(cache), before))
        assert int(cache.get_seq_length()) == length
        assert pop_ext.explain(model, ids, past_key_values=cache, logits_to_keep=1).backend == backend


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_an_interrupted_portable_prefill_ends_early_and_changes_nothing():
    model = hyperclovax(layers=LAYERS, hidden=256, intermediate=2048)
    pop_ext.enable(model, "third", strict=True)
    ids, cache = tokens(model, 1, 1500), DynamicCache(config=model.config)
    with torch.no_grad():
        model(tokens(model, 1, 9), past_key_values=cache, logits_to_keep=1)
        before = contents(cache)

        def prefill_many() -> None:
            for _ in range(50):
                model(ids, past_key_values=cache, logits_to_keep=1)
                cache.crop(-1500)

        timer = signal_after(0.1, signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            prefill_many()
        timer.join()
        if cache.get_seq_length() > 9:  # the signal came between two calls
            cache.crop(9 - cache.get_seq_length())
    assert all(map(torch.equal, contents(cache), before))
