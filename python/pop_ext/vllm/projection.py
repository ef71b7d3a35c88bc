"""The independent KV projection of a run of omitted layers, written to the engine's cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding

from pop_ext.plans.origin import spread_values
from pop_ext.plans.projections import SAMPLE, FitMismatch, Projections

CHUNK_BYTES = 64 << 20
"""Bytes of K and V that are projected at once (at least 256 rows): the memory that a prefill needs for them."""


class RunProjection(torch.nn.Module):
    """Project K and V of consecutive layers that read one hidden state: one product, then RoPE (``pop::kv_project``).

    The folded weights are the only new memory, ``[layers * 2 * kv_dim, hidden_size]``. The engine's own function
    writes K and V to the cache, so that any layout of it works.

    Args:
        layers: decoder layers of the run, in their order.
        first: index of the first of them in the model.
        fitted: fitted projections that replace those of some layers (``Plan.projections``).

    Raises:
        ValueError: the K and V of a layer are computed in a way that is not supported here.
    """

    def __init__(self, layers: Sequence[Any], first: int, fitted: Projections | None) -> None:
        super().__init__()
        attentions = [layer.self_attn for layer in layers]
        self.stack: torch.Tensor
        self.biases: torch.Tensor | None
        self.first = first
        self.attentions = tuple(attentions)  # not submodules: they are the model's
        self.rotary = attentions[0].rotary_emb
        self.eps = layers[0].input_layernorm.variance_epsilon
        self.kv_heads, self.head_dim = attentions[0].num_kv_heads, attentions[0].head_dim
        self.fitted = fitted
        self.folded: set[int] = set()
        for number, layer in enumerate(layers, first):
            _check_layer(layer, number, self.eps)
        kv_dim, hidden_size = self.kv_heads * self.head_dim, attentions[0].hidden_size
        weight = attentions[0].qkv_proj.weight
        stack = torch.empty(len(layers) * 2 * kv_dim, hidden_size, dtype=weight.dtype, device=weight.device)
        self.register_buffer("stack", stack, persistent=False)
        biases = None if attentions[0].qkv_proj.bias is None else stack.new_empty(len(layers), 2, kv_dim)
        self.register_buffer("biases", biases, persistent=False)
        for at, layer in enumerate(layers):
            linear = layer.self_attn.qkv_proj
            linear.quant_method = _FoldAfterLoading(linear.quant_method, self, at, layer.input_layernorm)

    def fold(self, at: int, linear: Any, norm: Any) -> None:
        """Fold the K and V rows of one layer's loaded weights into the stack.

        Args:
            at: index of the layer within the run.
            linear: its QKV layer.
            norm: its input RMSNorm.

        Raises:
            FitMismatch: the fitted projections are for other weights.
        """
        kv_dim = self.kv_heads * self.head_dim
        k, v = linear.weight.data[-2 * kv_dim :].split(kv_dim)
        if self.fitted is not None and self.first + at in self.fitted.matrices:
            part = _TensorParallelPart(linear)
            _check_sample(self.fitted, self.first + at, part, k, v, norm.weight.data)
            block = part.of_stack(self.fitted.matrices[self.first + at]).to(k.device, k.dtype)
        else:
            block = torch.ops.pop.fold_kv([k.contiguous()], [v.contiguous()], [norm.weight.data])
        self.stack[at * 2 * kv_dim : (at + 1) * 2 * kv_dim].copy_(block)
        if self.biases is not None:
            self.biases[at].copy_(linear.bias.data[-2 * kv_dim :].view(2, kv_dim))
        self.folded.add(at)
        if len(self.folded) == len(self.attentions):
            self.fitted = None  # its matrices are in the stack

    def write(self, hidden_states: torch.Tensor, positions: torch.Tensor, slots: dict[str, torch.Tensor]) -> None:
        """Project all rows of a step, and write K and V to the cache of every layer of the run.

        Args:
            hidden_states: ``[rows, hidden_size]``, the input of the run's layers, before any norm.
            positions: ``[rows]``.
            slots: layer name -> ``[rows]`` cache slots, -1 for rows without one.

        Raises:
            RuntimeError: the weights were not folded: with this load format vLLM does not process loaded weights.
        """
        if len(self.folded) < len(self.attentions):
            raise RuntimeError("load_format: expected one after which vLLM processes weights, got another")
        cache = self.rotary.cos_sin_cache
        if cache.device != positions.device:
            cache = cache.to(positions.device)
        step = max(256, CHUNK_BYTES // (len(self.stack) * self.stack.element_size()))
        for begin in range(0, len(hidden_states), step):
            chunk = slice(begin, begin + step)
            cos, sin = (half.repeat(1, 2) for half in cache[positions[chunk]].float().chunk(2, dim=-1))
            keys, values = self.project(hidden_states[chunk], cos, sin)
            for attention, key, value in zip(self.attentions, keys, values, strict=True):
                layer = attention.attn
                layer.impl.do_kv_cache_update(layer, key, value, layer.kv_cache, slots[layer.layer_name][chunk])

    def project(self, hidden_states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Compute K and V of every layer of the run.

        Args:
            hidden_states: ``[rows, hidden_size]``, before any norm.
            cos: ``[rows, rotary_dim]``.
            sin: ``[rows, rotary_dim]``.

        Returns:
            ``[2, layers, rows, kv_heads, head_dim]``: K, then V.
        """
        rows = len(hidden_states)
        out = hidden_states.new_empty(2, len(self.attentions), rows, self.kv_heads, self.head_dim)
        # The operator writes to a cache: here views of the result, [1, kv_heads, rows, head_dim] a layer.
        keys, values = ([layer.transpose(0, 1)[None] for layer in part] for part in out)
        zero = torch.zeros(1, dtype=torch.int32, device="cpu")
        lengths = torch.tensor([0, rows], dtype=torch.int32, device="cpu"), zero, zero
        k_bias, v_bias = (None, None) if self.biases is None else (list(part) for part in self.biases.unbind(1))
        k_norm = None
        if hasattr(self.attentions[0], "k_norm"):
            k_norm = [attention.k_norm.weight.data for attention in self.attentions]
        torch.ops.pop.kv_project(
            hidden_states, self.stack, cos, sin, *lengths, self.eps, keys, values, k_bias, v_bias, k_norm
        )
        return out


