"""Rotary position embedding (RoFormer, arXiv 2104.09864), in Llama's half-split convention.

Of the R channels that are rotated, channel c of the first half and channel c of the second half form a pair, which a
token turns by the angle position * theta^(-2 c / R). Tables are (cos, sin) of shape (..., T, R): one row a token, with
the angles of the pairs twice, once for each half. Interleaved pairs, channels 2 c and 2 c + 1, are gathered into halves
before they are rotated, and stay so: scores do not depend on the order of channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import ops
from .checks import check_tensors

Tables = tuple[Tensor, Tensor]


def rope_tables(positions: Tensor, dim: int, theta: float, dtype: torch.dtype) -> Tables:
    """cos and sin of every token's angles: positions (...,) integers -> two (..., dim).

    In float64 for `dtype` float64, else in float32: far positions need more digits than half
    precision has.
    """
    angle_dtype = torch.promote_types(dtype, torch.float32)
    channels = torch.arange(0, dim, 2, device=positions.device, dtype=angle_dtype)
    angles = positions.to(angle_dtype).unsqueeze(-1) / theta ** (channels / dim)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, tables: Tables | None, interleaved: bool = False) -> Tensor:
    """Turn the first R channels of every head by its token's angles; None turns nothing.

    x (..., T, heads, D), tables (..., T, 1, R) broadcastable to it (see `for_heads`). The arithmetic is
    in the wider dtype of the two, on CUDA in float32, the result in the dtype of x. interleaved: pairs are
    channels 2 c and 2 c + 1 of x, and c and c + R / 2 of the result.
    """
    if tables is None:
        return x
    width = tables[0].size(-1)
    if width == x.size(-1) and not interleaved:
        return _rotate_all(x, tables)
    first = x.narrow(-1, 0, width)
    rotated = _rotate_all(gather_pairs(first) if interleaved else first, tables)
    return rotated if width == x.size(-1) else torch.cat((rotated, x.narrow(-1, width, x.size(-1) - width)), dim=-1)


def gather_pairs(x: Tensor) -> Tensor:
    """Interleaved channels to halves: 0, 2, ..., then 1, 3, ..."""
    return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


def _rotate_all(x: Tensor, tables: Tables) -> Tensor:
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


def check_tables(tables: Tables | Tensor, shape: tuple[int, ...], interleaved: bool = False) -> Tables:
    """Tables given by the user as position_embeddings, for heads of tokens of `shape` (B, T, D) or (T, D).

    A pair (cos, sin) of even width R up to D, or a complex tensor of width R / 2. They may have a batch dimension of B
    or 1, or none; it is removed for tokens without. Returned with the angles of pairs in both halves, in float32 if
    they are less, once for all that is rotated. interleaved: the angles of a pair stand side by side in what is given.
    ValueError for any other shape, TypeError for what is neither.
    """
    if isinstance(tables, Tensor):
        if not tables.is_complex():
            raise TypeError(f"position_embeddings must be (cos, sin) or one complex tensor, got {tables.dtype}")
        _check_shape(tables, shape, 1)
        angles = torch.cat((tables, tables), dim=-1)
        pair = angles.real.contiguous(), angles.imag.contiguous()
    else:
        pair = _check_pair(tables, shape)
        if interleaved:
            pair = gather_pairs(pair[0]), gather_pairs(pair[1])
    cos, sin = (t[0] if len(shape) == 2 and t.dim() == 3 else t for t in pair)
    cos, sin = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in torch.broadcast_tensors(cos, sin))
    return cos, sin


def _check_pair(tables: Tables, shape: tuple[int, ...]) -> Tables:
    if not isinstance(tables, (tuple, list)):
        raise TypeError(f"position_embeddings must be (cos, sin) or one complex tensor, got {type(tables).__name__}")
    if len(tables) != 2:
        raise ValueError(f"position_embeddings must be (cos, sin), got {len(tables)} entries")
    check_tensors(**{f"position_embeddings[{i}]": table for i, table in enumerate(tables)})
    cos, sin = tables
    for table in (cos, sin):
        if table.is_complex():
            raise TypeError("position_embeddings must be (cos, sin), or one complex tensor, got two complex ones")
        _check_shape(table, shape, 2)
    if cos.size(-1) != sin.size(-1):
        raise ValueError(f"position_embeddings must have one width, got {cos.size(-1)} and {sin.size(-1)}")
    return cos, sin


def _check_shape(table: Tensor, shape: tuple[int, ...], entries: int) -> None:
    """`entries`: columns for each pair."""
    got, batches, most = tuple(table.shape), (1, *shape[:-2]), shape[-1] * entries // 2
    batched = len(got) == 3 and got[0] in batches
    fits = (batched or len(got) == 2) and got[-2] == shape[-2] and 0 < got[-1] <= most and got[-1] % entries == 0
    if not fits:
        allowed = " or ".join(f"({batch}, {shape[-2]}, R)" for batch in dict.fromkeys(batches))
        width = f"R {'even and ' if entries == 2 else ''}at most {most}"
        raise ValueError(
            f"position_embeddings must hold tensors of shape {allowed} or ({shape[-2]}, R), {width}, got {got}"
        )
