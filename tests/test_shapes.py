"""The list of shapes and its cost model: what the benchmarks divide by."""

from __future__ import annotations

import pytest
import torch

import nsa_torch
from helpers import make_inputs
from nsa_torch import reference
from shapes import ADVERSARIAL, CPU, DECODE, GPU, OPS, TILED, Shape, cost, visible_pairs

COUNTED = [s for s in (*ADVERSARIAL, *TILED) if s.batch > 0 and s.seqlen_q > 0 and s.num_local > 0]


def test_names_are_unique() -> None:
    names = [shape.name for shape in (*ADVERSARIAL, *TILED, *CPU, *GPU, *DECODE)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("shape", COUNTED, ids=str)
def test_counts_the_pairs_that_are_scored(shape: Shape) -> None:
    """With queries of zero, every visible key weighs one: exp(lse) is their number."""
    x = make_inputs("nsa_attention", shape).tensors
    q = torch.zeros_like(x["q"])
    blocks = shape.options("block_size", "block_stride") | {"seqlen_k": shape.seqlen_k}
    choice = shape.options("select_size", "num_selected", "num_initial", "num_local")
    lse = {"compressed_attention": nsa_torch.compressed_attention(q, x["k_cmp"], x["v_cmp"], **blocks)[1]}
    lists = nsa_torch.select_blocks(q, x["k_cmp"], lse["compressed_attention"], **blocks, **choice)
    lse["selected_attention"] = nsa_torch.selected_attention(
        q, x["k_slc"], x["v_slc"], lists, select_size=shape.select_size
    )[1]
    lse["window_attention"] = nsa_torch.window_attention(q, x["k_win"], x["v_win"], window=shape.window)[1]
    lse["dense_attention"] = reference.dense_attention(q, x["k_win"], x["v_win"])[1]
    for op, value in lse.items():
        assert value[0, 0].exp().sum().item() == pytest.approx(visible_pairs(op, shape)), op


def test_paper_layer_at_64k() -> None:
    """Figures worked out by hand for 64 query heads of 128 at 65,536 tokens, in whole blocks: up to 4 % too many."""
    shape = GPU[6]
    assert shape.seqlen_q == 65536
    tera = 1e12
    dense_pairs = 65536 * 65537 / 2
    assert cost("dense_attention", shape).forward_flops == 4 * 128 * 64 * dense_pairs
    assert cost("dense_attention", shape).backward_flops == 10 * 128 * 64 * dense_pairs
    for op, forward, backward in [
        ("compressed_attention", 4.4, 11.0),
        ("select_blocks", 2.2, 0.0),
        ("selected_attention", 2.2, 5.5),
        ("window_attention", 1.1, 2.75),
    ]:
        assert cost(op, shape).forward_flops / tera == pytest.approx(forward, rel=0.05), op
        assert cost(op, shape).backward_flops / tera == pytest.approx(backward, rel=0.05), op


def test_decoding_reads_what_the_paper_says() -> None:
    """Table 4: 5,632 tokens of keys and values at 64k, where dense attention reads 65,536."""
    shape = next(s for s in DECODE if s.name == "decode_64k_batch_1")
    token = 4 * (128 + 128) * 2
    assert cost("nsa_attention", shape).forward_bytes / token == pytest.approx(5632, rel=0.02)
    assert cost("dense_attention", shape).forward_bytes / token == pytest.approx(65536, rel=0.01)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("shape", (ADVERSARIAL[0], ADVERSARIAL[3], CPU[0]), ids=str)
def test_costs_are_whole_and_not_negative(op: str, shape: Shape) -> None:
    counted = cost(op, shape, itemsize=4)
    for value in vars(counted).values():
        assert isinstance(value, int) and value >= 0
    if shape is CPU[0]:
        assert counted.forward_flops > 0 and counted.forward_bytes > 0
        assert (counted.backward_flops > 0) == (op != "select_blocks")
