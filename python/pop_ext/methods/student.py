"""A pruned prefill that K/V matrices can be trained through: the oracle in grad mode, on cached states.

In training, only the K/V matrices of omitted layers change. They are read by the rows after the context rows, in
omitted layers. Everything before the first omitted layer is therefore the same in every step, for all rows: it is
computed once by the full model, and a step starts from the cached input of the first omitted layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from pop_ext.hf.compat import with_cache
from pop_ext.hf.modules import DecoderModules, find_decoder_modules
from pop_ext.hf.restore import forward_attribute, replaced_forward
from pop_ext.methods.calibration import input_hidden_states, output_hidden_states
from pop_ext.plans.plan import Plan
from pop_ext.reference.prefill import has_wrapper, rope_seen_up_to
from pop_ext.reference.projection import omitted_layers

CONTINUATION = 64
"""Largest number of last tokens of a sequence that stand for the continuation of a prompt; never more than a quarter of
the sequence. The held-out loss is their loss, and their attention weighs the rows before them."""


def count_continuation(ids: Tensor) -> int:
    """Return how many last tokens of the sequences ``ids`` [batch, T] stand for the continuation of a prompt."""
    return max(1, min(CONTINUATION, ids.shape[1] // 4))


@dataclass(frozen=True)
class Example:
    """Sequences of one length, and states of the full model on them.

    Attributes:
        ids: int64 [batch, T], on the model's device.
        entry: Input of the first omitted layer, [batch, T, hidden], on the CPU.
        final: Output of the last layer for the last ``kept`` rows, [batch, kept, hidden], on the CPU.
        answer: Number of last tokens that are the answer of a task; 0 for text, which may be split anywhere.
    """

    ids: Tensor
    entry: Tensor
    final: Tensor
    answer: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def rows(self) -> int:
        """Number of last tokens that are predicted: the answer of a task, or the continuation of a text."""
        return self.answer or count_continuation(self.ids)

    def select(self, rows: Sequence[int]) -> Example:
        """Return some of the sequences, by index."""
        index = list(rows)
        return Example(self.ids[index], self.entry[index], self.final[index], self.answer)


FINAL = -1
"""Key of the last layer's output among the recorded inputs of layers."""


@contextmanager
def recorded_states(parts: DecoderModules, layers: Iterable[int], kept: int) -> Iterator[dict[int, Tensor]]:
    """Record states of a forward of the full model inside the block, on the CPU.

    Args:
        parts: Modules of the model.
        layers: Layers whose input is recorded.
        kept: Number of last rows of the last layer's output.

    Yields:
        Layer -> its input, [batch, T, hidden]; ``FINAL`` -> the last layer's output, [batch, kept, hidden].
    """
    states: dict[int, Tensor] = {}

    def keep_entry(layer: int) -> Any:
        def keep(_: Any, args: Any, kwargs: Any) -> None:
            states[layer] = input_hidden_states(args, kwargs).detach().cpu()

        return keep

    def keep_final(_: Any, args: Any, output: Any) -> None:
        states[FINAL] = output_hidden_states(output).detach()[:, -kept:].cpu().clone()  # a view would keep all rows

    with ExitStack() as stack:
        for layer in layers:
            handle = parts.layers[layer].register_forward_pre_hook(keep_entry(layer), with_kwargs=True)
            stack.callback(handle.remove)
        stack.callback(parts.layers[-1].register_forward_hook(keep_final).remove)
        yield states


