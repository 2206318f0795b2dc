"""Packed sequences: cu_seqlens_q, cu_seqlens_k, seqused_k."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import nsa_torch
from helpers import (
    DIFFERENTIABLE_OPS,
    OPS,
    Inputs,
    Target,
    assert_close,
    check_op,
    cumulative,
    evaluate,
    make_packed_inputs,
    sharpest,
)
from nsa_torch import reference
from shapes import ADVERSARIAL, TILED, Shape

SMALL = replace(ADVERSARIAL[11], num_selected=3, num_local=1)
PAPER = replace(TILED[0], heads_q=2, num_selected=5)

Lengths = Sequence[tuple[int, int]]
CASES: dict[str, tuple[Shape, Lengths]] = {
    "training": (SMALL, [(t, t) for t in (17, 0, 1, 7, 8, 9, 15, 16, 31, 0)]),
    "chunks": (SMALL, [(5, 40), (1, 1), (0, 9), (13, 13), (1, 67)]),
    "decode": (SMALL, [(1, t) for t in (1, 7, 8, 40, 67)]),
    "one_sequence": (SMALL, [(31, 31)]),
    "only_empty": (SMALL, [(0, 0), (0, 0)]),
    "no_sequence": (SMALL, []),
    "all_shorter_than_a_block": (SMALL, [(t, t) for t in (7, 3, 7, 5)]),
    "paper_options": (PAPER, [(300, 300), (0, 0), (70, 200), (129, 129)]),
    "781_2048": (PAPER, [(781, 781), (1267, 1267)]),
}
cases = pytest.mark.parametrize("case", CASES)


@pytest.mark.parametrize("op", DIFFERENTIABLE_OPS)
@cases
def test_matches_reference(op: str, case: str, target: Target) -> None:
    check_op(op, make_packed_inputs(op, *CASES[case]), target)


@cases
def test_choice_matches_reference(case: str) -> None:
    inputs = make_packed_inputs("select_blocks", *CASES[case])
    lists = nsa_torch.select_blocks(**inputs.tensors, **inputs.options)
    assert torch.equal(lists, reference.select_blocks(**inputs.tensors, **inputs.options))
    whole = make_packed_inputs("nsa_attention", *CASES[case]).replace(block_indices=None)
    check_op("nsa_attention", whole)


@pytest.mark.parametrize("op", DIFFERENTIABLE_OPS)
def test_low_precision(op: str, low_precision: Target) -> None:
    check_op(op, make_packed_inputs(op, *CASES["paper_options"]), low_precision)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("case", ["training", "chunks", "paper_options"])
def test_equals_separate_sequences(op: str, case: str, device: str) -> None:
    """Each packed sequence gives, outputs and gradients, what it gives as a dense call alone."""
    shape, lengths = CASES[case]
    inputs = make_packed_inputs(op, shape, lengths).to(device, sharpest(device)[0])
    function = getattr(nsa_torch, op)

    def separately(**call: Tensor) -> Tensor | tuple[Tensor, ...]:
        parts = [function(**alone) for alone in _separate(call, shape, lengths)]
        if not isinstance(parts[0], tuple):
            tokens = torch.cat(parts, 1)[0]
            spare = inputs.tensors["x"].size(0) // shape.block_stride if op == "compress" else 0
            return _with_zeros(tokens, max(spare, tokens.size(0)))
        out, lse = zip(*parts, strict=True)
        return torch.cat(out, 1)[0], torch.cat(lse, 2)[0]

    if op == "select_blocks":
        call = inputs.tensors | inputs.options
        assert torch.equal(function(**call), separately(**call))
    else:
        expected = evaluate(separately, inputs)
        assert_close(evaluate(function, inputs), expected, sharpest(device)[1])


@pytest.mark.parametrize("op", [op for op in OPS if op != "compress"])
@pytest.mark.parametrize("maxima", ["exact", "loose"])
def test_max_seqlen_changes_nothing(op: str, maxima: str, device: str) -> None:
    shape, lengths = CASES["chunks"]
    inputs = make_packed_inputs(op, shape, lengths).to(device, sharpest(device)[0])
    longest = [max(side) for side in zip(*lengths, strict=True)]
    slack = 0 if maxima == "exact" else 1000
    given = inputs.replace(max_seqlen_q=longest[0] + slack, max_seqlen_k=longest[1] + slack)
    _assert_same(op, given, inputs)


def test_max_seqlen_changes_nothing_in_compress(device: str) -> None:
    inputs = make_packed_inputs("compress", *CASES["chunks"]).to(device, sharpest(device)[0])
    for longest in (67, 1000):
        _assert_same("compress", inputs.replace(max_seqlen_k=longest), inputs)


def test_compressed_rows_after_the_last_block_are_zero(device: str) -> None:
    """sum T // d rows whatever the lengths; those that no block fills are zero, not garbage."""
    shape, lengths = CASES["training"]
    inputs = make_packed_inputs("compress", shape, lengths).to(device, sharpest(device)[0])
    out = nsa_torch.compress(**inputs.tensors, **inputs.options)
    blocks = sum(reference.num_blocks(k, shape.block_size, shape.block_stride) for _, k in lengths)
    total = sum(k for _, k in lengths)
    assert out.size(0) == total // shape.block_stride > blocks
    assert torch.equal(out[blocks:], torch.zeros_like(out[blocks:]))
    assert out[:blocks].any(-1).all()


