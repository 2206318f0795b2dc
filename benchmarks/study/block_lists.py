"""Longformer's and BigBird's patterns, made causal, as lists of blocks for `selected_attention`.

Longformer (arXiv 2004.05150): a sliding window, and global tokens that everyone reads. BigBird (arXiv 2007.14062):
the same and random blocks, drawn once for each layer. Both papers let global tokens read everything too; in a causal
model the first tokens have nothing more to read. Windows are whole blocks: the query's own and those before it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pattern:
    """How many blocks of `size` keys a query reads: the first ones, those up to its own, and random ones between."""

    num_global: int
    num_window: int
    num_random: int = 0
    size: int = 64

    @property
    def num_blocks(self) -> int:
        return self.num_global + self.num_window + self.num_random


def block_rows(pattern: Pattern, blocks: int, seed: int) -> list[list[int]]:
    """For each query block the ascending list of blocks that it reads."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for own in range(blocks):
        read = set(range(min(pattern.num_global, own + 1)))
        read |= set(range(max(0, own + 1 - pattern.num_window), own + 1))
        others = [block for block in range(own) if block not in read]
        order = torch.randperm(len(others), generator=generator)[: pattern.num_random]
        rows.append(sorted(read | {others[i] for i in order.tolist()}))
    return rows


def lists_of(pattern: Pattern, kv_heads: int, seed: int) -> Callable[[int, torch.device], Tensor]:
    """(T, device) -> int32 (T, Hkv, n), ascending, -1 last; each KV head draws its own random blocks."""

    @lru_cache(maxsize=16)
    def make(tokens: int, device: torch.device) -> Tensor:
        blocks = -(-tokens // pattern.size)
        lists = torch.full((blocks, kv_heads, pattern.num_blocks), -1, dtype=torch.int32)
        for head in range(kv_heads):
            for own, row in enumerate(block_rows(pattern, blocks, seed * 1009 + head)):
                lists[own, head, : len(row)] = torch.tensor(row, dtype=torch.int32)
        return lists.repeat_interleave(pattern.size, 0)[:tokens].contiguous().to(device)

    return make


def dense_mask(lists: Tensor, tokens: int, size: int) -> Tensor:
    """Lists (T, Hkv, n) as a mask for torch's attention: bool (Hkv, T, T), True where a query reads a key."""
    keys = torch.arange(tokens)
    named = (lists.unsqueeze(-1) == (keys // size)).any(-2)  # (T, Hkv, T)
    return named.transpose(0, 1) & (keys <= keys.unsqueeze(-1))
