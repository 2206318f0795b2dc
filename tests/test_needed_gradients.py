"""A backward computes the gradients that are asked for, the same as among all, and no others."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor

import nsa_torch
from helpers import (
    DIFFERENTIABLE_OPS,
    Inputs,
    check_as_given,
    differentiable,
    evaluate,
    make_inputs,
    make_packed_inputs,
    weights,
)
from launches import launched
from shapes import Shape

SHAPE = Shape(
    "needed", 37, 45, 4, 2, 12, 8,
    batch=2, block_size=8, block_stride=4, select_size=8, num_selected=3, window=9,
)  # fmt: skip
LENGTHS = [(13, 29), (0, 0), (7, 7), (1, 20)]
# Shapes whose backwards run on a Hopper, portably, and with partial sums.
TILED = [
    Shape("tiled", 300, 300, 16, 1, 128, 128, num_selected=4, window=61),
    Shape("other_blocks", 200, 300, 6, 2, 64, 64, select_size=32, num_selected=4, window=61),
    Shape("long", 2048, 2048, 4, 1, 64, 64, num_selected=4, window=512),
]
INPUTS = {
    "compress": ("x", "pe", "w1", "b1", "w2", "b2"),
    "compressed_attention": ("q", "k_cmp", "v_cmp"),
    "selected_attention": ("q", "k", "v"),
    "window_attention": ("q", "k", "v"),
    "nsa_attention": ("q", "k_cmp", "v_cmp", "k_slc", "v_slc", "k_win", "v_win", "gates"),
}

packed = pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])


def subsets(op: str) -> Iterator[tuple[str, ...]]:
    """Every set of inputs of a branch; of more inputs each alone, each pair, and all but each."""
    names = INPUTS[op]
    sizes = (1, 2) if len(names) == 3 else (1, 2, len(names) - 1)
    for size in sizes:
        yield from combinations(names, size)


def inputs_of(op: str, packed: bool, *, mode: str = "mlp") -> Inputs:
    inputs = make_packed_inputs(op, SHAPE, LENGTHS) if packed else make_inputs(op, SHAPE)
    if op != "compress":
        return inputs
    random = torch.Generator().manual_seed(0)
    return Inputs({"x": inputs.tensors["x"], **weights(SHAPE, mode, random)}, inputs.options)


@packed
@pytest.mark.parametrize("op", DIFFERENTIABLE_OPS)
def test_some_gradients_are_those_among_all(op: str, packed: bool) -> None:
    """Bit for bit on the CPU, whether the other inputs are frozen or their gradients not asked for."""
    inputs = inputs_of(op, packed)
    assert tuple(differentiable(inputs)) == INPUTS[op]
    function = getattr(nsa_torch, op)
    everything = evaluate(function, inputs)
    for wanted in subsets(op):
        found = evaluate(function, inputs, wanted=wanted)
        assert {name for name in found if name.startswith("grad_")} == {f"grad_{name}" for name in wanted}
        for name, value in found.items():
            assert torch.equal(value, everything[name]), (wanted, name)
        assert_asked_for(function, inputs, wanted, everything)


def assert_asked_for(function: Any, inputs: Inputs, wanted: tuple[str, ...], everything: dict[str, Tensor]) -> None:
    leaves = {name: inputs.tensors[name].detach().requires_grad_() for name in differentiable(inputs)}
    result = function(**inputs.tensors | leaves, **inputs.options)
    outputs = result if isinstance(result, tuple) else (result,)
    random = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(o.shape, generator=random, dtype=torch.float64) for o in outputs]
    grads = torch.autograd.grad(outputs, [leaves[name] for name in wanted], cotangents)
    for name, grad in zip(wanted, grads, strict=True):
        assert torch.equal(grad, everything[f"grad_{name}"]), (wanted, name)


@packed
@pytest.mark.parametrize("mode", ["linear", "mean"])
def test_of_other_compressions(mode: str, packed: bool) -> None:
    inputs = inputs_of("compress", packed, mode=mode)
    everything = evaluate(nsa_torch.compress, inputs)
    for name in differentiable(inputs):
        found = evaluate(nsa_torch.compress, inputs, wanted=[name])
        assert torch.equal(found[f"grad_{name}"], everything[f"grad_{name}"])


@packed
@pytest.mark.parametrize("op", DIFFERENTIABLE_OPS)
def test_the_ops_mask(op: str, packed: bool, device: str) -> None:
    """What an op's output_mask leaves out is a tensor of no elements, on every backend and without one."""
    inputs = inputs_of(op, packed).to(device, torch.float32)
    for target in (device, "meta"):
        arguments = backward_arguments(op, inputs)
        moved = {n: x.to(target) if isinstance(x, Tensor) else x for n, x in arguments.items()}
        backward = getattr(torch.ops.nsa, f"{op}_backward")
        for wanted in subsets(op):
            grads = backward(**moved, output_mask=[name in wanted for name in INPUTS[op]])
            for name, grad in zip(INPUTS[op], grads, strict=True):
                assert grad.shape == (inputs.tensors[name].shape if name in wanted else (0,)), (wanted, name)


