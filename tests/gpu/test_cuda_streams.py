"""The CUDA backend with streams, graphs, threads and devices keeps the order and does not synchronise."""

from __future__ import annotations

import pop_ext
import pytest
import torch
from against_oracle import GAPS, plan_of, run_oracle
from models import llama, shared, tokens
from op_calls import SENTINEL, op_call, run_op
from threads import run_threads
from tolerance import assert_close_fp32
from tuning import tuned

pytestmark = pytest.mark.cuda

LONG = 1_000_000_000  # clock cycles: about half a second, far longer than a call takes on the host
LENGTHS = (150, 3, 70)

# Options of torch.ops.pop.tune that affect the order of kernels.
OPTIONS = ({}, {"early_launch": 1})


def native_of(dtype: torch.dtype = torch.bfloat16, boundary: int = 2):
    model = shared(dtype=dtype, hidden=128, intermediate=384)
    return pop_ext.load(model, plan_of(model, GAPS, boundary))


def call_of(native, seed: int = 0):
    prompts = [tokens(native.model, n, seed=seed + n) for n in LENGTHS]
    return op_call(native, prompts, logits_to_keep=[1, 2, 1])


def results(call):
    return [run_op(call), *call["key_cache"], *call["value_cache"]]


def assert_same_bits(actual, expected):
    for number, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
        assert torch.equal(ours, theirs), f"part {number} differs"


# Streams


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_prefill_waits_for_its_stream_and_the_host_does_not(options):
    native = native_of()
    with tuned(**options):
        expected = results(call_of(native))
        call = call_of(native)
        prompt = call["input"]
        call["input"] = torch.zeros_like(prompt)
        stream = torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(LONG)
            call["input"].copy_(prompt)  # the prompt is copied after the slow work
            actual = [part.clone() for part in results(call)]
        assert not stream.query(), "the call synchronised, or the machine took half a second to enqueue it"
        stream.synchronize()
    assert_same_bits(actual, expected)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_later_work_on_the_stream_sees_a_finished_prefill(options):
    native = native_of()
    with tuned(**options):
        expected = results(call_of(native))
        stream = torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            calls = [call_of(native) for _ in range(8)]
            outputs = []
            for call in calls:
                outputs.append(results(call))
                for elements in (1 << 12, 1 << 18, 1 << 22):  # overwrites memory that the call has freed
                    torch.full((elements,), float("nan"))
        stream.synchronize()
    for actual in outputs:
        assert_same_bits(actual, expected)


def test_native_prefill_runs_on_the_callers_stream():
    native = native_of()
    ids = tokens(native.model, 2, 150)
    expected = native.prefill(ids).logits
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        actual = native.prefill(ids).logits
    stream.synchronize()
    assert torch.equal(actual, expected)


# Graphs


