"""nsa_torch.nsa_attention: the three branches and their gates as one op."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import nsa_torch
from helpers import (
    CHOICE_OPTIONS,
    FLOAT64_TOLERANCE,
    Inputs,
    Target,
    assert_close,
    assert_errs_at_most_twice,
    check_op,
    evaluate,
    make_inputs,
    sharpest,
)
from nsa_torch import reference
from shapes import ADVERSARIAL, TILED, Shape

OP = "nsa_attention"
SMALL = ADVERSARIAL[11]


@pytest.mark.parametrize("shape", ADVERSARIAL + TILED, ids=str)
def test_matches_reference_on_given_blocks(shape: Shape, target: Target) -> None:
    check_op(OP, make_inputs(OP, shape), target)


@pytest.mark.parametrize("shape", ADVERSARIAL + TILED, ids=str)
def test_matches_reference_choosing_blocks(shape: Shape) -> None:
    check_op(OP, make_inputs(OP, shape).replace(block_indices=None))


@pytest.mark.parametrize("shape", (SMALL, TILED[1]), ids=str)
def test_low_precision(shape: Shape, low_precision: Target) -> None:
    check_op(OP, make_inputs(OP, shape), low_precision)


@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (192, 128), (256, 256)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_head_dimensions(dims: tuple[int, int], dtype: torch.dtype) -> None:
    """Those that the README's table has. On a GPU: tests/test_cuda_ops.py."""
    shape = replace(SMALL, name=f"dims_{dims}", dim_k=dims[0], dim_v=dims[1])
    check_op(OP, make_inputs(OP, shape), Target("cpu", dtype))


def test_gates_may_stay_float32(device: str) -> None:
    """16-bit branches under float32 gates, as under autocast: out in 16 bits, d gates in 32."""
    exact = make_inputs(OP, TILED[0])
    given = exact.to(device, torch.bfloat16)
    given = given.replace(gates=exact.tensors["gates"].to(device, torch.float32))
    actual = evaluate(nsa_torch.nsa_attention, given)
    assert actual["out"].dtype == torch.bfloat16
    truth = evaluate(reference.nsa_attention, given.to(device, torch.float64))
    baseline = evaluate(reference.nsa_attention, given)
    assert_errs_at_most_twice(actual, truth, baseline, torch.bfloat16)


@pytest.mark.parametrize("scale", [0.0, 0.3, -0.5, 4.0])
def test_scale(scale: float) -> None:
    check_op(OP, make_inputs(OP, SMALL).replace(scale=scale, block_indices=None))


@pytest.mark.parametrize("queries", [1, 9])
@pytest.mark.parametrize("chosen", [True, False], ids=["chosen", "given"])
def test_gradcheck(queries: int, chosen: bool, gradcheck_attention) -> None:
    shape = Shape(
        "gradcheck", queries, 9, 2, 1, 2, 2,
        block_size=4, block_stride=2, select_size=4, num_selected=2, num_local=1, window=3,
    )  # fmt: skip
    inputs = make_inputs(OP, shape)
    gradcheck_attention(OP, inputs.replace(block_indices=None) if chosen else inputs)


@pytest.mark.parametrize("shape", (SMALL, *TILED), ids=str)
def test_is_the_gated_sum_of_its_branches(shape: Shape, device: str) -> None:
    """The parts, put together by hand: outputs and every gradient."""
    inputs = make_inputs(OP, shape).replace(block_indices=None).to(device, sharpest(device)[0])
    actual = evaluate(nsa_torch.nsa_attention, inputs)
    assert_close(actual, evaluate(_by_parts, inputs), sharpest(device)[1])


@pytest.mark.parametrize("branch", [0, 1, 2], ids=["cmp", "slc", "win"])
def test_one_gate_open(branch: int, target: Target) -> None:
    """Gates 0 and 1: closed branches get zero gradients, yet their gates get theirs."""
    inputs = make_inputs(OP, SMALL)
    gates = torch.zeros_like(inputs.tensors["gates"])
    gates[..., branch] = 1
    results = check_op(OP, inputs.replace(gates=gates), target)
    for index, name in enumerate(("cmp", "slc", "win")):
        assert results[f"grad_k_{name}"].any() == (index == branch)
        assert results["grad_gates"][..., index].any()


