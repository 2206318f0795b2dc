"""Strides, empty batches, repeated runs and threads: what must not change a result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import nsa_torch
from helpers import (
    DIFFERENTIABLE_OPS,
    OPS,
    Inputs,
    Target,
    assert_close,
    evaluate,
    make_inputs,
    make_packed_inputs,
    sharpest,
)
from shapes import ADVERSARIAL, TILED

SMALL = replace(ADVERSARIAL[11], num_selected=3)


def heads_first(x: Tensor) -> Tensor:
    """(B, H, T, D) in memory, as models with transposed heads hold it."""
    return x.transpose(-3, -2).contiguous().transpose(-3, -2) if x.dim() >= 3 else x


def batch_last(x: Tensor) -> Tensor:
    """(T, B, ...) in memory."""
    return x.transpose(0, 1).contiguous().transpose(0, 1) if x.dim() >= 2 else x


def sliced(x: Tensor) -> Tensor:
    """The middle of a larger tensor full of NaN: a read outside shows."""
    filler = torch.nan if x.is_floating_point() else 2**30
    big = x.new_full([size + 3 for size in x.shape], filler)
    inside = tuple(slice(1, 1 + size) for size in x.shape)
    big[inside] = x
    return big[inside]


def every_other(x: Tensor) -> Tensor:
    """A last stride of 2."""
    big = x.new_full((*x.shape[:-1], 2 * x.size(-1)), torch.nan if x.is_floating_point() else 2**30)
    big[..., ::2] = x
    return big[..., ::2]


def reversed_dimensions(x: Tensor) -> Tensor:
    """Fortran order: the first dimension is the contiguous one."""
    order = list(range(x.dim()))[::-1]
    return x.permute(order).contiguous().permute(order)


LAYOUTS = [heads_first, batch_last, sliced, every_other, reversed_dimensions]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_strides(op: str, layout: Callable[[Tensor], Tensor], packed: bool, device: str) -> None:
    inputs = _inputs(op, packed, device)
    tensors = {name: layout(tensor) for name, tensor in inputs.tensors.items()}
    options = {n: layout(o) if isinstance(o, Tensor) else o for n, o in inputs.options.items()}
    _assert_same(op, Inputs(tensors, options), inputs)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dim", [0, 1, 2, 3])
def test_expanded_inputs(op: str, dim: int, device: str) -> None:
    """A stride of 0 along the batch, the tokens, the heads or the channels."""
    inputs = _inputs(op, False, device)
    tensors = {}
    for name, tensor in inputs.tensors.items():
        tensors[name] = tensor
        if tensor.dim() == 4 and name != "block_indices":
            tensors[name] = tensor.select(dim, 0).unsqueeze(dim).expand_as(tensor)
            assert tensors[name].stride(dim) == 0
    expanded = Inputs(tensors, inputs.options)
    contiguous = {name: t.contiguous() for name, t in tensors.items()}
    _assert_same(op, expanded, Inputs(contiguous, inputs.options))


@pytest.mark.parametrize("op", DIFFERENTIABLE_OPS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_strides_of_incoming_gradients(op: str, layout: Callable[[Tensor], Tensor], device: str) -> None:
    inputs = _inputs(op, False, device)
    _assert_same_gradients(op, inputs, layout)


@pytest.mark.parametrize("op", DIFFERENTIABLE_OPS)
def test_expanded_incoming_gradient(op: str, device: str) -> None:
    """What sum().backward() sends: one number with strides of 0."""
    inputs = _inputs(op, False, device)
    _assert_same_gradients(op, inputs, lambda g: g.flatten()[0].expand_as(g))


@pytest.mark.parametrize("op", DIFFERENTIABLE_OPS)
def test_one_output_used(op: str, device: str) -> None:
    """A gradient for out alone, and for lse alone."""
    inputs = _inputs(op, False, device)
    leaves = {n: t.requires_grad_() if t.is_floating_point() else t for n, t in inputs.tensors.items()}
    wanted = [t for t in leaves.values() if t.requires_grad]

    def gradients(use: Callable[[tuple[Tensor, ...]], Tensor]) -> list[Tensor]:
        result = getattr(nsa_torch, op)(**leaves, **inputs.options)
        outputs = result if isinstance(result, tuple) else (result,)
        outputs = tuple(o.masked_fill(o.isneginf(), 0.0) for o in outputs)
        grads = torch.autograd.grad(use(outputs), wanted, allow_unused=True)
        return [torch.zeros_like(w) if g is None else g for g, w in zip(grads, wanted, strict=True)]

    whole = gradients(lambda outputs: sum(o.square().sum() for o in outputs))
    parts = [
        gradients(lambda outputs, i=i: outputs[i].square().sum())
        for i in range(2 if op.endswith("attention") and op != "nsa_attention" else 1)
    ]
    for grad, *alone in zip(whole, *parts, strict=True):
        torch.testing.assert_close(sum(alone), grad, rtol=0, atol=sharpest(device)[1])


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_two_runs_are_equal_to_the_bit(op: str, packed: bool, low_precision: Target, deterministic: None) -> None:
    inputs = _inputs(op, packed, low_precision.device, low_precision.dtype)
    _assert_equal(_results(op, inputs), _results(op, inputs))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_do_not_change_the_outputs(op: str, dtype: torch.dtype, num_threads: None) -> None:
    """Outputs to the bit; gradients of keys are sums over queries, and may be ordered anew."""
    inputs = make_inputs(op, TILED[1])
    inputs = inputs.to("cpu", dtype)
    if op == "select_blocks":
        inputs = inputs.replace(lse=inputs.tensors["lse"].float())
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(_results(op, inputs))
    for other in results[1:]:
        outputs = [name for name in other if not name.startswith("grad")]
        _assert_equal(*({n: r[n] for n in outputs} for r in (results[0], other)))
        if dtype == torch.float32 and op != "select_blocks":
            assert_close(other, results[0], 1e-3)


def test_large_scores_do_not_overflow(low_precision: Target) -> None:
    """Scores past float16's largest number, 65504: finite results, lse as exact as float32."""
    for op in ("compressed_attention", "selected_attention", "window_attention"):
        exact = make_inputs(op, replace(TILED[0], seqlen_q=100))
        inputs = exact.to(low_precision.device, low_precision.dtype)
        scaled = inputs.tensors | {n: inputs.tensors[n] * 300 for n in list(exact.tensors)[:2]}
        results = evaluate(getattr(nsa_torch, op), Inputs(scaled, inputs.options))
        truth = evaluate(
            getattr(nsa_torch.reference, op),
            Inputs(scaled, inputs.options).to("cpu", torch.float64),
        )
        assert truth["lse"].max() > 65504
        for name, result in results.items():
            assert not result.isnan().any(), (op, name)
            assert torch.equal(result.cpu().isinf(), truth[name].isinf()), (op, name)
        torch.testing.assert_close(results["lse"].cpu().double(), truth["lse"], rtol=1e-5, atol=0)


