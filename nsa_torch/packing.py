"""Where the tokens and the compressed blocks of packed sequences lie, without a host sync.

Packed sequences follow each other along one dimension; `cu_seqlens` (int32, B + 1) says where each
starts and the last ends; on a GPU rows of no sequence may follow. Their compressed blocks follow
each other without gaps, in a tensor of sum T // d rows: more than they need, but known without
reading the lengths.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def num_blocks(length: int, block_size: int, block_stride: int) -> int:
    """Compression blocks of a sequence: block m covers tokens [m d, m d + l)."""
    return max(length - block_size + block_stride, 0) // block_stride


def count_blocks(lengths: Tensor, block_size: int, block_stride: int) -> Tensor:
    """`num_blocks` of every length in an integer tensor."""
    return (lengths - (block_size - block_stride)).clamp(min=0) // block_stride


def sequence_of(cu_rows: Tensor, rows: int) -> Tensor:
    """The sequence that each of `rows` packed rows belongs to, (rows,) int64.

    cu_rows (B + 1,): 0, and the first row after each sequence, ascending. Rows after the last sequence give B.
    """
    index = torch.arange(rows, device=cu_rows.device, dtype=cu_rows.dtype)
    return torch.searchsorted(cu_rows, index, right=True) - 1


def padding_rows(cu_seqlens: Tensor, rows: int) -> Tensor | None:
    """Which of `rows` packed rows follow the last sequence, (rows, 1) bool; None on the CPU, where that is refused."""
    if cu_seqlens.device.type == "cpu":
        return None
    return mark_padding(cu_seqlens, rows)


def mark_padding(cu_seqlens: Tensor, rows: int) -> Tensor:
    """Which of `rows` packed rows follow the last sequence, (rows, 1) bool."""
    return (torch.arange(rows, device=cu_seqlens.device) >= cu_seqlens[-1]).unsqueeze(-1)


class PackedBlocks(NamedTuple):
    """What each row of a packed compressed tensor holds."""

    sequence: Tensor  # (rows,) int64: b, in [0, B)
    block: Tensor  # (rows,) int64: m, counted from the start of the sequence
    used: Tensor  # (rows,) bool: False after the last sequence's blocks, where the rest is void


def packed_blocks(cu_seqlens: Tensor, rows: int, block_size: int, block_stride: int) -> PackedBlocks:
    """Which block of which sequence each of `rows` rows of `compress`'s packed result holds."""
    counts = count_blocks(cu_seqlens.diff(), block_size, block_stride)
    ends = counts.cumsum(0)
    sequence = sequence_of(torch.nn.functional.pad(ends, (1, 0)), rows)
    used = sequence < counts.numel()
    sequence = sequence.clamp(max=counts.numel() - 1)
    block = torch.arange(rows, device=ends.device) - (ends - counts)[sequence]
    return PackedBlocks(sequence, block, used)


def packed_positions(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """Position of every packed token within its sequence, (tokens,) int64."""
    sequence = sequence_of(cu_seqlens, tokens).clamp(max=cu_seqlens.numel() - 2)
    return torch.arange(tokens, device=cu_seqlens.device) - cu_seqlens[sequence]


def packed_block_ends(cu_seqlens: Tensor, tokens: int, rows: int, block_size: int, block_stride: int) -> Tensor:
    """The packed token that ends each compressed block, (rows,) int64; any token for void rows."""
    blocks = packed_blocks(cu_seqlens, rows, block_size, block_stride)
    end = cu_seqlens[blocks.sequence] + blocks.block * block_stride + block_size - 1
    return end.clamp(max=tokens - 1)
