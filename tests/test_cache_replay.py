"""Steps of a cache that are captured in a CUDA graph and replayed at any length, also past the end.

On the CPU a captured step is one whose host part sees no lengths: it runs as it does under a capture. The graphs
themselves are tried in test_cuda_cache.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nsa_torch import NSAAttention, NSACache, sequences
from nsa_torch.cache_step import CacheGeometry, plan_step
from test_cache import Ragged, assert_same, make, tokens

pytestmark = pytest.mark.usefixtures("one_thread", "no_grad")

Replay = Callable[[NSAAttention, Tensor, NSACache], Tensor]


@pytest.fixture
def replay(monkeypatch: pytest.MonkeyPatch) -> Replay:
    """A step as a replayed graph does it."""

    def step(module: NSAAttention, x: Tensor, cache: NSACache, **options: object) -> Tensor:
        with monkeypatch.context() as patch:
            patch.setattr(sequences, "_capturing", lambda device: True)
            return module(x, cache=cache, **options)

    return step


def rows(cache: NSACache) -> dict[str, Tensor]:
    """All that the cache holds for its sequences, without the scratch rows."""
    return {name: buffer.clone() for name, buffer in cache[0].buffers().items()}


@pytest.mark.parametrize("options", [{}, {"window": 100}, {"block_size": 4, "select_size": 12}], ids=str)
@pytest.mark.parametrize("max_crop", [0, 3])
def test_replays_past_the_end(options: dict[str, int], max_crop: int, replay: Replay) -> None:
    """The full sequence keeps its rows as they are, the other one goes on as if it were alone."""
    module, lengths = make(**options), [37, 20]
    ragged, cache = Ragged([37, 37]), module.new_cache(2, 37, max_crop=max_crop)
    ragged.feed(module, cache, lengths)
    full = {name: buffer[0] for name, buffer in rows(cache).items()}
    other, garbage = ragged.parts[1], tokens(17, seed=9)
    outs = []
    for position in range(20, 37):
        x = torch.stack((garbage[position - 20], other[position])).unsqueeze(1)
        outs.append(replay(module, x, cache)[1])
    assert_same(torch.cat(outs), module(other[None])[0, 20:])
    assert cache.lengths.tolist() == [37, 37]
    assert cache.overflowed.tolist() == [True, False]
    for name, buffer in rows(cache).items():
        assert torch.equal(buffer[0], full[name]), name


def test_both_sequences_past_the_end(replay: Replay) -> None:
    """The last one, too, whose next row would be past the buffer."""
    module, cache = make(), make().new_cache(2, 37)
    module(tokens(2, 37), cache=cache)
    before = rows(cache)
    for seed in range(5):
        assert replay(module, tokens(2, 1, seed=seed), cache).isfinite().all()
    for name, buffer in rows(cache).items():
        assert torch.equal(buffer, before[name]), name
    assert cache.lengths.tolist() == [37, 37] and cache.overflowed.all()


def test_what_fits_of_a_chunk_is_kept(replay: Replay) -> None:
    module, x = make(), tokens(1, 41)
    cache = module.new_cache(1, 37, max_crop=4)
    module(x[:, :34], cache=cache)
    replay(module, x[:, 34:], cache)
    assert cache.lengths.tolist() == [37] and cache.overflowed.tolist() == [True]
    cache.crop(35)
    assert not cache.overflowed.any()
    assert_same(module(x[:, 35:37], cache=cache), module(x[:, :37])[:, 35:])


def test_the_next_eager_step_raises(replay: Replay) -> None:
    module, x = make(), tokens(3, 37)
    cache = module.new_cache(3, 37)
    ragged = Ragged([37, 30, 36])
    ragged.feed(module, cache, [37, 30, 36])
    for seed in range(3):
        replay(module, tokens(3, 1, seed=seed), cache)
    lengths = cache.lengths.tolist()
    assert lengths == [37, 33, 37]
    for _ in range(2):
        message = r"a CUDA graph was replayed past the end of sequences \[0, 2\]: what did not fit into max_length 37"
        with pytest.raises(RuntimeError, match=message):
            module(tokens(3, 1), cache=cache)
        assert cache.lengths.tolist() == lengths
    cropped = copy.deepcopy(cache)
    cropped.crop(0)
    cache.reset()
    for empty in (cropped, cache):
        assert not empty.overflowed.any()
        assert_same(module(x[:, :20], cache=empty), module(x[:, :20]))


def test_eager_steps_see_what_replays_did(replay: Replay) -> None:
    """The host's bound of the lengths is not that of before the replays."""
    module, x = make(), tokens(2, 40)
    cache = module.new_cache(2, 37)
    module(x[:, :20], cache=cache)
    for position in range(20, 36):
        replay(module, x[:, position : position + 1], cache)
    assert cache.length_bound == cache.capacity == 37
    before = copy.deepcopy(cache)
    with pytest.raises(ValueError, match="max_length must be at least 38 to hold the cached and the new tokens"):
        module(x[:, 36:38], cache=cache)
    assert torch.equal(cache.lengths, before.lengths)
    assert_same(module(x[:, 36:37], cache=cache), module(x[:, :37])[:, 36:])


