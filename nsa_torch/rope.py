"""Rotary position embedding (RoFormer, arXiv 2104.09864), in Llama's half-split convention.

Channel c of the first half and channel c of the second half form a pair, which a token turns by the
angle position * theta^(-2 c / D). Tables are (cos, sin) of shape (..., T, D): one row a token, with
the angles of the pairs twice, once for each half.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import ops
from .checks import check_tensors

Tables = tuple[Tensor, Tensor]


def rope_tables(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> Tables:
    """cos and sin of every token's angles: positions (...,) integers -> two (..., head_dim).

    In float64 for `dtype` float64, else in float32: far positions need more digits than half
    precision has.
    """
    angle_dtype = torch.promote_types(dtype, torch.float32)
    channels = torch.arange(0, head_dim, 2, device=positions.device, dtype=angle_dtype)
    angles = positions.to(angle_dtype).unsqueeze(-1) / theta ** (channels / head_dim)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, tables: Tables | None) -> Tensor:
    """Turn every head by its token's angles; None turns nothing.

    x (..., T, heads, D), tables (..., T, 1, D) broadcastable to it (see `for_heads`). The arithmetic is
    in the wider dtype of the two, on CUDA in float32, the result in the dtype of x.
    """
    if tables is None:
        return x
    cos, sin = tables
    if torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
        return _rotate_with_gradients_of_tables(x, cos, sin)
    return ops.rotate(x, cos, sin)


def _rotate_with_gradients_of_tables(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """What the op computes, differentiable in everything."""
    (cos_a, cos_b), (sin_a, sin_b) = (table.chunk(2, dim=-1) for table in (cos, sin))
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos_a - b * sin_a, b * cos_b + a * sin_b), dim=-1).to(x.dtype)


def for_heads(tables: Tables | None) -> Tables | None:
    """Insert a dimension of size 1 before the channels, to broadcast tokens over heads."""
    if tables is None:
        return None
    cos, sin = tables
    return cos.unsqueeze(-2), sin.unsqueeze(-2)


def take_rows(tables: Tables | None, rows: Tensor) -> Tables | None:
    """The tokens numbered `rows` (M,): (..., T, D) -> (..., M, D)."""
    if tables is None:
        return None
    cos, sin = tables
    return cos.index_select(-2, rows), sin.index_select(-2, rows)


def check_tables(tables: Tables, shape: tuple[int, ...]) -> Tables:
    """Tables given by the user as position_embeddings, for tokens of `shape` (B, T, D) or (T, D).

    cos and sin may have a batch dimension of B or 1, or none; it is removed for tokens without. They
    become float32 if they are less, once for all that is rotated. ValueError for any other shape, TypeError for what
    is no pair of tensors.
    """
    if not isinstance(tables, (tuple, list)):
        raise TypeError(f"position_embeddings must be (cos, sin), got {type(tables).__name__}")
    if len(tables) != 2:
        raise ValueError(f"position_embeddings must be (cos, sin), got {len(tables)} entries")
    check_tensors(**{f"position_embeddings[{i}]": table for i, table in enumerate(tables)})
    batches = (1, *shape[:-2])
    for table in tables:
        got = tuple(table.shape)
        batched = len(got) == 3 and got[0] in batches
        if got[-2:] != shape[-2:] or not (batched or len(got) == 2):
            allowed = " or ".join(str((batch, *shape[-2:])) for batch in dict.fromkeys(batches))
            allowed = f"{allowed} or {shape[-2:]}"
            raise ValueError(f"position_embeddings must hold tensors of shape {allowed}, got {got}")
    cos, sin = (t[0] if len(shape) == 2 and t.dim() == 3 else t for t in tables)
    cos, sin = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in torch.broadcast_tensors(cos, sin))
    return cos, sin
