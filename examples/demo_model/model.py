"""A Llama for training in plain PyTorch, with stacked weights of all layers, and its export to Hugging Face."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MIN_QUERY_ROWS = 256  # smaller blocks of queries save less time than their calls take


@dataclass(frozen=True)
class Shape:
    """The sizes of the model; names as in `LlamaConfig`."""

    vocab_size: int = 4096
    hidden_size: int = 256
    num_hidden_layers: int = 12
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    intermediate_size: int = 704
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    max_position_embeddings: int = 2048

    @property
    def q_rows(self) -> int:
        """Rows of the query projection."""
        return self.num_attention_heads * self.head_dim

    @property
    def kv_rows(self) -> int:
        """Rows of the key projection, and of the value projection."""
        return self.num_key_value_heads * self.head_dim


class _LinearCrossEntropy(torch.autograd.Function):
    """Summed negative log-likelihood of `target` under softmax(h @ w.T); the forward pass computes the gradient.

    There is only one fp32 copy of the logits, and autograd saves no tensor of the size of the vocabulary.
    """

    @staticmethod
    def forward(ctx, h: Tensor, w: Tensor, target: Tensor, scale: float) -> Tensor:
        logits = (h @ w.t()).float()
        lse = logits.logsumexp(-1, keepdim=True)
        index = target[:, None]
        loss = (lse - logits.gather(1, index)).sum()
        p = logits.sub_(lse).exp_()
        p.scatter_add_(1, index, torch.full_like(index, -1, dtype=p.dtype))
        p = p.mul_(scale).to(h.dtype)
        ctx.save_for_backward(p @ w, p.t() @ h)
        return loss * scale

    @staticmethod
    def backward(ctx, grad: Tensor):  # `grad` is 1: the loss is the root of the graph
        dh, dw = ctx.saved_tensors
        return dh, dw, None, None


def rope_tables(shape: Shape, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cos and sin, each [length, 1, head_dim / 2]."""
    inv_freq = shape.rope_theta ** (-torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim)
    angle = torch.arange(length, dtype=torch.float32)[:, None] * inv_freq
    return angle.cos()[:, None].to(dtype), angle.sin()[:, None].to(dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Apply Llama's RMSNorm to the last dimension, with statistics in fp32."""
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Apply causal attention to q [batch, time, heads, dim], k and v [batch, time, kv_heads, dim].

    Returns [batch, time, heads * dim].

    It uses matrix products over blocks of queries, each with the keys up to its end. On a CPU this trains faster than
    `scaled_dot_product_attention`, whose backward pass is slow there.
    """
    batch, time, heads, dim = q.shape
    kv_heads = k.shape[2]
    groups = heads // kv_heads
    q = (q * dim**-0.5).view(batch, time, kv_heads, groups, dim).permute(0, 2, 3, 1, 4)
    k, v = k.permute(0, 2, 3, 1), v.transpose(1, 2)
    rows = max(MIN_QUERY_ROWS, time // 4)
    outputs = []
    for first in range(0, time, rows):
        last = min(first + rows, time)
        part = q[:, :, :, first:last].reshape(batch, kv_heads, groups * (last - first), dim)
        scores = (part @ k[..., :last]).view(batch, kv_heads, groups, last - first, last).float()
        later = torch.arange(last) > torch.arange(first, last)[:, None]
        p = scores.masked_fill(later, -1e30).softmax(-1).to(v.dtype).flatten(2, 3)
        outputs.append((p @ v[:, :, :last]).view(batch, kv_heads, groups, last - first, dim))
    return torch.cat(outputs, dim=3).permute(0, 3, 1, 2, 4).reshape(batch, time, heads * dim)


def block(x: Tensor, w: tuple[Tensor, ...], cos: Tensor, sin: Tensor, shape: Shape) -> Tensor:
    """Apply a decoder layer to x [batch, time, hidden]; `w`: qkv, o, gate_up, down and the two norms (see `Llama`)."""
    qkv_w, o_w, gate_up_w, down_w, norms = w
    batch, time, _ = x.shape
    heads, kv_heads = shape.num_attention_heads, shape.num_key_value_heads
    qkv = F.linear(rms_norm(x, norms[0], shape.rms_norm_eps), qkv_w).view(batch, time, -1, shape.head_dim)
    a, b = qkv[:, :, : heads + kv_heads].chunk(2, dim=-1)
    qk = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    y = attend(qk[:, :, :heads], qk[:, :, heads:], qkv[:, :, heads + kv_heads :])
    x = x + F.linear(y, o_w)
    gate, up = F.linear(rms_norm(x, norms[1], shape.rms_norm_eps), gate_up_w).chunk(2, dim=-1)
    return x + F.linear(F.silu(gate) * up, down_w)


class Llama(nn.Module):
    """A Llama with one parameter for each kind of matrix, stacked over layers, so that the optimiser can batch."""

    def __init__(self, shape: Shape, block_fn: Callable[..., Tensor] = block) -> None:
        super().__init__()
        self.shape, self.block_fn = shape, block_fn
        layers, hidden, inner = shape.num_hidden_layers, shape.hidden_size, shape.intermediate_size
        self.embed = nn.Parameter(torch.randn(shape.vocab_size, hidden) * 0.02)
        self.qkv = nn.Parameter(torch.randn(layers, shape.q_rows + 2 * shape.kv_rows, hidden) * hidden**-0.5 * 0.5)
        # Output projections start at zero: every layer begins as the identity.
        self.o = nn.Parameter(torch.zeros(layers, hidden, shape.q_rows))
        self.gate_up = nn.Parameter(torch.randn(layers, 2 * inner, hidden) * hidden**-0.5 * 0.5)
        self.down = nn.Parameter(torch.zeros(layers, hidden, inner))
        self.norms = nn.Parameter(torch.ones(layers, 2, hidden))
        self.final_norm = nn.Parameter(torch.ones(hidden))

    def hidden(self, tokens: Tensor) -> Tensor:
        """Return final-norm hidden states [batch, time, hidden] of tokens [batch, time]."""
        x = F.embedding(tokens, self.embed)
        cos, sin = rope_tables(self.shape, tokens.shape[1], x.dtype)
        for w in zip(*(p.unbind(0) for p in (self.qkv, self.o, self.gate_up, self.down, self.norms)), strict=True):
            x = self.block_fn(x, w, cos, sin, self.shape)
        return rms_norm(x, self.final_norm, self.shape.rms_norm_eps)

    def loss(self, tokens: Tensor, scale: float) -> Tensor:
        """Return `scale` times the summed loss (nats) of predicting tokens[:, 1:] from tokens[:, :-1]."""
        h = self.hidden(tokens[:, :-1]).flatten(0, 1)
        return _LinearCrossEntropy.apply(h, self.embed, tokens[:, 1:].flatten(), scale)

    @torch.no_grad()
    def nll(self, tokens: Tensor) -> Tensor:
        """Return the loss of each next token in nats, fp32 [batch, time - 1]."""
        logits = (self.hidden(tokens[:, :-1]) @ self.embed.t()).float()
        return F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")

    def hf_state_dict(self) -> dict[str, Tensor]:
        """Return the weights in bf16, under the names of `LlamaForCausalLM`."""
        shape, state = self.shape, {"model.embed_tokens.weight": self.embed, "model.norm.weight": self.final_norm}
        for i in range(shape.num_hidden_layers):
            q, k, v = self.qkv[i].split([shape.q_rows, shape.kv_rows, shape.kv_rows])
            gate, up = self.gate_up[i].chunk(2)
            layer = {
                "self_attn.q_proj": q,
                "self_attn.k_proj": k,
                "self_attn.v_proj": v,
                "self_attn.o_proj": self.o[i],
                "mlp.gate_proj": gate,
                "mlp.up_proj": up,
                "mlp.down_proj": self.down[i],
                "input_layernorm": self.norms[i, 0],
                "post_attention_layernorm": self.norms[i, 1],
            }
            state |= {f"model.layers.{i}.{name}.weight": value for name, value in layer.items()}
        return {name: value.detach().to(torch.bfloat16).contiguous().clone() for name, value in state.items()}
