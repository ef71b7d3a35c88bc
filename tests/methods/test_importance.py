"""pop_ext.importance: virtual gates against real gates and finite differences, batches, bad arguments, plots."""

from __future__ import annotations

import copy
import functools
import math
from contextlib import ExitStack

import pop_ext
import pytest
import torch
from models import FAMILIES, float32_twin, shared, tokens, uneven_batches
from pop_ext import Plan
from pop_ext.hf.restore import replaced_forward
from pop_ext.methods.calibration import stock_evaluation, stock_model
from pop_ext.methods.gates import gate_derivatives
from transformers import GPT2Config, GPT2LMHeadModel

T, ROWS, BATCH = 19, 5, 3
CONTEXT = T - ROWS


def uniforms(batch: int = BATCH, rows: int = ROWS) -> torch.Tensor:
    return torch.rand(batch, rows, dtype=torch.float64, generator=torch.Generator().manual_seed(7))


def derivatives(model, ids, **how):
    with stock_evaluation(model):
        return gate_derivatives(model, ids, ROWS, uniforms(len(ids)), **how)


def drawn_targets(model, ids) -> torch.Tensor:
    """Draw targets [batch, ROWS]: add up each row's probabilities until their sum exceeds the uniform number."""
    p = model(ids).logits[:, -ROWS:].double().softmax(-1)
    targets = torch.zeros(len(ids), ROWS, dtype=torch.long)
    for i, row in enumerate(uniforms(len(ids))):
        for k, u in enumerate(row):
            passed = 0.0
            for token, probability in enumerate(p[i, k].tolist()):
                passed += probability
                if passed > u:
                    targets[i, k] = token
                    break
    return targets


def gated_loss(model, ids, targets, gates) -> torch.Tensor:
    """Return -log p of the targets, with real gates [layers, 2] on each layer's branch: context rows, loss rows."""
    is_context = (torch.arange(ids.shape[1]) < ids.shape[1] - ROWS)[None, :, None]

    def gated(index, forward):
        def run(hidden_states, *args, **kwargs):
            output = forward(hidden_states, *args, **kwargs)
            after = output[0] if isinstance(output, tuple) else output
            gate = torch.where(is_context, gates[index, 0], gates[index, 1])
            after = hidden_states + gate * (after - hidden_states)
            return (after, *output[1:]) if isinstance(output, tuple) else after

        return run

    with ExitStack() as stack:
        layers = model.model.layers if hasattr(model, "model") else model.transformer.h
        for index, layer in enumerate(layers):
            stack.enter_context(replaced_forward(layer, gated(index, layer.forward)))
        logits = model(ids, use_cache=False).logits[:, -ROWS:]
    return -logits.float().log_softmax(-1).gather(-1, targets[..., None]).sum()


def gpt2():
    config = GPT2Config(vocab_size=97, n_embd=32, n_layer=4, n_head=2, n_positions=64, attn_pdrop=0.0)
    torch.manual_seed(3)
    return GPT2LMHeadModel(config).eval()


def some(family):
    return gpt2() if family == "gpt2" else shared(family)


@pytest.mark.parametrize("family", [*FAMILIES, "gpt2"])
def test_virtual_gates_have_the_derivatives_of_real_gates(family):
    model = some(family)
    ids = torch.randint(0, 97, (BATCH, T), generator=torch.Generator().manual_seed(1))
    found = derivatives(model, ids)["layer"]
    targets = drawn_targets(model, ids)
    layers = found.shape[-1]
    for i in range(BATCH):
        gates = torch.ones(layers, 2, requires_grad=True)
        gated_loss(model, ids[i : i + 1], targets[i : i + 1], gates).backward()
        torch.testing.assert_close(found[i], gates.grad.T.double(), rtol=2e-3, atol=2e-4)
    assert (found[:, 1].abs() > 1e-3).all()
    assert (found[:, 0, :-1].abs() > 1e-5).all()


