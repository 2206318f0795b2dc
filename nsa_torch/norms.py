"""Norms of query and key heads: NSAAttention's `qk_norm`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

EPS = 1e-6


class HeadNorm(nn.RMSNorm):
    """RMSNorm over the channels of a head, in float32 for 16-bit tensors, with its weight in the tensors' dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def make_norms(qk_norm: object, head_dim: int, factory: dict[str, Any]) -> tuple[nn.Module | None, nn.Module | None]:
    """The norms of q and of k that NSAAttention's argument asks for. TypeError for another argument."""
    if isinstance(qk_norm, bool):
        if not qk_norm:
            return None, None
        return HeadNorm(head_dim, eps=EPS, **factory), HeadNorm(head_dim, eps=EPS, **factory)
    if isinstance(qk_norm, (tuple, list)) and len(qk_norm) == 2:
        q_norm, k_norm = qk_norm
        if isinstance(q_norm, nn.Module) and isinstance(k_norm, nn.Module):
            return q_norm, k_norm
    raise TypeError(f"qk_norm must be a bool or two modules (q_norm, k_norm), got {qk_norm!r}")


def norm_heads(name: str, norm: nn.Module | None, heads: Tensor, mesh: DeviceMesh | None) -> Tensor:
    """Heads (..., D), normed, in their dtype. mesh: they are some of the heads, which the ranks of this mesh share."""
    if norm is None:
        return heads
    if mesh is None:
        normed = norm(heads)
    else:
        from .distributed import local_weight

        weights: dict[str, Any] = {key: local_weight(w, mesh, False) for key, w in norm.named_parameters()}
        normed = functional_call(norm, weights, (heads,))
    if not isinstance(normed, Tensor) or normed.shape != heads.shape:
        got = tuple(normed.shape) if isinstance(normed, Tensor) else type(normed).__name__
        raise ValueError(f"{name} must give what it gets, of shape {tuple(heads.shape)}, got {got}")
    return normed.to(heads.dtype)