def test_captures_use_up_no_room(replay: Replay, monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs for several lengths are captured before any is replayed; a capture itself moves nothing on the host."""
    module, cache = make(), make().new_cache(1, 37)
    module(tokens(1, 30), cache=cache)
    state = cache._sequences
    for _ in range(30):
        replay(module, tokens(1, 1), cache)
        assert state.length_bound == 30
        assert not cache.rollback()
    with pytest.raises(ValueError, match="max_length must be at least 38"):
        replay(module, tokens(1, 38), cache)


def test_a_captured_cache_does_not_grow(replay: Replay) -> None:
    """The graph would go on writing to the buffers of before."""
    module, cache = make(), make().new_cache(1)
    module(tokens(1, 30), cache=cache)
    replay(module, tokens(1, 1), cache)
    buffers = cache[0].k_slc.data_ptr()
    with pytest.raises(ValueError, match="a cache that a CUDA graph has captured cannot grow"):
        module(tokens(1, cache.capacity), cache=cache)
    assert cache[0].k_slc.data_ptr() == buffers


def test_a_capture_that_failed_is_forgotten(replay: Replay) -> None:
    """Nothing of it was executed: there is nothing to undo, and what it planned has no values."""
    layers, x = [make(seed=i) for i in range(2)], tokens(2, 20)
    cache = layers[0].new_cache(2, 37, num_layers=2)
    for layer, layer_cache in zip(layers, cache, strict=True):
        layer(x[:, :9], cache=layer_cache)
    untouched = copy.deepcopy(cache)
    replay(layers[0], x[:, 9:10], cache[0])  # and no second layer
    state = cache._sequences
    state.step.before.fill_(-1)
    cache.crop(9)
    for layer, one, other in zip(layers, cache, untouched, strict=True):
        assert_same(layer(x[:, 9:], cache=one), layer(x[:, 9:], cache=other))
    assert cache.lengths.tolist() == [20, 20]


def test_undoing_is_not_captured(replay: Replay) -> None:
    """Every replay would undo it again."""
    layers, x = [make(seed=i) for i in range(2)], tokens(2, 20)
    cache = layers[0].new_cache(2, 37, num_layers=2)
    layers[0](x[:, :9], cache=cache[0])  # and no second layer
    with pytest.raises(RuntimeError, match="a step that failed must be undone before another is captured"):
        replay(layers[0], x[:, :1], cache[0])
    assert cache.rollback()
    replay(layers[0], x[:, :1], cache[0])
    replay(layers[1], x[:, :1], cache[1])
    assert cache.lengths.tolist() == [1, 1]


@pytest.mark.parametrize("lengths", [[37, 0], [36, 37], [35, 30], [37, 37], [0, 0]])
@pytest.mark.parametrize("counts", [[1, 1], [3, 5], [0, 37], [2, 0]])
def test_planned_rows_lie_within_their_sequences(lengths: list[int], counts: list[int]) -> None:
    """Every row that a step of any length writes or reads is its sequence's own, or the scratch row."""
    geometry = CacheGeometry(2, 37, 8, 4, 10, 8 + 2, 10 + 2)
    cu_seqlens = torch.tensor([0, counts[0], sum(counts)], dtype=torch.int32)
    before = torch.tensor(lengths, dtype=torch.int32)
    step = plan_step(geometry, before, cu_seqlens, sum(counts), max(counts))
    after = [min(a + n, 37) for a, n in zip(lengths, counts, strict=True)]
    assert step.lengths.tolist() == after
    assert step.asked.tolist() == [a + n for a, n in zip(lengths, counts, strict=True)]
    positions = [range(a, a + n) for a, n in zip(lengths, counts, strict=True)]
    slots = [b * 37 + p if p < 37 else 2 * 37 for b in range(2) for p in positions[b]]
    assert step.slots.tolist() == slots
    for ring, size in ((step.raw, 10), (step.window, 12)):
        kept = [p < 37 and p >= after[b] - size for b in range(2) for p in positions[b]]
        own = [b * size + p % size for b in range(2) for p in positions[b]]
        assert ring.write.tolist() == [row if keep else 2 * size for row, keep in zip(own, kept, strict=True)]
        assert (ring.used <= ring.cu_seqlens.diff()).all()
        assert (ring.used >= cu_seqlens.diff()).all()
    blocks = [max(n - 4, 0) // 4 for n in after]
    for row in step.block_slots.tolist():
        assert (
            row == geometry.block_rows
            or row - row // geometry.blocks * geometry.blocks < blocks[row // geometry.blocks]
        )
