"""Autocast: every op runs in the autocast dtype, gates and lse stay float32."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import nsa_torch
from helpers import (
    DIFFERENTIABLE_OPS,
    Inputs,
    assert_close,
    assert_errs_at_most_twice,
    evaluate,
    make_inputs,
    make_packed_inputs,
)
from nsa_torch import reference
from shapes import TILED

SHAPE = replace(TILED[0], seqlen_q=200, seqlen_k=300, num_selected=3)
LENGTHS = [(100, 100), (40, 200)]

dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
packed = pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])


@pytest.mark.parametrize("op", DIFFERENTIABLE_OPS)
@dtypes
@packed
def test_runs_in_the_autocast_dtype(op: str, dtype: torch.dtype, packed: bool, device: str) -> None:
    """float32 in: what the op gives for arguments cast by hand, with float32 gradients."""
    inputs = _inputs(op, packed, device)
    with torch.autocast(device, dtype):
        actual = evaluate(getattr(nsa_torch, op), inputs)
    by_hand = _cast(inputs, dtype)
    expected = evaluate(getattr(nsa_torch, op), by_hand)
    assert actual["out"].dtype == dtype
    assert torch.equal(actual["out"], expected["out"])
    if "lse" in actual:
        assert actual["lse"].dtype == torch.float32
        assert torch.equal(actual["lse"], expected["lse"])
    for name, grad in actual.items():
        if name.startswith("grad"):
            assert grad.dtype == torch.float32, name
    assert_close(actual, expected, 1e-6)
    truth = evaluate(getattr(reference, op), by_hand.to(device, torch.float64))
    baseline = evaluate(getattr(reference, op), by_hand)
    assert_errs_at_most_twice(actual, truth, baseline, dtype)


@pytest.mark.parametrize("op", DIFFERENTIABLE_OPS)
def test_backward_inside_the_region(op: str, device: str) -> None:
    """backward() under autocast does what it does after it: the gradients' maths is not cast."""
    inputs = _cast(_inputs(op, False, device), torch.bfloat16)
    with torch.autocast(device, torch.bfloat16):
        inside = evaluate(getattr(nsa_torch, op), inputs)
    outside = evaluate(getattr(nsa_torch, op), inputs)
    for name, tensor in outside.items():
        assert torch.equal(inside[name], tensor), name


@dtypes
def test_select_blocks(dtype: torch.dtype, device: str) -> None:
    """The choice of the cast keys, and lse as it is: rounding it would be refused."""
    inputs = _inputs("select_blocks", False, device)
    by_hand = _cast(inputs, dtype)
    with torch.autocast(device, dtype):
        actual = nsa_torch.select_blocks(**inputs.tensors, **inputs.options)
    expected = nsa_torch.select_blocks(**by_hand.tensors, **by_hand.options)
    assert torch.equal(actual, expected)


def test_whole_chain(device: str) -> None:
    """compress, attention and the gates of a layer in one autocast region, trained on."""
    torch.manual_seed(0)
    x = torch.randn(1, 150, 2, 16, device=device, requires_grad=True)
    q = torch.randn(1, 150, 4, 16, device=device, requires_grad=True)
    gates = torch.randn(1, 150, 4, 3, device=device, requires_grad=True)
    w1 = torch.randn(16, 32 * 16, device=device, requires_grad=True)
    with torch.autocast(device, torch.bfloat16):
        cmp = nsa_torch.compress(x, w1=w1)
        assert cmp.dtype == torch.bfloat16
        out = nsa_torch.nsa_attention(q, cmp, cmp, x, x, x, x, gates.sigmoid(), num_selected=3)
        assert out.dtype == torch.bfloat16
        out.float().square().sum().backward()
    for leaf in (x, q, gates, w1):
        assert leaf.grad is not None
        assert leaf.grad.dtype == torch.float32
        assert leaf.grad.isfinite().all() and leaf.grad.any()


def test_gates_keep_their_precision(device: str) -> None:
    """Gates that bfloat16 would round give another result than the rounded ones."""
    inputs = _inputs("nsa_attention", False, device)
    gates = inputs.tensors["gates"]
    with torch.autocast(device, torch.bfloat16):
        given, rounded = (
            nsa_torch.nsa_attention(**inputs.replace(gates=g).tensors, **inputs.options)
            for g in (gates, gates.bfloat16().float())
        )
    assert not torch.equal(given, rounded)


def test_float64_is_left_alone() -> None:
    inputs = make_inputs("window_attention", SHAPE)
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = nsa_torch.window_attention(**inputs.tensors, **inputs.options)
    assert out.dtype == lse.dtype == torch.float64


def test_off_inside() -> None:
    inputs = _inputs("window_attention", False, "cpu")
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        out, _ = nsa_torch.window_attention(**inputs.tensors, **inputs.options)
    assert out.dtype == torch.float32


def _inputs(op: str, packed: bool, device: str) -> Inputs:
    exact = make_packed_inputs(op, SHAPE, LENGTHS) if packed else make_inputs(op, SHAPE)
    return exact.to(device, torch.float32)


def _cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    cast = inputs.to(inputs.device, dtype)
    kept = {n: inputs.tensors[n] for n in ("gates", "lse") if n in inputs.tensors}
    return cast.replace(**kept)
