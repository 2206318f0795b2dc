"""The ops on a GPU over the sizes that kernels are made for, and those that they pad: against the float64 reference."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import nsa_torch
from choices import check_choice
from gpu import errors
from helpers import OPS, Inputs, Target, check_as_given, check_op, evaluate, make_inputs, make_packed_inputs
from launches import launched
from problems import calls, make_problem
from shapes import Shape

pytestmark = pytest.mark.cuda

DEVICE = "cuda"
WHOLE = Shape("whole", 197, 197, 4, 2, 64, 64, num_selected=4, window=61)
DIMS = [(64, 64), (128, 128), (192, 128), (256, 256), (40, 24), (6, 4), (96, 80), (100, 100)]
BLOCKS = [
    (stride, times, select)
    for stride in (8, 16, 32, 64)
    for times in (1, 2, 4)
    for select in (32, 64, 128)
    if select % stride == 0
]

dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)


def check(shape: Shape, dtype: torch.dtype) -> None:
    """The three branches and their gates on random lists, and the choice of blocks."""
    target = Target(DEVICE, dtype)
    check_op("nsa_attention", make_inputs("nsa_attention", shape), target)
    check_choice(make_inputs("select_blocks", shape), shape, target)


@pytest.mark.parametrize("group", [1, 2, 3, 4, 6, 8, 12, 16, 32, 40])
@dtypes
def test_groups(group: int, dtype: torch.dtype) -> None:
    check(replace(WHOLE, name=f"group_{group}", heads_q=2 * group), dtype)


@pytest.mark.parametrize("group", [1, 4, 8, 12, 16, 33])
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (192, 128), (96, 72), (100, 100)], ids=str)
@pytest.mark.parametrize("gates", [torch.float32, torch.bfloat16], ids=str)
def test_no_bit_depends_on_what_is_kept(group: int, dims: tuple[int, int], gates: torch.dtype) -> None:
    """Without gradients the window's own output is not written; gates of odd strides."""
    shape = replace(WHOLE, name=f"kept_{group}_{dims}", heads_q=2 * group, dim_k=dims[0], dim_v=dims[1])
    inputs = make_inputs("nsa_attention", shape).to(DEVICE, torch.bfloat16)
    tensors = inputs.tensors | {"gates": inputs.tensors["gates"].to(gates).transpose(1, 3).contiguous().transpose(1, 3)}
    with torch.no_grad():
        alone = nsa_torch.nsa_attention(**tensors, **inputs.options)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    kept = nsa_torch.nsa_attention(**leaves, **inputs.options)
    assert kept.requires_grad and not alone.requires_grad
    assert torch.equal(alone, kept)


@pytest.mark.parametrize("dims", DIMS, ids=str)
@dtypes
def test_head_dimensions(dims: tuple[int, int], dtype: torch.dtype) -> None:
    check(replace(WHOLE, name=f"dims_{dims}", dim_k=dims[0], dim_v=dims[1]), dtype)


@pytest.mark.parametrize("group", [4, 16, 48, 64])
@pytest.mark.parametrize("dims", [(64, 128), (128, 64), (192, 64)], ids=str)
def test_groups_whose_keys_and_values_differ(group: int, dims: tuple[int, int]) -> None:
    """Tiles are those of the wider of the two, and so are the rows that a step holds."""
    shape = replace(WHOLE, name=f"group_{group}_{dims}", heads_q=2 * group, dim_k=dims[0], dim_v=dims[1])
    check(shape, torch.bfloat16)


@pytest.mark.parametrize("select_size", [32, 64])
@pytest.mark.parametrize("count", [1, 4, 16, 64])
@dtypes
def test_numbers_of_selected_blocks(count: int, select_size: int, dtype: torch.dtype) -> None:
    forced = (0, 1) if count == 1 else (1, 2)
    options = {"num_selected": count, "num_initial": forced[0], "num_local": forced[1], "select_size": select_size}
    check(replace(WHOLE, name=f"selected_{count}", seqlen_q=67, seqlen_k=2203, **options), dtype)


@pytest.mark.parametrize("group", [2, 7, 16])
@pytest.mark.parametrize("count", [17, 32, 33, 64])
@pytest.mark.parametrize("dim", [128, 192])
def test_choice_of_long_lists(dim: int, count: int, group: int) -> None:
    """More blocks than fit into a list, so that lists are full and change."""
    shape = replace(WHOLE, name=f"lists_{count}_{group}", seqlen_q=131, seqlen_k=7003, heads_q=2 * group)
    shape = replace(shape, dim_k=dim, num_selected=count)
    check_choice(make_inputs("select_blocks", shape), shape, Target(DEVICE, torch.bfloat16))


