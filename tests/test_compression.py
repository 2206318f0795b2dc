"""nsa_torch.compress: phi of Eq. 7 on keys or values."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import nsa_torch
from helpers import (
    Inputs,
    Target,
    assert_close,
    check_op,
    cumulative,
    evaluate,
    make_inputs,
    make_packed_inputs,
    sharpest,
    weights,
)
from nsa_torch import reference
from shapes import ADVERSARIAL, TILED, Shape

SMALL = ADVERSARIAL[11]
LENGTHS = (17, 0, 1, 7, 8, 9, 15, 31, 0, 20)  # of packed sequences; SMALL's blocks have 8 tokens
EACH_WEIGHT_ALONE = [("pe",), ("w1",), ("b1",), ("w2",), ("b2",)]


@pytest.mark.parametrize("shape", ADVERSARIAL + TILED, ids=str)
def test_matches_reference(shape: Shape, target: Target) -> None:
    check_op("compress", make_inputs("compress", shape), target)


@pytest.mark.parametrize("mode", ["mlp", "linear"])
@pytest.mark.parametrize(
    "per_head",
    [(), ("pe", "w1", "b1", "w2", "b2"), *EACH_WEIGHT_ALONE],
    ids=lambda names: "+".join(names) or "shared",
)
def test_weights_per_head(mode: str, per_head: tuple[str, ...], target: Target) -> None:
    check_op("compress", _inputs(SMALL, mode, per_head), target)


@pytest.mark.parametrize("shape", ADVERSARIAL, ids=str)
def test_mean(shape: Shape, target: Target) -> None:
    check_op("compress", _inputs(shape, "mean", ()), target)


@pytest.mark.parametrize("mode", ["mlp", "linear"])
@pytest.mark.parametrize("missing", [("pe",), ("b1",), ("b2",), ("pe", "b1", "b2")], ids="+".join)
def test_optional_weights(mode: str, missing: tuple[str, ...], target: Target) -> None:
    inputs = _inputs(SMALL, mode, ("w1",))
    tensors = {name: t for name, t in inputs.tensors.items() if name not in missing}
    check_op("compress", Inputs(tensors, inputs.options), target)


@pytest.mark.parametrize("mode", ["mlp", "linear", "mean"])
@pytest.mark.parametrize("shape", (SMALL, *TILED), ids=str)
def test_low_precision(mode: str, shape: Shape, low_precision: Target) -> None:
    check_op("compress", _inputs(shape, mode, ("w1", "b2")), low_precision)


@pytest.mark.parametrize("mode", ["mlp", "linear", "mean"])
def test_gradcheck(mode: str) -> None:
    shape = Shape("gradcheck", 11, 11, 2, 2, 2, 3, block_size=4, block_stride=2, select_size=4)
    inputs = _inputs(shape, mode, ("w2",))
    names = list(inputs.tensors)
    leaves = [inputs.tensors[name].requires_grad_() for name in names]
    assert torch.autograd.gradcheck(
        lambda *tensors: nsa_torch.compress(**dict(zip(names, tensors, strict=True)), **inputs.options),
        leaves,
    )


@pytest.mark.parametrize("mode", ["mlp", "linear", "mean"])
def test_only_the_gradients_asked_for(mode: str) -> None:
    """Frozen weights or frozen keys give the same gradient for the rest."""
    inputs = _inputs(SMALL, mode, ())

    def gradient(name: str, *, alone: bool) -> torch.Tensor:
        leaves = {n: t.clone().requires_grad_(n == name or not alone) for n, t in inputs.tensors.items()}
        nsa_torch.compress(**leaves, **inputs.options).square().sum().backward()
        grad = leaves[name].grad
        assert grad is not None
        return grad

    for name in inputs.tensors:
        torch.testing.assert_close(gradient(name, alone=True), gradient(name, alone=False))


@pytest.mark.parametrize("mode", ["mlp", "linear", "mean"])
def test_a_token_reads_its_block_and_nothing_else(mode: str, device: str) -> None:
    """Changing key t changes exactly the blocks m with m d <= t < m d + l."""
    inputs = _inputs(SMALL, mode, ()).to(device, torch.float32)
    before = nsa_torch.compress(**inputs.tensors, **inputs.options)
    start = torch.arange(before.size(1), device=device) * SMALL.block_stride
    for key in (0, 3, 4, 7, 8, 17, 27, 28, 30):
        x = inputs.tensors["x"].clone()
        x[:, key] += 1
        after = nsa_torch.compress(**inputs.replace(x=x).tensors, **inputs.options)
        changed = (after != before).any(-1).any(-1).any(0)
        covers = (start <= key) & (key < start + SMALL.block_size)
        assert torch.equal(changed, covers), f"key {key}"


def test_flattens_a_block_token_by_token(device: str) -> None:
    """Element t * D + c of the flattened block is channel c of its key t."""
    length, dim = 4, 3
    x = torch.arange(length * dim, dtype=torch.float32, device=device).view(1, length, 1, dim)
    w1 = torch.eye(length * dim, device=device)
    out = nsa_torch.compress(x, w1=w1, block_size=length, block_stride=2)
    assert torch.equal(out.flatten(), torch.arange(12.0, device=device))


def test_gelu_is_exact() -> None:
    """erf, not its tanh approximation: they differ by up to 5e-4."""
    x = torch.linspace(-4, 4, 41, dtype=torch.float64).view(1, 41, 1, 1)
    one = torch.ones(1, 1, dtype=torch.float64)
    out = nsa_torch.compress(x, w1=one, w2=one, block_size=1, block_stride=1)
    expected = x * 0.5 * (1 + torch.erf(x / 2**0.5))
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-14)


def test_reference_by_hand() -> None:
    """The definition itself, one block and one head at a time."""
    inputs = _inputs(SMALL, "mlp", ())
    x, pe, w1, b1, w2, b2 = inputs.tensors.values()
    out = reference.compress(**inputs.tensors, **inputs.options)
    length, stride = SMALL.block_size, SMALL.block_stride
    assert out.shape == (3, (31 - length) // stride + 1, 2, SMALL.dim_v)
    for b, m, h in [(0, 0, 0), (1, 3, 1), (2, out.size(1) - 1, 0)]:
        block = (x[b, m * stride : m * stride + length, h] + pe).reshape(-1)
        hidden = w1 @ block + b1
        token = w2 @ (hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))) + b2
        torch.testing.assert_close(out[b, m, h], token, rtol=0, atol=1e-13)


LAYOUTS = {
    "heads_first": lambda x: x.transpose(-2, -3).contiguous().transpose(-2, -3),
    "one_of_three": lambda x: torch.stack([x, x.new_full(x.shape, torch.nan)], -3)[..., 0, :, :],
    "odd_rows": lambda x: torch.nn.functional.pad(x, (1, 2), value=torch.nan)[..., 1:-2],
    "every_other_column": lambda x: torch.stack([x, x.new_full(x.shape, torch.nan)], -1)[..., 0],
}


@pytest.mark.parametrize("mode", ["mlp", "linear", "mean"])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_change_nothing(layout: str, packed: bool, mode: str, device: str) -> None:
    dtype, tolerance = sharpest(device)
    inputs = _aligned(mode, packed).to(device, dtype)
    restrided = inputs.replace(x=LAYOUTS[layout](inputs.tensors["x"]))
    assert not restrided.tensors["x"].is_contiguous()
    expected = evaluate(nsa_torch.compress, inputs)
    assert_close(evaluate(nsa_torch.compress, restrided), expected, tolerance)


@pytest.mark.parametrize("mode", ["mlp", "linear", "mean"])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_aligned_rows(packed: bool, mode: str, low_precision: Target) -> None:
    """Widths that kernels read 16 bytes at a time."""
    check_op("compress", _aligned(mode, packed), low_precision)


@pytest.mark.parametrize("mode", ["mlp", "linear", "mean"])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_two_runs_are_equal_to_the_bit(packed: bool, mode: str, low_precision: Target) -> None:
    inputs = _aligned(mode, packed).to(low_precision.device, low_precision.dtype)
    first, second = (evaluate(nsa_torch.compress, inputs) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_many_packed_sequences(target: Target) -> None:
    lengths = [(7 * i + i * i) % 23 for i in range(300)]
    inputs = make_packed_inputs("compress", SMALL, [(t, t) for t in lengths])
    check_op("compress", inputs, target)


@pytest.mark.parametrize("mode", ["mlp", "linear", "mean"])
def test_gradients_of_rows_without_a_block_count_nowhere(mode: str, device: str) -> None:
    inputs = _aligned(mode, packed=True).to(device, torch.float32)
    blocks = sum(reference.num_blocks(t, SMALL.block_size, SMALL.block_stride) for t in LENGTHS)
    leaves = {name: t.clone().requires_grad_() for name, t in inputs.tensors.items()}
    out = nsa_torch.compress(**leaves, **inputs.options)
    assert out.size(0) > blocks
    grad = torch.ones_like(out)
    expected = torch.autograd.grad(out, list(leaves.values()), grad, retain_graph=True)
    grad[blocks:] = torch.nan
    for actual, wanted in zip(torch.autograd.grad(out, list(leaves.values()), grad), expected, strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.cuda
@pytest.mark.parametrize("mode", ["mlp", "linear", "mean"])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_is_captured_in_a_cuda_graph(packed: bool, mode: str) -> None:
    """Forward and backward; a replay reads new tokens and new lengths."""
    inputs = _aligned(mode, packed).to("cuda", torch.bfloat16)
    leaves = {name: t.clone().requires_grad_() for name, t in inputs.tensors.items()}

    def step() -> list[torch.Tensor]:
        out = nsa_torch.compress(**leaves, **inputs.options)
        return [out, *torch.autograd.grad(out.float().square().sum(), list(leaves.values()))]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        leaves["x"].copy_(leaves["x"].flip(-3))
    if packed:
        inputs.options["cu_seqlens_k"].copy_(cumulative(LENGTHS[::-1], "cuda"))
    graph.replay()
    for actual, expected in zip(captured, step(), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.cuda
def test_float64_is_refused_on_cuda() -> None:
    inputs = _inputs(SMALL, "mlp", ()).to("cuda", torch.float64)
    with pytest.raises(TypeError, match="x must be float16, bfloat16 or float32 on CUDA, got"):
        nsa_torch.compress(**inputs.tensors, **inputs.options)


def _aligned(mode: str, packed: bool) -> Inputs:
    """Heads of 16 channels, a hidden layer of 24, results of 8; w1 and b2 are per head."""
    shape = replace(SMALL, dim_k=16, dim_v=8)
    lengths = [(t, t) for t in LENGTHS]
    inputs = make_packed_inputs("compress", shape, lengths) if packed else make_inputs("compress", shape)
    drawn = weights(shape, mode, torch.Generator().manual_seed(3), hidden=24)
    return Inputs({"x": inputs.tensors["x"], **drawn}, inputs.options)


def _inputs(shape: Shape, mode: str, per_head: tuple[str, ...]) -> Inputs:
    inputs = make_inputs("compress", shape)
    random = torch.Generator().manual_seed(3)
    drawn = weights(shape, mode, random, per_head=per_head)
    return Inputs({"x": inputs.tensors["x"], **drawn}, inputs.options)
