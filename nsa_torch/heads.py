"""What the layer's projections give, cut into heads."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .module import NSAAttention


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


class Projected(NamedTuple):
    """Projected tokens in heads, before anything is done to them."""

    q: Tensor  # (..., Hq, Dk)
    k: Tensor  # (..., Hkv, branches, Dk)
    v: Tensor  # (..., Hkv, branches, Dv)
    logits: Tensor  # (..., Hq, 3), of the gates


def split_heads(q: Tensor, k: Tensor, v: Tensor, logits: Tensor, layer: NSAAttention) -> Projected:
    """Projected tokens to heads, as many as there are: under tensor parallelism those of this rank.

    q (..., Hq Dk), k (..., Hkv branches Dk), v (..., Hkv branches Dv), logits of the gates (..., Hq 3).
    ValueError when the projections were cut within a head, or differently.
    """
    group_size, branches = layer.num_heads // layer.num_kv_heads, layer.kv_branches
    q = _unflatten("q_proj", q, (layer.head_dim,))
    k = _unflatten("k_proj", k, (branches, layer.head_dim))
    v = _unflatten("v_proj", v, (branches, layer.v_head_dim))
    logits = _unflatten("gate_proj", logits, (3,))
    heads = (q.size(-2), k.size(-3), v.size(-3), logits.size(-2))
    if heads != (heads[0], heads[0] // group_size, heads[0] // group_size, heads[0]) or heads[0] % group_size:
        raise ValueError(
            f"q_proj, k_proj, v_proj and gate_proj must give {group_size} query heads for each KV head, the same ones, "
            f"got {heads[0]}, {heads[1]}, {heads[2]} and {heads[3]} heads: tensor parallelism must cut them alike"
        )
    return Projected(q, k, v, logits)


def split_branches(projected: Projected) -> NSAInputs:
    """Each branch's keys and values. Of two, the selected and the window branch share the second."""
    logits = projected.logits
    gates = logits.to(torch.promote_types(logits.dtype, torch.float32)).sigmoid()
    k, v = projected.k.unbind(-2), projected.v.unbind(-2)
    return NSAInputs(projected.q, k[0], v[0], k[1], v[1], k[-1], v[-1], gates)


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