@packed
@pytest.mark.parametrize("op", DIFFERENTIABLE_OPS)
def test_opcheck_with_a_mask(op: str, packed: bool, device: str) -> None:
    inputs = inputs_of(op, packed).to(device, torch.float32)
    mask = [i % 2 == 1 for i in range(len(INPUTS[op]))]
    torch.library.opcheck(
        getattr(torch.ops.nsa, f"{op}_backward"), (), backward_arguments(op, inputs) | {"output_mask": mask}
    )


def backward_arguments(op: str, inputs: Inputs) -> dict[str, Any]:
    """Those of the op's backward, by name, without the mask."""
    options: dict[str, Any] = {"scale": None, "cu_seqlens_q": None, "cu_seqlens_k": None, "seqused_k": None}
    options |= {"max_seqlen_q": None, "max_seqlen_k": None, "block_indices": None, "seqlen_k": None} | inputs.options
    schema = getattr(torch.ops.nsa, f"{op}_backward").default._schema
    names = {argument.name for argument in schema.arguments} - {"output_mask"}
    if op == "nsa_attention":
        forward = torch.ops.nsa.nsa_attention_forward
        given = {a.name for a in forward.default._schema.arguments} & set(options)
        out, *saved = forward(**inputs.tensors, **{name: options[name] for name in given})
        results = ["out_cmp", "lse_cmp", "out_slc", "lse_slc", "out_win", "lse_win", "block_indices"]
        more = dict(zip(results, saved, strict=True))
    else:
        result = getattr(nsa_torch, op)(**inputs.tensors, **inputs.options)
        out, lse = result if isinstance(result, tuple) else (result, None)
        more = {"out": out, "lse": lse, "grad_lse": None}
    everything = options | inputs.tensors | more | {"grad_out": torch.randn_like(out)}
    return {name: everything[name] for name in names}


@pytest.mark.parametrize("wanted", [("q",), ("k_slc",), ("gates",), ("k_cmp", "v_win")], ids=str)
def test_branches_that_nobody_asks_for_are_not_run(wanted: tuple[str, ...]) -> None:
    inputs = make_inputs("nsa_attention", SHAPE)
    leaves = {name: inputs.tensors[name].requires_grad_() for name in wanted}
    out = nsa_torch.nsa_attention(**inputs.tensors | leaves, **inputs.options)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        out.sum().backward()
    shown = {event.key.removeprefix("nsa::") for event in profile.key_averages() if event.key.startswith("nsa::")}
    of_branch = {"cmp": "compressed", "slc": "selected", "win": "window"}
    if wanted == ("q",):
        branches = set(of_branch.values())
    else:
        branches = {of_branch[name[2:]] for name in wanted if name != "gates"}
    assert shown == {"nsa_attention_backward", *(f"{branch}_attention_backward" for branch in branches)}


@pytest.mark.parametrize("wanted", ["q", "gates", "v_cmp"])
def test_compiled(wanted: str, device: str) -> None:
    inputs = make_inputs("nsa_attention", SHAPE).to(device, torch.float32)
    function = torch.compile(nsa_torch.nsa_attention, fullgraph=True, backend="aot_eager")
    expected = evaluate(nsa_torch.nsa_attention, inputs, wanted=[wanted])
    found = evaluate(function, inputs, wanted=[wanted])
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