def captured(call):
    """Return the graph of a call, captured after a warm-up call, and its result."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run_op(call)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        hidden = run_op(call)
    return graph, hidden


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("boundary", [1, 17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_captured_prefill_replays_on_other_ids(dtype, boundary, options):
    native = native_of(dtype, boundary)
    with tuned(**options):
        call = call_of(native)
        graph, hidden = captured(call)
        for seed in (1, 2):
            fresh = call_of(native, seed)
            call["input"].copy_(fresh["input"])
            for cache in (*call["key_cache"], *call["value_cache"]):
                cache.fill_(SENTINEL)
            graph.replay()
            assert_same_bits([hidden, *call["key_cache"], *call["value_cache"]], results(fresh))


def test_two_prefills_in_one_graph_replay_in_order():
    native = native_of()
    calls = [call_of(native, seed) for seed in (1, 2)]
    expected = [results(call_of(native, seed)) for seed in (1, 2)]
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        hidden = [run_op(call) for call in calls]
    graph.replay()
    for call, result, theirs in zip(calls, hidden, expected, strict=True):
        assert_same_bits([result, *call["key_cache"], *call["value_cache"]], theirs)


def test_a_call_beside_a_capture_does_not_join_it():
    native = native_of()
    expected = results(call_of(native))
    inside, outside = call_of(native), call_of(native)
    graph, other = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, capture_error_mode="relaxed"):
        run_op(inside)
        with torch.cuda.stream(other):
            actual = results(outside)
    other.synchronize()
    assert_same_bits(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_prefills_as_graphs_give_the_same_bits(dtype):
    plain = native_of(dtype)
    native = pop_ext.load(plain.model, plain.plan, cuda_graphs=4)
    for seed in (1, 2, 3):
        ids = tokens(native.model, 2, 150, seed=seed)
        ours, theirs = native.prefill(ids), plain.prefill(ids)
        actual, expected = (
            [out.logits, *(part for layer in out.past_key_values.layers for part in (layer.keys, layer.values))]
            for out in (ours, theirs)
        )
        assert_same_bits(actual, expected)


def test_graphs_of_one_model_follow_each_other_across_streams():
    plain = native_of()
    prompts = [tokens(plain.model, 2, 150, seed=seed) for seed in (1, 2)]
    expected = [plain.prefill(ids).logits for ids in prompts]
    native = pop_ext.load(plain.model, plain.plan, cuda_graphs=4)
    streams = [torch.cuda.Stream() for _ in prompts]
    for _ in range(8):
        outputs = []
        for ids, stream in zip(prompts, streams, strict=True):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                outputs.append(native.prefill(ids).logits)
        torch.cuda.synchronize()
        assert_same_bits(outputs, expected)


# Threads, devices


def repeated(native, ids, stream, times: int = 8):
    def run():
        with torch.cuda.stream(stream):
            outputs = [native.prefill(ids) for _ in range(times)]
        stream.synchronize()
        return [[out.logits, *(layer.keys for layer in out.past_key_values.layers)] for out in outputs]

    return run


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shared_stream", [False, True], ids=["own streams", "one stream"])
def test_two_threads_prefilling_together_give_the_serial_results(shared_stream, options):
    native = native_of()
    prompts = [tokens(native.model, 2, 130, seed=1), tokens(native.model, 1, 190, seed=2)]
    streams = [torch.cuda.default_stream()] * 2 if shared_stream else [torch.cuda.Stream() for _ in prompts]

    def under_options(job):
        def run():
            with tuned(**options):
                return job()

        return run

    serial = [under_options(repeated(native, ids, torch.cuda.default_stream(), 1))()[0] for ids in prompts]
    jobs = [under_options(repeated(native, ids, stream)) for ids, stream in zip(prompts, streams, strict=True)]
    for outputs, expected in zip(run_threads(*jobs), serial, strict=True):
        for output in outputs:
            assert_same_bits(output, expected)


def test_a_model_prefills_on_its_device_not_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two NVIDIA GPUs")
    with torch.device("cuda:1"):
        model = llama()
        native, ids = pop_ext.load(model, plan_of(model, GAPS, 2)), tokens(model, 2, 150)
        expected = run_oracle(model, native.plan, ids).logits
    out = native.prefill(ids)
    assert torch.cuda.current_device() == 0
    assert out.logits.device == torch.device("cuda:1")
    assert_close_fp32(out.logits, expected, "logits")
    with pytest.raises(ValueError, match=r"input_ids: expected device cuda:1 like the model, got cuda:0"):
        native.prefill(ids.to("cuda:0"))


# Ids outside the vocabulary


@pytest.mark.parametrize("bad", [-1, 263, 2**40])
def test_an_unknown_id_is_clamped_and_reported_by_the_next_call_only(bad):
    native = native_of()
    call, clamped = call_of(native), call_of(native)
    call["input"][7] = bad
    clamped["input"][7] = min(max(bad, 0), 262)
    actual = results(call)
    torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match="input: expected ids of the vocabulary, got others in an earlier call"):
        run_op(clamped)
    assert all((cache == SENTINEL).all() for cache in (*clamped["key_cache"], *clamped["value_cache"]))
    assert_same_bits(actual, results(clamped))


def test_native_prefill_refuses_an_unknown_id_in_the_same_call():
    native = native_of()
    ids = tokens(native.model, 1, 9)
    ids[0, 4] = 263
    with pytest.raises(ValueError, match="input_ids: expected ids from 0 to 262, got 263"):
        native.prefill(ids)
    native.prefill(tokens(native.model, 1, 9))
