"""What tensor-core kernels meet beside plain shapes: NaN next door, groups packed, signs, any lists, heads by turns."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import nsa_torch
from choices import assert_as_good, lse_of
from errors import errors
from helpers import Inputs, Target, check_op, evaluate, make_inputs, make_packed_inputs
from problems import calls, make_problem
from shapes import Shape

pytestmark = pytest.mark.cuda

DEVICE = "cuda"
DTYPE = torch.bfloat16
WHOLE = Shape("edges", 197, 197, 32, 2, 128, 128, num_selected=5, window=61)
LENGTHS = [(131, 131), (45, 150), (0, 0), (1, 70), (90, 90)]
DIMS = [(64, 64), (128, 128), (192, 128), (104, 120)]

dims = pytest.mark.parametrize("dims", DIMS, ids=str)


def spoiled(inputs: Inputs, rows: Tensor, rows_cmp: Tensor) -> Inputs:
    """NaN in these rows of every key and value: of the uncompressed, and of the compressed ones."""
    found = inputs
    for name, tensor in inputs.tensors.items():
        if name.startswith(("k", "v")):
            found = found.replace(**{name: tensor.index_fill(0, rows_cmp if name.endswith("cmp") else rows, torch.nan)})
    return found


def rows_of(lengths: list[int], chosen: list[tuple[int, int, int]]) -> Tensor:
    """Rows begin .. end of some of the sequences of these lengths: (sequence, begin, end)."""
    starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
    parts = [torch.arange(starts[i] + begin, starts[i] + end) for i, begin, end in chosen]
    return torch.cat(parts).to(DEVICE)


def assert_equal_where(results: dict[str, Tensor], expected: dict[str, Tensor], rows: dict[str, Tensor]) -> None:
    """In these rows of out, and of the gradients of q, keys and compressed keys."""
    for name, want in expected.items():
        if name == "grad_gates" or name in ("out", "grad_q"):
            kept = rows["q"]
        else:
            kept = rows["cmp" if name.endswith("cmp") else "k"]
        assert torch.equal(results[name][kept], want[kept]), name


@pytest.mark.parametrize("group", [1, 3, 4, 7, 8, 12, 16, 24, 33, 48, 64])
def test_groups_of_packed_sequences(group: int) -> None:
    shape = replace(WHOLE, name=f"packed_{group}", heads_q=2 * group, dim_k=64, dim_v=64)
    check_op("nsa_attention", make_packed_inputs("nsa_attention", shape, LENGTHS), Target(DEVICE, DTYPE))


@dims
def test_packed_sequences_do_not_read_their_neighbours(dims: tuple[int, int]) -> None:
    """0 times NaN is NaN: what lies after a sequence's end must not even be multiplied by 0."""
    shape = replace(WHOLE, name=f"neighbours_{dims}", dim_k=dims[0], dim_v=dims[1])
    inputs = make_packed_inputs("nsa_attention", shape, LENGTHS).to(DEVICE, DTYPE)
    lengths_q, lengths_k = ([pair[side] for pair in LENGTHS] for side in (0, 1))
    blocks = [replace(shape, seqlen_k=length).blocks for length in lengths_k]

    def every_other(lengths: list[int], first: int) -> Tensor:
        return rows_of(lengths, [(i, 0, lengths[i]) for i in range(first, len(lengths), 2)])

    clean = evaluate(nsa_torch.nsa_attention, inputs)
    found = evaluate(nsa_torch.nsa_attention, spoiled(inputs, every_other(lengths_k, 1), every_other(blocks, 1)))
    kept = {"q": every_other(lengths_q, 0), "k": every_other(lengths_k, 0), "cmp": every_other(blocks, 0)}
    assert_equal_where(found, clean, kept)


@dims
def test_keys_after_those_in_use_are_not_read(dims: tuple[int, int]) -> None:
    shape = replace(WHOLE, name=f"used_{dims}", dim_k=dims[0], dim_v=dims[1])
    used = [100, 45, 0, 31, 77]
    lengths = [(min(q, u), k) for (q, k), u in zip(LENGTHS, used, strict=True)]
    lists = make_packed_inputs("nsa_attention", shape, [(q, u) for (q, _), u in zip(lengths, used, strict=True)])
    inputs = make_packed_inputs("nsa_attention", shape, lengths).to(DEVICE, DTYPE)
    inputs = inputs.replace(
        seqused_k=torch.tensor(used, dtype=torch.int32, device=DEVICE),
        block_indices=lists.options["block_indices"].to(DEVICE),
    )
    slots = [k for _, k in lengths]
    blocks, blocks_used = ([replace(shape, seqlen_k=n).blocks for n in count] for count in (slots, used))
    clean = evaluate(nsa_torch.nsa_attention, inputs)
    unused = rows_of(slots, [(i, used[i], n) for i, n in enumerate(slots)])
    unused_cmp = rows_of(blocks, [(i, blocks_used[i], n) for i, n in enumerate(blocks)])
    found = evaluate(nsa_torch.nsa_attention, spoiled(inputs, unused, unused_cmp))
    kept = {
        "q": torch.arange(sum(q for q, _ in lengths), device=DEVICE),
        "k": rows_of(slots, [(i, 0, n) for i, n in enumerate(used)]),
        "cmp": rows_of(blocks, [(i, 0, n) for i, n in enumerate(blocks_used)]),
    }
    assert_equal_where(found, clean, kept)


