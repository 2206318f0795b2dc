"""nsa_torch.compressed_attention: attention over the compressed tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import nsa_torch
from helpers import Target, check_op, make_inputs
from nsa_torch import reference
from shapes import ADVERSARIAL, TILED, Shape

OP = "compressed_attention"
SMALL = ADVERSARIAL[11]


@pytest.mark.parametrize("shape", ADVERSARIAL + TILED, ids=str)
def test_matches_reference(shape: Shape, target: Target) -> None:
    check_op(OP, make_inputs(OP, shape), target)


@pytest.mark.parametrize("shape", (SMALL, TILED[1]), ids=str)
def test_low_precision(shape: Shape, low_precision: Target) -> None:
    check_op(OP, make_inputs(OP, shape), low_precision)


@pytest.mark.parametrize("scale", [0.0, 0.3, -0.5, 4.0])
def test_scale(scale: float, target: Target) -> None:
    check_op(OP, make_inputs(OP, SMALL).replace(scale=scale), target)


@pytest.mark.parametrize("queries", [1, 9])
def test_gradcheck(queries: int, gradcheck_attention) -> None:
    """Gradients of out and of lse; the first queries see nothing."""
    shape = Shape("gradcheck", queries, 9, 4, 2, 3, 2, block_size=4, block_stride=2)
    gradcheck_attention(OP, make_inputs(OP, shape))


def test_a_block_is_visible_when_its_last_key_is(device: str) -> None:
    """Query p sees (p - l + 1) // d + 1 blocks: with equal keys, lse is the log of their number."""
    length, l, d = 50, 8, 4
    q = torch.randn(1, length, 2, 4, device=device)
    k = torch.zeros(1, (length - l) // d + 1, 1, 4, device=device)
    v = torch.randn(1, k.size(1), 1, 3, device=device)
    out, lse = nsa_torch.compressed_attention(q, k, v, seqlen_k=length, block_size=l, block_stride=d)
    for p in (0, 6, 7, 10, 11, 12, 48, 49):
        seen = max(0, (p - l + 1) // d + 1)
        expected = v[0, :seen, 0].mean(0) if seen else torch.zeros(3, device=device)
        torch.testing.assert_close(out[0, p, 0], expected)
        expected_lse = torch.tensor(float(seen)).log().expand(2)
        torch.testing.assert_close(lse[0, :, p].cpu(), expected_lse)


def test_shorter_than_a_block(device: str) -> None:
    """No block at all: zeros, -inf, and zero gradients."""
    q = torch.randn(2, 7, 4, 6, device=device, requires_grad=True)
    k = torch.randn(2, 0, 2, 6, device=device, requires_grad=True)
    v = torch.randn(2, 0, 2, 5, device=device, requires_grad=True)
    out, lse = nsa_torch.compressed_attention(q, k, v, seqlen_k=7, block_size=8, block_stride=4)
    assert torch.equal(out, torch.zeros(2, 7, 4, 5, device=device))
    assert torch.equal(lse, torch.full((2, 4, 7), -torch.inf, device=device))
    torch.autograd.backward([out, lse], [torch.ones_like(out), torch.ones_like(lse)])
    assert q.grad is not None and torch.equal(q.grad, torch.zeros_like(q))
    assert k.grad is not None and k.grad.shape == k.shape


def test_blocks_of_one_key_are_dense_attention(target: Target) -> None:
    """l = d = 1 without weights compresses nothing."""
    shape = replace(SMALL, block_size=1, block_stride=1)
    x = make_inputs("window_attention", shape).to(target.device, target.dtype).tensors
    size = {"block_size": 1, "block_stride": 1}
    k_cmp, v_cmp = nsa_torch.compress(x["k"], **size), nsa_torch.compress(x["v"], **size)
    out, lse = nsa_torch.compressed_attention(x["q"], k_cmp, v_cmp, seqlen_k=shape.seqlen_k, **size)
    expected_out, expected_lse = reference.dense_attention(**x)
    tolerance = 1e-12 if target.dtype == torch.float64 else 0.05
    torch.testing.assert_close(out, expected_out, rtol=0, atol=tolerance)
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=tolerance)