def test_a_given_choice_replaces_the_own_one() -> None:
    """Passing what select_blocks chooses changes nothing; passing another list does."""
    inputs = make_inputs(OP, SMALL).replace(block_indices=None)
    chosen = evaluate(nsa_torch.nsa_attention, inputs)
    given = evaluate(nsa_torch.nsa_attention, inputs.replace(block_indices=_choice(inputs)))
    assert_close(given, chosen, 1e-13)
    first = torch.zeros(3, 31, 2, 1, dtype=torch.int32)
    other = evaluate(nsa_torch.nsa_attention, inputs.replace(block_indices=first))
    assert (other["out"] - chosen["out"]).abs().max() > 0.1


@pytest.mark.parametrize("shape", [s for s in ADVERSARIAL if s.seqlen_k > 0], ids=str)
def test_everything_seen_is_dense_attention(shape: Shape) -> None:
    """All blocks selected and a long window, the same keys for both, gates that add up to one."""
    blocks = shape.selection_blocks
    forced = shape.num_initial + shape.num_local
    wide = replace(shape, window=shape.seqlen_k, num_selected=max(blocks, forced))
    x = make_inputs(OP, wide).replace(block_indices=None)
    share = x.tensors["gates"][..., :1]
    x = x.replace(
        k_slc=x.tensors["k_win"],
        v_slc=x.tensors["v_win"],
        gates=torch.cat([torch.zeros_like(share), share, 1 - share], dim=-1),
    )
    actual = evaluate(nsa_torch.nsa_attention, x)
    names = {"q": "q", "k_win": "k", "v_win": "v"}
    dense = Inputs({new: x.tensors[old] for old, new in names.items()}, {})
    expected = evaluate(lambda **call: reference.dense_attention(**call)[0], dense)
    for branch in ("k", "v"):
        actual[f"grad_{branch}"] = actual.pop(f"grad_{branch}_slc") + actual.pop(f"grad_{branch}_win")
    both = {name: actual[name] for name in expected}
    assert_close(both, expected, FLOAT64_TOLERANCE)


@pytest.mark.parametrize("chosen", [True, False], ids=["chosen", "given"])
def test_only_the_gradients_asked_for(chosen: bool) -> None:
    """Each input alone gets the gradient that it gets among all."""
    inputs = make_inputs(OP, SMALL)
    options = inputs.options | ({"block_indices": None} if chosen else {})
    every = {name: t.clone().requires_grad_() for name, t in inputs.tensors.items()}
    nsa_torch.nsa_attention(**every, **options).square().sum().backward()
    for name, leaf in every.items():
        alone = {n: t.clone().requires_grad_(n == name) for n, t in inputs.tensors.items()}
        nsa_torch.nsa_attention(**alone, **options).square().sum().backward()
        grad = alone[name].grad
        assert grad is not None
        torch.testing.assert_close(grad, leaf.grad, rtol=0, atol=1e-12, msg=name)


def _by_parts(q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates, **options) -> Tensor:
    inputs = Inputs({"q": q, "k_cmp": k_cmp, "v_cmp": v_cmp, "k_slc": k_slc}, options)
    blocks = {name: options[name] for name in ("block_size", "block_stride")}
    o_cmp, _ = nsa_torch.compressed_attention(q, k_cmp, v_cmp, seqlen_k=k_slc.size(1), **blocks)
    o_slc, _ = nsa_torch.selected_attention(q, k_slc, v_slc, _choice(inputs), select_size=options["select_size"])
    o_win, _ = nsa_torch.window_attention(q, k_win, v_win, window=options["window"])
    return (gates.unsqueeze(-1) * torch.stack([o_cmp, o_slc, o_win], dim=-2)).sum(-2)


def _choice(inputs: Inputs) -> Tensor:
    q, k_cmp, v_cmp, k_slc = (inputs.tensors[n] for n in ("q", "k_cmp", "v_cmp", "k_slc"))
    options = {name: inputs.options[name] for name in CHOICE_OPTIONS}
    blocks = {name: options[name] for name in ("block_size", "block_stride")}
    length = k_slc.size(1)
    lse = nsa_torch.compressed_attention(q, k_cmp, v_cmp, seqlen_k=length, **blocks)[1]
    return nsa_torch.select_blocks(q, k_cmp, lse, seqlen_k=length, **options)
