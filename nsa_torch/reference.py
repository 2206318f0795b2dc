"""The definition of Native Sparse Attention (arXiv 2502.11089) in plain torch.

Every function has the name, the arguments and the results of its fast twin in `nsa_torch`, is
differentiable by autograd, and is written to be read beside the paper: dense masks, whole score
matrices, a loop over packed sequences. It computes in the dtype of its input and is meant for
float64, where it is the truth that the tests hold the ops to; run in a lower precision, it shows
what the same maths errs in that dtype. Memory grows as Tq * Tk.

Shapes: B batch, Tq and Tk queries and keys (Tq <= Tk), Hq = G * Hkv query heads, Dk and Dv head
dimensions, M = num_blocks(Tk) compression blocks of length l = block_size and stride
d = block_stride, selection blocks of length l' = select_size. Query i of a sequence stands at
position p = Tk - Tq + i: the last query sees the last key. Packed sequences drop B, are
(sum T, H, D), and come with the keyword arguments of `_sequences` as `**packing`.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


def num_blocks(length: int, block_size: int = 32, block_stride: int = 16) -> int:
    """Number M of compression blocks of a sequence: block m covers keys [m d, m d + l)."""
    return 0 if length < block_size else (length - block_size) // block_stride + 1


def compress(
    x: Tensor,
    pe: Tensor | None = None,
    w1: Tensor | None = None,
    b1: Tensor | None = None,
    w2: Tensor | None = None,
    b2: Tensor | None = None,
    *,
    block_size: int = 32,
    block_stride: int = 16,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_k: int | None = None,
) -> Tensor:
    """phi of Eq. 7: one token for each block of keys (or of values), each KV head on its own.

    x (B, T, Hkv, D) -> (B, M, Hkv, D'); packed (sum T, Hkv, D) -> (sum T // d, Hkv, D'), where the
    blocks of all sequences follow each other without gaps and rows of zeros fill the rest.
    pe (l, D), w1 (hidden, l D), b1 (hidden), w2 (D', hidden), b2 (D'): mlp. Without w2 and b2:
    linear, w1 (D', l D). No weights: mean. Every weight may carry a leading Hkv dimension.
    """
    if w1 is None and any(weight is not None for weight in (pe, b1, w2, b2)):
        raise ValueError("w1 must be given with pe, b1, w2 or b2: the mean has no parameters")
    if cu_seqlens_k is not None:
        weights = (pe, w1, b1, w2, b2)
        options: dict[str, Any] = {"block_size": block_size, "block_stride": block_stride}
        parts = [compress(x[None, a:b], *weights, **options) for a, b in _ranges(cu_seqlens_k)]
        tokens = torch.cat(parts, dim=1)[0]
        return F.pad(tokens, (0, 0, 0, 0, 0, x.size(0) // block_stride - tokens.size(0)))

    batch, length, heads, dim = x.shape
    if length < block_size:
        blocks = x[:, :0, :, None, :].expand(batch, 0, heads, block_size, dim)
    else:
        blocks = x.unfold(1, block_size, block_stride).transpose(-1, -2)  # (B, M, Hkv, l, D)
    if w1 is None:
        return blocks.mean(dim=3)
    if pe is not None:
        blocks = blocks + pe
    hidden = _linear_per_head(blocks.flatten(3), w1, b1)
    return hidden if w2 is None else _linear_per_head(F.gelu(hidden), w2, b2)


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Ordinary softmax attention (Eq. 1, 2) over every key j <= p.

    It is what a window as long as the text gives, and what all blocks selected give.
    q (B, Tq, Hq, Dk), k (B, Tk, Hkv, Dk), v (B, Tk, Hkv, Dv)
    -> out (B, Tq, Hq, Dv), lse (B, Hq, Tq).
    """
    key = torch.arange(k.size(1), device=q.device)
    visible = key <= _positions(q, k.size(1))[:, None]
    return _attend(q, k, v, visible if causal else torch.ones_like(visible), scale)


def compressed_attention(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    *,
    seqlen_k: int | None = None,
    block_size: int = 32,
    block_stride: int = 16,
    scale: float | None = None,
    **packing: Any,
) -> tuple[Tensor, Tensor]:
    """Attention over the compressed tokens, of which p sees those with m d + l - 1 <= p.

    q (B, Tq, Hq, Dk), k_cmp (B, M, Hkv, Dk), v_cmp (B, M, Hkv, Dv), with M = num_blocks(seqlen_k)
    -> out (B, Tq, Hq, Dv), lse (B, Hq, Tq).
    """

    def dense(q: Tensor, k_cmp: Tensor, v_cmp: Tensor, seqlen_k: int) -> tuple[Tensor, Tensor]:
        visible = _visible_blocks(q, k_cmp, seqlen_k, block_size, block_stride)
        return _attend(q, k_cmp, v_cmp, visible, scale)

    sequences = _sequences(block_size, block_stride, **packing)
    if sequences is None:
        return dense(q, k_cmp, v_cmp, _required(seqlen_k))
    return _join(dense(q[None, s.q], k_cmp[None, s.cmp], v_cmp[None, s.cmp], s.seqlen_k) for s in sequences)


def block_importance(
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    *,
    seqlen_k: int,
    block_size: int = 32,
    block_stride: int = 16,
    select_size: int = 64,
    scale: float | None = None,
) -> Tensor:
    """Importance of every selection block for every query, (B, Tq, Hkv, ceil(Tk / l')); dense only.

    Eq. 9 for one head: the sum over m of p_cmp[m] c(m, j), where c counts the stride-d pieces that
    compressed block m and selection block j share. Then Eq. 10: the sum over the G heads of the
    group. The sums run in ascending order of channel, m and head, so that blocks with equal keys
    get equal importance. lse (B, Hq, Tq) is the one that `compressed_attention` returns.
    """
    visible = _visible_blocks(q, k_cmp, seqlen_k, block_size, block_stride)
    scores = _scores_in_order(q, k_cmp, scale)
    p_cmp = torch.exp(scores - lse[..., None].to(scores.dtype)).masked_fill(~visible, 0.0)

    pieces_cmp, pieces_slc = block_size // block_stride, select_size // block_stride
    count = -(-seqlen_k // select_size)
    # Column m moves to m + pieces_cmp - 1; blocks outside the sequence have probability zero.
    padded = F.pad(p_cmp, (pieces_cmp - 1, count * pieces_slc - p_cmp.size(-1)))
    per_head = padded.new_zeros(*p_cmp.shape[:-1], count)
    for offset in range(1 - pieces_cmp, pieces_slc):  # m = j l'/d + offset
        shared = min(offset + pieces_cmp, pieces_slc) - max(offset, 0)
        first = offset + pieces_cmp - 1
        per_head = per_head + shared * padded[..., first::pieces_slc][..., :count]
    group = q.size(2) // k_cmp.size(2)
    importance = torch.zeros_like(per_head[:, ::group])
    for head in range(group):
        importance = importance + per_head[:, head::group]
    return importance.transpose(1, 2)


@torch.no_grad()
def select_blocks(
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    *,
    seqlen_k: int | None = None,
    block_size: int = 32,
    block_stride: int = 16,
    select_size: int = 64,
    num_selected: int = 16,
    num_initial: int = 1,
    num_local: int = 2,
    scale: float | None = None,
    **packing: Any,
) -> Tensor:
    """Eq. 11: the n blocks that each query and KV head reads, int32 (B, Tq, Hkv, n), ascending.

    Block j is selectable when j l' <= p. Forced: the first num_initial blocks, and the block of p
    with the num_local - 1 before it. The rest of the n go to the highest importance, ties to the
    lower index, NaN lowest; -1 fills the end of the list.
    """
    if num_selected < num_initial + num_local:
        raise ValueError("num_selected must be at least num_initial + num_local")

    def dense(q: Tensor, k_cmp: Tensor, lse: Tensor, seqlen_k: int) -> Tensor:
        sizes = {"block_size": block_size, "block_stride": block_stride, "select_size": select_size}
        importance = block_importance(q, k_cmp, lse, seqlen_k=seqlen_k, scale=scale, **sizes)
        importance = importance.masked_fill(importance.isnan(), -torch.inf)
        count = importance.size(-1)
        block = torch.arange(count, device=q.device)
        current = (_positions(q, seqlen_k) // select_size)[:, None, None]  # (Tq, 1, 1)
        selectable = block <= current
        forced = selectable & ((block < num_initial) | (block > current - num_local))
        rank = (2 - selectable.int() - forced.int()).expand_as(importance)
        # Stable sorts by importance, then by rank: no importance can displace a forced block.
        order = importance.sort(dim=-1, descending=True, stable=True).indices
        order = order.gather(-1, rank.gather(-1, order).sort(dim=-1, stable=True).indices)
        chosen = order.masked_fill(rank.gather(-1, order) == 2, count)
        chosen = F.pad(chosen, (0, max(0, num_selected - count)), value=count)
        chosen = chosen[..., :num_selected].sort(dim=-1).values
        return chosen.masked_fill(chosen == count, -1).int()

    sequences = _sequences(block_size, block_stride, **packing)
    if sequences is None:
        return dense(q, k_cmp, lse, _required(seqlen_k))
    lists = [dense(q[None, s.q], k_cmp[None, s.cmp], lse[None, :, s.q], s.seqlen_k) for s in sequences]
    return torch.cat(lists, dim=1)[0]


def selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    *,
    select_size: int = 64,
    scale: float | None = None,
    **packing: Any,
) -> tuple[Tensor, Tensor]:
    """Attention over the keys j <= p of the listed blocks (Eq. 12); entries of -1 are ignored.

    q (B, Tq, Hq, Dk), k (B, Tk, Hkv, Dk), v (B, Tk, Hkv, Dv), block_indices (B, Tq, Hkv, n)
    -> out (B, Tq, Hq, Dv), lse (B, Hq, Tq).
    """

    def dense(q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor) -> tuple[Tensor, Tensor]:
        length = k.size(1)
        count = -(-length // select_size)
        indices = block_indices.long().masked_fill(block_indices < 0, count)
        listed = torch.zeros(*indices.shape[:-1], count + 1, dtype=torch.bool, device=q.device)
        listed = listed.scatter(-1, indices, True)  # column `count` swallows the -1 entries
        key = torch.arange(length, device=q.device)
        visible = listed[..., key // select_size].transpose(1, 2)  # (B, Hkv, Tq, Tk)
        visible = visible & (key <= _positions(q, length)[:, None])
        return _attend(q, k, v, visible.repeat_interleave(q.size(2) // k.size(2), dim=1), scale)

    sequences = _sequences(**packing)
    if sequences is None:
        return dense(q, k, v, block_indices)
    return _join(dense(q[None, s.q], k[None, s.k], v[None, s.k], block_indices[None, s.q]) for s in sequences)


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int = 512,
    scale: float | None = None,
    **packing: Any,
) -> tuple[Tensor, Tensor]:
    """Attention over the last `window` keys, the query's own included: p - w < j <= p.

    q (B, Tq, Hq, Dk), k (B, Tk, Hkv, Dk), v (B, Tk, Hkv, Dv)
    -> out (B, Tq, Hq, Dv), lse (B, Hq, Tq).
    """

    def dense(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        position = _positions(q, k.size(1))[:, None]
        key = torch.arange(k.size(1), device=q.device)
        return _attend(q, k, v, (key > position - window) & (key <= position), scale)

    sequences = _sequences(**packing)
    if sequences is None:
        return dense(q, k, v)
    return _join(dense(q[None, s.q], k[None, s.k], v[None, s.k]) for s in sequences)


def nsa_attention(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    k_slc: Tensor,
    v_slc: Tensor,
    k_win: Tensor,
    v_win: Tensor,
    gates: Tensor,
    *,
    block_size: int = 32,
    block_stride: int = 16,
    select_size: int = 64,
    num_selected: int = 16,
    num_initial: int = 1,
    num_local: int = 2,
    window: int = 512,
    scale: float | None = None,
    block_indices: Tensor | None = None,
    **packing: Any,
) -> Tensor:
    """Eq. 5: the gated sum of the three branches, out (B, Tq, Hq, Dv).

    q (B, Tq, Hq, Dk); k_cmp, v_cmp (B, M, Hkv, .); k_slc, v_slc, k_win, v_win (B, Tk, Hkv, .);
    gates (B, Tq, Hq, 3) in the order cmp, slc, win. block_indices (B, Tq, Hkv, n), when given,
    replaces the choice of blocks.
    """
    shared = {"scale": scale, **packing}
    blocks = {"seqlen_k": k_slc.size(1), "block_size": block_size, "block_stride": block_stride}
    o_cmp, lse_cmp = compressed_attention(q, k_cmp, v_cmp, **blocks, **shared)
    if block_indices is None:
        counts = {"num_selected": num_selected, "num_initial": num_initial, "num_local": num_local}
        blocks["select_size"] = select_size
        block_indices = select_blocks(q, k_cmp, lse_cmp, **blocks, **counts, **shared)
    o_slc, _ = selected_attention(q, k_slc, v_slc, block_indices, select_size=select_size, **shared)
    o_win, _ = window_attention(q, k_win, v_win, window=window, **shared)
    g_cmp, g_slc, g_win = gates.unsqueeze(-1).unbind(-2)
    return (g_cmp * o_cmp + g_slc * o_slc + g_win * o_win).to(q.dtype)


class _Sequence(NamedTuple):
    """Where a packed sequence lies: its queries, its keys in use and their blocks."""

    q: slice
    k: slice
    cmp: slice
    seqlen_k: int


def _sequences(
    block_size: int = 32,
    block_stride: int = 16,
    *,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    seqused_k: Tensor | None = None,
) -> list[_Sequence] | None:
    """The packed sequences; None for dense tensors. The max_seqlen_* only help kernels.

    Sequence b's keys lie in the slot [cu_seqlens_k[b], cu_seqlens_k[b + 1]); the first
    seqused_k[b] of them are in use (None: all). Compressed tokens are packed by whole slots.
    """
    if (cu_seqlens_q is None) != (cu_seqlens_k is None):
        raise ValueError("cu_seqlens_q and cu_seqlens_k must be given together")
    if cu_seqlens_q is None or cu_seqlens_k is None:
        return None
    sequences, first_block = [], 0
    slots = zip(_ranges(cu_seqlens_q), _ranges(cu_seqlens_k), strict=True)
    for b, ((q0, q1), (k0, k1)) in enumerate(slots):
        used = k1 - k0 if seqused_k is None else int(seqused_k[b])
        last_block = first_block + num_blocks(used, block_size, block_stride)
        in_use = slice(k0, k0 + used), slice(first_block, last_block)
        sequences.append(_Sequence(slice(q0, q1), *in_use, used))
        first_block += num_blocks(k1 - k0, block_size, block_stride)
    return sequences


def _ranges(cu_seqlens: Tensor) -> list[tuple[int, int]]:
    """(start, end) of every sequence; no sequences at all are one empty sequence."""
    return list(pairwise(cu_seqlens.tolist())) or [(0, 0)]


def _join(parts: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The (out, lse) of single sequences -> out (sum Tq, Hq, Dv), lse (Hq, sum Tq)."""
    outs, lses = zip(*parts, strict=True)
    return torch.cat(outs, dim=1)[0], torch.cat(lses, dim=2)[0]


def _required(seqlen_k: int | None) -> int:
    if seqlen_k is None:
        raise ValueError("seqlen_k must be given for dense tensors: k_cmp does not tell it")
    return seqlen_k


def _linear_per_head(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (B, M, Hkv, in), weight (out, in), bias (out), each with or without Hkv in front."""
    y = torch.einsum("bmhi,hoi->bmho", x, weight.expand(x.size(2), -1, -1))
    return y if bias is None else y + bias


def _positions(q: Tensor, seqlen_k: int) -> Tensor:
    """p = Tk - Tq + i for every query, (Tq,)."""
    if q.size(1) > seqlen_k:
        raise ValueError(f"q has {q.size(1)} queries, more than the {seqlen_k} keys")
    return torch.arange(seqlen_k - q.size(1), seqlen_k, device=q.device)


def _visible_blocks(q: Tensor, k_cmp: Tensor, seqlen_k: int, block_size: int, block_stride: int) -> Tensor:
    """(Tq, M): block m is visible to p when m d + l - 1 <= p."""
    count = num_blocks(seqlen_k, block_size, block_stride)
    if k_cmp.size(1) != count:
        raise ValueError(f"k_cmp must hold {count} blocks, got {k_cmp.size(1)}")
    last_key = torch.arange(count, device=q.device) * block_stride + block_size - 1
    return last_key <= _positions(q, seqlen_k)[:, None]


def _scores(q: Tensor, k: Tensor, scale: float | None) -> Tensor:
    """s q k^T of every query head with the keys of its group, (B, Hq, Tq, Tk)."""
    k = k.repeat_interleave(q.size(2) // k.size(2), dim=2)
    return torch.einsum("bihc,bjhc->bhij", q, k) * (q.size(-1) ** -0.5 if scale is None else scale)


def _scores_in_order(q: Tensor, k: Tensor, scale: float | None) -> Tensor:
    """The same, summed over the channels in ascending order: equal keys get equal scores."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    q_heads = q.transpose(1, 2).to(dtype)
    k_heads = k.transpose(1, 2).to(dtype).repeat_interleave(q.size(2) // k.size(2), dim=1)
    scores = q_heads.new_zeros(*q_heads.shape[:3], k.size(1))
    for channel in range(q.size(-1)):
        scores = scores + q_heads[..., channel, None] * k_heads[..., None, :, channel]
    return (scores * (q.size(-1) ** -0.5 if scale is None else scale)).to(q.dtype)


def _attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    """Softmax attention where `visible`, broadcast to (B, Hq, Tq, Tk), allows it.

    A row with no visible key gives out 0, lse -inf and zero gradients: constants replace its scores
    before anything can divide by the empty sum.
    """
    seen = visible.any(-1, keepdim=True)
    scores = _scores(q, k, scale).masked_fill(~visible, -torch.inf).masked_fill(~seen, 0.0)
    lse = torch.logsumexp(scores, -1, keepdim=True).masked_fill(~seen, -torch.inf)
    p = torch.exp(scores - lse.masked_fill(~seen, 0.0)).masked_fill(~visible, 0.0)
    values = v.repeat_interleave(q.size(2) // v.size(2), dim=2)
    out = torch.einsum("bhij,bjhc->bihc", p, values)
    return out, lse.squeeze(-1).to(torch.promote_types(q.dtype, torch.float32))
