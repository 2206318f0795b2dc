"""NSAAttention that chooses, or learns to choose, its blocks in another way: what the choice is worth, what teaches it.

The choice of blocks has no gradient. Its scores, the compressed attention's, are learned only as far as the compressed
branch's own output is of use; where n blocks and the window cover the text, it is of none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import nsa_torch
from nsa_torch import rope


class Direct(nsa_torch.NSAAttention):
    """NSA whose op gets other options in training; in scoring it is NSAAttention."""

    def forward(self, hidden_states: Tensor, **arguments: Any) -> Tensor:
        if not self.training:
            return super().forward(hidden_states, **arguments)
        inputs, _ = self._inputs(hidden_states, None, None, None)
        return self.o_proj(self._attend(inputs).flatten(-2))

    def _attend(self, inputs: Any, **changes: Any) -> Tensor:
        options = self._block_options() | self._choice_options() | {"window": self.window, "scale": self.scale}
        return nsa_torch.nsa_attention(*inputs, **(options | changes))


class SharedKeys(nsa_torch.NSAAttention):
    """NSA that compresses the selected branch's keys: what that branch learns about them also serves the choice."""

    def _project(self, x: Tensor, tables: rope.Tables | None, *where: Any) -> Any:
        inputs = super()._project(x, tables, *where)
        if tables is None:
            return inputs._replace(k_cmp=inputs.k_slc)
        cos, sin = rope.for_heads(tables)
        return inputs._replace(k_cmp=nsa_torch.rotate(inputs.k_slc, cos, sin, transposed=True))


