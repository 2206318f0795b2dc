"""The reference itself, against the equations written out in plain Python, one query at a time."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from helpers import assert_close, make_inputs
from nsa_torch import reference
from shapes import ADVERSARIAL, Shape

SHAPES = [s for s in ADVERSARIAL if s.seqlen_q * s.seqlen_k * s.batch <= 2500]
Branch = tuple[list[float], float]


def softmax_attention(query: list[float], keys: list[list[float]], values: list[list[float]], width: int) -> Branch:
    """Eq. 1 and 2 for one query: output and lse."""
    if not keys:
        return [0.0] * width, -math.inf
    scores = [sum(a * b for a, b in zip(query, key, strict=True)) / math.sqrt(len(query)) for key in keys]
    highest = max(scores)
    weights = [math.exp(s - highest) for s in scores]
    total = sum(weights)
    out = [sum(w * value[c] for w, value in zip(weights, values, strict=True)) / total for c in range(width)]
    return out, highest + math.log(total)


def choose(shape: Shape, position: int, queries: list[list[float]], keys: list[list[float]]) -> list[int]:
    """Eq. 9 to 11 for one query and group: `keys` are the compressed ones that it sees."""
    importance = [0.0] * shape.selection_blocks
    for query in queries:
        lse = softmax_attention(query, keys, keys, 0)[1]
        for m, key in enumerate(keys):
            score = sum(a * b for a, b in zip(query, key, strict=True)) / math.sqrt(len(query))
            covered = range(m * shape.block_stride, m * shape.block_stride + shape.block_size, shape.block_stride)
            for piece in covered:
                importance[piece // shape.select_size] += math.exp(score - lse)
    own = position // shape.select_size
    forced = {j for j in range(own + 1) if j < shape.num_initial or j > own - shape.num_local}
    others = sorted(set(range(own + 1)) - forced, key=lambda j: (-importance[j], j))
    chosen = sorted([*forced, *others[: shape.num_selected - len(forced)]])
    return chosen + [-1] * (shape.num_selected - len(chosen))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_loops(shape: Shape) -> None:
    inputs = make_inputs("nsa_attention", shape).replace(block_indices=None)
    x = inputs.tensors
    lists = torch.empty(shape.batch, shape.seqlen_q, shape.heads_kv, shape.num_selected, dtype=torch.int32)
    outs = torch.empty(3, shape.batch, shape.seqlen_q, shape.heads_q, shape.dim_v, dtype=torch.float64)
    lses = torch.empty(3, shape.batch, shape.heads_q, shape.seqlen_q, dtype=torch.float64)
    for b in range(shape.batch):
        for i in range(shape.seqlen_q):
            p = shape.seqlen_k - shape.seqlen_q + i
            for h in range(shape.heads_kv):
                k_cmp, v_cmp, k_slc, v_slc, k_win, v_win = (t[b, :, h].tolist() for n, t in x.items() if n[0] in "kv")
                group = range(h * shape.group, (h + 1) * shape.group)
                queries = x["q"][b, i, list(group)].tolist()
                seen = [m for m in range(shape.blocks) if m * shape.block_stride + shape.block_size - 1 <= p]
                blocks = choose(shape, p, queries, [k_cmp[m] for m in seen])
                lists[b, i, h] = torch.tensor(blocks)
                listed = [j for j in range(p + 1) if j // shape.select_size in blocks]
                window = [j for j in range(p + 1) if j > p - shape.window]
                for head, query in zip(group, queries, strict=True):
                    branches = ((k_cmp, v_cmp, seen), (k_slc, v_slc, listed), (k_win, v_win, window))
                    for n, (k, v, rows) in enumerate(branches):
                        out, lse = softmax_attention(query, [k[j] for j in rows], [v[j] for j in rows], shape.dim_v)
                        outs[n, b, i, head] = torch.tensor(out, dtype=torch.float64)
                        lses[n, b, head, i] = lse
    _assert_reference_gives(shape, x, lists, outs, lses)
    expected = (x["gates"].permute(3, 0, 1, 2)[..., None] * outs).sum(0)
    assert_close({"out": reference.nsa_attention(**x, **inputs.options)}, {"out": expected}, 1e-12)


def _assert_reference_gives(shape: Shape, x: dict[str, Tensor], lists: Tensor, outs: Tensor, lses: Tensor) -> None:
    blocks = shape.options("block_size", "block_stride") | {"seqlen_k": shape.seqlen_k}
    choice = shape.options("select_size", "num_selected", "num_initial", "num_local")
    cmp = reference.compressed_attention(x["q"], x["k_cmp"], x["v_cmp"], **blocks)
    assert torch.equal(reference.select_blocks(x["q"], x["k_cmp"], cmp[1], **blocks, **choice), lists)
    slc = reference.selected_attention(x["q"], x["k_slc"], x["v_slc"], lists, select_size=shape.select_size)
    win = reference.window_attention(x["q"], x["k_win"], x["v_win"], window=shape.window)
    for n, (out, lse) in enumerate((cmp, slc, win)):
        assert_close({"out": out, "lse": lse}, {"out": outs[n], "lse": lses[n]}, 1e-12)
