"""Decoding through NSACache gives what the full forward gives, whatever the chunks."""

from __future__ import annotations

import copy
import itertools
import random

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nsa_torch import NSAAttention, NSACache
from nsa_torch import cache as cache_module
from nsa_torch.rope import rope_tables

pytestmark = pytest.mark.usefixtures("one_thread", "no_grad")

HIDDEN, HEADS, KV_HEADS, DK, DV = 24, 4, 2, 8, 6
BLOCKS = {"block_size": 8, "block_stride": 4, "select_size": 8, "num_selected": 4, "window": 10}
LENGTH = 37


def make(*, seed: int = 0, dtype: torch.dtype = torch.float64, **options) -> NSAAttention:
    torch.manual_seed(seed)
    module = NSAAttention(HIDDEN, HEADS, KV_HEADS, DK, DV, **(BLOCKS | options), dtype=dtype)
    for parameter in module.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return module


def tokens(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)


def in_chunks(module: NSAAttention, x: Tensor, sizes: list[int], cache: NSACache) -> Tensor:
    assert sum(sizes) == x.size(1)
    return torch.cat([module(part, cache=cache) for part in x.split(sizes, dim=1)], dim=1)


def random_sizes(total: int, rng: random.Random) -> list[int]:
    sizes = []
    while total > 0:
        sizes.append(min(total, rng.choice((1, 1, 2, 3, 8, 13))))
        total -= sizes[-1]
    return sizes


def assert_same(got: Tensor, expected: Tensor) -> None:
    tolerance = 1e-12 if expected.dtype == torch.float64 else 1e-5
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


VARIANTS = [
    {},
    {"per_head_compression": True, "bias": True},
    {"compression": "linear", "scale": 0.2},
    {"compression": "mean"},
    {"rope_theta": None},
    {"num_initial": 0, "num_local": 1, "num_selected": 1},
    {"block_size": 4, "block_stride": 4, "select_size": 12, "window": 1},
    {"block_size": 8, "block_stride": 2, "select_size": 2, "num_selected": 9, "num_initial": 2},
    {"window": 100},
]


def check_chunks(module):
    """Any cut into chunks gives what the whole at once gives."""
    x, rng = tokens(2, LENGTH), random.Random(0)
    expected = module(x)
    for sizes, max_length, max_crop in (
        ([1] * LENGTH, LENGTH, 0),
        ([20] + [1] * (LENGTH - 20), 100, 3),
        ([LENGTH], 100, 0),
        ([2, 1, 2, 3, 1, 28], 100, 0),
        (random_sizes(LENGTH, rng), LENGTH, 0),
        (random_sizes(LENGTH, rng), None, 1),
    ):
        cache = module.new_cache(2, max_length, max_crop=max_crop)
        assert_same(in_chunks(module, x, sizes, cache), expected)
        assert cache.lengths.tolist() == [LENGTH] * 2
        assert cache.length_bound == LENGTH


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_chunks_and_single_tokens_are_the_full_forward(options):
    check_chunks(make(**options))


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 11, 12, 13, 31])
def test_lengths_around_the_block_sizes(length):
    module, x = make(), tokens(1, length)
    expected = module(x)
    for first in range(length + 1):
        cache = module.new_cache(1, length)
        assert_same(in_chunks(module, x, [first, length - first], cache), expected)


