"""Whether a call of a model's ``forward`` is a prefill that can run natively, and if not, why.

``decide`` looks and changes nothing; ``enable`` acts on what it says. The rules are those of
docs/semantics.md: pruning never changes what a call means.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.cache_utils import DynamicLayer
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from pop_ext.hf.architectures import Vision, dropped_softcap, vision_of
from pop_ext.hf.compat import rename_cache
from pop_ext.hf.kv_cache import check_cache, has_window, past_slots
from pop_ext.hf.masks import SLIDING_ATTENTION, LayerKind, check_pattern, kinds_of, padding_mask
from pop_ext.hf.packing import PackedBatch, is_int, pack_batch
from pop_ext.hf.patches import InnerModules, foreign_attention
from pop_ext.hf.vision import Blocks, blocks_of, widened
from pop_ext.plans.plan import Plan

if TYPE_CHECKING:
    from pop_ext.hf.native_model import NativeModel

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


@dataclass(frozen=True)
class Decision:
    """What would run for a call, or did, and why.

    Attributes:
        backend: "native", "reference" or "stock".
        rule: name of the rule that decided, for programs: "prefill", "decode", "labels", "mask", ...
        reason: one sentence, for people.
        declined: the call is a prefill, or might be one, that the stock forward runs because of ``reason``.
        plan: the plan of the enabled model.
        tokens: real new tokens of each sequence; boundary: how many of them run at full depth;
            logits_to_keep: rows that get logits. Empty for "stock".
        fp8: products of a native prefill are in 8-bit floats (docs/fp8.md).
    """

    backend: str
    rule: str
    reason: str
    declined: bool
    plan: Plan
    tokens: tuple[int, ...] = ()
    boundary: tuple[int, ...] = ()
    logits_to_keep: int = 0
    fp8: bool = False

    @property
    def native(self) -> bool:
        """Whether the native runtime runs the call."""
        return self.backend == "native"

    def __str__(self) -> str:
        if self.backend == "stock":
            return f"stock forward: {self.reason}"
        pruned = sum(tokens - boundary for tokens, boundary in zip(self.tokens, self.boundary, strict=True))
        return (
            f"{self.backend} prefill{' in 8-bit floats' if self.fp8 else ''}: {self.reason}; "
            f"{len(self.tokens)} sequence(s), {sum(self.tokens)} new tokens, "
            f"{pruned} of them omit {len(self.plan.omit)} of {self.plan.num_layers} layers"
        )


@dataclass
class Call:
    """A call of ``forward``, bound to its signature, with what ``decide`` found out about it.

    Attributes:
        mask: 2-D mask of padding, whatever form it came in. None: no padding.
        packed: the real new tokens. None for a call that the stock forward runs.
        blocks: of them, those that see each other.
        native: what runs it, for the "native" backend.
    """

    arguments: dict[str, Any]
    decision: Decision
    mask: torch.Tensor | None = None
    packed: PackedBatch | None = None
    blocks: Blocks = field(default_factory=list)
    native: NativeModel | None = None


class _Stock(Exception):
    """The stock forward runs; ``declined`` as in ``Decision``."""

    def __init__(self, rule: str, reason: str, declined: bool = True) -> None:
        super().__init__(reason)
        self.rule = rule
        self.reason = reason
        self.declined = declined


def is_decode(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call brings one new token. Looks at shapes only, so that compilers can trace it."""
    tokens = kwargs.get("input_ids", args[0] if args else None)
    if tokens is None:
        tokens = kwargs.get("inputs_embeds")
    return isinstance(tokens, torch.Tensor) and tokens.ndim >= 2 and tokens.shape[1] == 1


