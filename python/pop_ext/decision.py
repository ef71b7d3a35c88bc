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

from pop_ext.kv_cache import check_cache, has_window, new_cache, past_slots
from pop_ext.packing import PackedBatch, pack_batch
from pop_ext.plan import Plan

if TYPE_CHECKING:
    from pop_ext.families import Description

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
    "return_dict",
}
_HARMLESS = {"cache_position", "num_items_in_batch"}


@dataclass(frozen=True)
class Decision:
    """What would run for a call, or did, and why.

    Attributes:
        backend: "native", "reference" or "stock".
        reason: one sentence.
        declined: the call is a prefill, or might be one, that the stock forward runs because of ``reason``.
        plan: the plan of the enabled model.
        tokens: real new tokens of each sequence; boundary: how many of them run at full depth;
            logits_to_keep: rows that get logits. Empty for "stock".
    """

    backend: str
    reason: str
    declined: bool = False
    plan: Plan | None = None
    tokens: tuple[int, ...] = ()
    boundary: tuple[int, ...] = ()
    logits_to_keep: int = 0

    @property
    def native(self) -> bool:
        """Whether the native runtime runs the call."""
        return self.backend == "native"

    def __str__(self) -> str:
        if self.backend == "stock":
            return f"stock forward: {self.reason}"
        assert self.plan is not None
        pruned = sum(tokens - boundary for tokens, boundary in zip(self.tokens, self.boundary, strict=True))
        return (
            f"{self.backend} prefill: {self.reason}; {len(self.tokens)} sequence(s), {sum(self.tokens)} new tokens, "
            f"{pruned} of them omit {len(self.plan.omit)} of {self.plan.num_layers} layers"
        )


@dataclass
class Call:
    """A call of ``forward``, bound to its signature, with what ``decide`` found out about it."""

    arguments: dict[str, Any]
    decision: Decision
    packed: PackedBatch | None = None
    extras: dict[str, Any] = field(default_factory=dict)


class _Stock(Exception):
    """The stock forward runs; ``declined`` as in ``Decision``."""

    def __init__(self, reason: str, declined: bool = True) -> None:
        super().__init__(reason)
        self.reason = reason
        self.declined = declined