@pytest.mark.parametrize("op", ["compressed_attention", "select_blocks", "nsa_attention"])
def test_unread_rows_of_k_cmp_do_not_matter(op: str, device: str) -> None:
    """The rows after the last block may hold anything."""
    shape, lengths = CASES["training"]
    inputs = make_packed_inputs(op, shape, lengths).to(device, sharpest(device)[0])
    blocks = sum(reference.num_blocks(k, shape.block_size, shape.block_stride) for _, k in lengths)
    spoiled = inputs
    for name in {"k_cmp", "v_cmp"} & inputs.tensors.keys():
        tensor = inputs.tensors[name].clone()
        tensor[blocks:] = torch.nan
        spoiled = spoiled.replace(**{name: tensor})
    _assert_same(op, spoiled, inputs)


# Slots of a cache (Tk of each slot), queries, and keys in use.
SLOTS = [(5, 40, 23), (1, 40, 40), (0, 40, 0), (1, 40, 1), (7, 16, 7), (3, 8, 8)]


@pytest.mark.parametrize("op", [op for op in DIFFERENTIABLE_OPS if op != "compress"])
def test_seqused_matches_reference(op: str, target: Target) -> None:
    check_op(op, _slots(op), target)


def test_seqused_choice_matches_reference() -> None:
    inputs = _slots("select_blocks")
    lists = nsa_torch.select_blocks(**inputs.tensors, **inputs.options)
    assert torch.equal(lists, reference.select_blocks(**inputs.tensors, **inputs.options))
    check_op("nsa_attention", _slots("nsa_attention").replace(block_indices=None))


@pytest.mark.parametrize("op", [op for op in OPS if op != "compress"])
def test_unused_keys_do_not_matter(op: str, device: str) -> None:
    """What lies in a slot after its keys in use is never read: NaN there changes nothing."""
    inputs = _slots(op).to(device, sharpest(device)[0])
    spoiled = inputs
    keys, blocks = _unused_rows()
    for name, tensor in inputs.tensors.items():
        if name[:2] in ("k_", "v_") or name in ("k", "v"):
            rows = blocks if name.endswith("cmp") else keys
            filled = tensor.index_fill(0, torch.tensor(rows, device=device), torch.nan)
            assert filled.isnan().any()
            spoiled = spoiled.replace(**{name: filled})
    _assert_same(op, spoiled, inputs)


