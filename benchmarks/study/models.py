"""One decoder for all: rotary attention, RMSNorm, SwiGLU. The models differ in their attention, and in nothing else.

NSA has more parameters than the others: three branches' keys and values, and two compression networks. The others'
SwiGLU is widened until a layer has as many as one of NSA with the convolution, to within half a column.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import layers
from .block_lists import Pattern, lists_of
from .layers import Attention, Shape
from .nsa_layers import nsa_layer
from .reformer import ReformerAttention

# NSA's defaults let a query read n l' = 1024 selected keys and w = 512 of the window: the others may read as many.
BUDGET = 16 * 64 + 512
LONGFORMER = Pattern(num_global=1, num_window=BUDGET // 64 - 1)
BIGBIRD = Pattern(num_global=6, num_window=9, num_random=9)  # 2 : 3 : 3, the paper's proportions

Make = Callable[[Shape, int], nn.Module]  # of the sizes and the layer's index


def _listed(pattern: Pattern) -> Make:
    def make(shape: Shape, index: int) -> nn.Module:
        return Attention(shape, layers.listed(lists_of(pattern, shape.kv_heads, seed=index), pattern.size))

    return make


def _nsa(**options: Any) -> Make:
    return lambda shape, index: nsa_layer(shape, **options)


ATTENTION: dict[str, Make] = {
    "full": lambda shape, index: Attention(shape, layers.full),
    "full+conv": lambda shape, index: Attention(shape, layers.full, conv=True),
    "nsa": _nsa(),
    "nsa+conv": _nsa(conv=True),
    "window": lambda shape, index: Attention(shape, layers.window(BUDGET)),
    "window+conv": lambda shape, index: Attention(shape, layers.window(BUDGET), conv=True),
    "longformer": _listed(LONGFORMER),
    "bigbird": _listed(BIGBIRD),
    "reformer": lambda shape, index: ReformerAttention(shape),
    # What NSA's parts are worth.
    "nsa-no-compressed": _nsa(without=("compressed",)),
    "nsa-no-selected": _nsa(without=("selected",)),
    "nsa-no-window": _nsa(without=("window",)),
    "nsa-linear": _nsa(compression="linear"),
    "nsa-mean": _nsa(compression="mean"),
    "nsa-mean+conv": _nsa(compression="mean", conv=True),
    "nsa-random": _nsa(choice="random"),
    "nsa-random+conv": _nsa(choice="random", conv=True),
    "nsa-shared": _nsa(choice="shared"),
    "nsa-shared+conv": _nsa(choice="shared", conv=True),
    "nsa-dropped": _nsa(dropped=0.25),
    "nsa-dropped+conv": _nsa(dropped=0.25, conv=True),
    # What could teach the choice.
    "nsa-dropped50+conv": _nsa(dropped=0.5, conv=True),
    "nsa-open+conv": _nsa(opened=True, conv=True),
    "nsa-explored+conv": _nsa(choice="explored", conv=True),
    "nsa-scaled+conv": _nsa(choice="scaled", conv=True),
    "nsa-taught": _nsa(choice="taught"),
    "nsa-taught+conv": _nsa(choice="taught", conv=True),
    "nsa-taught512+conv": _nsa(choice="taught", taught_queries=512, conv=True),
    "nsa-sharp+conv": _nsa(choice="taught", sharp=True, conv=True),
    "nsa-sharp512+conv": _nsa(choice="taught", taught_queries=512, sharp=True, conv=True),
    "nsa-taught512-dropped+conv": _nsa(choice="taught", taught_queries=512, dropped=0.25, conv=True),
    "nsa-n4": _nsa(num_selected=4),
    "nsa-n8": _nsa(num_selected=8),
    "nsa-block32": _nsa(select_size=32, num_selected=32),
    "nsa-block128": _nsa(select_size=128, num_selected=8),
}
# The same with a sixteenth of the budget, for texts that a CPU trains on.
_MINI: dict[str, Any] = {
    "block_size": 8,
    "block_stride": 8,
    "select_size": 16,
    "num_selected": 4,
    "num_local": 1,
    "window": 32,
}
MINI_BUDGET = 4 * 16 + 32
MINI_LONGFORMER = Pattern(num_global=1, num_window=5, size=16)
MINI_BIGBIRD = Pattern(num_global=2, num_window=2, num_random=2, size=16)
ATTENTION |= {
    "mini-longformer": _listed(MINI_LONGFORMER),
    "mini-bigbird": _listed(MINI_BIGBIRD),
    "mini-reformer": lambda shape, index: ReformerAttention(shape, chunk=16, rounds=3),
    "mini-nsa": _nsa(**_MINI),
    "mini-nsa+conv": _nsa(conv=True, **_MINI),
    "mini-nsa-shared+conv": _nsa(choice="shared", conv=True, **_MINI),
    "mini-nsa-dropped+conv": _nsa(dropped=0.25, conv=True, **_MINI),
    "mini-nsa-random+conv": _nsa(choice="random", conv=True, **_MINI),
    "mini-nsa-open+conv": _nsa(opened=True, conv=True, **_MINI),
    "mini-nsa-explored+conv": _nsa(choice="explored", conv=True, **_MINI),
    "mini-nsa-scaled+conv": _nsa(choice="scaled", conv=True, whole_at=512, **_MINI),
    "mini-nsa-taught+conv": _nsa(choice="taught", conv=True, **_MINI),
    "mini-nsa-taught512+conv": _nsa(choice="taught", taught_queries=512, conv=True, **_MINI),
    "mini-nsa-sharp+conv": _nsa(choice="taught", sharp=True, conv=True, **_MINI),
}
REFERENCE, REFERENCE_WIDTH = "nsa+conv", 512  # whose SwiGLU has this width, and whose size the others take


class SwiGLU(nn.Module):
    """Down(silu(gate(x)) up(x))."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(hidden, 2 * width, bias=False)
        self.down = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """Attention and SwiGLU, each behind its norm, added to the stream."""

    def __init__(self, attention: nn.Module, hidden: int, width: int) -> None:
        super().__init__()
        self.attention, self.mlp = attention, SwiGLU(hidden, width)
        self.attention_norm, self.mlp_norm = nn.RMSNorm(hidden), nn.RMSNorm(hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Decoder(nn.Module):
    """Tokens (B, T) to the stream (B, T, hidden), normed; `logits` turns rows of it into scores of the vocabulary."""

    def __init__(self, name: str, vocabulary: int, shape: Shape, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, shape.hidden)
        nn.init.normal_(self.embedding.weight, std=0.02)
        make = ATTENTION[name]
        self.blocks = nn.ModuleList(Block(make(shape, i), shape.hidden, width) for i in range(shape.layers))
        self.norm = nn.RMSNorm(shape.hidden)
        self.head = nn.Linear(shape.hidden, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def logits(self, stream: Tensor) -> Tensor:
        return self.head(stream).float()


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@dataclass(frozen=True)
class Sizes:
    """What a model of a comparison has: `parameters` of the whole, and the width of its SwiGLU."""

    parameters: int
    width: int


def matched_width(
    name: str, shape: Shape, reference_width: int = REFERENCE_WIDTH, reference_name: str = REFERENCE
) -> int:
    """The SwiGLU's width with which a layer of model `name` has as many parameters as one of the reference."""
    with torch.device("meta"):
        own, reference = (parameters(ATTENTION[n](shape, 0)) for n in (name, reference_name))
    return max(1, reference_width + round((reference - own) / (3 * shape.hidden)))


def make_model(
    name: str,
    vocabulary: int,
    shape: Shape,
    reference_width: int = REFERENCE_WIDTH,
    reference_name: str = REFERENCE,
) -> tuple[Decoder, Sizes]:
    """A new model, drawn from torch's global random numbers. ValueError for a name that ATTENTION has not."""
    if name not in ATTENTION:
        raise ValueError(f"model must be one of {', '.join(ATTENTION)}, got {name!r}")
    width = matched_width(name, shape, reference_width, reference_name)
    model = Decoder(name, vocabulary, shape, width)
    return model, Sizes(parameters(model), width)
