"""Which rows of a cache one chunk of tokens reads and writes: worked out once, for all layers.

Position p of a ring of size s lives at row p % s. Every buffer holds sequence after sequence and
ends with a scratch row; what must not be stored (a block not yet complete, a token that the same
chunk overwrites) is written there. So all shapes follow from the number of new tokens, and nothing
is read back to the host.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

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


class CacheStep(NamedTuple):
    """One chunk of N new tokens, for every layer: packed chunk b continues sequence b.

    R is the number of rows that `compress` makes of the raw slots.
    """

    tokens: int  # N
    max_seqlen: int  # at least the longest chunk
    capacity: int
    cu_seqlens: Tensor  # (B + 1,) int32
    lengths: Tensor  # (B,) int32: of the sequences with the new tokens
    positions: Tensor  # (N,) int64: of each token in its sequence
    slots: Tensor  # (N,) int64: rows of k_slc, v_slc
    cu_slots: Tensor  # (B + 1,) int32: where each sequence starts in k_slc
    block_slots: Tensor  # (R,) int64: rows of k_cmp, v_cmp
    block_ends: Tensor  # (R,) int64: the new token that completes each of these blocks
    raw: RingStep
    window: RingStep


class _Chunk(NamedTuple):
    """The new tokens and the sequences that they continue."""

    before: Tensor  # (B,) int64: lengths without the new tokens
    added: Tensor  # (B,) int64: new tokens
    cu_seqlens: Tensor  # (B + 1,) int64
    sequence: Tensor  # (N,) int64: sequence of each token
    offset: Tensor  # (N,) int64: place of each token in its chunk
    max_seqlen: int

    def through_ring(self, ring: int, context: int, held: Tensor) -> RingStep:
        """Slots of context + chunk rows: the last `held` (B,) <= context tokens, the new ones."""
        batch, tokens, device = self.before.numel(), self.offset.numel(), self.offset.device
        survives = self.offset >= self.added[self.sequence] - ring
        position = self.before[self.sequence] + self.offset
        write = torch.where(survives, self.sequence * ring + position % ring, batch * ring)
        cu_slots = torch.arange(batch + 1, device=device) * context + self.cu_seqlens
        rows = batch * context + tokens
        owner = sequence_of(cu_slots, rows).clamp(max=batch - 1)
        row = torch.arange(rows, device=device) - cu_slots[owner]
        old = owner * ring + ((self.before - held)[owner] + row) % ring
        new = batch * ring + 1 + self.cu_seqlens[owner] + row - held[owner]
        gather = torch.where(row < held[owner], old, new).clamp(max=batch * ring + tokens)
        used = (held + self.added).int()
        return RingStep(write, gather, cu_slots.int(), used, context + self.max_seqlen)


def plan_step(geometry: CacheGeometry, lengths: Tensor, cu_seqlens: Tensor, tokens: int, max_seqlen: int) -> CacheStep:
    """The step that appends `tokens` > 0 packed tokens to sequences of `lengths` (B,) int32."""
    batch, capacity, size, stride = geometry[:4]
    before, cu = lengths.long(), cu_seqlens.long()
    sequence = sequence_of(cu, tokens).clamp(max=batch - 1)
    offset = torch.arange(tokens, device=cu.device) - cu[sequence]
    chunk = _Chunk(before, cu.diff(), cu, sequence, offset, max_seqlen)
    after = before + chunk.added
    positions = before[sequence] + offset
    slots = torch.where(positions < capacity, sequence * capacity + positions, batch * capacity)
    starts = torch.arange(batch + 1, device=cu.device)

    first = count_blocks(before, size, stride)  # the first block that is not complete
    raw = chunk.through_ring(geometry.raw_size, size - 1, before - first * stride)
    context = min(geometry.window - 1, geometry.window_size)
    window = chunk.through_ring(geometry.window_size, context, before.clamp(max=context))
    if max_seqlen == 1 and geometry.window_size <= geometry.window:
        # One query sees the whole ring, whose order does not matter to it: nothing is copied.
        ring = geometry.window_size
        used = after.clamp(max=ring).int()
        window = RingStep(window.write, None, (starts * ring).int(), used, ring)

    # `compress` turns each raw slot into blocks: first the new ones, then some without meaning.
    rows = (batch * (size - 1) + tokens) // stride
    made = packed_blocks(raw.cu_seqlens, rows, size, stride)
    block = first[made.sequence] + made.block
    end = block * stride + size
    complete = made.used & (end <= after[made.sequence]) & (block < geometry.blocks)
    block_row = made.sequence * geometry.blocks + block
    return CacheStep(
        tokens=tokens,
        max_seqlen=max_seqlen,
        capacity=capacity,
        cu_seqlens=cu_seqlens,
        lengths=after.int(),
        positions=positions,
        slots=slots,
        cu_slots=(starts * capacity).int(),
        block_slots=torch.where(complete, block_row, geometry.block_rows),
        block_ends=(cu[made.sequence] + end - 1 - before[made.sequence]).clamp(0, tokens - 1),
        raw=raw,
        window=window,
    )


class Sequences:
    """Lengths of the sequences and the step under way: what all layers of a cache share."""

    def __init__(self, geometry: CacheGeometry, max_length: int | None, num_layers: int, device: torch.device):
        check_addressable(geometry.batch_size, geometry.capacity)
        self.geometry = geometry
        self.max_length = max_length
        self.num_layers = num_layers
        self.lengths = torch.zeros(geometry.batch_size, dtype=torch.int32, device=device)
        # The longest each sequence was before it was cropped: what its rings were written up to.
        self.reach = torch.zeros_like(self.lengths)
        self.forget()

    def forget(self) -> None:
        """Empty all sequences."""
        self.lengths.zero_()
        self.reach.zero_()
        self.length_bound = 0
        self.step: CacheStep | None = None
        self.served = [True] * self.num_layers  # which layers have taken part in the step

    def begin(self, layer: int, cu_seqlens: Tensor, tokens: int, max_seqlen: int) -> CacheStep:
        """The step of this chunk: the first layer that asks makes it, and the lengths grow then."""
        if self.step is None or self.served[layer]:
            late = [other for other, served in enumerate(self.served) if not served]
            if late:
                raise RuntimeError(f"cache layers {late} have not seen the previous tokens: reset()")
            self._check_chunk(cu_seqlens, tokens, max_seqlen)
            self._reserve(cu_seqlens, max_seqlen)
            self.step = plan_step(self.geometry, self.lengths, cu_seqlens, tokens, max_seqlen)
            self.lengths.copy_(self.step.lengths)
            self.served = [False] * self.num_layers
        elif (self.step.tokens, self.step.max_seqlen) != (tokens, max_seqlen):
            first = f"{self.step.tokens} with max_seqlen {self.step.max_seqlen}"
            raise ValueError(
                f"hidden_states must have the tokens that the other layers of the cache got, "
                f"{first}, got {tokens} with max_seqlen {max_seqlen} in layer {layer}"
            )
        self.served[layer] = True
        return self.step

    def _check_chunk(self, cu_seqlens: Tensor, tokens: int, max_seqlen: int) -> None:
        shape, device = (self.geometry.batch_size + 1,), self.lengths.device
        if tuple(cu_seqlens.shape) != shape:
            got = tuple(cu_seqlens.shape)
            raise ValueError(f"cu_seqlens must be (batch_size + 1,) = {shape}, got {got}")
        if cu_seqlens.device != device:
            raise TypeError(f"cu_seqlens must be on {device} like the cache, got {cu_seqlens.device}")
        if device.type == "cpu" and not torch.compiler.is_compiling():
            ends = cu_seqlens.tolist()
            chunks = [end - start for start, end in pairwise(ends)]
            if ends[0] != 0 or ends[-1] != tokens or min(chunks) < 0:
                raise ValueError(f"cu_seqlens must rise from 0 to the {tokens} tokens, got {ends}")
            if max(chunks) > max_seqlen:
                expected = f"at least the longest chunk, {max(chunks)}"
                raise ValueError(f"max_seqlen must be {expected}, got {max_seqlen}")

    def _reserve(self, cu_seqlens: Tensor, max_seqlen: int) -> None:
        """Make room for a chunk or refuse it; reads the lengths only if their bound overflows.

        Where nothing may be read back, a compiled or captured step, the bound alone decides.
        """
        bound, capacity = self.length_bound + max_seqlen, self.geometry.capacity
        device = self.lengths.device
        fixed = torch.compiler.is_compiling() or (device.type == "cuda" and torch.cuda.is_current_stream_capturing())
        if bound > capacity and not fixed:
            bound = int((self.lengths + cu_seqlens.diff()).max())
            if bound > capacity and self.max_length is None:
                capacity = max(bound, 2 * capacity)
                check_addressable(self.geometry.batch_size, capacity)
                self.geometry = self.geometry._replace(capacity=capacity)
        if bound > capacity:
            hint = " (a bound: give max_seqlen if chunks are shorter than all tokens)" if fixed else ""
            raise ValueError(
                f"max_length must be at least {bound} to hold the cached and the new tokens{hint}, "
                f"got {self.max_length}, with buffers for {capacity}"
            )
        self.length_bound = bound


def check_addressable(batch_size: int, capacity: int) -> None:
    """Offsets of the slots are int32."""
    if batch_size * capacity >= 2**31:
        got = f"{capacity} * {batch_size}"
        raise ValueError(f"max_length * batch_size must be below 2^31, got {got}")
