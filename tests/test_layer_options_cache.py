"""Caches of layers with options: a text in chunks of any size is the full forward; what the caches hold is no more."""

from __future__ import annotations

import copy
import itertools
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from nsa_torch import cache as cache_module
from nsa_torch.cache_copy import copy_cache
from nsa_torch.rope import rope_tables
from test_cache import (
    DK,
    HIDDEN,
    LENGTH,
    NoHostSync,
    Ragged,
    assert_same,
    check_chunks,
    in_chunks,
    make,
    random_sizes,
    tokens,
)
from test_cache_failures import RAGGED, failures
from test_layer_options import ALL, OPTIONS, PAIRS

pytestmark = pytest.mark.usefixtures("one_thread", "no_grad")

# Those that change what a cache holds, or where it is read.
HELD: dict[str, dict[str, Any]] = {
    "conv": {"kv_conv": 4},
    "long conv": {"kv_conv": 11},
    "shared": {"shared_kv": True},
    "both": {"kv_conv": 3, "shared_kv": True},
    "all": ALL,
}


@pytest.mark.parametrize("options", [*OPTIONS.values(), *HELD.values(), {"kv_conv": 1}], ids=str)
def test_chunks_and_single_tokens_are_the_full_forward(options: dict[str, Any]) -> None:
    check_chunks(make(**options))


@pytest.mark.parametrize("options", PAIRS.values(), ids=PAIRS)
def test_pairs_of_options(options: dict[str, Any]) -> None:
    module, x = make(**options), tokens(2, 23)
    assert_same(in_chunks(module, x, [9, 1, 1, 5, 7], module.new_cache(2, 23)), module(x))


@pytest.mark.parametrize("options", HELD.values(), ids=HELD)
def test_lengths_around_the_taps(options: dict[str, Any]) -> None:
    module = make(**options)
    for length in (1, 2, 3, 4, 5, 12, 13):
        x = tokens(1, length)
        expected = module(x)
        for first in range(length + 1):
            cache = module.new_cache(1, length)
            assert_same(in_chunks(module, x, [first, length - first], cache), expected)


@pytest.mark.parametrize("max_length", [LENGTH, 50, None])
@pytest.mark.parametrize("options", HELD.values(), ids=HELD)
def test_sequences_of_different_lengths(options: dict[str, Any], max_length: int | None, monkeypatch: Any) -> None:
    """Packed chunks, some of them empty: each sequence has its own tokens before."""
    monkeypatch.setattr(cache_module, "_FIRST_CAPACITY", 4)
    module, rng = make(**options), random.Random(0)
    ragged, cache = Ragged([0, 1, 13, LENGTH, 8, 0]), module.new_cache(6, max_length)
    while not ragged.finished:
        counts = [rng.choice((0, 0, 1, 1, 2, 9)) for _ in ragged.parts]
        ragged.feed(module, cache, counts, max_seqlen=max(counts) if rng.random() < 0.5 else None)
    ragged.check(module)


@pytest.mark.parametrize("options", HELD.values(), ids=HELD)
def test_crop(options: dict[str, Any]) -> None:
    """Drafts of three tokens, of which some are taken back."""
    module, x, rng = make(**options), tokens(2, LENGTH), random.Random(1)
    expected, cache = module(x), module.new_cache(2, LENGTH + 3, max_crop=3)
    done = 0
    while done < LENGTH - 3:
        draft = torch.cat((x[:, done : done + 1], tokens(2, 3, seed=done + 5)), dim=1)
        kept = rng.randint(1, 3)
        draft[:, :kept] = x[:, done : done + kept]
        assert_same(module(draft, cache=cache)[:, :kept], expected[:, done : done + kept])
        done += kept
        cache.crop(done)
    with pytest.raises(ValueError, match="length must take back at most max_crop = 3 tokens"):
        cache.crop(done - 5)
    cache.crop(0)
    assert_same(module(x[:, :9], cache=cache), expected[:, :9])


