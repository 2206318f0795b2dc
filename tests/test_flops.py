"""Torch's FlopCounterMode counts every op as the list of shapes does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import nsa_torch
from helpers import Inputs, cumulative, differentiable, make_inputs, make_packed_inputs
from shapes import ADVERSARIAL, CPU, GPU, MODELS, OPS, TILED, Shape, cost

COUNTED = (
    "compress",
    "compressed_attention",
    "select_blocks",
    "selected_attention",
    "window_attention",
    "nsa_attention",
)
SHAPES = {shape.name: shape for shape in (*ADVERSARIAL, *TILED)}

pytestmark = pytest.mark.usefixtures("one_thread")


def counted(function: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    counts = counter.get_flop_counts()["Global"]
    return sum(flops for op, flops in counts.items() if str(op).startswith("nsa."))


def inputs_of(op: str, shape: Shape) -> Inputs:
    """As make_inputs, with the compression that the list of shapes counts: as wide as a head."""
    inputs = make_inputs(op, shape)
    inputs.options.pop("block_indices", None)
    if op == "compress":
        d, width = shape.dim_k, shape.block_size * shape.dim_k
        sizes = {"pe": (shape.block_size, d), "w1": (d, width), "b1": (d,), "w2": (d, d), "b2": (d,)}
        weights = {name: torch.randn(size, dtype=torch.float64) for name, size in sizes.items()}
        inputs = Inputs({"x": inputs.tensors["x"]} | weights, inputs.options)
    return inputs


def both_ways(op: str, inputs: Inputs) -> tuple[int, int]:
    """FLOPs of forward and backward."""
    leaves = inputs.tensors | {name: inputs.tensors[name].requires_grad_() for name in differentiable(inputs)}
    results: list[Tensor] = []

    def forward() -> None:
        result = getattr(nsa_torch, op)(**leaves, **inputs.options)
        results.append(result[0] if isinstance(result, tuple) else result)

    there = counted(forward)
    if not results[0].requires_grad:
        return there, 0
    return there, counted(results[0].sum().backward)


@pytest.mark.parametrize("op", COUNTED)
def test_counts_are_those_of_the_list_of_shapes(op: str) -> None:
    for shape in SHAPES.values():
        expected = cost(op, shape)
        assert both_ways(op, inputs_of(op, shape)) == (expected.forward_flops, expected.backward_flops), shape


def test_every_public_op_is_counted() -> None:
    assert set(COUNTED) == set(OPS) - {"dense_attention"}
    ops = {name for name in nsa_torch.__all__ if hasattr(torch.ops.nsa, name)}
    # No products; and lengths that lie on the device.
    assert ops == {*COUNTED, "rotate", "nsa_attention_with_kvcache"}


@pytest.mark.parametrize("op", COUNTED)
@pytest.mark.parametrize("fake", [False, True], ids=["meta", "fake"])
def test_without_data(op: str, fake: bool) -> None:
    """Long shapes of the benchmarks, on the meta device and as fake tensors: nothing is computed."""
    small = inputs_of(op, SHAPES["one_token"])
    for shape in (CPU[-1], GPU[-1], *MODELS[:2]):
        with FakeTensorMode() if fake else torch.device("meta"):
            tensors = {
                name: torch.empty(size_of(name, shape), dtype=like.dtype) for name, like in small.tensors.items()
            }
            expected = cost(op, shape)
            got = both_ways(op, Inputs(tensors, shape.options(*small.options)))
        assert got == (expected.forward_flops, expected.backward_flops), shape


def size_of(name: str, shape: Shape) -> tuple[int, ...]:
    d, width = shape.dim_k, shape.block_size * shape.dim_k
    weights = {"pe": (shape.block_size, d), "w1": (d, width), "b1": (d,), "w2": (d, d), "b2": (d,)}
    if name in weights:
        return weights[name]
    queries, keys = (shape.batch, shape.seqlen_q, shape.heads_q), (shape.batch, shape.seqlen_k, shape.heads_kv)
    blocks = (shape.batch, shape.blocks, shape.heads_kv)
    dims = {"q": (*queries, d), "gates": (*queries, 3), "lse": (shape.batch, shape.heads_q, shape.seqlen_q)}
    dims["block_indices"] = (shape.batch, shape.seqlen_q, shape.heads_kv, shape.num_selected)
    if name in dims:
        return dims[name]
    return (*(blocks if name.endswith("_cmp") else keys), shape.dim_v if name.startswith("v") else d)


LENGTHS = [(7, 7), (0, 5), (19, 40), (1, 23), (33, 33)]


@pytest.mark.parametrize("op", COUNTED)
def test_packed_sequences_count_as_separate_ones(op: str) -> None:
    shape = SHAPES["prime_67"]
    packed = make_packed_inputs(op, shape, LENGTHS)
    packed.options.pop("block_indices", None)
    alone = [0, 0]
    for queries, keys in LENGTHS:
        single = make_inputs(op, Shape(**(vars(shape) | {"name": "s", "seqlen_q": queries, "seqlen_k": keys})))
        single.options.pop("block_indices", None)
        alone = [a + b for a, b in zip(alone, both_ways(op, single), strict=True)]
    assert both_ways(op, packed) == tuple(alone)


def test_packed_sequences_without_values_count_as_equally_long() -> None:
    shape = SHAPES["prime_67"]
    equal = make_packed_inputs("window_attention", shape, [(20, 20)] * 3)
    meta = Inputs(*({n: to_meta(v) for n, v in part.items()} for part in equal))
    assert both_ways("window_attention", meta) == both_ways("window_attention", equal) > (0, 0)


def to_meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) else value


def test_slots_count_what_is_in_use() -> None:
    q, k = torch.randn(2, 4, 8), torch.randn(60, 2, 8)
    options = {"window": 10, "cu_seqlens_q": cumulative([1, 1]), "cu_seqlens_k": cumulative([30, 30])}
    used = torch.tensor([3, 25], dtype=torch.int32)
    got = counted(lambda: nsa_torch.window_attention(q, k, k, seqused_k=used, **options))
    assert got == 2 * 4 * (8 + 8) * (3 + 10)


def test_given_blocks_are_not_chosen_again() -> None:
    shape = SHAPES["prime_67"]
    inputs = make_inputs("nsa_attention", shape)
    expected = cost("nsa_attention", shape).forward_flops - cost("select_blocks", shape).forward_flops
    assert counted(lambda: nsa_torch.nsa_attention(**inputs.tensors, **inputs.options)) == expected


@pytest.mark.parametrize(("weights", "products"), [("mean", 0), ("linear", 1)])
def test_other_compressions(weights: str, products: int) -> None:
    x, w1 = torch.randn(2, 50, 3, 8), torch.randn(6, 16 * 8)
    options = {"block_size": 16, "block_stride": 8}
    got = counted(lambda: nsa_torch.compress(x, w1=w1 if weights == "linear" else None, **options))
    assert got == products * 2 * (2 * 5 * 3) * (16 * 8) * 6


def test_a_compiled_layer_counts_the_same() -> None:
    layer = nsa_torch.NSAAttention(32, 4, 2, window=16, num_selected=4)
    x = torch.randn(2, 100, 32)

    def step(module: torch.nn.Module) -> Callable[[], None]:
        return lambda: module(x).sum().backward()

    torch.compiler.reset()
    compiled = torch.compile(layer, backend="aot_eager")
    step(compiled)()
    assert counted(step(compiled)) == counted(step(layer)) > 0
    torch.compiler.reset()


def test_inductors_calls_are_counted() -> None:
    q, k = torch.randn(1, 40, 4, 8), torch.randn(1, 40, 2, 8)

    def call(q: Tensor, k: Tensor) -> Tensor:
        return nsa_torch.window_attention(q, k, k, window=16)[0]

    torch.compiler.reset()
    compiled = torch.compile(call)
    compiled(q, k)
    assert counted(lambda: compiled(q, k)) == counted(lambda: call(q, k)) > 0
    torch.compiler.reset()


def test_a_layer_counts_in_all_modes() -> None:
    layer = nsa_torch.NSAAttention(32, 4, 2, window=16, num_selected=4)
    x = torch.randn(2, 100, 32)
    expected = counted(lambda: layer(x))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert counted(lambda: layer(x)) == expected
    with torch.autocast("cpu", torch.bfloat16):
        assert counted(lambda: layer(x)) == expected


def of_some(op: str, wanted: set[str]) -> int:
    """FLOPs of a backward whose other inputs are frozen."""
    inputs = inputs_of(op, SHAPES["paper_options_chunk"])
    leaves = inputs.tensors | {name: inputs.tensors[name].requires_grad_() for name in wanted}
    result = getattr(nsa_torch, op)(**leaves, **inputs.options)
    out = result[0] if isinstance(result, tuple) else result
    return counted(out.sum().backward)


def test_a_backward_counts_what_is_asked_for() -> None:
    """Each gradient adds its own product to those that they share: the scores again, and dp."""
    shape = SHAPES["paper_options_chunk"]
    dim_k, dim_v = shape.dim_k, shape.dim_v
    q, k, v, both = (of_some("window_attention", names) for names in ({"q"}, {"k"}, {"v"}, {"q", "k"}))
    pairs = q // (2 * dim_k + dim_v)
    assert (q, k, v) == (pairs * (2 * dim_k + dim_v), q, pairs * (dim_k + dim_v))
    assert both == pairs * (3 * dim_k + dim_v)
    gates, window = (of_some("nsa_attention", names) for names in ({"gates"}, {"k_win"}))
    assert gates == 6 * shape.batch * shape.seqlen_q * shape.heads_q * dim_v
    assert window == gates + k
    first, second, bias = (of_some("compress", names) for names in ({"w1"}, {"w2"}, {"b2"}))
    assert bias == 0 and first == second * (1 + shape.block_size)
