"""Logits of pruned plans from states of the full model: one full forward per prompt serves every plan.

Up to the first layer that a plan omits, every row is as in the full model, that of the prompt and that of its
continuation. So the input of that layer is recorded once, and a plan then costs its omitted layers' K/V projection, and
the layers from there on for the few rows at full depth. The states run by the reference.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pop_ext.evaluation.ablations import group_by_shape
from pop_ext.evaluation.prompts import Pair
from pop_ext.hf.modules import find_decoder_modules
from pop_ext.methods.calibration import input_hidden_states, output_hidden_states, stock_evaluation
from pop_ext.methods.student import Example, Student
from pop_ext.plans.plan import Plan


@dataclass(frozen=True)
class _Group:
    """Prompts of one shape, with their continuations.

    Attributes:
        indices: Index of each prompt.
        ids: int64 [batch, T] on the model's device, all but the last token of prompt and continuation.
        prompt: Tokens of the prompt.
        entries: First omitted layer -> its input, [batch, T, hidden] on the CPU.
        final: Output of the last layer for the rows that predict the continuation, [batch, n, hidden] on the CPU.
    """

    indices: list[int]
    ids: Tensor
    prompt: int
    entries: dict[int, Tensor]
    final: Tensor


class FullStates:
    """States of the full model on prompts and their continuations.

    They take ``prompts * T * hidden`` values on the CPU for each recorded layer.

    Args:
        model: Stock Hugging Face model. It is left unchanged.
        pairs: (prompt, continuation) each.
        layers: Layers whose input is recorded: the first omitted layer of every plan to come.
        batch_size: Prompts per forward.
    """

    def __init__(self, model: Any, pairs: Sequence[Pair], layers: Iterable[int], batch_size: int) -> None:
        self.model, self._groups = model, []
        parts, device = find_decoder_modules(model), model.get_input_embeddings().weight.device
        layers = sorted(set(layers))
        with stock_evaluation(model), torch.no_grad():
            for indices in group_by_shape(pairs, batch_size):
                ids = torch.stack([torch.cat(pairs[index])[:-1] for index in indices]).to(device)
                count = len(pairs[indices[0]][1])
                entries, final = self._record(parts, ids, layers, count)
                self._groups.append(_Group(indices, ids, ids.shape[1] - count + 1, entries, final))

    @staticmethod
    def _record(parts: Any, ids: Tensor, layers: Sequence[int], count: int) -> tuple[dict[int, Tensor], Tensor]:
        """Run the full model; return the input of ``layers``, and the last layer's output for ``count`` last rows."""
        entries: dict[int, Tensor] = {}
        finals: list[Tensor] = []

        def keep_entry(layer: int) -> Any:
            def keep(_: Any, args: Any, kwargs: Any) -> None:
                entries[layer] = input_hidden_states(args, kwargs).cpu()

            return keep

        def keep_final(_: Any, args: Any, output: Any) -> None:
            finals.append(output_hidden_states(output)[:, -count:].cpu().clone())  # a view would keep all rows

        with ExitStack() as stack:
            for layer in layers:
                handle = parts.layers[layer].register_forward_pre_hook(keep_entry(layer), with_kwargs=True)
                stack.callback(handle.remove)
            stack.callback(parts.layers[-1].register_forward_hook(keep_final).remove)
            parts.decoder(input_ids=ids, use_cache=False)
        return entries, finals[0]

    def logits(self, plan: Plan) -> Iterator[tuple[int, Tensor]]:
        """Yield the index of each prompt and the logits that predict its continuation after a prefill under ``plan``.

        Args:
            plan: The plan, with fitted projections or without. Its ``min_tokens`` is ignored. One that omits no layer
                gives the full model.

        Yields:
            (index of the prompt, logits [n, vocab] float32 on the model's device).
        """
        layers = find_decoder_modules(self.model).layers
        first = plan.omit[0] if plan.omit else len(layers) - 1
        fitted = None if plan.projections is None else plan.projections.matrices
        student = Student(self.model, plan if plan.omit else Plan(plan.num_layers, (first,)))
        for group in self._groups:
            rows = group.final.shape[1]
            example = Example(group.ids, group.entries.get(first, group.final), group.final, rows)
            with stock_evaluation(self.model), torch.no_grad():
                if plan.omit and group.prompt > plan.boundary:
                    found = student.logits(example, group.prompt, rows, fitted)
                else:  # all rows of the prompt are boundary rows
                    found = student.teacher_logits(example, group.prompt - 1, rows)
            yield from zip(group.indices, found, strict=True)
