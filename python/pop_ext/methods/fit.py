"""``pop_ext.fit``: least-squares K/V projections for the layers that a plan omits (docs/fitting.md)."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from pop_ext import reference
from pop_ext.hf.modules import find_parts
from pop_ext.hf.restore import replaced_forward
from pop_ext.methods.calibration import Batches, checked, count_sequences, hidden_states_of, stock_model, undisturbed
from pop_ext.methods.ridge import RunMoments, RunSolution
from pop_ext.plans.origin import origin_of
from pop_ext.plans.plan import Plan
from pop_ext.plans.projections import FitReport, Projections, key_value_weights, sample_of, without_gamma
from pop_ext.reference.checks import check_plan
from pop_ext.utils.progress import Progress, reporting

LAMBDAS = (0.01, 0.1, 1.0, 10.0, math.inf)
"""Ridges that are tried unless told otherwise; inf: the original projections."""

HOLD_EVERY = 8
"""Of the batches' sequences every eighth is held out to choose lambda by, of fewer the last one, where no ``holdout``
is given."""

CONTINUATION = 64
"""At most so many last tokens of a sequence stand for what follows a prompt; never more than a quarter of it. The loss
of a held-out sequence is of them, and it is their attention that weighs the rows before."""

WEIGHTINGS = ("attention", "uniform")


def fit(
    model: Any,
    plan: Plan,
    batches: Batches,
    *,
    holdout: Batches | None = None,
    lambdas: Sequence[float] | None = None,
    weighting: str = "attention",
    progress: Progress = False,
) -> Plan:
    """The plan with K/V projections fitted for its omitted layers: a better first token at the same cost.

    An omitted layer's context rows project K and V from the hidden state ``h`` of the last retained layer, which is
    not what its weights were trained on. For each omitted layer this solves a ridge regression, on calibration
    prompts, from the normalised ``h`` of the pruned model to the K (before its norm and RoPE) and V that the full
    model has there; it pulls towards the layer's own projection. A row counts as much as later rows attend to it. All
    layers of a run share one Gram matrix. Lambda is chosen by the next-token loss of held-out prompts' continuations
    after the plan's boundary.

    Args:
        model: a Hugging Face decoder that projects K and V apart, enabled or not; float32, bfloat16 or float16, on
            any device. As before afterwards.
        plan: omits at least one layer; projections that it has are not looked at.
        batches: an iterable of input_ids, int [batch, T], without padding; read once. One forward a batch, two if
            the plan has several runs; until a sequence is held out each batch's last has its own.
        holdout: likewise, of sequences that are not in ``batches``. None: every eighth sequence of the batches is
            held out, of fewer than eight the last one, and not fitted on.
        lambdas: ridges to choose from, relative to the mean diagonal of the Gram matrix, > 0; inf stands for the
            original projections. None: ``LAMBDAS``. A single one is taken as it is, and nothing held out.
        weighting: "attention": each row counts by the attention that the sequence's last tokens (``CONTINUATION``) pay
            to it in the run's layers of the full model, which runs eager for that: heads * T^2 attention weights of
            one layer at a time. "uniform": all rows count alike.
        progress: True for a bar, or a callback told (steps done, all of them or None): sequences read, and held-out
            ones scored, once a lambda.

    Returns:
        the plan, with ``projections`` in the model's dtype and an origin that says how they were made.

    Raises:
        TypeError, ValueError: a bad argument, named; a plan that omits nothing; no sequence, none to hold out, or
            none longer than the boundary; hidden states, K or V that are not finite; a model whose K and V are no
            plain projections, or whose eager attention hands out no weights. The model is as before.

    Source: docs/fitting.md; POP (arXiv 2602.03295) for the independent KV projection.
    """
    model, ridges = stock_model(model), _check_lambdas(lambdas)
    layers = find_parts(model).layers
    if not isinstance(plan, Plan):
        raise TypeError(f"plan: expected a pop_ext.Plan, got {type(plan).__name__}")
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting: expected one of {', '.join(WEIGHTINGS)}, got {weighting!r}")
    plan = plan.replace(projections=None)
    check_plan(plan, layers, model.config)
    if not plan.omit:
        raise ValueError("plan: expected at least one omitted layer to fit, got none")
    held: list[Tensor] = []
    if holdout is not None:
        held = [ids for batch in checked(holdout, model, least=4) for ids in batch.split(1)]
    chooses = len(ridges) > 1
    split = holdout is None and chooses
    count = count_sequences(batches)
    inner = max(count // HOLD_EVERY, int(count > 1)) if split and count is not None else 0
    total = None if count is None else count - inner + ((len(held) or inner) * len(ridges) if chooses else 0)
    with undisturbed(model), torch.no_grad(), reporting(progress, "fit", total) as advance:
        reader = _Reader(model, plan, held if split else None, weighting, advance)
        reader.read(batches)
        samples = {layer: sample_of(layers[layer]) for layer in plan.omit}
        losses: list[tuple[float, float, float]] = []
        if chooses:
            held = _check_held(held, plan, reader.sequences)
            for ridge in ridges:
                losses.append((ridge, *_held_out_loss(model, _solved(reader, ridge, samples)[0], held, advance)))
        best = _best(losses) if losses else ridges[0]
        solved = _solved(reader, best, samples)
        return _finished(model, *solved, reader.moments, losses, len(held) if losses else 0)


def _solved(reader: _Reader, ridge: float, samples: dict[int, Tensor]) -> tuple[Plan, list[RunSolution]]:
    """The plan with the projections of one ridge, in the model's dtype."""
    solutions, dtype = [run.solve(ridge) for run in reader.moments], _dtype(reader.model)
    matrices = {
        layer: (run.layers[layer].original.double() + change).to(dtype).cpu().contiguous()
        for run, solution in zip(reader.moments, solutions, strict=True)
        for layer, change in solution.changes.items()
    }
    for layer, matrix in matrices.items():
        if not matrix.isfinite().all():
            raise ValueError(
                f"lambdas: expected a ridge whose projections {str(dtype).removeprefix('torch.')} can hold, got "
                f"{ridge:g} (layer {layer})"
            )
    weighting = "attention" if reader.by_attention else "uniform"
    report = FitReport(ridge, reader.sequences, reader.moments[0].rows, weighting=weighting)
    return reader.plan.replace(projections=Projections(matrices, samples, report)), solutions