class _FoldAfterLoading(UnquantizedLinearMethod):
    """Method of a QKV layer that folds its K and V weights into the run once they are loaded.

    Everything else is left to the method it replaces. Folding cannot happen later: a CPU engine repacks its weights
    right after loading.
    """

    def __init__(self, inner: UnquantizedLinearMethod, run: RunProjection, at: int, norm: Any) -> None:
        super().__init__()
        self._inner, self._run, self._at, self._norm = inner, run, at, norm

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        self._run.fold(self._at, layer, self._norm)
        self._inner.process_weights_after_loading(layer)

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return self._inner.apply(layer, x, bias)


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


def _check_sample(
    fitted: Projections, number: int, part: _TensorParallelPart, k: torch.Tensor, v: torch.Tensor, norm: torch.Tensor
) -> None:
    """Check that the fitted matrix of layer ``number`` was made for these weights.

    The fit holds a sample of the weights that is spread over the whole of K and V. Compared is the part of it that
    lies in this rank's rows.

    Raises:
        FitMismatch: the matrix has another shape, or the sample other values.
    """
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
    sample = torch.cat([*parts, spread_values(norm, SAMPLE)]).float()
    elsewhere = sample.isnan()
    sample[elsewhere] = fitted.samples[number][elsewhere]
    fitted.check_weights(number, sample, k.dtype)


def _check_layer(layer: Any, number: int, eps: float) -> None:
    """Check that the projection of a run computes this layer's K and V.

    Raises:
        ValueError: names the part of the layer that it does not support.
    """
    attention = layer.self_attn
    method = attention.qkv_proj.quant_method
    if type(method) is not UnquantizedLinearMethod:
        raise ValueError(
            f"model: expected unquantised K and V weights in layer {number}, which its KV projection folds, got "
            f"{type(method).__name__}"
        )
    rotary = attention.rotary_emb
    plain = isinstance(rotary, RotaryEmbedding) and type(rotary).forward_native is RotaryEmbedding.forward_native
    if not plain or not rotary.is_neox_style:
        raise ValueError(
            f"model: expected rotary embeddings of halves, from one table of positions, in layer {number}, got "
            f"{type(rotary).__name__}"
        )
    norms = [layer.input_layernorm] + ([attention.k_norm] if hasattr(attention, "k_norm") else [])
    if any(norm.variance_epsilon != eps for norm in norms):
        found = [norm.variance_epsilon for norm in norms]
        raise ValueError(f"model: expected epsilon {eps} in the norms of layer {number}, got {found}")
    backend = attention.attn.attn_backend
    if backend.forward_includes_kv_cache_update:
        raise ValueError(
            f"attention backend: expected one whose cache is written apart from attention, got {backend.get_name()}"
        )
