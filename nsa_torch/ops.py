"""The ops of ``torch.ops.nsa``, typed and documented.

Common to all of them:

- Dense tensors are (B, T, H, D). Packed sequences are (sum T, H, D) with ``cu_seqlens_q`` and ``cu_seqlens_k`` (int32,
  B + 1 entries, on the tensors' device) and, optionally, upper bounds ``max_seqlen_q`` and ``max_seqlen_k`` (int).
  ``cu_seqlens_k`` always counts uncompressed keys. ``seqused_k`` (int32, B), for caches with a slot of fixed size per
  sequence, says how many keys of each slot are in use.
- Query i of a sequence stands at position p = Tk - Tq + i: the last query sees the last key.
- float16, bfloat16, float32 and float64. Tensors whose last stride is 1 are read in place.
- ``scale`` multiplies q k^T; None stands for Dk ** -0.5.
- ``lse`` is the natural logarithm of the softmax denominator, float32 (float64 for float64), (B, Hq, Tq) or packed
  (Hq, sum Tq). A query that sees no key has output 0, lse -inf and zero gradients. Gradients flow through lse too.
- Wrong sizes and options raise ValueError, wrong dtypes and devices TypeError, naming the argument.
- DTensors that are cut over their heads or their batch, all alike, are computed on each rank's part, and so are the
  results; nothing is sent. Other placements, and heads that the ranks do not divide, are refused.
- Gradients are themselves ops; gradients of gradients are not implemented and say so.
"""

from typing import Any

import torch
from torch import Tensor

_INTEGERS = frozenset(
    ("block_size", "block_stride", "select_size", "num_selected", "num_initial", "num_local", "window")
    + ("seqlen_k", "max_seqlen_q", "max_seqlen_k", "num_splits")
)
_OPTIONAL = frozenset(
    ("pe", "w1", "b1", "w2", "b2", "scale", "seqlen_k", "block_indices", "window_table", "num_splits")
    + ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "seqused_k")
)


def _call(op: Any, tensors: dict[str, Any], options: dict[str, Any]) -> Any:
    """The op of tensors, which come first, and options, both by name; of DTensors on each rank's part."""
    if _check_types(tensors | options):
        from .dtensor import call_on_shards

        return call_on_shards(op, tensors, options)
    return op(*tensors.values(), **options)


def _check_types(arguments: dict[str, Any]) -> bool:
    """Whether any is a DTensor. All else is checked in C++; a wrong Python type would not get there with its name."""
    distributed = False
    for name, value in arguments.items():
        if value is None and name in _OPTIONAL:
            continue
        kinds: tuple[type, ...]
        if name in _INTEGERS:
            expected, kinds = "an int", (int, torch.SymInt)
        elif name == "scale":
            expected, kinds = "a number", (int, float, torch.SymInt, torch.SymFloat)
        elif name == "transposed":
            expected, kinds = "a bool", (bool,)
        else:
            expected, kinds = "a tensor", (Tensor,)
        if not isinstance(value, kinds):
            optional = " or None" if name in _OPTIONAL else ""
            raise TypeError(f"{name} must be {expected}{optional}, got {type(value).__name__}")
        if kinds == (Tensor,) and type(value) is not Tensor:
            distributed |= hasattr(value, "placements")
    return distributed


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
    """phi: keys or values to one token per block (Eq. 7).

    Block m covers tokens [m d, m d + l), l = block_size and d = block_stride; a sequence of T tokens has
    M = (T - l) // d + 1 blocks, none when T < l. With x_m the block plus ``pe``, flattened row by row to l * D:

    - ``w1`` and ``w2``: w2 gelu(w1 x_m + b1) + b2, with the exact GELU;
    - ``w1`` alone: w1 x_m + b1;
    - no weights: the mean of the block.

    Args:
        x: (B, T, Hkv, D), or packed (sum T, Hkv, D) with ``cu_seqlens_k``.
        pe: (l, D), the position encoding within a block. Like every weight it may carry a leading Hkv dimension: one
            for each KV head.
        w1: (hidden, l * D), or (D', l * D) without ``w2``.
        b1: (hidden,), or (D',) without ``w2``.
        w2: (D', hidden).
        b2: (D',).
        block_size, block_stride: l and d, in tokens; d divides l.
        cu_seqlens_k, max_seqlen_k: see the module.

    Returns:
        (B, M, Hkv, D'). Packed: (sum T // d, Hkv, D'), an upper bound that needs no answer from the device; the blocks
        of the sequences follow one another without gaps, and the rows after the last one's are zero.

    Raises:
        ValueError: sizes that do not fit, pe, b1, w2 or b2 without w1, b2 without w2.
        TypeError: dtypes or devices that differ.
    """
    options: dict[str, Any] = {
        "block_size": block_size,
        "block_stride": block_stride,
        "cu_seqlens_k": cu_seqlens_k,
        "max_seqlen_k": max_seqlen_k,
    }
    tensors = {"x": x, "pe": pe, "w1": w1, "b1": b1, "w2": w2, "b2": b2}
    return _call(torch.ops.nsa.compress, tensors, options)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, transposed: bool = False) -> Tensor:
    """Rotary positions, in Llama's half-split convention: channel c of a head and channel c + D / 2 turn as a pair.

    (a, b) becomes (cos_a a - sin_a b, cos_b b + sin_b a), where a and b are the halves of a head, and cos_a and cos_b
    those of a row of angles. On CUDA one kernel, in float32; the gradient is the transposed rotation.

    Args:
        x: (B, T, H, D), or packed (sum T, H, D); D is even.
        cos, sin: (B, T, 1, D) or what broadcasts to it, such as (T, 1, D). They have no gradient.
        transposed: (cos_a a + sin_b b, cos_b b - sin_a a) instead.

    Returns:
        The shape and dtype of x.

    Raises:
        ValueError: sizes that do not fit. TypeError: dtypes that are not floating, devices that differ.
    """
    return _call(torch.ops.nsa.rotate, {"x": x, "cos": cos, "sin": sin}, {"transposed": transposed})


