"""Packed calls on CUDA whose tokens go on after the last sequence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import nsa_torch
from helpers import ATTENTION_OPS, OPS, Inputs, make_packed_inputs
from shapes import Shape
from test_packed import PAPER, SMALL, Lengths


@pytest.mark.cuda
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [SMALL, PAPER], ids=["small", "paper"])
@pytest.mark.parametrize("lengths", [[(17, 17), (0, 0), (70, 70)], [(0, 0)]], ids=["padded", "all_padding"])
def test_rows_after_the_last_sequence(op: str, dtype: torch.dtype, shape: Shape, lengths: Lengths) -> None:
    """Batches of a fixed size end with tokens of no sequence: their results are zeros, and they change no others.

    On the CPU, where the lengths are read, they are refused.
    """
    spare = 37  # tokens
    exact = make_packed_inputs(op, shape, lengths)
    inputs = exact.to("cuda", dtype)
    if op == "select_blocks":
        inputs = inputs.replace(lse=exact.tensors["lse"].to("cuda", torch.float32))
    padded = _pad_with_nan(op, inputs, spare, spare // shape.block_stride)
    function = getattr(nsa_torch, op)
    if op == "select_blocks":
        lists = function(**padded.tensors, **padded.options)
        live = lists.size(0) - spare
        assert (lists[live:] == -1).all()
        assert torch.equal(lists[:live], function(**inputs.tensors, **inputs.options))
        return
    tokens = sum(t for t, _ in lengths)
    rows = tokens // shape.block_stride if op == "compress" else tokens
    results, expected = (_results(function, x, rows) for x in (padded, inputs))
    for number, (got, want) in enumerate(zip(results, expected, strict=True)):
        tokens_dim = -1 if number == 1 and op in ATTENTION_OPS else 0  # lse is (Hq, sum Tq)
        live = want.size(tokens_dim)
        largest = want[want.isfinite()].abs().amax().item() if want.isfinite().any() else 0.0
        atol = 8 * torch.finfo(dtype).eps * largest  # sums are cut in other places
        torch.testing.assert_close(got.narrow(tokens_dim, 0, live), want, rtol=0, atol=atol)
        rest = got.narrow(tokens_dim, live, got.size(tokens_dim) - live)
        assert (rest == (-torch.inf if tokens_dim == -1 else 0)).all()


def _pad_with_nan(op: str, inputs: Inputs, spare: int, spare_blocks: int) -> Inputs:
    """More rows of every tensor of tokens and of blocks, and lists that point at blocks that there are."""

    def pad(name: str, x: Tensor) -> Tensor:
        if op == "compress" and name != "x":
            return x
        if name == "block_indices":
            return torch.cat([x, x.new_zeros(spare, *x.shape[1:])])
        if name == "lse":
            return torch.cat([x, x.new_full((x.size(0), spare), torch.nan)], dim=1)
        rows = spare_blocks if name.endswith("_cmp") else spare
        return torch.cat([x, x.new_full((rows, *x.shape[1:]), torch.nan)])

    tensors = {name: pad(name, x) for name, x in inputs.tensors.items()}
    options = {name: pad(name, x) if name == "block_indices" else x for name, x in inputs.options.items()}
    return Inputs(tensors, options)


def _results(function: Callable[..., Any], inputs: Inputs, rows: int) -> list[Tensor]:
    """Outputs and gradients, of weights that are NaN in output rows from `rows` on."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.tensors.items() if x.is_floating_point()}
    result = function(**inputs.tensors | leaves, **inputs.options)
    outputs = list(result) if isinstance(result, tuple) else [result]
    weights = []
    for number, output in enumerate(outputs):
        by_row = output.mT if number == 1 else output
        weight = (torch.arange(by_row.numel(), device=by_row.device) % 7 - 3).view(by_row.shape).to(output.dtype)
        weight[rows:] = torch.nan
        weights.append(weight.mT if number == 1 else weight)
    return [*(output.detach() for output in outputs), *torch.autograd.grad(outputs, list(leaves.values()), weights)]
