"""Attention of a few new tokens over keys and values in pages: what a serving engine calls for each layer and step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .ops import _call

__all__ = ["nsa_attention_with_kvcache"]


def nsa_attention_with_kvcache(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    k_slc: Tensor,
    v_slc: Tensor,
    k_win: Tensor,
    v_win: Tensor,
    gates: Tensor,
    *,
    cache_seqlens: Tensor,
    block_table: Tensor,
    window_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | None = None,
    block_size: int = 32,
    block_stride: int = 16,
    select_size: int = 64,
    num_selected: int = 16,
    num_initial: int = 1,
    num_local: int = 2,
    window: int = 512,
    scale: float | None = None,
    num_splits: int | None = None,
) -> Tensor:
    """:func:`nsa_attention` for the last tokens of sequences whose keys and values lie in pages. Without gradients.

    Token t of sequence b is row t % page_size of page ``block_table[b, t // page_size]``. Compressed block m lies under
    the same table, where its last token does: of the rows that a page of ``k_cmp`` has, page_size / d, it is row
    m + l / d - 1 of the sequence. So sequences share a prefix by sharing its pages. All that a query sees has to be in
    the pages before the call, the new tokens' own keys included.

    A contiguous cache (B, length, Hkv, D) is one page for each sequence: ``block_table = arange(B)[:, None]``.

    On CUDA nothing is read back to the host, and how the work is cut follows from shapes alone: a CUDA graph of the
    call can be replayed while lengths and tables change in place. Lengths beyond the table's width count as that width;
    a page that the pool lacks is read as zeros. On the CPU both raise ValueError.

    Args:
        q: (B, Tq, Hq, Dk), rotated, Tq at most 8; or packed (sum Tq, Hq, Dk).
        k_cmp, v_cmp: (pages, page_size / d, Hkv, D), any strides, on CUDA with a last one of 1.
        k_slc, v_slc: (pages, page_size, Hkv, D); page_size is a multiple of l'.
        k_win, v_win: the same; with window_table, pages of any size.
        gates: (B, Tq, Hq, 3) in the order compressed, selected, window; any floating dtype.
        cache_seqlens: (B,) int32, tokens of each sequence, the new ones included. Query i stands at position
            cache_seqlens - Tq + i.
        block_table: (B, pages of a sequence) int32.
        window_table: the same for k_win and v_win. Entries of pages that no query can see are not read.
        cu_seqlens_q: (B + 1,) int32, for packed q; with max_seqlen_q, the most queries of a sequence.
        block_size, block_stride, select_size: l, d and l', in tokens.
        num_selected, num_initial, num_local: as in :func:`select_blocks`.
        window: w, in tokens.
        scale: of the scores; None: Dk^-1/2.
        num_splits: into how many pieces, at least, the compressed keys of block_table's width are cut. Given, a
            sequence's result is the same to the bit in whatever batch it is, with tables of one width and the same most
            queries of a sequence. None: as many as suit the batch.

    Returns:
        out (B, Tq, Hq, Dv), or packed (sum Tq, Hq, Dv), in q's dtype.

    Raises:
        ValueError: sizes or options that do not fit, or a gradient that is asked for. TypeError: dtypes or devices that
        differ.
    """
    options: dict[str, Any] = {
        "cache_seqlens": cache_seqlens,
        "block_table": block_table,
        "window_table": window_table,
        "cu_seqlens_q": cu_seqlens_q,
        "max_seqlen_q": max_seqlen_q,
        "block_size": block_size,
        "block_stride": block_stride,
        "select_size": select_size,
        "num_selected": num_selected,
        "num_initial": num_initial,
        "num_local": num_local,
        "window": window,
        "scale": scale,
        "num_splits": num_splits,
    }
    tensors = {"q": q, "k_cmp": k_cmp, "v_cmp": v_cmp, "k_slc": k_slc, "v_slc": v_slc, "k_win": k_win, "v_win": v_win}
    return _call(torch.ops.nsa.nsa_attention_with_kvcache, tensors | {"gates": gates}, options)
