"""K and V of a run of omitted layers for all rows of a step, written to the engine's cache.

Where a run's layers are of the common form, their K and V are one product for all of them (``pop::kv_project``). Other
layers run their own modules as far as their attention. A check on random rows at start-up decides which it is: a layer
that looks common and is not runs its own modules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm
from vllm.model_executor.layers.linear import QKVParallelLinear
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbeddingBase

from pop_ext.plans.origin import spread_values
from pop_ext.plans.projections import SAMPLE, FitMismatch, Projections

CHUNK_BYTES = 64 << 20
"""Bytes of K and V that are projected at once (at least 256 rows): the memory that a prefill needs for them."""

OwnModules = Callable[[int, torch.Tensor, dict[str, Any]], None]
"""Run the layer of a number on rows at positions, on the tensors between two stages, as far as its attention."""

_ONES = 1024  # rows of a one-hot product that reads weights


@dataclass(frozen=True)
class LayerParts:
    """What the projection of a layer needs of it.

    Attributes:
        number: Number of the layer in the model.
        attention: Its attention object, which holds the cache.
        norm: Its input norm.
        qkv: Its linear layer for queries, keys and values.
        k_norm: Norm of each head's keys; None if there is none.
        rotary: Its rotary embedding.
    """

    number: int
    attention: Any
    norm: Any
    qkv: Any
    k_norm: Any
    rotary: Any

    @property
    def norm_offset(self) -> float:
        """What the norm adds to its weight."""
        return 1.0 if isinstance(self.norm, GemmaRMSNorm) else 0.0

    @property
    def form(self) -> tuple[Any, ...]:
        """What the layers of one product have in common. Equal rotary embeddings are one object in vLLM."""
        shape = self.attention.num_kv_heads, self.attention.head_size
        norms = self.norm.variance_epsilon, self.norm_offset, self.k_norm is None
        return *shape, *norms, self.qkv.bias is None, id(self.rotary)


def attention_of(layer: torch.nn.Module, number: int) -> Any:
    """Return the attention object of a decoder layer.

    Raises:
        ValueError: The layer has none, several, or one whose cache cannot be written apart from attention.
    """
    found = [module for module in layer.modules() if isinstance(module, Attention)]
    if len(found) != 1:
        raise ValueError(f"model: expected one attention object in layer {number}, got {len(found)}")
    [attention] = found
    backend = attention.attn_backend
    if backend.forward_includes_kv_cache_update:
        raise ValueError(
            f"attention backend: expected one whose cache is written apart from attention, got {backend.get_name()}"
        )
    if attention.kv_sharing_target_layer_name is not None:
        raise ValueError(f"model: expected K and V of its own in layer {number}, got those of another layer")
    return attention


def parts_of(layer: Any, number: int, attention: Any) -> LayerParts | str:
    """Return the parts of a layer of the common form, or the reason why it is of another."""
    own = getattr(layer, "self_attn", None)
    norm, qkv = getattr(layer, "input_layernorm", None), getattr(own, "qkv_proj", None)
    qkv = getattr(qkv, "base_layer", qkv)  # of an adapter's layer
    rotary, k_norm = getattr(own, "rotary_emb", None), getattr(own, "k_norm", None)
    if not isinstance(norm, (RMSNorm, GemmaRMSNorm)):
        return f"its input norm is {type(norm).__name__}"
    if not isinstance(qkv, QKVParallelLinear):
        return f"its K and V come from {type(qkv).__name__}"
    if not isinstance(rotary, RotaryEmbeddingBase) or not rotary.is_neox_style:
        return f"its rotary embedding is {type(rotary).__name__}"
    if k_norm is not None and (type(k_norm) is not type(norm) or k_norm.weight.shape != (attention.head_size,)):
        return f"its norm of keys is {type(k_norm).__name__}"
    if k_norm is not None and k_norm.variance_epsilon != norm.variance_epsilon:
        return "its norms have several epsilons"
    return LayerParts(number, attention, norm, qkv, k_norm, rotary)


class RunProjection:
    """K and V of consecutive layers that read one hidden state.

    Made once the engine has loaded its weights. The folded weights ``[layers * 2 * kv_dim, hidden_size]`` are the only
    new memory. The engine's own function writes K and V to the cache, so that any layout of it works.

    Args:
        layers: Number, decoder layer and attention object of each layer of the run on this rank, in their order.
        hidden_size: Width of the hidden state.
        residual: True if stages hand on a residual beside the hidden state.
        fitted: Fitted projections that replace those of some layers (``Plan.projections``).
        own_modules: Runs the modules of one layer as far as its attention.

    Attributes:
        reason: Why layers run their own modules instead of one product; None if one product computes the run.
        adds_residual: True if the input of a layer is the sum of hidden state and residual, False if it is the hidden
            state alone.
    """

    def __init__(
        self,
        layers: Sequence[tuple[int, Any, Any]],
        hidden_size: int,
        residual: bool,
        fitted: Projections | None,
        own_modules: OwnModules,
    ) -> None:
        self.attentions = [attention for _, _, attention in layers]
        self.numbers = [number for number, _, _ in layers]
        self.reason: str | None = None
        self._own_modules = own_modules
        self._fitted = fitted
        self._hidden_size = hidden_size
        self.adds_residual = residual
        self._has_residual = residual
        floats = (torch.float32, torch.bfloat16, torch.float16)
        self._parameter = next(parameter for parameter in layers[0][1].parameters() if parameter.dtype in floats)
        self._parts: list[LayerParts] = []
        for number, layer, attention in layers:
            found = parts_of(layer, number, attention)
            if isinstance(found, str):
                self.reason = f"layer {number}: {found}"
                break
            self._parts.append(found)
        if self.reason is None and len({part.form for part in self._parts}) > 1:
            self.reason = f"layers {self.numbers[0]} to {self.numbers[-1]} differ in heads, norms, biases or RoPE"
        self._stack: torch.Tensor | None = None
        self._biases: torch.Tensor | None = None
        self.refold()

    @property
    def extra_bytes(self) -> int:
        """Memory of the folded weights, in bytes."""
        kept = (self._stack, self._biases)
        return sum(tensor.numel() * tensor.element_size() for tensor in kept if tensor is not None)

    def refold(self) -> None:
        """Fold the K and V weights that the model has now, and check them against the layers' own modules.

        Raises:
            FitMismatch: The fitted projections are for other weights.
            ValueError: There are fitted projections, and one product does not compute the K and V of this model.
        """
        fitted = self._fitted
        self._find_convention(self._parameter)
        if self.reason is None:
            for part, block in zip(self._parts, self._allocate(), strict=True):
                k, v = _kv_weights(part, self._hidden_size)
                if fitted is not None and part.number in fitted.matrices:
                    _check_sample(fitted, part, k, v)
                block.copy_(_folded(part, k, v))
            self.reason = self._difference()
        if self.reason is not None:
            self._stack = self._biases = None
        if fitted is None or not any(number in fitted.matrices for number in self.numbers):
            return
        if self._stack is None:
            raise ValueError(
                f"plan.projections: expected layers whose K and V one product computes, got a model where {self.reason}"
            )
        for part, block in zip(self._parts, self._stack.chunk(len(self._parts)), strict=True):
            if part.number in fitted.matrices:
                block.copy_(_TensorParallelPart(part.qkv).of_stack(fitted.matrices[part.number]))

    def _allocate(self) -> Sequence[torch.Tensor]:
        """Return the block of each layer in the stack, after copying the biases."""
        first = self._parts[0]
        kv_dim, norm = first.attention.num_kv_heads * first.attention.head_size, first.norm.weight
        if self._stack is None:
            self._stack = norm.new_empty(len(self._parts) * 2 * kv_dim, self._hidden_size)
            if first.qkv.bias is not None:
                self._biases = norm.new_empty(len(self._parts), 2, kv_dim)
        if self._biases is not None:
            for part, bias in zip(self._parts, self._biases, strict=True):
                bias.copy_(part.qkv.bias.data[-2 * kv_dim :].view(2, kv_dim))
        return self._stack.chunk(len(self._parts))

    def write(
        self,
        tensors: dict[str, Any],
        positions: torch.Tensor,
        slots: dict[str, torch.Tensor],
        adapted: bool = False,
    ) -> None:
        """Compute K and V of all rows of a step, and write them to the cache of every layer of the run.

        Args:
            tensors: The input of the run's layers, as stages hand it on, ``[rows, hidden_size]`` each.
            positions: ``[..., rows]``.
            slots: Layer name -> ``[rows]`` cache slots, -1 for rows without one. Empty while the engine warms up.
            adapted: True if adapters apply to rows: then layers run their own modules, which add them.
        """
        if self._stack is None or adapted:
            for number, attention in zip(self.numbers, self.attentions, strict=True):
                self._write(attention, *self._by_own_modules(number, positions, tensors), slots, slice(None))
            return
        hidden_states = self.stream(tensors)
        step = max(256, CHUNK_BYTES // (len(self._stack) * self._stack.element_size()))
        for begin in range(0, len(hidden_states), step):
            rows = slice(begin, begin + step)
            keys, values = self._by_one_product(hidden_states[rows], positions[..., rows])
            for attention, key, value in zip(self.attentions, keys, values, strict=True):
                self._write(attention, key, value, slots, rows)

    @staticmethod
    def _write(
        attention: Any, key: torch.Tensor, value: torch.Tensor, slots: dict[str, torch.Tensor], rows: slice
    ) -> None:
        found = slots.get(attention.layer_name)
        if found is not None:
            attention.impl.do_kv_cache_update(attention, key, value, attention.kv_cache, found[rows])

    def _by_one_product(self, hidden_states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Compute K and V of every layer of the run in one product, then RoPE (``pop::kv_project``).

        Args:
            hidden_states: ``[rows, hidden_size]``, before any norm.
            positions: ``[..., rows]``.

        Returns:
            ``[2, layers, rows, kv_heads, head_dim]``: K, then V.
        """
        first, rows = self._parts[0], len(hidden_states)
        attention = first.attention
        cos, sin = _cos_and_sin(first.rotary, positions, hidden_states)
        out = hidden_states.new_empty(2, len(self._parts), rows, attention.num_kv_heads, attention.head_size)
        # The operator writes to a cache: here views of the result, [1, kv_heads, rows, head_dim] a layer.
        keys, values = ([layer.transpose(0, 1)[None] for layer in part] for part in out)
        zero = torch.zeros(1, dtype=torch.int32, device="cpu")
        lengths = torch.tensor([0, rows], dtype=torch.int32, device="cpu"), zero, zero
        k_bias, v_bias = (None, None) if self._biases is None else (list(part) for part in self._biases.unbind(1))
        k_norm = None if first.k_norm is None else [part.k_norm.weight.data for part in self._parts]
        torch.ops.pop.kv_project(
            hidden_states,
            self._stack,
            cos,
            sin,
            *lengths,
            first.norm.variance_epsilon,
            keys,
            values,
            k_bias,
            v_bias,
            k_norm,
            norm_offset=first.norm_offset,
        )
        return out

    def _by_own_modules(
        self, number: int, positions: torch.Tensor, tensors: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute K and V of one layer, ``[rows, kv_heads, head_dim]`` each, by its own modules."""
        attention = self.attentions[self.numbers.index(number)]
        shape = -1, attention.num_kv_heads, attention.head_size
        attention.forward = _stop_at_attention
        try:
            # Kernels of vLLM add a residual in place.
            self._own_modules(number, positions, {name: tensor.clone() for name, tensor in tensors.items()})
        except _AtAttention as reached:
            return reached.key.view(shape), reached.value.view(shape)
        finally:
            del attention.forward
        raise RuntimeError(f"model: expected layer {number} to call its attention, got a forward that does not")

    def _find_convention(self, like: torch.Tensor) -> None:
        """Find out what the input of a layer is, from K of the first one.

        Raises:
            ValueError: It is neither the sum of hidden state and residual nor the hidden state.
        """
        if not self._has_residual:
            return
        hidden, residual, positions = _random_rows(self._hidden_size, like)
        number = self.numbers[0]
        key, _ = self._by_own_modules(number, positions, {"hidden_states": hidden, "residual": residual})
        zero = torch.zeros_like(residual)
        for adds, stream in ((True, hidden + residual), (False, hidden)):
            found, _ = self._by_own_modules(number, positions, {"hidden_states": stream, "residual": zero})
            if _relative_error(found, key) <= _bound(like):
                self.adds_residual = adds
                return
        raise ValueError(
            f"model: expected layer {number} to take hidden state plus residual, or the hidden state alone, got neither"
        )

    def stream(self, tensors: dict[str, Any]) -> torch.Tensor:
        """Return the input of the run's layers, ``[rows, hidden_size]``, from what stages hand on."""
        hidden: torch.Tensor = tensors["hidden_states"]
        return hidden + tensors["residual"] if self.adds_residual else hidden

    def _difference(self) -> str | None:
        """Compare the product with the layers' own modules on random rows; return a phrase if they differ."""
        assert self._stack is not None
        hidden, residual, positions = _random_rows(self._hidden_size, self._stack)
        tensors = {"hidden_states": hidden} | ({"residual": residual} if self._has_residual else {})
        keys, values = self._by_one_product(self.stream(tensors), positions)
        for at, number in enumerate(self.numbers):
            own = self._by_own_modules(number, positions, tensors)
            for name, found, expected in zip("KV", (keys[at], values[at]), own, strict=True):
                error = _relative_error(found, expected)
                if not error <= _bound(self._stack):
                    return f"layer {number}: {name} by one product differs by {error:.1e} from that of its modules"
        return None


_CHECKED_ROWS = 16


def _random_rows(hidden_size: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return hidden states and residuals, ``[rows, hidden_size]`` each, and ``[rows]`` positions."""
    generator = torch.Generator().manual_seed(0)
    hidden, residual = torch.randn(2, _CHECKED_ROWS, hidden_size, generator=generator).to(like.device, like.dtype)
    return hidden, residual, torch.arange(_CHECKED_ROWS, device=like.device) * 7


def _relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the norm of the difference relative to that of ``expected``; NaN if either has one."""
    return float((found.float() - expected.float()).norm() / expected.float().norm().clamp(min=1e-30))


def _bound(like: torch.Tensor) -> float:
    """Return the difference that rounding explains."""
    return 1e-4 if like.dtype == torch.float32 else 0.03


class _AtAttention(Exception):
    """Raised in place of a layer's attention, with its K and V."""

    def __init__(self, key: torch.Tensor, value: torch.Tensor) -> None:
        super().__init__()
        self.key, self.value = key, value


def _stop_at_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *more: Any, **named: Any) -> None:
    raise _AtAttention(key, value)


def _cos_and_sin(
    rotary: Any, positions: torch.Tensor, hidden_states: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cos and sin of positions, ``[rows, rotary_dim]`` float32, of any rotary embedding that turns halves.

    Rotating (1, 0) gives (cos, sin), whatever the embedding does with its positions: three of them for each image
    token, or tables that depend on the length.
    """
    rows, half = positions.shape[-1], rotary.rotary_dim // 2
    probe = hidden_states.new_zeros(rows, rotary.head_size)
    probe[:, :half] = 1
    _, turned = rotary(positions, probe.clone(), probe)
    cos, sin = turned[:, : 2 * half].float().chunk(2, dim=-1)
    return cos.repeat(1, 2), sin.repeat(1, 2)


def _kv_weights(part: LayerParts, hidden_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the K and V weights of a layer on this rank, ``[kv_dim, hidden_size]`` each, in the model's dtype.

    Read through the layer itself, row by row of the identity: so they are read from any packing, and from quantised
    weights as the layer applies them.
    """
    linear, norm = part.qkv, part.norm.weight
    kv_dim = part.attention.num_kv_heads * part.attention.head_size
    # A layer with a fixed scale of activations represents a power of two times that scale without an error.
    scale = getattr(linear, "input_scale", None)
    one = 1.0 if scale is None else float(scale.max()) * 64
    columns = []
    for begin in range(0, hidden_size, _ONES):
        count = min(_ONES, hidden_size - begin)
        rows = norm.new_zeros(count, hidden_size)
        rows[torch.arange(count), torch.arange(begin, begin + count)] = one
        columns.append(linear.quant_method.apply(linear, rows, bias=None)[:, -2 * kv_dim :] / one)
    k, v = torch.cat(columns).t().contiguous().split(kv_dim)
    return k, v


def _folded(part: LayerParts, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Return K over V, ``[2 * kv_dim, hidden_size]``, times the weight of the input norm."""
    folded: torch.Tensor = torch.ops.pop.fold_kv([k], [v], [part.norm.weight.data], part.norm_offset)
    return folded


class _TensorParallelPart:
    """The K and V heads that this rank of a tensor-parallel engine computes, read from a QKV layer."""

    def __init__(self, linear: Any) -> None:
        self.heads, self.head_dim = linear.num_kv_heads, linear.head_size
        self.total = linear.total_num_kv_heads
        self.first = get_tensor_model_parallel_rank() // linear.num_kv_head_replicas * self.heads

    def rows(self) -> slice:
        """Return this rank's rows of a whole K or V matrix."""
        return slice(self.first * self.head_dim, (self.first + self.heads) * self.head_dim)

    def of_stack(self, matrix: torch.Tensor) -> torch.Tensor:
        """Return this rank's rows of a whole matrix ``[2 * total kv_dim, hidden_size]``, K and then V."""
        return torch.cat([part[self.rows()] for part in matrix.chunk(2)])


def _check_sample(fitted: Projections, layer: LayerParts, k: torch.Tensor, v: torch.Tensor) -> None:
    """Check that the fitted matrix of a layer was made for these weights, ``[kv_dim, hidden_size]`` each.

    The fit holds a sample of the weights that is spread over the whole of K and V. Compared is the part of it that
    lies in this rank's rows.

    Raises:
        FitMismatch: the matrix has another shape, or the sample other values.
    """
    number, part = layer.number, _TensorParallelPart(layer.qkv)
    matrix = fitted.matrices[number]
    full = (part.total * part.head_dim, k.shape[1])
    if tuple(matrix.shape) != (2 * full[0], full[1]):
        raise FitMismatch(
            f"plan.projections: expected a matrix {[2 * full[0], full[1]]} for layer {number} of this model, got "
            f"{list(matrix.shape)}"
        )
    parts = []
    for own in (k, v):
        whole = own.new_full(full, torch.nan)
        whole[part.rows()] = own
        parts.append(spread_values(whole, SAMPLE))
    sample = torch.cat([*parts, spread_values(layer.norm.weight.data, SAMPLE)]).float()
    elsewhere = sample.isnan()
    sample[elsewhere] = fitted.samples[number][elsewhere]
    fitted.check_weights(number, sample, k.dtype)
