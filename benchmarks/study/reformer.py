"""Reformer's attention (arXiv 2001.04451): queries that are also keys, hashed, sorted by bucket, read by chunks.

In each of `rounds` rounds a random rotation hashes every token's vector to a bucket: the index of the largest of
(x R, -x R). Tokens are sorted by bucket, then by position, and cut into chunks; a token reads the keys of its own chunk
and of the one before, never later ones, and itself only when there is nothing else. The rounds are merged by their
softmaxes' denominators.

No key of a later token is read. But which tokens share a chunk depends on later tokens too: it does in the paper.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nsa_torch import rope

from .layers import Shape, rotary

SELF_SCORE = -1e5  # a token's own key: read when nothing else can be


def num_buckets(tokens: int, chunk: int) -> int:
    """The power of two at most twice the number of chunks: about half a chunk of tokens in each."""
    return 1 << ((2 * (tokens // chunk)).bit_length() - 1)


def hash_buckets(qk: Tensor, rotations: Tensor) -> Tensor:
    """Qk (B, H, T, D) by rotations (H, D, rounds, buckets / 2) -> int64 (B, H, rounds, T)."""
    rotated = torch.einsum("bhtd,hdrk->bhrtk", qk, rotations)
    return torch.cat((rotated, -rotated), dim=-1).argmax(-1)


def _with_previous(chunks: Tensor) -> Tensor:
    """(B, H, rounds * chunks, c, ...) -> (..., 2 c, ...): each chunk behind the one before it.

    The chunks of all rounds are one ring, as in the authors' code: a round's first chunk follows the round before.
    """
    return torch.cat((chunks.roll(1, dims=2), chunks), dim=3)


def lsh_attention(qk: Tensor, v: Tensor, buckets: Tensor, chunk: int) -> Tensor:
    """Causal LSH attention.

    Args:
        qk: (B, H, T, D), queries; scaled to unit length they are the keys.
        v: (B, H, T, Dv).
        buckets: (B, H, rounds, T) from `hash_buckets`.
        chunk: tokens of a chunk; divides T.

    Returns:
        (B, H, T, Dv).
    """
    rounds, tokens = buckets.shape[2:]
    if tokens % chunk:
        raise ValueError(f"chunk must divide T = {tokens}, got {chunk}")
    positions = torch.arange(tokens, device=qk.device)
    order = (buckets * tokens + positions).argsort(-1)  # (B, H, rounds, T)
    flat = order.flatten(2)

    def sort(x: Tensor) -> Tensor:
        rows = x.gather(2, flat.unsqueeze(-1).expand(-1, -1, -1, x.size(-1)))
        return rows.unflatten(2, (rounds * tokens // chunk, chunk))

    wide = qk.to(torch.promote_types(qk.dtype, torch.float32))
    key = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6) / qk.size(-1) ** 0.5).to(qk.dtype)
    query = sort(qk)
    own = flat.unflatten(2, (-1, chunk))
    scores = query @ _with_previous(sort(key)).transpose(-1, -2)
    seen = _with_previous(own).unsqueeze(-2)
    scores = scores.to(wide.dtype).masked_fill(own.unsqueeze(-1) == seen, SELF_SCORE)
    scores = scores.masked_fill(own.unsqueeze(-1) < seen, -1e9)
    lse = scores.logsumexp(-1, keepdim=True)
    out = (scores - lse).exp().to(v.dtype) @ _with_previous(sort(v))

    back = order.argsort(-1)
    out = out.flatten(2, 3).unflatten(2, (rounds, tokens))
    out = out.gather(3, back.unsqueeze(-1).expand(-1, -1, -1, -1, out.size(-1)))
    lse = lse.flatten(2).unflatten(2, (rounds, tokens)).gather(3, back)
    weights = lse.softmax(2).unsqueeze(-1).to(out.dtype)
    return (out * weights).sum(2)


class ReformerAttention(nn.Module):
    """Shared queries and keys, one for each head; lengths up to two chunks are read whole.

    The rotations are drawn anew for each forward in training, and the same ones in evaluation.
    """

    def __init__(self, shape: Shape, *, chunk: int = 128, rounds: int = 6) -> None:
        super().__init__()
        self.shape, self.chunk, self.rounds = shape, chunk, rounds
        rows = shape.heads * shape.head_dim
        self.qk_proj = nn.Linear(shape.hidden, rows, bias=False)
        self.v_proj = nn.Linear(shape.hidden, rows, bias=False)
        self.o_proj = nn.Linear(rows, shape.hidden, bias=False)

    def rotations(self, tokens: int, x: Tensor) -> Tensor:
        generator = None if self.training else torch.Generator(x.device).manual_seed(tokens)
        size = (self.shape.heads, self.shape.head_dim, self.rounds, num_buckets(tokens, self.chunk) // 2)
        return torch.randn(size, generator=generator, device=x.device, dtype=x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        qk, v = (p(x).unflatten(-1, (-1, self.shape.head_dim)) for p in (self.qk_proj, self.v_proj))
        qk, v = rope.rotate(qk, rotary(x, self.shape)).transpose(1, 2), v.transpose(1, 2)
        tokens = x.size(1)
        padded = tokens + -tokens % self.chunk
        chunk = self.chunk
        if padded <= 2 * chunk:
            padded = chunk = tokens
            buckets = torch.zeros(qk.size(0), qk.size(1), 1, tokens, dtype=torch.int64, device=x.device)
        else:
            qk, v = (F.pad(t, (0, 0, 0, padded - tokens)) for t in (qk, v))
            with torch.no_grad():
                buckets = hash_buckets(qk.detach(), self.rotations(padded, qk))
        out = lsh_attention(qk, v, buckets, chunk)[:, :, :tokens]
        return self.o_proj(out.transpose(1, 2).flatten(-2))
