"""What the ops must leave alone on a GPU: the host, graphs, streams, devices, the order of sums, and memory."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import nsa_torch
from helpers import OPS, Inputs, assert_close, differentiable, evaluate, make_inputs, make_packed_inputs
from shapes import Shape

pytestmark = pytest.mark.cuda

SHAPE = Shape("runtime", 700, 700, 8, 2, 64, 64, num_selected=6, window=130)
LENGTHS = [(300, 300), (0, 0), (1, 37), (363, 363)]

packed = pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
ops = pytest.mark.parametrize("op", [*OPS, "nsa_attention choosing"])


def make(op: str, packed: bool, dtype: torch.dtype, device: str = "cuda", **changes: Any) -> tuple[str, Inputs]:
    """The op's name, and inputs on the device; "choosing" lets nsa_attention choose its blocks."""
    name, _, choosing = op.partition(" ")
    shape = replace(SHAPE, **changes)
    exact = make_packed_inputs(name, shape, LENGTHS) if packed else make_inputs(name, shape)
    inputs = exact.to(device, dtype)
    if name == "select_blocks":
        inputs = inputs.replace(lse=exact.tensors["lse"].to(device, torch.float32))
    return name, inputs.replace(block_indices=None) if choosing else inputs


class Step:
    """Forward and, where there is one, backward of an op, on inputs that stay where they are."""

    def __init__(self, op: str, inputs: Inputs) -> None:
        self.function, self.inputs = getattr(nsa_torch, op), inputs
        names = differentiable(inputs) if op != "select_blocks" else []
        self.leaves = {name: inputs.tensors[name].detach().requires_grad_() for name in names}
        self.grads: list[Tensor] | None = None

    def __call__(self) -> list[Tensor]:
        """Outputs, then gradients."""
        result = self.function(**(self.inputs.tensors | self.leaves), **self.inputs.options)
        outputs = list(result) if isinstance(result, tuple) else [result]
        if not self.leaves:
            return outputs
        if self.grads is None:
            self.grads = [torch.randn(o.shape).to(o) for o in outputs]
        grads = torch.autograd.grad(outputs, list(self.leaves.values()), self.grads)
        return [*(o.detach() for o in outputs), *grads]