def _slots(op: str) -> Inputs:
    """A packed call over SLOTS. The lists of selected_attention hold blocks in use only."""
    in_use = make_packed_inputs(op, SMALL, [(q, used) for q, _, used in SLOTS])
    inputs = make_packed_inputs(op, SMALL, [(q, slot) for q, slot, _ in SLOTS])
    used = torch.tensor([used for *_, used in SLOTS], dtype=torch.int32)
    inputs = inputs.replace(seqused_k=used)
    if op == "select_blocks":
        call = {n: inputs.options[n] for n in ("block_size", "block_stride", "seqused_k")}
        call |= {n: inputs.options[n] for n in ("cu_seqlens_q", "cu_seqlens_k")}
        q, k_cmp = inputs.tensors["q"], inputs.tensors["k_cmp"]
        return inputs.replace(lse=reference.compressed_attention(q, k_cmp, k_cmp, **call)[1])
    lists = (in_use.tensors | in_use.options).get("block_indices")
    return inputs if lists is None else inputs.replace(block_indices=lists)


def _unused_rows() -> tuple[list[int], list[int]]:
    """Rows of k and of k_cmp that no sequence uses."""
    keys, blocks, key, block = [], [], 0, 0
    for _, slot, used in SLOTS:
        keys += range(key + used, key + slot)
        count, first_unused = (reference.num_blocks(t, 8, 4) for t in (slot, used))
        blocks += range(block + first_unused, block + count)
        key, block = key + slot, block + count
    return keys, blocks


def _separate(call: dict[str, Tensor], shape: Shape, lengths: Lengths) -> list[dict[str, Tensor]]:
    """The dense calls that a packed one stands for."""
    dense = []
    blocks = [reference.num_blocks(k, shape.block_size, shape.block_stride) for _, k in lengths]
    starts = [cumulative(rows).tolist() for rows in (*zip(*lengths, strict=True), blocks)]
    for b, (_, seqlen_k) in enumerate(lengths):
        q, k, cmp = (slice(start[b], start[b + 1]) for start in starts)
        alone = {}
        for name, value in call.items():
            if name.startswith("cu_seqlens"):
                continue
            if not isinstance(value, Tensor) or name in ("pe", "w1", "b1", "w2", "b2"):
                alone[name] = value
            elif name == "lse":
                alone[name] = value[None, :, q]
            elif name in ("q", "gates", "block_indices"):
                alone[name] = value[None, q]
            else:
                alone[name] = value[None, cmp if name.endswith("cmp") else k]
        if "k_cmp" in call and "k_slc" not in call:
            alone["seqlen_k"] = seqlen_k
        dense.append(alone)
    return dense


def _with_zeros(tokens: Tensor, rows: int) -> Tensor:
    return torch.cat([tokens, tokens.new_zeros(rows - tokens.size(0), *tokens.shape[1:])])


def _assert_same(op: str, actual: Inputs, expected: Inputs) -> None:
    function = getattr(nsa_torch, op)
    if op == "select_blocks":
        first, second = (function(**x.tensors, **x.options) for x in (actual, expected))
        assert torch.equal(first, second)
    else:
        assert_close(evaluate(function, actual), evaluate(function, expected), sharpest(actual.device)[1])


@pytest.mark.parametrize("op", OPS)
def test_tokens_without_a_sequence(op: str, device: str) -> None:
    """An error that is seen without reading lengths back: also on CUDA."""
    inputs = make_packed_inputs(op, SMALL, [(31, 31)]).to(device, torch.float32)
    none = torch.zeros(1, dtype=torch.int32, device=device)
    names = [name for name in inputs.options if name.startswith("cu_seqlens")]
    with pytest.raises(ValueError, match=r"cu_seqlens_[qk] must end at the tokens of .*, got no sequence"):
        getattr(nsa_torch, op)(**inputs.tensors, **inputs.options | dict.fromkeys(names, none))