def _inputs(op: str, packed: bool, device: str, dtype: torch.dtype | None = None) -> Inputs:
    lengths = [(5, 40), (0, 0), (31, 31), (1, 17)]
    exact = make_packed_inputs(op, SMALL, lengths) if packed else make_inputs(op, SMALL)
    dtype = dtype or sharpest(device)[0]
    inputs = exact.to(device, dtype)
    if op == "select_blocks" and dtype != torch.float64:
        inputs = inputs.replace(lse=exact.tensors["lse"].to(device, torch.float32))
    return inputs


def _results(op: str, inputs: Inputs) -> dict[str, Tensor]:
    if op == "select_blocks":
        return {"out": nsa_torch.select_blocks(**inputs.tensors, **inputs.options)}
    return evaluate(getattr(nsa_torch, op), inputs)


def _assert_same(op: str, actual: Inputs, expected: Inputs) -> None:
    if op == "select_blocks":
        assert torch.equal(_results(op, actual)["out"], _results(op, expected)["out"])
    else:
        assert_close(_results(op, actual), _results(op, expected), sharpest(actual.device)[1])


def _assert_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def _assert_same_gradients(op: str, inputs: Inputs, layout: Callable[[Tensor], Tensor]) -> None:
    leaves = {n: t.requires_grad_() if t.is_floating_point() else t for n, t in inputs.tensors.items()}
    wanted = [t for t in leaves.values() if t.requires_grad]
    result = getattr(nsa_torch, op)(**leaves, **inputs.options)
    outputs = result if isinstance(result, tuple) else (result,)
    random = torch.Generator().manual_seed(0)
    strided = [layout(torch.randn(o.shape, generator=random).to(o.device, o.dtype)) for o in outputs]
    assert any(not g.is_contiguous() for g in strided)
    dense = [g.contiguous() for g in strided]
    actual = torch.autograd.grad(outputs, wanted, strided, retain_graph=True)
    for grad, expected in zip(actual, torch.autograd.grad(outputs, wanted, dense), strict=True):
        torch.testing.assert_close(grad, expected, rtol=0, atol=sharpest(inputs.device)[1])
