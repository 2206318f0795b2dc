"""A cache on a GPU: graphs replayed past the end, batches of fixed size with padding, steps that fail halfway."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from nsa_torch import NSAAttention, NSACache
from test_cache_failures import failures
from test_cuda_module import HIDDEN, LAYER, assert_all_near, assert_near, make, make_layer, tokens
from test_cuda_runtime import no_host_sync

pytestmark = [pytest.mark.cuda, pytest.mark.filterwarnings("ignore:cache layers")]

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def captured(module: NSAAttention, place: Tensor, cache: NSACache, **options: Any) -> tuple[Any, Tensor]:
    """The graph of a step of this cache, and its output. What runs once, runs before, with an emptied copy."""
    empty = copy.deepcopy(cache)
    empty.reset()
    module(place, cache=empty, **options)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = module(place, cache=cache, **options)
    return graph, out


def rows(cache: NSACache) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in cache[0].buffers().items()}


@torch.no_grad()
@DTYPES
@pytest.mark.parametrize("step", [1, 3])
@pytest.mark.parametrize("full", [0, 1])
def test_graph_replayed_past_the_end(full: int, step: int, dtype: torch.dtype) -> None:
    """A full sequence, be it the last one, keeps its rows; the other one goes on as if it were alone."""
    module, x = make_layer(dtype), tokens(2, 420, hidden=256).to(dtype)
    other, size = 1 - full, 420
    cache = module.new_cache(2, size)
    lengths = [0, 0]
    lengths[full], lengths[other] = size - 2, 300
    cu_seqlens = torch.tensor([0, lengths[0], sum(lengths)], dtype=torch.int32, device="cuda")
    prompts = torch.cat((x[0, : lengths[0]], x[1, : lengths[1]]))
    module(prompts, cu_seqlens=cu_seqlens, cache=cache, max_seqlen=max(lengths))
    place = torch.empty(2, step, 256, dtype=dtype, device="cuda")
    graph, out = captured(module, place, cache)
    kept = rows(cache)
    outs = []
    for position in range(300, size, step):
        place[other] = x[other, position : position + step]
        place[full] = x[full, -step:]
        graph.replay()
        outs.append(out[other].clone())
    assert_near(torch.cat(outs), module(x[other : other + 1])[0, 300:], 1e-4 if dtype == torch.float32 else 0.05)
    assert cache.lengths.tolist() == [size, size]
    assert cache.overflowed.tolist() == [full == 0, full == 1]
    for name, buffer in rows(cache).items():
        if name[2:] in ("slc", "cmp"):
            held = size - 2 if name[2:] == "slc" else kept[name].size(1) - 1
            assert torch.equal(buffer[full, :held], kept[name][full, :held]), name
    with pytest.raises(RuntimeError, match=rf"a CUDA graph was replayed past the end of sequences \[{full}\]"):
        module(place, cache=cache)
    cache.reset()
    assert_near(module(x, cache=cache), module(x), 1e-4 if dtype == torch.float32 else 0.05)


@torch.no_grad()
def test_eager_steps_between_replays() -> None:
    """They see what the replays did, with a host sync; without a capture there is none."""
    module, x = make_layer(), tokens(2, 420, hidden=256)
    cache = module.new_cache(2, 420)
    module(x[:, :300], cache=cache)
    with no_host_sync():
        module(x[:, 300:301], cache=cache)
        cache.rollback()
        module(x[:, 300:320], cache=cache)
        cache.rollback()
    place = torch.empty_like(x[:, :1])
    graph, out = captured(module, place, cache)
    outs = []
    for start in range(300, 420, 20):
        for position in range(start, start + 15):
            place.copy_(x[:, position : position + 1])
            graph.replay()
            outs.append(out.clone())
        outs.append(module(x[:, start + 15 : start + 20], cache=cache))
    assert_near(torch.cat(outs, dim=1), module(x)[:, 300:], 1e-4)
    with pytest.raises(ValueError, match="max_length must be at least 421"):
        module(place, cache=cache)
    assert not cache.overflowed.any()


@pytest.mark.parametrize("bias", [False, True])
@DTYPES
def test_padding_of_packed_tokens(dtype: torch.dtype, bias: bool) -> None:
    """NaN in it: zeros come out, and every gradient is that of the tokens alone."""
    torch.manual_seed(0)
    module, hidden, live, size = NSAAttention(**LAYER, bias=bias, dtype=dtype, device="cuda"), 256, 400, 512
    x = tokens(live, hidden=hidden).to(dtype).requires_grad_()
    wide = torch.full((size, hidden), torch.nan, dtype=dtype, device="cuda")
    wide[:live] = x.detach()
    wide.requires_grad_()
    cu_seqlens = torch.tensor([0, 150, 150, live], dtype=torch.int32, device="cuda")
    results = []
    for leaf in (x, wide):
        module.zero_grad()
        out = module(leaf, cu_seqlens=cu_seqlens)
        out.float().square().sum().backward()
        grads = {name: parameter.grad.clone() for name, parameter in module.named_parameters()}
        results.append({"out": out.detach(), "hidden_states": leaf.grad} | grads)
    expected, got = results
    for name in ("out", "hidden_states"):
        assert torch.equal(got[name][live:], torch.zeros_like(got[name][live:])), name
        got[name] = got[name][:live]
    assert_all_near(got, expected, 1e-4 if dtype == torch.float32 else 0.05)


@torch.no_grad()
def test_padding_of_chunks_in_a_graph() -> None:
    """One graph takes chunks of any number of tokens up to its size; NaN fills them up."""
    module, size = make(bias=True), 24
    sequences, outs, done = tokens(2, 37), [[], []], [0, 0]
    cache = module.new_cache(2, 37)
    place = torch.full((size, HIDDEN), torch.nan, device="cuda")
    cu_seqlens = torch.tensor([0, 4, 8], dtype=torch.int32, device="cuda")
    graph, out = captured(module, place, cache, cu_seqlens=cu_seqlens, max_seqlen=20)
    for counts in ([9, 8], [1, 1], [0, 20], [14, 7], [0, 0], [13, 1]):
        ends, live = [start + count for start, count in zip(done, counts, strict=True)], sum(counts)
        place.fill_(torch.nan)
        place[:live] = torch.cat([s[a:b] for s, a, b in zip(sequences, done, ends, strict=True)])
        cu_seqlens.copy_(torch.tensor([0, counts[0], live], dtype=torch.int32))
        graph.replay()
        assert torch.equal(out[live:], torch.zeros_like(out[live:]))
        for one, part in zip(outs, out[:live].split(counts), strict=True):
            one.append(part.clone())
        done = ends
    assert cache.lengths.tolist() == done == [37, 37]
    assert_near(torch.stack([torch.cat(o) for o in outs]), module(sequences), 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("size", [1, 9])
def test_a_step_that_fails_anywhere(size: int) -> None:
    """Called again it gives what it would have given; the same goes after rollback."""
    layers, x, more = [make(), make(bias=True)], tokens(2, size, seed=7), tokens(2, 4, seed=8)
    start = layers[0].new_cache(2, 64, num_layers=2)

    def model(x: Tensor, cache: NSACache) -> Tensor:
        return layers[1](x + layers[0](x, cache=cache[0]), cache=cache[1])

    model(tokens(2, 23), start)
    done = copy.deepcopy(start)
    expected, untouched = model(x, done), model(more, copy.deepcopy(start))
    assert done.rollback()
    assert_near(model(more, done), untouched, 1e-6)
    for number, cache in enumerate(failures(start, lambda cache: model(x, cache))):
        if number % 2:
            assert_near(model(more, cache), untouched, 1e-6)
        else:
            assert_near(model(x, cache), expected, 1e-6)
