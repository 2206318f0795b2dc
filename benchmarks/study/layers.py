"""Causal attention layers with rotation, (B, T, hidden) -> the same: full, window, listed blocks; the convolution."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import nsa_torch
from nsa_torch import rope
from nsa_torch.convolution import CausalConv

CONV_TAPS = 4


@dataclass(frozen=True)
class Shape:
    """Sizes that all models of a comparison share."""

    hidden: int = 256
    layers: int = 2
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 64
    rope_theta: float = 10000.0


class ConvolvedLinear(nn.Module):
    """A projection whose every output channel then passes NSA's causal convolution."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.conv = CausalConv(linear.out_features, CONV_TAPS)

    def reset_parameters(self) -> None:
        self.linear.reset_parameters()
        self.conv.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.linear(x))


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # (B, T, Hq, D), (B, T, Hkv, D) twice -> (B, T, Hq, D)


class Attention(nn.Module):
    """Projections and rotation around `attend`; the convolution, if any, comes before the rotation."""

    def __init__(self, shape: Shape, attend: Attend, *, conv: bool = False) -> None:
        super().__init__()
        self.shape, self.attend = shape, attend
        q_rows, kv_rows = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden, q_rows, bias=False)
        k_proj, v_proj = (nn.Linear(shape.hidden, kv_rows, bias=False) for _ in range(2))
        self.k_proj = ConvolvedLinear(k_proj) if conv else k_proj
        self.v_proj = ConvolvedLinear(v_proj) if conv else v_proj
        self.o_proj = nn.Linear(q_rows, shape.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, self.shape.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        tables = rotary(x, self.shape)
        return self.o_proj(self.attend(rope.rotate(q, tables), rope.rotate(k, tables), v).flatten(-2))


def rotary(x: Tensor, shape: Shape) -> rope.Tables | None:
    """Tables (T, 1, D) for tokens x (B, T, hidden)."""
    positions = torch.arange(x.size(1), device=x.device)
    return rope.for_heads(rope.rope_tables(positions, shape.head_dim, shape.rope_theta, x.dtype))


def full(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Torch's own attention over all keys up to the query."""
    heads_first = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True).transpose(1, 2)


def window(keys: int) -> Attend:
    """The last `keys` keys, the query's own included."""
    return lambda q, k, v: nsa_torch.window_attention(q, k, v, window=keys)[0]


def listed(lists_of: Callable[[int, torch.device], Tensor], select_size: int) -> Attend:
    """The blocks that `lists_of(T, device)` gives, int32 (T, Hkv, n): the same for every sequence of a batch."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        lists = lists_of(q.size(1), q.device).expand(q.size(0), -1, -1, -1)
        return nsa_torch.selected_attention(q, k, v, lists, select_size=select_size)[0]

    return attend
