"""NSAAttention for the study: with the convolution on keys and values, and without a part of itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import nsa_torch
from nsa_torch import rope

from .layers import ConvolvedLinear, Shape

BRANCHES = ("compressed", "selected", "window")


class ClosedGates(nn.Module):
    """The gates' projection with some branches shut: their logits are -inf, so the gates and their gradients are 0."""

    closed: Tensor

    def __init__(self, linear: nn.Linear, shut: tuple[str, ...]) -> None:
        super().__init__()
        if unknown := set(shut) - set(BRANCHES):
            raise ValueError(f"branches are {', '.join(BRANCHES)}, got {', '.join(sorted(unknown))}")
        self.linear = linear
        self.register_buffer("closed", torch.tensor([name in shut for name in BRANCHES]), persistent=False)

    def reset_parameters(self) -> None:
        self.linear.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        logits = self.linear(x).unflatten(-1, (-1, len(BRANCHES)))
        return logits.masked_fill(self.closed, float("-inf")).flatten(-2)


class DroppedBranches(nn.Module):
    """The gates' projection that in training leaves some sequences the compressed branch alone.

    The choice of blocks has no gradient: its scores are learned only as far as the compressed branch is of use. Where
    the other branches do all the work, as they can on texts that n blocks cover, nothing teaches it.
    """

    others: Tensor

    def __init__(self, linear: nn.Linear, share: float) -> None:
        super().__init__()
        if not 0 <= share < 1:
            raise ValueError(f"share of the sequences must be in [0, 1), got {share}")
        self.linear, self.share = linear, share
        self.register_buffer("others", torch.tensor([name != "compressed" for name in BRANCHES]), persistent=False)

    def reset_parameters(self) -> None:
        self.linear.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        logits = self.linear(x)
        if not self.training:
            return logits
        alone = torch.rand(x.size(0), 1, 1, 1, device=x.device) < self.share
        logits = logits.unflatten(-1, (-1, len(BRANCHES)))
        return logits.masked_fill(alone & self.others, float("-inf")).flatten(-2)


class SharedKeys(nsa_torch.NSAAttention):
    """NSA that compresses the selected branch's keys: what that branch learns about them also serves the choice."""

    def _project(self, x: Tensor, tables: rope.Tables | None) -> Any:
        inputs = super()._project(x, tables)
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


class RandomChoice(nsa_torch.NSAAttention):
    """NSA whose blocks are chosen by chance: what the choice is worth."""

    def forward(self, hidden_states: Tensor, **_: Any) -> Tensor:
        inputs, _ = self._inputs(hidden_states, None, None, None)
        lists = random_blocks(hidden_states.size(1), self.num_kv_heads, self, hidden_states.device)
        lists = lists.expand(hidden_states.size(0), -1, -1, -1)
        blocks = {"block_size": self.block_size, "block_stride": self.block_stride, "select_size": self.select_size}
        out = nsa_torch.nsa_attention(
            *inputs, **blocks, num_selected=self.num_selected, window=self.window, block_indices=lists
        )
        return self.o_proj(out.flatten(-2))


CHOICES = {"scores": nsa_torch.NSAAttention, "shared": SharedKeys, "random": RandomChoice}


def nsa_layer(
    shape: Shape,
    *,
    conv: bool = False,
    without: tuple[str, ...] = (),
    dropped: float = 0.0,
    choice: str = "scores",
    **options: Any,
) -> nsa_torch.NSAAttention:
    """NSAAttention of these sizes.

    Args:
        shape: the comparison's sizes.
        conv: a CausalConv on all branches' keys and values, before rotation and compression.
        without: branches to shut.
        dropped: share of the sequences that in training have the compressed branch alone.
        choice: by "scores", as the paper has it, by scores of "shared" keys, or at "random".
        options: of NSAAttention.
    """
    if choice not in CHOICES:
        raise ValueError(f"choice must be one of {', '.join(CHOICES)}, got {choice!r}")
    layer = CHOICES[choice](
        shape.hidden, shape.heads, shape.kv_heads, head_dim=shape.head_dim, rope_theta=shape.rope_theta, **options
    )
    if conv:
        layer.k_proj, layer.v_proj = ConvolvedLinear(layer.k_proj), ConvolvedLinear(layer.v_proj)
    if dropped:
        layer.gate_proj = DroppedBranches(layer.gate_proj, dropped)
    if without:
        layer.gate_proj = ClosedGates(layer.gate_proj, without)
    return layer
