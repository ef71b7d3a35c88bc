"""What a fit reads of a model: K, V and hidden states of calibration rows, summed up into the moments of each run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from pop_ext import reference
from pop_ext.hf.modules import find_parts
from pop_ext.hf.restore import replaced_forward
from pop_ext.methods.calibration import Batches, checked, hidden_states_of
from pop_ext.methods.ridge import RunMoments
from pop_ext.plans.plan import Plan
from pop_ext.plans.projections import key_value_weights, normalize_unweighted

HOLD_EVERY = 8
"""Of the batches' sequences every eighth is held out to choose lambda by, of fewer the last one, where no ``holdout``
is given."""

CONTINUATION = 64
"""At most so many last tokens of a sequence stand for what follows a prompt; never more than a quarter of it. The loss
of a held-out sequence is of them, and it is their attention that weighs the rows before."""


def count_continuation(ids: Tensor) -> int:
    return max(1, min(CONTINUATION, ids.shape[1] // 4))


class MomentsReader:
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
                    stack.callback(self._watch_attention(index, count_continuation(ids)).remove)
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
            self._read_by[index] = normalize_unweighted(layer, hidden).flatten(0, 1)
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
    plain, normed = normalize_unweighted(layer, probe), exact(probe)
    gamma = normed[0] / plain[0]
    if not torch.allclose(plain[1] * gamma, normed[1], rtol=1e-3, atol=1e-4, equal_nan=True):
        raise ValueError(f"model: expected an RMSNorm before K and V, got {type(norm).__name__}")
    return (stacked * gamma).detach()
