"""How a choice of blocks is judged: its form, and by how much a better block was left out."""

from __future__ import annotations

import torch
from torch import Tensor

import nsa_torch
from helpers import CHOICE_OPTIONS, Inputs, Target
from nsa_torch import reference
from shapes import Shape


def check_choice(exact: Inputs, shape: Shape, target: Target) -> None:
    """select_blocks of a dense call in float64, rounded: as good as the scores in the target's dtype can tell."""
    given = exact.to(target.device, target.dtype)
    given = given.replace(lse=exact.tensors["lse"].to(target.device, torch.float32))
    lists = nsa_torch.select_blocks(**given.tensors, **given.options)
    assert_as_good(lists, given, shape, target.dtype)


def assert_as_good(lists: Tensor, given: Inputs, shape: Shape, dtype: torch.dtype) -> None:
    """A valid choice, and no chosen block falls behind one left out by more than the scores themselves err."""
    lists = lists.cpu()
    assert_valid(lists, shape)
    truth = importance_of(given.to(given.device, torch.float64)).cpu()
    if truth.numel() == 0:
        return
    baseline = importance_of(given).to("cpu", torch.float64)
    allowed = 2 * (baseline - truth).abs().max() + 4 * torch.finfo(dtype).eps * truth.abs().max()
    gap = gap_of(lists, truth, shape)
    assert gap <= allowed, f"a block ahead by {gap:.3g} was left out, allowed {allowed:.3g}"


def assert_valid(lists: Tensor, shape: Shape) -> None:
    """Ascending, -1 last, no duplicate, selectable blocks only, forced ones among them, full."""
    n, count = shape.num_selected, shape.selection_blocks
    assert lists.dtype == torch.int32
    assert lists.shape == (shape.batch, shape.seqlen_q, shape.heads_kv, n)
    member, own = _membership(lists, shape)
    listed = lists >= 0
    both = listed[..., 1:] & listed[..., :-1]
    assert (lists.diff(dim=-1)[both] > 0).all(), "not ascending, or a duplicate"
    assert not (listed[..., 1:] & ~listed[..., :-1]).any(), "-1 is not last"
    assert (lists >= -1).all() and (lists <= own).all(), "not selectable"
    block = torch.arange(count)
    forced = (block <= own) & ((block < shape.num_initial) | (block > own - shape.num_local))
    assert (member | ~forced).all(), "a forced block is missing"
    assert torch.equal(listed.sum(-1), (own + 1).clamp(max=n)[..., 0].expand(listed.shape[:-1]))


def _membership(lists: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
    """(B, Tq, Hkv, J) whether each block is listed, and (Tq, 1, 1) each query's own block."""
    count = shape.selection_blocks
    member = torch.zeros(*lists.shape[:-1], count + 1, dtype=torch.bool)
    index = torch.where(lists < 0, count, lists).long()
    position = torch.arange(shape.seqlen_k - shape.seqlen_q, shape.seqlen_k)
    own = (position // shape.select_size)[:, None, None]
    return member.scatter(-1, index, True)[..., :count], own


def gap_of(lists: Tensor, importance: Tensor, shape: Shape) -> float:
    """By how much the best block left out beats the worst one chosen freely, over all rows."""
    member, own = _membership(lists, shape)
    block = torch.arange(shape.selection_blocks)
    forced = (block < shape.num_initial) | ((block > own - shape.num_local) & (block <= own))
    left_out = importance.masked_fill(member | (block > own), -torch.inf).amax(-1)
    chosen = importance.masked_fill(~member | forced, torch.inf).amin(-1)
    return (left_out - chosen).max().item()


def lse_of(inputs: Inputs) -> Tensor:
    call = {k: v for k, v in inputs.options.items() if k not in CHOICE_OPTIONS[2:]}
    q, k_cmp = inputs.tensors["q"], inputs.tensors["k_cmp"]
    return reference.compressed_attention(q, k_cmp, k_cmp, **call)[1]


def importance_of(inputs: Inputs) -> Tensor:
    call = {k: v for k, v in inputs.options.items() if k not in CHOICE_OPTIONS[3:]}
    return reference.block_importance(**inputs.tensors, **call)
