"""Decide from the arguments of a ``forward`` call whether a pruned prefill can give the result that it asks for.

``check_prefill`` reads a call and changes nothing. It and the functions that it calls raise ``Decline`` with the rule
that a call breaks. docs/declined.md lists the rules.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicLayer

from pop_ext.hf.compat import parameters_of
from pop_ext.hf.decision import Decline
from pop_ext.hf.family import VisionSpec
from pop_ext.hf.kv_cache import check_cache, has_window, past_slots
from pop_ext.hf.masks import SLIDING_ATTENTION, LayerType, check_pattern, mask_layer_types, padding_mask
from pop_ext.hf.packing import PackedBatch, Spans, bidirectional_spans, pack_batch
from pop_ext.hf.patches import is_own_forward, is_patched_class
from pop_ext.plans.plan import Plan
from pop_ext.utils.tensors import check_layers, check_memory, in_transform, unusual_kind

# Arguments of forward that the rules and the native prefill take into account.
_READ = {
    "input_ids",
    "inputs_embeds",
    "attention_mask",
    "position_ids",
    "past_key_values",
    "logits_to_keep",
    "use_cache",
    "labels",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "return_dict",
    "is_causal",
}
_FLAGS = ("output_attentions", "output_hidden_states", "output_router_logits", "use_cache", "return_dict", "is_causal")
# Arguments that may be given but make no difference to a prefill. `generate` hands its own two tokenizers on.
_IGNORED = {"cache_position", "num_items_in_batch", "tokenizer", "assistant_tokenizer"}
# Arguments of transformers that switch something on, or bring the features of images.
_IGNORED_IF_EMPTY = {"debug_io", "mm_encoder_outputs"}
# Bounds of sequences packed into one row, for flash attention and for layers of other kinds.
_PACKING = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}


def check_prefill(
    model: nn.Module,
    config: Any,
    vision: VisionSpec | None,
    plan: Plan,
    arguments: dict[str, Any],
    replaced: Any = None,
    runs_stock_forward: bool = False,
) -> tuple[torch.Tensor | None, PackedBatch, Spans]:
    """Check that the arguments of a call ask for a prefill that may be pruned.

    Args:
        model: the enabled model.
        config: of its language model.
        vision: its vision wrapper, or None.
        plan: what its prefills omit.
        arguments: of the call, by name, the cache as ``past_key_values``.
        replaced: the forward that ``enable`` found on the instance, or None.
        runs_stock_forward: whether the backend hands the call to the forward of the model's class, so that arguments
            and caches which that forward takes are no reason to decline.

    Returns:
        The 2-D padding mask or None, the real new tokens, and the spans of them that attend to each other in both
        directions.

    Raises:
        Decline: The stock forward must run the call.
    """
    tensors = _tensors(arguments)
    tokens = _new_tokens(arguments)
    columns = tokens.shape[1]
    if columns == 1:
        raise Decline("decode", "one new token: a decode step, or a prompt of one token", declined=False)
    check_memory(tensors)
    check_layers(arguments.get("past_key_values"))
    if is_traced():
        raise Decline("tracing", "tracing or export: the graph must be that of the stock forward", declined=False)
    check_depth(config, plan)
    if arguments.get("labels") is not None:
        raise Decline("labels", "labels: a loss needs every row at full depth")
    too_many_logits = _check_logits_to_keep(
        arguments.get("logits_to_keep", 0), columns, arguments.get("past_key_values")
    )
    if too_many_logits is not None and not too_many_logits.declined:
        raise Decline(*too_many_logits)
    check_forward(model, replaced)
    taken = set(parameters_of(type(model).forward)) if runs_stock_forward else set()
    _check_outputs(model.config, taken if vision is None else taken | vision.arguments, arguments)
    check_inference(model, config, tokens.device.type)
    if in_transform():
        raise Decline("transform", "a transform of torch.func (vmap, jvp, ...): it does not reach into the native code")
    # Raised late: logits of all rows are also the default of forward, so a rule that a given argument breaks is the
    # more helpful reason.
    if too_many_logits is not None:
        raise Decline(*too_many_logits)
    if arguments.get("is_causal") is not None and not arguments["is_causal"]:  # a bool, after _check_outputs
        raise Decline("attention", f"is_causal={arguments['is_causal']}: a pruned prefill is causal")
    for name, causal in {"is_causal": True, "use_bidirectional_attention": False}.items():
        found = getattr(config, name, None)
        if runs_stock_forward and found == "vision":  # images alone: the stock masks say so
            continue
        if found is not None and bool(found) is not causal:
            raise Decline("attention", f"config.{name}={found}: a pruned prefill is causal")
    _check_cache(config, arguments.get("past_key_values"), runs_stock_forward)
    mask, packed, types = _check_mask(config, tokens, arguments)
    spans = [] if vision is None else _check_spans(vision, arguments, packed)
    try:
        check_pattern(arguments.get("attention_mask"), mask, spans, columns, packed.past_slots, types)
    except ValueError as error:
        raise Decline("mask", str(error)) from error
    positions = _text_positions(vision, arguments)
    if not (runs_stock_forward and isinstance(positions, torch.Tensor) and positions.ndim == 3):
        _check_positions(positions, tokens, arguments.get("attention_mask") is None)
    keep, short = arguments["logits_to_keep"], min(packed.tokens)
    if keep > short:
        raise Decline(
            "logits_to_keep",
            f"logits_to_keep={keep}: a sequence has only {short} new tokens; "
            "the stock forward returns logits of padding for the others",
        )
    return mask, packed, spans


def _tensors(arguments: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return the tensors of a call by name, those of a dict of masks included. Decline a call with unusual ones."""
    found = {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    masks = arguments.get("attention_mask")
    if isinstance(masks, dict):
        found |= {f"attention_mask[{name!r}]": m for name, m in masks.items() if isinstance(m, torch.Tensor)}
    for name, tensor in found.items():
        unusual = unusual_kind(tensor)
        if unusual is not None:
            raise Decline("inputs", f"{name}: expected a dense tensor, got {unusual}")
    return found


def is_traced() -> bool:
    """Return whether ``torch.export`` or ``torch.jit.trace`` records the call. ``torch.compile`` does not count."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


def check_depth(config: Any, plan: Plan) -> None:
    """Decline calls while fewer layers are set than the plan was made for: the drafts of speculative decoding."""
    if config.num_hidden_layers != plan.num_layers:
        # Not reported under strict either: after an exception transformers would not restore the config.
        raise Decline(
            "early_exit",
            f"config.num_hidden_layers={config.num_hidden_layers} instead of {plan.num_layers}: "
            "the call drafts tokens by early exit (assistant_early_exit)",
            declined=False,
        )


def _new_tokens(arguments: dict[str, Any]) -> torch.Tensor:
    """Return the padded ids ``[batch, columns]`` or embeddings ``[batch, columns, hidden_size]`` of a call."""
    ids, embeds = arguments.get("input_ids"), arguments.get("inputs_embeds")
    if (ids is None) == (embeds is None):
        raise Decline("inputs", "expected exactly one of input_ids and inputs_embeds")
    tokens = embeds if ids is None else ids
    if not isinstance(tokens, torch.Tensor) or tokens.ndim != (3 if ids is None else 2):
        found = f"a tensor of shape {list(tokens.shape)}" if isinstance(tokens, torch.Tensor) else type(tokens).__name__
        expected = (
            "input_ids: expected a tensor [batch, tokens]"
            if embeds is None
            else "inputs_embeds: expected a tensor [batch, tokens, hidden_size]"
        )
        raise Decline("inputs", f"{expected}, got {found}")
    if 0 in tokens.shape[:2]:
        raise Decline("inputs", f"input_ids or inputs_embeds: expected at least one token, got {list(tokens.shape)}")
    if tokens.device.type == "meta":
        raise Decline("inputs", "input_ids or inputs_embeds: expected a tensor with data, got one on the meta device")
    return tokens


class _Reason(NamedTuple):
    """Arguments of a ``Decline``. An exception kept in a variable of the frame that raises it would be a cycle."""

    rule: str
    reason: str
    declined: bool


def _check_logits_to_keep(keep: Any, columns: int, cache: Any) -> _Reason | None:
    """Return the reason to decline if logits of every row are requested, else None.

    Args:
        keep: ``logits_to_keep`` of the call.
        columns: new columns of the call.
        cache: ``past_key_values`` of the call, or None.
    """
    if not isinstance(keep, int) or isinstance(keep, bool):  # the stock forward takes an int of NumPy for an index
        found = "a tensor of indices" if isinstance(keep, torch.Tensor) else f"a {type(keep).__name__}"
        return _Reason("logits_to_keep", f"logits_to_keep is {found}: expected a number of last rows, an int", True)
    if 0 < keep < columns:
        return None
    rows = "all" if keep == 0 or keep >= columns else "other than the last"
    reason = f"logits_to_keep={keep}: logits of {rows} rows are requested, so every row needs full depth"
    if keep == 0:
        reason += "; logits_to_keep=1 asks for the last row's, pop_ext.score scores continuations"
    # Speculative decoding verifies its candidates by such calls on a filled cache.
    cached = past_slots(cache) if hasattr(cache, "get_seq_length") else 0
    verification = rows == "all" and bool(cached > 0)
    return _Reason("verification" if verification else "logits_to_keep", reason, not verification)


def check_forward(model: nn.Module, replaced: Any) -> None:
    """Decline every call of a model whose own ``forward`` is not that of transformers: it may know other arguments."""
    cls = type(model)
    if is_patched_class(cls):
        raise Decline(
            "model",
            f"a replaced forward of {cls.__name__}, from {cls.forward.__module__}: "
            "it may do more than transformers' own",
        )
    if not (replaced is None or is_own_forward(model, replaced)):
        raise Decline("model", "a replaced forward, set before enable: it may do more than transformers' own")


def _check_outputs(config: Any, taken: Collection[str], arguments: dict[str, Any]) -> None:
    """Decline a call that asks for outputs which a pruned prefill does not compute, or gives unknown arguments.

    Args:
        config: of the model.
        taken: names of arguments that the backend takes, besides those of every prefill.
        arguments: of the call.
    """
    for name in _FLAGS:
        flag = arguments.get(name)
        if hasattr(flag, "__array__"):  # a tensor or an array has no truth value
            raise Decline("arguments", f"{name}: expected a bool, got a {type(flag).__name__}")
    check_output_flags(config, arguments)
    use_cache = arguments.get("use_cache")
    if not (use_cache if use_cache is not None else getattr(config, "use_cache", True)):
        raise Decline("use_cache", "use_cache=False: a pruned prefill is useful only if its KV cache is kept")
    known = (_READ | _IGNORED).union(taken) - _PACKING
    given = {name for name, value in arguments.items() if value is not None}
    unknown = sorted(given - known - {name for name in _IGNORED_IF_EMPTY & given if not arguments[name]})
    packing = [name for name in unknown if name in _PACKING]
    if packing:
        raise Decline(
            "arguments", f"{', '.join(packing)}: expected padded sequences, got bounds of sequences packed into one row"
        )
    if unknown:
        raise Decline("arguments", f"arguments that a pruned prefill does not know: {', '.join(unknown)}")


def check_output_flags(config: Any, arguments: dict[str, Any]) -> None:
    """Decline a call that asks for outputs which context rows do not have."""
    for name in ("output_attentions", "output_hidden_states", "output_router_logits"):
        requested = arguments.get(name)
        if requested if requested is not None else getattr(config, name, False):
            raise Decline(name, f"{name}: context rows have no such outputs in omitted layers")


def check_inference(model: nn.Module, config: Any, device: str) -> None:
    """Decline a call that needs a backward, autocast, dropout or gradient checkpointing."""
    if torch.is_grad_enabled():
        raise Decline("grad", "grad mode: a pruned prefill has no backward; use torch.no_grad() or model.generate()")
    if torch.is_autocast_enabled(device):
        raise Decline("autocast", "autocast: a pruned prefill computes in the dtype of the weights")
    if model.training:
        dropouts = ("attention_dropout", "resid_pdrop", "embd_pdrop")
        if any(getattr(config, name, 0.0) for name in dropouts):
            raise Decline("training", "training mode with dropout: call model.eval()")
        if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
            raise Decline("training", "training mode with gradient checkpointing keeps no cache: call model.eval()")


def _check_cache(config: Any, cache: Any, runs_stock_forward: bool) -> None:
    """Decline a cache that the backend cannot fill."""
    if cache is None:
        return
    if runs_stock_forward:
        # A class of its own may do more in an update than its layers do.
        own = type(cache).__module__.startswith("transformers.")
        if not (isinstance(cache, Cache) and own and hasattr(cache, "layers")):
            found = type(cache).__name__
            raise Decline("cache", f"past_key_values: expected a cache of transformers, got {found}")
    else:
        try:
            check_cache(cache, config.num_hidden_layers)
        except (ValueError, TypeError) as error:
            raise Decline("cache", str(error)) from error
    # Compressed caches may keep a different number of positions in each layer (PyramidKV).
    held = {int(layer.get_seq_length()) for layer in cache.layers if type(layer) is DynamicLayer} - {0}
    if len(held) > 1:
        raise Decline("cache", f"past_key_values: expected equally many positions in all layers, got {sorted(held)}")


def _check_mask(
    config: Any, tokens: torch.Tensor, arguments: dict[str, Any]
) -> tuple[torch.Tensor | None, PackedBatch, list[LayerType]]:
    """Find the real tokens of a call from its mask. The cache is a checked one.

    The caller must still check that the mask does nothing but mark padding (``check_pattern``).

    Returns:
        The 2-D padding mask or None, the real new tokens, and the layer types of the model.
    """
    batch, columns = tokens.shape[:2]
    cache = arguments.get("past_key_values")
    past = past_slots(cache)
    types = mask_layer_types(config, cache, columns)
    try:
        mask = padding_mask(arguments.get("attention_mask"), batch, columns, past, types)
        packed = pack_batch(batch, columns, past, mask, tokens.device)
    except (ValueError, TypeError) as error:
        raise Decline("mask", str(error)) from error
    if packed.ends_with_padding():
        raise Decline(
            "right_padding",
            "the last column is masked (right padding): the stock forward returns logits of padding there",
        )
    window = any(layer_type.name == SLIDING_ATTENTION for layer_type in types)
    window = window or (cache is not None and has_window(cache))
    if packed.slot_table is not None and window:
        raise Decline(
            "mask",
            "attention_mask: expected consecutive real tokens in every sequence of a sliding-window model, got holes "
            "(the stock window counts masked slots, too)",
        )
    return mask, packed, types


def _check_spans(vision: VisionSpec, arguments: dict[str, Any], packed: PackedBatch) -> Spans:
    """Return the new tokens that attend to each other in both directions.

    Over a filled cache the argument must cover the cached columns, too: the stock mask reads its first column as that
    of the cache's first slot.
    """
    name = vision.spans_argument or ""
    try:
        spans = bidirectional_spans(name, arguments.get(name), packed)
    except (ValueError, TypeError) as error:
        raise Decline(name, str(error)) from error
    if spans and arguments[name].shape[1] == packed.columns and packed.past_slots > 0:
        raise Decline(
            name,
            f"{name}: expected {packed.past_slots + packed.columns} columns (cached and new), got {packed.columns}; "
            "the stock mask would take the first of them for the first slot of the cache",
        )
    return spans


def _text_positions(vision: VisionSpec | None, arguments: dict[str, Any]) -> Any:
    """Return the text positions ``[batch, columns]`` of a call.

    Positions with three axes (time, height and width) include none of text. Of four axes the first is that of text.

    Returns:
        ``position_ids`` as given where it has no such axes; None if the call gives no text positions.
    """
    positions: Any = arguments.get("position_ids")
    mrope = vision is not None and vision.uses_mrope and isinstance(positions, torch.Tensor) and positions.ndim == 3
    if not mrope:
        return positions
    return None if len(positions) == 3 else positions[0]


def _check_positions(positions: Any, tokens: torch.Tensor, without_mask: bool) -> None:
    """Decline positions of a wrong form, and those that may mark several sequences packed into one row."""
    if positions is None:
        return
    batch, columns = tokens.shape[:2]
    if not isinstance(positions, torch.Tensor) or tuple(positions.shape) not in ((batch, columns), (1, columns)):
        found = f"one of {list(positions.shape)}" if isinstance(positions, torch.Tensor) else type(positions).__name__
        raise Decline("position_ids", f"position_ids: expected a tensor of [{batch} or 1, {columns}], got {found}")
    if positions.dtype not in (torch.int64, torch.int32):
        raise Decline("position_ids", f"position_ids: expected int64 or int32, got {positions.dtype}")
    if positions.device != tokens.device:
        raise Decline("position_ids", f"position_ids: expected device {tokens.device}, got {positions.device}")
    if without_mask and bool((positions.diff(dim=-1) != 1).any()):
        raise Decline(
            "position_ids",
            "position_ids: expected steps of one in a call without attention_mask, got others "
            "(several sequences may be packed into one)",
        )