@pytest.mark.parametrize("scale", [0.0, -0.1])
@pytest.mark.parametrize("group", [4, 16])
def test_scales(scale: float, group: int) -> None:
    """None, and a negative one: the smallest product has the largest weight."""
    shape = replace(WHOLE, name=f"scale_{group}", heads_q=2 * group)
    check_op("nsa_attention", make_inputs("nsa_attention", shape).replace(scale=scale), Target(DEVICE, DTYPE))
    exact = make_inputs("select_blocks", shape).replace(scale=scale)
    exact = exact.replace(lse=lse_of(exact.replace(lse=None)))
    given = exact.to(DEVICE, DTYPE).replace(lse=exact.tensors["lse"].to(DEVICE, torch.float32))
    lists = nsa_torch.select_blocks(**given.tensors, **given.options)
    assert_as_good(lists, given, shape, DTYPE)


def by_multiplicity(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, *, select_size: int
) -> tuple[Tensor, Tensor]:
    """Selected attention of one dense sequence where a block counts as often as it is listed."""
    tokens, heads, group = q.size(1), k.size(2), q.size(2) // k.size(2)
    block = torch.arange(tokens, device=q.device) // select_size
    times = (block_indices[0, :, :, :, None] == block).sum(2).double()  # (T, Hkv, T)
    times = times * torch.ones(tokens, tokens, device=q.device).tril().double()[:, None]
    rows = q[0].unflatten(1, (heads, group)) * q.size(-1) ** -0.5
    seen = times.sum(-1).bool()[:, :, None]
    scores = torch.einsum("thgc,jhc->thgj", rows, k[0]) + times.log()[:, :, None]
    lse = scores.masked_fill(~seen[..., None], 0.0).logsumexp(-1)
    weights = (scores - lse[..., None]).exp().masked_fill(~seen[..., None], 0.0)
    lse = lse.masked_fill(~seen, -torch.inf)
    out = torch.einsum("thgj,jhc->thgc", weights, v[0])
    return out.flatten(1, 2)[None], lse.flatten(1, 2).T[None]


@pytest.mark.parametrize("count", [16, 64])
@pytest.mark.parametrize("group", [3, 8, 16])
def test_lists_that_hold_anything(group: int, count: int) -> None:
    """On CUDA nobody checks them: blocks twice, some that are not there, some after the query, -1 among them."""
    shape = Shape(f"anything_{group}_{count}", 500, 500, 2 * group, 2, 128, 128, num_selected=count)
    random = torch.Generator().manual_seed(count)
    lists = torch.randint(shape.selection_blocks + 3, (1, 500, 2, count), generator=random)
    lists = lists.masked_fill(torch.rand(lists.shape, generator=random) < 0.2, -1)
    lists[:, ::7] = -1
    inputs = make_inputs("selected_attention", shape).to(DEVICE, DTYPE).replace(block_indices=lists.int().to(DEVICE))
    names = ("q", "k", "v")
    leaves = [inputs.tensors[name].detach().requires_grad_() for name in names]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    given = inputs.tensors["block_indices"]
    out, lse = nsa_torch.selected_attention(*leaves, given, select_size=64)
    truth, true_lse = by_multiplicity(*exact, given, select_size=64)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    found = [out, *torch.autograd.grad(out, leaves, grad)]
    wanted = [truth, *torch.autograd.grad(truth, exact, grad.double())]
    for name, actual, want in zip(("out", *names), found, wanted, strict=True):
        assert (actual.double() - want).norm() <= 1e-2 * want.norm(), name
    assert torch.equal(lse.isneginf(), true_lse.isneginf())
    torch.testing.assert_close(lse.double(), true_lse, atol=2e-3, rtol=0)


@pytest.mark.parametrize("keys", [262144, 262145])
def test_more_keys_than_a_step_of_a_union_counts(keys: int) -> None:
    """Groups of up to four heads: another kernel from here on."""
    shape = Shape(f"keys_{keys}", 100, keys, 4, 1, 128, 128)
    problem = make_problem(shape, "random", DTYPE, DEVICE)
    found = errors("selected_attention", problem, calls(problem)["selected_attention"])
    assert max(error for error in found if error is not None) < 0.02, found


@pytest.mark.parametrize(("heads", "tokens"), [((32, 8), 32768), ((20, 5), 32768)], ids=str)
def test_scores_of_some_heads_at_a_time(heads: tuple[int, int], tokens: int) -> None:
    """Their gradients take more than a GB in all: the two kernels of the backward take turns, some KV heads each."""
    shape = Shape(f"turns_{heads}", tokens, tokens, *heads, 128, 128)
    problem = make_problem(shape, "random", DTYPE, DEVICE)
    call = calls(problem)["selected_attention"]
    assert max(error for error in errors("selected_attention", problem, call) if error is not None) < 0.02
    assert call.grad is not None
    first, second = (torch.autograd.grad(call.run(), call.leaves, call.grad) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
