"""NSAAttention for the study: with the convolution on keys and values, and without a part of itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import nsa_torch

from .choices import CHOICES
from .layers import CONV_TAPS, Shape

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


class OpenGate(nn.Module):
    """The gates' projection with the compressed branch's gate at 1 always: training cannot shut it."""

    opened: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.register_buffer("opened", torch.tensor([name == "compressed" for name in BRANCHES]), persistent=False)

    def reset_parameters(self) -> None:
        self.linear.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        logits = self.linear(x).unflatten(-1, (-1, len(BRANCHES)))
        return logits.masked_fill(self.opened, float("inf")).flatten(-2)


def nsa_layer(
    shape: Shape,
    *,
    conv: bool = False,
    without: tuple[str, ...] = (),
    dropped: float = 0.0,
    opened: bool = False,
    choice: str = "scores",
    **options: Any,
) -> nsa_torch.NSAAttention:
    """NSAAttention of these sizes.

    Args:
        shape: the comparison's sizes.
        conv: the layer's kv_conv, of as many taps as the others' convolution.
        without: branches to shut.
        dropped: share of the sequences that in training have the compressed branch alone.
        opened: the compressed branch's gate is always 1.
        choice: of CHOICES; by "scores" as the paper has it.
        options: of NSAAttention.
    """
    if choice not in CHOICES:
        raise ValueError(f"choice must be one of {', '.join(CHOICES)}, got {choice!r}")
    sizes = {"head_dim": shape.head_dim, "rope_theta": shape.rope_theta, "kv_conv": CONV_TAPS if conv else 0}
    layer = CHOICES[choice](shape.hidden, shape.heads, shape.kv_heads, **sizes, **options)
    if dropped:
        layer.gate_proj = DroppedBranches(layer.gate_proj, dropped)
    if opened:
        layer.gate_proj = OpenGate(layer.gate_proj)
    if without:
        layer.gate_proj = ClosedGates(layer.gate_proj, without)
    return layer
