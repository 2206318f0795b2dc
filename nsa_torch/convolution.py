"""A short causal convolution on projected keys and values, every channel by itself: NSAAttention's `kv_conv`."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from .checks import check_at_least
from .packing import sequence_of

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from .heads import Projected
    from .layer_cache import NSALayerCache


class ContextRows(NamedTuple):
    """N packed tokens laid out with `context` rows before each sequence: those that precede its first token."""

    gather: Tensor  # (B * context + N,) int64: rows of (ring, new tokens, a row of zeros)
    take: Tensor  # (N,) int64: among the convolved rows, which are context fewer, those of the tokens

    def lay_out(self, new: Tensor, ring: Tensor | None = None) -> Tensor:
        """Tokens (N, ...) and the ring before them, if any, to (B * context + N, ...), in the dtype of the tokens."""
        held = (new, new.new_zeros(1, *new.shape[1:]))
        return torch.cat(held if ring is None else (ring.to(new.dtype), *held)).index_select(0, self.gather)


def context_rows(
    cu_seqlens: Tensor, tokens: int, context: int, before: Tensor | None = None, ring: int = 0
) -> ContextRows:
    """Where the tokens of packed chunks and those before them lie.

    before (B,) int64: tokens that the sequences have already, the last of them in a ring of `ring` > context rows a
    sequence, position p in row p % ring, and a scratch row after the last ring. None: the sequences begin here.
    Tokens after the last sequence count to it.
    """
    batch, cu = cu_seqlens.numel() - 1, cu_seqlens.long()
    starts = torch.arange(batch + 1, device=cu.device) * context + cu
    rows = batch * context + tokens
    owner = sequence_of(starts, rows).clamp(max=batch - 1)
    row = torch.arange(rows, device=cu.device) - starts[owner] - context  # negative: context
    first = 0 if before is None else batch * ring + 1
    zeros = first + tokens
    old = torch.full_like(row, zeros)
    if before is not None:
        position = before[owner] + row
        old = torch.where(position < 0, zeros, owner * ring + position % ring)
    gather = torch.where(row < 0, old, first + cu[owner] + row)
    sequence = sequence_of(cu, tokens).clamp(max=batch - 1)
    return ContextRows(gather, torch.arange(tokens, device=cu.device) + sequence * context)


class CausalConv(nn.Module):
    """y_t = x_t + sum over i < taps of w_{taps-1-i} x_{t-i}, each channel on its own, x zero before the start.

    Weights start uniform in +-taps**-0.5, as torch starts a depthwise convolution: neighbours mix at once.

    Args:
        channels: of the tokens.
        taps: tokens that a token's result is made of, its own included.

    Parameters:
        weight: (channels, 1, taps); weight[:, 0, -1] meets x_t itself.
    """

    def __init__(
        self,
        channels: int,
        taps: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_at_least(1, channels=channels, taps=taps)
        self.taps = taps
        self.weight = nn.Parameter(torch.empty(channels, 1, taps, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.weight, -(self.taps**-0.5), self.taps**-0.5)

    def forward(
        self,
        x: Tensor,
        *,
        laid_out: Tensor | None = None,
        take: Tensor | None = None,
        mesh: DeviceMesh | None = None,
    ) -> Tensor:
        """Tokens (B, T, channels) to the same shape; packed ones (N, channels) as `ContextRows` has laid them out.

        laid_out: (B * (taps - 1) + N, channels), of which `take` (N,) are the tokens. mesh: x has this rank's part of
        the channels, which the ranks of this mesh share.

        ValueError for packed tokens that are not laid out: their sequences would run together.
        """
        weight: Tensor | None = self.weight
        if mesh is not None:
            from .distributed import local_weight

            weight = local_weight(weight, mesh, True)
        assert weight is not None
        if laid_out is None:
            if x.dim() != 3:
                got = tuple(x.shape)
                raise ValueError(f"x must be (B, T, channels), or packed and laid out by ContextRows, got shape {got}")
            laid_out = nn.functional.pad(x, (0, 0, self.taps - 1, 0))
        convolved = _convolve(laid_out, weight.to(x.dtype))
        return x + (convolved if take is None else convolved.index_select(-2, take))

    def extra_repr(self) -> str:
        return f"{self.weight.size(0)}, taps={self.taps}"


def convolve_heads(
    projected: Projected,
    convs: tuple[CausalConv, CausalConv],
    cu_seqlens: Tensor | None,
    cache: NSALayerCache | None,
    mesh: DeviceMesh | None,
) -> Projected:
    """Keys and values of every sequence, convolved. cache: they continue its sequences, and its step has begun."""
    heads = projected.k.flatten(-2), projected.v.flatten(-2)  # (..., Hkv, branches * D)
    laid_out: list[Tensor | None] = [None, None]
    take = None
    if cache is not None:
        rows, *laid_out = cache.extend_conv(*heads)
        take = rows.take
    elif cu_seqlens is not None:
        rows = context_rows(cu_seqlens, heads[0].size(0), convs[0].taps - 1)
        laid_out, take = [rows.lay_out(tokens) for tokens in heads], rows.take
    k, v = (
        conv(tokens.flatten(-2), laid_out=None if given is None else given.flatten(-2), take=take, mesh=mesh)
        for conv, tokens, given in zip(convs, heads, laid_out, strict=True)
    )
    return projected._replace(k=k.reshape(projected.k.shape), v=v.reshape(projected.v.shape))


def _convolve(rows: Tensor, weight: Tensor) -> Tensor:
    """(..., T + taps - 1, channels) to (..., T, channels)."""
    taps = weight.size(-1)
    tokens = rows.size(-2) - taps + 1
    out = rows.narrow(-2, 0, tokens) * weight[:, 0, 0]
    for tap in range(1, taps):
        out = torch.addcmul(out, rows.narrow(-2, tap, tokens), weight[:, 0, tap])
    return out
