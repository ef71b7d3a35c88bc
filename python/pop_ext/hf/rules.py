"""The rules by which the arguments of a ``forward`` call ask for a prefill that a pruned one can answer.

``check_prefill`` reads a call and changes nothing. Each function below it raises ``Decline`` where its rule is broken.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicLayer

from pop_ext.hf.architectures import Vision, vision_of
from pop_ext.hf.compat import text_config
from pop_ext.hf.decision import Decline
from pop_ext.hf.kv_cache import check_cache, has_window, past_slots
from pop_ext.hf.masks import SLIDING_ATTENTION, LayerKind, check_pattern, kinds_of, padding_mask
from pop_ext.hf.packing import PackedBatch, Spans, bidirectional_spans, is_int, pack_batch
from pop_ext.plans.plan import Plan

# Arguments of forward that the native prefill reads, and others that change nothing it does.
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
}
_HARMLESS = {"cache_position", "num_items_in_batch"}


def is_decode(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call brings one new token. Looks at shapes only, so that compilers can trace it."""
    tokens = kwargs.get("input_ids", args[0] if args else None)
    if tokens is None:
        tokens = kwargs.get("inputs_embeds")
    return isinstance(tokens, torch.Tensor) and tokens.ndim >= 2 and tokens.shape[1] == 1


def check_prefill(
    model: nn.Module, plan: Plan, arguments: dict[str, Any]
) -> tuple[torch.Tensor | None, PackedBatch, Spans]:
    config = text_config(model)
    tokens = _new_tokens(arguments)
    columns = tokens.shape[1]
    if columns == 1:
        raise Decline("decode", "one new token: a decode step, or a prompt of one token", declined=False)
    if config.num_hidden_layers != plan.num_layers:
        # No error under strict: transformers puts the config back only where all went well.
        raise Decline(
            "early_exit",
            f"the first {config.num_hidden_layers} of {plan.num_layers} layers are wanted: a draft by early exit",
            declined=False,
        )
    if arguments.get("labels") is not None:
        raise Decline("labels", "labels: a loss needs every row at full depth")
    rows = _too_many_rows(arguments.get("logits_to_keep", 0), columns, arguments.get("past_key_values"))
    if rows is not None and not rows.declined:
        raise rows
    _check_outputs(model, arguments)
    _check_inference(model, tokens.device.type)
    if rows is not None:  # all are wanted unless a call says otherwise: what it does say is the better reason
        raise rows
    if not getattr(config, "is_causal", True):
        raise Decline("attention", "config.is_causal=False: a pruned prefill is causal")
    vision = vision_of(model)
    mask, packed, kinds = _check_mask_and_cache(config, tokens, arguments)
    spans = [] if vision is None else _check_spans(vision, arguments, packed)
    try:
        check_pattern(arguments.get("attention_mask"), mask, spans, columns, packed.past_slots, kinds)
    except ValueError as error:
        raise Decline("mask", str(error)) from error
    _check_positions(_text_positions(vision, arguments), tokens, arguments.get("attention_mask") is None)
    keep, short = arguments["logits_to_keep"], min(packed.tokens)
    if keep > short:
        raise Decline(
            "logits_to_keep",
            f"logits_to_keep={keep}: a sequence has only {short} new tokens, the stock forward adds padding's logits",
        )
    return mask, packed, spans


def _new_tokens(arguments: dict[str, Any]) -> torch.Tensor:
    ids, embeds = arguments.get("input_ids"), arguments.get("inputs_embeds")
    if (ids is None) == (embeds is None):
        raise Decline("inputs", "expected exactly one of input_ids and inputs_embeds")
    tokens = embeds if ids is None else ids
    if not isinstance(tokens, torch.Tensor) or tokens.ndim != (3 if ids is None else 2):
        raise Decline("inputs", "input_ids or inputs_embeds is not a padded batch")
    if 0 in tokens.shape[:2]:
        raise Decline("inputs", f"input_ids or inputs_embeds: expected at least one token, got {list(tokens.shape)}")
    if tokens.device.type == "meta":
        raise Decline("inputs", "input_ids or inputs_embeds: expected a tensor with data, got one on the meta device")
    return tokens


def _too_many_rows(keep: Any, columns: int, cache: Any) -> Decline | None:
    """Why logits are not wanted of fewer rows than come; None: they are."""
    if not is_int(keep):
        found = "a tensor of indices" if isinstance(keep, torch.Tensor) else f"a {type(keep).__name__}"
        return Decline("logits_to_keep", f"logits_to_keep is {found}: expected a number of last rows, an int")
    if 0 < keep < columns:
        return None
    wanted = "all" if keep == 0 or keep >= columns else "other than the last"
    reason = f"logits_to_keep={keep}: logits of {wanted} rows are wanted, so every row needs full depth"
    # Speculative decoding verifies its candidates so.
    verification = wanted == "all" and bool(getattr(cache, "get_seq_length", int)() > 0)
    return Decline("verification" if verification else "logits_to_keep", reason, declined=not verification)


