"""Read calibration sequences into the least-squares moments of each run of omitted layers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from pop_ext import reference
from pop_ext.hf.modules import find_decoder_modules
from pop_ext.hf.restore import replaced_forward
from pop_ext.methods.calibration import Batches, check_batches, input_hidden_states
from pop_ext.methods.ridge import RunMoments
from pop_ext.methods.student import Example, Student, count_continuation
from pop_ext.plans.plan import Plan
from pop_ext.plans.projections import key_value_weights, normalize_unweighted

HOLD_EVERY = 8
"""Without a ``holdout``, every eighth sequence of the batches is held out to choose lambda. Of fewer than eight
sequences the last one is."""


class MomentsReader:
    """Reads calibration batches and keeps one ``RunMoments`` per run of the plan.

    Attributes:
        moments: Moments of each run, in the order of ``plan.runs``.
        holdout: Sequences [1, T] held out of the batches are appended here; None to hold out none.
        examples: States of the sequences that were added to the moments, if a student records them.
        sequences: Number of sequences added to the moments.
        by_attention: True if rows are weighted by attention.
    """

    def __init__(
        self,
        model: Any,
        plan: Plan,
        holdout: list[Tensor] | None,
        weighting: str,
        advance: Callable[[int], None],
        student: Student | None = None,
    ) -> None:
        """Prepare to read.

        Args:
            model: Stock model inside ``stock_evaluation``.
            plan: Plan that omits at least one layer, without projections.
            holdout: List that takes held-out sequences, or None.
            weighting: "attention" or "uniform", as for ``pop_ext.fit``.
            advance: Called with the number of sequences just added.
            student: Student that records the sequences for training, or None.
        """
        self.model, self.plan, self.holdout, self.advance = model, plan, holdout, advance
        self.by_attention = weighting == "attention"
        modules = find_decoder_modules(model)
        self.decoder, self.layers = modules.decoder, modules.layers
        self.moments = [RunMoments({i: original_projection(self.layers[i]) for i in run}) for run in plan.runs]
        self.examples: list[Example] = []
        self._student = student
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
                reference.prefill(self.model, ids[:1, :2], self.plan, boundary=1)
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
        # Of a task, the rows at full depth are the boundary rows and those of the answer.
        queries = min(answer + self.plan.boundary, ids.shape[1] - 1) if answer else count_continuation(ids)
        with nullcontext() if self._student is None else self._student.recording(ids, answer) as found:
            targets = self._run_full_forward(ids, queries)
        self.examples += (found or [])[:1]  # a plan with several runs takes another forward
        for run, moments in zip(self.plan.runs, self.moments, strict=True):
            moments.add(self._run_inputs[run.start], {layer: targets[layer] for layer in run}, self._row_weights(run))
        if not all(run.is_finite() for run in self.moments):
            what, each = ("tasks", "task") if answer else ("batches", "batch")
            raise ValueError(f"{what}: expected finite hidden states, K and V, got NaN or infinity in {each} {number}")
        self.sequences += len(ids)
        self.advance(len(ids))

    def _row_weights(self, run: range) -> Tensor | None:
        """Return a weight per row, [rows] float32 with mean 1 over a sequence; None for uniform weights.

        It is the mean over the layers of the run, because they share one Gram matrix.
        """
        if not self.by_attention:
            return None
        mass = torch.stack([self._attention[layer] for layer in run]).mean(0)
        return (mass / mass.mean(-1, keepdim=True).clamp_min(torch.finfo(mass.dtype).tiny)).flatten()

    def _run_full_forward(self, ids: Tensor, queries: int) -> dict[int, Tensor]:
        """Run the full model, and the pruned one if the plan has several runs.

        Args:
            ids: int64 [batch, T].
            queries: Number of last rows whose attention weighs the rows before them.

        Fills ``_run_inputs``, first layer of a run -> normalised input [rows, hidden] float32 in the pruned model, and
        ``_attention``, layer -> attention [batch, T] float32 that each row receives from the continuation.

        Returns:
            Omitted layer -> K and V of the full model without their biases, [rows, 2 * kv_dim] float32.
        """
        outputs: dict[int, list[Tensor]] = {layer: [] for layer in self.plan.omit}
        self._run_inputs: dict[int, Tensor] = {}
        self._attention: dict[int, Tensor] = {}
        with ExitStack() as stack:
            if self.by_attention:
                stack.enter_context(_eager(self.decoder.config))
                for index in self.plan.omit:
                    stack.callback(self._watch_attention(index, queries).remove)
            for index in self.plan.omit:
                for handle in _watch_key_values(self.layers[index], outputs[index].append):
                    stack.callback(handle.remove)
            stack.enter_context(self._watch_hidden_states(self.plan.runs[0].start))
            self._forward(ids)
        later = [run.start for run in self.plan.runs[1:]]
        if later:  # their input depends on the omitted layers before them
            with ExitStack() as stack:
                for index in self.plan.omit:
                    stack.enter_context(replaced_forward(self.layers[index], _identity_forward))
                for index in later:
                    stack.enter_context(self._watch_hidden_states(index))
                self._forward(ids)
        return {layer: torch.cat(parts, dim=-1) for layer, parts in outputs.items()}

    def _forward(self, ids: Tensor) -> None:
        self.decoder(input_ids=ids, use_cache=False)

    def _watch_attention(self, index: int, queries: int) -> Any:
        """Hook a layer's attention to record what its last ``queries`` rows pay to each row before them.

        Args:
            index: Index of the layer.
            queries: Number of continuation rows.

        Returns:
            The handle of the hook, which fills ``_attention[index]``.
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
            self._attention[index] = paid

        return self.layers[index].self_attn.register_forward_hook(keep)

    @contextmanager
    def _watch_hidden_states(self, index: int) -> Iterator[None]:
        """Record the normalised input of layer ``index`` in ``_run_inputs`` while the block runs."""
        layer = self.layers[index]
        called = layer.forward  # of the instance, so that a layer replaced by the identity is recorded, too

        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = input_hidden_states(args, kwargs)
            self._run_inputs[index] = normalize_unweighted(layer, hidden).flatten(0, 1)
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
    """Hook a layer so that ``keep`` gets its K and then its V, without their biases, [rows, kv_dim] float32.

    Returns:
        The handles of the hooks.
    """
    attention, weights = layer.self_attn, key_value_weights(layer.self_attn)

    def without_bias(output: Tensor, bias: Tensor | None) -> Tensor:
        rows = output.float().flatten(0, 1)
        return rows if bias is None else rows - bias.float()

    if hasattr(attention, "qkv_proj"):
        kv_dim = len(weights.k)

        def fused(module: Any, args: Any, output: Tensor) -> None:
            keep(without_bias(output[..., -2 * kv_dim : -kv_dim], weights.k_bias))
            keep(without_bias(output[..., -kv_dim:], weights.v_bias))

        return [attention.qkv_proj.register_forward_hook(fused)]
    return [
        attention.k_proj.register_forward_hook(lambda module, args, output: keep(without_bias(output, weights.k_bias))),
        attention.v_proj.register_forward_hook(lambda module, args, output: keep(without_bias(output, weights.v_bias))),
    ]


def original_projection(layer: Any) -> Tensor:
    """Return ``[Wk; Wv]`` with the weight of the norm before it folded in, the start of a fit.

    Args:
        layer: Decoder layer.

    Returns:
        [2 * kv_dim, hidden] float32.

    Raises:
        ValueError: The norm is not an RMSNorm with one weight per channel.
    """
    weights = key_value_weights(layer.self_attn)
    stacked = torch.cat([weights.k, weights.v]).float()
    norm = getattr(layer, "input_layernorm", None)
    if norm is None:
        return stacked
    # Families store the weight of a norm in different ways (Gemma stores it less 1), so it is read off a norm's output.
    exact = copy.deepcopy(norm).float()
    generator = torch.Generator("cpu").manual_seed(0)
    probe = torch.randn(2, stacked.shape[1], generator=generator, device="cpu").to(stacked.device)
    plain, normed = normalize_unweighted(layer, probe), exact(probe)
    gamma = normed[0] / plain[0]
    if not torch.allclose(plain[1] * gamma, normed[1], rtol=1e-3, atol=1e-4, equal_nan=True):
        raise ValueError(f"model: expected an RMSNorm before K and V, got {type(norm).__name__}")
    return (stacked * gamma).detach()