def _best(losses: list[tuple[float, float, float]]) -> float:
    """The ridge of the lowest loss."""
    finite = [row for row in losses if math.isfinite(row[1])]
    if not finite:
        raise ValueError(f"holdout: expected finite losses, got {', '.join(f'{loss:g}' for _, loss, _ in losses)}")
    return min(finite, key=lambda row: row[1])[0]


def _finished(
    model: Any,
    plan: Plan,
    solutions: list[RunSolution],
    moments: list[RunMoments],
    losses: list[tuple[float, float, float]],
    held: int,
) -> Plan:
    """The fitted plan, with what is to be known of how it was made."""
    assert plan.projections is not None
    report = dataclasses.replace(
        plan.projections.report,
        condition=tuple(solution.condition for solution in solutions),
        losses=tuple(losses),
        holdout=held,
        residuals={
            layer: run.residuals(layer, change)
            for run, solution in zip(moments, solutions, strict=True)
            for layer, change in solution.changes.items()
        },
    )
    found, known = origin_of(model, ""), plan.origin
    origin = dataclasses.replace(found, method=None) if known is None else known
    origin = dataclasses.replace(
        origin, config_hash=found.config_hash, fit=report.method(), fit_samples=report.sequences
    )
    return plan.replace(origin=origin, projections=dataclasses.replace(plan.projections, report=report))