@contextmanager
def no_host_sync() -> Iterator[None]:
    """Raises where the host waits for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def captured(step: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of the step, and where its replays leave their results."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph, results


def assert_equal(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert len(actual) == len(expected)
    for index, (first, second) in enumerate(zip(actual, expected, strict=True)):
        assert torch.equal(first, second), f"result {index} differs by {(first.float() - second.float()).abs().max()}"


@ops
@packed
@dtypes
def test_no_host_sync(op: str, packed: bool, dtype: torch.dtype) -> None:
    step = Step(*make(op, packed, dtype))
    step()
    with no_host_sync():
        step()


@ops
@packed
@dtypes
def test_graph(op: str, packed: bool, dtype: torch.dtype, deterministic: None) -> None:
    """A replay on new numbers in the old places gives what a call on them gives."""
    step = Step(*make(op, packed, dtype))
    graph, results = captured(step)
    for leaf in step.leaves.values():
        with torch.no_grad():
            leaf.copy_(torch.randn(leaf.shape).to(leaf))
    graph.replay()
    torch.cuda.synchronize()
    replayed = [r.clone() for r in results]
    assert_equal(replayed, step())


@ops
@packed
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_deterministic(op: str, packed: bool, dtype: torch.dtype, deterministic: None) -> None:
    """Outputs and gradients are the same bits in every run."""
    step = Step(*make(op, packed, dtype))
    first = step()
    for _ in range(3):
        assert_equal(step(), first)


@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (192, 128), (256, 256)], ids=str)
def test_deterministic_at_every_tile(dims: tuple[int, int], deterministic: None) -> None:
    step = Step(*make("nsa_attention", False, torch.bfloat16, dim_k=dims[0], dim_v=dims[1]))
    first = step()
    assert_equal(step(), first)


@ops
@dtypes
def test_side_stream(op: str, dtype: torch.dtype, deterministic: None) -> None:
    """Everything runs on the current stream, after what was there before."""
    name, inputs = make(op, True, dtype)
    expected_step = Step(name, inputs)
    expected = expected_step()
    late = {n: torch.full_like(t, torch.nan) if t.is_floating_point() else t for n, t in inputs.tensors.items()}
    step = Step(name, Inputs(late, inputs.options))
    step.grads = expected_step.grads
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # some 50 ms
        with torch.no_grad():
            for n, tensor in inputs.tensors.items():
                (step.leaves.get(n, late[n])).copy_(tensor)
        results = step()
    stream.synchronize()
    assert_equal(results, expected)


@ops
def test_another_device_than_the_current_one(op: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    name, inputs = make(op, True, torch.bfloat16)
    moved = make(op, True, torch.bfloat16, "cuda:1")[1]
    expected = Step(name, inputs)
    step = Step(name, moved)
    outputs = expected()
    if expected.grads is not None:
        step.grads = [grad.to("cuda:1") for grad in expected.grads]
    results = step()
    assert all(result.device == torch.device("cuda:1") for result in results)
    assert_equal([result.to("cuda:0") for result in results], outputs)


@ops
@pytest.mark.parametrize("dtype", [torch.bfloat16], ids=str)
def test_memory_grows_as_the_length(op: str, dtype: torch.dtype) -> None:
    """Twice the tokens take twice the memory, beyond what does not depend on them."""
    peaks = []
    for length in (8192, 16384, 32768):
        name, _, choosing = op.partition(" ")
        step = Step(name, on_device(name, replace(SHAPE, seqlen_q=length, seqlen_k=length), dtype, bool(choosing)))
        step()
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del step
    growth = (peaks[2] - peaks[1]) / max(1, peaks[1] - peaks[0])
    assert growth < 2.3, peaks  # 2 when linear, 4 when square


def on_device(op: str, shape: Shape, dtype: torch.dtype, choosing: bool) -> Inputs:
    """Inputs like those of make_inputs, made on the GPU: lists are some blocks before the query."""
    small = make_inputs(op, replace(shape, seqlen_q=64, seqlen_k=64)).to("cuda", dtype)
    length = shape.seqlen_k
    tensors = {}
    for name, tensor in small.tensors.items():
        if tensor.dim() < 4 and name != "lse":
            tensors[name] = tensor
            continue
        size = list(tensor.shape)
        size[2 if name == "lse" else 1] = shape.blocks if name.endswith("cmp") else length
        tensors[name] = torch.randn(size, device="cuda").to(tensor.dtype)
    lists = torch.arange(shape.num_selected, device="cuda", dtype=torch.int32)
    lists = lists.expand(1, length, shape.heads_kv, -1).contiguous()
    options = small.options | ({"seqlen_k": length} if "seqlen_k" in small.options else {})
    if "block_indices" in options:
        options["block_indices"] = None if choosing else lists
    if "block_indices" in tensors:
        tensors["block_indices"] = lists
    if op == "select_blocks":
        tensors["lse"] = torch.full((1, shape.heads_q, length), 10.0, device="cuda")
    return Inputs(tensors, options)


def test_gradients_of_repeated_keys_agree_with_the_cpu() -> None:
    """A sum over thousands of queries for one key, in float32 on both."""
    inputs = make_inputs("window_attention", replace(SHAPE, seqlen_q=2000, seqlen_k=2000, window=2000))
    on_cpu = evaluate(nsa_torch.window_attention, inputs.to("cpu", torch.float32))
    on_gpu = evaluate(nsa_torch.window_attention, inputs.to("cuda", torch.float32))
    assert_close({name: t.cpu() for name, t in on_gpu.items()}, on_cpu, 1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_lists_in_another_order_change_nothing(dtype: torch.dtype) -> None:
    """The ops write ascending lists; what is read may be in any order (on CUDA nobody checks it)."""
    shape = replace(SHAPE, seqlen_q=400, seqlen_k=400, heads_q=16, heads_kv=2, dim_k=128, dim_v=128)
    inputs = make_inputs("selected_attention", shape).to("cuda", dtype)
    inputs.options["select_size"] = 64
    random = torch.Generator().manual_seed(0)
    lists = torch.stack([torch.randperm(7, generator=random)[:5] for _ in range(400 * 2)]).int().cuda()
    lists = lists.view(1, 400, 2, 5).expand(inputs.tensors["q"].shape[0], -1, -1, -1)
    results = []
    for given in (lists.sort(-1).values, lists):
        tensors = inputs.tensors | {"block_indices": given.contiguous()}
        results.append(evaluate(nsa_torch.selected_attention, Inputs(tensors, inputs.options)))
    for name, want in results[0].items():
        seen = want.isfinite()
        assert not want.isnan().any(), name
        assert torch.equal(results[1][name].isfinite(), seen), name
        difference = (results[1][name][seen] - want[seen]).float().norm()
        assert difference <= (3e-3 if dtype == torch.bfloat16 else 1e-6) * want[seen].float().norm(), name


def uneven_lists(lengths: list[int], heads_kv: int, count: int) -> Tensor:
    """Of packed sequences: all choose block 0 and their own, nobody every eighth, and few are popular of the rest."""
    random = torch.Generator().manual_seed(0)
    lists = []
    for length in filter(None, lengths):
        blocks = -(-length // 64)
        weights = torch.rand(blocks, generator=random).pow(4) + 1e-3
        weights[::8] = 0
        own = torch.arange(length) // 64
        seen = torch.arange(blocks) < own[:, None]
        chance = (weights * seen + 1e-9)[:, None].expand(-1, heads_kv, -1).reshape(-1, blocks)
        free = torch.multinomial(chance, min(count - 2, blocks), generator=random).view(length, heads_kv, -1)
        free = free.masked_fill((free >= own[:, None, None]) | (free % 8 == 0), -1)
        rows = torch.full((length, heads_kv, count), -1)
        rows[..., : free.size(-1)] = free
        rows[..., -1] = own[:, None]
        rows[..., -2] = torch.where(own > 0, 0, -1)[:, None]
        lists.append(rows)
    return torch.cat(lists).int()


@pytest.mark.parametrize("lengths", [[9001], [5003, 0, 1, 3997], [300] * 12], ids=str)
@pytest.mark.parametrize(
    ("group", "dims"), [(16, (128, 128)), (4, (64, 64)), (16, (192, 128)), (48, (128, 128))], ids=str
)
def test_uneven_lists(lengths: list[int], group: int, dims: tuple[int, int]) -> None:
    """Blocks that all, many or none choose, over several chunks of queries: as in float32, and the same bits again."""
    shape = Shape("uneven", 64, 64, 2 * group, 2, *dims, num_selected=10)
    inputs = make_packed_inputs("selected_attention", shape, [(length, length) for length in lengths])
    lists = uneven_lists(lengths, 2, 10).cuda()
    given = inputs.to("cuda", torch.bfloat16).replace(block_indices=lists)
    results = evaluate(nsa_torch.selected_attention, given)
    again = evaluate(nsa_torch.selected_attention, given)
    exact = evaluate(nsa_torch.selected_attention, given.to("cuda", torch.float32))
    for name, want in exact.items():
        assert torch.equal(results[name], again[name]), name
        difference = (results[name].float() - want.float()).norm()
        assert difference <= 1e-2 * want.float().norm(), name
