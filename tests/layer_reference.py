"""NSAAttention as it is defined, docs/layer.md, from its parameters and the reference of the ops, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nsa_torch import NSAAttention, reference
from nsa_torch.module import BlockCompression


def turn(
    x: Tensor, position: Tensor, theta: float | None, *, dim: int | None = None, interleaved: bool = False
) -> Tensor:
    """RoPE as a multiplication of complex numbers: x (B, T, H, D), position (T,). The first `dim` channels turn."""
    if theta is None:
        return x
    dim = x.size(-1) if dim is None else dim
    half = torch.arange(dim // 2)
    first, second = (2 * half, 2 * half + 1) if interleaved else (half, half + dim // 2)
    a, b = x[..., first], x[..., second]
    angle = position.to(torch.float64)[:, None, None] * theta ** (-half.to(torch.float64) / len(half))
    turned = torch.complex(a, b) * torch.polar(torch.ones_like(angle), angle).to(torch.complex(a, b))
    out = x.clone()
    out[..., first], out[..., second] = turned.real, turned.imag
    return out


def convolve(x: Tensor, weight: Tensor) -> Tensor:
    """y_t = x_t + sum over i of w_{taps-1-i} x_{t-i}: x (B, T, C), weight (C, 1, taps)."""
    out, taps = x.clone(), weight.size(-1)
    for token in range(x.size(1)):
        for back in range(min(taps, token + 1)):
            out[:, token] = out[:, token] + weight[:, 0, taps - 1 - back] * x[:, token - back]
    return out


def norm(x: Tensor, module: nn.Module | None) -> Tensor:
    """RMSNorm of every head, or what a module of the user's does."""
    if module is None:
        return x
    if not isinstance(module, nn.RMSNorm):
        return module(x)
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * module.weight


def compress_by_reference(phi: BlockCompression, x: Tensor) -> Tensor:
    sizes = {"block_size": phi.block_size, "block_stride": phi.block_stride}
    return reference.compress(x, phi.pe, phi.w1, phi.b1, phi.w2, phi.b2, **sizes)


def reference_forward(module: NSAAttention, x: Tensor) -> Tensor:
    """The layer on tokens x (B, T, hidden)."""
    heads, kv_heads, theta = module.num_heads, module.num_kv_heads, module.rope_theta
    batch, length, _ = x.shape
    branches = 2 if module.shared_kv else 3
    k, v = module.k_proj(x), module.v_proj(x)
    if module.kv_conv:
        k, v = convolve(k, module.k_conv.weight), convolve(v, module.v_conv.weight)
    q = norm(module.q_proj(x).view(batch, length, heads, -1), module.q_norm)
    k = norm(k.view(batch, length, kv_heads, branches, -1), module.k_norm).transpose(2, 3)
    v = v.view(batch, length, kv_heads, branches, -1).transpose(2, 3)

    def at(x: Tensor, position: Tensor) -> Tensor:
        return turn(x, position, theta, dim=module.rope_dim, interleaved=module.rope_interleaved)

    position, window = torch.arange(length), branches - 1
    k_cmp = compress_by_reference(module.compress_k, k[:, :, 0])
    last = torch.arange(k_cmp.size(1)) * module.block_stride + module.block_size - 1
    out = reference.nsa_attention(
        at(q, position),
        at(k_cmp, last),
        compress_by_reference(module.compress_v, v[:, :, 0]),
        at(k[:, :, 1], position),
        v[:, :, 1],
        at(k[:, :, window], position),
        v[:, :, window],
        module.gate_proj(x).view(batch, length, heads, 3).sigmoid(),
        block_size=module.block_size,
        block_stride=module.block_stride,
        select_size=module.select_size,
        num_selected=module.num_selected,
        num_initial=module.num_initial,
        num_local=module.num_local,
        window=module.window,
        scale=module.scale,
    )
    return module.o_proj(out.flatten(2))
