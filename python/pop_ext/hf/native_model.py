"""``NativeModel``: a Hugging Face model's weights, prefilled by the native runtime."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pop_ext import _core, ops
from pop_ext.hf.architectures import Family, decoder_of
from pop_ext.hf.compat import uncompiled, with_cache
from pop_ext.hf.inputs import PrefillInputs, check_ids, check_tokens, pack_tokens, prepare
from pop_ext.hf.kv_cache import CacheTransaction, keeps_only_windows
from pop_ext.hf.loaded import Loaded, check_options
from pop_ext.hf.modules import find_parts
from pop_ext.hf.packing import PackedBatch, PerSequence, lengths, offsets
from pop_ext.hf.patches import InnerModules, runs_as_written
from pop_ext.hf.restore import module_restored_on_error
from pop_ext.hf.vision import Blocks, DecoderCall, blocks_of, mask_for, packed_features, run_around
from pop_ext.hf.weight_map import Description, describe
from pop_ext.plans.origin import check_origin
from pop_ext.plans.plan import Plan
from pop_ext.plans.presets import default_plan
from pop_ext.plans.projections import check_fit

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.cache_utils import Cache


@dataclass
class PrefillOutput:
    """What ``NativeModel.prefill`` returns.

    Attributes:
        logits: ``[batch, keep, vocab]``; with one ``logits_to_keep`` per sequence, packed ``[sum(keep), vocab]``.
        hidden_states: the same rows after the final norm, ``[..., hidden_size]``.
        past_key_values: the cache, holding every position in every layer, ready for decode.
        cu_rows: ``[batch + 1]`` int32, where each sequence's rows begin in the packed form; None otherwise.
    """

    logits: torch.Tensor
    hidden_states: torch.Tensor
    past_key_values: Cache
    cu_rows: torch.Tensor | None = None


def check_plan(plan: Plan, num_layers: int, config: Any) -> Plan:
    """Raises TypeError or ValueError unless ``plan`` is a plan for that depth, and of no model of another config."""
    if not isinstance(plan, Plan):
        raise TypeError(f"plan: expected a pop_ext.Plan, got {type(plan).__name__}")
    if plan.num_layers != num_layers:
        raise ValueError(f"plan: expected num_layers={num_layers} like the model, got {plan.num_layers}")
    check_origin(plan.origin, config, "plan")
    return plan


class NativeModel:
    """A causal language model whose prefill runs natively, by reference to its weights.

    Only the folded K/V weights of omitted layers (and of the last layer), and with ``fp8`` or ``prepack`` the other
    layers' matrices once more, are new memory: ``extra_bytes``. Made by ``pop_ext.load``.
    """

    def __init__(
        self, model: PreTrainedModel, plan: Plan | None = None, fp8: bool = False, prepack: bool = False
    ) -> None:
        check_options(fp8, prepack)
        ops.require_aten()
        description = describe(model)
        self.model = model
        chosen = default_plan(model.config) if plan is None else plan
        self.plan = check_plan(chosen, description.spec.num_layers, model.config)
        check_fit(self.plan, find_parts(model).layers)
        self.fp8, self.prepack = fp8, prepack
        self._loaded = Loaded(model, description, self.plan, fp8, prepack)

    def __repr__(self) -> str:
        options = ", fp8=True" * self.fp8 + ", prepack=True" * self.prepack
        return f"NativeModel({type(self.model).__name__}, {self.plan!r}{options}, extra_bytes={self.extra_bytes})"

    @property
    def handle(self) -> int:
        """The ``model`` argument of ``torch.ops.pop.prefill``; valid until ``refresh`` or the end of this object."""
        return self._loaded.handle

    @property
    def description(self) -> Description:
        """The model's spec and where its weights are, as they were loaded."""
        return self._loaded.description

    @property
    def inner(self) -> InnerModules:
        """The modules that the native loop stands for, as they were when the weights were loaded."""
        return self._loaded.inner

    @property
    def family(self) -> Family:
        return self._loaded.description.family

    @property
    def spec(self) -> _core.ModelSpec:
        return self._loaded.description.spec

    @property
    def extra_bytes(self) -> int:
        """Memory of the folded K/V weights, and of the copied matrices with ``fp8`` or ``prepack``, in bytes."""
        return self._loaded.extra_bytes

    @property
    def dtype(self) -> torch.dtype:
        return self._loaded.like.dtype

    @property
    def device(self) -> torch.device:
        return self._loaded.like.device

    def refresh(self) -> None:
        """Takes the model's weights as they are now; needed after they were changed, moved or reassigned.

        Raises:
            UnsupportedModelError: the model has become one that cannot run natively; what was loaded stays.
            FitMismatch (a ValueError): the plan's projections were fitted on the weights as they were; what was
                loaded stays.
        """
        description = describe(self.model)
        check_fit(self.plan, find_parts(self.model).layers)
        self._loaded = Loaded(self.model, description, self.plan, self.fp8, self.prepack)

    def stale_weight(self) -> str | None:
        """The name of a weight that was changed, moved or reassigned since it was loaded; None if none was.

        A change through ``.data`` shows in no version counter: of what was folded or copied, values are sampled.
        """
        return self._loaded.stale_weight()

    def written_weight(self) -> str | None:
        """``stale_weight`` for who has just asked whether ``inner`` are the model's modules."""
        return self._loaded.written_weight()

    def prefill(
        self,
        input_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        boundary: PerSequence | None = None,
        logits_to_keep: PerSequence = 1,
        window_only: bool = False,
        **vision: Any,
    ) -> PrefillOutput:
        """Prefills a batch by the plan, as given.

        Args:
            input_ids: ``[batch, tokens]`` integer ids, or
            inputs_embeds: ``[batch, tokens, hidden_size]`` in the model's dtype.
            attention_mask: ``[batch, past + tokens]``, 1 for a real token. New tokens may be padded on
                either side; past slots may be masked anywhere. None: all real.
            position_ids: ``[batch, tokens]`` or ``[1, tokens]``, or ``[3, batch, tokens]`` (time, height, width) in
                a family that has such. None: counted from the mask after the past, images as the family counts them.
            past_key_values: a cache whose positions are kept as they are. None: a new DynamicCache.
            boundary: last rows of each sequence that run at full depth, one int or one per sequence.
                None: the plan's, at most the sequence's tokens.
            logits_to_keep: last rows of each sequence that get logits, one int or one per sequence.
            window_only: in omitted layers with a sliding window, leave K and V of those positions only that a
                later token can still see. The slots before them keep what they held (new ones: zeros). Where the
                cache keeps no more than the window in these layers it is so anyway.
            vision: what else the ``forward`` of a vision-language model takes: ``pixel_values``, ... Where the
                tokens of an image see each other (Gemma 3), a boundary inside of one is widened to its start.

        Raises:
            ValueError, TypeError: a bad argument, named with what was expected and what came.
            RuntimeError: weights changed since they were loaded (``refresh``), or the operator failed.
                In every case the cache is as it was before the call.

        Source: POP (arXiv 2602.03295), section 3; rules in docs/semantics.md.
        """
        stale = self.stale_weight()
        if stale is not None:
            raise RuntimeError(
                f"weight {stale}: expected the tensor that was loaded, unchanged; it was changed, moved or "
                "reassigned. Call native.refresh()."
            )
        return self.prefill_fresh(
            input_ids,
            inputs_embeds,
            attention_mask,
            position_ids,
            past_key_values,
            boundary,
            logits_to_keep,
            window_only,
            **vision,
        )

    def prefill_fresh(
        self,
        input_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        boundary: PerSequence | None = None,
        logits_to_keep: PerSequence = 1,
        window_only: bool = False,
        packed: PackedBatch | None = None,
        look: Callable[[], None] | None = None,
        **vision: Any,
    ) -> PrefillOutput:
        """``prefill`` for who asks ``stale_weight``, of hundreds of weights, at another time.

        Args:
            packed: what ``pack_batch`` made of mask and cache, for who has called it: a mask on a device is waited for.
            look: called when the operator is through, on CUDA when it has launched everything, and before the head runs
                and the cache changes: what it raises ends the call as a failure does. Not for a vision-language model.
        """
        if not isinstance(window_only, bool):
            raise TypeError(f"window_only: expected a bool, got {type(window_only).__name__}")
        tokens = check_tokens(self, input_ids, inputs_embeds)
        around = self.family.vision
        unknown = sorted(set(vision) - (around.arguments if around is not None else frozenset()))
        if unknown:
            raise TypeError(f"{unknown[0]}: expected no such argument for a {self.family.model_type}, got one")
        packed = pack_tokens(self, tokens, attention_mask, past_key_values) if packed is None else packed
        rest: dict[str, Any] = {
            "cache": past_key_values,
            "boundary": boundary,
            "logits_to_keep": logits_to_keep,
        }
        if around is None:
            with torch.no_grad():
                rows = packed.pack(tokens)
                check_ids(self, rows)
                inputs = prepare(self, rows, packed, position_ids, blocks=[], **rest)
                return self._prefill(inputs, window_only, look)
        wrapper = self.model.model
        if input_ids is not None:
            check_ids(self, packed.pack(tokens), also=getattr(wrapper.config, "image_token_id", None))
        blocks = blocks_of(around, vision, packed)
        outputs = []

        def decode(call: DecoderCall) -> tuple[torch.Tensor, Cache]:
            outputs.append(self.prefill_decoder(call, packed, blocks, window_only=window_only, **rest))
            return outputs[0].hidden_states, outputs[0].past_key_values

        arguments = {
            "input_ids": input_ids,
            "inputs_embeds": inputs_embeds,
            "attention_mask": mask_for(around, attention_mask),
            "position_ids": position_ids,
            **with_cache(wrapper, past_key_values),
            **vision,
        }
        with torch.no_grad():
            run_around(wrapper, "language_model", decode, arguments)
        return outputs[0]

    def prefill_decoder(
        self,
        call: DecoderCall,
        packed: PackedBatch,
        blocks: Blocks,
        *,
        cache: Cache | None,
        boundary: PerSequence | None,
        logits_to_keep: PerSequence,
        window_only: bool = False,
    ) -> PrefillOutput:
        """``prefill_fresh`` from where the wrapper of a vision-language model calls its language model."""
        rows = packed.pack(call.inputs_embeds)
        inputs = prepare(self, rows, packed, call.position_ids, cache, boundary, logits_to_keep, blocks)
        if call.feature_mask is not None and call.features:
            inputs = replace(inputs, **packed_features(call, packed))
        return self._prefill(inputs, window_only)

    def _prefill(
        self, inputs: PrefillInputs, window_only: bool, look: Callable[[], None] | None = None
    ) -> PrefillOutput:
        """Runs a prefill. The cache changes only if all went well."""
        packed, cache, loaded = inputs.packed, inputs.cache, self._loaded
        like = loaded.like.new_empty((0, self.spec.num_kv_heads, 0, self.spec.head_dim))
        windowed = [layer for layer in self.plan.omit if self.spec.window[layer] > 0]
        # Where the cache drops what lies behind the window, nothing of it needs to be projected.
        window_only = window_only or (bool(windowed) and keeps_only_windows(cache, self.spec.window, windowed))
        transaction = CacheTransaction(
            cache,
            like,
            self.spec.num_layers,
            packed.batch,
            packed.past_slots,
            packed.columns,
            packed.padding(),
            left_out=windowed if window_only else (),
        )
        try:
            with module_restored_on_error(decoder_of(self.model).rotary_emb):
                cos, sin, cos_local, sin_local = self._rope(inputs.positions)
                hidden = torch.ops.pop.prefill(
                    loaded.handle,
                    inputs.rows,
                    cos,
                    sin,
                    packed.cu_seqlens(),
                    lengths(packed.past),
                    lengths(packed.cache_start),
                    lengths(inputs.boundaries),
                    lengths(inputs.keeps),
                    transaction.key_cache,
                    transaction.value_cache,
                    packed.slot_table,
                    False,  # restore_on_error: the transaction does, for what comes after the operator, too
                    window_only,
                    cos_local,
                    sin_local,
                    torch.tensor(inputs.blocks, dtype=torch.int32, device="cpu") if inputs.blocks else None,
                    inputs.feature_index,
                    None if inputs.feature_index is None else list(inputs.features),
                )
                hidden = hidden.view(*inputs.shape, -1)
                if look is not None:
                    look()
                logits = self.logits_of(hidden)
                transaction.commit()
        except BaseException:
            transaction.abort()
            raise
        return PrefillOutput(logits, hidden, cache, offsets(inputs.keeps) if len(inputs.shape) == 1 else None)

    def _rope(self, positions: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """cos, sin, and those of layers with a RoPE of their own (or None, None): float32 [rows, rotary_dim]."""
        rotary, kinds = decoder_of(self.model).rotary_emb, self.family.rope_kinds
        # Float32 whatever the model's dtype: the module only asks its first argument for dtype and device.
        like = torch.empty(0, dtype=torch.float32, device=self.device)
        if not kinds:
            cos, sin = rotary(like, positions.unsqueeze(-2))  # [1, rows], or [3, 1, rows]
            return cos[0], sin[0], None, None
        tables = {kind: rotary(like, positions[None], kind) for kind in kinds if kind in rotary.layer_types}
        cos, sin = tables.get(kinds[0]) or tables[kinds[1]]  # some model may have layers of one kind only
        if not any(self.spec.rope_table):
            return cos[0], sin[0], None, None
        cos_local, sin_local = tables[kinds[1]]
        return cos[0], sin[0], cos_local[0], sin_local[0]

    def logits_of(self, hidden: torch.Tensor) -> torch.Tensor:
        """The head on rows ``[..., hidden_size]`` after the final norm: ``[..., vocab]``."""
        logits = apply_head(self.model.lm_head, hidden)
        cap = getattr(self.model.config, "final_logit_softcapping", None)
        if cap is None or not self.family.caps_logits:
            return logits
        return torch.tanh(logits / cap) * cap


def load(model: PreTrainedModel, plan: Plan | None = None, fp8: bool = False, prepack: bool = False) -> NativeModel:
    """Makes a model's prefill run natively, without touching the model.

    Args:
        model: a Hugging Face causal language model of a supported family, on one device; of a compiled one (by
            ``torch.compile``) the model inside is taken.
        plan: what to omit. None: the preset whose config matches, else the deepest third, boundary 1.
        fp8: products of a prefill in the layers that it does not omit in 8-bit floats (e4m3): half of these layers'
            memory again, and not quite what the stock model computes (docs/fp8.md). Decode stays as it is.
        prepack: a copy of these layers' matrices in the CPU library's own layout, as large as they are, for faster
            products: bfloat16 on a processor with AVX-512 BF16 (docs/cpu.md). Not with ``fp8``.

    Raises:
        UnsupportedModelError (a ValueError): architecture or weights without a native form, or none with ``fp8`` or
            ``prepack``.
        ValueError, TypeError: a plan for another depth or made with another model, no plan, no model, or both of fp8
            and prepack.
    """
    return NativeModel(uncompiled(model), plan, fp8, prepack)


def apply_head(head: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """``head(hidden)``, for a plain linear on a CPU by ``torch.ops.pop.linear``.

    For a row or a few that streams the weight past once, at the speed of memory.

    Args:
        head: any module.
        hidden: ``[..., hidden_size]``, after the final norm.

    Returns:
        ``[..., vocab]``.
    """
    plain = hidden.is_cpu and _is_plain(head, hidden)
    logits: torch.Tensor = torch.ops.pop.linear(hidden, head.weight) if plain else head(hidden)
    return logits


def _is_plain(head: Any, hidden: torch.Tensor) -> bool:
    """Whether a module computes ``hidden @ weight.T`` and nothing else, and nobody has put anything on it."""
    of_linear = type(head) is nn.Linear and head._parameters.get("bias") is None and runs_as_written(head)
    if not of_linear or torch.is_autocast_enabled("cpu"):
        return False
    weight = head.weight
    if type(weight) not in (torch.Tensor, nn.Parameter) or weight.layout is not torch.strided:
        return False
    alike = weight.dtype == hidden.dtype and weight.device == hidden.device
    return alike and weight.stride(-1) == 1