def test_virtual_gates_match_finite_differences_of_the_loss():
    model = copy.deepcopy(shared("llama")).double()
    ids = tokens(model, 1, T)
    with stock_evaluation(model), torch.no_grad():
        targets = drawn_targets(model, ids)
        found = gate_derivatives(model, ids, ROWS, uniforms(1))["layer"][0]
        step = 1e-3
        for layer in range(6):
            for stage in range(2):
                losses = []
                for sign in (1, -1):
                    gates = torch.ones(6, 2)
                    gates[layer, stage] += sign * step
                    losses.append(float(gated_loss(model, ids, targets, gates)))
                slope = (losses[0] - losses[1]) / (2 * step)
                assert slope == pytest.approx(float(found[stage, layer]), rel=1e-2, abs=2e-3), (layer, stage)


def real_branch_gates(model, ids, targets):
    """Return the derivatives [2, layers] of real gates on the attention and MLP branches."""
    is_context = (torch.arange(ids.shape[1]) < CONTEXT)[None, :, None]
    sandwich = hasattr(model.model.layers[0], "pre_feedforward_layernorm")
    names = {
        "attention": "post_attention_layernorm" if sandwich else "self_attn",
        "mlp": "post_feedforward_layernorm" if sandwich else "mlp",
    }
    gates = {kind: torch.ones(len(model.model.layers), 2, requires_grad=True) for kind in names}

    def gated(forward, gate):
        def run(*args, **kwargs):
            output = forward(*args, **kwargs)
            added = output[0] if isinstance(output, tuple) else output
            added = added * torch.where(is_context, gate[0], gate[1])
            return (added, *output[1:]) if isinstance(output, tuple) else added

        return run

    with ExitStack() as stack:
        for index, layer in enumerate(model.model.layers):
            for kind, name in names.items():
                module = getattr(layer, name)
                stack.enter_context(replaced_forward(module, gated(module.forward, gates[kind][index])))
        logits = model(ids, use_cache=False).logits[:, -ROWS:]
    (-logits.log_softmax(-1).gather(-1, targets[..., None]).sum()).backward()
    return {kind: gate.grad.T.double() for kind, gate in gates.items()}


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_branch_gates_have_the_derivatives_of_real_gates(family):
    model = shared(family)
    ids = tokens(model, 1, T)
    found = derivatives(model, ids, branches=True)
    expected = real_branch_gates(model, ids, drawn_targets(model, ids))
    for kind in ("attention", "mlp"):
        torch.testing.assert_close(found[kind][0], expected[kind], rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("branches", [False, True])
def test_recompute_gives_identical_derivatives(branches):
    model = shared("llama")
    ids = tokens(model, BATCH, T)
    kept = derivatives(model, ids, branches=branches)
    recomputed = derivatives(model, ids, branches=branches, recompute=True)
    for kind, expected in kept.items():
        assert torch.equal(recomputed[kind], expected)


def test_recompute_holds_the_activations_of_one_layer():
    model = shared("llama")
    ids = tokens(model, 2, 64)
    held = {}
    for recompute in (False, True):
        sizes: list[int] = []

        def pack(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), stock_evaluation(model):
            gate_derivatives(model, ids, ROWS, uniforms(2), recompute=recompute)
        held[recompute] = sum(sizes)
    assert held[True] < held[False] / 5


def test_derivatives_are_squared_per_sequence_then_averaged():
    model = shared("llama")
    ids = torch.cat(uneven_batches(model))
    found = pop_ext.importance(model, uneven_batches(model), continuation=ROWS, branches=True)
    generator = torch.Generator().manual_seed(0)
    squares = []
    for sequence in ids:
        drawn = torch.rand(1, ROWS, dtype=torch.float64, generator=generator)
        with stock_evaluation(model):
            alone = gate_derivatives(model, sequence[None, :-1], ROWS, drawn, branches=True)
        squares.append({kind: values[0] ** 2 for kind, values in alone.items()})
    for kind, scores in found.gates().items():
        of_kind = torch.stack([square[kind] for square in squares])  # [samples, 2, layers]
        mean, error = of_kind.mean(0), of_kind.std(0) / math.sqrt(len(ids))
        torch.testing.assert_close(torch.tensor([scores.prefill, scores.decode]).double(), mean, rtol=1e-4, atol=1e-6)
        errors = torch.tensor([scores.prefill_error, scores.decode_error]).double()
        torch.testing.assert_close(errors, error, rtol=1e-4, atol=1e-6)
    assert list(found.gates()) == ["layer", "attention", "mlp"]
    assert found.samples == 8


def test_the_last_layer_has_zero_prefill_importance():
    found = pop_ext.importance(shared("llama"), uneven_batches(shared("llama")))
    assert found.prefill[-1] == 0
    assert found.prefill_error[-1] == 0
    assert all(value > 0 for value in (*found.prefill[:-1], *found.decode))


@pytest.mark.parametrize(("length", "rows"), [(3, 1), (7, 1), (40, 10), (300, 64)])
def test_default_continuation_is_a_quarter_and_at_most_64(length, rows):
    model = shared("llama")
    ids = [tokens(model, 2, length)]
    by_default = pop_ext.importance(model, ids)
    assert by_default.layer == pop_ext.importance(model, ids, continuation=rows).layer
    assert by_default.continuation is None
    if length > 3:
        assert by_default.layer != pop_ext.importance(model, ids, continuation=rows + 1).layer


def test_seed_decides_the_targets():
    model = shared("llama")
    a, b, c = (pop_ext.importance(model, uneven_batches(model), seed=seed).layer for seed in (0, 0, 1))
    assert a == b
    assert a.decode != c.decode


def test_targets_follow_the_models_distribution():
    from pop_ext.methods.gates import _sampled_loss

    logits = torch.tensor([0.5, 0.25, 0.0, 0.25]).log().expand(1, 4000, 4).clone().requires_grad_()
    u = torch.rand(1, 4000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    _sampled_loss(logits, u).backward()
    drawn = (logits.grad < 0).float().mean((0, 1))  # dL/dlogit = p - [y]
    torch.testing.assert_close(drawn, torch.tensor([0.5, 0.25, 0.0, 0.25]), atol=0.03, rtol=0)
    assert drawn[2] == 0


def test_bfloat16_derivatives_match_float32_within_rounding():
    model = copy.deepcopy(shared("llama")).bfloat16()
    ids = tokens(model, 1, T)
    found = derivatives(model, ids)["layer"][0]
    gates = torch.ones(6, 2, requires_grad=True)
    gated_loss(float32_twin(model), ids, drawn_targets(model, ids), gates).backward()
    expected = gates.grad.T.double()
    assert (found - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("how", ["plain", "training", "enabled", "no_grad", "inference_mode", "failing", "compiled"])
def test_importance_leaves_the_model_unchanged(how):
    model = copy.deepcopy(shared("llama"))
    expected = pop_ext.importance(model, uneven_batches(model)).layer
    if how == "training":
        model.train()
        model.model.layers[2].eval()
    if how == "enabled":
        pop_ext.enable(model, Plan.last(6), strict=True)
    model.lm_head.weight.requires_grad_(False)
    before = {name: module.training for name, module in model.named_modules()}
    wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    called = torch.compile(model) if how == "compiled" else model
    given = [*uneven_batches(model), torch.tensor([[0, 999, 1]])] if how == "failing" else uneven_batches(model)
    outside = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}.get(how, torch.enable_grad)
    with ExitStack() as stack:
        stack.enter_context(outside())
        if how == "failing":
            with pytest.raises(ValueError, match="ids from 0 to 262, got 999 in batch 3"):
                pop_ext.importance(called, given)
        else:
            assert pop_ext.importance(called, given).layer == expected
    assert {name: module.training for name, module in model.named_modules()} == before
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == wanted
    assert all(parameter.grad is None for parameter in model.parameters())
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert "forward" not in module.__dict__ or module is model
    assert ("forward" in model.__dict__) == (how == "enabled")


# Bad arguments


BAD = [
    (dict(batches=[]), ValueError, "batches: expected at least one sequence, got none"),
    (dict(batches=torch.zeros(2, 9).long()), TypeError, "batches: expected an iterable of input_ids [batch, T], got"),
    (dict(batches=[[1, 2, 3]]), TypeError, "batches: expected int64 or int32 tensors, got list in batch 0"),
    (dict(batches=[torch.zeros(1, 9)]), TypeError, "batches: expected int64 or int32 tensors, got torch.float32"),
    (dict(batches=[torch.zeros(9).long()]), ValueError, "batches: expected [batch, T] with at least 3 tokens, got [9]"),
    (dict(batches=[torch.zeros(1, 2).long()]), ValueError, "with at least 3 tokens, got [1, 2] in batch 0"),
    (dict(batches=[torch.full((1, 9), -1)]), ValueError, "batches: expected ids from 0 to 262, got -1 in batch 0"),
    (dict(continuation=0), ValueError, "continuation: expected at least 1, got 0"),
    (dict(continuation=19), ValueError, "continuation: expected at most 18 (20 tokens less 2), got 19"),
    (dict(continuation=2.0), TypeError, "continuation: expected an int, got float 2.0"),
    (dict(seed=None), TypeError, "seed: expected an int, got NoneType None"),
    (dict(progress="yes"), TypeError, "progress: expected a bool or a callable, got str"),
]


@pytest.mark.parametrize(("change", "kind", "text"), BAD, ids=[text for *_, text in BAD])
def test_importance_refuses_bad_arguments_by_name(change, kind, text):
    model = shared("llama")
    arguments = {"batches": uneven_batches(model), **change}
    with pytest.raises(kind) as error:
        pop_ext.importance(model, arguments.pop("batches"), **arguments)
    assert text in str(error.value)


def test_stock_model_refuses_other_modules():
    with pytest.raises(TypeError, match="model: expected a Hugging Face causal language model, got Linear"):
        stock_model(torch.nn.Linear(2, 2))


def test_branches_are_refused_for_other_layer_forms():
    ids = [torch.randint(0, 97, (1, 9))]
    with pytest.raises(ValueError, match="branches: expected layers that add attention first .* got GPT2Block"):
        pop_ext.importance(gpt2(), ids, branches=True)


def test_infinite_derivatives_raise_value_error():
    model = copy.deepcopy(shared("llama"))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = math.inf
    with pytest.raises(ValueError, match="model: expected finite derivatives, got NaN or infinity"):
        pop_ext.importance(model, uneven_batches(model))


def test_inference_mode_weights_are_refused():
    with torch.inference_mode():
        model = FAMILIES["llama"](layers=2)
    with pytest.raises(ValueError, match="expected parameters made outside inference mode, got model.embed_tokens"):
        pop_ext.importance(model, uneven_batches(model))


# Progress and plots


def test_progress_counts_sequences():
    model, told = shared("llama"), []
    pop_ext.importance(model, uneven_batches(model), progress=lambda done, total: told.append((done, total)))
    assert told == [(3, 8), (4, 8), (8, 8)]
    told.clear()
    pop_ext.importance(model, iter(uneven_batches(model)), progress=lambda done, total: told.append((done, total)))
    assert told == [(3, None), (4, None), (8, None)]
    pop_ext.importance(model, uneven_batches(model), progress=True)


@functools.cache
def plotted():
    return pop_ext.importance(shared("llama"), uneven_batches(shared("llama")), branches=True)


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_plot_writes_a_figure(tmp_path, ending):
    path = tmp_path / f"importance.{ending}"
    plotted().plot(path)
    assert path.stat().st_size > 5000


def test_public_importance_is_the_function_not_the_module():
    import pop_ext.methods.importance

    assert callable(pop_ext.importance)
    assert pop_ext.importance is pop_ext.methods.importance.importance