def test_float32():
    module, x = make(dtype=torch.float32), tokens(2, LENGTH, dtype=torch.float32)
    assert_same(in_chunks(module, x, [5] + [1] * (LENGTH - 5), module.new_cache(2, 64)), module(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    module = make(dtype=dtype)
    x = tokens(2, LENGTH).to(dtype)
    cache = module.new_cache(2, 64)
    assert cache.dtype == dtype
    out, full = in_chunks(module, x, [5] + [1] * (LENGTH - 5), cache), module(x)
    exact = copy.deepcopy(module).double()(x.double())
    assert out.dtype == dtype
    assert (out.double() - exact).norm() < 2 * (full.double() - exact).norm() + 0.01 * exact.norm()


def test_cache_of_another_dtype_computes_in_it():
    module, x = make(dtype=torch.float32), tokens(2, LENGTH, dtype=torch.float32)
    cache = module.new_cache(2, 64, dtype=torch.bfloat16)
    out, expected = in_chunks(module, x, [5] + [1] * (LENGTH - 5), cache), module(x)
    assert out.dtype == torch.float32
    assert 0 < (out - expected).norm() < 0.05 * expected.norm()


def test_autocast():
    module, x = make(dtype=torch.float32), tokens(2, LENGTH, dtype=torch.float32)
    expected = module(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        caches = [module.new_cache(2, 64), module.new_cache(2, 64, dtype=torch.float32)]
        outs = [in_chunks(module, x, [5] + [1] * (LENGTH - 5), cache) for cache in caches]
    assert [cache.dtype for cache in caches] == [torch.bfloat16, torch.float32]
    for out in outs:
        assert out.dtype == torch.bfloat16
        assert (out - expected).norm() < 0.05 * expected.norm()


class Ragged:
    """Sequences of different lengths, fed to a cache in chunks of different lengths."""

    def __init__(self, lengths: list[int], seed: int = 0):
        self.parts = tokens(sum(lengths), seed=seed + 1).split(lengths)
        self.done = [0] * len(lengths)
        self.outs: list[list[Tensor]] = [[] for _ in lengths]

    def feed(self, module: NSAAttention, cache: NSACache, counts: list[int], **options) -> None:
        spans = [(a, min(a + n, len(p))) for a, n, p in zip(self.done, counts, self.parts, strict=True)]
        chunk = torch.cat([part[a:b] for part, (a, b) in zip(self.parts, spans, strict=True)])
        counts = [b - a for a, b in spans]
        cu_seqlens = torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32)
        out = module(chunk, cu_seqlens=cu_seqlens, cache=cache, **options)
        for outs, part in zip(self.outs, out.split(counts), strict=True):
            outs.append(part)
        self.done = [b for _, b in spans]

    @property
    def finished(self) -> bool:
        return self.done == [len(part) for part in self.parts]

    def check(self, module: NSAAttention) -> None:
        for part, outs, done in zip(self.parts, self.outs, self.done, strict=True):
            assert_same(torch.cat(outs), module(part[None, :done])[0])


@pytest.mark.parametrize("max_length", [LENGTH, 50, None])
@pytest.mark.parametrize("rope_theta", [1e4, None])
def test_sequences_of_different_lengths(max_length, rope_theta, monkeypatch):
    monkeypatch.setattr(cache_module, "_FIRST_CAPACITY", 4)
    module, rng = make(rope_theta=rope_theta), random.Random(0)
    ragged, cache = Ragged([0, 1, 13, LENGTH, 8, 0]), module.new_cache(6, max_length)
    while not ragged.finished:
        counts = [rng.choice((0, 0, 1, 1, 2, 9)) for _ in ragged.parts]
        ragged.feed(module, cache, counts, max_seqlen=max(counts) if rng.random() < 0.5 else None)
    ragged.check(module)
    assert cache.lengths.tolist() == [0, 1, 13, LENGTH, 8, 0]
    assert cache.length_bound >= LENGTH


def test_prompts_of_different_lengths_then_single_tokens():
    """What generation does with padded prompts: packed prompts, then one token for each."""
    module, x = make(), tokens(3, 20)
    prompts = [3, 11, 8]
    ragged, cache = Ragged(prompts), module.new_cache(3, 40)
    ragged.feed(module, cache, prompts)
    outs = torch.cat([module(x[:, i : i + 1], cache=cache) for i in range(20)], dim=1)
    for prompt, more, out in zip(ragged.parts, x, outs, strict=True):
        expected = module(torch.cat((prompt, more))[None])[0, -20:]
        assert_same(out, expected)


def test_single_tokens_for_some_sequences_only():
    module = make()
    ragged, cache = Ragged([30, 25, 28]), module.new_cache(3, 30)
    ragged.feed(module, cache, [9, 2, 30])
    while not ragged.finished:
        counts = [int(n + len(outs) % 2) for n, outs in zip((1, 0, 1), ragged.outs, strict=True)]
        ragged.feed(module, cache, [min(n, 1) for n in counts], max_seqlen=1)
    ragged.check(module)


def test_leading_dimension_of_packed_tokens():
    module, x = make(), tokens(1, 9)
    cu_seqlens = torch.tensor([0, 4, 9], dtype=torch.int32)
    out = module(x, cu_seqlens=cu_seqlens, cache=module.new_cache(2, 9))
    assert_same(out, module(x, cu_seqlens=cu_seqlens))


@pytest.mark.parametrize("batched", [0, 1, 2])
def test_position_embeddings(batched):
    module, x = make(), tokens(2, LENGTH)
    cos, sin = rope_tables(torch.arange(LENGTH), DK, 500.0, x.dtype)
    if batched:
        cos, sin = (table.expand(batched, -1, -1) for table in (cos, sin))
    expected, cache = module(x, position_embeddings=(cos, sin)), module.new_cache(2, LENGTH)
    outs = []
    for span in (slice(0, 9), slice(9, 10), slice(10, 30), slice(30, 37)):
        tables = (cos[..., span, :], sin[..., span, :])
        outs.append(module(x[:, span], position_embeddings=tables, cache=cache))
    assert_same(torch.cat(outs, dim=1), expected)


def test_position_embeddings_of_packed_chunks():
    module = make()
    ragged, cache = Ragged([20, 30]), module.new_cache(2, 40)
    for counts in ([9, 14], [1, 0], [10, 16]):
        positions = [torch.arange(a, a + n) for a, n in zip(ragged.done, counts, strict=True)]
        tables = rope_tables(torch.cat(positions), DK, module.rope_theta, torch.float64)
        ragged.feed(module, cache, counts, position_embeddings=tables)
    assert ragged.finished
    ragged.check(module)


def test_layers_share_a_step():
    layers, x = [make(seed=i) for i in range(3)], tokens(2, LENGTH)
    cache = layers[0].new_cache(2, LENGTH, num_layers=3)
    assert len(cache) == len(list(cache)) == 3

    def model(x: Tensor, caches) -> Tensor:
        for layer, layer_cache in zip(layers, caches, strict=True):
            x = x + layer(x, cache=layer_cache)
        return x

    expected = model(x, [None] * 3)
    outs = [model(part, cache) for part in x.split([14, 1, 1, 20, 1], dim=1)]
    assert_same(torch.cat(outs, dim=1), expected)
    assert cache.lengths.tolist() == [LENGTH, LENGTH]


def test_layers_must_agree_on_a_step():
    first, second = make(), make(seed=1)
    x, cache = tokens(2, 9), first.new_cache(2, 64, num_layers=2)
    first(x, cache=cache[0])
    with pytest.raises(ValueError, match="hidden_states must have the tokens that the other layers"):
        second(x[:, :8], cache=cache[1])
    with pytest.warns(UserWarning, match=r"cache layers .1. have not finished the previous step, which is undone"):
        first(x, cache=cache[0])
    other = torch.tensor([0, 8, 18], dtype=torch.int32)
    with pytest.raises(ValueError, match="hidden_states must have the tokens that the other layers"):
        second(x.flatten(0, 1), cu_seqlens=other, max_seqlen=9, cache=cache[1])
    assert cache.lengths.tolist() == [0, 0] and cache.length_bound == 0
    cache.reset()
    assert_same(first(x, cache=cache[0]), first(x))
    with pytest.raises(ValueError, match=r"cache must be of one layer .give cache.i.., got 2"):
        first(x, cache=cache)


def test_growing_buffers(monkeypatch):
    monkeypatch.setattr(cache_module, "_FIRST_CAPACITY", 3)
    module, x = make(), tokens(2, 61)
    expected = module(x)
    for sizes in ([1] * 61, [61], [30, 31]):
        cache = module.new_cache(2)
        assert cache.capacity == 3
        assert_same(in_chunks(module, x, sizes, cache), expected)
        assert cache.capacity >= 61


def test_growing_buffers_of_several_layers(monkeypatch):
    monkeypatch.setattr(cache_module, "_FIRST_CAPACITY", 8)
    layers, x = [make(seed=i) for i in range(2)], tokens(1, 30)
    cache = layers[0].new_cache(1, num_layers=2)
    for part, start in zip(x.split(5, dim=1), range(0, 30, 5), strict=True):
        for layer, layer_cache in zip(layers, cache, strict=True):
            out = layer(part, cache=layer_cache)
            assert_same(out, layer(x[:, : start + 5])[:, start:])


def test_overflow_is_refused_before_anything_is_written():
    module, x = make(), tokens(2, LENGTH)
    expected, cache = module(x), module.new_cache(2, LENGTH)
    first = module(x[:, :30], cache=cache)
    message = "max_length must be at least 38 to hold the cached and the new tokens, got 37"
    with pytest.raises(ValueError, match=message):
        module(tokens(2, 8), cache=cache)
    rest = module(x[:, 30:], cache=cache)
    assert_same(torch.cat((first, rest), dim=1), expected)
    with pytest.raises(ValueError, match="max_length must be at least 38"):
        module(x[:, :1], cache=cache)


def test_bound_is_tightened_before_tokens_are_refused():
    module = make()
    ragged, cache = Ragged([20, 20]), module.new_cache(2, 20)
    for counts in ([15, 0], [0, 15], [5, 5]):
        ragged.feed(module, cache, counts)
    assert ragged.finished
    ragged.check(module)
    assert cache.length_bound == 20


def test_reset():
    module, x = make(), tokens(2, LENGTH)
    cache = module.new_cache(2, LENGTH)
    in_chunks(module, tokens(2, LENGTH, seed=9), [20, 16, 1], cache)
    cache.reset()
    assert cache.lengths.tolist() == [0, 0] and cache.length_bound == 0
    assert_same(in_chunks(module, x, [3, 30, 1, 1, 1, 1], cache), module(x))


def test_reorder():
    module, x = make(), tokens(3, LENGTH)
    index, cache = torch.tensor([2, 0, 0]), module.new_cache(3, LENGTH)
    in_chunks(module, x[:, :21], [14, 7], cache)
    cache.reorder(index)
    mixed = torch.cat((x[index, :21], x[:, 21:]), dim=1)
    rest = in_chunks(module, mixed[:, 21:], [1, 2, 13], cache)
    assert_same(rest, module(mixed)[:, 21:])
    with pytest.raises(ValueError, match=r"index must be .batch_size,. = .3,., got .2,."):
        cache.reorder(index[:2])


@pytest.mark.parametrize("max_crop", [1, 5])
def test_crop(max_crop):
    module, x, rng = make(), tokens(2, LENGTH), random.Random(0)
    expected, cache = module(x), module.new_cache(2, LENGTH, max_crop=max_crop)
    done = 0
    while done < LENGTH:
        size = min(rng.choice((1, 3, 8)), LENGTH - done)
        wrong = min(rng.randint(0, max_crop), LENGTH - done - size)
        guess = torch.cat((x[:, done : done + size], tokens(2, wrong, seed=done)), dim=1)
        out = module(guess, cache=cache)[:, :size]
        assert_same(out, expected[:, done : done + size])
        done += size
        cache.crop(done)
        assert cache.lengths.tolist() == [done, done] and cache.length_bound == done


def test_crop_to_different_lengths():
    module, x = make(), tokens(3, LENGTH)
    cache = module.new_cache(3, LENGTH, max_crop=4)
    module(x[:, :30], cache=cache)
    kept = [26, 30, 0]
    cache.crop(torch.tensor(kept))
    assert cache.lengths.tolist() == kept
    new = tokens(3, 7, seed=5)
    out = in_chunks(module, new, [2, 1, 4], cache)
    for b, length in enumerate(kept):
        expected = module(torch.cat((x[b, :length], new[b]))[None])[0, length:]
        assert_same(out[b], expected)


def test_crop_refuses_what_the_rings_have_lost():
    module, x = make(), tokens(1, LENGTH)
    cache = module.new_cache(1, LENGTH, max_crop=2)
    module(x[:, :30], cache=cache)
    with pytest.raises(ValueError, match="length must take back at most max_crop = 2 tokens"):
        cache.crop(20)
    with pytest.raises(ValueError, match="length must be at least 0, got -1"):
        cache.crop(-1)
    cache.crop(28)
    with pytest.raises(ValueError, match="length must take back at most max_crop = 2 tokens"):
        cache.crop(26)  # two more: the ring was written up to 30
    assert cache.lengths.tolist() == [28]
    assert_same(module(x[:, 28:], cache=cache), module(x)[:, 28:])
    cache.crop(0)
    assert_same(module(x[:, :9], cache=cache), module(x[:, :9]))


def test_crop_within_the_rings():
    module, x = make(window=64), tokens(2, LENGTH)
    cache = module.new_cache(2, LENGTH)
    module(x[:, :7], cache=cache)
    cache.crop(2)
    assert_same(in_chunks(module, x[:, 2:], [4, 31], cache), module(x)[:, 2:])


def test_nothing_unwritten_is_read():
    module, x, rng = make(), tokens(2, LENGTH), random.Random(0)
    expected, cache = module(x), module.new_cache(2, 64)
    for name in ("k_slc", "v_slc", "k_cmp", "v_cmp", "k_raw", "v_raw", "k_win", "v_win"):
        getattr(cache[0], name).fill_(1e30)
    assert_same(in_chunks(module, x, random_sizes(LENGTH, rng), cache), expected)


class NoHostSync(TorchDispatchMode):
    """Fails on ops whose result depends on values read back from the device."""

    FORBIDDEN = (
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "unique",
        "repeat_interleave.Tensor",
    )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not any(name in str(func) for name in self.FORBIDDEN), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("ragged", [False, True])
def test_step_is_in_place_and_without_host_sync(ragged):
    module = make()
    cache = module.new_cache(2, LENGTH)
    layer = cache[0]
    names = [name for name, value in vars(layer).items() if isinstance(value, Tensor)]
    assert len(names) == 8
    before = {name: getattr(layer, name).data_ptr() for name in names}
    lengths = cache.lengths
    with NoHostSync():
        if ragged:
            cu_seqlens = torch.tensor([0, 3, 14], dtype=torch.int32)
            module(tokens(14), cu_seqlens=cu_seqlens, cache=cache, max_seqlen=11)
        else:
            module(tokens(2, 14), cache=cache)
        module(tokens(2, 1), cache=cache)
    assert {name: getattr(layer, name).data_ptr() for name in names} == before
    assert cache.lengths is lengths


def test_inference_mode():
    module, x = make(), tokens(2, LENGTH)
    expected = module(x)
    with torch.inference_mode():
        cache = module.new_cache(2, LENGTH)
        first = module(x[:, :9], cache=cache)
    second = module(x[:, 9:20], cache=cache)
    with torch.inference_mode():
        third = module(x[:, 20:], cache=cache)
    assert_same(torch.cat((first, second, third), dim=1), expected)


def test_copy_goes_its_own_way():
    module, x = make(), tokens(2, LENGTH)
    cache = module.new_cache(2, LENGTH)
    module(x[:, :20], cache=cache)
    other = copy.deepcopy(cache)
    assert_same(module(tokens(2, 9, seed=3), cache=cache)[:, :0], x[:, :0])
    assert_same(module(x[:, 20:], cache=other), module(x)[:, 20:])


def test_freed_without_the_garbage_collector():
    import gc
    import weakref

    gc.disable()
    try:
        cache = make().new_cache(1, 64, num_layers=2)
        buffer = weakref.ref(cache[0].k_slc)
        del cache
        assert buffer() is None
    finally:
        gc.enable()


def test_memory_is_bounded():
    cache = NSACache(2, 1024, num_kv_heads=2, head_dim=64, dtype=torch.float32)
    per_token = 2 * 64 * 4 * 2  # heads, channels, bytes, k and v
    assert cache.nbytes == 2 * per_token * (1024 + (1024 // 16 - 1) + 32 + 512)
    assert "max_length=1024" in repr(cache) and f"{cache.nbytes / 2**20:.1f} MiB" in repr(cache)


def test_gradients_are_refused():
    module, x = make(), tokens(2, 9)
    cache = module.new_cache(2, 64)
    with torch.enable_grad(), pytest.raises(RuntimeError, match="a cache records no gradients"):
        module(x, cache=cache)
    assert cache.lengths.tolist() == [0, 0]
    frozen = make().requires_grad_(False)
    with torch.enable_grad():
        assert not frozen(x, cache=cache).requires_grad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"max_length": 0}, "max_length must be at least 1, got 0"),
        ({"num_kv_heads": 0}, "num_kv_heads must be at least 1, got 0"),
        ({"head_dim": 0}, "head_dim must be at least 1, got 0"),
        ({"v_head_dim": 0}, "v_head_dim must be at least 1, got 0"),
        ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
        ({"block_size": 0}, "block_size must be at least 1, got 0"),
        ({"block_stride": 0}, "block_stride must be at least 1, got 0"),
        ({"block_size": 24}, "block_stride must divide block_size, 24, got 16"),
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"max_crop": -1}, "max_crop must be at least 0, got -1"),
        ({"max_length": 2**30}, r"max_length \* batch_size must be below 2\^31"),
    ],
    ids=str,
)
def test_constructor_names_the_bad_argument(options, message):
    sizes = {"batch_size": 2, "max_length": 64, "num_kv_heads": 2, "head_dim": 8}
    with pytest.raises(ValueError, match=message):
        NSACache(**(sizes | options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 16}, "cache must have block_size 8, got 16"),
        ({"block_stride": 2}, "cache must have block_stride 4, got 2"),
        ({"window": 11}, "cache must have window 10, got 11"),
        ({"head_dim": 10}, r"cache must have .* \(2, 8, 6\), got \(2, 10, 6\)"),
    ],
    ids=str,
)
def test_cache_must_fit_the_layer(options, message):
    sizes = {"num_kv_heads": 2, "head_dim": 8, "v_head_dim": 6, "block_size": 8, "block_stride": 4}
    cache = NSACache(2, 64, **(sizes | {"window": 10} | options), dtype=torch.float64)
    with pytest.raises(ValueError, match=message):
        make()(tokens(2, 9), cache=cache)


