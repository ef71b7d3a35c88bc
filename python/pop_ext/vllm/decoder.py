"""Prune the prefills of a loaded vLLM model.

The model's decoder keeps its own forward for steps without context rows: decoding, verification of drafts, prompts that
the boundary covers. A step with context rows runs the same layers as stages, and projects K and V of each omitted run.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.distributed.parallel_state import get_pp_group
from vllm.forward_context import (
    ForwardContext,
    get_forward_context,
    is_forward_context_available,
    override_forward_context,
)
from vllm.model_executor.layers.linear import LinearBase, QKVParallelLinear

from pop_ext.plans.plan import Plan
from pop_ext.vllm.adapters import Adapters
from pop_ext.vllm.attention import REQUESTS, boundary_backend
from pop_ext.vllm.counters import count_declined, count_step
from pop_ext.vllm.projection import RunProjection, attention_of
from pop_ext.vllm.stages import Stage, find_decoder, handed_on, layers_of, local_layers, shallow_copy, tensors_of


def prune(model: Any, vllm_config: VllmConfig, plan: Plan, boundary: int) -> PrunedPrefill:
    """Prune the prefills of a loaded model.

    Args:
        model: A model of vLLM, its weights loaded and processed.
        vllm_config: The engine's configuration.
        plan: Plan of this model.
        boundary: How many last rows of a chunk run at full depth.

    Raises:
        ValueError: Names what the model has and pruning does not support; the model is as it was.
    """
    decoder = find_decoder(model)
    deep = model.deepstack_num_level if getattr(model, "use_deepstack", False) else 0
    first = min((number for run in plan.projected_runs for number in run), default=plan.num_layers)
    if first < deep:
        raise ValueError(
            f"plan: expected to omit no layer before {deep} of {type(model).__name__}, which adds image features "
            f"there, got {first}"
        )
    found = PrunedPrefill(decoder, vllm_config, plan)
    for attention in found.attentions:
        attention.attn_backend = boundary_backend(attention.attn_backend, boundary, plan.min_tokens)
    cls: Any = type(decoder)
    plain = cls.__call__

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        return found.run(functools.partial(plain, self), args, kwargs)

    members = {"__call__": __call__, "__module__": cls.__module__, "pruned_prefill": found}
    decoder.__class__ = type(f"Pruned{cls.__name__}", (cls,), members)
    _watch_weights(model, found)
    return found


@dataclass(frozen=True)
class Part:
    """A stage of a pruned prefill.

    Attributes:
        stage: The stage.
        projection: Of an omitted run: its K and V; its stage runs boundary rows only. None for retained layers.
    """

    stage: Stage
    projection: RunProjection | None = None


class PrunedPrefill:
    """Runs the steps of one decoder.

    Args:
        decoder: The decoder (``find_decoder``).
        vllm_config: The engine's configuration.
        plan: Plan of the model.

    Attributes:
        parts: The stages, in their order.
        attentions: Attention objects of the omitted layers on this rank.
        stale: True if weights were loaded after folding.
        skipped: Share of the products of this rank's layers that context rows skip, attention scores left out.
    """

    def __init__(self, decoder: Any, vllm_config: VllmConfig, plan: Plan) -> None:
        self.stale = False
        self._warm = False
        self._has_adapters = vllm_config.lora_config is not None
        self._adapters: Adapters | None = None
        self._signature = inspect.signature(type(decoder).forward)
        if "positions" not in self._signature.parameters:
            raise ValueError(
                f"model: expected a decoder that takes positions, got {type(decoder).__name__} with "
                f"{', '.join(self._signature.parameters)}"
            )
        # A size of 1 would be compiled as a constant.
        self._rows_at_warm_up = max(2, vllm_config.scheduler_config.max_num_seqs)
        decoder = shallow_copy(decoder)  # keeps its class, whatever the decoder's becomes
        group, here = get_pp_group(), local_layers(decoder)
        self._is_last_rank = group.is_last_rank
        self._counts = group.is_last_rank and get_tensor_model_parallel_rank() == 0  # all ranks run the same steps
        layers = layers_of(decoder)
        runs = [range(max(run.start, here.start), min(run.stop, here.stop)) for run in plan.projected_runs]
        runs = [run for run in runs if len(run)]
        hidden_size = vllm_config.model_config.get_hidden_size()

        def stage(start: int, stop: int, kind: str, compiled: bool = True) -> Stage:
            first = group.is_first_rank and start == here.start and kind == "all"
            last = group.is_last_rank and stop == here.stop
            config = vllm_config if compiled else None
            return Stage(decoder, start, stop, first, last, config, f"pop_{kind}_{start}_{stop}")

        def own_modules(number: int, positions: torch.Tensor, tensors: dict[str, Any]) -> None:
            single = singles.get(number)
            if single is None:
                single = singles[number] = stage(number, number + 1, "single", compiled=False)
            single(None, positions, handed_on(tensors), None)

        singles: dict[int, Stage] = {}
        self._names = _names_handed_on(decoder, vllm_config)
        self.parts: list[Part] = []
        self.attentions: list[Any] = []
        at = here.start
        for run in runs:
            if at < run.start or (group.is_first_rank and at == here.start == run.start):
                self.parts.append(Part(stage(at, run.start, "all")))
            named = [(number, layers[number], attention_of(layers[number], number)) for number in run]
            self.attentions += [attention for _, _, attention in named]
            residual = "residual" in self._names
            projection = RunProjection(named, hidden_size, residual, plan.projections, own_modules)
            self.parts.append(Part(stage(run.start, run.stop, "boundary"), projection))
            at = run.stop
        if at < here.stop:
            self.parts.append(Part(stage(at, here.stop, "all")))
        self._omitted = {attention.layer_name for attention in self.attentions}
        self._omitted_layers = [layers[number] for run in runs for number in run]
        costs = {number: _products(layers[number]) for number in here}
        skipped = sum(cost - kv for number, (cost, kv) in costs.items() if any(number in run for run in runs))
        self.skipped = skipped / max(1, sum(cost for cost, _ in costs.values()))

    @property
    def projections(self) -> list[RunProjection]:
        """The projection of each omitted run on this rank."""
        return [part.projection for part in self.parts if part.projection is not None]

    def run(self, plain: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Run a step: by the decoder's own forward, unless it has context rows.

        Args:
            plain: The decoder's own call.
            args: Its arguments.
            kwargs: Its named arguments.
        """
        if not self.attentions or not is_forward_context_available():
            return plain(*args, **kwargs)
        context = get_forward_context()
        described = context.attn_metadata
        if not described:  # a run of the engine without requests
            if not self._warm and context.cudagraph_runtime_mode == CUDAGraphMode.NONE:
                self._warm_up(args, kwargs, context)
            return plain(*args, **kwargs)
        if isinstance(described, list):
            described = described[0]
        metadata = described.get(self.attentions[0].layer_name)
        rows = getattr(metadata, "boundary", None)
        if rows is None:
            if REQUESTS.declined and self._counts:
                count_declined()
            return plain(*args, **kwargs)
        if self.stale:
            for projection in self.projections:
                projection.refold()
            self.stale = False
        if self._counts:
            count_step(metadata.step_tokens, len(rows))
        return self._prefill(rows, context, self._arguments(args, kwargs))

    def _arguments(self, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
        bound = self._signature.bind(None, *args, **kwargs).arguments
        bound.pop("self")
        for name, kind in self._signature.parameters.items():
            if kind.kind is inspect.Parameter.VAR_KEYWORD:
                bound.update(bound.pop(name, {}))
        return bound

    def _warm_up(self, args: Sequence[Any], kwargs: dict[str, Any], context: ForwardContext) -> None:
        """Compile the stages, and take the memory of a prefill, while the engine measures how much it needs."""
        self._warm = True
        given = self._arguments(args, kwargs)
        count = given["positions"].shape[-1]
        rows = torch.arange(min(count, self._rows_at_warm_up), device=given["positions"].device)
        self._prefill(rows, context, given)

    def _prefill(self, rows: torch.Tensor, context: ForwardContext, given: dict[str, Any]) -> Any:
        """Run the stages; return what the decoder returns.

        Rows of the last layer's output that no one computed, those of context rows, are NaN.

        Args:
            rows: ``[boundary rows]``, their indices in the step.
            context: The engine's context of the step.
            given: Arguments of the decoder.
        """
        # Compiled code of a stage is called for row counts that no graph was captured for. Where vLLM hands layer names
        # of experts to compiled code by a counter of the step, a stage would take those of another.
        whole = replace(context, cudagraph_runtime_mode=CUDAGraphMode.NONE, batch_descriptor=None, all_moe_layers=None)
        adapters = self._find_adapters()
        of_boundary = _context_of(whole, self._omitted, rows)
        positions = given.pop("positions")
        incoming = given.pop("intermediate_tensors", None)
        state: dict[str, Any] = {} if incoming is None else {k: v.clone() for k, v in tensors_of(incoming).items()}
        boundary_positions = positions[..., rows]
        out: Any = None
        for part in self.parts:
            stage, projection = part.stage, part.projection
            if projection is None:
                with override_forward_context(whole):
                    out = stage(positions=positions, intermediate_tensors=_or_none(state), **given)
                given = {name: None if name in ("input_ids", "inputs_embeds") else v for name, v in given.items()}
                state = {} if torch.is_tensor(out) else self._with_residual(tensors_of(out), stage)
                continue
            slots: Any = context.slot_mapping
            projection.write(state, positions, slots, adapters is not None and adapters.active)
            with override_forward_context(of_boundary), nullcontext() if adapters is None else adapters.of_rows(rows):
                out = stage(
                    input_ids=None,
                    positions=boundary_positions,
                    intermediate_tensors=handed_on({name: tensor[rows] for name, tensor in state.items()}),
                    inputs_embeds=None,
                )
            if not torch.is_tensor(out):
                for name, tensor in tensors_of(out).items():
                    state[name][rows] = tensor
        if not self._is_last_rank:
            return handed_on(state)
        if self.parts[-1].projection is None:
            return out
        padded = out.new_full((positions.shape[-1], *out.shape[1:]), torch.nan)
        padded[rows] = out
        return padded

    def _find_adapters(self) -> Adapters | None:
        """Return the engine's adapter tables, which it makes after it has loaded the model; None: it has none."""
        if self._has_adapters and self._adapters is None:
            self._adapters = Adapters(self._omitted_layers)
        return self._adapters

    def _with_residual(self, tensors: dict[str, Any], stage: Stage) -> dict[str, Any]:
        """Return what a stage hands on with a residual, which some hand on as None, in tensors that may be written to.

        A stage without layers hands on the embeddings, a buffer of the engine: the residual of the next layer.
        """
        if "residual" not in tensors or tensors["residual"] is not None:
            return tensors
        hidden = tensors["hidden_states"]
        if not stage.layers and self.projections[0].adds_residual:
            return {**tensors, "hidden_states": torch.zeros_like(hidden), "residual": hidden.clone()}
        return {**tensors, "hidden_states": hidden.clone(), "residual": torch.zeros_like(hidden)}


def _products(layer: torch.nn.Module) -> tuple[int, int]:
    """Return the multiplications of a decoder layer's weights for one row, and those for its K and V among them."""
    total = kv = 0
    modules: list[Any] = list(layer.modules())
    for module in modules:
        if isinstance(module, LinearBase):
            total += module.input_size * module.output_size
            if isinstance(module, QKVParallelLinear):
                kv += module.input_size * 2 * module.total_num_kv_heads * module.head_size
        elif hasattr(module, "top_k") and hasattr(module, "intermediate_size_per_partition"):  # experts
            ranks = getattr(module, "tp_size", 1)
            total += module.top_k * 3 * module.hidden_size * module.intermediate_size_per_partition * ranks
    return total, kv


def _or_none(state: dict[str, Any]) -> Any:
    return handed_on(state) if state else None


def _names_handed_on(decoder: Any, vllm_config: VllmConfig) -> list[str]:
    """Return the names of the tensors that stages of a model hand on."""
    make = getattr(decoder, "make_empty_intermediate_tensors", None)
    if make is None:
        raise ValueError(
            f"model: expected one that can be several pipeline stages, got {type(decoder).__name__}, which cannot"
        )
    return list(make(1, vllm_config.model_config.dtype, torch.device("cpu")).tensors)


def _watch_weights(model: Any, found: PrunedPrefill) -> None:
    """Fold again after weights were loaded into a running engine."""
    load = model.load_weights

    def load_weights(*args: Any, **kwargs: Any) -> Any:
        found.stale = True
        return load(*args, **kwargs)

    model.load_weights = load_weights


def _context_of(context: ForwardContext, names: set[str], rows: torch.Tensor) -> ForwardContext:
    """Restrict the cache slots of the layers ``names`` in an engine's context to the boundary rows."""
    taken: dict[int, torch.Tensor] = {}  # layers of a group share a tensor of slots
    slots: dict[str, Any] = dict(context.slot_mapping)
    for name in names & slots.keys():
        slot = slots[name]
        if id(slot) not in taken:
            taken[id(slot)] = slot[rows]
        slots[name] = taken[id(slot)]
    return replace(context, slot_mapping=slots, is_padding=None)
