"""Checks of what is given to NSAAttention.forward, before any work starts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .cache import NSACache, NSALayerCache
from .checks import check_at_least, check_tensors
from .heads import Projected
from .packing import padding_rows
from .placement import COMPUTED, moves_weights
from .ranks import whole_like

if TYPE_CHECKING:
    from .module import NSAAttention


def check_rope(rope_theta: float | None, rope_dim: int | None, head_dim: int) -> None:
    if rope_theta is None:
        if rope_dim is not None:
            raise ValueError(f"rope_dim must be None when rope_theta is: tables tell their width, got {rope_dim}")
        return
    if not rope_theta > 0:
        raise ValueError(f"rope_theta must be above 0, or None, got {rope_theta}")
    if rope_dim is None:
        if head_dim % 2:
            raise ValueError(f"head_dim must be even unless rope_theta is None, got {head_dim} (or give rope_dim)")
        return
    check_at_least(2, rope_dim=rope_dim)
    if rope_dim % 2 or rope_dim > head_dim:
        raise ValueError(f"rope_dim must be even and at most head_dim, {head_dim}, got {rope_dim}")


def check_gate_dtype(gate_dtype: torch.dtype | None) -> None:
    if gate_dtype is None:
        return
    if not isinstance(gate_dtype, torch.dtype):
        raise TypeError(f"gate_dtype must be a dtype or None, got {type(gate_dtype).__name__}")
    if gate_dtype not in COMPUTED:
        raise ValueError(f"gate_dtype must be one of {', '.join(map(str, COMPUTED))}, got {gate_dtype}")


def check_like_weight(layer: NSAAttention, hidden_states: Tensor) -> None:
    weight = layer.q_proj.weight
    if hidden_states.device != weight.device and not moves_weights(layer.q_proj):
        raise TypeError(f"hidden_states must be on the layer's device {weight.device}, got {hidden_states.device}")
    if hidden_states.dtype != weight.dtype and not torch.is_autocast_enabled(hidden_states.device.type):
        raise TypeError(f"hidden_states must have the layer's dtype {weight.dtype}, got {hidden_states.dtype}")


def take_tokens(layer: NSAAttention, hidden_states: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """hidden_states without the leading 1 that packed ones may have, and which of them are padding.

    Padding is zeros then, since NaN in it would reach the gradients of the projections' weights.
    """
    check_tensors(hidden_states=hidden_states, cu_seqlens=cu_seqlens)
    shape = tuple(hidden_states.shape)
    dense, packed = len(shape) == 3, len(shape) == 2 or (len(shape) == 3 and shape[0] == 1)
    if not (dense if cu_seqlens is None else packed) or shape[-1] != layer.hidden_size:
        leading = "B, T" if cu_seqlens is None else "sum T"
        expected = f"({leading}, hidden_size = {layer.hidden_size})"
        raise ValueError(f"hidden_states must be {expected}, got shape {shape}")
    if type(layer.q_proj) is nn.Linear:  # a quantized or adapted one has rules of its own
        check_like_weight(layer, hidden_states)
    if cu_seqlens is None:
        return hidden_states, None
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2:
        got = tuple(cu_seqlens.shape)
        raise ValueError(f"cu_seqlens must be (B + 1,) with B >= 1, got shape {got}")
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"cu_seqlens must be int32, got {cu_seqlens.dtype}")
    x = hidden_states.flatten(0, -2)
    padding = padding_rows(cu_seqlens, x.size(0))
    return (x if padding is None else x.masked_fill(whole_like(x, padding), 0)), padding


def check_cache(layer: NSAAttention, cache: NSACache | NSALayerCache, hidden_states: Tensor) -> NSALayerCache:
    """The cache of the layer, which fits it."""
    if not isinstance(cache, (NSACache, NSALayerCache)):
        raise TypeError(f"cache must be an NSACache or a layer of one, got {type(cache).__name__}")
    if isinstance(cache, NSACache):
        if len(cache) != 1:
            raise ValueError(f"cache must be of one layer (give cache[i]), got {len(cache)}")
        cache = cache[0]
    geometry = cache.sequences.geometry
    for name in ("block_size", "block_stride", "window", "shared_kv", "kv_conv"):
        expected, got = getattr(layer, name), getattr(geometry, name)
        if got != expected:
            raise ValueError(f"cache must have {name} {expected}, got {got}")
    heads = (layer.num_kv_heads // layer.ranks, layer.head_dim, layer.v_head_dim)
    held = (*cache.k_slc.shape[1:], cache.v_slc.size(2))
    if held != heads:
        names = "(num_kv_heads, head_dim, v_head_dim)"
        raise ValueError(f"cache must have {names} {heads}, got {held}")
    if torch.is_grad_enabled() and (hidden_states.requires_grad or any(p.requires_grad for p in layer.parameters())):
        raise RuntimeError("a cache records no gradients: use torch.no_grad()")
    return cache


def check_cache_heads(projected: Projected, cache: NSALayerCache) -> None:
    heads, held = projected.k.size(-3), cache.k_slc.size(-2)
    if heads != held:
        raise ValueError(f"cache must have the {heads} KV heads of k_proj here, got {held}")
