"""Which rows of a cache one chunk of tokens reads and writes: worked out once, for all layers.

Position p of a ring of size s lives at row p % s. Every buffer holds sequence after sequence and
ends with a scratch row; what must not be stored is written there: a block not yet complete, a token
that the same chunk overwrites, padding after the last chunk, a token past the end of its sequence's
rows. So all shapes follow from the number of new tokens, and nothing is read back to the host.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .convolution import ContextRows, context_rows
from .packing import count_blocks, num_blocks, packed_blocks, sequence_of


class CacheGeometry(NamedTuple):
    """Sizes of a cache's buffers, in tokens or blocks of one sequence."""

    batch_size: int
    capacity: int  # tokens of k_slc, v_slc
    block_size: int
    block_stride: int
    window: int
    raw_size: int  # ring of unrotated tokens, at least block_size
    window_size: int  # ring of window tokens, at least window, or all that a sequence can hold
    shared_kv: bool = False  # the window branch reads k_slc, v_slc, and has no ring
    kv_conv: int = 0  # taps of the convolution; 0: none
    conv_size: int = 0  # ring of tokens before the convolution, at least kv_conv

    @property
    def blocks(self) -> int:
        """Blocks of k_cmp, v_cmp."""
        return num_blocks(self.capacity, self.block_size, self.block_stride)

    @property
    def block_rows(self) -> int:
        """Rows of k_cmp, v_cmp without the scratch row: as many as `compress` gives all slots."""
        return self.batch_size * self.capacity // self.block_stride


class RingStep(NamedTuple):
    """How one chunk passes through a ring: where it is written, and what it reads.

    It reads slots, one a sequence, of the tokens held followed by the new ones.
    """

    write: Tensor  # (N,) int64: ring row of each new token
    gather: Tensor | None  # rows of (ring, scratch, new) that make the slots; None: the ring is them
    cu_seqlens: Tensor  # (B + 1,) int32: where each slot starts
    used: Tensor  # (B,) int32: tokens in each slot; rows without meaning follow them
    max_seqlen: int  # at least the longest slot


class ConvStep(NamedTuple):
    """How one chunk is convolved with the tokens before it."""

    write: Tensor  # (N,) int64: ring row of each new token
    rows: ContextRows  # of (ring, scratch, new, zeros)


class CacheStep(NamedTuple):
    """One chunk of N new tokens, for every layer: packed chunk b continues sequence b.

    R is the number of rows that `compress` makes of the raw slots.
    """

    tokens: int  # N
    max_seqlen: int  # at least the longest chunk
    capacity: int
    cu_seqlens: Tensor  # (B + 1,) int32
    before: Tensor  # (B,) int64: lengths without the new tokens
    asked: Tensor  # (B,) int64: lengths with them, more than the capacity where they do not fit
    lengths: Tensor  # (B,) int32: lengths with those that fit
    positions: Tensor  # (N,) int64: of each token in its sequence
    slots: Tensor  # (N,) int64: rows of k_slc, v_slc
    cu_slots: Tensor  # (B + 1,) int32: where each sequence starts in k_slc
    block_slots: Tensor  # (R,) int64: rows of k_cmp, v_cmp
    block_ends: Tensor  # (R,) int64: the new token that completes each of these blocks
    raw: RingStep
    window: RingStep | None  # None: the window branch has no ring of its own
    conv: ConvStep | None = None


