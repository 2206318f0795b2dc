"""nsa_torch.select_blocks: which blocks each query and KV head reads."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import nsa_torch
from choices import assert_valid, check_choice, gap_of, importance_of, lse_of
from helpers import Target, make_inputs
from nsa_torch import reference
from shapes import ADVERSARIAL, TILED, Shape

OP = "select_blocks"
SMALL = ADVERSARIAL[11]


@pytest.mark.parametrize("shape", ADVERSARIAL + TILED, ids=str)
def test_matches_reference(shape: Shape) -> None:
    inputs = make_inputs(OP, shape)
    lists = nsa_torch.select_blocks(**inputs.tensors, **inputs.options)
    assert_valid(lists, shape)
    assert torch.equal(lists, reference.select_blocks(**inputs.tensors, **inputs.options))


@pytest.mark.parametrize("shape", [SMALL, *(s for s in ADVERSARIAL if s.group != 2), *TILED], ids=str)
def test_low_precision(shape: Shape, low_precision: Target) -> None:
    """No chosen block may fall behind one left out by more than the scores themselves err."""
    check_choice(make_inputs(OP, shape), shape, low_precision)


def test_gap_sees_a_wrong_choice() -> None:
    """The judge of the test above is not blind: one wrong block among all rows exceeds it."""
    shape = replace(TILED[0], num_selected=4)
    inputs = make_inputs(OP, shape)
    truth = importance_of(inputs)
    lists = reference.select_blocks(**inputs.tensors, **inputs.options)
    assert gap_of(lists, truth, shape) <= 0
    _, best, *local = lists[0, -1, 0].tolist()
    assert local == [11, 12]
    worst = truth[0, -1, 0, 1:11].argmin().item() + 1
    lists[0, -1, 0, 1] = worst
    difference = truth[0, -1, 0, best] - truth[0, -1, 0, worst]
    assert gap_of(lists, truth, shape) == pytest.approx(difference.item())


def test_overlap_weights(device: str) -> None:
    """l=32, d=16, l'=64: probability of block m counts 1, 2, 2, 2, 1 for m = 4j-1 .. 4j+3."""
    length, special = 64 * 12, 5
    for m, shares in [
        (4 * special - 2, {special - 1: 2}),
        (4 * special - 1, {special - 1: 1, special: 1}),
        (4 * special, {special: 2}),
        (4 * special + 2, {special: 2}),
        (4 * special + 3, {special: 1, special + 1: 1}),
    ]:
        k = torch.zeros(1, reference.num_blocks(length), 1, 4, dtype=torch.float64, device=device)
        k[0, m] = 100.0  # all of the softmax
        q = torch.ones(1, 1, 2, 4, dtype=torch.float64, device=device)
        call: dict[str, Any] = {"seqlen_k": length}
        lse = reference.compressed_attention(q, k, k, **call)[1]
        importance = reference.block_importance(q, k, lse, **call)[0, 0, 0]
        expected = torch.zeros(12, dtype=torch.float64, device=device)
        for block, weight in shares.items():
            expected[block] = 2 * weight  # two heads
        torch.testing.assert_close(importance, expected)
        lists = nsa_torch.select_blocks(
            q.float(), k.float(), lse.float(), **call, num_selected=len(shares), num_initial=0, num_local=0
        )
        assert lists.flatten().tolist() == list(shares)


def test_ties_go_to_the_lower_index(device: str) -> None:
    """Equal scores everywhere: inner blocks tie exactly, and the first of them win."""
    shape = replace(TILED[0], num_selected=6)
    inputs = make_inputs(OP, shape).to(device, torch.float32)
    inputs = inputs.replace(q=torch.zeros_like(inputs.tensors["q"]))
    inputs = inputs.replace(lse=lse_of(inputs))
    lists = nsa_torch.select_blocks(**inputs.tensors, **inputs.options)
    assert lists[0, 780, 0].tolist() == [0, 1, 2, 3, 11, 12]
    assert lists[0, 700, 0].tolist() == [0, 1, 2, 3, 9, 10]
    assert lists[0, 250, 0].tolist() == [0, 1, 2, 3, -1, -1]


