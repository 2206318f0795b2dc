"""2,000 random steps of caches: chunks, ragged ones, crops, beams, interrupts anywhere, replays past the end.

After each, what the cache gives is what the full forward gives for the tokens that each sequence should hold.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from nsa_torch import NSAAttention, NSACache, sequences
from nsa_torch import cache as cache_module
from test_cache import HIDDEN, make
from test_cache_failures import FailAt, Interrupt

pytestmark = pytest.mark.usefixtures("one_thread", "no_grad")

STEPS, SEEDS = 100, 20
LONGEST = 40
OPTIONS = {"kv_conv": 3, "shared_kv": True, "qk_norm": True, "rope_dim": 4, "rope_interleaved": True}


class Fuzz:
    """A cache of two layers, and the tokens that its sequences should hold."""

    def __init__(self, seed: int, patch: pytest.MonkeyPatch, device: str, dtype: torch.dtype):
        self.rng, self.patch, self.device, self.dtype = random.Random(seed), patch, device, dtype
        rng = self.rng
        sizes: dict[str, Any] = rng.choice(
            ({}, {"block_size": 4}, {"window": 3}, {"window": 100}, {"select_size": 4, "block_stride": 2})
        )
        # Not from `rng`: what is drawn after it stays.
        sizes = sizes | random.Random(seed).choice(({}, {}, {"kv_conv": 4}, {"shared_kv": True}, OPTIONS))
        self.layers: list[NSAAttention] = [make(seed=i, **sizes).to(device, dtype) for i in range(2)]
        self.batch, self.max_crop = rng.choice((1, 2, 3)), rng.choice((0, 0, 2, 5))
        self.max_length = rng.choice((LONGEST, LONGEST + 9, None))
        options = {"num_layers": 2, "max_crop": self.max_crop}
        self.cache: NSACache = self.layers[0].new_cache(self.batch, self.max_length, **options)
        self.held = [torch.empty(0, HIDDEN, dtype=dtype, device=device) for _ in range(self.batch)]
        # How far each sequence's rings were written: what lies further back than max_crop from there may be lost.
        self.reach = [0] * self.batch

    def model(self, x: Tensor, caches: NSACache | list[None], **options: object) -> Tensor:
        first = self.layers[0](x, cache=caches[0], **options)
        return self.layers[1](x + first, cache=caches[1], **options)

    def fallibly(self, action: Callable[[], object]) -> None:
        """Lets an action fail at random ops, now and then, before it is done in full."""
        while self.rng.random() < 0.3:
            try:
                with FailAt(self.rng.randint(1, 260), after=self.rng.random() < 0.2):
                    action()
            except Interrupt:
                continue
            return
        action()

    def randn(self, *shape: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.rng.randint(0, 2**31))
        return torch.randn(*shape, HIDDEN, generator=generator, dtype=torch.float64).to(self.device, self.dtype)

    def check(self, got: Tensor, expected: Tensor) -> None:
        """The tokens of a step, `got`, against the last of all."""
        tolerance = 1e-12 if self.dtype == torch.float64 else 1e-4
        torch.testing.assert_close(got, expected[len(expected) - len(got) :], rtol=tolerance, atol=tolerance)

    def chunk(self) -> None:
        room = [LONGEST - len(h) for h in self.held]
        if self.rng.random() < 0.5 and min(room) > 0:
            counts = [min(self.rng.choice((1, 1, 1, 2, 5, 13, 30)), *room)] * self.batch
        else:
            counts = [min(self.rng.choice((0, 1, 1, 2, 7, 13)), r) for r in room]
        if sum(counts) == 0:
            return
        new = [self.randn(n) for n in counts]
        result: list[Tensor] = []
        if min(counts) == max(counts) and self.rng.random() < 0.7:
            x = torch.stack(new)
            self.fallibly(lambda: result.append(self.model(x, self.cache)))
            outs = list(result[-1])
        else:
            ends = torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32, device=self.device)
            options = {"cu_seqlens": ends, "max_seqlen": self.rng.choice((max(counts), sum(counts)))}
            x = torch.cat(new)
            self.fallibly(lambda: result.append(self.model(x, self.cache, **options)))
            outs = list(result[-1].split(counts))
        undone = self.rng.random() < 0.15
        if undone:
            self.fallibly(self.cache.rollback)
        for b, (out, tokens) in enumerate(zip(outs, new, strict=True)):
            whole = torch.cat((self.held[b], tokens))
            if len(tokens):
                self.check(out, self.model(whole[None], [None, None])[0])
            if not undone:
                self.held[b] = whole
                self.reach[b] = max(self.reach[b], len(whole))

    def crop(self) -> None:
        shortest = [max(reach - self.max_crop, 0) for reach in self.reach]
        kept = [self.rng.choice((0, len(h), self.rng.randint(min(s, len(h)), len(h)))) for h, s in
                zip(self.held, shortest, strict=True)]  # fmt: skip
        self.fallibly(lambda: self.cache.crop(torch.tensor(kept, device=self.device)))
        self.held = [h[:n] for h, n in zip(self.held, kept, strict=True)]
        self.reach = [reach if n else 0 for reach, n in zip(self.reach, kept, strict=True)]

    def reorder(self) -> None:
        order = [self.rng.randrange(self.batch) for _ in self.held]
        index = torch.tensor(order, device=self.device)
        while True:
            try:
                with FailAt(self.rng.choice((-1, self.rng.randint(1, 40)))):
                    self.cache.reorder(index)
                break
            except Interrupt:
                if self.cache._sequences.reordering is None and self.rng.random() < 0.5:
                    return  # nothing has happened
        self.held = [self.held[b] for b in order]
        self.reach = [self.reach[b] for b in order]

    def reset(self) -> None:
        self.fallibly(self.cache.reset)
        self.held = [h[:0] for h in self.held]
        self.reach = [0] * self.batch

    def replays(self) -> None:
        """Single tokens of a captured step, until a sequence is full or beyond."""
        if self.max_length is None:
            return
        count = self.rng.choice((1, 3, LONGEST))
        for _ in range(count):
            x = self.randn(self.batch, 1)
            with self.patch.context() as patch:
                patch.setattr(sequences, "_capturing", lambda device: True)
                outs = self.model(x, self.cache)
            for b in range(self.batch):
                if len(self.held[b]) < self.max_length:
                    self.held[b] = torch.cat((self.held[b], x[b]))
                    self.reach[b] = max(self.reach[b], len(self.held[b]))
                    self.check(outs[b], self.model(self.held[b][None], [None, None])[0])
        assert self.cache.lengths.tolist() == [len(h) for h in self.held]
        if self.cache.overflowed.any():
            with pytest.raises(RuntimeError, match="a CUDA graph was replayed past the end"):
                self.model(x, self.cache)
            self.cache.crop(self.max_length)
        if any(len(h) > LONGEST for h in self.held):
            self.reset()

    def step(self) -> None:
        actions = [self.chunk] * 8 + [self.crop, self.crop, self.reorder, self.reset]
        self.rng.choice(actions if self.rng.random() < 0.95 else [self.replays])()
        assert self.cache.lengths.tolist() == [len(h) for h in self.held]
        assert self.cache.length_bound >= max(map(len, self.held))


@pytest.mark.filterwarnings("ignore:cache layers")
@pytest.mark.parametrize("seed", range(SEEDS))
def test_random_steps(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "_FIRST_CAPACITY", 6)
    fuzz = Fuzz(seed, monkeypatch, "cpu", torch.float64)
    for _ in range(STEPS):
        fuzz.step()


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore:cache layers")
@pytest.mark.parametrize("seed", range(SEEDS))
def test_random_steps_on_a_gpu(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "_FIRST_CAPACITY", 6)
    fuzz = Fuzz(seed, monkeypatch, "cuda", torch.float32)
    for _ in range(STEPS):
        fuzz.step()
