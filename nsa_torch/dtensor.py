"""Ops on DTensors whose heads, or whose batches, are cut over the ranks: each rank computes its own; nothing is sent.

What no rank could compute from its part is refused by name, before anything runs: tokens that are cut, heads that the
ranks do not divide, and arguments that are cut unlike each other. Nothing is redistributed without being asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

# The dimensions of each argument and result, aligned to the right: b batch, t tokens, h heads, others by a dot. Packed
# tensors have no b, weights that the heads share no h.
_TOKENS = "bth."
_AXES = dict.fromkeys(("x", "q", "k", "v", "k_cmp", "v_cmp", "k_slc", "v_slc", "k_win", "v_win"), _TOKENS)
_AXES |= {"gates": _TOKENS, "block_indices": _TOKENS, "out": _TOKENS, "lse": "bht", "cos": "bt..", "sin": "bt.."}
_AXES |= {"pe": "h..", "w1": "h..", "b1": "h.", "w2": "h..", "b2": "h."}
_AXES |= dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k", "seqused_k"), ".")
_NAMES = {"b": "batch", "t": "tokens", "h": "heads"}

# Without gradients, and the same on all ranks.
_MAY_BE_PLAIN = ("cu_seqlens_q", "cu_seqlens_k", "seqused_k", "cos", "sin")


def call_on_shards(op: Callable[..., Any], tensors: dict[str, Any], options: dict[str, Any]) -> Any:
    """`op` of DTensors: as many of `tensors` and `options`, by name, as there are; the first of `tensors` leads.

    Raises:
        TypeError: some tensors are DTensors and others are not.
        ValueError: a placement other than the leading tensor's, of tokens, or of heads that the ranks do not divide.
    """
    name, lead = next(iter(tensors.items()))
    if not isinstance(lead, DTensor):
        other = next(n for n, value in (tensors | options).items() if isinstance(value, DTensor))
        raise TypeError(f"{name} must be a DTensor as {other} is, got {type(lead).__name__}")
    if lead.dim() not in (3, 4):
        raise ValueError(f"{name} must be (B, T, H, D), or packed (sum T, H, D), got shape {tuple(lead.shape)}")
    cuts = _cuts(name, lead)
    parts, local_options = (
        {n: _local(n, value, name, lead, cuts) for n, value in given.items()} for given in (tensors, options)
    )
    results = op(*parts.values(), **local_options)
    if isinstance(results, Tensor):
        return _whole("out", results, lead, cuts)
    return tuple(_whole(n, result, lead, cuts) for n, result in zip(("out", "lse"), results, strict=True))


def _axes(name: str, tensor: Tensor) -> str:
    return _AXES[name][-tensor.dim() :]


def _cuts(name: str, lead: DTensor) -> list[str]:
    """What each dimension of the mesh cuts: "b", "h", or "" for nothing."""
    axes, cuts = _axes(name, lead), []
    for placement in lead.placements:
        axis = axes[placement.dim] if type(placement) is Shard else ""
        if axis not in ("", "b", "h") or not (axis or placement.is_replicate()):
            what = f", its {_NAMES.get(axis, 'channels')}" if axis else ""
            raise ValueError(
                f"{name} must be whole, or cut over its heads or its batch, on every dimension of the mesh, "
                f"got {placement}{what}: redistribute it first (there is no context parallelism in an op)"
            )
        cuts.append(axis)
    return cuts


def _placements(name: str, tensor: Tensor, cuts: list[str]) -> list[Placement]:
    """What an argument must have. Tables of angles may broadcast over the batch."""
    shared = name in ("cos", "sin")
    dims = {axis: dim for dim, axis in enumerate(_axes(name, tensor)) if not (shared and tensor.size(dim) == 1)}
    return [Shard(dims[cut]) if cut in dims else Replicate() for cut in cuts]


def _local(name: str, value: Any, lead_name: str, lead: DTensor, cuts: list[str]) -> Any:
    """This rank's part of an argument. Each rank has a part of the gradient of what all use whole."""
    if not isinstance(value, Tensor):
        return value
    expected, mesh = _placements(name, value, cuts), lead.device_mesh
    if not isinstance(value, DTensor):
        if name in _MAY_BE_PLAIN and all(placement.is_replicate() for placement in expected):
            return value
        raise TypeError(f"{name} must be a DTensor as {lead_name} is, with placements {expected}, got a plain tensor")
    if value.device_mesh != mesh:
        raise ValueError(f"{name} must be on the mesh of {lead_name}, {mesh}, got {value.device_mesh}")
    if list(value.placements) != expected:
        raise ValueError(
            f"{name} must have placements {expected}, since {lead_name} has {list(lead.placements)}, "
            f"got {list(value.placements)}: redistribute it first"
        )
    _check_heads(name, value, cuts)
    summed = [Partial() if cut and p.is_replicate() else p for cut, p in zip(cuts, expected, strict=True)]
    return value.to_local(grad_placements=summed)


def _check_heads(name: str, value: DTensor, cuts: list[str]) -> None:
    """Groups stay whole when the ranks divide the KV heads; an uneven cut would give queries another group's keys."""
    axes = _axes(name, value)
    ranks = 1
    for dim, cut in enumerate(cuts):
        ranks *= value.device_mesh.size(dim) if cut == "h" else 1
    if "h" in axes and value.size(axes.index("h")) % ranks:
        raise ValueError(f"{name} must have heads that {ranks} ranks divide, got {value.size(axes.index('h'))}")


def _whole(name: str, result: Tensor, lead: DTensor, cuts: list[str]) -> DTensor:
    """The result of all ranks, of which this rank has computed its own."""
    axes, mesh = _axes(name, result), lead.device_mesh
    shape = list(result.shape)
    for dim, cut in enumerate(cuts):
        if cut == "h":
            shape[axes.index("h")] *= mesh.size(dim)
        elif cut == "b":
            shape[0] = lead.size(0)
    placements: list[Placement] = [Shard(axes.index(cut)) if cut else Replicate() for cut in cuts]
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        result.contiguous(), mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride
    )