@pytest.mark.parametrize("group", [4, 16])
@pytest.mark.parametrize("count", [16, 17, 33, 64])
def test_ties_and_nan_in_long_lists(count: int, group: int) -> None:
    """Equal scores: the lower index wins. A key that is NaN makes the block it lies in the last to be chosen."""
    shape = replace(WHOLE, name=f"ties_{count}", seqlen_q=131, seqlen_k=7003, heads_q=2 * group, num_selected=count)
    inputs = make_inputs("select_blocks", shape).to(DEVICE, torch.bfloat16)
    k_cmp = inputs.tensors["k_cmp"].clone()
    inputs = inputs.replace(q=torch.zeros_like(inputs.tensors["q"]), lse=inputs.tensors["lse"].float())
    own = torch.arange(7003 - 131, 7003, device=DEVICE)[:, None] // 64

    def expected(*inner: int) -> Tensor:
        lists = torch.tensor([0, *inner], device=DEVICE).expand(131, -1)
        return torch.cat([lists, own - 1, own], dim=1).int()[None, :, None].expand(shape.batch, -1, 2, -1)

    lists = nsa_torch.select_blocks(**inputs.tensors, **inputs.options)
    assert torch.equal(lists, expected(*range(1, count - 2)))
    k_cmp[:, 16 // shape.block_stride * 21] = torch.nan  # in block 5
    lists = nsa_torch.select_blocks(**inputs.replace(k_cmp=k_cmp).tensors, **inputs.options)
    assert torch.equal(lists, expected(*range(1, 5), *range(6, count - 1)))


@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_block_sizes(blocks: tuple[int, int, int], dtype: torch.dtype) -> None:
    stride, times, select = blocks
    sizes = {"block_stride": stride, "block_size": stride * times, "select_size": select}
    check(replace(WHOLE, name=f"blocks_{blocks}", seqlen_q=151, seqlen_k=523, **sizes), dtype)


@pytest.mark.parametrize("stride", [8, 16, 32, 64])
@pytest.mark.parametrize("times", [1, 2, 4])
@dtypes
def test_compress(stride: int, times: int, dtype: torch.dtype) -> None:
    shape = replace(WHOLE, name="compress", seqlen_k=523, block_stride=stride, block_size=stride * times)
    check_op("compress", make_inputs("compress", shape), Target(DEVICE, dtype))


@pytest.mark.parametrize("gate", [1.0, 0.02])
def test_many_keys_and_large_gradients_in_float16(gate: float) -> None:
    """Gated probabilities of a thousand keys are under the normal numbers of float16, scaled gradients are not."""
    shape = Shape("many", 16384, 16384, 16, 1, 128, 128, num_selected=4, window=64)
    inputs = make_inputs("nsa_attention", shape).to(DEVICE, torch.float16)
    gates = torch.zeros_like(inputs.tensors["gates"])
    gates[..., 0] = gate
    inputs = inputs.replace(gates=gates)
    gradients = {}
    for dtype in (torch.float16, torch.float32):
        given = inputs.to(DEVICE, dtype)
        leaves = {name: given.tensors[name].detach().requires_grad_() for name in ("k_cmp", "v_cmp")}
        out = nsa_torch.nsa_attention(**given.tensors | leaves, **given.options)
        random = torch.Generator(DEVICE).manual_seed(3)
        grad = 100 * torch.randn(out.shape, generator=random, device=DEVICE)
        gradients[dtype] = torch.autograd.grad(out, tuple(leaves.values()), grad.to(torch.float16).to(dtype))
    for actual, want in zip(gradients[torch.float16], gradients[torch.float32], strict=True):
        assert actual.isfinite().all()
        assert (actual.float() - want).norm() <= 5e-4 * want.norm()


@pytest.mark.parametrize("length", [0, 1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129, 509, 1021])
@dtypes
def test_lengths(length: int, dtype: torch.dtype) -> None:
    check(replace(WHOLE, name=f"length_{length}", seqlen_q=length, seqlen_k=length), dtype)


@pytest.mark.parametrize("op", OPS)
@dtypes
def test_781_2048(op: str, dtype: torch.dtype) -> None:
    """cu_seqlens [0, 781, 2048]: neither sequence ends where a tile does."""
    shape = replace(WHOLE, name="781_2048", heads_q=8, dim_k=128, dim_v=128, num_selected=16, window=512)
    inputs = make_packed_inputs(op, shape, [(781, 781), (1267, 1267)])
    if op != "select_blocks":
        check_op(op, inputs, Target(DEVICE, dtype))
        return
    given = inputs.to(DEVICE, dtype).replace(lse=inputs.tensors["lse"].to(DEVICE, torch.float32))
    lists, start = nsa_torch.select_blocks(**given.tensors, **given.options), 0
    for length in (781, 1267):
        alone = replace(shape, seqlen_q=length, seqlen_k=length)
        rows, first = slice(start, start + length), 0 if start == 0 else replace(shape, seqlen_k=781).blocks
        one = Inputs(
            {
                "q": given.tensors["q"][None, rows],
                "k_cmp": given.tensors["k_cmp"][None, first : first + alone.blocks],
                "lse": given.tensors["lse"][None, :, rows],
            },
            {k: v for k, v in given.options.items() if not k.startswith("cu_")} | {"seqlen_k": length},
        )
        assert torch.equal(nsa_torch.select_blocks(**one.tensors, **one.options)[0], lists[rows])
        start += length


def odd_offset(x: Tensor) -> Tensor:
    """Last stride 1, every row at an odd offset: nothing is aligned to more than an element."""
    big = x.new_full((*x.shape[:-1], x.size(-1) + 3), torch.nan)
    big[..., 1:-2] = x
    return big[..., 1:-2]


def wide_rows(x: Tensor) -> Tensor:
    """Last stride 1, rows further apart, aligned: as slices of one projection of q, k and v lie."""
    big = x.new_full((*x.shape[:-1], 2 * x.size(-1)), torch.nan)
    big[..., x.size(-1) :] = x
    return big[..., x.size(-1) :]


def heads_first(x: Tensor) -> Tensor:
    return x.transpose(-3, -2).contiguous().transpose(-3, -2)


def one_head(x: Tensor) -> Tensor:
    """A stride of 0 between the heads, which the copy engine's maps can't describe."""
    return x[..., :1, :].expand_as(x) if x.dim() > 3 else x


@pytest.mark.parametrize("layout", [odd_offset, wide_rows, heads_first, one_head], ids=lambda f: f.__name__)
@pytest.mark.parametrize("dims", [(64, 64), (100, 36)], ids=str)
@dtypes
def test_strides(layout, dims: tuple[int, int], dtype: torch.dtype) -> None:
    shape = replace(WHOLE, name=f"strides_{dims}", dim_k=dims[0], dim_v=dims[1])
    inputs = make_inputs("nsa_attention", shape).to(DEVICE, dtype)
    tensors = {name: layout(tensor) for name, tensor in inputs.tensors.items()}
    check_as_given("nsa_attention", Inputs(tensors, inputs.options), dtype)


@dtypes
def test_rows_that_see_nothing(dtype: torch.dtype) -> None:
    """No compressed block ends before key 127, and every third list is empty: zeros there, and never NaN."""
    shape = replace(WHOLE, name="nothing", block_size=128, block_stride=64)
    exact = make_inputs("nsa_attention", shape)
    exact.options["block_indices"][:, ::3] = -1
    check_op("nsa_attention", exact, Target(DEVICE, dtype))
    compressed = make_inputs("compressed_attention", shape).to(DEVICE, dtype)
    results = evaluate(nsa_torch.compressed_attention, compressed)
    assert not results["out"][:, :127].any() and results["lse"][..., :127].isneginf().all()
    assert not results["grad_q"][:, :127].any()


@pytest.mark.parametrize("op", OPS)
def test_float64_is_refused(op: str) -> None:
    inputs = make_inputs(op, WHOLE).to(DEVICE, torch.float64)
    with pytest.raises(TypeError, match=r"float16, bfloat16 or float32"):
        getattr(nsa_torch, op)(**inputs.tensors, **inputs.options)


REFUSED = [
    ({"dim_k": 257}, "q"),
    ({"num_selected": 65}, "num_selected"),
    ({"block_size": 65, "block_stride": 1}, "block_size"),
    ({"select_size": 65, "block_stride": 1}, "select_size"),
]


@pytest.mark.parametrize(("changes", "argument"), REFUSED, ids=str)
def test_what_kernels_do_not_take_is_refused(changes: dict[str, int], argument: str) -> None:
    """By a message that names the argument, what it was and what is allowed; the CPU takes it."""
    inputs = make_inputs("select_blocks", replace(WHOLE, name="refused", **changes))
    nsa_torch.select_blocks(**inputs.tensors, **inputs.options)
    given = inputs.to(DEVICE, torch.float32)
    with pytest.raises(ValueError, match=rf"\b{argument}\b.*\bgot\b"):
        nsa_torch.select_blocks(**given.tensors, **given.options)


@pytest.mark.parametrize(("changes", "argument"), [*REFUSED, ({"heads_q": 257, "heads_kv": 1}, "q")], ids=str)
def test_nothing_runs_before_a_call_is_refused(changes: dict[str, int], argument: str) -> None:
    """What its last kernel does not take, nsa_attention refuses before its first one."""
    inputs = make_inputs("nsa_attention", replace(WHOLE, name="refused", **changes)).to(DEVICE, torch.bfloat16)
    options = inputs.options | {"block_indices": None}

    def call() -> None:
        with pytest.raises(ValueError, match=rf"\b{argument}\b.*\bgot\b"):
            nsa_torch.nsa_attention(**inputs.tensors, **options)

    assert not launched(call)


def test_more_than_2_to_the_31_elements() -> None:
    """Offsets past 32 bits, forward and backward: sampled rows, and all that the last keys get."""
    torch.cuda.empty_cache()
    for _ in range(150):  # seconds: other processes of the suite may hold some of it
        free, total = torch.cuda.mem_get_info()
        if free >= 70 << 30 or total < 70 << 30:
            break
        time.sleep(1)
    if free < 70 << 30:
        pytest.skip("needs 70 GB of free memory")
    shape = Shape("large", (1 << 20) + 3, (1 << 20) + 3, 16, 1, 128, 128)
    problem = make_problem(shape, "random", torch.bfloat16, DEVICE)
    assert problem.q.numel() > 1 << 31
    for op in ("nsa_attention", "select_blocks"):
        found = [error for error in errors(op, problem, calls(problem)[op]) if error is not None]
        assert found and max(found) < 0.02, (op, found)
