"""Decide whether a step of transformers' continuous batching is a prefill to prune.

``generate_batch`` and ``transformers serve`` call the model with the rows of several requests packed into one, and with
a cache whose pages all requests share. docs/serving-hf.md says which steps are pruned.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from pop_ext.hf.compat import NEW_CACHE_NAME, OLD_CACHE_NAME, parameters_of, text_config
from pop_ext.hf.decision import Decision, Decline, Products
from pop_ext.hf.rules import check_depth, check_forward, check_inference, check_output_flags, is_traced
from pop_ext.plans.plan import Plan

RULE = "continuous_batching"
_NEEDED = {"cu_seq_lens_q", "read_index", "write_index", "position_ids"}
_NO_GRAPH = (
    "CUDA graphs of prefills, which replay the rows of another step: pass "
    "ContinuousBatchingConfig(use_cuda_graph=(False, True)), which records decode steps alone"
)


@dataclass(frozen=True)
class PackedStep:
    """Represent a step that brings the chunk of at least one prompt.

    Attributes:
        arguments: of the model's ``forward`` by name, as continuous batching gives them.
        tokens: rows of each request. Those with one row decode, or end their prompt with it. Zero: no request, in a
            step that is padded for torch.compile or for CUDA graphs of decode steps.
        boundary: of these, the last rows that run at full depth.
    """

    arguments: dict[str, Any]
    tokens: tuple[int, ...]
    boundary: tuple[int, ...]

    def decision(self, name: str, plan: Plan, not_native: str, products: Products | None) -> Decision:
        """Return the decision that the backend of this name runs the step, with these 8-bit products."""
        tokens, boundary = (tuple(filter(None, counts)) for counts in (self.tokens, self.boundary))
        full = tokens == boundary
        reason = "a step of continuous batching" + (", every row at full depth" if full else "")
        reason = "the plan omits no layer" if not plan.omit else reason
        reason += f" (not native: {not_native})" if not_native else ""
        wanted = 1  # the last row of each request
        return Decision(name, "prefill", reason, False, plan, tokens, boundary, wanted, products)


def is_packed(arguments: dict[str, Any]) -> bool:
    """Return whether a call comes from transformers' continuous batching, by its cache."""
    return _pages(arguments) is not None


def read_step(model: nn.Module, plan: Plan, arguments: dict[str, Any], replaced: Any = None) -> PackedStep:
    """Read a step of continuous batching.

    Args:
        model: the enabled model.
        plan: what its prefills omit.
        arguments: of the call, by name.
        replaced: the forward that ``enable`` found on the instance, or None.

    Raises:
        Decline: The stock forward must run the step.
    """
    longest = arguments.get("max_length_q", arguments.get("max_seqlen_q"))
    if longest == 1 or arguments.get("block_table") is not None:
        raise Decline("decode", "one new token of each request: a decode step", declined=False)
    if is_traced():
        raise Decline("tracing", "tracing or export: the graph must be that of the stock forward", declined=False)
    config = text_config(model)
    check_depth(config, plan)
    check_forward(model, replaced)
    check_output_flags(model.config, arguments)
    missing = sorted(name for name in _NEEDED if arguments.get(name) is None)
    if missing or arguments.get("input_ids") is None:
        raise Decline(RULE, f"continuous batching of another version: expected {', '.join(missing or ['input_ids'])}")
    ids = arguments["input_ids"]
    check_inference(model, config, ids.device.type)
    if ids.is_cuda and torch.cuda.is_current_stream_capturing():
        raise Decline(RULE, _NO_GRAPH)
    bounds = arguments["cu_seq_lens_q"].tolist()
    tokens = tuple(end - begin for begin, end in pairwise(bounds))
    if (0 in tokens or bounds[-1] != ids.shape[1]) and _warms_up_a_graph(arguments):
        raise Decline(RULE, _NO_GRAPH)
    # Decided for each request by itself: the others of a step never change a result.
    boundary = tuple(t if t < plan.min_tokens else min(plan.boundary, t) for t in tokens)
    return PackedStep(_with_pages(model, arguments), tokens, boundary)


def _warms_up_a_graph(arguments: dict[str, Any]) -> bool:
    """Return whether a padded step is run once before it is recorded as a CUDA graph.

    transformers then rounds the lengths of the keys up, and otherwise leaves them.
    """
    lengths = arguments.get("max_length_k", arguments.get("max_seqlen_k"))
    bounds = arguments.get("cu_seq_lens_k")
    if not isinstance(lengths, dict) or not isinstance(bounds, dict):
        lengths, bounds = {"": lengths}, {"": bounds}
    return any(lengths[kind] != int(bounds[kind].diff().max()) for kind in lengths)


def _pages(arguments: dict[str, Any]) -> Any:
    """Return the paged cache of a call, or None."""
    caches = (arguments.get(name) for name in (OLD_CACHE_NAME, NEW_CACHE_NAME))
    module = "transformers.generation.continuous_batching"
    return next((cache for cache in caches if type(cache).__module__.startswith(module)), None)


def _with_pages(model: nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments with the paged cache under the name that continuous batching uses.

    ``bind_arguments`` renames it where the model's ``forward`` has an argument of this name.
    """
    given = dict(arguments)
    pages = _pages(given)
    if given.get(OLD_CACHE_NAME) is pages and NEW_CACHE_NAME in parameters_of(type(model).forward):
        del given[OLD_CACHE_NAME]
    return given | {NEW_CACHE_NAME: pages}