class _Reader:
    """Calibration batches, summed up: one RunMoments a run of the plan."""

    def __init__(
        self, model: Any, plan: Plan, held: list[Tensor] | None, weighting: str, advance: Callable[[int], None]
    ) -> None:
        self.model, self.plan, self.held, self.advance = model, plan, held, advance
        self.by_attention = weighting == "attention"
        parts = find_parts(model)
        self.decoder, self.layers = parts.decoder, parts.layers
        self.moments = [RunMoments({i: original_projection(self.layers[i]) for i in run}) for run in plan.runs]
        self.sequences = 0
        self._seen = 0
        self._last: tuple[int, Tensor] | None = None  # batch, [1, T]: held out if it stays the last of a few

    def read(self, batches: Batches) -> None:
        for number, ids in enumerate(checked(batches, self.model, least=2)):
            if self._seen == 0:  # refuses, by name, what projects K and V in another way
                reference.prefill(self.model, ids[:1, :2], self.plan, boundary=1)
            for part in self._hold_back(number, ids):
                self._add(*part)
        if self.held is not None and self._last is not None and self.sequences > 0:
            self.held.append(self._last[1])
        elif self._last is not None:
            self._add(*self._last)
        if self.sequences == 0:
            raise ValueError("batches: expected at least one sequence to fit on, got none")

    def _hold_back(self, number: int, ids: Tensor) -> list[tuple[int, Tensor]]:
        """What is to be fitted of batch ``number``: every eighth sequence is held out; until one is, the last waits."""
        seen = range(self._seen, self._seen + len(ids))
        self._seen += len(ids)
        if self.held is None:
            return [(number, ids)]
        out = torch.tensor([index % HOLD_EVERY == HOLD_EVERY - 1 for index in seen], device=ids.device)
        self.held.extend(sequence[None] for sequence in ids[out])
        fitted, last, self._last = ids[~out], self._last, None
        if not self.held:
            fitted, self._last = fitted[:-1], (number, fitted[-1:])
        return [part for part in (last, (number, fitted)) if part is not None and len(part[1])]

    def _add(self, number: int, ids: Tensor) -> None:
        self._sum_up(ids)
        if not all(run.is_finite() for run in self.moments):
            raise ValueError(f"batches: expected finite hidden states, K and V, got others from number {number}")
        self.sequences += len(ids)
        self.advance(len(ids))

    def _sum_up(self, ids: Tensor) -> None:
        targets = self._full_forward(ids)
        for run, moments in zip(self.plan.runs, self.moments, strict=True):
            x = self._read_by[run.start]
            moments.add(x, {layer: targets[layer] for layer in run}, self._weights_of(run))

    def _weights_of(self, run: range) -> Tensor | None:
        """[rows] float32, 1 on the mean of a sequence, by the attention of all the run's layers: one Gram matrix."""
        if not self.by_attention:
            return None
        mass = torch.stack([self._attention[layer] for layer in run]).mean(0)
        return (mass / mass.mean(-1, keepdim=True).clamp_min(torch.finfo(mass.dtype).tiny)).flatten()

    def _full_forward(self, ids: Tensor) -> dict[int, Tensor]:
        """K and V of the full model without their biases, of each omitted layer, [rows, 2 * kv_dim] float32."""
        outputs: dict[int, list[Tensor]] = {layer: [] for layer in self.plan.omit}
        self._read_by: dict[int, Tensor] = {}
        self._attention: dict[int, Tensor] = {}
        with ExitStack() as stack:
            if self.by_attention:
                stack.enter_context(_eager(self.decoder.config))
                for index in self.plan.omit:
                    stack.callback(self._watch_attention(index, _continuation(ids)).remove)
            for index in self.plan.omit:
                for handle in _watch_key_values(self.layers[index], outputs[index].append):
                    stack.callback(handle.remove)
            stack.enter_context(self._watch_hidden_states(self.plan.runs[0].start))
            self._forward(ids)
        later = [run.start for run in self.plan.runs[1:]]
        if later:  # what they read has passed by the runs before
            with ExitStack() as stack:
                for index in self.plan.omit:
                    stack.enter_context(replaced_forward(self.layers[index], _pass_by))
                for index in later:
                    stack.enter_context(self._watch_hidden_states(index))
                self._forward(ids)
        return {layer: torch.cat(parts, dim=-1) for layer, parts in outputs.items()}

    def _forward(self, ids: Tensor) -> None:
        self.decoder(input_ids=ids, use_cache=False)

    def _watch_attention(self, index: int, queries: int) -> Any:
        """A hook: what the last ``queries`` rows pay to each row before them, [batch, T] float32, to ``_attention``."""

        def keep(module: Any, args: Any, output: Any) -> None:
            weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
            if not isinstance(weights, Tensor) or weights.ndim != 4:
                raise ValueError(
                    f"weighting: expected attention weights from {type(module).__name__} of layer {index}, got none; "
                    'weighting="uniform" needs none'
                )
            paid = weights[:, :, -queries:].float().sum(2).mean(1)
            paid[:, -queries:] = 0.0  # they are not of the prompt
            self._attention[index] = paid

        return self.layers[index].self_attn.register_forward_hook(keep)

    @contextmanager
    def _watch_hidden_states(self, index: int) -> Iterator[None]:
        """Inside: what layer ``index`` is called with goes, normalised, to ``_read_by``."""
        layer = self.layers[index]
        called = layer.forward  # of the instance: a layer that passes its input by is watched, too

        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = hidden_states_of(args, kwargs)
            self._read_by[index] = without_gamma(layer, hidden).flatten(0, 1)
            return called(*args, **kwargs)

        with replaced_forward(layer, forward):
            yield


@contextmanager
def _eager(config: Any) -> Iterator[None]:
    """Inside: the attention whose modules hand out their weights."""
    before = config._attn_implementation
    config._attn_implementation = "eager"
    try:
        yield
    finally:
        config._attn_implementation = before