def random_blocks(tokens: int, kv_heads: int, layer: nsa_torch.NSAAttention, device: torch.device) -> Tensor:
    """Blocks chosen by chance, anew at each call, beside NSA's forced ones: int32 (1, T, Hkv, n)."""
    size, count = layer.select_size, layer.num_selected
    blocks = torch.arange(-(-tokens // size), device=device)
    own = (torch.arange(tokens, device=device) // size)[:, None, None]
    rank = torch.rand(tokens, kv_heads, len(blocks), device=device)
    forced = (blocks < layer.num_initial) | ((blocks <= own) & (blocks > own - layer.num_local))
    rank = torch.where(forced, 2.0, rank).masked_fill(blocks > own, -1.0)
    value, index = rank.topk(min(count, len(blocks)), dim=-1)
    beyond = len(blocks)  # sorts behind every block
    index = index.masked_fill(value < 0, beyond).sort(-1).values
    return index.masked_fill(index == beyond, -1).to(torch.int32).unsqueeze(0)


class ExploredChoice(Direct):
    """NSA whose blocks are chosen by chance in training, where they need the compressed branch; later by scores."""

    def _attend(self, inputs: Any, **changes: Any) -> Tensor:
        lists = random_blocks(inputs.q.size(1), self.num_kv_heads, self, inputs.q.device)
        return super()._attend(inputs, block_indices=lists.expand(inputs.q.size(0), -1, -1, -1))


class RandomChoice(ExploredChoice):
    """NSA whose blocks are always chosen by chance: what the choice is worth."""

    def forward(self, hidden_states: Tensor, **_: Any) -> Tensor:
        inputs, _ = self._inputs(hidden_states, None, None, None)
        return self.o_proj(self._attend(inputs).flatten(-2))


class ScaledReach(Direct):
    """NSA that in training reads of a short text as small a part as n blocks and the window are of a long one.

    `whole_at` tokens are trained on with n and w as they are, fewer with as much less, down to the forced blocks and
    one more. A text of the paper's 8k tokens has 128 blocks, of which 16 are read: the choice is needed at once.
    """

    def __init__(self, *sizes: Any, whole_at: int = 8192, **options: Any) -> None:
        super().__init__(*sizes, **options)
        self.whole_at = whole_at

    def _attend(self, inputs: Any, **changes: Any) -> Tensor:
        part = inputs.q.size(1) / self.whole_at
        least = self.num_initial + self.num_local + 1
        count = min(self.num_selected, max(least, round(self.num_selected * part)))
        window = min(self.window, max(self.select_size // 2, round(self.window * part)))
        return super()._attend(inputs, num_selected=count, window=window)


class _WithLoss(torch.autograd.Function):
    """Passes `out` on unchanged; in the backward pass `loss` counts as if it were added to what is minimised."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(loss)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (loss,) = ctx.saved_tensors
        return gradients[0], torch.ones_like(loss)


class TaughtChoice(Direct):
    """NSA whose scores of blocks learn, in training, from what the selected branch's keys would get of all keys.

    For some queries the dense attention over all of the selected branch's keys is summed by block; the importance
    (Eq. 8 to 10) of the blocks that are not forced is drawn towards it by cross-entropy, as DeepSeek-V3.2 trains its
    indexer. The teacher has no gradient, nor have the queries: only the compressed keys learn.

    taught_queries: how many queries of each sequence teach, drawn anew in every step.
    sharp: queries count as much as the block that dense attention prefers most gets: most look nowhere in particular.
    """

    def __init__(self, *sizes: Any, taught_queries: int = 64, sharp: bool = False, **options: Any) -> None:
        super().__init__(*sizes, **options)
        self.taught_queries, self.sharp = taught_queries, sharp

    def _attend(self, inputs: Any, **changes: Any) -> Tensor:
        tokens = inputs.q.size(1)
        rows = torch.randint(tokens, (min(tokens, self.taught_queries),), device=inputs.q.device)
        return _WithLoss.apply(super()._attend(inputs, **changes), self.teaching_loss(inputs, rows))

    def teaching_loss(self, inputs: Any, rows: Tensor) -> Tensor:
        """The cross-entropy of blocks that are not forced: its mean over the queries at `rows` and over KV heads."""
        tokens, device = inputs.q.size(1), inputs.q.device
        q = inputs.q.detach()[:, rows]
        blocks = -(-tokens // self.select_size)
        mass = self._probabilities(q, inputs.k_slc.detach(), torch.arange(tokens, device=device), rows)
        mass = F.pad(mass, (0, blocks * self.select_size - tokens)).unflatten(-1, (blocks, -1)).sum(-1)
        if (count := inputs.k_cmp.size(1)) == 0:
            return mass.new_zeros(())
        ends = torch.arange(count, device=device) * self.block_stride + self.block_size - 1
        starts = torch.arange(blocks, device=device) * self.select_size
        shared = torch.minimum(ends[:, None] + 1, starts + self.select_size)
        shared = shared - torch.maximum(ends[:, None] + 1 - self.block_size, starts)
        importance = self._probabilities(q, inputs.k_cmp, ends, rows) @ shared.clamp(min=0).to(mass)
        index, own = torch.arange(blocks, device=device), (rows // self.select_size)[:, None]
        free = (index >= self.num_initial) & (index <= own - self.num_local)
        learned = importance.masked_fill(~free, 0.0) + 1e-9 * free
        log_share = (learned / learned.sum(-1, keepdim=True).clamp(min=1e-9)).clamp(min=1e-9).log()
        mass = mass.masked_fill(~free, 0.0)
        losses = -(mass * log_share).sum(-1)
        if not self.sharp:
            return losses.mean()
        weights = mass.amax(-1)
        return (weights * losses).sum() / weights.sum().clamp(min=1e-9)

    def _probabilities(self, q: Tensor, k: Tensor, places: Tensor, rows: Tensor) -> Tensor:
        """Softmax over the keys at `places` up to each query's: the mean over a group's heads, (B, Hkv, S, N)."""
        scale = self.head_dim**-0.5 if self.scale is None else self.scale
        grouped = q.unflatten(2, (k.size(2), -1))
        scores = scale * torch.einsum("bshgc,bnhc->bhgsn", grouped, k).float()
        hidden = places > rows[:, None]
        # A query that sees no key has no probabilities: neither numbers that are none, nor gradients.
        scores = scores.masked_fill(hidden, -1e30)
        return scores.softmax(-1).masked_fill(hidden, 0.0).mean(2)


CHOICES = {
    "scores": nsa_torch.NSAAttention,
    "shared": SharedKeys,
    "random": RandomChoice,
    "explored": ExploredChoice,
    "scaled": ScaledReach,
    "taught": TaughtChoice,
}
