"""Properties over random shapes and options, drawn by hypothesis."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import nsa_torch
from helpers import (
    ATTENTION_OPS,
    DIFFERENTIABLE_OPS,
    FLOAT64_TOLERANCE,
    Inputs,
    assert_close,
    check_op,
    evaluate,
    make_inputs,
    make_packed_inputs,
)
from nsa_torch import reference
from shapes import Shape

settings.register_profile("nsa", deadline=None, print_blob=True, derandomize=True)
settings.load_profile("nsa")

sizes = st.integers


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    """Any legal shape with up to 70 keys."""
    stride = draw(sizes(1, 5))
    forced = draw(sizes(0, 3)), draw(sizes(0, 3))
    seqlen_k = draw(sizes(0, 70))
    heads_kv = draw(sizes(1, 3))
    return Shape(
        "drawn",
        seqlen_q=draw(st.one_of(st.just(seqlen_k), sizes(0, seqlen_k))),
        seqlen_k=seqlen_k,
        heads_q=heads_kv * draw(sizes(1, 5)),
        heads_kv=heads_kv,
        dim_k=draw(sizes(1, 9)),
        dim_v=draw(sizes(1, 9)),
        batch=draw(sizes(0, 3)),
        block_size=stride * draw(sizes(1, 4)),
        block_stride=stride,
        select_size=stride * draw(sizes(1, 5)),
        num_selected=max(1, sum(forced)) + draw(sizes(0, 5)),
        num_initial=forced[0],
        num_local=forced[1],
        window=draw(sizes(1, 80)),
    )


lengths = st.lists(sizes(0, 40).flatmap(lambda k: st.tuples(sizes(0, k), st.just(k))), min_size=1, max_size=6)


@given(shape=shapes(), op=st.sampled_from(DIFFERENTIABLE_OPS), seed=sizes(0, 2**16))
@settings(max_examples=120)
def test_dense_matches_reference(shape: Shape, op: str, seed: int) -> None:
    check_op(op, make_inputs(op, shape, seed=seed))


@given(shape=shapes(), sequences=lengths, op=st.sampled_from(DIFFERENTIABLE_OPS))
@settings(max_examples=80)
def test_packed_matches_reference(shape: Shape, sequences: list[tuple[int, int]], op: str) -> None:
    check_op(op, make_packed_inputs(op, shape, sequences))


@given(shape=shapes(), seed=sizes(0, 2**16))
@settings(max_examples=80)
def test_choice_matches_reference(shape: Shape, seed: int) -> None:
    inputs = make_inputs("select_blocks", shape, seed=seed)
    lists = nsa_torch.select_blocks(**inputs.tensors, **inputs.options)
    assert torch.equal(lists, reference.select_blocks(**inputs.tensors, **inputs.options))


@given(shape=shapes(), sequences=lengths)
@settings(max_examples=40)
def test_packed_choice_matches_reference(shape: Shape, sequences: list[tuple[int, int]]) -> None:
    inputs = make_packed_inputs("select_blocks", shape, sequences)
    lists = nsa_torch.select_blocks(**inputs.tensors, **inputs.options)
    assert torch.equal(lists, reference.select_blocks(**inputs.tensors, **inputs.options))


@given(shape=shapes(), op=st.sampled_from(ATTENTION_OPS), data=st.data())
@settings(max_examples=60)
def test_causal(shape: Shape, op: str, data: st.DataObject) -> None:
    """Changing a key changes no query before it."""
    shape = replace(shape, batch=1)
    inputs = make_inputs(op, shape)
    first = shape.seqlen_k - shape.seqlen_q
    changed = data.draw(sizes(0, max(shape.seqlen_k - 1, 0)), label="changed key")
    row = changed
    if op == "compressed_attention":  # the last block that holds the key
        row = min(changed // shape.block_stride, shape.blocks - 1)
        changed = max(changed, row * shape.block_stride + shape.block_size - 1)
    before = _call(op, inputs)
    for name in inputs.tensors:
        if name[0] in "kv" and inputs.tensors[name].size(1) > 0:
            tensor = inputs.tensors[name].clone()
            tensor[:, row] += 1
            inputs = inputs.replace(**{name: tensor})
    after = _call(op, inputs)
    untouched = max(0, min(shape.seqlen_q, changed - first))
    for index, time in ((0, 1), (1, 2)):
        first_rows = (result[index].narrow(time, 0, untouched) for result in (before, after))
        torch.testing.assert_close(*first_rows, rtol=0, atol=1e-12)


@given(shape=shapes(), data=st.data())
@settings(max_examples=40)
def test_chunks_of_queries_give_the_whole(shape: Shape, data: st.DataObject) -> None:
    """Queries [i, ...) alone, against keys up to the last one they see, are those of one call."""
    shape = replace(shape, seqlen_q=shape.seqlen_k, batch=1)
    cut = data.draw(sizes(0, shape.seqlen_k), label="cut")
    inputs = make_inputs("nsa_attention", shape).replace(block_indices=None)
    whole = nsa_torch.nsa_attention(**inputs.tensors, **inputs.options)
    blocks = reference.num_blocks(cut, shape.block_size, shape.block_stride)
    parts = []
    for rows, keys in ((slice(0, cut), cut), (slice(cut, None), shape.seqlen_k)):
        seen = blocks if keys == cut else shape.blocks
        chunk = {
            name: t[:, rows] if name in ("q", "gates") else t[:, : seen if "cmp" in name else keys]
            for name, t in inputs.tensors.items()
        }
        parts.append(nsa_torch.nsa_attention(**chunk, **inputs.options))
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-12)


@given(shape=shapes(), op=st.sampled_from(ATTENTION_OPS))
@settings(max_examples=40)
def test_adding_to_the_values_adds_to_the_output(shape: Shape, op: str) -> None:
    """The weights of a row that sees anything add up to one."""
    inputs = make_inputs(op, shape)
    value = "v_cmp" if op == "compressed_attention" else "v"
    out, lse = _call(op, inputs)
    shifted, same_lse = _call(op, inputs.replace(**{value: inputs.tensors[value] + 1}))
    sees = ~lse.isneginf().transpose(1, 2)[..., None]
    torch.testing.assert_close(shifted, out + sees, rtol=0, atol=1e-12)
    assert torch.equal(same_lse, lse)


@given(shape=shapes(), data=st.data())
@settings(max_examples=40)
def test_two_halves_merge_by_their_lse(shape: Shape, data: st.DataObject) -> None:
    """Attention over a list is the lse-weighted mean of those over its two parts; so are gradients,
    which here flow through lse.
    """
    inputs = make_inputs("selected_attention", shape)
    lists = inputs.tensors["block_indices"]
    cut = data.draw(sizes(0, shape.num_selected), label="cut")

    def merged(block_indices: torch.Tensor, **call: torch.Tensor) -> tuple[torch.Tensor, ...]:
        parts = [block_indices[..., :cut], block_indices[..., cut:]]
        outs, lses = zip(
            *(nsa_torch.selected_attention(block_indices=part, **call) for part in parts),
            strict=True,
        )
        # A finite number for -inf, and a mask: torch's own logaddexp has no gradient there.
        nothing = [lse.isneginf() for lse in lses]
        lses = [lse.masked_fill(none, -1e30) for lse, none in zip(lses, nothing, strict=True)]
        lse = torch.logaddexp(*lses)
        shares = [
            (part - lse).exp().masked_fill(none, 0.0).transpose(1, 2)[..., None]
            for part, none in zip(lses, nothing, strict=True)
        ]
        out = shares[0] * outs[0] + shares[1] * outs[1]
        return out, lse.masked_fill(nothing[0] & nothing[1], -torch.inf)

    expected = evaluate(nsa_torch.selected_attention, inputs.replace(block_indices=lists))
    assert_close(evaluate(merged, inputs), expected, FLOAT64_TOLERANCE)


def _call(op: str, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    return getattr(nsa_torch, op)(**inputs.tensors, **inputs.options)
