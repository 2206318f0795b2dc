"""The learned compression of keys or values into block tokens (arXiv 2502.11089, section 3.3.1)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import ops
from .checks import check_at_least, check_divides

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

COMPRESSIONS = ("mlp", "linear", "mean")


class BlockCompression(nn.Module):
    """phi of Eq. 7: one token for each block of block_size keys (or values), every block_stride.

    mlp: Linear(l D -> hidden), exact GELU, Linear(hidden -> D) of block + pe; linear: a single
    Linear(l D -> D) of block + pe, without a bias since pe acts as one; mean: no parameters. mlp
    and linear start close to the mean of the block, so that from the first step on compressed
    scores tell which blocks hold keys like the query.

    Args:
        dim: head dimension D, of input and output.
        block_size, block_stride: l and d; d divides l.
        compression: "mlp", "linear" or "mean".
        hidden_size: width of the mlp, default 2 D: the least with which it can express the mean.
        num_heads: give each of this many KV heads its own weights, with a leading dimension.
            None: the heads share theirs.

    Parameters:
        pe: (l, D), the intra-block position encoding. None for mean.
        w1: (hidden, l D), for linear (D, l D). None for mean.
        b1, w2, b2: (hidden), (D, hidden), (D). None for linear and mean.

    Raises:
        ValueError: a size or an option out of range; the message names it.
    """

    pe: nn.Parameter | None
    w1: nn.Parameter | None
    b1: nn.Parameter | None
    w2: nn.Parameter | None
    b2: nn.Parameter | None

    def __init__(
        self,
        dim: int,
        *,
        block_size: int = 32,
        block_stride: int = 16,
        compression: str = "mlp",
        hidden_size: int | None = None,
        num_heads: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if compression not in COMPRESSIONS:
            allowed = ", ".join(map(repr, COMPRESSIONS))
            raise ValueError(f"compression must be one of {allowed}, got {compression!r}")
        hidden = 2 * dim if hidden_size is None else hidden_size
        check_at_least(1, dim=dim, block_size=block_size, block_stride=block_stride)
        check_at_least(1, hidden_size=hidden, num_heads=1 if num_heads is None else num_heads)
        check_divides("block_stride", block_stride, "block_size", block_size)
        self.dim = dim
        self.block_size = block_size
        self.block_stride = block_stride
        self.compression = compression
        self.per_head = num_heads is not None
        self.tensor_parallel: DeviceMesh | None = None  # the ranks that the KV heads are cut over
        self.sequence_parallel = False  # whether the layer's inputs and outputs are cut over the same ranks
        shapes: dict[str, tuple[int, ...]] = {}
        if compression != "mean":
            width = hidden if compression == "mlp" else dim
            shapes = {"pe": (block_size, dim), "w1": (width, block_size * dim)}
        if compression == "mlp":
            shapes |= {"b1": (hidden,), "w2": (dim, hidden), "b2": (dim,)}
        heads = () if num_heads is None else (num_heads,)
        for name in ("pe", "w1", "b1", "w2", "b2"):
            weight = None
            if name in shapes:
                weight = nn.Parameter(torch.empty(*heads, *shapes[name], device=device, dtype=dtype))
            self.register_parameter(name, weight)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start close to the mean of the block, with noise of a tenth of its size.

        The mlp expresses a mean m with pairs of hidden units, since gelu(m) - gelu(-m) = m. One
        narrower than 2 D cannot, and starts random, with outputs of that size.
        """
        if self.pe is None or self.w1 is None:
            return
        nn.init.normal_(self.pe, std=0.02)
        paired = self.w2 is None or self.w2.size(-1) >= 2 * self.dim
        noise = 0.1 if paired else 1.0
        # Entries of this size give sums over l D inputs the size of a mean over l of them.
        nn.init.normal_(self.w1, std=noise / (self.block_size * self.dim**0.5))
        identity = torch.eye(self.dim, device=self.w1.device, dtype=self.w1.dtype)
        mean = identity.repeat(1, self.block_size) / self.block_size
        if self.b1 is None or self.w2 is None or self.b2 is None:
            _add(self.w1, mean)
            return
        nn.init.zeros_(self.b1)
        nn.init.zeros_(self.b2)
        nn.init.normal_(self.w2, std=noise / self.w2.size(-1) ** 0.5)
        if paired:
            rest = self.w2.size(-1) - 2 * self.dim
            _add(self.w1, nn.functional.pad(torch.cat((mean, -mean)), (0, 0, 0, rest)))
            _add(self.w2, nn.functional.pad(torch.cat((identity, -identity), dim=1), (0, rest)))

    def forward(
        self,
        x: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        mesh: DeviceMesh | None = None,
    ) -> Tensor:
        """x (B, T, Hkv, D) -> (B, M, Hkv, D); packed (sum T, Hkv, D) -> (sum T // d, Hkv, D).

        The rows of packed blocks are as `nsa_torch.compress` describes them. mesh: x has this rank's part of the
        heads, which the ranks of this mesh share.
        """
        weights: tuple[Tensor | None, ...] = (self.pe, self.w1, self.b1, self.w2, self.b2)
        mesh = mesh if self.tensor_parallel is None else self.tensor_parallel
        if mesh is not None:
            from .distributed import local_weight

            weights = tuple(local_weight(weight, mesh, self.per_head) for weight in weights)
        return ops.compress(
            x,
            *weights,
            block_size=self.block_size,
            block_stride=self.block_stride,
            cu_seqlens_k=cu_seqlens,
            max_seqlen_k=max_seqlen,
        )

    def extra_repr(self) -> str:
        sizes = f"block_size={self.block_size}, block_stride={self.block_stride}"
        hidden = "" if self.w2 is None else f", hidden_size={self.w2.size(-1)}"
        heads = f", num_heads={self.pe.size(0)}" if self.pe is not None and self.pe.dim() == 3 else ""
        return f"{self.dim}, {sizes}, compression={self.compression!r}{hidden}{heads}"


def _add(weight: Any, values: Tensor) -> None:
    """Add values, which every rank has whole, to a weight that may be cut over ranks: a DTensor."""
    if hasattr(weight, "placements"):
        from .distributed import cut_like

        values = cut_like(weight, values.expand(weight.shape))
    weight.add_(values)
