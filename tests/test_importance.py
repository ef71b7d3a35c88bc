"""pop_ext.importance: virtual gates against real ones, and the files, plans and plots that come of them."""

from __future__ import annotations

import json
import math

import pop_ext
import pytest
import torch
from models import FAMILIES, llama, shared, tokens
from pop_ext.importance_result import Importance
from pop_ext.virtual_gates import gate_derivatives

CONTINUATION = 5


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def loss_with_gates(model, ids, context_gates, loss_gates, targets):
    """Sum of -log p over the loss rows; gates [L] multiply the layers' branches on their rows."""
    start = ids.shape[1] - 1 - CONTINUATION

    def hook(index):
        def gated(module, args, output):
            branch = output - args[0]
            rows = torch.cat([context_gates[index].expand(start), loss_gates[index].expand(CONTINUATION)])
            return args[0] + rows[:, None] * branch

        return gated

    handles = [layer.register_forward_hook(hook(i)) for i, layer in enumerate(model.model.layers)]
    try:
        log_p = model(ids[:, :-1], use_cache=False).logits[:, -CONTINUATION:].log_softmax(-1)
    finally:
        for handle in handles:
            handle.remove()
    return log_p, None if targets is None else -log_p.gather(-1, targets).sum()


def drawn_targets(model, ids, seed: int = 0):
    ones = torch.ones(len(model.model.layers), dtype=model.dtype)
    with torch.no_grad():
        log_p, _ = loss_with_gates(model, ids, ones, ones, None)
    drawn = torch.multinomial(log_p.float().exp().flatten(0, 1), 1, generator=generator(seed))
    return drawn.view(len(ids), CONTINUATION, 1)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_derivatives_are_those_of_real_scalar_gates(family):
    model = shared(family)
    ids = tokens(model, 1, 23)
    got_context, got_loss = gate_derivatives(model, ids, CONTINUATION, generator())
    gates = [torch.ones(len(model.model.layers), requires_grad=True) for _ in range(2)]
    _, loss = loss_with_gates(model, ids, *gates, drawn_targets(model, ids))
    context, decode = torch.autograd.grad(loss, gates)
    scale = float(torch.cat([context, decode]).abs().max())
    torch.testing.assert_close(got_context[0].float(), context, rtol=1e-3, atol=1e-4 * scale)
    torch.testing.assert_close(got_loss[0].float(), decode, rtol=1e-3, atol=1e-4 * scale)


def test_derivatives_are_the_limits_of_finite_differences():
    model = llama().double()
    ids = tokens(model, 1, 23)
    targets = drawn_targets(model, ids)
    found = gate_derivatives(model, ids, CONTINUATION, generator())
    ones = torch.ones(len(model.model.layers), dtype=torch.float64)
    step = 1e-2  # norms and RoPE round to float32 inside, so a finer step is noise
    for layer in range(len(ones)):
        for stage in (0, 1):
            losses = []
            for sign in (1, -1):
                gates = [ones.clone(), ones.clone()]
                gates[stage][layer] += sign * step
                with torch.no_grad():
                    losses.append(float(loss_with_gates(model, ids, *gates, targets)[1]))
            expected = (losses[0] - losses[1]) / (2 * step)
            assert float(found[stage][0, layer]) == pytest.approx(expected, abs=1e-2 * float(found[stage].abs().max()))


def test_a_batch_gives_the_derivatives_of_each_sample_alone(monkeypatch):
    model = shared()
    ids = tokens(model, 3, 23)
    fixed = torch.arange(CONTINUATION).repeat(3)
    monkeypatch.setattr(torch, "multinomial", lambda p, *a, **k: fixed[: len(p), None])
    together = gate_derivatives(model, ids, CONTINUATION, generator())
    for row in range(3):
        alone = gate_derivatives(model, ids[row : row + 1], CONTINUATION, generator())
        for of_batch, of_one in zip(together, alone, strict=True):
            torch.testing.assert_close(of_batch[row], of_one[0], rtol=1e-3, atol=1e-4)


def test_checkpointing_changes_nothing_but_memory():
    model = shared("qwen3")
    ids = tokens(model, 2, 23)
    plain = gate_derivatives(model, ids, CONTINUATION, generator())
    again = gate_derivatives(model, ids, CONTINUATION, generator(), checkpointing=True)
    torch.testing.assert_close(again, plain, rtol=1e-5, atol=1e-6)


def test_the_last_layer_matters_to_no_context_row():
    imp = pop_ext.importance(shared(), [tokens(shared(), 2, 23)], continuation=CONTINUATION)
    assert imp.prefill[-1] == 0
    assert imp.decode[-1] > 0
    assert all(value > 0 for value in imp.prefill[:-1])


