"""NSAAttention and NSACache on a GPU: against the float64 reference, compiled, under autocast, and in CUDA graphs."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layer_reference import reference_forward
from nsa_torch import NSAAttention, NSACache
from test_cuda_runtime import captured, no_host_sync
from test_layer_options import ALL, OPTIONS
from test_module import VARIANTS, gradients

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("fresh_compiler")]

DEVICE = "cuda"
HIDDEN, LENGTH = 24, 37
SIZES = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "v_head_dim": 6}
BLOCKS = {"block_size": 8, "block_stride": 4, "select_size": 8, "num_selected": 4, "window": 10}
# A layer as one trains it: the paper's block sizes.
LAYER = {"hidden_size": 256, "num_heads": 8, "num_kv_heads": 2, "head_dim": 64, "num_selected": 6, "window": 128}


def make(dtype: torch.dtype = torch.float32, **options: Any) -> NSAAttention:
    torch.manual_seed(0)
    module = NSAAttention(HIDDEN, *SIZES.values(), **(BLOCKS | options), dtype=dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return module.to(DEVICE)


def make_layer(dtype: torch.dtype = torch.float32, **options: Any) -> NSAAttention:
    torch.manual_seed(0)
    return NSAAttention(**LAYER, **options, dtype=dtype).to(DEVICE)


WITH_OPTIONS = pytest.mark.parametrize("options", [{}, ALL], ids=["plain", "options"])


def tokens(*shape: int, hidden: int = HIDDEN, seed: int = 1) -> Tensor:
    return torch.randn(*shape, hidden, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def assert_near(got: Tensor, expected: Tensor, tolerance: float, name: str = "out") -> None:
    """By the norm of the difference."""
    error, size = (got.double() - expected.double()).norm().item(), expected.double().norm().item()
    assert error <= tolerance * (size + 1e-3), f"{name} is off by {error:.3g} of {size:.3g}"


def trained(module: nn.Module, x: Tensor, **options: Any) -> dict[str, Tensor]:
    """Output and all gradients of a step."""
    module.zero_grad()
    x = x.clone().requires_grad_()
    out = module(x, **options)
    out.float().square().sum().backward()
    grads = {name: parameter.grad for name, parameter in module.named_parameters()}
    return {"out": out.detach(), "hidden_states": x.grad} | {n: g.clone() for n, g in grads.items() if g is not None}


def assert_all_near(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Beside the largest of each; without RoPE the gradient of b2 of the keys is 0 (one vector added to all keys leaves
    the weights as they are), a sum that cancels, and it is held beside the largest of what is summed up like it.
    """
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        if name == "compress_k.b2":
            scale = max(tensor.abs().max(), expected["compress_v.b2"].abs().max())
            assert (got[name] - tensor).abs().max() <= tolerance * scale, name
        else:
            assert_near(got[name], tensor, tolerance, name)


@pytest.mark.parametrize("options", [*VARIANTS, *OPTIONS.values(), ALL], ids=str)
def test_output_and_gradients_are_the_references(options: dict[str, Any]) -> None:
    module = make(**options)
    exact = copy.deepcopy(module).to("cpu", torch.float64)
    for length in (1, 7, 8, 13, LENGTH):
        x = tokens(2, length).requires_grad_()
        wide = x.detach().to("cpu", torch.float64).requires_grad_()
        out, expected = module(x), reference_forward(exact, wide)
        assert_near(out.cpu(), expected, 1e-5)
        got, truth = gradients(module, x, out), gradients(exact, wide, expected)
        assert_all_near({name: g.cpu() for name, g in got.items()}, truth, 1e-4)


@WITH_OPTIONS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_layer_on_both_devices(dtype: torch.dtype, options: dict[str, Any]) -> None:
    """The paper's block sizes, 1,000 tokens: what the CPU's kernels give."""
    module, x = make_layer(dtype, **options), tokens(1, 1000, hidden=256).to(dtype)
    on_gpu = trained(module, x)
    on_cpu = trained(copy.deepcopy(module).cpu(), x.cpu())
    tolerance = 1e-3 if dtype == torch.float32 else 0.1  # a choice of blocks may differ by rounding
    assert_all_near({name: t.cpu() for name, t in on_gpu.items()}, on_cpu, tolerance)


@pytest.mark.parametrize("options", [{}, {"rope_theta": None}, ALL], ids=str)
def test_packed_sequences_are_separate_sequences(options: dict[str, Any]) -> None:
    module, lengths = make(**options), [0, 1, 13, 8, 0, LENGTH, 7, 0]
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=DEVICE)
    x = tokens(sum(lengths)).requires_grad_()
    out = module(x, cu_seqlens=cu_seqlens)
    expected = torch.cat([module(part[None])[0] for part in x.split(lengths)])
    assert_near(out, expected, 1e-5)
    assert_all_near(gradients(module, x, out), gradients(module, x, expected), 1e-4)


@WITH_OPTIONS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype, options: dict[str, Any]) -> None:
    module, x = make_layer(**options), tokens(2, 300, hidden=256)
    expected = trained(module, x)
    with torch.autocast(DEVICE, dtype):
        got = trained(module, x)
        assert module.choices(x).gates.dtype == torch.float32
    assert got["out"].dtype == dtype
    assert all(t.dtype == torch.float32 for name, t in got.items() if name != "out")
    assert_all_near(got, expected, 0.15)


@WITH_OPTIONS
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bf16_autocast"])
def test_compiled_training_step(autocast: bool, options: dict[str, Any]) -> None:
    """One graph, without breaks: forward and backward by inductor, for any length."""
    module = make_layer(**options)
    compiled = torch.compile(module, fullgraph=True)
    for length in (300, 517):
        x = tokens(1, length, hidden=256)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            got, expected = trained(compiled, x), trained(module, x)
        got = {name.removeprefix("_orig_mod."): tensor for name, tensor in got.items()}
        assert_all_near(got, expected, 0.1 if autocast else 1e-3)