def _pass_by(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden_states


def _watch_key_values(layer: Any, keep: Callable[[Tensor], None]) -> list[Any]:
    """Hooks that hand over the K and then the V of a layer, less their biases, [rows, kv_dim] float32."""
    attention, weights = layer.self_attn, key_value_weights(layer.self_attn)

    def less(bias: Tensor | None, output: Tensor) -> Tensor:
        rows = output.float().flatten(0, 1)
        return rows if bias is None else rows - bias.float()

    if hasattr(attention, "qkv_proj"):
        kv_dim = len(weights.k)

        def fused(module: Any, args: Any, output: Tensor) -> None:
            keep(less(weights.k_bias, output[..., -2 * kv_dim : -kv_dim]))
            keep(less(weights.v_bias, output[..., -kv_dim:]))

        return [attention.qkv_proj.register_forward_hook(fused)]
    return [
        attention.k_proj.register_forward_hook(lambda module, args, output: keep(less(weights.k_bias, output))),
        attention.v_proj.register_forward_hook(lambda module, args, output: keep(less(weights.v_bias, output))),
    ]


def original_projection(layer: Any) -> Tensor:
    """``[Wk; Wv]`` times the weight of the norm before it, [2 * kv_dim, hidden] float32: what a fit starts from.

    Raises:
        ValueError: a norm that is no RMSNorm with a weight a channel.
    """
    weights = key_value_weights(layer.self_attn)
    stacked = torch.cat([weights.k, weights.v]).float()
    norm = getattr(layer, "input_layernorm", None)
    if norm is None:
        return stacked
    # By what it does to a vector, since families store their weights in different ways (Gemma: less 1).
    exact = copy.deepcopy(norm).float()
    generator = torch.Generator("cpu").manual_seed(0)
    probe = torch.randn(2, stacked.shape[1], generator=generator, device="cpu").to(stacked.device)
    plain, normed = without_gamma(layer, probe), exact(probe)
    gamma = normed[0] / plain[0]
    if not torch.allclose(plain[1] * gamma, normed[1], rtol=1e-3, atol=1e-4, equal_nan=True):
        raise ValueError(f"model: expected an RMSNorm before K and V, got {type(norm).__name__}")
    return (stacked * gamma).detach()


def _dtype(model: Any) -> torch.dtype:
    dtype: torch.dtype = model.get_input_embeddings().weight.dtype
    return dtype


# Choosing lambda


def _held_out_loss(model: Any, plan: Plan, held: list[Tensor], advance: Callable[[int], None]) -> tuple[float, float]:
    """Mean loss in nats a token of the sequences' continuations under a plan, and its standard error."""
    found = []
    for ids in held:
        rows = _continuation(ids)
        boundary = plan.boundary - 1 + rows
        logits, _ = reference.prefill(model, ids[:, :-1], plan, rows, boundary=boundary)
        log_p = logits[0].float().log_softmax(-1)
        found.append(-log_p.gather(-1, ids[0, -rows:, None]).mean())
        advance(1)
    losses = torch.stack(found).double()
    error = losses.std() / math.sqrt(len(losses)) if len(losses) > 1 else math.nan
    return float(losses.mean()), float(error)


def _continuation(ids: Tensor) -> int:
    return max(1, min(CONTINUATION, ids.shape[1] // 4))


def _check_held(held: list[Tensor], plan: Plan, fitted: int) -> list[Tensor]:
    """Those sequences that have context rows."""
    if not held:
        raise ValueError(
            f"holdout: expected sequences to choose lambda by (or a single lambda), got none of {fitted} sequences: "
            f"without a holdout every {HOLD_EVERY}th of the batches' is taken, of fewer the last but never the only one"
        )
    longer = [ids for ids in held if ids.shape[1] - 1 > plan.boundary - 1 + _continuation(ids)]
    if not longer:
        longest = max(ids.shape[1] for ids in held)
        raise ValueError(
            f"holdout: expected sequences longer than the boundary {plan.boundary} and a continuation, got at most "
            f"{longest} tokens"
        )
    return longer


def _check_lambdas(lambdas: Sequence[float] | None) -> tuple[float, ...]:
    if lambdas is None:
        return LAMBDAS
    if isinstance(lambdas, (str, bytes)) or not isinstance(lambdas, Sequence):
        raise TypeError(f"lambdas: expected a sequence of numbers, got {type(lambdas).__name__}")
    for value in lambdas:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"lambdas: expected numbers, got {type(value).__name__} {value!r}")
        if not value > 0:
            raise ValueError(f"lambdas: expected numbers > 0, got {value!r}")
    if not lambdas:
        raise ValueError("lambdas: expected at least one number, got none")
    return tuple(float(value) for value in lambdas)