def test_squares_are_averaged_over_samples_never_before():
    model = shared()
    batch = tokens(model, 4, 23)
    imp = pop_ext.importance(model, [batch], continuation=CONTINUATION)
    derivatives, _ = gate_derivatives(model, batch, CONTINUATION, generator(0))
    assert imp.samples == 4
    assert imp.prefill == pytest.approx(derivatives.square().mean(0).tolist(), rel=1e-6)
    assert imp.prefill_stderr == pytest.approx((derivatives.square().std(0) / 2).tolist(), rel=1e-6)


def test_a_model_comes_back_as_it_was_also_after_a_failure():
    model = llama()
    model.lm_head.weight.requires_grad_(False)
    wanted = [p.requires_grad for p in model.parameters()]
    bad = tokens(model, 1, 23)
    bad[0, 0] = model.config.vocab_size
    with pytest.raises(ValueError, match="input_ids"):
        pop_ext.importance(model, [tokens(model, 1, 23), bad], checkpointing=True)
    assert [p.requires_grad for p in model.parameters()] == wanted
    assert all(p.grad is None for p in model.parameters())
    assert all(not layer._forward_hooks and "forward" not in layer.__dict__ for layer in model.model.layers)
    assert not model.get_input_embeddings()._forward_hooks


def test_an_enabled_model_is_scored_as_the_stock_one():
    model = shared("llama")
    ids = [tokens(model, 2, 24)]
    expected = pop_ext.importance(model, ids)
    with pop_ext.enabled(model, pop_ext.Plan(6, (4, 5)), strict=True):
        actual = pop_ext.importance(model, ids)
    assert actual == expected


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    model = shared()
    batches = [tokens(model, 2, 23, seed=i) for i in range(3)]
    whole = pop_ext.importance(model, batches)
    state, counts = tmp_path / "state.json", []
    pop_ext.importance(model, batches[:1], state=state)
    resumed = pop_ext.importance(model, batches, state=state, progress=counts.append)
    assert resumed == whole
    assert counts == [4, 6]
    assert Importance.load(state) == whole
    assert json.loads(state.read_text())["prefill"] == whole.prefill


def test_a_state_of_other_arguments_is_refused(tmp_path):
    model, state = shared(), tmp_path / "state.json"
    pop_ext.importance(model, [tokens(model, 1, 23)], state=state)
    with pytest.raises(ValueError, match="seed 0, this run has 1"):
        pop_ext.importance(model, [tokens(model, 1, 23)], state=state, seed=1)
    with pytest.raises(ValueError, match="llama of 6 layers.*qwen2 of 6 layers"):
        pop_ext.importance(shared("qwen2"), [tokens(model, 1, 23)], state=state)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"batches": []}, ValueError, "batches: expected at least one batch"),
        (
            {"batches": [torch.ones(1, 2, dtype=torch.int64)]},
            ValueError,
            r"3 tokens a row, got shape \[1, 2\]",
        ),
        ({"batches": [[1, 2, 3]]}, ValueError, "got list"),
        ({"continuation": 22}, ValueError, r"continuation: expected 1\.\.\.21 for a row of 23 tokens, got 22"),
        ({"continuation": 0}, ValueError, "got 0"),
        ({"continuation": 2.0}, TypeError, "continuation: expected an int or None, got 2.0"),
        ({"seed": None}, TypeError, "seed: expected an int, got None"),
    ],
)
def test_bad_arguments_are_named(arguments, error, text):
    model = shared()
    with pytest.raises(error, match=text):
        pop_ext.importance(model, **{"batches": [tokens(model, 1, 23)], **arguments})


def test_a_model_in_training_mode_is_refused():
    with pytest.raises(ValueError, match="eval mode"):
        pop_ext.importance(llama().train(), [])


def found(*prefill: float) -> Importance:
    return Importance("m", len(prefill), 0, None, 1, [list(prefill)], [[1.0] * len(prefill)])


def test_a_plan_takes_the_window_that_matters_least_or_the_layers_one_by_one():
    imp = found(9.0, 1.0, 8.0, 2.0, 2.5, 7.0)
    assert imp.plan(2).omit == (3, 4)
    assert imp.plan(2, contiguous=False).omit == (1, 3)
    assert imp.plan(count=0).omit == ()
    assert found(1.0, 1.0, 1.0).plan(1).omit == found(1.0, 1.0, 1.0).plan(1, contiguous=False).omit == (2,)
    assert imp.plan(2, boundary=8, min_tokens=64) == pop_ext.Plan(6, (3, 4), 8, 64)
    for count, error in ((6, ValueError), (-1, ValueError), (True, TypeError)):
        with pytest.raises(error, match="count"):
            imp.plan(count)


def test_a_plot_of_one_sample_or_more_is_drawn(tmp_path):
    assert math.isnan(found(1.0, 0.0).prefill_stderr[0])
    for name, imp in (("one.png", found(1.0, 0.0)), ("two.svg", found(1.0, 0.0).extended(*torch.ones(2, 1, 2)))):
        imp.plot(tmp_path / name)
        assert (tmp_path / name).stat().st_size > 1000


def test_a_file_that_is_no_importance_is_refused_by_name(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"x\.json: expected what Importance.save writes"):
        Importance.load(path)
