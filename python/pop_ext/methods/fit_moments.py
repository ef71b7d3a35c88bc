"""Read calibration sequences into the least-squares moments of each run of omitted layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from pop_ext import reference
from pop_ext.hf.modules import find_decoder_modules
from pop_ext.hf.restore import replaced_forward
from pop_ext.methods.calibration import Batches, check_batches, input_hidden_states
from pop_ext.methods.ridge import RunMoments
from pop_ext.methods.student import Example, Student, count_continuation
from pop_ext.plans.norms import norm_gain, normalize_unweighted
from pop_ext.plans.plan import Plan
from pop_ext.plans.projections import fitted_biases, key_value_weights

HOLD_EVERY = 8
"""Without a ``holdout``, every eighth sequence of the batches is held out to choose lambda. Of fewer than eight
sequences the last one is."""


def held_out_of(count: int) -> list[int]:
    """Return which of ``count`` sequences are held out: every eighth, or the last one of fewer, never the only one."""
    every = range(HOLD_EVERY - 1, count, HOLD_EVERY)
    return list(every) if every or count < 2 else [count - 1]


class PlanReading:
    """What calibration sequences say of one plan.

    Attributes:
        plan: The plan, without projections.
        student: Student that records the sequences for training, or None.
        moments: Moments of each run, in the order of ``plan.runs``.
        examples: States of the sequences, if there is a student.
    """

    def __init__(self, model: Any, plan: Plan, student: Student | None) -> None:
        layers = find_decoder_modules(model).layers
        self.plan, self.student = plan, student
        self.moments = [RunMoments({i: original_projection(layers[i]) for i in run}) for run in plan.runs]
        self.examples: list[Example] = []

    def queries(self, ids: Tensor, answer: int) -> int:
        """Return how many last rows of ``ids`` [batch, T] weigh the rows before them.

        Of a task these are the rows at full depth: the boundary rows and those of the answer.
        """
        return min(answer + self.plan.boundary, ids.shape[1] - 1) if answer else count_continuation(ids)


class MomentsReader:
    """Reads calibration batches once for several plans.

    Attributes:
        readings: What was read, for each plan.
        holdout: Sequences [1, T] held out of the batches are appended here; None to hold out none.
        sequences: Number of sequences added to the moments.
        by_attention: True if rows are weighted by attention.
    """

    def __init__(
        self,
        model: Any,
        plans: Sequence[Plan],
        holdout: list[Tensor] | None,
        weighting: str,
        advance: Callable[[int], None],
        train: bool = False,
    ) -> None:
        """Prepare to read.

        Args:
            model: Stock model inside ``stock_evaluation``.
            plans: Plans that omit at least one layer, without projections.
            holdout: List that takes held-out sequences, or None.
            weighting: "attention" or "uniform", as for ``pop_ext.fit``.
            advance: Called with the number of sequences just added.
            train: True to record the sequences for training.
        """
        self.model, self.holdout, self.advance = model, holdout, advance
        self.by_attention = weighting == "attention"
        modules = find_decoder_modules(model)
        self.decoder, self.layers = modules.decoder, modules.layers
        self.readings = [PlanReading(model, plan, Student(model, plan) if train else None) for plan in plans]
        self.sequences = 0
        self._seen = 0
        # Batch number and last sequence [1, T], which is held out if fewer than HOLD_EVERY sequences come.
        self._last: tuple[int, Tensor] | None = None

    def read(self, batches: Batches) -> None:
        """Read all batches.

        Raises:
            ValueError: No sequence is left to fit on, a hidden state, K or V is not finite, or the model projects K
                and V in another way.
            TypeError: As for ``check_batches``.
        """
        for number, ids in enumerate(check_batches(batches, self.model, least=2)):
            if self._seen == 0:  # the oracle refuses a model that projects K and V in another way
                for reading in self.readings:
                    reference.prefill(self.model, ids[:1, :2], reading.plan, boundary=1)
            for part in self._split_holdout(number, ids):
                self._add(*part)
        if self.holdout is not None and self._last is not None and self.sequences > 0:
            self.holdout.append(self._last[1])
        elif self._last is not None:
            self._add(*self._last)
        if self.sequences == 0:
            raise ValueError("batches: expected at least one sequence to fit on, got none")

    def read_tasks(self, tasks: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Read tasks, each a prompt and its answer, int64 [n] on the model's device.

        Rows count by the attention that the rows which predict the answer pay to them.

        Raises:
            ValueError: A hidden state, K or V is not finite.
        """
        for number, (prompt, answer) in enumerate(tasks):
            self._add(number, torch.cat([prompt, answer])[None], len(answer))

    def _split_holdout(self, number: int, ids: Tensor) -> list[tuple[int, Tensor]]:
        """Hold out every eighth sequence, and return the others as (batch number, ids).

        Until a sequence is held out, the last one read so far waits, because it may have to be held out at the end.
        """
        seen = range(self._seen, self._seen + len(ids))
        self._seen += len(ids)
        if self.holdout is None:
            return [(number, ids)]
        out = torch.tensor([index % HOLD_EVERY == HOLD_EVERY - 1 for index in seen], device=ids.device)
        self.holdout.extend(sequence[None] for sequence in ids[out])
        fitted, last, self._last = ids[~out], self._last, None
        if not self.holdout:
            fitted, self._last = fitted[:-1], (number, fitted[-1:])
        return [part for part in (last, (number, fitted)) if part is not None and len(part[1])]

    def _add(self, number: int, ids: Tensor, answer: int = 0) -> None:
        """Add the sequences ``ids`` [batch, T] of batch ``number`` to the moments.

        Args:
            number: Number of the batch or task, for errors.
            ids: int64 [batch, T].
            answer: Number of last tokens that answer a task; 0 for text.
        """
        # A plan with several runs takes another forward, which its student does not record.
        with ExitStack() as stack:
            found = [
                stack.enter_context(reading.student.recording(ids, answer)) if reading.student else []
                for reading in self.readings
            ]
            self._run_full_forward(ids, answer)
        for reading, examples in zip(self.readings, found, strict=True):
            reading.examples += examples
            inputs = self._entries if len(reading.plan.runs) == 1 else self._pruned_inputs(ids, reading.plan)
            for run, moments in zip(reading.plan.runs, reading.moments, strict=True):
                weights = self._row_weights(run, reading.queries(ids, answer)) if self.by_attention else None
                moments.add(inputs[run.start], {layer: self._targets[layer] for layer in run}, weights)
            if not all(run.is_finite() for run in reading.moments):
                what, each = ("tasks", "task") if answer else ("batches", "batch")
                raise ValueError(
                    f"{what}: expected finite hidden states, K and V, got NaN or infinity in {each} {number}"
                )
        self.sequences += len(ids)
        self.advance(len(ids))

    def _row_weights(self, run: range, queries: int) -> Tensor:
        """Return a weight per row, [rows] float32 with mean 1 over a sequence.

        It is the mean over the layers of the run, because they share one Gram matrix.
        """
        mass = torch.stack([self._attention[layer, queries] for layer in run]).mean(0)
        return (mass / mass.mean(-1, keepdim=True).clamp_min(torch.finfo(mass.dtype).tiny)).flatten()

    def _run_full_forward(self, ids: Tensor, answer: int) -> None:
        """Run the full model on ``ids`` int64 [batch, T].

        Fills ``_targets``, omitted layer of any plan -> K and V without their biases, [rows, 2 * kv_dim] float32;
        ``_entries``, first omitted layer of a plan -> normalised input [rows, hidden] float32; and ``_attention``,
        (layer, queries) -> attention [batch, T] float32 that each row receives from that many last rows.
        """
        outputs: dict[int, list[Tensor]] = {layer: [] for reading in self.readings for layer in reading.plan.omit}
        self._entries: dict[int, Tensor] = {}
        self._attention: dict[tuple[int, int], Tensor] = {}
        with ExitStack() as stack:
            if self.by_attention:
                stack.enter_context(_eager(self.decoder.config))
                watched = {(i, reading.queries(ids, answer)) for reading in self.readings for i in reading.plan.omit}
                for index, queries in watched:
                    stack.callback(self._watch_attention(index, queries).remove)
            for index in outputs:
                for handle in _watch_key_values(self.layers[index], outputs[index].append):
                    stack.callback(handle.remove)
            for first in {reading.plan.omit[0] for reading in self.readings}:
                stack.enter_context(self._watch_hidden_states(first, self._entries))
            self._forward(ids)
        self._targets = {layer: torch.cat(parts, dim=-1) for layer, parts in outputs.items()}

    def _pruned_inputs(self, ids: Tensor, plan: Plan) -> dict[int, Tensor]:
        """Return the normalised input of each run of a plan in the pruned model, [rows, hidden] float32 by first layer.

        That of a run after the first depends on the omitted layers before it.
        """
        inputs = {plan.omit[0]: self._entries[plan.omit[0]]}
        with ExitStack() as stack:
            for index in plan.omit:
                stack.enter_context(replaced_forward(self.layers[index], _identity_forward))
            for run in plan.runs[1:]:
                stack.enter_context(self._watch_hidden_states(run.start, inputs))
            self._forward(ids)
        return inputs

    def _forward(self, ids: Tensor) -> None:
        self.decoder(input_ids=ids, use_cache=False)

    def _watch_attention(self, index: int, queries: int) -> Any:
        """Hook a layer's attention to record what its last ``queries`` rows pay to each row before them.

        Args:
            index: Index of the layer.
            queries: Number of continuation rows.

        Returns:
            The handle of the hook, which fills ``_attention[index, queries]``.
        """

        def keep(module: Any, args: Any, output: Any) -> None:
            weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
            if not isinstance(weights, Tensor) or weights.ndim != 4:
                raise ValueError(
                    f"weighting: expected attention weights from {type(module).__name__} of layer {index}, got none; "
                    'weighting="uniform" needs none'
                )
            paid = weights[:, :, -queries:].float().sum(2).mean(1)
            paid[:, -queries:] = 0.0  # these rows are not part of the prompt
            self._attention[index, queries] = paid

        return self.layers[index].self_attn.register_forward_hook(keep)

    @contextmanager
    def _watch_hidden_states(self, index: int, into: dict[int, Tensor]) -> Iterator[None]:
        """Record the normalised input of layer ``index`` in a dict while the block runs."""
        layer = self.layers[index]
        called = layer.forward  # of the instance, so that a layer replaced by the identity is recorded, too

        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = input_hidden_states(args, kwargs)
            into[index] = normalize_unweighted(layer, hidden).flatten(0, 1)
            return called(*args, **kwargs)

        with replaced_forward(layer, forward):
            yield