def bind(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by name, ``**kwargs`` of the signature merged in, the cache as ``past_key_values``.

    Raises TypeError as the call would.
    """
    arguments = dict(signature.bind(*args, **kwargs).arguments)
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            arguments.update(arguments.pop(parameter.name, {}))
    rename_cache(arguments, signature)
    return arguments


def decide(model: nn.Module, plan: Plan, backend: str, arguments: dict[str, Any]) -> Call:
    """Classifies a bound call of an enabled model by what is asked for; ``foreign_reason`` looks at the model."""
    try:
        mask, packed, blocks = _check_prefill(model, plan, arguments)
    except _Stock as stock:
        return Call(arguments, Decision("stock", stock.rule, stock.reason, stock.declined, plan))
    keep = arguments["logits_to_keep"]
    # Judged per sequence, so that batch mates never change a result.
    boundaries = [t if t < plan.min_tokens else min(max(plan.boundary, keep), t) for t in packed.tokens]
    boundary = tuple(widened(boundaries, packed.tokens, blocks))
    full = all(t == b for t, b in zip(packed.tokens, boundary, strict=True))
    reason = "every row runs at full depth" if full or not plan.omit else "a prefill"
    decision = Decision(backend, "prefill", reason, False, plan, tuple(packed.tokens), boundary, keep)
    return Call(arguments, decision, mask, packed, blocks)


def foreign_reason(model: nn.Module, inner: InnerModules) -> tuple[str, str] | None:
    """Rule and reason why the native loop does not stand for what the model's modules compute; None: it does."""
    reason = _foreign_attention(model, text_config(model))
    if reason is not None:
        return reason
    foreign = inner.foreign_code()
    return None if foreign is None else ("hooks", f"{foreign}: the native loop would not run them")


def text_config(model: nn.Module) -> Any:
    """The config of the language model, None for a model without one; a multimodal one keeps it inside its own."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def _check_prefill(
    model: nn.Module, plan: Plan, arguments: dict[str, Any]
) -> tuple[torch.Tensor | None, PackedBatch, Blocks]:
    config = text_config(model)
    tokens = _new_tokens(arguments)
    columns = tokens.shape[1]
    if columns == 1:
        raise _Stock("decode", "one new token: a decode step, or a prompt of one token", declined=False)
    if config.num_hidden_layers != plan.num_layers:
        # No error under strict: transformers puts the config back only where all went well.
        raise _Stock(
            "early_exit",
            f"the first {config.num_hidden_layers} of {plan.num_layers} layers are wanted: a draft by early exit",
            declined=False,
        )
    if arguments.get("labels") is not None:
        raise _Stock("labels", "labels: a loss needs every row at full depth")
    rows = _too_many_rows(arguments.get("logits_to_keep", 0), columns, arguments.get("past_key_values"))
    if rows is not None and not rows.declined:
        raise rows
    _check_outputs(model, arguments)
    _check_inference(model, tokens.device.type)
    if rows is not None:  # all are wanted unless a call says otherwise: what it does say is the better reason
        raise rows
    if not getattr(config, "is_causal", True):
        raise _Stock("attention", "config.is_causal=False: a pruned prefill is causal")
    around = vision_of(model)
    mask, packed, kinds = _check_mask_and_cache(config, tokens, arguments)
    blocks = [] if around is None else _check_blocks(around, arguments, packed)
    try:
        check_pattern(arguments.get("attention_mask"), mask, blocks, columns, packed.past_slots, kinds)
    except ValueError as error:
        raise _Stock("mask", str(error)) from error
    _check_positions(_text_positions(around, arguments), tokens, arguments.get("attention_mask") is None)
    keep, short = arguments["logits_to_keep"], min(packed.tokens)
    if keep > short:
        raise _Stock(
            "logits_to_keep",
            f"logits_to_keep={keep}: a sequence has only {short} new tokens, the stock forward adds padding's logits",
        )
    return mask, packed, blocks


def _new_tokens(arguments: dict[str, Any]) -> torch.Tensor:
    ids, embeds = arguments.get("input_ids"), arguments.get("inputs_embeds")
    if (ids is None) == (embeds is None):
        raise _Stock("inputs", "expected exactly one of input_ids and inputs_embeds")
    tokens = embeds if ids is None else ids
    if not isinstance(tokens, torch.Tensor) or tokens.ndim != (3 if ids is None else 2):
        raise _Stock("inputs", "input_ids or inputs_embeds is not a padded batch")
    if 0 in tokens.shape[:2]:
        raise _Stock("inputs", f"input_ids or inputs_embeds: expected at least one token, got {list(tokens.shape)}")
    if tokens.device.type == "meta":
        raise _Stock("inputs", "input_ids or inputs_embeds: expected a tensor with data, got one on the meta device")
    return tokens


def _too_many_rows(keep: Any, columns: int, cache: Any) -> _Stock | None:
    """Why logits are not wanted of fewer rows than come; None: they are."""
    if not is_int(keep):
        found = "a tensor of indices" if isinstance(keep, torch.Tensor) else f"a {type(keep).__name__}"
        return _Stock("logits_to_keep", f"logits_to_keep is {found}: expected a number of last rows, an int")
    if 0 < keep < columns:
        return None
    wanted = "all" if keep == 0 or keep >= columns else "other than the last"
    reason = f"logits_to_keep={keep}: logits of {wanted} rows are wanted, so every row needs full depth"
    # Speculative decoding verifies its candidates so.
    verification = wanted == "all" and bool(getattr(cache, "get_seq_length", int)() > 0)
    return _Stock("verification" if verification else "logits_to_keep", reason, declined=not verification)


def _check_outputs(model: nn.Module, arguments: dict[str, Any]) -> None:
    """Whether nothing is wanted that a pruned prefill does not have."""
    config: Any = model.config
    for name in ("output_attentions", "output_hidden_states", "output_router_logits"):
        wanted = arguments.get(name)
        if wanted if wanted is not None else getattr(config, name, False):
            raise _Stock(name, f"{name}: context rows have no such outputs in omitted layers")
    use_cache = arguments.get("use_cache")
    if not (use_cache if use_cache is not None else getattr(config, "use_cache", True)):
        raise _Stock("use_cache", "use_cache=False: a pruned prefill is of use only with its cache")
    around = vision_of(model)
    known = _READ | _HARMLESS | (around.arguments if around is not None else frozenset())
    unknown = sorted(name for name, value in arguments.items() if value is not None and name not in known)
    if unknown:
        raise _Stock("arguments", f"arguments that the native prefill does not know: {', '.join(unknown)}")


def _check_inference(model: nn.Module, device: str) -> None:
    """Whether the stock forward would compute in the weights' dtype, without randomness and for no backward."""
    if torch.is_grad_enabled():
        raise _Stock("grad", "grad mode: the native prefill has no backward; use torch.no_grad() or model.generate()")
    if torch.is_autocast_enabled(device):
        raise _Stock("autocast", "autocast: the native prefill computes in the dtype of the weights")
    if torch.jit.is_tracing() or torch.compiler.is_exporting():
        raise _Stock("tracing", "tracing: a graph of the stock forward is wanted")
    if model.training:
        dropouts = ("attention_dropout", "resid_pdrop", "embd_pdrop")
        if any(getattr(text_config(model), name, 0.0) for name in dropouts):
            raise _Stock("training", "training mode with dropout: call model.eval()")
        if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
            raise _Stock("training", "training mode with gradient checkpointing keeps no cache: call model.eval()")


def _foreign_attention(model: nn.Module, config: Any) -> tuple[str, str] | None:
    """Rule and reason why the native attention and experts do not compute what the stock ones would; None: they do."""
    reason = dropped_softcap(config) or foreign_attention(model)
    if reason is not None:
        return "attention", reason
    experts = getattr(config, "_experts_implementation", None) or "eager"
    registered = ALL_EXPERTS_FUNCTIONS.get(experts)
    if registered is not None and not registered.__module__.startswith("transformers."):
        return "experts", f"experts implementation {experts}: expected transformers' own"
    return None


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
            raise _Stock("cache", str(error)) from error
        # Compression may leave each layer another share (PyramidKV).
        held = {int(layer.get_seq_length()) for layer in cache.layers if type(layer) is DynamicLayer} - {0}
        if len(held) > 1:
            raise _Stock("cache", f"past_key_values: expected as many positions in every layer, got {sorted(held)}")
    past = past_slots(cache)
    kinds = kinds_of(config, cache, columns)
    try:
        mask = padding_mask(arguments.get("attention_mask"), batch, columns, past, kinds)
        packed = pack_batch(batch, columns, past, mask, tokens.device)
    except (ValueError, TypeError) as error:
        raise _Stock("mask", str(error)) from error
    if packed.ends_with_padding():
        raise _Stock(
            "right_padding",
            "the last column is masked (right padding): the stock forward returns the padding's logits there",
        )
    window = any(kind.name == SLIDING_ATTENTION for kind in kinds) or (cache is not None and has_window(cache))
    if packed.slot_table is not None and window:
        raise _Stock("mask", "holes in the mask of a sliding-window model: the stock window counts masked slots")
    return mask, packed, kinds


def _check_blocks(around: Vision, arguments: dict[str, Any], packed: PackedBatch) -> Blocks:
    """New tokens that see each other, where it is clear which: the stock mask counts columns from the cache's first."""
    name = around.blocks_by or ""
    try:
        blocks = blocks_of(around, arguments, packed)
    except (ValueError, TypeError) as error:
        raise _Stock(name, str(error)) from error
    if blocks and arguments[name].shape[1] == packed.columns and packed.past_slots > 0:
        raise _Stock(
            name,
            f"{name}: expected one for each of {packed.past_slots + packed.columns} columns, those of the cache "
            f"before the new ones, got {packed.columns}: the stock mask would take them for others",
        )
    return blocks


def _text_positions(around: Vision | None, arguments: dict[str, Any]) -> Any:
    """Positions of text as the call gives them; None where it gives none, or those of time, height and width alone."""
    positions: Any = arguments.get("position_ids")
    with_axes = around is not None and around.has_axes and isinstance(positions, torch.Tensor) and positions.ndim == 3
    if not with_axes:
        return positions
    return None if len(positions) == 3 else positions[0]


def _check_positions(positions: Any, tokens: torch.Tensor, without_mask: bool) -> None:
    if positions is None:
        return
    batch, columns = tokens.shape[:2]
    if not isinstance(positions, torch.Tensor) or tuple(positions.shape) not in ((batch, columns), (1, columns)):
        raise _Stock("position_ids", f"position_ids: expected a tensor of [{batch} or 1, {columns}]")
    if positions.dtype not in (torch.int64, torch.int32):
        raise _Stock("position_ids", f"position_ids: expected int64 or int32, got {positions.dtype}")
    if positions.device != tokens.device:
        raise _Stock("position_ids", f"position_ids: expected device {tokens.device}, got {positions.device}")
    if without_mask and bool((positions.diff(dim=-1) != 1).any()):
        raise _Stock(
            "position_ids",
            "position_ids that do not count up by one, without a mask: may be several packed sequences",
        )
