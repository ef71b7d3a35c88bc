"""Replay the operator of a prefill as a CUDA graph, for shapes that come again (``cuda_graphs`` of ``pop_ext.load``).

A graph reads and writes memory at fixed addresses. So the inputs of a call are copied into the graph's own tensors, and
K and V, which it stages in tensors of its own, are copied into the cache of the call. Lengths and boundaries are
parameters of the kernels: each combination of them has a graph.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from pop_ext.hf.architectures import UnsupportedModelError
from pop_ext.hf.inputs import PrefillRequest
from pop_ext.hf.kv_cache import CacheTransaction
from pop_ext.hf.loaded import LoadedWeights

Tables = Sequence[torch.Tensor | None]
Operator = Callable[[torch.Tensor, Tables, list[torch.Tensor], list[torch.Tensor]], torch.Tensor]
"""Run ``torch.ops.pop.prefill`` on rows, tables of RoPE, keys and values; returns the hidden states."""


class Recorder(Protocol):
    """What graphs need from a device."""

    device: torch.device

    def is_recording(self) -> bool:
        """Return whether the caller records a graph of its own."""

    def record(self, call: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        """Record a call that has run before. Return what replays it, and the tensor that a replay fills."""

    def wait_for_last_use(self) -> None:
        """Let the current stream wait for the work before the last ``mark_use``."""

    def mark_use(self) -> None:
        """Mark the work so far of the current stream."""

    def finish_last_use(self) -> None:
        """Wait on the host for the work before the last ``mark_use``."""


_recording = threading.Lock()
"""torch records one graph of a process at a time."""


class CudaRecorder:
    """Record CUDA graphs. Has not run on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # torch's default stream for recording belongs to the device that recorded first in the process, and libraries
        # keep a workspace for each stream, which replays of two models on one stream would share.
        self._stream = torch.cuda.Stream(device)
        self._used: torch.cuda.Event | None = None

    def is_recording(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def record(self, call: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        graph = torch.cuda.CUDAGraph()
        with (
            _recording,
            torch.cuda.device(self.device),
            torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"),
        ):
            result = call()
        return graph.replay, result

    def wait_for_last_use(self) -> None:
        if self._used is not None:
            torch.cuda.current_stream(self.device).wait_event(self._used)

    def mark_use(self) -> None:
        self._used = torch.cuda.Event()
        self._used.record(torch.cuda.current_stream(self.device))

    def finish_last_use(self) -> None:
        if self._used is not None:
            self._used.synchronize()


RECORDERS: dict[str, Callable[[torch.device], Recorder]] = {"cuda": CudaRecorder}
"""What records on a type of device. Tests put another one here for the CPU."""


@dataclass
class _Graph:
    """A recorded prefill and the tensors that it reads and writes."""

    rows: torch.Tensor
    tables: list[torch.Tensor | None]
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    replay: Callable[[], None]
    hidden: torch.Tensor


class PrefillGraphs:
    """Keep the graphs of one model, and run prefills through them. Calls from several threads run one after another.

    Args:
        shapes: graphs to keep. The one that was not used for longest goes first.
        recorder: records and replays.
    """

    def __init__(self, shapes: int, recorder: Recorder) -> None:
        self.shapes, self._recorder = shapes, recorder
        self._graphs: OrderedDict[tuple[object, ...], _Graph] = OrderedDict()
        self._handle: int | None = None  # of the weights that the graphs read
        self._lock = threading.Lock()
        # Before the memory of the graphs goes to others; at exit nobody wants it.
        weakref.finalize(self, recorder.finish_last_use).atexit = False

    @property
    def device(self) -> torch.device:
        """Device whose calls are recorded."""
        return self._recorder.device

    def clear(self) -> None:
        """Free all graphs."""
        with self._lock:
            self._drop_to(0)

    def _drop_to(self, count: int) -> None:
        """Free the graphs that were not used for longest until ``count`` are left."""
        if len(self._graphs) > count:
            # A call on another stream may still use the memory, which the allocator would give to others.
            self._recorder.finish_last_use()
        while len(self._graphs) > count:
            self._graphs.popitem(last=False)

    def takes(self, loaded: LoadedWeights, request: PrefillRequest) -> bool:
        """Return whether a request can run as a graph: prompts without a past, and nothing of images."""
        packed = request.packed
        return (
            loaded.device == self.device
            and packed.past_slots == 0
            and packed.slot_table is None
            and not request.spans
            and request.feature_index is None
            and not self._recorder.is_recording()
        )

    def run(
        self,
        loaded: LoadedWeights,
        request: PrefillRequest,
        window_only: bool,
        operator: Operator,
        tables: Tables,
        transaction: CacheTransaction,
    ) -> torch.Tensor:
        """Run a request, recorded first if its shape is new, and fill the buffers of the transaction.

        Args:
            loaded: weights that ``operator`` reads.
            request: one that ``takes`` accepts.
            window_only: as the operator gets it.
            operator: runs the request on given tensors.
            tables: cos, sin, cos_local and sin_local of the request's rows.
            transaction: whose keys and values are filled.

        Returns:
            Hidden states ``[rows, hidden_size]`` that no later call overwrites.
        """
        with self._lock:
            if self._handle != loaded.handle:
                self._drop_to(0)
                self._handle = loaded.handle
            self._recorder.wait_for_last_use()
            key = _shape_of(request, window_only, tables)
            graph = self._graphs.pop(key, None)
            if graph is None:
                self._drop_to(self.shapes - 1)
                graph = self._record(loaded, request, operator, tables)
            self._graphs[key] = graph
            graph.rows.copy_(request.rows)
            for static, given in zip(graph.tables, tables, strict=True):
                if static is not None and given is not None:
                    static.copy_(given)
            try:
                graph.replay()
                columns = request.packed.columns
                caches = [*transaction.key_cache, *transaction.value_cache]
                torch._foreach_copy_([cache[:, :, :columns] for cache in caches], [*graph.keys, *graph.values])
                return graph.hidden.clone()
            finally:
                self._recorder.mark_use()

    def _record(self, loaded: LoadedWeights, request: PrefillRequest, operator: Operator, tables: Tables) -> _Graph:
        spec, packed = loaded.spec, request.packed
        shape = (2, spec.num_layers, packed.batch, spec.num_kv_heads, packed.columns, spec.head_dim)
        # Tensors made in inference mode could not be written outside of it.
        with torch.inference_mode(False), torch.no_grad():
            rows = request.rows.clone()
            static = [None if table is None else table.clone() for table in tables]
            # Zeros: the operator leaves slots of padding, and those outside of windows, as they are.
            keys, values = (list(caches) for caches in loaded.like.new_zeros(shape))

            def call() -> torch.Tensor:
                return operator(rows, static, keys, values)

            call()  # libraries allocate and choose their kernels in a first call
            replay, hidden = self._recorder.record(call)
        return _Graph(rows, static, keys, values, replay, hidden)


def graphs_on(device: torch.device, shapes: int, before: PrefillGraphs | None = None) -> PrefillGraphs | None:
    """Return graphs for a model that was loaded on a device, or loaded again.

    Args:
        device: of the model.
        shapes: graphs to keep.
        before: graphs of the model before it was loaded again. They are kept on the same device, where they notice new
            weights themselves, and are freed on another one.

    Returns:
        None if no graphs are wanted, or none can be recorded on this device.
    """
    if before is not None and before.device == device:
        return before
    if before is not None:
        before.clear()
    recorder = RECORDERS.get(device.type)
    return PrefillGraphs(shapes, recorder(device)) if shapes > 0 and recorder is not None else None


def check_shapes(cuda_graphs: int) -> None:
    """Raise TypeError or ValueError unless ``cuda_graphs`` is a number of graphs to keep."""
    if not isinstance(cuda_graphs, int) or isinstance(cuda_graphs, bool):
        raise TypeError(f"cuda_graphs: expected an int, got {type(cuda_graphs).__name__}")
    if cuda_graphs < 0:
        raise ValueError(f"cuda_graphs: expected at least 0, got {cuda_graphs}")


def check_graphs_supported(cuda_graphs: int, loaded: LoadedWeights) -> None:
    """Raise UnsupportedModelError if graphs are wanted of a model that can have none where it is."""
    if cuda_graphs == 0:
        return
    problem = ""
    if loaded.spec.num_experts > 0:
        problem = f"a model without experts, whose router the host waits for, got one of {loaded.spec.num_experts}"
    elif loaded.device.type not in RECORDERS:
        problem = f"a model on a CUDA device, got one on {loaded.device}"
    if problem:
        raise UnsupportedModelError(f"cuda_graphs: expected {problem}; without cuda_graphs the model runs natively")


def _shape_of(request: PrefillRequest, window_only: bool, tables: Tables) -> tuple[object, ...]:
    """Return all that a graph has fixed."""
    packed = request.packed
    return (
        (tuple(request.rows.shape), request.rows.dtype, packed.columns, window_only),
        (tuple(packed.tokens), tuple(packed.cache_start), tuple(request.boundary), tuple(request.num_logits)),
        tuple(None if table is None else (tuple(table.shape), table.dtype) for table in tables),
    )
