"""``NativeModel``: prefill a Hugging Face model with the native runtime."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from pop_ext import _core, ops
from pop_ext.hf.architectures import decoder_of
from pop_ext.hf.choice import plan_for
from pop_ext.hf.decision import Products
from pop_ext.hf.family import Family
from pop_ext.hf.head import apply_head
from pop_ext.hf.inputs import PrefillRequest, check_device_and_dtype, check_ids, make_request
from pop_ext.hf.kv_cache import CacheTransaction, keeps_only_windows
from pop_ext.hf.loaded import LoadedWeights
from pop_ext.hf.modules import find_decoder_modules
from pop_ext.hf.operator_call import rope_tables, run_operator
from pop_ext.hf.packing import PerSequence, offsets
from pop_ext.hf.patches import InnerModules
from pop_ext.hf.prefill_graphs import PrefillGraphs, check_graphs_supported, check_shapes, graphs_on
from pop_ext.hf.restore import module_restored_on_error
from pop_ext.hf.vision import run_wrapper
from pop_ext.hf.weight_map import Description, describe
from pop_ext.plans.default import PlanArgument
from pop_ext.plans.origin import check_origin
from pop_ext.plans.plan import Plan
from pop_ext.plans.projections import check_fit
from pop_ext.utils.forks import check_threads

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.cache_utils import Cache


@dataclass
class PrefillOutput:
    """Result of ``NativeModel.prefill``.

    Attributes:
        logits: ``[batch, keep, vocab]``; with one ``logits_to_keep`` per sequence, packed ``[sum(keep), vocab]``.
        hidden_states: the same rows after the final norm, ``[..., hidden_size]``.
        past_key_values: the cache, which holds every position in every layer, ready for decode.
        cu_rows: ``[batch + 1]`` int32, first row of each sequence in the packed form; None otherwise.
        wrapper_output: output of the vision wrapper, for ``PrefillForward``; None in what ``prefill`` returns, which
            would otherwise keep the features of images alive.
    """

    logits: torch.Tensor
    hidden_states: torch.Tensor
    past_key_values: Cache
    cu_rows: torch.Tensor | None = None
    wrapper_output: Any = field(default=None, repr=False)


def check_plan(plan: Plan, num_layers: int, config: Any) -> Plan:
    """Return ``plan``; raise TypeError or ValueError unless it fits the depth and the config of a model."""
    if not isinstance(plan, Plan):
        raise TypeError(f"plan: expected a pop_ext.Plan, got {type(plan).__name__}")
    if plan.num_layers != num_layers:
        raise ValueError(f"plan: expected num_layers={num_layers} like the model, got {plan.num_layers}")
    check_origin(plan.origin, config, "plan")
    return plan


class NativeModel:
    """A causal language model whose prefill runs natively. Made by ``pop_ext.load``.

    It refers to the model's weights and copies only the folded K/V weights of omitted layers and of the last layer and,
    with ``fp8``, ``int8`` or ``prepack``, the matrices of the other layers. ``extra_bytes`` counts these copies.
    """

    backend = "native"  # as dispatch.Runner
    calls_model = False

    def __init__(
        self,
        model: PreTrainedModel,
        plan: PlanArgument = None,
        products: Products | None = None,
        prepack: bool = False,
        cuda_graphs: int = 0,
    ) -> None:
        ops.require_aten()
        check_shapes(cuda_graphs)
        description = describe(model)
        self.model = model
        chosen = plan_for(model, plan)
        self.plan = check_plan(chosen.plan, description.spec.num_layers, model.config)
        check_fit(self.plan, find_decoder_modules(model).layers)
        if products not in (None, "fp8", "int8"):
            raise ValueError(f"products: expected None, 'fp8' or 'int8', got {products!r}")
        self.products, self.prepack = products, prepack
        self._loaded = LoadedWeights(model, description, self.plan, products, prepack)
        self.cuda_graphs = cuda_graphs
        self._graphs: PrefillGraphs | None = graphs_on(self.device, cuda_graphs)
        chosen.warn(model)

    def __repr__(self) -> str:
        options = f", {self.products}=True" * (self.products is not None) + ", prepack=True" * self.prepack
        options += f", cuda_graphs={self.cuda_graphs}" * (self.cuda_graphs > 0)
        options += f", {self.integer_weights} weights in int8" * (self.integer_weights > 0)
        return f"NativeModel({type(self.model).__name__}, {self.plan!r}{options}, extra_bytes={self.extra_bytes})"

    @property
    def handle(self) -> int:
        """Handle for ``torch.ops.pop.prefill``; valid until ``refresh`` or the end of this object."""
        return self._loaded.handle

    @property
    def config(self) -> Any:
        """Config of the Hugging Face model."""
        return self.model.config

    @property
    def description(self) -> Description:
        """Spec of the model and places of its weights, as they were loaded."""
        return self._loaded.description

    @property
    def inner(self) -> InnerModules:
        """The modules that the native loop replaces, as they were when the weights were loaded."""
        return self._loaded.inner

    @property
    def family(self) -> Family:
        """Architecture of the model."""
        return self._loaded.family

    @property
    def spec(self) -> _core.ModelSpec:
        """Shapes of the model."""
        return self._loaded.spec

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the weights."""
        return self._loaded.dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self._loaded.device

    @property
    def fp8(self) -> bool:
        """True if products have operands in 8-bit floats."""
        return self.products == "fp8"

    @property
    def int8(self) -> bool:
        """True if products have operands in 8-bit integers."""
        return self.products == "int8"

    @property
    def integer_weights(self) -> int:
        """Number of weights that are read from a checkpoint's own integers."""
        return sum(ref.int8 is not None for ref in self.description.weights)

    @property
    def extra_bytes(self) -> int:
        """Bytes of the folded K/V weights and, with ``fp8``, ``int8`` or ``prepack``, of the copied matrices."""
        return self._loaded.extra_bytes

    def refresh(self) -> None:
        """Load the weights as they are now. Needed after they were changed, moved or reassigned.

        Raises:
            UnsupportedModelError: The model can no longer run natively. What was loaded before stays.
            FitMismatch: The plan's projections were fitted on other weights. What was loaded before stays.
        """
        description = describe(self.model)
        check_fit(self.plan, find_decoder_modules(self.model).layers)
        self._loaded = LoadedWeights(self.model, description, self.plan, self.products, self.prepack)
        self._graphs = graphs_on(self.device, self.cuda_graphs, self._graphs)

    def check_graphs_supported(self) -> None:
        """Raise UnsupportedModelError if ``cuda_graphs`` is set and the model can have no graphs where it is."""
        check_graphs_supported(self.cuda_graphs, self._loaded)

    def stale_weight(self) -> str | None:
        """Return the name of a weight that was changed, moved or reassigned since it was loaded, or None.

        A change through ``.data`` leaves version counters alone, so values of folded and copied weights are sampled.
        """
        return self._loaded.stale_weight()

    def overwritten_weight(self) -> str | None:
        """Like ``stale_weight``, but the caller knows that no parameter was replaced: ``inner`` matches the model."""
        return self._loaded.overwritten_weight()

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
        """Prefill a batch under the plan, which is executed as given (POP, arXiv 2602.03295, section 3).

        Pass either ``input_ids`` or ``inputs_embeds``. A call that fails leaves the cache unchanged.

        Args:
            input_ids: ``[batch, tokens]`` integer ids.
            inputs_embeds: ``[batch, tokens, hidden_size]`` in the model's dtype.
            attention_mask: ``[batch, past + tokens]``, 1 for a real token. New tokens may be padded on
                either side; past slots may be masked anywhere. None: every token is real.
            position_ids: ``[batch, tokens]`` or ``[1, tokens]``, or ``[3, batch, tokens]`` (time, height, width) in
                a family with such axes. None: counted from the mask after the past, images as the family counts them.
            past_key_values: cache whose positions stay as they are. None: a new DynamicCache.
            boundary: last rows of each sequence that run at full depth, one int or one per sequence.
                None: the plan's, at most the sequence's tokens.
            logits_to_keep: last rows of each sequence that get logits, one int or one per sequence.
            window_only: in omitted layers with a sliding window, write K and V only of positions that a later token
                can reach. Earlier slots keep their values, new ones are zero. A cache that keeps no more than the
                window in these layers gets this treatment anyway.
            vision: other arguments of the ``forward`` of a vision-language model, such as ``pixel_values``. Where the
                tokens of an image attend to each other (Gemma 3), a boundary inside an image is widened to its start.

        Raises:
            ValueError, TypeError: A bad argument. The text names it, what was expected and what came.
            RuntimeError: Weights changed since they were loaded (call ``refresh``), or the operator failed.
            KeyboardInterrupt: Or what another signal handler raises, after the layer that runs when the signal comes.
        """
        stale = self.stale_weight()
        if stale is not None:
            raise RuntimeError(
                f"weight {stale}: expected the tensor that was loaded, unchanged; it was changed, moved or "
                "reassigned. Call native.refresh()."
            )
        output = self.run(
            make_request(
                self,
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
        )
        output.wrapper_output = None
        return output

    def check_values(self, request: PrefillRequest) -> None:
        """Check what ``dispatch`` leaves open: device and dtype of the new tokens, and the range of ids.

        Raises:
            ValueError, TypeError: The tokens do not fit the model that was loaded.
        """
        name = "input_ids" if request.arguments.get("inputs_embeds") is None else "inputs_embeds"
        check_device_and_dtype(self._loaded, name, request.arguments[name])
        check_ids(self._loaded, request.rows)

    def run(self, request: PrefillRequest, validate: Callable[[], None] | None = None) -> PrefillOutput:
        """Run a validated request. Its cache changes only if the whole call succeeds.

        Does not check for weights that changed since they were loaded; ``stale_weight`` does.

        Args:
            request: from ``make_request`` or ``dispatch``.
            validate: called after the operator has launched its work and before the head runs and the cache changes.
                An exception from it fails the call. Not called for a vision-language model.

        Raises:
            RuntimeError: The process was forked from one with OpenMP threads (``check_threads``).
        """
        loaded = self._loaded  # once, so that a refresh in another thread does not change it during the call
        if loaded.device.type == "cpu":
            check_threads()
        with torch.no_grad():
            if loaded.family.vision is not None:
                run_decoder = partial(self._run_decoder, loaded)
                return run_wrapper(self.model.model, loaded.family.vision, request, run_decoder)
            return self._run_decoder(loaded, request, validate)

    def _run_decoder(
        self, loaded: LoadedWeights, request: PrefillRequest, validate: Callable[[], None] | None = None
    ) -> PrefillOutput:
        """Run the language model of a request: first the operator, then the head, then commit the cache."""
        transaction, window_only = self._open_cache(loaded, request)
        try:
            rotary = decoder_of(self.model).rotary_emb
            with module_restored_on_error(rotary):
                tables = rope_tables(loaded, rotary, request.positions)
                operator, graphs = partial(run_operator, loaded, request, window_only), self._graphs
                # A replay compares no memory of weights, on which a launch before the checks relies.
                if graphs is not None and validate is None and graphs.takes(loaded, request):
                    hidden = graphs.run(loaded, request, window_only, operator, tables, transaction)
                else:
                    hidden = operator(request.rows, tables, transaction.key_cache, transaction.value_cache)
                hidden = hidden.view(*request.output_shape, -1)
                if validate is not None:
                    validate()
                logits = self.logits_of(hidden)
                transaction.commit()
        except BaseException as error:
            transaction.abort()
            if isinstance(error, RuntimeError):
                ops.raise_interrupt(error)
            raise
        cu_rows = offsets(request.num_logits) if len(request.output_shape) == 1 else None
        return PrefillOutput(logits, hidden, request.cache, cu_rows)

    def _open_cache(self, loaded: LoadedWeights, request: PrefillRequest) -> tuple[CacheTransaction, bool]:
        """Open the cache for writing.

        Returns:
            The transaction, and whether omitted layers with a sliding window write K and V only of positions that a
            later token can reach.
        """
        packed, spec = request.packed, loaded.spec
        like = loaded.like.new_empty((0, spec.num_kv_heads, 0, spec.head_dim))
        windowed = [layer for layer in self.plan.omit if spec.window[layer] > 0]
        # K and V before the window would be projected for nothing if the cache drops them anyway.
        window_only = request.window_only or (
            bool(windowed) and keeps_only_windows(request.cache, spec.window, windowed)
        )
        transaction = CacheTransaction(
            request.cache,
            like,
            spec.num_layers,
            packed.batch,
            packed.past_slots,
            packed.columns,
            packed.padding(),
            left_out=windowed if window_only else (),
        )
        return transaction, window_only

    def logits_of(self, hidden: torch.Tensor) -> torch.Tensor:
        """Apply the head, and the divisor and the soft cap of logits if the family has them.

        Args:
            hidden: ``[..., hidden_size]``, after the final norm.

        Returns:
            Logits ``[..., vocab]``.
        """
        logits = apply_head(self.model.lm_head, hidden)
        if self.family.divides_logits:
            logits = logits / self.model.config.get_text_config(decoder=True).logits_scaling
        cap = getattr(self.model.config, "final_logit_softcapping", None)
        if cap is None or not self.family.caps_logits:
            return logits
        return torch.tanh(logits / cap) * cap