def test_crop_knows_the_convolutions_ring() -> None:
    """Blocks of one token and a window of one need no ring: the convolution's does."""
    sizes = {"block_size": 1, "block_stride": 1, "select_size": 2, "window": 1}
    module, x = make(**sizes, kv_conv=4), tokens(1, 20)
    expected, cache = module(x), module.new_cache(1, 30, max_crop=2)
    module(x, cache=cache)
    with pytest.raises(ValueError, match="length must take back at most max_crop = 2 tokens"):
        cache.crop(15)
    cache.crop(18)
    assert_same(module(x[:, 18:], cache=cache), expected[:, 18:])


def test_crop_of_shared_keys_needs_no_window() -> None:
    """Every token is held: only the compression's ring limits."""
    module, x = make(shared_kv=True, block_size=4), tokens(1, LENGTH)
    cache = module.new_cache(1, LENGTH, max_crop=4)
    module(x, cache=cache)
    for length in (LENGTH - 4, LENGTH - 5):  # the second: 32 tokens are eight blocks, and nothing more
        cache.crop(length)
        assert_same(module(x[:, length:], cache=copy.deepcopy(cache)), module(x)[:, length:])


@pytest.mark.parametrize("options", HELD.values(), ids=HELD)
def test_reorder_copies_and_rollback(options: dict[str, Any]) -> None:
    module, x, index = make(**options), tokens(3, LENGTH), torch.tensor([2, 0, 0])
    cache = module.new_cache(3, LENGTH)
    in_chunks(module, x[:, :21], [14, 7], cache)
    fork = copy_cache(cache, index, max_crop=5)
    twin = copy.deepcopy(cache)
    cache.reorder(index)
    expected = module(torch.cat((x[index, :21], x[:, 21:]), dim=1))[:, 21:]
    for one in (cache, fork):
        module(tokens(3, 4, seed=7), cache=one)
        assert one.rollback()
        assert_same(in_chunks(module, x[:, 21:], [1, 9, 6], one), expected)
    assert_same(module(x[:, 21:], cache=twin), module(x)[:, 21:])
    fork.crop(LENGTH - 5)
    assert_same(module(x[:, -5:], cache=fork), expected[:, -5:])
    cache.reset()
    assert_same(in_chunks(module, x, [1, 36], cache), module(x))


@pytest.mark.parametrize(
    ("options", "size"), [("conv", 1), ("conv", 5), ("long conv", 30), ("shared", 1), ("shared", 5), ("all", None)]
)
def test_a_step_that_fails_anywhere(options: str, size: int | None) -> None:
    module = make(**HELD[options])
    start = module.new_cache(2, 64, max_crop=2)
    module(tokens(2, 14), cache=start)
    x, packing = (tokens(13, seed=7), RAGGED) if size is None else (tokens(2, size, seed=7), {})
    more = tokens(2, 4, seed=8)
    done = copy.deepcopy(start)
    expected, untouched = module(x, cache=done, **packing), module(more, cache=copy.deepcopy(start))
    continued = module(more, cache=done)
    for number, cache in enumerate(failures(start, lambda cache: module(x, cache=cache, **packing))):
        assert torch.equal(cache.lengths, start.lengths)
        if number % 4 == 1:
            assert torch.equal(module(more, cache=cache), untouched)
        elif number % 4 == 3:
            assert torch.equal(module(x, cache=cache, **packing), expected)
            assert torch.equal(module(more, cache=cache), continued)


@pytest.mark.parametrize("options", HELD.values(), ids=HELD)
def test_nothing_unwritten_is_read(options: dict[str, Any]) -> None:
    module, x, rng = make(**options), tokens(2, LENGTH), random.Random(0)
    cache = module.new_cache(2, 64)
    for buffer in vars(cache[0]).values():
        if isinstance(buffer, Tensor):
            buffer.fill_(1e30)
    assert_same(in_chunks(module, x, random_sizes(LENGTH, rng), cache), module(x))


