"""Associative recall: pairs (key, value) are told, then keys are asked for. A model scores by naming the value.

`mqar` is the task of "Zoology" (arXiv 2312.04927): pairs side by side at the start, then each key once more, most of
them soon and some late, among tokens that mean nothing. `noise` scatters the pairs over the first three quarters of the
text, among noise, and asks in the last quarter. All tokens are drawn anew for each batch: only looking back helps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .layers import Shape
from .models import REFERENCE, Decoder
from .tasks import EVALUATION, Batch, Sizes, Stage, generator, logits_of

SHARES = {128: 0.2, 256: 0.15, 512: 0.15, 1024: 0.125, 2048: 0.125, 4096: 0.125, 8192: 0.125}
PAIR_SPACING = (64, 32, 16)  # evaluated: a pair for so many tokens of text
SHAPE = Shape()
POWER = 0.01  # Zoology's exponent of the distances


def _draw(n: int, of: int, sequences: int, random: torch.Generator) -> Tensor:
    """For each sequence n different numbers below `of`, in any order: (sequences, n)."""
    return torch.rand(sequences, of, generator=random, device=random.device).argsort(1)[:, :n]


@dataclass(frozen=True)
class Recall:
    """Keys are tokens 0 .. num_keys - 1, values the next ones, the rest is noise."""

    kind: str = "noise"
    lengths: tuple[int, ...] = tuple(SHARES)
    num_keys: int = 512
    num_values: int = 64
    num_noise: int = 64
    spacing: int = 32  # trained on: a pair for so many tokens
    shape: Shape = SHAPE
    tokens_per_step: int = 16384
    mlp_width: int = 512
    reference: str = REFERENCE
    evaluated_tokens: int = 131072  # for each length and spacing

    def __post_init__(self) -> None:
        if self.kind not in ("noise", "mqar"):
            raise ValueError(f"kind must be 'noise' or 'mqar', got {self.kind!r}")

    @property
    def sizes(self) -> Sizes:
        stages = tuple(Stage(length, SHARES.get(length, 0.125)) for length in self.lengths)
        vocabulary = self.num_keys + self.num_values + self.num_noise
        return Sizes(self.shape, vocabulary, stages, self.tokens_per_step, self.mlp_width, reference=self.reference)

    def batch(self, length: int, sequences: int, generator: torch.Generator, *, spacing: int | None = None) -> Batch:
        """One pair for each `spacing` tokens, as many as there are keys at most; every key is asked for once."""
        pairs = max(1, min(length // (spacing or self.spacing), self.num_keys))
        device, first_noise = generator.device, self.num_keys + self.num_values
        keys = _draw(pairs, self.num_keys, sequences, generator)
        shape = (sequences, pairs)
        values = torch.randint(self.num_keys, first_noise, shape, generator=generator, device=device)
        size = (sequences, length)
        tokens = torch.randint(first_noise, first_noise + self.num_noise, size, generator=generator, device=device)
        told, asked = self._places(length, pairs, sequences, generator)
        tokens.scatter_(1, told, keys).scatter_(1, told + 1, values)
        order = _draw(pairs, pairs, sequences, generator)
        tokens.scatter_(1, asked, keys.gather(1, order))
        return Batch(tokens, values.gather(1, order), asked)

    def _places(self, length: int, pairs: int, sequences: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """Where pairs are told (the key's place) and asked for: two (sequences, pairs), each in any order."""
        if self.kind == "noise":
            context = length // 4 * 3
            told = 2 * _draw(pairs, context // 2, sequences, random)
            return told, context + _draw(pairs, length - context, sequences, random)
        told = 2 * torch.arange(pairs, device=random.device).expand(sequences, pairs)
        space = (length - 2 * pairs) // 2
        log_weight = (POWER - 1) * torch.arange(1, space + 1, device=random.device).log()
        gumbel = -torch.empty(sequences, space, device=random.device).exponential_(generator=random).log()
        return told, 2 * pairs + 2 * (log_weight + gumbel).topk(pairs, 1).indices

    @torch.no_grad()
    def evaluate(self, model: Decoder, device: torch.device) -> dict[str, Any]:
        """Accuracy by length and by the number of tokens for each pair."""
        accuracy: dict[str, dict[str, float]] = {}
        for length in self.lengths:
            row = accuracy.setdefault(str(length), {})
            for spacing in PAIR_SPACING:
                row[str(spacing)] = self._accuracy(model, device, length, spacing)
        return {"accuracy": accuracy}

    def _accuracy(self, model: Decoder, device: torch.device, length: int, spacing: int) -> float:
        sequences = max(1, min(self.tokens_per_step // length, self.evaluated_tokens // length))
        right = asked = 0
        for number in range(max(1, self.evaluated_tokens // (sequences * length))):
            random = generator(device, EVALUATION, length, spacing, number)
            batch = self.batch(length, sequences, random, spacing=spacing)
            right += int((logits_of(model, batch).argmax(-1) == batch.targets).sum())
            asked += batch.targets.numel()
        return right / asked