@contextmanager
def _eager(config: Any) -> Iterator[None]:
    """Use eager attention inside the block, since only it returns attention weights."""
    before = config._attn_implementation
    config._attn_implementation = "eager"
    try:
        yield
    finally:
        config._attn_implementation = before


def _identity_forward(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden_states


def _watch_key_values(layer: Any, keep: Callable[[Tensor], None]) -> list[Any]:
    """Hook a layer so that ``keep`` gets its K and then its V, without ``fitted_biases``, [rows, kv_dim] float32.

    Returns:
        The handles of the hooks.
    """
    attention = layer.self_attn
    k_bias, v_bias = fitted_biases(layer)

    def without_bias(output: Tensor, bias: Tensor | None) -> Tensor:
        rows = output.float().flatten(0, 1)
        return rows if bias is None else rows - bias.float()

    if hasattr(attention, "qkv_proj"):
        kv_dim = attention.config.num_key_value_heads * attention.head_dim

        def fused(module: Any, args: Any, output: Tensor) -> None:
            keep(without_bias(output[..., -2 * kv_dim : -kv_dim], k_bias))
            keep(without_bias(output[..., -kv_dim:], v_bias))

        return [attention.qkv_proj.register_forward_hook(fused)]
    return [
        attention.k_proj.register_forward_hook(lambda module, args, output: keep(without_bias(output, k_bias))),
        attention.v_proj.register_forward_hook(lambda module, args, output: keep(without_bias(output, v_bias))),
    ]


def original_projection(layer: Any) -> Tensor:
    """Return ``[Wk; Wv]`` with the weight of the norm before it folded in, the start of a fit.

    Args:
        layer: Decoder layer.

    Returns:
        [2 * kv_dim, hidden] float32.

    Raises:
        ValueError: As for ``norm_gain``.
    """
    weights = key_value_weights(layer.self_attn)
    stacked = torch.cat([weights.k, weights.v]).float()
    gain = norm_gain(layer, stacked)
    return stacked if gain is None else (stacked * gain).detach()
