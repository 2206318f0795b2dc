"""2,000 random steps of the Hugging Face cache: padded chunks, crops, beams, rows repeated and selected, interrupts.

After each, what the model gives with the cache is what it gives without for the tokens that each row should hold.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from hf_models import LLAMA, close, make_model, nsa_of
from nsa_torch.integrations.transformers import CACHE, NSAModelCache
from test_cache_failures import FailAt, Interrupt

pytestmark = pytest.mark.usefixtures("one_thread", "no_grad")

SEEDS, STEPS, LONGEST = 20, 100, 90
MODEL = make_model()
# With what changes what a cache holds.
WITH_OPTIONS = make_model(shared_kv=True, kv_conv=3)


class Fuzz:
    """A cache, and the columns that it should hold: ids and mask, (B, columns)."""

    def __init__(self, seed: int, model: Any = MODEL):
        self.rng = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.model = model
        self.max_crop = self.rng.choice((3, 64))
        self.cache: Any = NSAModelCache(model.config, self.rng.choice((None, LONGEST)), max_crop=self.max_crop)
        self.clear(self.rng.choice((1, 2, 3)))

    def clear(self, batch: int) -> None:
        self.ids = torch.empty(batch, 0, dtype=torch.long)
        self.mask = torch.empty(batch, 0, dtype=torch.long)
        self.reach = 0  # columns that were ever reached: of these max_crop can be taken back

    def fallibly(self, action: Callable[[], object]) -> None:
        """Lets an action fail at random ops, now and then, before it is done in full."""
        while self.rng.random() < 0.3:
            number = self.rng.randint(1, self.rng.choice((40, 400)))
            try:
                with FailAt(number, after=self.rng.random() < 0.2):
                    action()
            except Interrupt:
                continue
            return
        action()

    def whole(self) -> Tensor:
        """Logits of all columns, without a cache."""
        return self.model(self.ids, attention_mask=self.mask, position_ids=self.positions(), use_cache=False).logits

    def positions(self) -> Tensor:
        return (self.mask.cumsum(1) - 1).clamp(min=0)

    def chunk(self) -> None:
        batch, held = self.ids.shape
        count = self.rng.choice((1, 1, 1, 2, 7, 20))
        if held + count > LONGEST:
            self.reset()
            return
        new = torch.randint(1, LLAMA["vocab_size"], (batch, count), generator=self.generator)
        real = torch.ones_like(new)
        if self.rng.random() < 0.4:
            real = (torch.rand(batch, count, generator=self.generator) < 0.7).long()
        self.ids, self.mask = torch.cat((self.ids, new), dim=1), torch.cat((self.mask, real), dim=1)
        masked = not bool(self.mask.all()) or self.rng.random() < 0.5
        options = {"attention_mask": self.mask if masked else None, "position_ids": self.positions()[:, held:]}
        result: list[Tensor] = []
        self.fallibly(lambda: result.append(self.model(new, **options, **{CACHE: self.cache}).logits))
        torch.testing.assert_close(result[-1][real.bool()], self.whole()[:, held:][real.bool()], **close)
        self.reach = max(self.reach, held + count)

    def crop(self) -> None:
        columns = self.ids.size(1)
        removed = self.rng.randint(0, max(self.max_crop - (self.reach - columns), 0))
        kept = max(columns - removed, 0)
        # Interrupted, it has happened or not.
        self.fallibly(lambda: self.cache.crop(kept - self.cache.get_seq_length()))
        self.ids, self.mask = self.ids[:, :kept], self.mask[:, :kept]

    def select(self, rows: list[int]) -> None:
        self.ids, self.mask = self.ids[rows], self.mask[rows]

    def reorder(self) -> None:
        rows = [self.rng.randrange(len(self.ids)) for _ in self.ids]
        index = torch.tensor(rows)
        self.fallibly(lambda: self.cache.reorder_cache(index))
        self.select(rows)

    def repeat(self) -> None:
        batch = len(self.ids)
        if self.cache.is_initialized and batch <= 2:
            self.fallibly(lambda: self.cache.batch_repeat_interleave(2))
            self.select([row for row in range(batch) for _ in range(2)])
        elif self.cache.is_initialized:
            rows = sorted(self.rng.sample(range(batch), self.rng.randint(1, batch)))
            self.fallibly(lambda: self.cache.batch_select_indices(torch.tensor(rows)))
            self.select(rows)

    def reset(self) -> None:
        self.fallibly(self.cache.reset)
        self.clear(len(self.ids))

    def step(self) -> None:
        self.rng.choice([self.chunk] * 7 + [self.crop, self.reorder, self.repeat] + [self.reset] * (self.reach > 60))()
        assert self.cache.get_seq_length() == self.ids.size(1)
        if (nsa := nsa_of(self.cache)) is not None:
            assert nsa.lengths.tolist() == self.mask.sum(1).tolist()


@pytest.mark.parametrize("seed", range(SEEDS))
def test_random_steps(seed: int) -> None:
    fuzz = Fuzz(seed)
    for _ in range(STEPS):
        fuzz.step()


class FuzzOfTransformers(Fuzz):
    """The same of a DynamicCache or a StaticCache, some of them copied, or recording drafts."""

    def __init__(self, seed: int, kind: str, model: Any):
        super().__init__(seed, model)
        static = {"max_cache_len": LONGEST} if kind == "static" else {}
        self.cache = (StaticCache if static else DynamicCache)(config=model.config, **static)
        self.max_crop = 64
        if self.rng.random() < 0.5:
            self.cache.activate_past_recording()

    def step(self) -> None:
        if self.rng.random() < 0.1:
            copied = copy.deepcopy(self.cache)
            if self.rng.random() < 0.5:
                self.cache.crop(-1000 if self.rng.random() < 0.5 else 0)  # the copy does not see it
                self.cache.reset()
            self.cache = copied
        super().step()
        assert len({id(layer.state) for layer in self.cache.layers}) == 1


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("model", [MODEL, WITH_OPTIONS], ids=["plain", "options"])
@pytest.mark.parametrize("seed", range(5))
def test_random_steps_of_transformers_caches(seed: int, model: Any, kind: str) -> None:
    fuzz = FuzzOfTransformers(seed, kind, model)
    for _ in range(STEPS):
        fuzz.step()