def test_repeated_keys_tie() -> None:
    """Blocks whose keys are equal tie, and the lower index wins: here exactly, in integers."""
    shape = replace(TILED[0], heads_q=2, dim_k=4, num_selected=5)
    random = torch.Generator().manual_seed(2)
    inputs = make_inputs(OP, shape)
    blocks = shape.blocks
    pattern = torch.randint(-2, 3, (1, 4, 1, 4), generator=random).double()
    k_cmp = pattern.repeat(1, blocks // 4 + 1, 1, 1)[:, :blocks]
    q = torch.randint(-2, 3, inputs.tensors["q"].shape, generator=random).double()
    inputs = inputs.replace(q=q, k_cmp=k_cmp)
    inputs = inputs.replace(lse=lse_of(inputs))
    expected = reference.select_blocks(**inputs.tensors, **inputs.options)
    assert expected[0, 780, 0].tolist() == [0, 1, 2, 11, 12]
    actual = nsa_torch.select_blocks(**inputs.tensors, **inputs.options)
    assert torch.equal(actual, expected)


def test_no_score_beats_a_forced_block(device: str) -> None:
    """Even with all of the softmax elsewhere, and for queries that see no compressed block."""
    shape = replace(SMALL, seqlen_q=64, seqlen_k=64, batch=1, num_selected=3)
    inputs = make_inputs(OP, shape).to(device, torch.float32)
    k_cmp = torch.zeros_like(inputs.tensors["k_cmp"])
    k_cmp[:, 5] = 1e4  # keys 20 .. 27: inside block 1
    q = torch.ones_like(inputs.tensors["q"])
    inputs = inputs.replace(q=q, k_cmp=k_cmp)
    inputs = inputs.replace(lse=lse_of(inputs))
    lists = nsa_torch.select_blocks(**inputs.tensors, **inputs.options)
    assert_valid(lists.cpu(), shape)
    assert lists[0, 0, 0].tolist() == [0, -1, -1]
    assert lists[0, 63, 0].tolist() == [0, 2, 3]


@pytest.mark.parametrize("name", ["q", "k_cmp", "lse"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_broken_input_gives_valid_lists(name: str, value: float, device: str) -> None:
    """No crash, valid lists everywhere, and the sequences beside the broken one as ever."""
    shape = replace(SMALL, seqlen_q=67, seqlen_k=67, num_selected=3, num_local=1)
    inputs = make_inputs(OP, shape).to(device, torch.float32)
    before = nsa_torch.select_blocks(**inputs.tensors, **inputs.options)
    broken = inputs.tensors[name].clone()
    broken[1].view(-1)[::3] = value
    after = nsa_torch.select_blocks(**inputs.replace(**{name: broken}).tensors, **inputs.options)
    assert_valid(after.cpu(), shape)
    assert torch.equal(after[[0, 2]], before[[0, 2]])


def test_nan_counts_as_lowest(device: str) -> None:
    """A key that is NaN makes the blocks it overlaps the last to be chosen."""
    shape = replace(SMALL, seqlen_q=1, seqlen_k=16 * 7, batch=1, heads_kv=1, num_selected=5, num_local=1)
    inputs = make_inputs(OP, shape).to(device, torch.float32)
    k_cmp = inputs.tensors["k_cmp"].clone()
    lse = lse_of(inputs)
    k_cmp[0, 9] = torch.nan  # keys 36 .. 43: inside block 2
    inputs = inputs.replace(k_cmp=k_cmp, lse=lse)
    lists = nsa_torch.select_blocks(**inputs.tensors, **inputs.options)
    assert 2 not in lists.flatten().tolist()
    inputs.options["num_selected"] = 7
    lists = nsa_torch.select_blocks(**inputs.tensors, **inputs.options)
    assert lists.flatten().tolist() == list(range(7))


def test_carries_no_gradient(device: str) -> None:
    inputs = make_inputs(OP, SMALL).to(device, torch.float32)
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.tensors.items()}
    lists = nsa_torch.select_blocks(**leaves, **inputs.options)
    assert lists.dtype == torch.int32
    assert not lists.requires_grad
