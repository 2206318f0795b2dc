"""nsa_torch.window_attention: attention over the last w keys."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import nsa_torch
from helpers import Target, assert_close, check_op, evaluate, make_inputs
from nsa_torch import reference
from shapes import ADVERSARIAL, TILED, Shape

OP = "window_attention"
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


@pytest.mark.parametrize("window", [1, 2, 30, 31, 32, 63, 64, 65, 128, 300, 780, 781, 2**40])
def test_windows(window: int, target: Target) -> None:
    shape = replace(TILED[0], heads_q=2, dim_k=4, dim_v=4, window=window)
    check_op(OP, make_inputs(OP, shape), target)


@pytest.mark.parametrize("queries", [1, 9])
def test_gradcheck(queries: int, gradcheck_attention) -> None:
    shape = Shape("gradcheck", queries, 9, 4, 2, 3, 2, window=5)
    gradcheck_attention(OP, make_inputs(OP, shape))


@pytest.mark.parametrize("window", [1, 5, 16])
def test_counts_the_querys_own_key(window: int, device: str) -> None:
    """w keys, p - w < j <= p: with equal keys, out is the mean of their values."""
    q = torch.randn(1, 16, 2, 4, device=device)
    k, v = torch.zeros(1, 16, 2, 4, device=device), torch.randn(1, 16, 2, 3, device=device)
    out, lse = nsa_torch.window_attention(q, k, v, window=window)
    for p in range(16):
        keys = v[0, max(0, p - window + 1) : p + 1]
        torch.testing.assert_close(out[0, p], keys.mean(0))
        torch.testing.assert_close(lse[0, :, p].cpu(), torch.full((2,), len(keys)).log())


@pytest.mark.parametrize("shape", [s for s in ADVERSARIAL if s.window >= 13], ids=str)
def test_a_long_window_is_dense_attention(shape: Shape) -> None:
    inputs = make_inputs(OP, replace(shape, window=shape.seqlen_k + 1))
    actual = evaluate(nsa_torch.window_attention, inputs)
    del inputs.options["window"]
    assert_close(actual, evaluate(reference.dense_attention, inputs), 1e-10)


def test_dense_reference_is_torch_attention() -> None:
    """The reference's dense attention, outputs and gradients, against torch's own."""

    def torch_attention(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        attend = torch.nn.functional.scaled_dot_product_attention
        return attend(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

    inputs = make_inputs(OP, SMALL)
    del inputs.options["window"]
    actual = evaluate(lambda **x: reference.dense_attention(**x)[0], inputs)
    assert_close(actual, evaluate(torch_attention, inputs), 1e-12)
