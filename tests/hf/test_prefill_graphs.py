"""Prefills that run as graphs give the same bits. On a CPU a recorder that repeats the call stands for CUDA graphs."""

from __future__ import annotations

import copy
import gc
import pickle

import pop_ext
import pytest
import torch
from against_oracle import GAPS, plan_of
from models import FAMILIES, pad, shared, tokens
from pop_ext import Plan
from pop_ext.hf import prefill_graphs
from pop_ext.hf.inputs import make_request
from pop_ext.hf.prefill_graphs import PrefillGraphs
from threads import run_threads
from transformers import DynamicCache, StaticCache


class Repeating:
    """Replay by calling again, with a result at a fixed address. Between replays the result is NaN."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.records = self.replays = self.marks = self.waits = 0
        self.finished: list[int] = []
        self.recording = False
        self.error: Exception | None = None

    def is_recording(self) -> bool:
        return self.recording

    def record(self, call):
        self.records += 1
        result = torch.full_like(call(), float("nan"))

        def replay() -> None:
            self.replays += 1
            assert self.waits == self.replays
            if self.error is not None:
                raise self.error
            result.copy_(call())

        return replay, result

    def wait_for_last_use(self) -> None:
        self.waits += 1

    def mark_use(self) -> None:
        self.marks += 1
        assert self.marks == self.replays

    def finish_last_use(self) -> None:
        self.finished.append(self.marks)


def graphed(model, plan: Plan, shapes: int = 4):
    """Return a native model that uses graphs, and their recorder."""
    native, recorder = pop_ext.load(model, plan), Repeating()
    native._graphs = PrefillGraphs(shapes, recorder)
    return native, recorder


def assert_same_bits(actual, expected) -> None:
    assert torch.equal(actual.logits, expected.logits)
    assert torch.equal(actual.hidden_states, expected.hidden_states)
    for ours, theirs in zip(actual.past_key_values.layers, expected.past_key_values.layers, strict=True):
        assert torch.equal(ours.keys, theirs.keys)
        assert torch.equal(ours.values, theirs.values)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_replay_equals_a_call(family, side):
    model = shared(family)
    plan = plan_of(model, GAPS, 2)
    native, recorder = graphed(model, plan)
    plain = pop_ext.load(model, plan)
    for seed in (0, 10, 20):
        ids, mask = pad([tokens(model, n, seed=seed + n) for n in (40, 23)], side)
        actual = native.prefill(ids, attention_mask=mask)
        assert_same_bits(actual, plain.prefill(ids, attention_mask=mask))
    assert (recorder.records, recorder.replays) == (1, 3)


@pytest.mark.parametrize("window_only", [False, True])
def test_a_static_cache_gets_the_same_slots(window_only):
    model = shared("gemma3")
    plan = plan_of(model, GAPS, 2)
    native, recorder = graphed(model, plan)
    plain = pop_ext.load(model, plan)
    for seed in (0, 1):
        ids = tokens(model, 2, 40, seed=seed)
        caches = [StaticCache(config=model.config, max_cache_len=64) for _ in range(2)]
        results = [
            runner.prefill(ids, past_key_values=cache, window_only=window_only)
            for runner, cache in zip((native, plain), caches, strict=True)
        ]
        assert_same_bits(*results)
    assert recorder.replays == 2


def test_embeddings_and_positions_of_a_call_are_used():
    model = shared()
    native, recorder = graphed(model, plan_of(model, GAPS, 1))
    plain = pop_ext.load(model, plan_of(model, GAPS, 1))
    for seed in (0, 1):
        embeds = model.model.embed_tokens(tokens(model, 1, 20, seed=seed)).detach()
        positions = torch.arange(20)[None] * (seed + 1)
        actual = native.prefill(inputs_embeds=embeds, position_ids=positions)
        assert_same_bits(actual, plain.prefill(inputs_embeds=embeds, position_ids=positions))
    assert recorder.records == 1


def test_a_graph_of_inference_mode_serves_calls_outside_of_it():
    model = shared()
    native, recorder = graphed(model, plan_of(model, GAPS, 1))
    plain = pop_ext.load(model, plan_of(model, GAPS, 1))
    with torch.inference_mode():
        native.prefill(tokens(model, 1, 30, seed=1))
    ids = tokens(model, 1, 30, seed=2)
    assert_same_bits(native.prefill(ids), plain.prefill(ids))
    assert recorder.records == 1


def test_a_later_call_leaves_earlier_results_alone():
    model = shared()
    native, _ = graphed(model, plan_of(model, GAPS, 1))
    first = native.prefill(tokens(model, 1, 30, seed=1))
    kept = [first.hidden_states.clone(), *(layer.keys.clone() for layer in first.past_key_values.layers)]
    native.prefill(tokens(model, 1, 30, seed=2))
    now = [first.hidden_states, *(layer.keys for layer in first.past_key_values.layers)]
    assert all(torch.equal(a, b) for a, b in zip(now, kept, strict=True))


def test_every_shape_has_a_graph_and_the_latest_are_kept():
    model = shared()
    native, recorder = graphed(model, plan_of(model, GAPS, 1), shapes=2)
    counts = []
    for length, boundary, keep in ((20, 1, 1), (21, 1, 1), (20, 1, 1), (20, 2, 1), (20, 1, 1), (21, 1, 1), (20, 2, 2)):
        native.prefill(tokens(model, 1, length), boundary=boundary, logits_to_keep=keep)
        counts.append(recorder.records)
    assert counts == [1, 2, 2, 3, 3, 4, 5]
    assert recorder.finished == [3, 5, 6]  # before a graph is freed
    assert recorder.replays == 7


def test_padding_on_the_other_side_has_a_graph_of_its_own():
    model = shared()
    native, recorder = graphed(model, plan_of(model, GAPS, 1))
    plain = pop_ext.load(model, plan_of(model, GAPS, 1))
    for side in ("left", "right"):
        ids, mask = pad([tokens(model, n, seed=n) for n in (40, 23)], side)
        actual = native.prefill(ids, attention_mask=mask)
        assert_same_bits(actual, plain.prefill(ids, attention_mask=mask))
    assert recorder.records == 2


def test_a_call_with_a_past_runs_without_a_graph():
    model = shared()
    native, recorder = graphed(model, plan_of(model, GAPS, 1))
    cache = native.prefill(tokens(model, 1, 12)).past_key_values
    native.prefill(tokens(model, 1, 12), past_key_values=cache)
    assert recorder.replays == 1
    recorder.recording = True  # the caller records a graph of its own
    native.prefill(tokens(model, 1, 12))
    assert recorder.replays == 1


def test_a_refresh_records_again():
    model = FAMILIES["llama"]()
    native, recorder = graphed(model, plan_of(model, GAPS, 1))
    ids = tokens(model, 1, 20)
    before = native.prefill(ids).logits
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight.mul_(-2.0)
    with pytest.raises(RuntimeError, match="refresh"):
        native.prefill(ids)
    native.refresh()
    after = native.prefill(ids)
    assert recorder.records == 2
    assert not torch.equal(after.logits, before)
    assert_same_bits(after, pop_ext.load(model, plan_of(model, GAPS, 1)).prefill(ids))


def test_a_model_that_moved_loses_the_graphs_of_its_old_device():
    model = shared()
    native, recorder = graphed(model, plan_of(model, GAPS, 1))
    native.prefill(tokens(model, 1, 20))
    recorder.device = torch.device("cuda:1")
    native.prefill(tokens(model, 1, 20))
    assert recorder.replays == 1
    native.refresh()
    assert recorder.finished == [1, 1]
    native.prefill(tokens(model, 1, 20))
    assert (recorder.records, recorder.replays) == (1, 1)


def test_graphs_wait_for_their_last_use_before_they_are_freed():
    model = shared()
    native, recorder = graphed(model, plan_of(model, GAPS, 1))
    native.prefill(tokens(model, 1, 20))
    del native
    gc.collect()
    assert recorder.finished == [1]


def test_a_call_that_launches_before_its_checks_is_not_replayed():
    model = shared()
    native, recorder = graphed(model, plan_of(model, GAPS, 1))
    request = make_request(native, tokens(model, 1, 20), None, None, None, None, None, 1, False)
    native.run(request, lambda: None)
    assert recorder.replays == 0


def test_a_failed_replay_leaves_the_cache_unchanged():
    model = shared()
    native, recorder = graphed(model, plan_of(model, GAPS, 1))
    ids, cache = tokens(model, 1, 20), DynamicCache(config=model.config)
    native.prefill(ids)
    recorder.error = RuntimeError("the device failed")
    with pytest.raises(RuntimeError, match="the device failed"):
        native.prefill(ids, past_key_values=cache)
    assert cache.get_seq_length() == 0
    assert recorder.marks == recorder.replays == 2  # later calls wait for what the failed one began


def test_threads_share_a_graph():
    model = shared()
    native, _ = graphed(model, plan_of(model, GAPS, 1))
    plain = pop_ext.load(model, plan_of(model, GAPS, 1))
    prompts = [tokens(model, 1, 30, seed=seed) for seed in range(2)]

    def repeated(ids):
        return lambda: [native.prefill(ids) for _ in range(5)]

    for ids, outputs in zip(prompts, run_threads(*(repeated(ids) for ids in prompts)), strict=True):
        for output in outputs:
            assert_same_bits(output, plain.prefill(ids))


# The option


@pytest.fixture
def recorders(monkeypatch) -> list[Repeating]:
    """Let models on a CPU have graphs. Returns their recorders, which come with each load."""
    made: list[Repeating] = []

    def make(device: torch.device) -> Repeating:
        assert device == Repeating.device
        made.append(Repeating())
        return made[-1]

    monkeypatch.setattr(prefill_graphs, "RECORDERS", {"cpu": make})
    return made


def call(model, ids):
    with torch.no_grad():
        return model(ids, logits_to_keep=1, use_cache=True)


def test_a_loaded_model_keeps_the_option_over_a_refresh(recorders):
    model = FAMILIES["llama"]()
    native = pop_ext.load(model, plan_of(model, GAPS, 1), cuda_graphs=2)
    assert repr(native).endswith(f", cuda_graphs=2, extra_bytes={native.extra_bytes})")
    ids = tokens(model, 1, 20)
    native.prefill(ids)
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight.mul_(-2.0)
    native.refresh()
    assert_same_bits(native.prefill(ids), pop_ext.load(model, plan_of(model, GAPS, 1)).prefill(ids))
    assert [(one.records, one.replays) for one in recorders] == [(2, 2)]


def test_a_model_that_moved_gets_graphs_where_it_is(recorders):
    model = shared()
    native = pop_ext.load(model, plan_of(model, GAPS, 1), cuda_graphs=2)
    native.prefill(tokens(model, 1, 20))
    recorders[0].device = torch.device("cuda:1")  # as if the model had been there
    native.refresh()
    native.prefill(tokens(model, 1, 20))
    assert [one.replays for one in recorders] == [1, 1]
    assert recorders[0].finished[0] == 1  # before its graphs were freed


def test_a_model_runs_without_graphs_where_none_can_be_recorded(recorders, monkeypatch):
    model = shared()
    native = pop_ext.load(model, plan_of(model, GAPS, 1), cuda_graphs=2)
    recorders[0].device = torch.device("cuda:1")
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(prefill_graphs, "RECORDERS", {})
        native.refresh()
        native.prefill(tokens(model, 1, 20))
    native.refresh()
    native.prefill(tokens(model, 1, 20))
    assert [one.replays for one in recorders] == [0, 1]


def test_an_enabled_model_keeps_the_option_when_it_loads_again(recorders):
    model = FAMILIES["llama"]()
    plan = plan_of(model, GAPS, 1)
    pop_ext.enable(model, plan, strict=True, cuda_graphs=2)
    ids = tokens(model, 1, 20)
    before = [call(model, ids).logits for _ in range(2)]
    assert torch.equal(*before)
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight.mul_(-2.0)
    after = [call(model, ids).logits for _ in range(2)]
    assert [(one.records, one.replays) for one in recorders] == [(1, 2), (1, 2)]
    pop_ext.enable(model, plan, strict=True)
    assert torch.equal(after[1], call(model, ids).logits)
    assert not torch.equal(after[1], before[1])
    assert sum(one.replays for one in recorders) == 4


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_an_enabled_model_has_graphs_of_its_own(copied, recorders):
    model = pop_ext.enable(FAMILIES["llama"](), "third", strict=True, cuda_graphs=2)
    other, ids = copied(model), tokens(model, 1, 20)
    assert torch.equal(call(model, ids).logits, call(other, ids).logits)
    assert [one.replays for one in recorders] == [1, 1]


def test_graphs_end_with_the_block_that_has_enabled_them(recorders):
    model = FAMILIES["llama"]()
    pop_ext.enable(model, "third", strict=True)
    with pop_ext.enabled(model, "third", strict=True, cuda_graphs=2):
        call(model, tokens(model, 1, 20))
    call(model, tokens(model, 1, 20))
    assert [one.replays for one in recorders] == [1]


ENTRIES = (pop_ext.load, pop_ext.enable)


@pytest.mark.parametrize("entry", ENTRIES)
def test_bad_arguments_are_refused_by_name(entry):
    model = FAMILIES["llama"]()
    with pytest.raises(ValueError, match="cuda_graphs: expected at least 0, got -1"):
        entry(model, "third", cuda_graphs=-1)
    for wrong in (True, 2.0, "4"):
        with pytest.raises(TypeError, match=f"cuda_graphs: expected an int, got {type(wrong).__name__}"):
            entry(model, "third", cuda_graphs=wrong)
    assert "forward" not in model.__dict__


@pytest.mark.cpu
@pytest.mark.parametrize("entry", ENTRIES)
def test_a_model_on_a_cpu_is_refused(entry):
    model = FAMILIES["llama"]()
    text = "^cuda_graphs: expected a model on a CUDA device, got one on cpu; without cuda_graphs the model runs"
    with pytest.raises(pop_ext.UnsupportedModelError, match=text):
        entry(model, "third", cuda_graphs=4)
    assert "forward" not in model.__dict__


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_model_with_experts_is_refused(entry, recorders):
    model = FAMILIES["mixtral"]()
    with pytest.raises(pop_ext.UnsupportedModelError, match="cuda_graphs: expected a model without experts, .* of 4;"):
        entry(model, "third", cuda_graphs=4)
    assert "forward" not in model.__dict__


def test_backends_that_call_the_model_refuse_graphs():
    for backend in ("portable", "reference"):
        with pytest.raises(ValueError, match=f'cuda_graphs: expected 0 with backend="{backend}", .* got 4'):
            pop_ext.enable(shared(), "third", backend=backend, cuda_graphs=4)


def test_a_model_without_a_native_form_is_not_enabled_portably_instead():
    model = FAMILIES["llama"]()
    model.model.layers[1].self_attn.q_proj = torch.nn.Sequential(model.model.layers[1].self_attn.q_proj)
    with pytest.raises(pop_ext.UnsupportedModelError, match='backend="portable" works'):
        pop_ext.enable(model, "third", cuda_graphs=4)
    assert "forward" not in model.__dict__