def test_which_kernel_names_what_is_left() -> None:
    shape: dict[str, Any] = {"num_heads": 16, "num_kv_heads": 1, "num_keys": 4096, "backward": True}
    shape |= {"device": "cuda", "dtype": "bfloat16", "capability": (9, 0)}
    query = nsa_torch.which_kernel("selected_attention", **shape, gradients=["q"])
    assert query.workspace_bytes == 0
    assert query.kernels[0] == "delta" and query.kernels[1].startswith("selected_backward_query_sm")
    keys = nsa_torch.which_kernel("selected_attention", **shape, gradients=["v"])
    assert not any("query" in name for name in keys.kernels) and "list_pairs" in keys.kernels
    assert nsa_torch.which_kernel("nsa_attention", **shape, gradients=["gates"]).kernels == ("gate_gradients",)
    window = nsa_torch.which_kernel("nsa_attention", **shape, gradients=["k_win"]).kernels
    assert window[0] == "gate_gradients" and window[1].startswith("range_backward_keys_sm")
    assert nsa_torch.which_kernel("compress", **shape, gradients=["b2"]).kernels == ()
    for op, bad in (("compress", "q"), ("nsa_attention", "k"), ("window_attention", "gates")):
        with pytest.raises(ValueError, match=r"^gradients must be one of"):
            nsa_torch.which_kernel(op, **shape, gradients=[bad])
    with pytest.raises(TypeError, match=r"^gradients must be a sequence of names"):
        nsa_torch.which_kernel("nsa_attention", **shape, gradients="q")
    with pytest.raises(ValueError, match=r"^gradients must come with backward"):
        nsa_torch.which_kernel("nsa_attention", **shape | {"backward": False}, gradients=["q"])


# --- on a GPU ---


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", TILED, ids=lambda s: s.name)
@pytest.mark.parametrize("op", DIFFERENTIABLE_OPS)
def test_kernels_of_some_gradients(op: str, shape: Shape, dtype: torch.dtype) -> None:
    """They are right, and those that the plan names run."""
    inputs = make_inputs(op, shape).to("cuda", dtype)
    sizes: dict[str, Any] = {"num_heads": shape.heads_q, "num_kv_heads": shape.heads_kv, "batch": shape.batch}
    sizes |= {"head_dim": shape.dim_k, "v_head_dim": shape.dim_v, "num_keys": shape.seqlen_k}
    sizes |= {"num_queries": shape.seqlen_q, "per_head": True, "hidden_size": 5}
    sizes |= shape.options("block_size", "block_stride", "select_size", "num_selected", "window")
    for wanted in combinations(INPUTS[op], 1):
        check_as_given(op, inputs, dtype, wanted=wanted)
        leaves = {name: inputs.tensors[name].detach().requires_grad_() for name in wanted}
        result = getattr(nsa_torch, op)(**inputs.tensors | leaves, **inputs.options)
        out = result[0] if isinstance(result, tuple) else result
        leaf = leaves[wanted[0]]
        shown = launched(lambda out=out, leaf=leaf: torch.autograd.grad(out.sum(), leaf, retain_graph=True))
        if op == "compress":  # w2 is shared by the heads here: what a plan names does not depend on it
            sizes["per_head"] = False
        plan = nsa_torch.which_kernel(
            op, device="cuda", dtype=str(dtype).removeprefix("torch."), backward=True, gradients=wanted, **sizes
        )
        assert set(shown) == set(plan.kernels), (wanted, dict(shown))


@pytest.mark.cuda
@pytest.mark.parametrize("op", DIFFERENTIABLE_OPS)
def test_kernels_of_packed_calls(op: str) -> None:
    shape = Shape("packed", 0, 0, 16, 1, 128, 128, num_selected=4, window=61)
    lengths = [(131, 131), (45, 150), (0, 0), (1, 70)]
    inputs = make_packed_inputs(op, shape, lengths).to("cuda", torch.bfloat16)
    for wanted in combinations(INPUTS[op], 1):
        check_as_given(op, inputs, torch.bfloat16, wanted=wanted)
