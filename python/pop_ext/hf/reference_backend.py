"""``ReferenceBackend``: run the prefills of an enabled model by the oracle, slowly but for any decoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from pop_ext import reference
from pop_ext.hf.compat import is_causal, text_config
from pop_ext.hf.decision import Decline, Products
from pop_ext.hf.dispatch import Call
from pop_ext.hf.inputs import PrefillRequest
from pop_ext.hf.modules import check_oracle_runs, find_decoder_modules
from pop_ext.hf.native_model import PrefillOutput, check_plan
from pop_ext.hf.packed_step import RULE, PackedStep
from pop_ext.hf.restore import cache_restored_on_error, module_restored
from pop_ext.plans.plan import Plan
from pop_ext.plans.projections import FitMismatch, check_fit
from pop_ext.portable import find_decoder
from pop_ext.portable.trial import (
    BOUNDARY,
    TOKENS,
    errors_of_models,
    find_difference,
    fresh_clone,
    has_experts,
    run_second_form,
    trial_key,
    trial_plan,
    trial_prompt,
)

_passed: set[tuple[Any, ...]] = set()


class ReferenceBackend:
    """Run requests through ``pop_ext.reference``, which calls the model's own modules."""

    name = "reference"
    products: Products | None = None
    runs_stock_forward = False
    not_native = ""
    fallback: None = None

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def load(self, model: nn.Module) -> None:
        """Check that the oracle can run the model, by a trial if it is the first of its kind in this process.

        Raises:
            ValueError: The oracle cannot run the model, or computes something else, or the plan is for another model.
            TypeError: The plan is no ``Plan``.
        """
        check_oracle_runs(model)
        layers = find_decoder_modules(model).layers
        config = text_config(model)
        check_plan(self.plan, config.num_hidden_layers, config)
        check_fit(self.plan, layers)
        _try_oracle(model)

    def validate(self, model: nn.Module, call: Call) -> ReferenceRunner:
        """Return a runner. Raise ``Decline`` if the plan's projections were fitted on other weights."""
        if self.plan.projections is not None:
            try:
                check_fit(self.plan, find_decoder_modules(model).layers)
            except FitMismatch as error:
                raise Decline("model", str(error)) from error
        return ReferenceRunner(model, self.plan)

    def bind(self, model: nn.Module, call: Call) -> ReferenceRunner:
        """Validate now, and leave nothing to the run."""
        return self.validate(model, call)

    def bind_step(self, model: nn.Module, step: PackedStep) -> Callable[[], PrefillOutput]:
        """Decline a step of continuous batching."""
        raise Decline(RULE, "the oracle fills caches of whole sequences, no pages")


class ReferenceRunner:
    """Run one call of one model through the oracle."""

    backend = ReferenceBackend.name
    calls_model = True

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        self._model, self._plan = model, plan

    def check_values(self, request: PrefillRequest) -> None:
        """Do nothing: the oracle checks its own arguments."""

    def run(self, request: PrefillRequest) -> PrefillOutput:
        """Run the oracle and put the new columns of its cache into the request's."""
        arguments: dict[str, Any] = {name: value for name, value in request.arguments.items() if value is not None}
        logits, filled = reference.prefill(
            self._model, plan=self._plan, boundary=request.boundary, logits_to_keep=request.num_logits[0], **arguments
        )
        layers: list[Any] = filled.layers
        columns = request.packed.columns
        with cache_restored_on_error(request.cache, columns):
            for index, layer in enumerate(layers):
                request.cache.update(layer.keys[:, :, -columns:], layer.values[:, :, -columns:], index)
        return PrefillOutput(logits, None, request.cache)  # type: ignore[arg-type]


def _try_oracle(model: Any) -> None:
    """Compare the oracle with the layers themselves on a few tokens, in a second form of the same prefill.

    Families differ in ways that nobody can list: other arguments of their layers, norms without weights, attention in
    both directions over a prompt. A model of the same classes and config passes without being tried again, and one in
    training mode is not tried.

    Raises:
        ValueError: The oracle fails, or computes something else.
    """
    decoder = find_decoder(model)
    key = trial_key(model, decoder)
    if model.training or not is_causal(text_config(model)) or key in _passed:
        return
    prompt, plan = trial_prompt(model), trial_plan(len(decoder.layers))
    unfit = f"model: expected one that the oracle can run, got {type(model).__name__}"
    named = errors_of_models(ValueError, f"{unfit} ({{}})")
    with torch.no_grad(), module_restored(find_decoder_modules(model).rotary), named:
        logits, cache = reference.prefill(model, prompt, plan, logits_to_keep=BOUNDARY)
        expected = run_second_form(fresh_clone(model, decoder), decoder, prompt)
    if not bool(expected.logits.isfinite().all()):
        return
    difference = find_difference(logits, cache, expected, has_experts(decoder))
    if difference is not None:
        raise ValueError(f"{unfit}: in a trial of {TOKENS} tokens the {difference}")
    _passed.add(key)
