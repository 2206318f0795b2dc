"""Language modelling of bytes, and retrieval: a key and its value hidden in real text, asked for at its end.

`Language` predicts every byte; it is scored in bits per byte, by position, on packages that were not trained on.
`Needle` puts a line "The code of KEY is VALUE." into a text at any depth, and ends with "The code of KEY is ": the
signs of VALUE must follow: digits, or signs that real text has not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import texts
from .layers import Shape
from .models import REFERENCE, Decoder
from .tasks import EVALUATION, Batch, Sizes, Stage, generator, logits_of

BYTES = 256
SHAPE = Shape(layers=4)


class Texts:
    """A split of real text on each device that asks for it."""

    def __init__(self, split: str, folder: Path = texts.FOLDER) -> None:
        self.split, self.folder = split, folder
        self._on: dict[torch.device, Tensor] = {}

    def on(self, device: torch.device) -> Tensor:
        """uint8 (N,)."""
        if device not in self._on:
            self._on[device] = texts.load(self.split, self.folder).to(device)
        return self._on[device]

    def pieces(self, length: int, count: int, random: torch.Generator) -> Tensor:
        """`count` pieces of `length` bytes from anywhere: int64 (count, length)."""
        data = self.on(random.device)
        if len(data) < length:
            raise ValueError(f"{self.split} has {len(data)} bytes, fewer than the {length} of a piece")
        starts = torch.randint(len(data) - length + 1, (count, 1), generator=random, device=random.device)
        return data[starts + torch.arange(length, device=random.device)].long()


@dataclass(frozen=True)
class Language:
    """The next byte, at every position. Short texts are scored too: the same model at `scored` lengths."""

    split: str = "english"
    length: int = 8192
    scored: tuple[int, ...] = (1024, 8192)
    shape: Shape = SHAPE
    tokens_per_step: int = 32768
    mlp_width: int = 512
    scored_bytes: int = 1 << 20
    folder: Path = texts.FOLDER

    @property
    def sizes(self) -> Sizes:
        return Sizes(self.shape, BYTES, (Stage(self.length, 1.0),), self.tokens_per_step, self.mlp_width)

    @cached_property
    def training(self) -> Texts:
        return Texts(f"{self.split}-train", self.folder)

    @cached_property
    def held_out(self) -> Texts:
        return Texts(f"{self.split}-held-out", self.folder)

    def batch(self, length: int, sequences: int, generator: torch.Generator) -> Batch:
        pieces = self.training.pieces(length + 1, sequences, generator)
        return Batch(pieces[:, :-1], pieces[:, 1:])

    @torch.no_grad()
    def evaluate(self, model: Decoder, device: torch.device) -> dict[str, Any]:
        """Bits per byte at each scored length, and at powers of two of the position: "512" is positions 512 to 1023."""
        scores: dict[str, Any] = {}
        for length in self.scored:
            bits = self._bits(model, device, length)
            edges = [0, *(1 << i for i in range(6, length.bit_length() - 1)), length]
            by_position = {str(a): bits[a:b].mean().item() for a, b in pairwise(edges)}
            scores[str(length)] = {"bits_per_byte": bits.mean().item(), "by_position": by_position}
        return {"language": scores}

    def _bits(self, model: Decoder, device: torch.device, length: int) -> Tensor:
        """The mean loss in bits at each position, (length,), on the same held-out pieces for every model."""
        sequences = max(1, self.tokens_per_step // length)
        total, count = torch.zeros(length, dtype=torch.float64, device=device), 0
        while count * length < self.scored_bytes:
            pieces = self.held_out.pieces(length + 1, sequences, generator(device, EVALUATION, length, count))
            scores = logits_of(model, Batch(pieces[:, :-1], pieces[:, 1:]))
            total += F.cross_entropy(scores.transpose(1, 2), pieces[:, 1:], reduction="none").double().sum(0)
            count += sequences
        return (total / count / math.log(2)).cpu()


KEY_LETTERS, DIGITS = 4, 6
LEAD, BETWEEN, END = b"\nThe code of ", b" is ", b".\n"
DIGIT_BYTES = tuple(range(48, 58))
RARE_BYTES = (*range(1, 9), *range(14, 32))  # control characters, in none of the texts
NEEDLE_SHARES = {512: 6, 1024: 4, 2048: 5, 4096: 5, 8192: 5, 16384: 5, 32768: 4, 65536: 6}
NEEDLE_SHAPE = Shape(rope_theta=1e6)  # with base 10,000 the slowest angle too turns round within 65,536 tokens


@dataclass(frozen=True)
class Needle:
    """`needles` keys are hidden, each at a depth of its own. Scored: one of them is asked for; in training all are."""

    split: str = "english"
    lengths: tuple[int, ...] = tuple(NEEDLE_SHARES)
    needles: int = 1
    signs: int = DIGITS  # of a code
    rare: int = 0  # codes of so many different RARE_BYTES, which no text has. 0: of digits
    distinct: bool = False  # no sign twice in a code
    shares: tuple[float, ...] = ()  # of the tokens, for each length; none: those of NEEDLE_SHARES
    depths: int = 8  # scored: the middles of so many equal parts of the text
    shape: Shape = NEEDLE_SHAPE
    tokens_per_step: int = 16384
    mlp_width: int = 512
    reference: str = REFERENCE
    scored_texts: int = 16  # for each length and depth
    scored_together: int = 0  # tokens at once; 0: as many as in a step
    folder: Path = texts.FOLDER

    @property
    def sizes(self) -> Sizes:
        shares = self.shares or [NEEDLE_SHARES.get(length, 4) for length in self.lengths]
        stages = tuple(Stage(length, share) for length, share in zip(self.lengths, shares, strict=True))
        return Sizes(self.shape, BYTES, stages, self.tokens_per_step, self.mlp_width, reference=self.reference)

    @cached_property
    def training(self) -> Texts:
        return Texts(f"{self.split}-train", self.folder)

    @cached_property
    def held_out(self) -> Texts:
        return Texts(f"{self.split}-held-out", self.folder)

    def batch(self, length: int, sequences: int, generator: torch.Generator) -> Batch:
        depth = torch.rand(sequences, self.needles, generator=generator, device=generator.device)
        pieces = self.training.pieces(length, sequences, generator)
        return self.hide(pieces, depth, generator, asked=self.needles)

    def hide(self, pieces: Tensor, depth: Tensor, random: torch.Generator, *, asked: int = 1) -> Batch:
        """Needles at `depth` (sequences, needles), 0 to 1, written over pieces (sequences, T), none over another.

        The last `asked` of them are asked for, one after the other. A question is followed by its answer, at the text's
        end by all but its last digit, so that each digit is predicted from the right ones before it.
        """
        sequences, length = pieces.shape
        device, pieces, needles = pieces.device, pieces.clone(), depth.size(1)
        question = len(LEAD + BETWEEN) + KEY_LETTERS
        needle, tail = question + self.signs + len(END), question + self.signs - 1
        tail += (asked - 1) * needle
        room = length - tail - needles * needle
        if room < 0:
            raise ValueError(f"length must be at least {length - room} to hold needles and questions, got {length}")
        keys = torch.randint(97, 123, (sequences, needles, KEY_LETTERS), generator=random, device=device)
        values = self._codes((sequences, needles), random)
        told = self._sentences(keys, values)
        start = (depth * (room + 1)).long().clamp(max=room) + needle * depth.argsort(1).argsort(1)
        places = start.unsqueeze(-1) + torch.arange(needle, device=device)
        pieces.scatter_(1, places.flatten(1), told.flatten(1))
        pieces[:, length - tail :] = told[:, -asked:].flatten(1)[:, :tail]
        ends = length - tail + torch.arange(asked, device=device) * needle + question - 1
        positions = (ends.unsqueeze(-1) + torch.arange(self.signs, device=device)).flatten()
        return Batch(pieces, values[:, -asked:].flatten(1), positions.expand(sequences, -1))

    def _codes(self, size: tuple[int, int], random: torch.Generator) -> Tensor:
        """Bytes (*size, signs)."""
        alphabet = torch.tensor(RARE_BYTES[: self.rare] if self.rare else DIGIT_BYTES, device=random.device)
        count, device = len(alphabet), random.device
        if self.distinct:
            return alphabet[torch.rand(*size, count, generator=random, device=device).argsort(-1)[..., : self.signs]]
        return alphabet[torch.randint(count, (*size, self.signs), generator=random, device=device)]

    def _sentences(self, keys: Tensor, values: Tensor) -> Tensor:
        """(sequences, needles, letters) and (..., signs) to (..., bytes of a sentence)."""
        parts = [torch.tensor(list(p), device=keys.device).expand(*keys.shape[:2], -1) for p in (LEAD, BETWEEN, END)]
        return torch.cat((parts[0], keys, parts[1], values, parts[2]), dim=-1)

    @torch.no_grad()
    def evaluate(self, model: Decoder, device: torch.device) -> dict[str, Any]:
        """For each length and depth the share of codes that are right in all digits, and of digits."""
        codes: dict[str, list[float]] = {}
        digits: dict[str, list[float]] = {}
        for length in self.lengths:
            codes[str(length)], digits[str(length)] = [], []
            for part in range(self.depths):
                right = self._right(model, device, length, (part + 0.5) / self.depths)
                codes[str(length)].append(right.all(1).double().mean().item())
                digits[str(length)].append(right.double().mean().item())
        return {"needle": {"codes": codes, "digits": digits}}

    def _right(self, model: Decoder, device: torch.device, length: int, depth: float) -> Tensor:
        """Which digits are named right, bool (scored_texts, signs)."""
        sequences = max(1, min(self.scored_texts, (self.scored_together or self.tokens_per_step) // length))
        rows = []
        for number in range(-(-self.scored_texts // sequences)):
            random = generator(device, EVALUATION, length, int(depth * 1e6), number)
            pieces = self.held_out.pieces(length, sequences, random)
            others = torch.rand(sequences, self.needles, generator=random, device=device)
            others[:, -1] = depth
            batch = self.hide(pieces, others, random)
            rows.append(logits_of(model, batch).argmax(-1) == batch.targets)
        return torch.cat(rows)[: self.scored_texts]
