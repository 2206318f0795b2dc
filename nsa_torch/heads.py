"""What the layer's projections give, cut into heads."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class NSAInputs(NamedTuple):
    """The tensors that attention starts from, in the order of `nsa_attention`.

    Tokens are (B, T) or, packed, (sum T). Queries and keys are rotated, except k_cmp before it is
    compressed.
    """

    q: Tensor  # (..., Hq, Dk)
    k_cmp: Tensor  # (..., Hkv, Dk)
    v_cmp: Tensor  # (..., Hkv, Dv)
    k_slc: Tensor
    v_slc: Tensor
    k_win: Tensor
    v_win: Tensor
    gates: Tensor  # (..., Hq, 3), float32 or float64


def split_heads(
    q: Tensor, k: Tensor, v: Tensor, logits: Tensor, head_dim: int, v_head_dim: int, group_size: int
) -> NSAInputs:
    """Projected tokens to heads, as many as there are: under tensor parallelism those of this rank.

    q (..., Hq Dk), k (..., Hkv 3 Dk), v (..., Hkv 3 Dv), logits of the gates (..., Hq 3). group_size: Hq / Hkv.
    ValueError when the projections were cut within a head, or differently.
    """
    q = _unflatten("q_proj", q, (head_dim,))
    k = _unflatten("k_proj", k, (3, head_dim))
    v = _unflatten("v_proj", v, (3, v_head_dim))
    logits = _unflatten("gate_proj", logits, (3,))
    heads = (q.size(-2), k.size(-3), v.size(-3), logits.size(-2))
    if heads != (heads[0], heads[0] // group_size, heads[0] // group_size, heads[0]) or heads[0] % group_size:
        raise ValueError(
            f"q_proj, k_proj, v_proj and gate_proj must give {group_size} query heads for each KV head, the same ones, "
            f"got {heads[0]}, {heads[1]}, {heads[2]} and {heads[3]} heads: tensor parallelism must cut them alike"
        )
    gates = logits.to(torch.promote_types(logits.dtype, torch.float32)).sigmoid()
    k_cmp, k_slc, k_win = k.unbind(-2)
    v_cmp, v_slc, v_win = v.unbind(-2)
    return NSAInputs(q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates)


def _unflatten(name: str, x: Tensor, head: tuple[int, ...]) -> Tensor:
    """(..., heads * width) to (..., heads, *head)."""
    width = head[0] * head[-1] if len(head) == 2 else head[0]
    channels = x.size(-1)
    if channels % width or channels == 0:
        raise ValueError(
            f"{name} must give whole heads, of {width} channels each, and at least one, got {channels} channels: "
            "tensor parallelism must not split a head"
        )
    return x.unflatten(-1, (channels // width, *head))
