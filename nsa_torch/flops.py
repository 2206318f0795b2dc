"""Floating-point operations of every op, for torch.utils.flop_counter.FlopCounterMode.

What is counted is what the method's maths asks for: matrix products over the keys that queries see, a multiply-add as
two, and the gates' sums; of a backward those of the gradients that are asked for. Masked keys are not counted, nor is
what a kernel does twice, nor the softmax, the choice of blocks, a mean, or `rotate`. Of a list of blocks all entries
count as full, the query's own up to the query.

Packed sequences are counted by their lengths where `cu_seqlens_q` and `cu_seqlens_k` hold any (on a GPU reading them
waits for it); fake tensors and those on the meta device as if all sequences of a batch had the same length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, register_flop_formula

Call = dict[str, Any]  # arguments of an op by name
Lengths = list[tuple[int, int]]  # queries and keys of each sequence, (Tq, Tk)


def _upto(positions: Callable[[int], int], lengths: Lengths) -> int:
    """Keys that the queries of all sequences see; `positions(n)`: those that the positions before n see."""
    return sum(positions(keys) - positions(keys - queries) for queries, keys in lengths)


def compressed_pairs(lengths: Lengths, block_size: int, block_stride: int) -> int:
    """(query, block) pairs of one head: blocks with m d + l - 1 <= p."""

    def upto(n: int) -> int:
        whole, rest = divmod(max(n - block_size + 1, 0), block_stride)
        return block_stride * whole * (whole + 1) // 2 + rest * (whole + 1)

    return _upto(upto, lengths)


def selected_pairs(lengths: Lengths, select_size: int, num_selected: int) -> int:
    """(query, key) pairs of one head: full lists that hold the query's own block, which is read up to the query."""
    others = max(num_selected - 1, 0)

    def upto(n: int) -> int:
        whole, rest = divmod(n, select_size)
        ramp = min(whole, others)
        earlier = ramp * (ramp - 1) // 2 + (whole - ramp) * others
        own = whole * select_size * (select_size + 1) // 2 + rest * (rest + 1) // 2
        return select_size * (select_size * earlier + rest * ramp) + own

    return _upto(upto, lengths)


def window_pairs(lengths: Lengths, window: int) -> int:
    """(query, key) pairs of one head: p - w < j <= p."""

    def upto(n: int) -> int:
        ramp = min(n, window)
        return ramp * (ramp + 1) // 2 + (n - ramp) * window

    return _upto(upto, lengths)


def _holds_values(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, torch.nn.Parameter) and not tensor.is_meta


