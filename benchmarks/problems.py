"""The tensors that the GPU bench measures on, random or correlated, and the calls of each op on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import nsa_torch
from shapes import Shape

CORRELATION = 0.95
BRANCHES = ("compressed_attention", "selected_attention", "window_attention")


class Problem(NamedTuple):
    """The tensors of `shape`; keys and values of the compressed, selected and window branches."""

    shape: Shape
    q: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    gates: Tensor
    grad: Tensor
    lists: Tensor  # the choice of q and the compressed keys
    lse: Tensor  # of the compressed branch
    weights: dict[str, Tensor]  # of compress

    def leaves(self) -> list[Tensor]:
        """What nsa_attention gives gradients for."""
        return [self.q, *(t for pair in zip(self.keys, self.values, strict=True) for t in pair), self.gates]


class Call(NamedTuple):
    """An op on a problem: what to run, what it gives gradients for, and the gradient that comes in."""

    run: Callable[[], Tensor]
    leaves: list[Tensor]
    grad: Tensor | None


def autoregressive(x: Tensor, coefficient: float = CORRELATION) -> Tensor:
    """Independent normal numbers (B, T, ...) made, in place, into a first-order process along T of the same variance.

    x_t = a x_(t-1) + sqrt(1 - a^2) e_t, by doubling the number of terms until they no longer count.
    """
    x[:, 1:] *= (1 - coefficient**2) ** 0.5
    shift = 1
    while shift < x.size(1) and coefficient**shift > 1e-6:
        x[:, shift:] += coefficient**shift * x[:, :-shift].clone()
        shift *= 2
    return x


def normal(size: tuple[int, ...], random: torch.Generator, dtype: torch.dtype, *, correlated: bool = False) -> Tensor:
    """(B, T, H, D) of zero mean and unit variance, made head by head in float32."""
    out = torch.empty(size, device=random.device, dtype=dtype)
    for head in range(size[2]):
        x = torch.randn(size[0], size[1], size[3], generator=random, device=random.device)
        out[:, :, head] = autoregressive(x) if correlated else x
    return out


def make_problem(shape: Shape, data: str, dtype: torch.dtype, device: str) -> Problem:
    """Random or correlated; every tensor but the lists and lse requires gradients."""
    random = torch.Generator(device).manual_seed(shape.seqlen_k)
    correlated = data == "correlated"
    batch = shape.batch
    rows, keys = (batch, shape.seqlen_q, shape.heads_q), (batch, shape.seqlen_k, shape.heads_kv)
    blocks = shape.options("block_size", "block_stride")
    k_slc, k_win = (normal((*keys, shape.dim_k), random, dtype, correlated=correlated) for _ in range(2))
    if correlated:  # the tokens of correlated keys: their means
        k_cmp = nsa_torch.compress(normal((*keys, shape.dim_k), random, dtype, correlated=True), **blocks)
    else:
        k_cmp = normal((batch, shape.blocks, shape.heads_kv, shape.dim_k), random, dtype)
    v_cmp = normal((batch, shape.blocks, shape.heads_kv, shape.dim_v), random, dtype)
    v_slc, v_win = (normal((*keys, shape.dim_v), random, dtype) for _ in range(2))
    q = normal((*rows, shape.dim_k), random, dtype, correlated=correlated)
    gates = torch.rand(*rows, 3, generator=random, device=random.device).to(dtype)
    grad = normal((*rows, shape.dim_v), random, dtype)
    _, lse = nsa_torch.compressed_attention(q, k_cmp, v_cmp, seqlen_k=shape.seqlen_k, **blocks)
    lists = nsa_torch.select_blocks(q, k_cmp, lse, seqlen_k=shape.seqlen_k, **blocks, **choice_of(shape))
    dim = shape.dim_k
    sizes = {
        "pe": (shape.block_size, dim),
        "w1": (dim, shape.block_size * dim),
        "b1": (dim,),
        "w2": (dim, dim),
        "b2": (dim,),
    }
    weights = {name: torch.randn(*size, generator=random, device=random.device) for name, size in sizes.items()}
    weights = {name: (w / w.size(-1) ** 0.5).to(dtype) for name, w in weights.items()}
    problem = Problem(shape, q, [k_cmp, k_slc, k_win], [v_cmp, v_slc, v_win], gates, grad, lists, lse, weights)
    for leaf in (*problem.leaves(), *weights.values()):
        leaf.requires_grad_()
    return problem


def choice_of(shape: Shape) -> dict[str, int]:
    """The options of select_blocks that compressed attention has not."""
    return shape.options("select_size", "num_selected", "num_initial", "num_local")


def calls(problem: Problem) -> dict[str, Call]:
    """Every op on the problem."""
    shape, q, keys, values = problem.shape, problem.q, problem.keys, problem.values
    blocks = shape.options("block_size", "block_stride")
    length = {"seqlen_k": shape.seqlen_k}
    (k_cmp, k_slc, k_win), (v_cmp, v_slc, v_win) = keys, values
    lists = problem.lists
    grad_cmp = torch.randn_like(k_cmp)
    return {
        "compress": Call(
            lambda: nsa_torch.compress(k_slc, **problem.weights, **blocks),
            [k_slc, *problem.weights.values()],
            grad_cmp,
        ),
        "compressed_attention": Call(
            lambda: nsa_torch.compressed_attention(q, k_cmp, v_cmp, **length, **blocks)[0],
            [q, k_cmp, v_cmp],
            problem.grad,
        ),
        "select_blocks": Call(
            lambda: nsa_torch.select_blocks(q, k_cmp, problem.lse, **length, **blocks, **choice_of(shape)), [], None
        ),
        "selected_attention": Call(
            lambda: nsa_torch.selected_attention(q, k_slc, v_slc, lists, select_size=shape.select_size)[0],
            [q, k_slc, v_slc],
            problem.grad,
        ),
        "window_attention": Call(
            lambda: nsa_torch.window_attention(q, k_win, v_win, window=shape.window)[0],
            [q, k_win, v_win],
            problem.grad,
        ),
        "nsa_attention": Call(lambda: whole(problem), problem.leaves(), problem.grad),
    }


def whole(problem: Problem) -> Tensor:
    """nsa_attention, choosing its blocks."""
    shape = problem.shape
    pairs = [t for pair in zip(problem.keys, problem.values, strict=True) for t in pair]
    options = shape.options("block_size", "block_stride", "window") | choice_of(shape)
    return nsa_torch.nsa_attention(problem.q, *pairs, problem.gates, **options)


def shared_choices(problem: Problem, samples: int = 4096) -> float | None:
    """The share of its free choices that a query has in common with the one before it: some rows of one sequence."""
    shape, lists = problem.shape, problem.lists[0]
    first = shape.num_selected * shape.select_size  # from here on every list is full
    if shape.seqlen_q != shape.seqlen_k or shape.seqlen_q <= first + 1:
        return None
    rows = torch.linspace(first + 1, shape.seqlen_q - 1, samples, device=lists.device).long().unique()
    own = (rows // shape.select_size)[:, None, None]

    def free(chosen: Tensor) -> Tensor:
        return (chosen >= shape.num_initial) & (chosen <= own - shape.num_local)

    now, before = lists[rows], lists[rows - 1]
    common = (now[..., None] == before[..., None, :]) & free(now)[..., None] & free(before)[..., None, :]
    return (common.sum() / free(now).sum()).item()
