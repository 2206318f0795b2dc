"""torch.library.opcheck on every op of the library, backward ops included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import DIFFERENTIABLE_OPS, Inputs, make_inputs, make_packed_inputs
from nsa_torch import reference
from shapes import Shape

SHAPE = Shape(
    "opcheck", 11, 19, 4, 2, 6, 4,
    batch=2, block_size=8, block_stride=4, select_size=8, num_selected=3, num_local=1, window=5,
)  # fmt: skip
LENGTHS = [(3, 19), (0, 0), (9, 9)]

packed = pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)


@pytest.mark.parametrize("op", [*DIFFERENTIABLE_OPS, "select_blocks"])
@packed
@dtypes
def test_forward(op: str, packed: bool, dtype: torch.dtype, device: str) -> None:
    inputs = _inputs(op, packed, device, dtype)
    leaves = {
        name: t.requires_grad_(t.is_floating_point() and op != "select_blocks") for name, t in inputs.tensors.items()
    }
    _opcheck(op, leaves, inputs.options)


@packed
def test_nsa_attention_choosing_blocks(packed: bool, device: str) -> None:
    inputs = _inputs("nsa_attention", packed, device, torch.float32).replace(block_indices=None)
    leaves = {name: t.requires_grad_() for name, t in inputs.tensors.items()}
    _opcheck("nsa_attention", leaves, inputs.options)


@pytest.mark.parametrize("present", ["x", "x w1", "x pe w1 b1", "x w1 w2"])
def test_compress_with_fewer_weights(present: str, device: str) -> None:
    inputs = _inputs("compress", False, device, torch.float32)
    leaves = {name: inputs.tensors[name].requires_grad_() for name in present.split()}
    _opcheck("compress", leaves, inputs.options)


@dtypes
@pytest.mark.parametrize("transposed", [False, True])
def test_rotate(transposed: bool, dtype: torch.dtype, device: str) -> None:
    dtype = torch.float32 if device == "cuda" and dtype == torch.float64 else dtype
    x = torch.randn(2, 11, 3, 8, device=device, dtype=dtype).requires_grad_()
    cos, sin = (torch.randn(11, 1, 8, device=device) for _ in range(2))
    _opcheck("rotate", {"x": x, "cos": cos, "sin": sin, "transposed": transposed}, {})


@packed
@dtypes
def test_compress_backward(packed: bool, dtype: torch.dtype, device: str) -> None:
    inputs = _inputs("compress", packed, device, dtype)
    out = reference.compress(**inputs.tensors, **inputs.options)
    options = {"cu_seqlens_k": None, "max_seqlen_k": None} | inputs.options
    _opcheck("compress_backward", {"grad_out": torch.randn_like(out), **inputs.tensors}, options)


@pytest.mark.parametrize("op", ["compressed_attention", "selected_attention", "window_attention"])
@pytest.mark.parametrize("with_lse", [False, True], ids=["out", "out_and_lse"])
@packed
@dtypes
def test_attention_backward(op: str, with_lse: bool, packed: bool, dtype: torch.dtype, device: str) -> None:
    inputs = _inputs(op, packed, device, dtype)
    out, lse = getattr(reference, op)(**inputs.tensors, **inputs.options)
    grads = {
        "grad_out": torch.randn_like(out),
        "grad_lse": torch.randn_like(lse) if with_lse else None,
    }
    options = {"seqlen_k": None} if op == "compressed_attention" else {}
    options = options | _PACKING | {"scale": None} | inputs.options
    _opcheck(f"{op}_backward", {**grads, **inputs.tensors, "out": out, "lse": lse}, options)


@packed
@pytest.mark.parametrize("given", [False, True], ids=["chosen", "given"])
@dtypes
def test_nsa_attention_forward_and_backward(given: bool, packed: bool, dtype: torch.dtype, device: str) -> None:
    """The op that also returns what the backward needs, and the backward on that."""
    inputs = _inputs("nsa_attention", packed, device, dtype)
    options = _PACKING | {"scale": None} | inputs.options
    if not given:
        options["block_indices"] = None
    _opcheck("nsa_attention_forward", inputs.tensors, options)

    results = torch.ops.nsa.nsa_attention_forward(**inputs.tensors, **options)
    out, *saved = results
    names = ["out_cmp", "lse_cmp", "out_slc", "lse_slc", "out_win", "lse_win", "block_indices"]
    tensors = {"grad_out": torch.randn_like(out), **inputs.tensors}
    tensors |= dict(zip(names, saved, strict=True))
    for name in ("block_indices", "num_selected", "num_initial", "num_local"):
        del options[name]
    _opcheck("nsa_attention_backward", tensors, options)


@pytest.mark.parametrize("op", DIFFERENTIABLE_OPS)
def test_second_derivatives_are_refused(op: str, device: str) -> None:
    inputs = _inputs(op, False, device, torch.float32)
    leaves = {n: t.requires_grad_() if t.is_floating_point() else t for n, t in inputs.tensors.items()}
    wanted = [t for t in leaves.values() if t.requires_grad]
    result = getattr(torch.ops.nsa, op)(**leaves, **inputs.options)
    out = result[0] if isinstance(result, tuple) else result
    grads = torch.autograd.grad(out.square().sum(), wanted, create_graph=True)
    with pytest.raises(RuntimeError, match=rf"{op}_backward|{op}.*twice|second"):
        torch.autograd.grad(sum(g.sum() for g in grads), wanted)


def test_every_op_of_the_library_is_here() -> None:
    """A new op needs its opcheck: add it above, then here."""
    forwards = {*DIFFERENTIABLE_OPS, "select_blocks"}
    backwards = {f"{op}_backward" for op in DIFFERENTIABLE_OPS}
    registered = {
        schema.name.removeprefix("nsa::")
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("nsa::")
    }
    elsewhere = {"rotate", "nsa_attention_with_kvcache"}  # test_rotate.py, test_decode.py
    assert registered == forwards | backwards | elsewhere | {"nsa_attention_forward"}


_PACKING: dict[str, Any] = {
    "cu_seqlens_q": None,
    "cu_seqlens_k": None,
    "max_seqlen_q": None,
    "max_seqlen_k": None,
    "seqused_k": None,
}


def _inputs(op: str, packed: bool, device: str, dtype: torch.dtype) -> Inputs:
    exact = make_packed_inputs(op, SHAPE, LENGTHS) if packed else make_inputs(op, SHAPE)
    if device == "cuda" and dtype == torch.float64:
        dtype = torch.float32
    inputs = exact.to(device, dtype)
    if op == "select_blocks" and dtype != torch.float64:
        inputs = inputs.replace(lse=exact.tensors["lse"].to(device, torch.float32))
    return inputs


def _opcheck(op: str, tensors: dict[str, Any], options: dict[str, Any]) -> None:
    """All of opcheck's tests: schema, autograd registration, fake tensors, aot with dynamic shapes.

    Tensors, and what else the schema has with them, go by position, and options by name.
    """
    overload = getattr(torch.ops.nsa, op).default
    names = [argument.name for argument in overload._schema.arguments if not argument.kwarg_only]
    assert set(tensors) <= set(names)
    args = tuple(tensors.get(name) for name in names)
    tolerance = {"atol": 1e-2, "rtol": 1e-2} if _is_16_bit(tensors) else {}
    torch.library.opcheck(overload, args, options, **tolerance)


def _is_16_bit(tensors: dict[str, Any]) -> bool:
    return any(isinstance(t, Tensor) and t.dtype == torch.bfloat16 for t in tensors.values())