def _sequence_lengths(cu_seqlens: Tensor, total: int) -> list[int]:
    if _holds_values(cu_seqlens):
        return [int(length) for length in cu_seqlens.diff().tolist()]
    count = cu_seqlens.numel() - 1
    return [total // count + (b < total % count) for b in range(count)] if count else []


def _lengths(queries: Tensor, keys: int, call: Call) -> Lengths:
    """Of every sequence of a call; `keys`: Tk of a dense one, the rows of keys of a packed one."""
    cu_seqlens_q, cu_seqlens_k, seqused_k = (call.get(n) for n in ("cu_seqlens_q", "cu_seqlens_k", "seqused_k"))
    if cu_seqlens_k is None:
        return [(queries.size(1), keys)] * int(queries.size(0))
    each_k = _sequence_lengths(cu_seqlens_k, keys)
    if seqused_k is not None and _holds_values(seqused_k):
        each_k = [int(used) for used in seqused_k.tolist()]
    each_q = each_k if cu_seqlens_q is None else _sequence_lengths(cu_seqlens_q, queries.size(0))
    return list(zip(each_q, each_k, strict=True))


def _attention(call: Call, pairs: int, values: Tensor, wanted: Sequence[bool] | None) -> int:
    """q k^T and p v; of a backward whose gradients of q, k and v are `wanted`: these scores again, dp = do v^T,
    dq = ds k, dk = ds^T q, dv = p^T do.
    """
    dim_k, dim_v = call["q"].size(-1), values.size(-1)
    channels = dim_k + dim_v
    if wanted is not None:
        of_q, of_k, of_v = wanted
        channels = dim_k * (any(wanted) + of_q + of_k) + dim_v * ((of_q or of_k) + of_v)
    return 2 * int(call["q"].size(-2)) * pairs * channels


def _wanted(call: Call, backward: bool) -> Sequence[bool] | None:
    return call["output_mask"] if backward else None


def _blocks(call: Call, keys: int | None = None) -> int:
    """Pairs of the compressed branch. Packed blocks are fewer than keys by the stride, about."""
    if keys is None:
        keys = call.get("seqlen_k")
    if keys is None:
        keys = call["k_cmp"].size(0) * call["block_stride"]
    return compressed_pairs(_lengths(call["q"], keys, call), call["block_size"], call["block_stride"])


def _compressed_attention(call: Call, backward: bool) -> int:
    return _attention(call, _blocks(call), call["v_cmp"], _wanted(call, backward))


def _select_blocks(call: Call, backward: bool) -> int:
    return 2 * call["q"].size(-2) * _blocks(call) * call["q"].size(-1)


def _selected_attention(call: Call, backward: bool) -> int:
    lengths = _lengths(call["q"], call["k"].size(-3), call)
    pairs = selected_pairs(lengths, call["select_size"], call["block_indices"].size(-1))
    return _attention(call, pairs, call["v"], _wanted(call, backward))


def _window_attention(call: Call, backward: bool) -> int:
    pairs = window_pairs(_lengths(call["q"], call["k"].size(-3), call), call["window"])
    return _attention(call, pairs, call["v"], _wanted(call, backward))


def _nsa_attention(call: Call, backward: bool) -> int:
    """The branches, the choice of blocks unless they are given, and the gates."""
    keys, given = call["k_slc"].size(-3), call.get("block_indices")
    lengths, blocks = _lengths(call["q"], keys, call), _blocks(call, keys)
    num_selected = call["num_selected"] if given is None else given.size(-1)
    gates = 6 * (call["q"].numel() // call["q"].size(-1)) * call["v_slc"].size(-1)
    selected = selected_pairs(lengths, call["select_size"], num_selected)
    branches = ((blocks, "v_cmp"), (selected, "v_slc"), (window_pairs(lengths, call["window"]), "v_win"))
    if not backward:
        total = gates + sum(_attention(call, pairs, call[values], None) for pairs, values in branches)
        return total + (2 * call["q"].size(-2) * blocks * call["q"].size(-1) if given is None else 0)
    of_q, *of_keys, of_gates = call["output_mask"]
    total = gates * (of_gates + (of_q or any(of_keys)))  # of <do, o>, and of gate do
    for (pairs, values), of_kv in zip(branches, (of_keys[:2], of_keys[2:4], of_keys[4:]), strict=True):
        total += _attention(call, pairs, call[values], (of_q, *of_kv))
    return total


def _compress(call: Call, backward: bool) -> int:
    """The products with w1 and w2; backward has one for what they multiply and one for the weight."""
    x, stride = call["x"], call["block_stride"]
    lengths = _lengths(x, x.size(-3), call)
    blocks = sum(max((keys - call["block_size"]) // stride + 1, 0) for _, keys in lengths)
    of = {name: call[name].size(-1) * call[name].size(-2) for name in ("w1", "w2") if call.get(name) is not None}
    if not backward:
        return 2 * blocks * x.size(-2) * sum(of.values())
    of_x, of_pe, of_w1, of_b1, of_w2, _ = call["output_mask"]
    products = of.get("w1", 0) * (of_x + of_w1) + of.get("w2", 0) * (of_w2 + (of_x or of_pe or of_w1 or of_b1))
    return 2 * blocks * x.size(-2) * products


def _register(name: str, formula: Callable[[Call, bool], int], backward: bool = False) -> None:
    target = getattr(torch.ops.nsa, name)
    schema = target.default._schema.arguments
    if target in flop_registry:
        return

    def count(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        call = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
        call |= dict(zip((argument.name for argument in schema), args, strict=False)) | kwargs
        return formula(call, backward)

    register_flop_formula(target, get_raw=True)(count)


def register() -> None:
    """Register the formulas of all ops, once: on import of the package."""
    formulas = {
        "compress": _compress,
        "compressed_attention": _compressed_attention,
        "selected_attention": _selected_attention,
        "window_attention": _window_attention,
        "nsa_attention": _nsa_attention,
    }
    for name, formula in formulas.items():
        _register(name, formula)
        _register(f"{name}_backward", formula, backward=True)
    _register("nsa_attention_forward", _nsa_attention)
    _register("select_blocks", _select_blocks)
