"""Sequences whose keys and values lie in pages, and what attention over them should give."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nsa_torch import reference


@dataclass
class Pages:
    """A batch in pages, in float64: pages that no sequence holds, and rows past its end, are full of NaN."""

    lengths: list[int]
    queries: list[int]
    heads: tuple[int, int] = (4, 2)
    dims: tuple[int, int] = (16, 8)
    page: int = 64
    spare: int = 1  # pages of a sequence beyond what it needs
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.options = {"block_size": 32, "block_stride": 16, "select_size": 64, "window": 70} | self.options
        self.generator = torch.Generator().manual_seed(self.seed)
        width = max(-(-length // self.page) for length in self.lengths) + self.spare
        pages = torch.randperm(len(self.lengths) * width + 2, generator=self.generator).int()
        self.table = pages[2:].reshape(len(self.lengths), width).contiguous()
        self.pool = {name: self.empty(name) for name in ("k_cmp", "v_cmp", "k_slc", "v_slc", "k_win", "v_win")}
        self.dense = [self.fill(b) for b in range(len(self.lengths))]
        total, (heads_q, _) = sum(self.queries), self.heads
        self.q = self.normal(total, heads_q, self.dims[0])
        self.gates = self.normal(total, heads_q, 3).sigmoid()

    def normal(self, *size: int) -> Tensor:
        return torch.randn(*size, generator=self.generator, dtype=torch.float64)

    def rows(self, name: str) -> int:
        return self.page // (self.options["block_stride"] if name.endswith("cmp") else 1)

    def empty(self, name: str) -> Tensor:
        size = (self.table.numel() + 2, self.rows(name), self.heads[1], self.dims[name[0] == "v"])
        return torch.full(size, float("nan"), dtype=torch.float64)

    def fill(self, b: int) -> dict[str, Tensor]:
        length, o = self.lengths[b], self.options
        blocks = max((length - o["block_size"]) // o["block_stride"] + 1, 0)
        dense = {}
        for name, pool in self.pool.items():
            count, shift = (blocks, o["block_size"] // o["block_stride"] - 1) if name.endswith("cmp") else (length, 0)
            dense[name] = self.normal(count, *pool.shape[2:])
            rows = torch.arange(count) + shift
            pool[self.table[b, rows // self.rows(name)].long(), rows % self.rows(name)] = dense[name]
        return dense

    def expected(self, dtype: torch.dtype) -> Tensor:
        """In float64, of inputs rounded to a dtype."""
        outs, first = [], 0
        for dense, queries in zip(self.dense, self.queries, strict=True):
            early = max(queries - len(dense["k_slc"]), 0)  # queries at positions below 0 see nothing
            outs.append(self.q.new_zeros(early, self.heads[0], self.dims[1]))
            rows = slice(first + early, first + queries)
            keys = {name: tensor.to(dtype).double()[None] for name, tensor in dense.items()}
            q, gates = (x[rows].to(dtype).double()[None] for x in (self.q, self.gates))
            if queries > early:
                outs.append(reference.nsa_attention(q, **keys, gates=gates, **self.options)[0])
            first += queries
        return torch.cat(outs)

    def arguments(self, device: str, dtype: torch.dtype) -> dict[str, Any]:
        tensors = {"q": self.q, "gates": self.gates} | self.pool
        given: dict[str, Any] = {name: tensor.to(device, dtype) for name, tensor in tensors.items()}
        if len(set(self.queries)) == 1:
            for name in ("q", "gates"):
                given[name] = given[name].unflatten(0, (len(self.queries), -1))
        else:
            given["cu_seqlens_q"] = torch.tensor([0, *self.queries]).cumsum(0).to(device, torch.int32)
            given["max_seqlen_q"] = max(self.queries)
        lengths = torch.tensor(self.lengths, dtype=torch.int32)
        return given | self.options | {"cache_seqlens": lengths.to(device), "block_table": self.table.to(device)}