@pytest.mark.parametrize("options", HELD.values(), ids=HELD)
def test_steps_are_in_place_and_without_host_sync(options: dict[str, Any]) -> None:
    module = make(**options)
    cache = module.new_cache(2, LENGTH)
    before = {name: t.data_ptr() for name, t in vars(cache[0]).items() if isinstance(t, Tensor)}
    with NoHostSync():
        module(tokens(14), cu_seqlens=torch.tensor([0, 3, 14], dtype=torch.int32), cache=cache, max_seqlen=11)
        module(tokens(2, 1), cache=cache)
    assert {name: t.data_ptr() for name, t in vars(cache[0]).items() if isinstance(t, Tensor)} == before


def test_tokens_that_are_padding_leave_no_trace() -> None:
    """Those after the last sequence of a batch of fixed size, as on a GPU."""
    module, x = make(**ALL), tokens(20)
    ends = torch.tensor([0, 6, 13], dtype=torch.int32)
    results = []
    for rows in (13, 20):
        cache = module.new_cache(2, 40)
        module(tokens(2, 5), cache=cache)
        layer = cache[0]
        step = layer.begin(ends, rows, 7) if rows == 13 else _begin_padded(layer, ends, rows)
        inputs = module._project(x[:rows], rope_tables(step.positions, 4, 1e4, x.dtype), ends, layer)
        layer.finish()
        results.append((inputs.k_slc[:13], inputs.v_cmp[:13], cache))
    for one, other in zip(*(result[:2] for result in results), strict=True):
        assert torch.equal(one, other)
    for (name, one), other in zip(results[0][2][0].buffers().items(), results[1][2][0].buffers().values(), strict=True):
        assert torch.equal(one, other), name


def _begin_padded(layer: Any, ends: Tensor, rows: int) -> Any:
    """A step whose tokens go on after the last sequence, which the host refuses on the CPU."""
    from nsa_torch.cache_step import plan_step

    step = layer.begin(ends, int(ends[-1]), 7)
    sequences = layer.sequences
    sequences.step = plan_step(sequences.geometry, sequences.lengths, ends, rows, 7)
    assert step.lengths.tolist() == sequences.step.lengths.tolist()
    return sequences.step


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_cache_of_another_dtype(dtype: torch.dtype) -> None:
    module, x = make(**ALL, dtype=dtype), tokens(2, LENGTH, dtype=dtype)
    other = torch.bfloat16 if dtype == torch.float32 else torch.float32
    out = in_chunks(module, x, [5] + [1] * (LENGTH - 5), module.new_cache(2, 64, dtype=other))
    expected = copy.deepcopy(module).double()(x.double())
    assert out.dtype == dtype
    assert 0 < (out - expected).norm() < 0.05 * expected.norm()


def test_tables_in_chunks() -> None:
    module, x = make(rope_theta=None, rope_interleaved=True, kv_conv=3), tokens(2, LENGTH)
    angles = torch.randn(LENGTH, DK // 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    freqs_cis = torch.polar(torch.ones_like(angles), angles)
    expected, cache = module(x, position_embeddings=freqs_cis), module.new_cache(2, LENGTH)
    outs = []
    for start, end in itertools.pairwise((0, 9, 10, 30, LENGTH)):
        outs.append(module(x[:, start:end], position_embeddings=freqs_cis[start:end], cache=cache))
    assert_same(torch.cat(outs, dim=1), expected)


def test_no_new_tokens() -> None:
    module, x = make(**ALL), tokens(2, 9)
    cache = module.new_cache(2, 64)
    module(x[:, :5], cache=cache)
    assert module(x[:, :0], cache=cache).shape == (2, 0, HIDDEN)
    assert_same(module(x[:, 5:], cache=cache), module(x)[:, 5:])
