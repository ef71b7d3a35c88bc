"""Launch a prefill before the model is validated, and validate it while the device works. Off: see ``ENABLED``.

Validation compares hundreds of modules and weights on the host, and a GPU is idle until it ends. A speculative launch
starts the operator on the weights that were loaded before and validates the model meanwhile. If the model has changed,
the result is thrown away and the call runs again. The head runs and the cache changes only after the validation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pop_ext.hf.architectures import decoder_of
from pop_ext.hf.decision import Products
from pop_ext.hf.dispatch import Call
from pop_ext.hf.inputs import PrefillRequest
from pop_ext.hf.native_backend import NativeBackend
from pop_ext.hf.native_model import NativeModel, PrefillOutput
from pop_ext.hf.patches import is_unpatched, unsupported_reason
from pop_ext.hf.portable_backend import PortableBackend
from pop_ext.plans.plan import Plan

ENABLED = False
"""Whether ``enable`` uses it. It stays off until a measurement on a GPU shows a gain."""


def is_async(device: torch.device) -> bool:
    """Return whether operators return before the device has finished their work."""
    return device.type == "cuda" and not torch.cuda.is_current_stream_capturing()


class SpeculativeBackend(NativeBackend):
    """Run prefills natively, and launch them before the model is validated where that is safe."""

    def __init__(
        self,
        plan: Plan,
        products: Products | None = None,
        prepack: bool = False,
        cuda_graphs: int = 0,
        fallback: PortableBackend | None = None,
    ) -> None:
        super().__init__(plan, products, prepack, cuda_graphs, fallback)
        self._unchanged = False  # whether the last validation found no change

    def validate(self, model: nn.Module, call: Call) -> NativeModel:
        """Validate as ``NativeBackend`` does, and note whether anything had changed."""
        native = self.native
        before = None if native is None else native.handle
        del native  # else the old weights would outlive the load of new ones
        self._unchanged = False
        native = super().validate(model, call)
        self._unchanged = native.handle == before
        return native

    def bind(self, model: nn.Module, call: Call) -> Any:
        """Return a runner that launches first if that is safe, else validate now."""
        native = self.native
        if native is not None and self._may_launch(model, native):
            return _SpeculativeRunner(self, native, model, call)
        return self.validate(model, call)

    def is_current(self, model: nn.Module, native: NativeModel) -> bool:
        """Return whether ``validate`` would return ``native``."""
        return (
            self.native is native
            and native.inner.matches(model)
            and unsupported_reason(model, native.inner) is None
            and native.overwritten_weight() is None
        )

    def _may_launch(self, model: nn.Module, native: NativeModel) -> bool:
        """Return whether a speculative launch is safe and likely to be of use.

        Disabled after a change, so repeated edits waste at most one launch. Also disabled if the rotary embedding is
        patched: it is the only module of the model that runs before the validation.
        """
        if not self._unchanged or native.family.vision is not None or not is_async(native.device):
            return False
        if native.description.model() is not model:
            return False
        rotary = decoder_of(model).rotary_emb
        return native.inner.has(rotary) and is_unpatched(rotary)


class _Outdated(Exception):
    """Raised when the model has changed since it was loaded."""


class _SpeculativeRunner:
    """Run one call on the model loaded before, and run it again, validated, if the model has changed since."""

    backend = "native"
    calls_model = False

    def __init__(self, backend: SpeculativeBackend, native: NativeModel, model: nn.Module, call: Call) -> None:
        self._backend, self._model, self._call = backend, model, call
        self._native: NativeModel | None = native

    def check_values(self, request: PrefillRequest) -> None:
        """Do nothing: the run checks values, against the reloaded model if the model has changed."""

    def run(self, request: PrefillRequest) -> PrefillOutput:
        """Launch, validate, and finish the run or begin it again.

        Raises:
            Decline: The model has changed and can no longer run natively.
        """
        assert self._native is not None  # a runner runs once
        output = self._launch(self._native, request)
        self._native = None  # free the old weights before new ones are loaded
        if output is not None:
            return output
        native = self._backend.validate(self._model, self._call)
        native.check_values(request)
        return native.run(request)

    def _launch(self, native: NativeModel, request: PrefillRequest) -> PrefillOutput | None:
        """Launch on ``native`` and validate the model. Return None, with the cache unchanged, if it has changed."""

        def validate() -> None:
            if not self._backend.is_current(self._model, native):
                raise _Outdated

        try:
            native.check_values(request)
            return native.run(request, validate)
        except _Outdated:
            return None
        except (ValueError, TypeError):
            if self._backend.is_current(self._model, native):
                raise
        except RuntimeError:
            if torch.ops.pop.stale_index(native.handle) < 0:  # else the operator has refused stale weights
                raise
        return None