class _Chunk(NamedTuple):
    """The new tokens and the sequences that they continue."""

    before: Tensor  # (B,) int64: lengths without the new tokens
    added: Tensor  # (B,) int64: new tokens
    cu_seqlens: Tensor  # (B + 1,) int64
    sequence: Tensor  # (N,) int64: sequence of each token, the last one's for padding
    position: Tensor  # (N,) int64: of each token in its sequence
    to_last: Tensor  # (N,) int64: stored tokens of the chunk that follow it; negative: it is not stored
    max_seqlen: int

    def ring_rows(self, ring: int) -> Tensor:
        """Where each new token is written."""
        survives = (self.to_last >= 0) & (self.to_last < ring)
        return torch.where(survives, self.sequence * ring + self.position % ring, self.before.numel() * ring)

    def through_ring(self, ring: int, context: int, held: Tensor) -> RingStep:
        """Slots of context + chunk rows: the last `held` (B,) <= context tokens, the new ones."""
        batch, tokens, device = self.before.numel(), self.position.numel(), self.position.device
        cu_slots = torch.arange(batch + 1, device=device) * context + self.cu_seqlens
        rows = batch * context + tokens
        owner = sequence_of(cu_slots, rows).clamp(max=batch - 1)
        row = torch.arange(rows, device=device) - cu_slots[owner]
        old = owner * ring + ((self.before - held)[owner] + row) % ring
        new = batch * ring + 1 + self.cu_seqlens[owner] + row - held[owner]
        gather = torch.where(row < held[owner], old, new).clamp(max=batch * ring + tokens)
        used = (held + self.added).int()
        return RingStep(self.ring_rows(ring), gather, cu_slots.int(), used, context + self.max_seqlen)

    def through_window(self, geometry: CacheGeometry, after: Tensor) -> RingStep:
        """The window branch's ring, for sequences that get `after` (B,) tokens long."""
        ring = geometry.window_size
        if self.max_seqlen == 1 and ring <= geometry.window:
            # One query sees the whole ring, whose order does not matter to it: nothing is copied.
            starts = torch.arange(self.before.numel() + 1, device=after.device)
            return RingStep(self.ring_rows(ring), None, (starts * ring).int(), after.clamp(max=ring).int(), ring)
        context = min(geometry.window - 1, ring)
        return self.through_ring(ring, context, self.before.clamp(max=context))

    def through_conv(self, geometry: CacheGeometry, cu_seqlens: Tensor) -> ConvStep:
        ring, context = geometry.conv_size, geometry.kv_conv - 1
        rows = context_rows(cu_seqlens, self.position.numel(), context, self.before, ring)
        return ConvStep(self.ring_rows(ring), rows)


def plan_step(geometry: CacheGeometry, lengths: Tensor, cu_seqlens: Tensor, tokens: int, max_seqlen: int) -> CacheStep:
    """The step that appends `tokens` > 0 packed tokens to sequences of `lengths` (B,) int32.

    Tokens from cu_seqlens[-1] on are padding, and what does not fit into a sequence's rows is left out: a CUDA graph
    may be replayed at any length.
    """
    batch, capacity, size, stride = geometry[:4]
    before, cu = lengths.long(), cu_seqlens.long()
    sequence = sequence_of(cu, tokens).clamp(max=batch - 1)
    offset = torch.arange(tokens, device=cu.device) - cu[sequence]
    positions = before[sequence] + offset
    added = cu.diff()
    asked = before + added
    after = asked.clamp(max=capacity)
    to_last = after[sequence] - 1 - positions
    chunk = _Chunk(before, added, cu, sequence, positions, to_last, max_seqlen)
    slots = torch.where(to_last >= 0, sequence * capacity + positions, batch * capacity)
    starts = torch.arange(batch + 1, device=cu.device)

    first = count_blocks(before, size, stride)  # the first block that is not complete
    raw = chunk.through_ring(geometry.raw_size, size - 1, before - first * stride)
    window = None if geometry.shared_kv else chunk.through_window(geometry, after)
    conv = chunk.through_conv(geometry, cu_seqlens) if geometry.kv_conv else None

    # `compress` turns each raw slot into blocks: first the new ones, then some without meaning.
    rows = (batch * (size - 1) + tokens) // stride
    made = packed_blocks(raw.cu_seqlens, rows, size, stride)
    block = first[made.sequence] + made.block
    end = block * stride + size
    complete = made.used & (end <= after[made.sequence])
    block_row = made.sequence * geometry.blocks + block
    return CacheStep(
        tokens=tokens,
        max_seqlen=max_seqlen,
        capacity=capacity,
        cu_seqlens=cu_seqlens,
        before=before,
        asked=asked,
        lengths=after.int(),
        positions=positions,
        slots=slots,
        cu_slots=(starts * capacity).int(),
        block_slots=torch.where(complete, block_row, geometry.block_rows),
        block_ends=(cu[made.sequence] + end - 1 - before[made.sequence]).clamp(0, tokens - 1),
        raw=raw,
        window=window,
        conv=conv,
    )
