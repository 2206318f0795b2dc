"""NSAAttention for the study: with the convolution on keys and values, and without a part of itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import nsa_torch

from .layers import ConvolvedLinear, Shape

BRANCHES = ("compressed", "selected", "window")


class ClosedGates(nn.Module):
    """The gates' projection with some branches shut: their logits are -inf, so the gates and their gradients are 0."""

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


def nsa_layer(
    shape: Shape, *, conv: bool = False, without: tuple[str, ...] = (), choice: str = "scores", **options: Any
) -> nsa_torch.NSAAttention:
    """NSAAttention of these sizes.

    Args:
        shape: the comparison's sizes.
        conv: a CausalConv on all branches' keys and values, before rotation and compression.
        without: branches to shut.
        choice: "scores", as the paper has it, or "random".
        options: of NSAAttention.
    """
    if choice not in ("scores", "random"):
        raise ValueError(f"choice must be 'scores' or 'random', got {choice!r}")
    kind = RandomChoice if choice == "random" else nsa_torch.NSAAttention
    layer = kind(
        shape.hidden, shape.heads, shape.kv_heads, head_dim=shape.head_dim, rope_theta=shape.rope_theta, **options
    )
    if conv:
        layer.k_proj, layer.v_proj = ConvolvedLinear(layer.k_proj), ConvolvedLinear(layer.v_proj)
    if without:
        layer.gate_proj = ClosedGates(layer.gate_proj, without)
    return layer
