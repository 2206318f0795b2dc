"""Inputs of every op from a shape, and the comparison of an op with the float64 reference."""

from __future__ import annotations

import importlib.util
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

import nsa_torch
from nsa_torch import reference
from shapes import Shape

ATTENTION_OPS = ("compressed_attention", "selected_attention", "window_attention")
DIFFERENTIABLE_OPS = ("compress", *ATTENTION_OPS, "nsa_attention")
OPS = (*DIFFERENTIABLE_OPS, "select_blocks")

FLOAT64_TOLERANCE = 1e-10
ULPS = 4  # what a result may err in its own dtype beside the rule of twice

BLOCK_OPTIONS = ("block_size", "block_stride")
CHOICE_OPTIONS = (*BLOCK_OPTIONS, "select_size", "num_selected", "num_initial", "num_local")
OPTIONS: dict[str, tuple[str, ...]] = {
    "compress": BLOCK_OPTIONS,
    "compressed_attention": BLOCK_OPTIONS,
    "select_blocks": CHOICE_OPTIONS,
    "selected_attention": ("select_size",),
    "window_attention": ("window",),
    "nsa_attention": (*CHOICE_OPTIONS, "window"),
}

Results = dict[str, Tensor]

# What a test has held to the reference, outputs and gradients, as "op device dtype Dk Dv": conftest.py writes it into
# the report of a run, and tools/support.py makes the README's table of it.
COMPARED: set[str] = set()


class Target(NamedTuple):
    device: str
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.device}-{str(self.dtype).removeprefix('torch.')}"


def sharpest(device: str) -> tuple[torch.dtype, float]:
    """The dtype in which two ways to one result are compared, and by how much they may differ."""
    return (torch.float64, FLOAT64_TOLERANCE) if device == "cpu" else (torch.float32, 1e-3)


class Inputs(NamedTuple):
    """Arguments of one call: tensors by name (those that carry gradients first), and options."""

    tensors: dict[str, Tensor]
    options: dict[str, Any]

    @property
    def device(self) -> str:
        return next(iter(self.tensors.values())).device.type

    def to(self, device: str, dtype: torch.dtype) -> Inputs:
        def convert(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return value.to(device, dtype if value.is_floating_point() else value.dtype)

        return Inputs(
            {name: convert(value) for name, value in self.tensors.items()},
            {name: convert(value) for name, value in self.options.items()},
        )

    def replace(self, **changes: Any) -> Inputs:
        tensors = {name: changes.pop(name, value) for name, value in self.tensors.items()}
        return Inputs(tensors, self.options | changes)


def make_inputs(op: str, shape: Shape, *, seed: int = 0) -> Inputs:
    """float64 inputs of a dense call on the CPU, the same ones for the same shape and seed."""
    lengths = [(shape.seqlen_q, shape.seqlen_k)] * shape.batch
    return _inputs(op, shape, lengths, packed=False, seed=seed)


def make_packed_inputs(op: str, shape: Shape, lengths: Sequence[tuple[int, int]], *, seed: int = 0) -> Inputs:
    """The same for packed sequences of `lengths` (Tq, Tk)."""
    return _inputs(op, shape, lengths, packed=True, seed=seed)


def cumulative(lengths: Sequence[int], device: str = "cpu") -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)


