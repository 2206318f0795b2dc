"""Caches made of other caches: some of their sequences, more room, larger rings; and looks at what one holds."""

from __future__ import annotations

import torch
from torch import Tensor

from .cache import NSACache, NSALayerCache
from .cache_step import CacheStep, plan_step


@torch.no_grad()
def reserve(cache: NSACache, capacity: int) -> None:
    """Give a growing cache room for `capacity` tokens a sequence at once. Nothing happens if it has that."""
    state = cache._sequences
    if cache.max_length is None and capacity > cache.capacity:
        state.geometry = state.geometry._replace(capacity=capacity)
        for layer in cache.layers:
            layer._grow()


@torch.no_grad()
def copy_cache(cache: NSACache, index: Tensor | None = None, max_crop: int | None = None) -> NSACache:
    """A cache that holds what another does.

    Args:
        cache: stays as it is.
        index: (B',) integers: sequence b of the new cache is sequence index[b] of the old one; default all.
        max_crop: tokens that `crop` can take back, at least the old cache's and its default. Of the tokens that
            are copied no more than the old cache could have taken back.

    Returns:
        An NSACache of batch B', otherwise with the arguments of the old one.
    """
    old, layer = cache._sequences, cache.layers[0]
    old.settle()
    index = torch.arange(cache.batch_size, device=cache.device) if index is None else index.to(cache.device).long()
    geometry = old.geometry
    copy = NSACache(
        index.numel(),
        cache.max_length,
        num_kv_heads=layer.k_slc.size(1),
        head_dim=layer.k_slc.size(2),
        v_head_dim=layer.v_slc.size(2),
        num_layers=len(cache),
        block_size=geometry.block_size,
        block_stride=geometry.block_stride,
        window=geometry.window,
        shared_kv=geometry.shared_kv,
        kv_conv=geometry.kv_conv,
        max_crop=cache.max_crop if max_crop is None else max_crop,
        dtype=cache.dtype,
        device=cache.device,
    )
    reserve(copy, cache.capacity)
    new = copy._sequences
    new.lengths.copy_(old.lengths[index])
    # Larger rings start with what the smaller ones held, as if as many tokens more had gone through them.
    grown = new.geometry.raw_size - geometry.raw_size
    new.reach.copy_(torch.maximum(old.reach, old.lengths)[index] + grown)
    new.asked.copy_(old.asked[index])
    new.length_bound = cache.length_bound
    for source, target in zip(cache.layers, copy.layers, strict=True):
        buffers = target.buffers()
        for name, buffer in source.buffers().items():
            rows = buffer.index_select(0, index)
            if name.endswith(("slc", "cmp")):
                buffers[name][:, : rows.size(1)] = rows
            else:
                _copy_ring(buffers[name], rows, new.lengths)
    return copy


def _copy_ring(ring: Tensor, old: Tensor, lengths: Tensor) -> None:
    """Place the tokens of rings (B, rows, Hkv, D) in larger ones: position p lies at p modulo their size."""
    back = torch.arange(1, old.size(1) + 1, device=ring.device)
    position = (lengths.long().unsqueeze(1) - back).clamp(min=0)  # those before the start repeat position 0
    batch = torch.arange(ring.size(0), device=ring.device).unsqueeze(1)
    ring[batch, position % ring.size(1)] = old[batch, position % old.size(1)]


def look(layer: NSALayerCache, lengths: Tensor) -> tuple[CacheStep, tuple[Tensor, Tensor] | None]:
    """A step that appends nothing: one query for each sequence, which sees all that the sequence holds.

    lengths (B,) int32: tokens that the layer holds, within a step those of the step. Returns the step and the slots of
    the window, as NSALayerCache.attend takes them. Queries of empty sequences see rows without meaning.
    """
    geometry, device = layer.sequences.geometry, lengths.device
    batch, ring, width = geometry.batch_size, geometry.window_size, min(geometry.window, geometry.window_size)
    starts = torch.arange(batch + 1, device=device, dtype=torch.int32)
    used = lengths.clamp(min=1, max=width)
    position = (lengths - used).clamp(min=0).long().unsqueeze(1) + torch.arange(width, device=device)
    rows = (starts[:-1].long().unsqueeze(1) * ring + position % ring).flatten()
    plan = plan_step(geometry, lengths, starts, batch, 1)
    plan = plan._replace(lengths=lengths.clamp(min=1))
    if plan.window is None or layer.k_win is None or layer.v_win is None:
        return plan, None
    slots = layer.k_win.index_select(0, rows), layer.v_win.index_select(0, rows)
    window = plan.window._replace(cu_seqlens=starts * width, used=used, max_seqlen=width)
    return plan._replace(window=window), slots
