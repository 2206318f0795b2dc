"""What `diagnose` computes of one layer: all tokens' gates and contributions, and a sample of the queries' choices."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import ops
from ..heads import NSAInputs

if TYPE_CHECKING:
    from ..module import NSAAttention

MOST_SCORES = 1 << 24  # of dense attention at once: bounds the memory at any length


class Branches(NamedTuple):
    """A layer's choice, and what its branches give."""

    block_indices: Tensor  # (N, Hkv, n) int32
    norms: Tensor  # (Hq, 3) float64: mean over tokens of the norm of gate times output


class Held(NamedTuple):
    """Shares of dense attention's mass, each (Hq, S) float64 for S queries."""

    chosen: Tensor
    best: Tensor
    forced: Tensor


def attend_apart(layer: NSAAttention, inputs: NSAInputs, packing: dict[str, Any], rows: int) -> Branches:
    """Each branch by itself, of which the first `rows` rows count."""
    blocks: dict[str, Any] = layer._block_options() | {"scale": layer.scale} | packing
    if not packing:
        blocks["seqlen_k"] = inputs.q.size(1)
    compressed, lse = ops.compressed_attention(inputs.q, inputs.k_cmp, inputs.v_cmp, **blocks)
    indices = ops.select_blocks(inputs.q, inputs.k_cmp, lse, **layer._choice_options(), **blocks)
    norms = [_norms(compressed, inputs.gates[..., 0], rows)]
    options: dict[str, Any] = {"scale": layer.scale} | packing
    del compressed, lse
    selected, _ = ops.selected_attention(
        inputs.q, inputs.k_slc, inputs.v_slc, indices, select_size=layer.select_size, **options
    )
    norms.append(_norms(selected, inputs.gates[..., 1], rows))
    del selected
    near, _ = ops.window_attention(inputs.q, inputs.k_win, inputs.v_win, window=layer.window, **options)
    norms.append(_norms(near, inputs.gates[..., 2], rows))
    return Branches(indices.flatten(0, -3), torch.stack(norms, dim=-1))


def _norms(out: Tensor, gate: Tensor, rows: int) -> Tensor:
    norms = torch.linalg.vector_norm(out, dim=-1, dtype=_accurate(out.dtype)) * gate
    return norms.flatten(0, -2)[:rows].mean(0).double().cpu()


def _accurate(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def sequences_of(inputs: NSAInputs, packing: dict[str, Any]) -> list[range]:
    """The rows of every sequence, in tensors whose leading dimensions are one."""
    if packing:
        ends = packing["cu_seqlens_q"].tolist()
        return [range(start, end) for start, end in pairwise(ends)]
    batch, length = inputs.q.shape[:2]
    return [range(b * length, (b + 1) * length) for b in range(batch)]


def sample_choosing(layer: NSAAttention, sequences: list[range], queries: int, seed: int) -> list[Tensor]:
    """Of each sequence the positions of some queries that more blocks lie before than they may read, ascending.

    `queries` in all, or as many as there are.
    """
    first = layer.num_selected * layer.select_size
    counts = torch.tensor([max(0, len(rows) - first) for rows in sequences])
    starts = counts.cumsum(0) - counts
    random = torch.Generator().manual_seed(seed)
    total = int(counts.sum())
    if total <= queries:
        drawn = torch.arange(total)
    else:
        # Drawn with repetition until there are enough, since a permutation would take memory for every token.
        drawn = torch.randint(total, (queries,), generator=random).unique()
        while len(drawn) < queries:
            more = torch.randint(total, (queries - len(drawn),), generator=random)
            drawn = torch.cat((drawn, more)).unique()
    return [drawn[(drawn >= s) & (drawn < s + c)] - s + first for s, c in zip(starts, counts, strict=True)]


def held_by_blocks(layer: NSAAttention, q: Tensor, k: Tensor, positions: Tensor, block_indices: Tensor) -> Held:
    """How much of dense attention's mass lies in blocks, for some queries of one sequence.

    q (S, Hq, Dk) at `positions` (S,); k (T, Hkv, Dk), the selected branch's keys; block_indices (S, Hkv, n).
    """
    parts = [
        _held(layer, q[rows], k, positions[rows], block_indices[rows])
        for rows in _chunks(len(positions), q.size(1) * k.size(0))
    ]
    return Held(*(torch.cat(shares, dim=1) for shares in zip(*parts, strict=True)))


def _chunks(count: int, scores_of_one: int) -> Iterator[slice]:
    size = max(1, MOST_SCORES // max(1, scores_of_one))
    for start in range(0, count, size):
        yield slice(start, start + size)


def _held(layer: NSAAttention, q: Tensor, k: Tensor, positions: Tensor, block_indices: Tensor) -> Held:
    size, group = layer.select_size, q.size(1) // k.size(1)
    tokens = int(positions.max()) + 1
    count = -(-tokens // size)
    probabilities = dense_probabilities(q, k[:tokens], positions, layer.scale)
    mass = F.pad(probabilities, (0, count * size - tokens)).unflatten(-1, (count, size)).sum(-1)  # (Hq, S, blocks)
    own, block = (positions // size)[:, None], torch.arange(count, device=q.device)
    visible = block <= own
    forced = visible & ((block < layer.num_initial) | (block > own - layer.num_local))
    listed = block_indices.transpose(0, 1).long()  # (Hkv, S, n); -1 goes to a column that is cut off
    chosen = torch.zeros(*listed.shape[:2], count + 1, dtype=torch.bool, device=q.device)
    chosen = chosen.scatter(-1, listed.masked_fill(listed < 0, count), True)[..., :count]
    by_group = mass.unflatten(0, (-1, group)).sum(1).masked_fill(~visible, -1.0).masked_fill(forced, torch.inf)
    top = by_group.topk(min(layer.num_selected, count), dim=-1).indices
    best = torch.zeros_like(chosen).scatter(-1, top, True)
    masks = (chosen, best, forced.expand_as(chosen))
    shares = [(mass * mask.repeat_interleave(group, 0)).sum(-1).double().cpu() for mask in masks]
    return Held(*shares)


def dense_probabilities(q: Tensor, k: Tensor, positions: Tensor, scale: float | None) -> Tensor:
    """Softmax over the keys up to each query: q (S, Hq, Dk), k (T, Hkv, Dk) -> (Hq, S, T), at least float32."""
    dtype, heads = _accurate(q.dtype), k.size(1)
    with torch.autocast(q.device.type, enabled=False):
        grouped = q.to(dtype).unflatten(1, (heads, -1))
        scores = torch.einsum("shgc,thc->hgst", grouped, k.to(dtype)).flatten(0, 1)
        scores *= q.size(-1) ** -0.5 if scale is None else scale
    later = torch.arange(k.size(0), device=q.device) > positions[:, None]
    return scores.masked_fill_(later, -torch.inf).softmax(-1)


def shared_with_last(layer: NSAAttention, block_indices: Tensor, positions: Tensor) -> tuple[Tensor, int]:
    """Of the blocks that queries chose, how many the query before each read too: (Hkv,) float64; and of how many.

    block_indices (T, Hkv, n) of one sequence; positions (S,), none of them 0.
    """
    listed, before = block_indices[positions], block_indices[positions - 1]
    own = (positions // layer.select_size)[:, None, None]
    free = (listed >= layer.num_initial) & (listed <= own - layer.num_local)
    same = free & (listed[..., :, None] == before[..., None, :]).any(-1)
    return same.sum((0, 2)).double().cpu(), int(free[:, 0].sum())
