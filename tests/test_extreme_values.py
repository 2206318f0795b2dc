"""Numbers that overflow are refused; windows without end and scales that float32 can just hold are not."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import nsa_torch
from helpers import OPS
from test_bad_input import Case, assert_refused, constant, good_call

# Sums and products of these overflow, alone or with a size that is in order.
EXTREMES = (2**31, 2**62, sys.maxsize, -sys.maxsize - 1)
SIZES = ("block_size", "block_stride", "select_size", "num_selected", "num_initial", "num_local", "seqlen_k")


def _cases(op: str) -> Iterator[Case]:
    parameters = inspect.signature(getattr(nsa_torch, op)).parameters
    chosen: dict[str, Any] = {"block_indices": None} if op == "nsa_attention" else {}
    for name in (name for name in SIZES if name in parameters):
        for value in EXTREMES:
            yield Case(op, name, str(value), constant(value), ValueError, also=chosen)
    for name in ("max_seqlen_q", "max_seqlen_k"):
        if name in parameters:
            for value in (-1, EXTREMES[-1]):
                yield Case(op, name, str(value), constant(value), ValueError, packed=True)


CASES = [case for op in OPS for case in _cases(op)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_refused(case: Case, device: str) -> None:
    assert_refused(case, device)


@pytest.mark.parametrize("op", ["window_attention", "nsa_attention"])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_a_window_of_any_length_sees_all_keys(op: str, packed: bool, device: str) -> None:
    call = good_call(op, packed, device)
    leaves = [x.requires_grad_() for x in call.values() if isinstance(x, Tensor) and x.is_floating_point()]

    def results(window: int) -> list[Tensor]:
        out = getattr(nsa_torch, op)(**call | {"window": window})
        out = out[0] if isinstance(out, tuple) else out
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    expected = results(20)
    for window in (2**31 - 1, 2**31, 2**62, sys.maxsize):
        for got, same in zip(results(window), expected, strict=True):
            torch.testing.assert_close(got, same)


@pytest.mark.parametrize("op", ["compressed_attention", "selected_attention", "window_attention", "nsa_attention"])
@pytest.mark.parametrize("scale", [1e30, -1e30, 1e-38])
def test_no_scale_makes_nan(op: str, scale: float, device: str) -> None:
    call = good_call(op, False, device)
    out = getattr(nsa_torch, op)(**call | {"scale": scale})
    for result in out if isinstance(out, tuple) else (out,):
        assert not result.isnan().any()


@pytest.mark.parametrize("op", OPS)
def test_extreme_upper_bounds_of_lengths_are_bounds(op: str) -> None:
    call = good_call(op, True)
    expected = getattr(nsa_torch, op)(**call)
    names = {"max_seqlen_q", "max_seqlen_k"} & set(inspect.signature(getattr(nsa_torch, op)).parameters)
    for value in EXTREMES[:-1]:
        torch.testing.assert_close(getattr(nsa_torch, op)(**call | dict.fromkeys(names, value)), expected)
