"""``PortableBackend``: run the prefills of an enabled model through one forward of its own modules."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial, reduce
from typing import Any

import torch
from torch import nn

from pop_ext.hf.architectures import dropped_softcap_reason
from pop_ext.hf.compat import NEW_CACHE_NAME, OLD_CACHE_NAME, cache_argument, cache_of, text_config
from pop_ext.hf.decision import Decline, Products
from pop_ext.hf.dispatch import Call
from pop_ext.hf.inputs import PrefillRequest
from pop_ext.hf.native_model import PrefillOutput, check_plan
from pop_ext.hf.packed_step import PackedStep
from pop_ext.hf.patches import (
    find_module_patch,
    has_global_hooks,
    is_own_forward,
    is_patched_class,
    unsupported_attention,
)
from pop_ext.hf.restore import cache_restored_on_error, evaluation_mode
from pop_ext.plans.plan import Plan
from pop_ext.plans.projections import FitMismatch, check_fit
from pop_ext.portable import Decoder, PackedRows, Rows, find_decoder, run_forward, run_packed, try_portable
from pop_ext.portable.decoder import check_layers, check_weights
from pop_ext.utils.forks import check_threads
from pop_ext.utils.tensors import check_memory


class PortableBackend:
    """Run requests through the model's own forward, whose omitted layers leave context rows only K and V."""

    name = "portable"
    products: Products | None = None
    runs_stock_forward = True
    fallback: None = None

    def __init__(self, plan: Plan, not_native: str = "") -> None:
        self.plan, self.not_native = plan, not_native
        self._tried: weakref.ref[nn.Module] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"plan": self.plan, "not_native": self.not_native}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def load(self, model: nn.Module) -> None:
        """Check that the model can be run, by a trial if it is the first of its kind in this process.

        Raises:
            ValueError: The model has no layers that can be omitted, the trial failed, or the plan is for another model.
            TypeError: The plan is no ``Plan``.
        """
        self._try(model, self.check(model))

    def check(self, model: nn.Module) -> Decoder:
        """Return the decoder of a model that seems fit to be run, without a trial. Raises as ``load`` does."""
        check_memory({f"weight {name}": parameter for name, parameter in model.named_parameters()})
        check_memory({f"model: {name}": buffer for name, buffer in model.named_buffers()})
        decoder, config = check_layers(model), text_config(model)
        softcap = dropped_softcap_reason(config)
        if softcap is not None:
            raise ValueError(softcap)
        check_plan(self.plan, config.num_hidden_layers, config)
        check_fit(self.plan, decoder.layers)
        _check_weights(model)
        return decoder

    def validate(self, model: nn.Module, call: Call) -> PortableRunner:
        """Return a runner. Raise ``Decline`` for code around the modules of layers, and for fits of other weights."""
        return PortableRunner(model, self._runnable(model), self.plan, call)

    def bind_step(self, model: nn.Module, step: PackedStep) -> Callable[[], PrefillOutput]:
        """Return what runs a step of continuous batching. Raise ``Decline`` as ``validate`` does."""
        decoder = self._runnable(model, paged=True)
        if any(getattr(module, "is_kv_shared_layer", False) for module in decoder.layers.modules()):
            raise Decline("model", "layers that attend to the K and V of another layer, in continuous batching")
        return partial(_run_step, model, decoder, self.plan, step)

    def _runnable(self, model: nn.Module, paged: bool = False) -> Decoder:
        """Return the decoder of a model as it is now. Raise ``Decline`` if it cannot be run.

        Args:
            model: the enabled model.
            paged: whether the call is a step of continuous batching, which has attentions of its own.
        """
        try:
            decoder = find_decoder(model)
            check_fit(self.plan, decoder.layers)
            _check_weights(model)
        except (FitMismatch, ValueError) as error:
            raise Decline("model", str(error)) from error
        softcap = dropped_softcap_reason(text_config(model))
        attention = softcap or unsupported_attention(decoder.module, decoder.layers, paged)
        if attention is not None:
            raise Decline("attention", attention)
        patch = _find_patch(model, decoder)
        if patch is not None:
            raise Decline("hooks", f"{patch}: it would see only some of the rows")
        try:
            with _unpaged_attention(model) if paged else nullcontext():
                self._try(model, decoder)
        except ValueError as error:
            raise Decline("model", str(error)) from error
        return decoder

    def bind(self, model: nn.Module, call: Call) -> PortableRunner:
        """Validate now, and leave nothing to the run."""
        return self.validate(model, call)

    def _try(self, model: nn.Module, decoder: Decoder) -> None:
        """Make the trial, unless this model has passed it. Finding out whether another one did takes milliseconds."""
        if (self._tried is None or self._tried() is not model) and try_portable(model, decoder):
            self._tried = weakref.ref(model)

    @torch.no_grad()
    def packed_logits(
        self, model: nn.Module, input_ids: torch.Tensor, boundary: list[int], num_logits: list[int]
    ) -> torch.Tensor:
        """Prefill sequences of one length, each with its own number of logits, in evaluation mode, without a past.

        Args:
            model: an enabled model.
            input_ids: ``[batch, T]``, without padding.
            boundary: rows of each sequence that run at full depth, at least those with logits.
            num_logits: last rows of each sequence that get logits.

        Returns:
            Logits, packed ``[sum(num_logits), vocab]``.

        Raises:
            ValueError: Something declines every prefill of the model, such as hooks on its layers.
        """
        with evaluation_mode(model):
            try:
                decoder = self._runnable(model)
            except Decline as decline:
                raise ValueError(f"model: expected one whose prefills run portably, got {decline.reason}") from decline
            rows = _rows(boundary, [input_ids.shape[1]] * len(boundary), num_logits, input_ids.device)
            call = {"input_ids": input_ids, "logits_to_keep": rows.num_logits, "use_cache": True, "return_dict": True}
            logits: torch.Tensor = run_forward(model, decoder, self.plan, rows, call).logits
        return torch.cat([one[-count:] for one, count in zip(logits, num_logits, strict=True)])


