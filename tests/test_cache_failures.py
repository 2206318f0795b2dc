"""A step of a cache that fails anywhere leaves the cache as it was, and is repeated by calling again."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nsa_torch import NSACache
from nsa_torch import cache as cache_module
from test_cache import make, tokens

pytestmark = pytest.mark.usefixtures("one_thread", "no_grad")

with torch.no_grad():
    LAYERS = [make(seed=i, window=6) for i in range(2)]


class Interrupt(KeyboardInterrupt):
    """What these tests raise: no handler of ordinary errors sees it."""


class FailAt(TorchDispatchMode):
    """Raises at the op of this number before it runs, or at the change in place of this number after it."""

    def __init__(self, number: int, *, after: bool = False):
        super().__init__()
        self.number, self.after, self.count = number, after, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        counts = func._schema.is_mutable or not self.after
        self.count += counts
        failing = counts and self.count == self.number
        if failing and not self.after:
            raise Interrupt
        result = func(*args, **(kwargs or {}))
        if failing:
            raise Interrupt
        return result


def model(x: Tensor, cache: NSACache, **options: Any) -> Tensor:
    """Two layers with something between them."""
    first = LAYERS[0](x, cache=cache[0], **options)
    return LAYERS[1](x + first, cache=cache[1], **options)


def failures(start: NSACache, action: Callable[[NSACache], object]) -> Iterator[NSACache]:
    """Copies of a cache in which `action` has failed, at each of its ops in turn."""
    for after in (False, True):
        number, failed = 0, True
        while failed:
            cache, number, failed = copy.deepcopy(start), number + 1, False
            try:
                with FailAt(number, after=after):
                    action(cache)
            except Interrupt:
                failed = True
                yield cache
        assert number > 1


def held(cache: NSACache, x: Tensor) -> list[Tensor]:
    """What a cache says of itself, and of further tokens: with all that it holds, and cropped as far as is promised."""
    cropped, other = copy.deepcopy(cache), copy.deepcopy(cache)
    cropped.crop((cache.lengths - cache.max_crop).clamp(min=0))
    outs = [model(x, cropped), model(x[:, :1], other), model(x[:, 1:], other)]
    return [cache.lengths.clone(), torch.tensor(cache.length_bound), *outs]


def assert_equal(got: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)


RAGGED = {"cu_seqlens": torch.tensor([0, 2, 13], dtype=torch.int32), "max_seqlen": 11}
# Earlier chunks, new tokens of each sequence (None: ragged ones), max_crop, max_length.
STEPS = {
    "prefill": ([], 13, 0, 64),
    "chunk": ([14, 1], 5, 0, 64),
    "chunk_and_crop": ([14, 1], 5, 3, 64),
    "long_chunk": ([14], 30, 3, 64),
    "ragged_chunk": ([14], None, 0, 64),
    "one_token": ([14, 1], 1, 0, 64),
    "one_token_and_crop": ([14, 1], 1, 3, 64),
    "first_token": ([], 1, 0, 64),
    "growing": ([14], 5, 0, None),
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.filterwarnings("ignore:cache layers")
def test_a_step_that_fails_anywhere(step: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(cache_module, "_FIRST_CAPACITY", 15)
    before, size, max_crop, max_length = STEPS[step]
    start = LAYERS[0].new_cache(2, max_length, num_layers=2, max_crop=max_crop)
    for number, earlier in enumerate(before):
        model(tokens(2, earlier, seed=number), start)
    x, options = (tokens(13, seed=7), RAGGED) if size is None else (tokens(2, size, seed=7), {})
    more = tokens(2, 4, seed=8)
    untouched = held(start, more)
    whole = copy.deepcopy(start)
    expected = model(x, whole, **options)
    continued = held(whole, more)

    for number, cache in enumerate(failures(start, lambda cache: model(x, cache, **options))):
        assert torch.equal(cache.lengths, start.lengths)
        if number % 3 == 0:
            assert_equal(held(cache, more), untouched)
        else:
            assert torch.equal(model(x, cache, **options), expected)
            if number % 12 == 1:
                assert_equal(held(cache, more), continued)


@pytest.mark.parametrize("step", STEPS)
def test_rollback_of_a_step_that_is_done(step: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(cache_module, "_FIRST_CAPACITY", 15)
    before, size, max_crop, max_length = STEPS[step]
    cache = LAYERS[0].new_cache(2, max_length, num_layers=2, max_crop=max_crop)
    for number, earlier in enumerate(before):
        model(tokens(2, earlier, seed=number), cache)
    x, options = (tokens(13, seed=7), RAGGED) if size is None else (tokens(2, size, seed=7), {})
    more, untouched, lengths = tokens(2, 4, seed=8), copy.deepcopy(cache), cache.lengths
    expected = model(x, copy.deepcopy(cache), **options)

    model(tokens(13, seed=9) if size is None else tokens(2, size, seed=9), cache, **options)
    for again in (True, False):
        assert cache.rollback() is again  # nothing more is undone the second time
        assert_equal(held(cache, more), held(untouched, more))
        assert cache.lengths is lengths
    assert torch.equal(model(x, cache, **options), expected)
    cache.crop(cache.lengths)
    assert not cache.rollback()


def test_rollback_that_fails_is_repeated() -> None:
    start, more = LAYERS[0].new_cache(2, 64, num_layers=2), tokens(2, 4, seed=8)
    model(tokens(2, 14), start)
    untouched = held(start, more)
    for x in (tokens(2, 30), tokens(2, 1)):
        done = copy.deepcopy(start)
        model(x, done)
        for cache in failures(done, NSACache.rollback):
            assert cache.rollback()
            assert_equal(held(cache, more), untouched)


def test_a_layer_that_failed_may_be_called_again() -> None:
    start, x, more = LAYERS[0].new_cache(2, 64, num_layers=2), tokens(2, 9), tokens(2, 4, seed=8)
    model(tokens(2, 14), start)
    done = copy.deepcopy(start)
    expected, between = model(x, done), copy.deepcopy(start)
    first = LAYERS[0](x, cache=between[0])
    for cache in failures(between, lambda cache: LAYERS[1](x + first, cache=cache[1])):
        assert torch.equal(LAYERS[1](x + first, cache=cache[1]), expected)
        assert_equal(held(cache, more), held(done, more))


def test_another_chunk_after_one_that_failed() -> None:
    """What is called again need not be the same."""
    start = LAYERS[0].new_cache(2, 64, num_layers=2)
    model(tokens(2, 14), start)
    other = RAGGED | {"cu_seqlens": torch.tensor([0, 11, 13], dtype=torch.int32)}
    x = tokens(13, seed=7)
    expected = model(x, copy.deepcopy(start), **other)
    for cache in failures(start, lambda cache: LAYERS[0](x, cache=cache[0], **RAGGED)):
        assert torch.equal(model(x, cache, **other), expected)


def test_crop_that_fails() -> None:
    """Either nothing has happened or the sequences are shorter; cropping again is right."""
    start, more = LAYERS[0].new_cache(2, 64, num_layers=2, max_crop=4), tokens(2, 4, seed=8)
    model(tokens(2, 20), start)
    start.crop(18)
    for length in (16, 0):
        done = copy.deepcopy(start)
        done.crop(length)
        for cache in failures(start, lambda cache, length=length: cache.crop(length)):
            assert cache.lengths.tolist() in ([18, 18], [length, length])
            assert cache.length_bound >= max(cache.lengths.tolist())
            if cache.lengths.tolist() != [0, 0]:  # the rings were written up to 20, and cannot have forgotten it
                with pytest.raises(ValueError, match="length must take back at most max_crop = 4 tokens"):
                    cache.crop(14)
            cache.crop(length)
            assert_equal([model(more, cache)], [model(more, copy.deepcopy(done))])


def test_reset_that_fails() -> None:
    start, x = LAYERS[0].new_cache(2, 64, num_layers=2), tokens(2, 9)
    model(tokens(2, 14), start)
    untouched = held(start, x)
    expected = model(x, LAYERS[0].new_cache(2, 64, num_layers=2))
    for cache in failures(start, NSACache.reset):
        if cache.lengths.tolist() == [14, 14]:
            assert_equal(held(cache, x), untouched)
        cache.reset()
        assert torch.equal(model(x, cache), expected)


def test_reorder_that_fails() -> None:
    """It is finished by the same call; until then nothing else works but reset."""
    start, x, index = LAYERS[0].new_cache(2, 64, num_layers=2), tokens(2, 9), torch.tensor([1, 0])
    model(torch.cat((tokens(1, 14), tokens(1, 14, seed=3))), start)
    untouched = held(start, x)
    done = copy.deepcopy(start)
    done.reorder(index)
    expected = held(done, x)
    interrupted = 0
    for cache in failures(start, lambda cache: cache.reorder(index)):
        if cache._sequences.reordering is None:
            assert_equal(held(copy.deepcopy(cache), x), untouched)
        else:
            interrupted += 1
            for use in (
                lambda c: model(x, c),
                NSACache.rollback,
                lambda c: c.crop(3),
                lambda c: c.reorder(index.flip(0)),
            ):
                with pytest.raises(RuntimeError, match="reorder was interrupted: call it again with the same index"):
                    use(cache)
        fresh = copy.deepcopy(cache)
        cache.reorder(index)
        assert_equal(held(cache, x), expected)
        fresh.reset()
        assert torch.equal(model(x, fresh), model(x, LAYERS[0].new_cache(2, 64, num_layers=2)))
    assert interrupted > 30


def test_growing_that_fails_keeps_tokens(monkeypatch: Any) -> None:
    """Buffers move all at once."""
    monkeypatch.setattr(cache_module, "_FIRST_CAPACITY", 15)
    start, x = LAYERS[0].new_cache(2, num_layers=2), tokens(2, 9)
    model(tokens(2, 14), start)
    for cache in failures(start, lambda cache: model(x, cache)):
        for layer, before in zip(cache, start, strict=True):
            assert layer.k_slc.size(0) == layer.v_slc.size(0) == 2 * layer.capacity + 1
            assert layer.k_cmp.size(0) == layer.v_cmp.size(0)
            for name in ("k_slc", "v_slc"):
                assert torch.equal(layer.buffers()[name][:, :14], before.buffers()[name][:, :14])


@pytest.mark.parametrize("size", [1, 30])
@pytest.mark.filterwarnings("ignore:cache layers")
def test_steps_in_inference_mode_are_undone_outside_of_it(size: int) -> None:
    frozen = [copy.deepcopy(layer).requires_grad_(False) for layer in LAYERS]
    cache, more = frozen[0].new_cache(2, 64, num_layers=2), tokens(2, 4, seed=8)
    with torch.inference_mode():
        model(tokens(2, 14), cache)
    untouched = held(cache, more)
    for finished in (True, False):
        with torch.inference_mode():
            first = frozen[0](tokens(2, size), cache=cache[0])
            if finished:
                frozen[1](first, cache=cache[1])
        if finished:
            assert cache.rollback()
        with torch.enable_grad():
            frozen[0](more, cache=cache[0])
        cache.rollback()
        assert_equal(held(cache, more), untouched)


def test_rings_know_what_an_undone_token_took() -> None:
    """A ring's spare row lets one crop further than promised, until a token is written there."""
    x, more = tokens(1, 22), tokens(1, 4, seed=8)
    untouched, cache = (LAYERS[0].new_cache(1, 64, num_layers=2, max_crop=2) for _ in range(2))
    for one in (untouched, cache):
        model(x, one)
    model(more[:, :1], cache)
    cache.rollback()
    with pytest.raises(ValueError, match="length must take back at most max_crop = 2 tokens"):
        cache.crop(19)
    for one, length in ((untouched, 19), (cache, 20)):
        one.crop(length)
        expected = model(torch.cat((x[:, :length], more), dim=1), LAYERS[0].new_cache(1, 64, num_layers=2))
        torch.testing.assert_close(model(more, one), expected[:, length:], rtol=1e-12, atol=1e-12)