@torch.no_grad()
@WITH_OPTIONS
@pytest.mark.parametrize("sizes", [[1] * LENGTH, [20] + [1] * 17, [LENGTH], [5, 8, 1, 1, 9, 13]], ids=str)
def test_chunks_and_single_tokens_are_the_full_forward(sizes: list[int], options: dict[str, Any]) -> None:
    module, x = make(**options), tokens(2, LENGTH)
    cache = module.new_cache(2, 64)
    outs = [module(part, cache=cache) for part in x.split(sizes, dim=1)]
    assert_near(torch.cat(outs, dim=1), module(x), 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_decoding_of_a_layer(dtype: torch.dtype) -> None:
    module, x = make_layer(dtype), tokens(3, 700, hidden=256).to(dtype)
    cache = module.new_cache(3, 1024)
    outs = [module(part, cache=cache) for part in x.split([680] + [1] * 20, dim=1)]
    assert_near(torch.cat(outs, dim=1), module(x), 1e-4 if dtype == torch.float32 else 0.05)


@torch.no_grad()
@WITH_OPTIONS
def test_ragged_chunks(options: dict[str, Any]) -> None:
    module, cache = make(**options), make(**options).new_cache(3, 64)
    sequences, outs, done = tokens(3, LENGTH), [[], [], []], [0, 0, 0]
    for counts in ([7, 0, 21], [1, 1, 1], [0, 1, 1], [20, 9, 3]):
        ends = [start + count for start, count in zip(done, counts, strict=True)]
        chunk = torch.cat([s[a:b] for s, a, b in zip(sequences, done, ends, strict=True)])
        cu_seqlens = torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32, device=DEVICE)
        results = module(chunk, cu_seqlens=cu_seqlens, cache=cache, max_seqlen=max(counts))
        for out, part in zip(outs, results.split(counts), strict=True):
            out.append(part)
        done = ends
    for sequence, out, end in zip(sequences, outs, done, strict=True):
        assert_near(torch.cat(out), module(sequence[None, :end])[0], 1e-5)


@torch.no_grad()
def test_compiled_decoding() -> None:
    module, x = make(), tokens(2, LENGTH)
    cache = module.new_cache(2, 64)
    step = torch.compile(lambda part, cache: module(part, cache=cache), fullgraph=True)
    outs = [step(part, cache) for part in x.split([9] + [1] * 28, dim=1)]
    assert_near(torch.cat(outs, dim=1), module(x), 1e-5)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@WITH_OPTIONS
def test_training_step_without_host_sync(packed: bool, options: dict[str, Any]) -> None:
    module = make_layer(**options)
    optimizer = torch.optim.AdamW(module.parameters(), fused=True)
    x = tokens(400, hidden=256) if packed else tokens(1, 400, hidden=256)
    packing = {"cu_seqlens": torch.tensor([0, 150, 400], dtype=torch.int32, device=DEVICE)} if packed else {}

    def step() -> None:
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = module(x, **packing).float().square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    step()
    with no_host_sync():
        step()


@torch.no_grad()
def test_decode_step_without_host_sync() -> None:
    module, x = make_layer(torch.bfloat16), tokens(2, 302, hidden=256).bfloat16()
    cache = module.new_cache(2, 512)
    for part in x.split([300, 1, 1], dim=1)[:2]:
        module(part, cache=cache)
    with no_host_sync():
        module(x[:, 301:], cache=cache)


def test_graph_of_a_training_step() -> None:
    """Replays on new tokens give the gradients that eager execution gives."""
    module, x = make_layer(), tokens(2, 300, hidden=256)
    parameters = list(module.parameters())
    place = torch.empty_like(x)

    def step() -> list[Tensor]:
        with torch.autocast(DEVICE, torch.bfloat16, cache_enabled=False):
            loss = module(place).float().square().mean()
        return [loss.detach(), *torch.autograd.grad(loss, parameters)]

    place.copy_(tokens(2, 300, hidden=256, seed=2))
    graph, results = captured(step)
    place.copy_(x)
    graph.replay()
    replayed = [result.clone() for result in results]
    for got, expected in zip(replayed, step(), strict=True):
        assert_near(got, expected, 1e-2)
    assert replayed[0].isfinite()


@torch.no_grad()
@WITH_OPTIONS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_graph_of_a_decode_step(dtype: torch.dtype, options: dict[str, Any]) -> None:
    """One captured step, replayed for every further token, is eager decoding and the full forward."""
    module, x = make_layer(dtype, **options), tokens(2, 420, hidden=256).to(dtype)
    expected = module(x)[:, 300:]

    def prefilled() -> NSACache:
        cache = module.new_cache(2, 512)
        module(x[:, :300], cache=cache)
        return cache

    module(x[:, 300:301], cache=prefilled())  # what runs once happens before the capture
    torch.cuda.synchronize()
    cache, place = prefilled(), torch.empty_like(x[:, :1])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = module(place, cache=cache)
    outs = []
    for position in range(300, 420):
        place.copy_(x[:, position : position + 1])
        graph.replay()
        outs.append(out.clone())
    assert_near(torch.cat(outs, dim=1), expected, 1e-4 if dtype == torch.float32 else 0.05)
    assert cache.lengths.tolist() == [420, 420]


def test_two_training_steps_are_equal_to_the_bit(deterministic: None) -> None:
    module, x = make_layer(torch.bfloat16), tokens(2, 300, hidden=256).bfloat16()
    first, second = trained(module, x), trained(module, x)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