@contextmanager
def _unpaged_attention(model: nn.Module) -> Iterator[None]:
    """Set attention implementations that read pages, as continuous batching does, to those of whole sequences."""
    found: list[Any] = [module.config for module in model.modules() if hasattr(module, "config")]
    paged = [
        (config, config._attn_implementation)
        for config in {id(config): config for config in found}.values()
        if str(getattr(config, "_attn_implementation", "")).startswith("paged|")
    ]
    for config, name in paged:
        config._attn_implementation = name.removeprefix("paged|")
    try:
        yield
    finally:
        for config, name in paged:
            config._attn_implementation = name


def _run_step(model: nn.Module, decoder: Decoder, plan: Plan, step: PackedStep) -> PrefillOutput:
    """Run a step of continuous batching. After an error transformers frees the pages of all its requests."""
    ids = step.arguments["input_ids"]
    rows = PackedRows(step.tokens, step.boundary, ids.shape[1], ids.device)
    output = run_packed(model, decoder, plan, rows, {**step.arguments, "return_dict": True})
    return PrefillOutput(
        logits=output.logits,
        hidden_states=None,  # type: ignore[arg-type]
        past_key_values=cache_of(output),
        wrapper_output=output,
    )


class PortableRunner:
    """Run one call of one model through its own forward."""

    backend = PortableBackend.name
    calls_model = False  # it calls the forward of the model's class, not that of the instance

    def __init__(self, model: nn.Module, decoder: Decoder, plan: Plan, call: Call) -> None:
        self._model, self._decoder, self._plan, self._call = model, decoder, plan, call

    def check_values(self, request: PrefillRequest) -> None:
        """Do nothing: the stock forward takes the values as it takes those of any call."""

    def run(self, request: PrefillRequest) -> PrefillOutput:
        """Run a prefill. After an error the cache is as it was."""
        given = {
            name: value
            for name, value in self._call.arguments.items()
            if name not in (OLD_CACHE_NAME, NEW_CACHE_NAME, "logits_to_keep", "use_cache", "return_dict")
        }
        cache = self._call.arguments.get(OLD_CACHE_NAME)
        if cache is not None:  # else the forward makes one of the model's own kind
            given[cache_argument(type(self._model).forward)] = cache
        keep = max(request.num_logits)
        with nullcontext() if cache is None else cache_restored_on_error(cache, request.packed.columns):
            output = run_forward(
                self._model,
                self._decoder,
                self._plan,
                _rows(request.boundary, request.packed.tokens, request.num_logits, request.rows.device),
                {**given, "logits_to_keep": keep, "use_cache": True, "return_dict": True},
            )
        return PrefillOutput(
            logits=output.logits,
            hidden_states=None,  # type: ignore[arg-type]
            past_key_values=cache_of(output),
            wrapper_output=output,
        )


def _rows(boundary: list[int], tokens: list[int], num_logits: list[int], device: torch.device) -> Rows:
    """Return which rows of a batch, padded on the left, run at full depth.

    Args:
        boundary, tokens, num_logits: boundary rows, new tokens and wanted logits of each sequence.
        device: of the mask.
    """
    columns = max(boundary)
    # A sequence that is all boundary rows may be padded in front: what its padding does is read by nobody.
    wanted = [columns if b == t else b for b, t in zip(boundary, tokens, strict=True)]
    mask = None
    if min(wanted) < columns:
        from_end = torch.arange(columns, 0, -1, device=device)
        mask = from_end <= torch.tensor(wanted, device=device)[:, None]
    return Rows(columns, max(num_logits), mask)


def _find_patch(model: nn.Module, decoder: Decoder) -> str | None:
    """Describe a hook or a replaced forward in or around the decoder, other than accelerate's; None without one."""
    if has_global_hooks():
        return "global module hooks"
    around = [(".".join(decoder.path[:end]), _at(model, decoder.path[:end])) for end in range(1, len(decoder.path))]
    for name, module in (*around, *decoder.module.named_modules(prefix=".".join(decoder.path))):
        if is_patched_class(type(module)):
            return f"a replaced forward of {type(module).__name__}"
        found = find_module_patch(module)
        if found is not None and not _is_placed_by_accelerate(module):
            return f"{found} on {name}"
    return None


def _at(model: nn.Module, path: tuple[str, ...]) -> nn.Module:
    """Return the module at a path of names."""
    return reduce(lambda module, name: module._modules[name], path, model)  # type: ignore[arg-type, return-value]


def _is_placed_by_accelerate(module: nn.Module) -> bool:
    """Return whether all that is patched of a module is a hook of accelerate, around the forward of its class."""
    own = vars(module)
    hook, forward = own.get("_hf_hook"), own.get("_old_forward")
    hooks = getattr(hook, "hooks", [hook])  # of a SequentialHook
    if any(type(one).__module__ != "accelerate.hooks" for one in hooks) or not is_own_forward(module, forward):
        return False
    return not own["_forward_hooks"] and not own["_forward_pre_hooks"]


def _check_weights(model: nn.Module) -> None:
    """Check the weights of a model, and on a CPU the threads that would read them.

    Raises:
        ValueError: As for ``check_weights``.
        RuntimeError: As for ``check_threads``.
    """
    if not check_weights(model):
        check_threads()