class Student:
    """Computes logits of a pruned prefill as a differentiable function of the omitted layers' K/V matrices.

    Attributes:
        model: Stock model inside ``stock_evaluation``.
        plan: The plan; its projections are ignored.
        vocabulary: Ids that logits are computed for, int64 [n]; None for all.
    """

    def __init__(self, model: Any, plan: Plan, vocabulary: Tensor | None = None) -> None:
        """Prepare.

        Args:
            model: Hugging Face decoder that the oracle runs.
            plan: Plan that omits at least one layer.
            vocabulary: Ids to compute logits for. Ignored if the head is no plain ``nn.Linear``.
        """
        self.model, self.plan, self.parts = model, plan, find_decoder_modules(model)
        self.head = model.get_output_embeddings()
        plain = type(self.head) is nn.Linear and self.head.weight.is_floating_point()
        self.vocabulary = vocabulary if plain else None
        self._first = plan.omit[0]
        if self.vocabulary is not None:
            self._rows = self.head.weight.detach()[self.vocabulary]
            self._bias = None if self.head.bias is None else self.head.bias.detach()[self.vocabulary]

    def shortest_prompt(self, ids: Tensor, answer: int) -> int:
        """Return the shortest prompt that sequences [batch, T] are split after: half a text, or all before an answer.

        A split leaves ``Example.rows`` tokens after it, and a context row before the boundary rows.
        """
        if answer:
            return ids.shape[1] - answer
        longest = ids.shape[1] - count_continuation(ids)
        return min(longest, max(self.plan.boundary + 1, longest // 2))

    @contextmanager
    def recording(self, ids: Tensor, answer: int = 0) -> Iterator[list[Example]]:
        """Record a forward of the full model inside the block: the yielded list then holds its example.

        Args:
            ids: Sequences that the forward runs, int64 [batch, T].
            answer: As for ``Example``.
        """
        length = ids.shape[1]
        kept = length - self.shortest_prompt(ids, answer) + 1
        found: list[Example] = []
        with recorded_states(self.parts, [self._first], kept) as states:
            yield found
        found.append(Example(ids, states[self._first], states[FINAL], answer))

    @torch.no_grad()
    def teacher_logits(self, example: Example, start: int, rows: int) -> Tensor:
        """Return the full model's logits of ``rows`` rows from row ``start`` on, [batch, rows, vocabulary] float32."""
        begin = start - (example.ids.shape[1] - example.final.shape[1])
        states = example.final[:, begin : begin + rows].to(example.ids.device)
        with self._layers_return(len(self.parts.layers), states):
            return self._call(example.ids[:, start : start + rows], start, None, rows)

    def logits(self, example: Example, prompt: int, rows: int, matrices: Mapping[int, Tensor] | None) -> Tensor:
        """Return the logits that predict the ``rows`` tokens after a pruned prompt.

        Args:
            example: Sequences of more than ``prompt + rows - 1`` tokens.
            prompt: Length of the prompt, > the plan's boundary.
            rows: Number of tokens to predict.
            matrices: Omitted layer -> ``[2 * kv_dim, hidden]``, as in ``Projections``. In float32 they may be masters
                of a model in another dtype. None for the layers' own weights.

        Returns:
            [batch, rows, vocabulary] float32.
        """
        return self.logits_after(
            example, [(prompt - self.plan.boundary, self.plan.boundary + rows - 1)], rows, matrices
        )

    def logits_after(
        self, example: Example, calls: Sequence[tuple[int, int]], rows: int, matrices: Mapping[int, Tensor] | None
    ) -> Tensor:
        """Return the logits of the last rows of several calls, each over the cache of those before.

        Args:
            example: Sequences of at least as many tokens as all calls together.
            calls: For each call, at least one, the number of context rows, which may be 0, and of the rows after them
                at full depth, > 0.
            rows: Number of rows of the last call, at full depth, whose logits are returned.
            matrices: As for ``logits``.

        Returns:
            [batch, rows, vocabulary] float32.
        """
        projections = None if matrices is None else SimpleNamespace(matrices=matrices)
        plan = SimpleNamespace(omit=self.plan.omit, projections=projections)
        cache, entry, ids = DynamicCache(), example.entry.to(example.ids.device), example.ids
        stop, logits = 0, entry[:, :0]
        for number, (context, full) in enumerate(calls):
            begin, start, stop = stop, stop + context, stop + context + full
            largest = torch.tensor(stop - 1, device=ids.device)
            with rope_seen_up_to(self.parts.rotary, largest):
                if context:
                    with (
                        omitted_layers(self.parts.layers, plan),
                        self._layers_return(self._first, entry[:, begin:start]),
                    ):
                        self.parts.decoder(
                            input_ids=ids[:, begin:start],
                            **self._places(ids, begin, start),
                            **with_cache(self.parts.decoder, cache),
                        )
                    self._skip(cache, entry, context)
                with self._layers_return(self._first, entry[:, start:stop]):
                    keep = rows if number == len(calls) - 1 else 1
                    logits = self._call(ids[:, start:stop], start, cache, keep)
                self._skip(cache, entry, full)
        return logits

    def _skip(self, cache: DynamicCache, entry: Tensor, rows: int) -> None:
        """Add rows to the layers before the first omitted one: nobody reads them, but masks follow their length."""
        nothing = entry.new_zeros(len(entry), 1, rows, 1)
        for layer in range(self._first):
            cache.update(nothing, nothing, layer)

    @contextmanager
    def _layers_return(self, count: int, states: Tensor) -> Iterator[None]:
        """Replace the first ``count`` layers inside the block, so that they return ``states``."""
        with ExitStack() as stack:
            for layer in list(self.parts.layers)[:count]:
                stack.enter_context(replaced_forward(layer, lambda *_, **__: states, forward_attribute(layer)))
            yield

    def _places(self, ids: Tensor, start: int, stop: int) -> dict[str, Any]:
        return {
            "attention_mask": torch.ones(len(ids), stop, dtype=torch.long, device=ids.device),
            "position_ids": torch.arange(start, stop, device=ids.device)[None].expand(len(ids), -1),
            "use_cache": True,
            "return_dict": True,
        }

    def _call(self, ids: Tensor, start: int, cache: DynamicCache | None, keep: int) -> Tensor:
        """Run the stock model on rows from ``start`` on over a cache, and return the last ``keep`` logits."""
        call = {"input_ids": ids, **self._places(ids, start, start + ids.shape[1])}
        if cache is None:
            call["attention_mask"], call["use_cache"] = None, False
        with ExitStack() as stack:
            if self.vocabulary is not None:
                stack.enter_context(replaced_forward(self.head, self._head_rows, forward_attribute(self.head)))
            if has_wrapper(self.model, self.parts):
                states = self.parts.decoder(**call, **with_cache(self.parts.decoder, cache)).last_hidden_state
                return self.head(states[:, -keep:]).float()
            forward = type(self.model).forward
            return forward(self.model, **call, **with_cache(self.model, cache), logits_to_keep=keep).logits.float()

    def _head_rows(self, states: Tensor) -> Tensor:
        return nn.functional.linear(states, self._rows, self._bias)


@torch.no_grad()
def record_examples(model: Any, students: Sequence[Student], ids: Tensor, answer: int = 0) -> list[Example]:
    """Run the full model over sequences once, and return what each student needs of them.

    Args:
        model: Stock model inside ``stock_evaluation``, that of the students.
        students: Students of any plans.
        ids: int64 [batch, T].
        answer: As for ``Example``.
    """
    with ExitStack() as stack:
        found = [stack.enter_context(student.recording(ids, answer)) for student in students]
        if students:
            find_decoder_modules(model).decoder(input_ids=ids, use_cache=False)
    return [example for (example,) in found]
