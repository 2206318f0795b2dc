"""Errors of the bench's calls against float64: of the output, and of the gradient that is furthest off."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from exact import branch_errors, choice_error
from nsa_torch import reference
from problems import BRANCHES, Call, Problem

LONGEST_COMPRESS_CHECKED = 1 << 17


def errors(op: str, problem: Problem, call: Call) -> list[float | None]:
    """Relative errors of the forward and of the backward."""
    shape = problem.shape
    out = call.run()
    if op == "select_blocks":
        return [choice_error(shape, problem.q, problem.keys[0], problem.lse, out), None]
    grads = list(torch.autograd.grad(out, call.leaves, call.grad))
    if op == "compress":
        return compress_errors(problem, call, out, grads) if shape.seqlen_k <= LONGEST_COMPRESS_CHECKED else [None] * 2
    ops = BRANCHES if op == "nsa_attention" else (op,)
    keys, values = list(call.leaves[1:7:2]), list(call.leaves[2:7:2])
    results = {"out": out, "grad_q": grads[0]}
    for b in range(len(ops)):
        results |= {f"grad_k_{b}": grads[1 + 2 * b], f"grad_v_{b}": grads[2 + 2 * b]}
    given: dict[str, Any] = {"lists": problem.lists, "grad_out": call.grad}
    if op == "nsa_attention":
        given["gates"] = problem.gates
    found = branch_errors(ops, shape, problem.q, keys, values, results, **given)
    return [found.pop("out"), max(found.values())]


def compress_errors(problem: Problem, call: Call, out: Tensor, grads: list[Tensor]) -> list[float | None]:
    leaves = [leaf.detach().double().requires_grad_() for leaf in call.leaves]
    truth = reference.compress(*leaves, **problem.shape.options("block_size", "block_stride"))
    assert call.grad is not None
    true_grads = torch.autograd.grad(truth, leaves, call.grad.double())

    def relative(actual: Tensor, expected: Tensor) -> float:
        return ((actual.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-30)).item()

    if truth.numel() == 0:
        return [None, None]
    return [relative(out, truth), max(relative(g, t) for g, t in zip(grads, true_grads, strict=True))]