def bind(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by name, ``**kwargs`` of the signature merged in. Raises TypeError as the call would."""
    arguments = dict(signature.bind(*args, **kwargs).arguments)
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            arguments.update(arguments.pop(parameter.name, {}))
    return arguments


def decide(model: nn.Module, plan: Plan, backend: str, arguments: dict[str, Any], window: bool) -> Call:
    """Classifies a bound call of an enabled model.

    Args:
        window: whether some layer of the model has a sliding window.
    """
    try:
        packed = _check_prefill(model, backend, arguments, window)
    except _Stock as stock:
        return Call(arguments, Decision("stock", stock.reason, stock.declined, plan))
    keep = arguments["logits_to_keep"]
    # Judged per sequence, so that batch mates never change a result.
    boundary = tuple(t if t < plan.min_tokens else min(max(plan.boundary, keep), t) for t in packed.tokens)
    full = all(t == b for t, b in zip(packed.tokens, boundary, strict=True))
    reason = "every row runs at full depth" if full or not plan.omit else "a prefill"
    return Call(arguments, Decision(backend, reason, False, plan, tuple(packed.tokens), boundary, keep), packed)


def _check_prefill(model: nn.Module, backend: str, arguments: dict[str, Any], window: bool) -> PackedBatch:
    tokens = _new_tokens(arguments)
    batch, columns = tokens.shape[:2]
    cache = arguments.get("past_key_values")
    keep = arguments.get("logits_to_keep", 0)
    if columns == 1:
        raise _Stock("one new token: a decode step, or a prompt of one token", declined=False)
    _check_outputs(model, arguments)
    if isinstance(keep, bool) or not isinstance(keep, int):
        raise _Stock("logits_to_keep is a tensor of indices: expected a number of last rows")
    if keep == 0:
        raise _Stock("logits_to_keep=0: logits of all rows are wanted, so every row needs full depth")
    if keep < 0 or keep >= columns:
        # Speculative decoding verifies its candidates so, over a filled cache.
        verification = keep >= columns and past_slots_or_none(cache) not in (0, None)
        raise _Stock(
            f"logits_to_keep={keep}: logits of all {columns} new rows are wanted, so every row needs full depth",
            declined=not verification,
        )
    _check_inference(model, arguments)
    if backend == "native":
        _check_modules(model)
    packed = _check_mask_and_cache(model, batch, columns, arguments, window)
    short = min(packed.tokens)
    if keep > short:
        raise _Stock(f"logits_to_keep={keep}: a sequence has only {short} new tokens, the rest would be padding")
    return packed


def _new_tokens(arguments: dict[str, Any]) -> torch.Tensor:
    ids, embeds = arguments.get("input_ids"), arguments.get("inputs_embeds")
    if (ids is None) == (embeds is None):
        raise _Stock("expected exactly one of input_ids and inputs_embeds")
    tokens = embeds if ids is None else ids
    if not isinstance(tokens, torch.Tensor) or tokens.ndim != (3 if ids is None else 2):
        raise _Stock("input_ids or inputs_embeds is not a padded batch")
    return tokens


def _check_outputs(model: nn.Module, arguments: dict[str, Any]) -> None:
    config = model.config
    if arguments.get("labels") is not None:
        raise _Stock("labels: a loss needs every row at full depth")
    for name in ("output_attentions", "output_hidden_states"):
        wanted = arguments.get(name)
        if wanted if wanted is not None else getattr(config, name, False):
            raise _Stock(f"{name}: context rows have no such outputs in omitted layers")
    use_cache = arguments.get("use_cache")
    if not (use_cache if use_cache is not None else getattr(config, "use_cache", True)):
        raise _Stock("use_cache=False: a pruned prefill is of use only with its cache")
    unknown = sorted(
        name for name, value in arguments.items() if value is not None and name not in _READ and name not in _HARMLESS
    )
    if unknown:
        raise _Stock(f"arguments that the native prefill does not know: {', '.join(unknown)}")


def _check_inference(model: nn.Module, arguments: dict[str, Any]) -> None:
    if torch.is_grad_enabled():
        raise _Stock("grad mode: the native prefill has no backward; use torch.no_grad() or model.generate()")
    if model.training and getattr(model.config, "attention_dropout", 0.0):
        raise _Stock("training mode with attention dropout: call model.eval()")
    attention = getattr(model.config, "_attn_implementation", None) or "eager"
    if attention not in ("eager", "sdpa") and not attention.startswith("flash"):
        raise _Stock(f"attention implementation {attention}: expected eager, sdpa or flash attention")


def _check_modules(model: nn.Module) -> None:
    """The native loop calls no inner module, so their hooks and replaced forwards would not run."""
    for registry in ("_global_forward_hooks", "_global_forward_pre_hooks"):
        if getattr(nn.modules.module, registry, None):
            raise _Stock("global module hooks: the native loop would not fire them")
    for name, module in model.model.named_modules(prefix="model"):
        # Called as a module, so what hangs on it works.
        if name == "model.rotary_emb":
            continue
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            if any(not _is_harmless(hook) for hook in hooks.values()):
                raise _Stock(f"hooks on {name}: the native loop would not fire them")
        if "forward" in module.__dict__:
            raise _Stock(f"a replaced forward on {name}: the native loop would not call it")


def _is_harmless(hook: Any) -> bool:
    # transformers' own recorders: installed by the first call that asks for hidden states, idle in others.
    return getattr(hook, "__module__", "") == "transformers.utils.output_capturing"


def _check_mask_and_cache(
    model: nn.Module, batch: int, columns: int, arguments: dict[str, Any], window: bool
) -> PackedBatch:
    cache, mask = arguments.get("past_key_values"), arguments.get("attention_mask")
    try:
        if cache is not None:
            check_cache(cache, model.config.num_hidden_layers)
        past = past_slots(cache)
        if mask is not None and not (isinstance(mask, torch.Tensor) and mask.ndim == 2):
            raise _Stock("attention_mask: expected a 2-D mask of padding, got a 4-D or custom one")
        packed = pack_batch(batch, columns, past, mask)
    except (ValueError, TypeError) as error:
        raise _Stock(str(error)) from error
    if mask is not None and not bool((mask[:, -1] != 0).all()):
        raise _Stock("the last column is masked (right padding): the stock forward returns the padding's logits there")
    if packed.slot_table is not None and (window or has_window(cache or new_cache(model.config))):
        raise _Stock("holes in the mask of a sliding-window model: the stock window counts masked slots")
    positions = arguments.get("position_ids")
    if positions is not None and mask is None and bool((positions.diff(dim=-1) != 1).any()):
        raise _Stock("position_ids that do not count up by one without a mask: may be several packed sequences")
    return packed


def past_slots_or_none(cache: Any) -> int | None:
    """Slots of something that may be no cache at all."""
    try:
        return past_slots(cache)
    except (AttributeError, TypeError):
        return None


def has_sliding_window(description: Description | None, config: Any) -> bool:
    """Whether some layer of a model attends to a window only."""
    if description is not None:
        return any(description.spec.window)
    layer_types = getattr(config, "layer_types", None) or []
    if layer_types:
        return "sliding_attention" in layer_types
    return bool(getattr(config, "sliding_window", None))