def _inputs(op: str, shape: Shape, lengths: Sequence[tuple[int, int]], *, packed: bool, seed: int) -> Inputs:
    random = torch.Generator().manual_seed(zlib.crc32(f"{shape} {op}".encode()) + seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=random, dtype=torch.float64)

    total_q, total_k = (sum(length) for length in zip(*lengths, strict=True)) if lengths else (0, 0)
    if packed:
        rows_q, rows_k = (total_q,), (total_k,)
        rows_cmp: tuple[int, ...] = (total_k // shape.block_stride,)
    else:
        rows_q, rows_k = (shape.batch, shape.seqlen_q), (shape.batch, shape.seqlen_k)
        rows_cmp = (shape.batch, shape.blocks)
    heads_q, heads_kv, dim_k, dim_v = shape.heads_q, shape.heads_kv, shape.dim_k, shape.dim_v

    options: dict[str, Any] = shape.options(*OPTIONS[op])
    if packed:
        options["cu_seqlens_k"] = cumulative([k for _, k in lengths])
        if op != "compress":
            options["cu_seqlens_q"] = cumulative([q for q, _ in lengths])
    elif op in ("compressed_attention", "select_blocks"):
        options["seqlen_k"] = shape.seqlen_k

    if op == "compress":
        x = normal(*rows_k, heads_kv, dim_k)
        return Inputs({"x": x, **weights(shape, "mlp", random)}, options)
    tensors = {"q": normal(*rows_q, heads_q, dim_k)}
    if op in ("compressed_attention", "select_blocks", "nsa_attention"):
        tensors["k_cmp"] = normal(*rows_cmp, heads_kv, dim_k)
        tensors["v_cmp"] = normal(*rows_cmp, heads_kv, dim_v)
    if op == "select_blocks":
        call = dict(options)
        for name in ("select_size", "num_selected", "num_initial", "num_local"):
            call.pop(name)
        tensors["lse"] = reference.compressed_attention(**tensors, **call)[1]
        del tensors["v_cmp"]
        return Inputs(tensors, options)
    names = {"nsa_attention": ("k_slc", "v_slc", "k_win", "v_win"), "compressed_attention": ()}
    for name in names.get(op, ("k", "v")):
        tensors[name] = normal(*rows_k, heads_kv, dim_k if name.startswith("k") else dim_v)
    if op == "nsa_attention":
        tensors["gates"] = normal(*rows_q, heads_q, 3).sigmoid()
    if op in ("selected_attention", "nsa_attention"):
        lists = [random_lists(shape, tq, tk, random) for tq, tk in lengths]
        empty = torch.zeros(*rows_q, heads_kv, shape.num_selected, dtype=torch.int32)
        joined = (torch.cat if packed else torch.stack)(lists) if lists else empty
        (tensors if op == "selected_attention" else options)["block_indices"] = joined
    return Inputs(tensors, options)


def weights(
    shape: Shape, mode: str, random: torch.Generator, *, per_head: Sequence[str] = ("w1", "b2"), hidden: int = 5
) -> dict[str, Tensor]:
    """Weights of compress; those named in per_head have one set for each KV head."""
    dim, width = shape.dim_k, shape.block_size * shape.dim_k
    sizes: dict[str, tuple[int, ...]] = {
        "mlp": {
            "pe": (shape.block_size, dim),
            "w1": (hidden, width),
            "b1": (hidden,),
            "w2": (shape.dim_v, hidden),
            "b2": (shape.dim_v,),
        },
        "linear": {"pe": (shape.block_size, dim), "w1": (shape.dim_v, width), "b1": (shape.dim_v,)},
        "mean": {},
    }[mode]
    return {
        name: torch.randn(
            *((shape.heads_kv,) if name in per_head else ()),
            *size,
            generator=random,
            dtype=torch.float64,
        )
        / (width**0.5 if name == "w1" else 1)
        for name, size in sizes.items()
    }


def random_lists(shape: Shape, seqlen_q: int, seqlen_k: int, random: torch.Generator) -> Tensor:
    """Random blocks of one sequence, (Tq, Hkv, n): in any order, -1 among them, some not visible."""
    count = -(-seqlen_k // shape.select_size)
    columns = max(count, shape.num_selected)
    order = torch.rand(seqlen_q, shape.heads_kv, columns, generator=random).argsort(-1)
    lists = order[..., : shape.num_selected]
    return lists.masked_fill(lists >= count, -1).int()


def differentiable(inputs: Inputs) -> list[str]:
    return [n for n, t in inputs.tensors.items() if t.is_floating_point() and n != "lse"]


def evaluate(op: Callable[..., Any], inputs: Inputs, *, seed: int = 1, wanted: Sequence[str] | None = None) -> Results:
    """Outputs, and the gradients of a random weighting of them, as out, lse, grad_q, ...: those of the inputs that are
    `wanted`, by default all, while the others are frozen.
    """
    names = [name for name in differentiable(inputs) if wanted is None or name in wanted]
    leaves = {name: inputs.tensors[name].detach().requires_grad_() for name in names}
    result = op(**(inputs.tensors | leaves), **inputs.options)
    outputs = result if isinstance(result, tuple) else (result,)
    random = torch.Generator().manual_seed(seed)
    cotangents = [torch.randn(o.shape, generator=random, dtype=torch.float64).to(o.device, o.dtype) for o in outputs]
    used = [number for number, output in enumerate(outputs) if output.requires_grad]  # lse does not depend on v
    grads = torch.autograd.grad(
        [outputs[number] for number in used], list(leaves.values()), [cotangents[number] for number in used]
    )
    for name, grad in zip(names, grads, strict=True):
        assert grad.dtype == leaves[name].dtype, f"gradient of {name} is {grad.dtype}"
    named = dict(zip(("out", "lse"), (o.detach() for o in outputs), strict=False))
    return named | {f"grad_{name}": grad for name, grad in zip(names, grads, strict=True)}


def check_op(op: str, inputs: Inputs, target: Target = Target("cpu", torch.float64)) -> Results:
    """Holds nsa_torch's op, outputs and gradients, to the reference. `inputs` are in float64."""
    if target.dtype != torch.float64:
        return check_as_given(op, inputs.to(target.device, target.dtype), target.dtype)
    results = evaluate(getattr(nsa_torch, op), inputs)
    assert_close(results, evaluate(getattr(reference, op), inputs), FLOAT64_TOLERANCE)
    _note(op, inputs, target.dtype)
    return results


def check_as_given(op: str, inputs: Inputs, dtype: torch.dtype, *, wanted: Sequence[str] | None = None) -> Results:
    """The same for inputs in `dtype`, with their device and strides. The truth is computed on that device."""
    expected = getattr(reference, op)
    results = evaluate(getattr(nsa_torch, op), inputs, wanted=wanted)
    truth = evaluate(expected, inputs.to(inputs.device, torch.float64), wanted=wanted)
    assert_errs_at_most_twice(results, truth, evaluate(expected, inputs, wanted=wanted), dtype)
    if wanted is None:
        _note(op, inputs, dtype)
    return results


def _note(op: str, inputs: Inputs, dtype: torch.dtype) -> None:
    if "q" in inputs.tensors:
        value = next(tensor for name, tensor in inputs.tensors.items() if name.startswith("v"))
        dims = f"{inputs.tensors['q'].size(-1)} {value.size(-1)}"
        COMPARED.add(f"{op} {inputs.device} {str(dtype).removeprefix('torch.')} {dims}")


def assert_close(actual: Results, expected: Results, tolerance: float) -> None:
    """Equal up to an absolute tolerance, with infinities in the same places and NaN nowhere."""
    assert actual.keys() == expected.keys()
    for name, want in expected.items():
        error = _error(name, actual[name], want)
        assert error.numel() == 0 or error.max() <= tolerance, f"{name} errs by {error.max():.3g}"


def assert_errs_at_most_twice(actual: Results, truth: Results, baseline: Results, dtype: torch.dtype) -> None:
    """The largest and the root-mean-square error are at most twice those of the same maths in the
    same dtype by torch's ops, plus a few ulps of the largest value, plus a few of float32's of the
    largest of all results: where terms cancel to nothing, as the gradient of the only key that a
    query sees, the rounding of the terms is left.
    """
    ulp = torch.finfo(dtype).eps
    finite = {name: want[want.isfinite()].abs().to("cpu", torch.float64) for name, want in truth.items()}
    for measure in (torch.amax, _root_mean_square):
        sizes = {name: measure(values) for name, values in finite.items() if values.numel() > 0}
        rounding = torch.finfo(torch.float32).eps * max(sizes.values(), default=torch.tensor(0.0))
        for name, want in truth.items():
            ours, theirs = _error(name, actual[name], want), _error(name, baseline[name], want)
            if ours.numel() == 0:
                continue
            allowed = 2 * measure(theirs) + ULPS * (ulp * sizes[name] + rounding)
            assert measure(ours) <= allowed, (
                f"{name} errs by {measure(ours):.3g}, allowed {allowed:.3g}, "
                f"torch's ops in {dtype} err by {measure(theirs):.3g}"
            )


def _root_mean_square(values: Tensor) -> Tensor:
    return values.square().mean().sqrt()


def _error(name: str, actual: Tensor, expected: Tensor) -> Tensor:
    """|actual - expected| in float64 where both are finite."""
    assert actual.shape == expected.shape, f"{name} has shape {tuple(actual.shape)}"
    actual, expected = actual.to("cpu", torch.float64), expected.to("cpu", torch.float64)
    assert not actual.isnan().any(), f"{name} holds NaN"
    infinite = expected.isinf()
    assert torch.equal(actual[infinite], expected[infinite]), f"{name} misses an infinity"
    assert actual[~infinite].isfinite().all(), f"{name} holds an infinity too many"
    return (actual[~infinite] - expected[~infinite]).abs()


def load_script(path: Path) -> ModuleType:
    """A script of this repository as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
