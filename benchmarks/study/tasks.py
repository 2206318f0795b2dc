"""What a task is: sizes, a curriculum of lengths, batches that a seed and a step settle, and a score."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .layers import Shape
from .models import REFERENCE, Decoder

TRAINING, EVALUATION = 0, 1  # batches of the two never share random numbers


@dataclass(frozen=True)
class Stage:
    """One length of the curriculum, and its share of a run's tokens."""

    length: int
    share: float


@dataclass(frozen=True)
class Batch:
    """Tokens (B, T) int64; after those at `positions` (B, N) shall come `targets` (B, N). None: after all, (B, T)."""

    tokens: Tensor
    targets: Tensor
    positions: Tensor | None = None

    def of_asked(self, stream: Tensor) -> Tensor:
        """The rows (B, N, hidden) of a stream (B, T, hidden) that are asked for."""
        if self.positions is None:
            return stream
        return stream.gather(1, self.positions.unsqueeze(-1).expand(-1, -1, stream.size(-1)))


@dataclass(frozen=True)
class Sizes:
    """How a task is trained: its models' sizes, its vocabulary, its curriculum, and the tokens of a step."""

    shape: Shape
    vocabulary: int
    stages: tuple[Stage, ...]
    tokens_per_step: int
    mlp_width: int = 512  # of the reference's SwiGLU
    weight_decay: float = 0.05
    reference: str = REFERENCE  # whose number of parameters all models have


class Task(Protocol):
    """A task draws batches and scores models."""

    @property
    def sizes(self) -> Sizes: ...

    def batch(self, length: int, sequences: int, generator: torch.Generator) -> Batch:
        """Training data, on the generator's device."""
        ...

    def evaluate(self, model: Decoder, device: torch.device) -> dict[str, Any]:
        """Scores on data that is the same for every model; JSON."""
        ...


def generator(device: torch.device, *numbers: int) -> torch.Generator:
    """Random numbers that `numbers` settle, such as (TRAINING, seed, step)."""
    mixed = 0
    for number in numbers:
        mixed = (mixed * 6364136223846793005 + number + 1442695040888963407) % 2**63
    return torch.Generator(device).manual_seed(mixed)


def stage_at(stages: tuple[Stage, ...], progress: float) -> Stage:
    """The stage of a run that is `progress` (0 to 1) through its tokens, or its time."""
    reached, total = 0.0, sum(stage.share for stage in stages)
    for stage in stages:
        reached += stage.share / total
        if progress < reached:
            return stage
    return stages[-1]


def half_precision(device: torch.device) -> torch.autocast:
    """bfloat16 products on a GPU; on a CPU, where they are no faster, float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def logits_of(model: Decoder, batch: Batch) -> Tensor:
    """Scores of the vocabulary at the positions asked for: float32 (B, N, vocabulary)."""
    with half_precision(batch.tokens.device):
        return model.logits(batch.of_asked(model(batch.tokens)))
