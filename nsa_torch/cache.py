"""What NSAAttention keeps of its sequences to continue them, token by token or chunk by chunk.

Of each sequence a layer keeps (l, d: compression block and stride, w: window):
- k_slc, v_slc: every token, rotated. The selection branch may come back to any of them.
- k_cmp, v_cmp: the compressed blocks, rotated.
- k_raw, v_raw: a ring of the compression branch's last l tokens, not rotated, for the blocks that
  are not complete yet.
- k_win, v_win: a ring of the window branch's last w tokens, rotated. No query sees older ones.
Buffers have fixed shapes and are written in place, and a step reads nothing back to the host: a
CUDA graph can capture it. Lengths live on the device; the host keeps an upper bound of them, enough
to refuse an overflow beforehand.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import ops
from .cache_step import CacheGeometry, CacheStep, RingStep, Sequences
from .checks import check_at_least, check_divides
from .packing import count_blocks

_FIRST_CAPACITY = 256


class NSALayerCache:
    """The buffers of one layer, made by NSACache; NSAAttention reads and writes them."""

    def __init__(self, sequences: Sequences, index: int, num_kv_heads: int, like: tuple[Tensor, ...]):
        self.sequences = sequences
        self.index = index
        self.capacity = sequences.geometry.capacity

        def pair(rows: int) -> tuple[Tensor, Tensor]:
            k, v = (x.new_zeros(rows + 1, num_kv_heads, x.size(-1)) for x in like)
            return k, v

        geometry = sequences.geometry
        self.k_slc, self.v_slc = pair(geometry.batch_size * geometry.capacity)
        self.k_cmp, self.v_cmp = pair(geometry.block_rows)
        self.k_raw, self.v_raw = pair(geometry.batch_size * geometry.raw_size)
        self.k_win, self.v_win = pair(geometry.batch_size * geometry.window_size)

    @property
    def dtype(self) -> torch.dtype:
        """Of the buffers, and of the attention over them."""
        return self.k_slc.dtype

    def begin(self, cu_seqlens: Tensor, tokens: int, max_seqlen: int) -> CacheStep:
        """Start to append `tokens` packed tokens, chunk b of at most max_seqlen to sequence b."""
        step = self.sequences.begin(self.index, cu_seqlens, tokens, max_seqlen)
        if step.capacity != self.capacity:
            self._grow()
        return step

    def extend_raw(self, step: CacheStep, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add unrotated tokens (N, Hkv, D); returns pending ones and these, in step.raw's slots."""
        return _extend(self.k_raw, k, step.raw), _extend(self.v_raw, v, step.raw)

    def extend_window(self, step: CacheStep, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add rotated tokens (N, Hkv, D); returns all that they see, in step.window's slots."""
        return _extend(self.k_win, k, step.window), _extend(self.v_win, v, step.window)

    def store_tokens(self, step: CacheStep, k: Tensor, v: Tensor) -> None:
        """Add rotated selection-branch tokens (N, Hkv, D)."""
        _store(self.k_slc, k, step.slots)
        _store(self.v_slc, v, step.slots)

    def store_blocks(self, step: CacheStep, k: Tensor, v: Tensor) -> None:
        """Add those that are complete of the blocks (R, Hkv, D) made of `extend_raw`'s slots."""
        _store(self.k_cmp, k, step.block_slots)
        _store(self.v_cmp, v, step.block_slots)

    def attend(
        self,
        step: CacheStep,
        q: Tensor,
        gates: Tensor,
        window_slots: tuple[Tensor, Tensor],
        *,
        select_size: int,
        num_selected: int,
        num_initial: int,
        num_local: int,
        scale: float | None,
    ) -> Tensor:
        """The gated sum of the three branches over all that is held, the new tokens included.

        q (N, Hq, Dk) rotated, gates (N, Hq, 3), window_slots of `extend_window` -> (N, Hq, Dv) of
        q's dtype. The branches are separate ops since each has its own slots: positions count from
        the end of a slot, so the window's need not hold what no query sees.
        """
        geometry, dtype, q = self.sequences.geometry, q.dtype, q.to(self.dtype)
        queries: dict[str, Any] = {
            "scale": scale,
            "cu_seqlens_q": step.cu_seqlens,
            "max_seqlen_q": step.max_seqlen,
        }
        slots = queries | {
            "cu_seqlens_k": step.cu_slots,
            "max_seqlen_k": step.capacity,
            "seqused_k": step.lengths,
        }
        ring = queries | {
            "cu_seqlens_k": step.window.cu_seqlens,
            "max_seqlen_k": step.window.max_seqlen,
            "seqused_k": step.window.used,
        }
        blocks = slots | {
            "block_size": geometry.block_size,
            "block_stride": geometry.block_stride,
        }
        o_cmp, lse = ops.compressed_attention(q, self.k_cmp[:-1], self.v_cmp[:-1], **blocks)
        block_indices = ops.select_blocks(
            q,
            self.k_cmp[:-1],
            lse,
            select_size=select_size,
            num_selected=num_selected,
            num_initial=num_initial,
            num_local=num_local,
            **blocks,
        )
        o_slc, _ = ops.selected_attention(
            q, self.k_slc[:-1], self.v_slc[:-1], block_indices, select_size=select_size, **slots
        )
        o_win, _ = ops.window_attention(q, *window_slots, window=geometry.window, **ring)
        g_cmp, g_slc, g_win = gates.unsqueeze(-1).unbind(-2)
        return (g_cmp * o_cmp + g_slc * o_slc + g_win * o_win).to(dtype)

    def buffers(self) -> dict[str, Tensor]:
        """Every buffer, seen as (B, rows of one sequence, Hkv, D)."""
        geometry = self.sequences.geometry._replace(capacity=self.capacity)
        batch = geometry.batch_size
        rows = {
            "slc": geometry.capacity,
            "cmp": geometry.blocks,
            "raw": geometry.raw_size,
            "win": geometry.window_size,
        }
        names = {f"{tensor}_{branch}": size for branch, size in rows.items() for tensor in "kv"}
        return {name: getattr(self, name)[: batch * size].unflatten(0, (batch, size)) for name, size in names.items()}

    def _grow(self) -> None:
        """Move tokens and blocks to buffers of the capacity that the sequences now need."""
        old, geometry = self.buffers(), self.sequences.geometry
        rows = {"slc": geometry.batch_size * geometry.capacity, "cmp": geometry.block_rows}
        with torch.inference_mode(False), torch.no_grad():
            for name in ("k_slc", "v_slc", "k_cmp", "v_cmp"):
                buffer = getattr(self, name)
                setattr(self, name, buffer.new_zeros(rows[name[2:]] + 1, *buffer.shape[1:]))
            self.capacity = geometry.capacity
            for name, grown in self.buffers().items():
                if grown.shape != old[name].shape:
                    grown[:, : old[name].size(1)] = old[name]


class NSACache:
    """Keys and values of a batch of sequences for all NSAAttention layers of a model.

    Give layer i `cache[i]` (a cache of one layer can be given itself). The layers of one step share
    the work of finding every row, and each must be called once a step. Sequences may differ in
    length: pass the module `cu_seqlens` of the new tokens, where a sequence may get none. For
    inference: no gradient flows through a cache.

    Args:
        batch_size: sequences B.
        max_length: tokens that each sequence can hold; the buffers have this size from the start.
            None: they grow by doubling. Growing moves them, so torch.compile and CUDA graphs need
            a max_length.
        num_kv_heads, head_dim, v_head_dim: heads Hkv, dimensions Dk and Dv (default Dk).
        num_layers: layers that share the cache and agree in all other arguments.
        block_size, block_stride, window: l, d and w of the layers.
        max_crop: `crop` can always take back this many tokens (for speculative decoding). It
            enlarges both rings.
        dtype, device: of the buffers. The branches compute in this dtype.

    Raises:
        ValueError: an argument out of range; later, tokens that would exceed max_length, before
            anything is written.
    """

    def __init__(
        self,
        batch_size: int,
        max_length: int | None = None,
        *,
        num_kv_heads: int,
        head_dim: int,
        v_head_dim: int | None = None,
        num_layers: int = 1,
        block_size: int = 32,
        block_stride: int = 16,
        window: int = 512,
        max_crop: int = 0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        v_head_dim = head_dim if v_head_dim is None else v_head_dim
        capacity = _FIRST_CAPACITY if max_length is None else max_length
        check_at_least(1, batch_size=batch_size, max_length=capacity, num_layers=num_layers)
        check_at_least(1, num_kv_heads=num_kv_heads, head_dim=head_dim, v_head_dim=v_head_dim)
        check_at_least(1, block_size=block_size, block_stride=block_stride, window=window)
        check_at_least(0, max_crop=max_crop)
        check_divides("block_stride", block_stride, "block_size", block_size)
        self.batch_size = batch_size
        self.max_length = max_length
        self.max_crop = max_crop
        window_size = window + max_crop
        geometry = CacheGeometry(
            batch_size=batch_size,
            capacity=capacity,
            block_size=block_size,
            block_stride=block_stride,
            window=window,
            raw_size=block_size + max_crop,
            window_size=window_size if max_length is None else min(window_size, max_length),
        )
        # A tensor made in inference mode could not be changed in place outside of it.
        with torch.inference_mode(False):
            like = [torch.empty(0, d, dtype=dtype, device=device) for d in (head_dim, v_head_dim)]
            self._sequences = Sequences(geometry, max_length, num_layers, like[0].device)
            self.layers = [
                NSALayerCache(self._sequences, index, num_kv_heads, tuple(like)) for index in range(num_layers)
            ]

    @property
    def lengths(self) -> Tensor:
        """Tokens of every sequence, (B,) int32 on the device. Not to be changed."""
        return self._sequences.lengths

    @property
    def length_bound(self) -> int:
        """Upper bound of `lengths`, known without a host sync; exact if all chunks were equal."""
        return self._sequences.length_bound

    @property
    def capacity(self) -> int:
        """Tokens of a sequence that fit without growing."""
        return self._sequences.geometry.capacity

    @property
    def dtype(self) -> torch.dtype:
        """Of the buffers, and of the attention over them."""
        return self.layers[0].dtype

    @property
    def device(self) -> torch.device:
        """Where the buffers are."""
        return self.lengths.device

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(buffer.nbytes for layer in self for buffer in layer.buffers().values())

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, index: int) -> NSALayerCache:
        return self.layers[index]

    def __iter__(self) -> Iterator[NSALayerCache]:
        return iter(self.layers)

    def __repr__(self) -> str:
        return (
            f"NSACache(batch_size={self.batch_size}, max_length={self.max_length}, "
            f"capacity={self.capacity}, length_bound={self.length_bound}, num_layers={len(self)}, "
            f"dtype={self.dtype}, device='{self.device}', {self.nbytes / 2**20:.1f} MiB)"
        )

    @torch.no_grad()
    def reset(self) -> None:
        """Forget all tokens, in place. Also the way on after a step that failed halfway."""
        for layer in self.layers:
            for buffer in layer.buffers().values():
                buffer.zero_()
        self._sequences.forget()

    @torch.no_grad()
    def reorder(self, index: Tensor) -> None:
        """Sequence b becomes the former sequence index[b], in place (beam search).

        index: (B,) integers. ValueError for another shape.
        """
        if tuple(index.shape) != (self.batch_size,):
            got = tuple(index.shape)
            raise ValueError(f"index must be (batch_size,) = ({self.batch_size},), got {got}")
        index = index.to(self.device)
        buffers = [buffer for layer in self.layers for buffer in layer.buffers().values()]
        for tensor in (*buffers, self._sequences.lengths, self._sequences.reach):
            tensor.copy_(tensor.index_select(0, index))

    @torch.no_grad()
    def crop(self, length: int | Tensor) -> None:
        """Shorten every sequence to at most `length` tokens (an int, or (B,) integers), exactly.

        The rings hold the last w and l tokens and max_crop more: taking back max_crop tokens always
        works, and so does emptying a sequence, or cropping one that never outgrew its rings. Reads
        the lengths back to the host.

        Raises:
            ValueError: a negative length, or the rings have lost what the shorter sequence needs.
                Nothing has changed then.
        """
        state, geometry = self._sequences, self._sequences.geometry
        limit = torch.as_tensor(length, device=self.device)
        reach = torch.maximum(state.reach, state.lengths)
        new = torch.minimum(state.lengths, limit).to(torch.int32)
        if bool((new < 0).any()):
            raise ValueError(f"length must be at least 0, got {length}")
        blocks = count_blocks(new, geometry.block_size, geometry.block_stride)
        oldest_raw = blocks * geometry.block_stride
        oldest_window = (new - (geometry.window - 1)).clamp(min=0)
        held = oldest_raw >= reach - geometry.raw_size
        held &= oldest_window >= reach - geometry.window_size
        if not bool((held | (new == 0) | (new == state.lengths)).all()):
            raise ValueError(
                f"length must take back at most max_crop = {self.max_crop} tokens of a sequence "
                f"that has outgrown its rings, got {length} for {state.lengths.tolist()}"
            )
        state.reach.copy_(reach.masked_fill(new == 0, 0))
        state.lengths.copy_(new)
        state.length_bound = int(new.max())


def _extend(ring: Tensor, new: Tensor, step: RingStep) -> Tensor:
    """Write new tokens to the ring; returns the slots of the tokens held before and these."""
    new = new.to(ring.dtype)
    slots = None if step.gather is None else torch.cat((ring, new)).index_select(0, step.gather)
    ring.index_copy_(0, step.write, new)
    return ring[:-1] if slots is None else slots


def _store(buffer: Tensor, new: Tensor, rows: Tensor) -> None:
    buffer.index_copy_(0, rows, new.to(buffer.dtype))
