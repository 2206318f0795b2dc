"""nsa_torch.selected_attention: attention over listed blocks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import nsa_torch
from helpers import Target, assert_close, check_op, evaluate, make_inputs, sharpest
from nsa_torch import reference
from shapes import ADVERSARIAL, TILED, Shape

OP = "selected_attention"
SMALL = ADVERSARIAL[11]


@pytest.mark.parametrize("shape", ADVERSARIAL + TILED, ids=str)
def test_matches_reference(shape: Shape, target: Target) -> None:
    """Lists in any order, with -1 among them and with blocks after the query."""
    check_op(OP, make_inputs(OP, shape), target)


@pytest.mark.parametrize("shape", (SMALL, TILED[1]), ids=str)
def test_low_precision(shape: Shape, low_precision: Target) -> None:
    check_op(OP, make_inputs(OP, shape), low_precision)


@pytest.mark.parametrize("scale", [0.0, 0.3, -0.5, 4.0])
def test_scale(scale: float, target: Target) -> None:
    check_op(OP, make_inputs(OP, SMALL).replace(scale=scale), target)


@pytest.mark.parametrize("queries", [1, 9])
def test_gradcheck(queries: int, gradcheck_attention) -> None:
    shape = Shape("gradcheck", queries, 9, 4, 2, 3, 2, select_size=4, num_selected=2)
    gradcheck_attention(OP, make_inputs(OP, shape))


@pytest.mark.parametrize("shape", ADVERSARIAL, ids=str)
def test_all_blocks_are_dense_attention(shape: Shape) -> None:
    inputs = _with_lists(make_inputs(OP, shape), range(shape.selection_blocks))
    actual = evaluate(nsa_torch.selected_attention, inputs)
    del inputs.options["select_size"], inputs.tensors["block_indices"]
    assert_close(actual, evaluate(reference.dense_attention, inputs), 1e-10)


def test_reads_the_listed_blocks_and_no_later_key(device: str) -> None:
    """With equal keys, out is the mean of the values of the listed blocks up to the query."""
    k, v = torch.zeros(1, 20, 1, 4, device=device), torch.randn(1, 20, 1, 3, device=device)
    q = torch.randn(1, 20, 2, 4, device=device)
    lists = torch.tensor([4, -1, 1], dtype=torch.int32, device=device).expand(1, 20, 1, 3)
    out, lse = nsa_torch.selected_attention(q, k, v, lists, select_size=4)
    for p in range(20):
        keys = [j for j in range(p + 1) if j // 4 in (1, 4)]
        expected = v[0, keys, 0].mean(0) if keys else torch.zeros(3, device=device)
        torch.testing.assert_close(out[0, p], expected.expand(2, 3))
        torch.testing.assert_close(lse[0, :, p].cpu(), torch.full((2,), len(keys)).log())


@pytest.mark.parametrize("entries", [0, 1, 3])
def test_empty_lists(entries: int, device: str) -> None:
    """Nothing listed: zeros, -inf, and zero gradients."""
    x = make_inputs(OP, SMALL).to(device, torch.float32).tensors
    leaves = {name: x[name].requires_grad_() for name in ("q", "k", "v")}
    lists = x["block_indices"].new_full((3, 31, 2, entries), -1)
    out, lse = nsa_torch.selected_attention(**leaves, block_indices=lists, select_size=16)
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.equal(lse, torch.full_like(lse, -torch.inf))
    torch.autograd.backward([out, lse], [torch.ones_like(out), torch.ones_like(lse)])
    for name, leaf in leaves.items():
        assert leaf.grad is not None and torch.equal(leaf.grad, torch.zeros_like(leaf)), name


def test_order_of_the_list_does_not_matter(device: str) -> None:
    inputs = make_inputs(OP, TILED[0]).to(device, sharpest(device)[0])
    lists = inputs.tensors["block_indices"]
    shuffled = lists[..., torch.randperm(lists.size(-1), generator=torch.Generator().manual_seed(0))]
    padded = torch.nn.functional.pad(shuffled, (2, 1), value=-1)
    expected = evaluate(nsa_torch.selected_attention, inputs)
    actual = evaluate(nsa_torch.selected_attention, inputs.replace(block_indices=padded))
    assert_close(actual, expected, sharpest(device)[1])


def test_heads_of_a_group_share_a_list(device: str) -> None:
    """KV head h's list rules query heads h G .. h G + G - 1 and no others."""
    inputs = _with_lists(make_inputs(OP, SMALL).to(device, torch.float32), [0])
    before = nsa_torch.selected_attention(**inputs.tensors, select_size=16)[0]
    lists = inputs.tensors["block_indices"].clone()
    lists[:, :, 1] = 1
    inputs = inputs.replace(block_indices=lists)
    after = nsa_torch.selected_attention(**inputs.tensors, select_size=16)[0]
    changed = (before != after).any(-1).any(1).any(0)
    assert changed.tolist() == [False, False, True, True]


@pytest.mark.parametrize("select_size", [1, 5, 64, 1000])
def test_select_sizes(select_size: int, target: Target) -> None:
    shape = replace(SMALL, name=f"select_{select_size}", select_size=select_size, block_stride=1)
    check_op(OP, make_inputs(OP, shape), target)


def _with_lists(inputs, blocks) -> Tensor:
    lists = inputs.tensors["block_indices"]
    row = torch.tensor(list(blocks), dtype=torch.int32, device=lists.device)
    return inputs.replace(block_indices=row.expand(*lists.shape[:-1], -1))