def _check_outputs(model: nn.Module, arguments: dict[str, Any]) -> None:
    """Whether nothing is wanted that a pruned prefill does not have."""
    config: Any = model.config
    for name in ("output_attentions", "output_hidden_states", "output_router_logits"):
        wanted = arguments.get(name)
        if wanted if wanted is not None else getattr(config, name, False):
            raise Decline(name, f"{name}: context rows have no such outputs in omitted layers")
    use_cache = arguments.get("use_cache")
    if not (use_cache if use_cache is not None else getattr(config, "use_cache", True)):
        raise Decline("use_cache", "use_cache=False: a pruned prefill is of use only with its cache")
    vision = vision_of(model)
    known = _READ | _HARMLESS | (vision.arguments if vision is not None else frozenset())
    unknown = sorted(name for name, value in arguments.items() if value is not None and name not in known)
    if unknown:
        raise Decline("arguments", f"arguments that the native prefill does not know: {', '.join(unknown)}")


def _check_inference(model: nn.Module, device: str) -> None:
    """Whether the stock forward would compute in the weights' dtype, without randomness and for no backward."""
    if torch.is_grad_enabled():
        raise Decline("grad", "grad mode: the native prefill has no backward; use torch.no_grad() or model.generate()")
    if torch.is_autocast_enabled(device):
        raise Decline("autocast", "autocast: the native prefill computes in the dtype of the weights")
    if torch.jit.is_tracing() or torch.compiler.is_exporting():
        raise Decline("tracing", "tracing: a graph of the stock forward is wanted")
    if model.training:
        dropouts = ("attention_dropout", "resid_pdrop", "embd_pdrop")
        if any(getattr(text_config(model), name, 0.0) for name in dropouts):
            raise Decline("training", "training mode with dropout: call model.eval()")
        if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
            raise Decline("training", "training mode with gradient checkpointing keeps no cache: call model.eval()")


def _check_mask_and_cache(
    config: Any, tokens: torch.Tensor, arguments: dict[str, Any]
) -> tuple[torch.Tensor | None, PackedBatch, list[LayerKind]]:
    """The real tokens, if the mask says no more than which they are: that is still to be found out."""
    batch, columns = tokens.shape[:2]
    cache = arguments.get("past_key_values")
    if cache is not None:
        try:
            check_cache(cache, config.num_hidden_layers)
        except (ValueError, TypeError) as error:
            raise Decline("cache", str(error)) from error
        # Compression may leave each layer another share (PyramidKV).
        held = {int(layer.get_seq_length()) for layer in cache.layers if type(layer) is DynamicLayer} - {0}
        if len(held) > 1:
            raise Decline("cache", f"past_key_values: expected as many positions in every layer, got {sorted(held)}")
    past = past_slots(cache)
    kinds = kinds_of(config, cache, columns)
    try:
        mask = padding_mask(arguments.get("attention_mask"), batch, columns, past, kinds)
        packed = pack_batch(batch, columns, past, mask, tokens.device)
    except (ValueError, TypeError) as error:
        raise Decline("mask", str(error)) from error
    if packed.ends_with_padding():
        raise Decline(
            "right_padding",
            "the last column is masked (right padding): the stock forward returns the padding's logits there",
        )
    window = any(kind.name == SLIDING_ATTENTION for kind in kinds) or (cache is not None and has_window(cache))
    if packed.slot_table is not None and window:
        raise Decline("mask", "holes in the mask of a sliding-window model: the stock window counts masked slots")
    return mask, packed, kinds


def _check_spans(vision: Vision, arguments: dict[str, Any], packed: PackedBatch) -> Spans:
    """New tokens that see each other, where it is clear which: the stock mask counts columns from the cache's first."""
    name = vision.spans_argument or ""
    try:
        spans = bidirectional_spans(name, arguments.get(name), packed)
    except (ValueError, TypeError) as error:
        raise Decline(name, str(error)) from error
    if spans and arguments[name].shape[1] == packed.columns and packed.past_slots > 0:
        raise Decline(
            name,
            f"{name}: expected one for each of {packed.past_slots + packed.columns} columns, those of the cache "
            f"before the new ones, got {packed.columns}: the stock mask would take them for others",
        )
    return spans


def _text_positions(vision: Vision | None, arguments: dict[str, Any]) -> Any:
    """Positions of text as the call gives them; None where it gives none, or those of time, height and width alone."""
    positions: Any = arguments.get("position_ids")
    with_axes = vision is not None and vision.has_axes and isinstance(positions, torch.Tensor) and positions.ndim == 3
    if not with_axes:
        return positions
    return None if len(positions) == 3 else positions[0]


def _check_positions(positions: Any, tokens: torch.Tensor, without_mask: bool) -> None:
    if positions is None:
        return
    batch, columns = tokens.shape[:2]
    if not isinstance(positions, torch.Tensor) or tuple(positions.shape) not in ((batch, columns), (1, columns)):
        raise Decline("position_ids", f"position_ids: expected a tensor of [{batch} or 1, {columns}]")
    if positions.dtype not in (torch.int64, torch.int32):
        raise Decline("position_ids", f"position_ids: expected int64 or int32, got {positions.dtype}")
    if positions.device != tokens.device:
        raise Decline("position_ids", f"position_ids: expected device {tokens.device}, got {positions.device}")
    if without_mask and bool((positions.diff(dim=-1) != 1).any()):
        raise Decline(
            "position_ids",
            "position_ids that do not count up by one, without a mask: may be several packed sequences",
        )
