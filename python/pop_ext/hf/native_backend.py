"""``NativeBackend``: run the prefills of an enabled model natively."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

from torch import nn

from pop_ext.hf.architectures import UnsupportedModelError
from pop_ext.hf.decision import Decline, Products
from pop_ext.hf.dispatch import Call
from pop_ext.hf.kv_cache import check_windows
from pop_ext.hf.native_model import NativeModel, PrefillOutput
from pop_ext.hf.native_step import NativeStep
from pop_ext.hf.native_trial import raise_if_refused, try_native
from pop_ext.hf.packed_step import PackedStep
from pop_ext.hf.patches import InnerModules, unsupported_reason
from pop_ext.hf.portable_backend import PortableBackend
from pop_ext.plans.plan import Plan
from pop_ext.plans.projections import FitMismatch


class NativeBackend:
    """Load a model natively, and load it again when its modules or weights have changed.

    Copies and pickles keep only the plan and the options, and load by themselves.

    Attributes:
        fallback: runs calls that this backend declines; None without one.
        native: the loaded model; None before the first load, or while another thread loads.
    """

    name = "native"
    runs_stock_forward = False
    not_native = ""

    def __init__(
        self,
        plan: Plan,
        products: Products | None = None,
        prepack: bool = False,
        cuda_graphs: int = 0,
        fallback: PortableBackend | None = None,
    ) -> None:
        self.plan, self.products, self.prepack, self.cuda_graphs = plan, products, prepack, cuda_graphs
        self.fallback = fallback
        self.native: NativeModel | None = None
        self._tried = False
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        state = ("plan", "products", "prepack", "cuda_graphs", "fallback")
        return {name: getattr(self, name) for name in state}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def validate(self, model: nn.Module, call: Call) -> NativeModel:
        """Return the model as it is now, loaded. Raise ``Decline`` if it cannot run ``call`` natively."""
        native = self._loaded_for(model)
        cache = call.arguments.get("past_key_values")
        if cache is not None:
            try:
                check_windows(cache, native.spec.window, call.packed.slots)
            except ValueError as error:
                raise Decline("cache", str(error)) from error
        return native

    def _loaded_for(self, model: nn.Module, paged: bool = False) -> NativeModel:
        """Return the model as it is now, loaded. Raise ``Decline`` if it cannot run natively.

        Args:
            model: the enabled model.
            paged: whether the call is a step of continuous batching, which has attentions of its own.
        """
        inner = self._inner_modules(model)
        unsupported = unsupported_reason(model, inner, paged)
        if unsupported is not None:
            raise Decline(*unsupported)
        try:
            return self.load(model, inner)
        except (UnsupportedModelError, FitMismatch) as error:
            raise Decline("model", str(error)) from error

    def bind(self, model: nn.Module, call: Call) -> NativeModel:
        """Validate now, and leave nothing to the run."""
        return self.validate(model, call)

    def bind_step(self, model: nn.Module, step: PackedStep) -> Callable[[], PrefillOutput]:
        """Return what runs a step of continuous batching. Raise ``Decline`` as ``validate`` and ``NativeStep`` do."""
        return NativeStep(self._loaded_for(model, paged=True), step).run

    def load(self, model: nn.Module, inner: InnerModules | None = None) -> NativeModel:
        """Load the model, or return the one loaded before if neither modules nor weights have changed.

        The first model of its kind in a process is tried on a few tokens, as soon as that can be done.

        Args:
            model: the enabled model.
            inner: already collected modules; collected here if None.

        Raises:
            UnsupportedModelError: The model has no native form, or no longer has one.
        """
        with self._lock:
            native = self.native
            if native is not None and native.inner is not inner:  # None, or another thread has loaded since
                inner = self._inner_modules(model)
            if native is None or native.inner is not inner or native.overwritten_weight() is not None:
                self.native = native = None  # free the old folded weights before new ones are allocated
                raise_if_refused(model)
                options = self.products, self.prepack, self.cuda_graphs
                native = NativeModel(model, self.plan, *options)  # type: ignore[arg-type]
                native.model = weakref.proxy(model)  # type: ignore[assignment]
                self._tried = try_native(native)
                self.native = native
            elif not self._tried:
                self._tried = try_native(native)
            return native

    def _inner_modules(self, model: nn.Module) -> InnerModules:
        """Return the loaded model's ``InnerModules`` if they still match, else collect them anew."""
        native = self.native
        if native is not None and native.description.model() is model and native.inner.matches(model):
            return native.inner
        return InnerModules(model)
