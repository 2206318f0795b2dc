"""What NSAAttention keeps of its sequences to continue them, token by token or chunk by chunk.

Of each sequence a layer keeps (l, d: compression block and stride, w: window):
- k_slc, v_slc: every token, rotated. The selection branch may come back to any of them.
- k_cmp, v_cmp: the compressed blocks, rotated.
- k_raw, v_raw: a ring of the compression branch's last l tokens, not rotated, for the blocks that
  are not complete yet.
- k_win, v_win: a ring of the window branch's last w tokens, rotated. No query sees older ones. With
  shared_kv there is none: the window branch reads k_slc, v_slc.
- k_conv, v_conv, with kv_conv: a ring of the last projected tokens, before the convolution.
Buffers have fixed shapes and are written in place, and a step reads nothing back to the host: a
CUDA graph can capture it. Lengths live on the device; the host keeps an upper bound of them, enough
to refuse an overflow beforehand. Lengths grow when the last layer has finished a step: one that
failed halfway, by an error or an interrupt, leaves the cache as it was.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .cache_step import CacheGeometry
from .checks import check_at_least, check_bools, check_divides, check_integers
from .layer_cache import NSALayerCache
from .packing import count_blocks
from .sequences import Reordering, Sequences

__all__ = ["NSACache", "NSALayerCache"]

_FIRST_CAPACITY = 256


class NSACache:
    """Keys and values of a batch of sequences for all NSAAttention layers of a model.

    Give layer i `cache[i]` (a cache of one layer can be given itself). The layers of one step share
    the work of finding every row, and each must be called once a step. Sequences may differ in
    length: pass the module `cu_seqlens` of the new tokens, where a sequence may get none. For
    inference: no gradient flows through a cache.

    A step counts when every layer has finished it. After an error or an interrupt in one, call the
    model again: what the failed step wrote is undone. `rollback` undoes a step that did finish. A step
    of several tokens keeps what it overwrites of the rings until the next one begins.

    A step captured in a CUDA graph can be replayed at any length. Tokens past the end of a sequence
    are left out, on the device, and `overflowed` tells; the next step outside of a graph raises
    RuntimeError until `crop` or `reset`. Such a step reads the lengths back to the host.

    Args:
        batch_size: sequences B.
        max_length: tokens that each sequence can hold; the buffers have this size from the start.
            None: they grow by doubling. Growing moves them, so torch.compile and CUDA graphs need
            a max_length.
        num_kv_heads, head_dim, v_head_dim: heads Hkv, dimensions Dk and Dv (default Dk).
        num_layers: layers that share the cache and agree in all other arguments.
        block_size, block_stride, window: l, d and w of the layers.
        shared_kv, kv_conv: those of the layers.
        max_crop: `crop` can always take back this many tokens (for speculative decoding). It
            enlarges the rings.
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
        shared_kv: bool = False,
        kv_conv: int | None = None,
        max_crop: int = 0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        v_head_dim = head_dim if v_head_dim is None else v_head_dim
        capacity = _FIRST_CAPACITY if max_length is None else max_length
        check_at_least(1, batch_size=batch_size, max_length=capacity, num_layers=num_layers)
        check_at_least(1, num_kv_heads=num_kv_heads, head_dim=head_dim, v_head_dim=v_head_dim)
        check_at_least(1, block_size=block_size, block_stride=block_stride, window=window)
        kv_conv = 0 if kv_conv is None else kv_conv
        check_at_least(0, max_crop=max_crop, kv_conv=kv_conv)
        check_bools(shared_kv=shared_kv)
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
            shared_kv=shared_kv,
            kv_conv=kv_conv,
            conv_size=kv_conv + max_crop if kv_conv else 0,
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
        self._sequences.settle_commit()
        return self._sequences.lengths

    @property
    def length_bound(self) -> int:
        """Upper bound of `lengths`, known without a host sync; exact if all chunks were equal and none captured."""
        self._sequences.settle_commit()
        return self.capacity if self._sequences.captured else self._sequences.length_bound

    @property
    def overflowed(self) -> Tensor:
        """Sequences that got more tokens than they can hold from replays of a CUDA graph, (B,) bool on the device."""
        return self._sequences.asked > self.capacity

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
        """Forget all tokens, in place."""
        self._sequences.forget()
        for layer in self.layers:
            for buffer in layer.buffers().values():
                buffer.zero_()

    @torch.no_grad()
    def rollback(self) -> bool:
        """Undo the last step, exactly, as often as it is called: the cache is as it was before it.

        For what fails after the last layer, such as sampling. A step can be undone until the next one begins, or
        `crop`, `reorder` or `reset` is called; one in a CUDA graph cannot.

        Returns:
            Whether there was a step to undo.
        """
        return self._sequences.rollback()

    @torch.no_grad()
    def reorder(self, index: Tensor) -> None:
        """Sequence b becomes the former sequence index[b], in place (beam search).

        index: (B,) integers. ValueError for another shape, TypeError for a list. If it is interrupted, call it again
        with the same index: until then every other use but `reset` raises RuntimeError.
        """
        if isinstance(index, Tensor) and tuple(index.shape) != (self.batch_size,):
            got = tuple(index.shape)
            raise ValueError(f"index must be (batch_size,) = ({self.batch_size},), got {got}")
        check_integers("index", index, (self.batch_size,))
        state, index, first = self._sequences, index.to(self.device, copy=True), 0
        buffers = [buffer for layer in self.layers for buffer in layer.buffers().values()]
        tensors = (*buffers, state.lengths, state.reach, state.asked)
        if state.reordering is not None and torch.equal(state.reordering.order, index):
            tensors[state.reordering.number].copy_(state.reordering.rows)
            first = state.reordering.number + 1
        else:
            state.settle()
        for number in range(first, len(tensors)):
            state.reordering = Reordering(index, number, tensors[number].index_select(0, index))
            tensors[number].copy_(state.reordering.rows)
        state.reordering = None

    @torch.no_grad()
    def crop(self, length: int | Tensor) -> None:
        """Shorten every sequence to at most `length` tokens (an int, or (B,) integers), exactly.

        The rings hold the last w, l and kv_conv tokens and max_crop more, counted from the longest length that a
        sequence reached since it was last empty: of that, max_crop tokens can always be taken back, in one call or in
        several. Emptying a sequence always works, and so does cropping one that never outgrew its rings. Reads the
        lengths back to the host.

        Raises:
            ValueError: a negative length, or the rings have lost what the shorter sequence needs.
                Nothing has changed then.
            TypeError: a length that is no integer.
        """
        check_integers("length", length, (), (self.batch_size,))
        state, geometry = self._sequences, self._sequences.geometry
        state.settle()
        limit = torch.as_tensor(length, device=self.device)
        reach = torch.maximum(state.reach, state.lengths)
        new = torch.minimum(state.lengths, limit).to(torch.int32)
        if bool((new < 0).any()):
            raise ValueError(f"length must be at least 0, got {length}")
        blocks = count_blocks(new, geometry.block_size, geometry.block_stride)
        held = blocks * geometry.block_stride >= reach - geometry.raw_size
        if not geometry.shared_kv:
            held &= (new - (geometry.window - 1)).clamp(min=0) >= reach - geometry.window_size
        if geometry.kv_conv:
            held &= (new - (geometry.kv_conv - 1)).clamp(min=0) >= reach - geometry.conv_size
        if not bool((held | (new == 0) | (new == state.lengths)).all()):
            raise ValueError(
                f"length must take back at most max_crop = {self.max_crop} tokens of a sequence "
                f"that has outgrown its rings, got {length} for {state.lengths.tolist()}"
            )
        longest = int(new.max())
        # In this order the rings are never thought to hold more than they do, wherever it is interrupted.
        state.reach.copy_(reach)
        state.lengths.copy_(new)
        state.length_bound = longest
        state.reach.masked_fill_(new == 0, 0)
        state.asked.zero_()
