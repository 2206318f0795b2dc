"""Results on a few rows of a long call in float64, without anything of size T x T: the error beside a measured time.

The rows checked are some queries anywhere, and the last ones: no other query sees the keys from there on, so their
gradients are complete. A branch is described by `visible`, which says for positions (R,) what each sees: (R, J).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nsa_torch import reference
from shapes import Shape

Visible = Callable[[Tensor], Tensor]

TAIL = 8


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> Tensor:
    """One group: q (R, G, Dk), k (J, Dk), v (J, Dv), visible (R, J) -> (R, G, Dv)."""
    seen = visible.any(-1)[:, None, None]
    scores = torch.einsum("rgc,jc->rgj", q, k) * scale
    scores = scores.masked_fill(~visible[:, None], -torch.inf).masked_fill(~seen, 0.0)
    weights = scores.softmax(-1).masked_fill(~seen, 0.0)
    return torch.einsum("rgj,jc->rgc", weights, v)


def visibility(op: str, shape: Shape, lists: Tensor | None, device: torch.device) -> Visible:
    """What each position of one KV head sees; `lists` (T, n) are the blocks of selected attention."""
    key = torch.arange(shape.blocks if op == "compressed_attention" else shape.seqlen_k, device=device)
    if op == "compressed_attention":
        return lambda p: key * shape.block_stride + shape.block_size - 1 <= p[:, None]
    if op == "window_attention":
        return lambda p: (key <= p[:, None]) & (key > p[:, None] - shape.window)
    assert lists is not None

    def listed(p: Tensor) -> Tensor:
        rows = lists[p - (shape.seqlen_k - shape.seqlen_q)].long()
        member = torch.zeros(len(p), shape.selection_blocks + 1, dtype=torch.bool, device=device)
        member.scatter_(1, rows.masked_fill(rows < 0, shape.selection_blocks), True)
        return member[:, key // shape.select_size] & (key <= p[:, None])

    return listed


def checked_rows(shape: Shape) -> list[int]:
    """Queries to look at: the first, some between, and the last TAIL."""
    count = shape.seqlen_q
    between = {0, count // 7, count // 3, count // 2, max(0, count - 1 - shape.select_size)}
    return sorted(r for r in between if r < count - TAIL) + list(range(max(0, count - TAIL), count))


def first_of_the_tail(op: str, shape: Shape) -> int:
    """The first key, or compressed block, that only the last TAIL queries see."""
    position = shape.seqlen_k - min(TAIL, shape.seqlen_q)
    if op != "compressed_attention":
        return position
    return max(0, -(-(position - shape.block_size + 1) // shape.block_stride))


class Errors:
    """The largest difference of each result over the largest value of its truth."""

    def __init__(self) -> None:
        self.difference: dict[str, float] = {}
        self.size: dict[str, float] = {}

    def add(self, name: str, actual: Tensor, truth: Tensor) -> None:
        """One more piece of a result."""
        if truth.numel() == 0:
            return
        difference = (actual.detach().double() - truth.detach()).abs().max()
        difference = torch.where(difference.isnan(), torch.inf, difference)
        self.difference[name] = max(self.difference.get(name, 0.0), difference.item())
        self.size[name] = max(self.size.get(name, 0.0), truth.detach().abs().max().item())

    def relative(self) -> dict[str, float]:
        """By result; a truth of zeros counts as of size 1."""
        return {name: value / (self.size[name] or 1.0) for name, value in self.difference.items()}


def branch_errors(
    ops: Sequence[str],
    shape: Shape,
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    results: dict[str, Tensor],
    *,
    gates: Tensor | None = None,
    lists: Tensor | None = None,
    grad_out: Tensor | None = None,
) -> dict[str, float]:
    """Relative errors of `results`: out, and, when grad_out is given, grad_q and grad_k_0, grad_v_0, ...

    q (B, Tq, Hq, Dk); keys and values (B, J, Hkv, .), one of each for each of `ops`; gates, when given,
    (B, Tq, Hq, 3) weigh the branches; lists (B, Tq, Hkv, n). Rows of the first sequence are looked at.
    """
    rows = torch.tensor(checked_rows(shape), device=q.device)
    tail = rows >= shape.seqlen_q - TAIL
    position = rows + shape.seqlen_k - shape.seqlen_q
    scale, errors = q.size(-1) ** -0.5, Errors()
    for head in range(shape.heads_kv):
        group = slice(head * shape.group, (head + 1) * shape.group)
        own = None if lists is None else lists[0, :, head]
        q_rows = q[0, rows, group].detach().double().requires_grad_()
        leaves = [
            [t[0, :, head].detach().double().requires_grad_() for t in pair] for pair in zip(keys, values, strict=True)
        ]
        outs = [
            attend(q_rows, k, v, visibility(op, shape, own, q.device)(position), scale)
            for op, (k, v) in zip(ops, leaves, strict=True)
        ]
        weights = [1.0] if gates is None else [gates[0, rows, group, b, None].double() for b in range(len(ops))]
        out = sum(weight * part for weight, part in zip(weights, outs, strict=True))
        assert isinstance(out, Tensor)
        errors.add("out", results["out"][0, rows, group], out)
        if grad_out is None:
            continue
        cotangent = grad_out[0, rows, group].double()
        (grad_q,) = torch.autograd.grad(out, q_rows, cotangent, retain_graph=True)
        errors.add("grad_q", results["grad_q"][0, rows, group], grad_q)
        flat = [t for pair in leaves for t in pair]
        grads = torch.autograd.grad(out, flat, cotangent * tail[:, None, None])
        for b, op in enumerate(ops):
            first = first_of_the_tail(op, shape)
            for name, grad in zip(("grad_k", "grad_v"), grads[2 * b : 2 * b + 2], strict=True):
                errors.add(f"{name}_{b}", results[f"{name}_{b}"][0, first:, head], grad[first:])
    return errors.relative()


def choice_error(shape: Shape, q: Tensor, k_cmp: Tensor, lse: Tensor, lists: Tensor) -> float:
    """By how much a block left out beats one chosen freely, over the highest importance: for the last queries."""
    count = min(TAIL, shape.seqlen_q)
    tail = slice(shape.seqlen_q - count, None)
    sizes = shape.options("block_size", "block_stride", "select_size") | {"seqlen_k": shape.seqlen_k}
    tensors = (q[:, tail].detach().double(), k_cmp.detach().double(), lse[:, :, tail].detach().double())
    importance = reference.block_importance(*tensors, **sizes)  # (B, count, Hkv, J)
    chosen = lists[:, tail].long()
    member = torch.zeros(*chosen.shape[:-1], shape.selection_blocks + 1, dtype=torch.bool, device=q.device)
    member = member.scatter(-1, chosen.masked_fill(chosen < 0, shape.selection_blocks), True)[..., :-1]
    block = torch.arange(shape.selection_blocks, device=q.device)
    own = (torch.arange(shape.seqlen_k - count, shape.seqlen_k, device=q.device) // shape.select_size)[:, None, None]
    forced = (block < shape.num_initial) | (block > own - shape.num_local)
    left_out = importance.masked_fill(member | (block > own), -torch.inf).amax(-1)
    worst = importance.masked_fill(~member | forced, torch.inf).amin(-1)
    gap = (left_out - worst).nan_to_num(nan=-torch.inf).max().clamp_min(0.0)
    return (gap / importance.max().clamp_min(1e-30)).item()