def test_chunks_must_fit_the_cache():
    module = make()
    cache = module.new_cache(2, 64)
    with pytest.raises(ValueError, match="hidden_states must have the cache's batch 2, got 3"):
        module(tokens(3, 5), cache=cache)
    flat = tokens(9)
    for bounds, message in (
        ([0, 9], r"cu_seqlens must be \(batch_size \+ 1,\) = \(3,\), got \(2,\)"),
        ([0, 4, 8], r"cu_seqlens must rise from 0 to the 9 tokens, got \[0, 4, 8\]"),
        ([1, 4, 9], "cu_seqlens must rise from 0 to the 9 tokens"),
        ([0, 10, 9], "cu_seqlens must rise from 0 to the 9 tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            module(flat, cu_seqlens=torch.tensor(bounds, dtype=torch.int32), cache=cache)
    cu_seqlens = torch.tensor([0, 4, 9], dtype=torch.int32)
    with pytest.raises(ValueError, match="max_seqlen must be at least the longest chunk, 5, got 4"):
        module(flat, cu_seqlens=cu_seqlens, max_seqlen=4, cache=cache)
    assert cache.lengths.tolist() == [0, 0]
    assert_same(module(flat, cu_seqlens=cu_seqlens, cache=cache), module(flat, cu_seqlens=cu_seqlens))


def test_no_new_tokens():
    module, x = make(), tokens(2, 9)
    cache = module.new_cache(2, 64)
    module(x[:, :5], cache=cache)
    assert module(x[:, :0], cache=cache).shape == (2, 0, HIDDEN)
    assert_same(module(x[:, 5:], cache=cache), module(x)[:, 5:])
