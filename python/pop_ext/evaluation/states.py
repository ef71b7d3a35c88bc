"""Logits of pruned plans from states of the full model: one full forward per prompt serves every plan.

Up to the first layer that a plan omits, every row is as in the full model, that of the prompt and that of its
continuation. So the input of that layer is recorded once, and a plan then costs its omitted layers' K/V projection, and
the layers from there on for the few rows at full depth. The states run by the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pop_ext.evaluation.ablations import group_by_shape
from pop_ext.evaluation.prompts import Pair
from pop_ext.hf.modules import find_decoder_modules, input_device
from pop_ext.methods.calibration import stock_evaluation
from pop_ext.methods.student import FINAL, Example, Student, recorded_states
from pop_ext.plans.plan import Plan


@dataclass(frozen=True)
class _Group:
    """Prompts of one shape, with their continuations.

    Attributes:
        indices: Index of each prompt.
        ids: int64 [batch, T] on the model's device, all but the last token of prompt and continuation.
        rows: Tokens of the continuation.
        first_turn: Tokens of the prompt of an earlier turn and of its answer, with which ``ids`` begin; or (0, 0).
        entries: Layer -> its input, [batch, T, hidden] on the CPU; ``FINAL`` -> the last layer's output for the rows
            that predict the continuation, [batch, rows, hidden].
    """

    indices: list[int]
    ids: Tensor
    rows: int
    first_turn: tuple[int, int]
    entries: dict[int, Tensor] = field(default_factory=dict)


class FullStates:
    """States of the full model on prompts and their continuations.

    They take ``prompts * T * hidden`` values on the CPU for each recorded layer.

    Args:
        model: Stock Hugging Face model. It is left unchanged.
        pairs: (prompt, continuation) each.
        first_turns: (prompt, answer) before each pair, whose prompt is then that of the second turn. Empty for none.
        layers: Layers whose input is recorded: the first omitted layer of every plan to come. A plan that starts
            elsewhere takes another forward of all prompts.
        batch_size: Prompts per forward.
        advance: Called with the number of prompts that a forward has read.
    """

    def __init__(
        self,
        model: Any,
        pairs: Sequence[Pair],
        layers: Iterable[int],
        batch_size: int,
        advance: Callable[[int], None] = lambda _: None,
        first_turns: Sequence[Pair] = (),
    ) -> None:
        self.model, self.pairs, self._parts = model, pairs, find_decoder_modules(model)
        self._groups, device = [], input_device(model)
        turns: list[tuple[Tensor, ...]] = list(pairs)
        if first_turns:
            turns = [(*first, *pair) for first, pair in zip(first_turns, pairs, strict=True)]
        for indices in group_by_shape(turns, batch_size):
            ids = torch.stack([torch.cat(turns[index])[:-1] for index in indices]).to(device)
            *first, _, continuation = map(len, turns[indices[0]])
            self._groups.append(_Group(indices, ids, continuation, (first[0], first[1]) if first else (0, 0)))
            self._record(self._groups[-1], set(layers))
            advance(len(indices))

    def _record(self, group: _Group, layers: Iterable[int]) -> None:
        """Run the full model on prompts of one shape, and keep the input of ``layers`` and the last layer's output."""
        with stock_evaluation(self.model), torch.no_grad():
            with recorded_states(self._parts, layers, group.rows) as states:
                self._parts.decoder(input_ids=group.ids, use_cache=False)
            group.entries.update(states)

    def logits(self, plan: Plan) -> Iterator[tuple[int, Tensor]]:
        """Yield the index of each prompt and the logits that predict its continuation after a prefill under ``plan``.

        Args:
            plan: The plan, with fitted projections or without. Its ``min_tokens`` is ignored. One that omits no layer
                gives the full model.

        Yields:
            (index of the prompt, logits [n, vocab] float32 on the model's device).
        """
        first, fitted = plan.omit[0] if plan.omit else FINAL, plan.projections
        student = Student(self.model, plan if plan.omit else Plan(plan.num_layers, (plan.num_layers - 1,)))
        for group in self._groups:
            calls = _calls(group, plan.boundary)
            pruned = first != FINAL and any(context for context, _ in calls)  # else all rows run at full depth
            if first not in group.entries:
                self._record(group, [first])
            example = Example(group.ids, group.entries[first], group.entries[FINAL], group.rows)
            with stock_evaluation(self.model), torch.no_grad():
                if pruned:
                    found = student.logits_after(example, calls, group.rows, fitted.matrices if fitted else None)
                else:
                    found = student.teacher_logits(example, group.ids.shape[1] - group.rows, group.rows)
            yield from zip(group.indices, found, strict=True)


def _calls(group: _Group, boundary: int) -> list[tuple[int, int]]:
    """Return the context rows and the rows at full depth of each call on a group: prefills, and the answer between."""
    first, answer = group.first_turn
    second = group.ids.shape[1] - group.rows + 1 - first - answer  # tokens of the last prompt
    earlier = [(max(0, first - boundary), min(first, boundary)), (0, answer)] if first else []
    return [*earlier, (max(0, second - boundary), min(second, boundary) + group.rows - 1)]