def compressed_attention(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    *,
    seqlen_k: int | None = None,
    block_size: int = 32,
    block_stride: int = 16,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    seqused_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over compressed tokens (the compression branch of Eq. 5).

    Block m is visible to position p when its last key is: m d + l - 1 <= p.

    Args:
        q: (B, Tq, Hq, Dk).
        k_cmp: (B, M, Hkv, Dk), the result of :func:`compress`; Hkv divides Hq.
        v_cmp: (B, M, Hkv, Dv).
        seqlen_k: Tk, how many uncompressed keys there are. Required for dense tensors, not used for packed ones.
        block_size, block_stride: l and d, in tokens.
        scale, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_k: see the module. The blocks of packed
            sequence b start at the sum of the blocks that the slots before it have room for.

    Returns:
        out (B, Tq, Hq, Dv) in q's dtype, and lse (B, Hq, Tq).

    Raises:
        ValueError: sizes or options that do not fit. TypeError: dtypes or devices that differ.
    """
    options: dict[str, Any] = {
        "seqlen_k": seqlen_k,
        "block_size": block_size,
        "block_stride": block_stride,
        "scale": scale,
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
        "max_seqlen_q": max_seqlen_q,
        "max_seqlen_k": max_seqlen_k,
        "seqused_k": seqused_k,
    }
    tensors = {"q": q, "k_cmp": k_cmp, "v_cmp": v_cmp}
    return _call(torch.ops.nsa.compressed_attention, tensors, options)


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
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    seqused_k: Tensor | None = None,
) -> Tensor:
    """Which blocks each query reads (Eq. 8 to 12). No gradient flows through the choice.

    Importance of block j, keys [j l', (j + 1) l'): p_cmp of the compressed blocks weighted by the stride-d pieces that
    they share with it (Eq. 9), summed over the heads of the group (Eq. 10). Chosen are the first ``num_initial``
    blocks, the query's own with the ``num_local`` - 1 before it, and the most important of the others, ties to the
    lower index.

    Args:
        q: (B, Tq, Hq, Dk).
        k_cmp: (B, M, Hkv, Dk).
        lse: (B, Hq, Tq), the second result of :func:`compressed_attention` for the same q and k_cmp.
        seqlen_k: Tk, required for dense tensors.
        block_size, block_stride: l and d, in tokens.
        select_size: l', in tokens; a multiple of d.
        num_selected: n, blocks per query and KV head, forced ones included; at least num_initial + num_local.
        num_initial, num_local: forced blocks, each at least 0.
        scale, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_k: see the module.

    Returns:
        int32 (B, Tq, Hkv, n), packed (sum Tq, Hkv, n): ascending, without duplicates, -1 at the end where fewer than n
        blocks start at or before p. Blocks count from the start of their own sequence.

    Raises:
        ValueError: sizes or options that do not fit. TypeError: dtypes or devices that differ.
    """
    options: dict[str, Any] = {
        "seqlen_k": seqlen_k,
        "block_size": block_size,
        "block_stride": block_stride,
        "select_size": select_size,
        "num_selected": num_selected,
        "num_initial": num_initial,
        "num_local": num_local,
        "scale": scale,
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
        "max_seqlen_q": max_seqlen_q,
        "max_seqlen_k": max_seqlen_k,
        "seqused_k": seqused_k,
    }
    tensors = {"q": q, "k_cmp": k_cmp, "lse": lse}
    return _call(torch.ops.nsa.select_blocks, tensors, options)


def selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    *,
    select_size: int = 64,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    seqused_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over the keys j <= p of listed blocks (the selection branch of Eq. 5).

    Args:
        q: (B, Tq, Hq, Dk).
        k: (B, Tk, Hkv, Dk).
        v: (B, Tk, Hkv, Dv).
        block_indices: int32 (B, Tq, Hkv, n), distinct blocks in any order, -1 for none. Entries are checked on the CPU.
        select_size: l', in tokens.
        scale, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_k: see the module.

    Returns:
        out (B, Tq, Hq, Dv) in q's dtype, and lse (B, Hq, Tq).

    Raises:
        ValueError: sizes or options that do not fit; on the CPU, a list with a block twice or one that is not there.
        TypeError: dtypes or devices that differ.
    """
    options: dict[str, Any] = {
        "select_size": select_size,
        "scale": scale,
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
        "max_seqlen_q": max_seqlen_q,
        "max_seqlen_k": max_seqlen_k,
        "seqused_k": seqused_k,
    }
    tensors = {"q": q, "k": k, "v": v, "block_indices": block_indices}
    return _call(torch.ops.nsa.selected_attention, tensors, options)


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int = 512,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    seqused_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over the last keys, p - window < j <= p (the window branch of Eq. 5).

    Args:
        q: (B, Tq, Hq, Dk).
        k: (B, Tk, Hkv, Dk).
        v: (B, Tk, Hkv, Dv).
        window: w, how many keys a query sees, its own included; at least 1.
        scale, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_k: see the module.

    Returns:
        out (B, Tq, Hq, Dv) in q's dtype, and lse (B, Hq, Tq).

    Raises:
        ValueError: sizes or options that do not fit. TypeError: dtypes or devices that differ.
    """
    options: dict[str, Any] = {
        "window": window,
        "scale": scale,
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
        "max_seqlen_q": max_seqlen_q,
        "max_seqlen_k": max_seqlen_k,
        "seqused_k": seqused_k,
    }
    tensors = {"q": q, "k": k, "v": v}
    return _call(torch.ops.nsa.window_attention, tensors, options)


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
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    seqused_k: Tensor | None = None,
) -> Tensor:
    """The three branches, each over its own keys and values, weighted by gates (Eq. 5).

    Args:
        q: (B, Tq, Hq, Dk).
        k_cmp, v_cmp: (B, M, Hkv, Dk) and (B, M, Hkv, Dv), the results of :func:`compress`.
        k_slc, v_slc, k_win, v_win: (B, Tk, Hkv, Dk) and (B, Tk, Hkv, Dv).
        gates: (B, Tq, Hq, 3) in the order compressed, selected, window; any floating dtype.
        block_size, block_stride, select_size: l, d and l', in tokens.
        num_selected, num_initial, num_local: as in :func:`select_blocks`.
        window: w, in tokens.
        block_indices: int32 (B, Tq, Hkv, n): blocks to read instead of choosing them.
        scale, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_k: see the module.

    Returns:
        out (B, Tq, Hq, Dv) in q's dtype.

    Raises:
        ValueError: sizes or options that do not fit. TypeError: dtypes or devices that differ.
    """
    options: dict[str, Any] = {
        "block_size": block_size,
        "block_stride": block_stride,
        "select_size": select_size,
        "num_selected": num_selected,
        "num_initial": num_initial,
        "num_local": num_local,
        "window": window,
        "scale": scale,
        "block_indices": block_indices,
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
        "max_seqlen_q": max_seqlen_q,
        "max_seqlen_k": max_seqlen_k,
        "seqused_k": seqused_k,
    }
    tensors = {"q": q, "k_cmp": k_cmp, "v_cmp": v_cmp, "k_slc": k_slc, "v_slc": v_slc, "k_win": k_win, "v_win": v_win}
    return _call(torch.ops.nsa.nsa_attention, tensors | {"gates": gates}, options)
