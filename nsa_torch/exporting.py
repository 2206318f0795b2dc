"""torch.export of a layer for any number of tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn import functional as F

from .rope import Tables


class Tokens(NamedTuple):
    """Arguments of `NSAAttention.forward`."""

    x: Tensor  # (B, T, hidden) or packed (N, hidden)
    tables: Tables | Tensor | None
    cu_seqlens: Tensor | None
    max_seqlen: int | None


def lengthen(tokens: Tokens, least: int) -> Tokens:
    """The same with `least` zero tokens after them, or as a further packed sequence: no token sees what comes later.

    A graph holds for sizes of at least 2, of blocks too. T tokens have (T - l) // d + 1 of them, for blocks of l tokens
    and a stride of d: a graph for any T needs l + d tokens more. Nothing is done for tokens that are known to be
    enough, and outside of torch.export: torch.compile makes another graph for short ones.
    """
    x, tables, cu_seqlens, max_seqlen = tokens
    if not torch.compiler.is_exporting() or statically_known_true(x.size(-2) >= least):
        return tokens
    if isinstance(tables, Tensor):
        tables = F.pad(tables, (0, 0, 0, least))
    elif tables is not None:
        cos, sin = (F.pad(table, (0, 0, 0, least)) for table in tables)
        tables = cos, sin
    x = F.pad(x, (0, 0, 0, least))
    if cu_seqlens is not None:
        end = torch.full((1,), x.size(0), dtype=cu_seqlens.dtype, device=cu_seqlens.device)
        cu_seqlens = torch.cat((cu_seqlens, end))
        max_seqlen = None if max_seqlen is None else x.size(0)  # padding before it counts to the last one
    return Tokens(x, tables, cu_seqlens, max_seqlen)
