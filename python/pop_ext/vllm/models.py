"""vLLM's models with pruned prefills.

A step without context rows (decoding, verification of drafts, a prompt that the boundary covers) runs in vLLM's own
forward, compiled and from graphs as always. A step that prefills calls the same layers one by one here.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.forward_context import ForwardContext, get_forward_context, override_forward_context
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM

from pop_ext.vllm.attention import boundary_backend
from pop_ext.vllm.projection import RunProjection
from pop_ext.vllm.settings import engine_boundary, engine_plan


class PrunedPrefill(torch.nn.Module):
    """Mix-in that prunes the prefills of a vLLM model; it comes before the model's class among the bases."""

    model: Any
    pop_runs: tuple[range, ...]
    pop_projections: Any

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", **more: Any) -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, **more)
        plan = engine_plan(vllm_config)
        boundary = engine_boundary(vllm_config, plan)
        layers = self.model.layers
        self.pop_runs = plan.projected_runs
        self.pop_projections = torch.nn.ModuleList(
            RunProjection([layers[number] for number in run], run.start, plan.projections) for run in self.pop_runs
        )
        attentions = [layers[number].self_attn.attn for run in self.pop_runs for number in run]
        for attention in attentions:
            attention.attn_backend = boundary_backend(attention.attn_backend, boundary, plan.min_tokens)
        self._run_layer_names = [attention.layer_name for attention in attentions]

    def load_weights(self, weights: Any) -> Any:
        if any(projection.folded for projection in self.pop_projections):
            raise RuntimeError(
                "weights: expected to be loaded once, before an engine with pruned prefills runs, got others: "
                "start a new engine"
            )
        return super().load_weights(weights)  # type: ignore[misc]

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        **more: Any,
    ) -> torch.Tensor:
        context = get_forward_context()
        # Profiling and warm-up runs of the engine have no attention metadata.
        described = context.attn_metadata
        rows = getattr(described[self._run_layer_names[0]], "boundary", None) if described else None
        if rows is None:
            return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds, **more)
        if more:
            raise ValueError(
                f"model: expected tokens or their embeddings alone in a pruned prefill, got {sorted(more)}"
            )
        # The prefill writes into hidden_states; inputs_embeds is a buffer of the engine.
        hidden_states = self.model.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds.clone()
        return self._prefill(hidden_states, positions, rows, context)

    def _prefill(
        self, hidden_states: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor, context: ForwardContext
    ) -> torch.Tensor:
        """Run the layers, and return ``[rows of the step, hidden_size]`` after the final norm.

        Context rows are NaN: no plan computes them in the last layer, which needs only their K and V.

        Args:
            hidden_states: ``[rows of the step, hidden_size]`` embeddings; overwritten.
            positions: ``[rows of the step]``.
            rows: ``[boundary rows]``, their indices in the step.
            context: the engine's context of the step.
        """
        layers, of_boundary = self.model.layers, _context_of(context, self._run_layer_names, rows)
        boundary_positions = positions[rows]
        residual: Any = None
        next_layer = 0
        for run, projection in zip(self.pop_runs, self.pop_projections, strict=True):
            for layer in layers[next_layer : run.start]:
                hidden_states, residual = layer(positions, hidden_states, residual)
            stream = hidden_states if residual is None else hidden_states + residual
            projection.write(stream, positions, context.slot_mapping)
            hidden_states, residual = stream[rows], None
            with override_forward_context(of_boundary):
                for number in run:
                    hidden_states, residual = layers[number](boundary_positions, hidden_states, residual)
            next_layer = run.stop
            if next_layer < len(layers):
                stream[rows] = hidden_states + residual
                hidden_states, residual = stream, None
        hidden_states, _ = self.model.norm(hidden_states, residual)
        out = hidden_states.new_full((len(positions), hidden_states.shape[-1]), torch.nan)
        out[rows] = hidden_states
        return out


def _context_of(context: ForwardContext, names: list[str], rows: torch.Tensor) -> ForwardContext:
    """Restrict the cache slots of the layers ``names`` in an engine's context to the boundary rows."""
    taken: dict[int, torch.Tensor] = {}  # layers of a group share a tensor of slots
    slots = dict(context.slot_mapping)
    for name in names:
        slot = slots[name]
        if id(slot) not in taken:
            taken[id(slot)] = slot[rows]
        slots[name] = taken[id(slot)]
    return replace(context, slot_mapping=slots, cudagraph_runtime_mode=CUDAGraphMode.NONE, batch_descriptor=None)


class POPLlamaForCausalLM(PrunedPrefill, LlamaForCausalLM):
    """vLLM's Llama with pruned prefills."""


class POPMistralForCausalLM(PrunedPrefill, MistralForCausalLM):
    """vLLM's Mistral with pruned prefills."""


class POPQwen2ForCausalLM(PrunedPrefill, Qwen2ForCausalLM):
    """vLLM's Qwen2 and Qwen2.5 with pruned prefills."""


class POPQwen3ForCausalLM(PrunedPrefill, Qwen3ForCausalLM):
    """vLLM's Qwen3 with pruned prefills."""
