"""A small transformer over bytes whose attention is NSA or dense; all else is the same."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nsa_torch

from .config import Config

VOCABULARY = 256
ROPE_THETA = 10000.0
INIT_STD = 0.02


class ByteTransformer(nn.Module):
    """Pre-norm transformer: attention and SwiGLU layers, input and output embeddings tied."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(VOCABULARY, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.hidden_size)
        self.output = nn.Linear(config.hidden_size, VOCABULARY, bias=False)
        self.output.weight = self.embedding.weight
        nn.init.normal_(self.embedding.weight, std=INIT_STD)

    def forward(self, text: Tensor, cache: nsa_torch.NSACache | DenseCache | None = None) -> Tensor:
        """Logits of the next byte: text (B, T) int64 -> (B, T, 256).

        With a cache the text continues what the cache has seen.
        """
        hidden_states = self.embedding(text)
        for index, layer in enumerate(self.layers):
            hidden_states = layer(hidden_states, None if cache is None else cache[index])
        return self.output(self.norm(hidden_states))

    def make_cache(self, batch: int, max_length: int) -> nsa_torch.NSACache | DenseCache:
        """An empty cache for `batch` texts of up to `max_length` bytes."""
        attention = self.layers[0].attention
        return attention.new_cache(batch, max_length, num_layers=len(self.layers))

    def parameter_count(self) -> int:
        """Trained numbers; tied embeddings count once."""
        return sum(parameter.numel() for parameter in self.parameters())


class Layer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden_size)
        self.attention = make_attention(config)
        self.mlp_norm = nn.RMSNorm(config.hidden_size)
        self.mlp = SwiGLU(config.hidden_size)

    def forward(self, hidden_states: Tensor, cache: object | None) -> Tensor:
        """(B, T, hidden) -> (B, T, hidden)."""
        attended = self.attention(self.attention_norm(hidden_states), cache=cache)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.mlp_norm(hidden_states))


def make_attention(config: Config) -> nn.Module:
    """The one part in which the two models differ."""
    if config.attention == "dense":
        return DenseAttention(config.hidden_size, config.heads, config.kv_heads)
    return nsa_torch.NSAAttention(
        config.hidden_size,
        config.heads,
        config.kv_heads,
        block_size=config.block_size,
        block_stride=config.block_stride,
        select_size=config.select_size,
        num_selected=config.num_selected,
        window=config.window,
        rope_theta=ROPE_THETA,
    )


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), three times as wide inside."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.gate_and_up = nn.Linear(hidden_size, 6 * hidden_size, bias=False)
        self.down = nn.Linear(3 * hidden_size, hidden_size, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, T, hidden) -> (B, T, hidden)."""
        gate, up = self.gate_and_up(hidden_states).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class DenseAttention(nn.Module):
    """Causal grouped-query attention with rotary embeddings: what NSAAttention is compared with."""

    def __init__(self, hidden_size: int, num_heads: int, num_kv_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = hidden_size // num_heads
        self.q_proj = nn.Linear(hidden_size, num_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(num_heads * self.head_dim, hidden_size, bias=False)

    def new_cache(self, batch: int, max_length: int, *, num_layers: int) -> DenseCache:
        """An empty cache for `num_layers` layers like this one."""
        shape = (batch, max_length, self.num_kv_heads, self.head_dim)
        weight = self.k_proj.weight
        return [DenseLayerCache(weight.new_zeros(shape)) for _ in range(num_layers)]

    def forward(self, hidden_states: Tensor, *, cache: DenseLayerCache | None = None) -> Tensor:
        """(B, T, hidden) -> (B, T, hidden)."""
        batch, length, _ = hidden_states.shape
        start = 0 if cache is None else cache.length
        cos, sin = rotary_angles(start, length, self.head_dim, hidden_states.device)
        q = self.q_proj(hidden_states).view(batch, length, self.num_heads, self.head_dim)
        k = self.k_proj(hidden_states).view(batch, length, self.num_kv_heads, self.head_dim)
        v = self.v_proj(hidden_states).view(batch, length, self.num_kv_heads, self.head_dim)
        q, k = rotate(q, cos, sin).transpose(1, 2), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.append(k, v)
        mask = None
        if start > 0 and length > 1:
            positions = torch.arange(start + length, device=q.device)
            mask = positions <= positions[start:, None]
        out = F.scaled_dot_product_attention(
            q,
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=mask,
            is_causal=start == 0,
            enable_gqa=self.num_heads != self.num_kv_heads,
        )
        return self.o_proj(out.transpose(1, 2).flatten(2))


class DenseLayerCache:
    """Rotated keys and values of one DenseAttention layer, (B, max_length, Hkv, D)."""

    def __init__(self, keys: Tensor) -> None:
        self.keys, self.values = keys, torch.zeros_like(keys)
        self.length = 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, T, Hkv, D) new keys and values; returns all of them."""
        end = self.length + k.size(1)
        if end > self.keys.size(1):
            raise ValueError(f"the cache holds {self.keys.size(1)} bytes, got {end}")
        self.keys[:, self.length : end] = k
        self.values[:, self.length : end] = v
        self.length = end
        return self.keys[:, :end], self.values[:, :end]


DenseCache = list[DenseLayerCache]


def rotary_angles(start: int, length: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin for `length` positions from `start`, float32, (T, 1, head_dim / 2)."""
    frequencies = ROPE_THETA ** (-torch.arange(0, head_dim, 2, device=device) / head_dim)
    positions = torch.arange(start, start + length, device=device)
    angles = positions[:, None, None] * frequencies
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the two halves of (B, T, H, D) against each other; the dtype stays that of `x`."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(x.dtype)
