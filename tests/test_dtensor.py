"""The ops on DTensors: cut over heads or batch they give what whole tensors give; other cuts are refused by name."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import nsa_torch
from helpers import OPS, Inputs, differentiable, make_inputs, make_packed_inputs, weights
from processes import assert_all_near, assert_near, on_ranks, whole
from shapes import Shape

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")

OPTIONS = {"block_size": 8, "block_stride": 4, "select_size": 16, "num_selected": 4, "window": 13}
SHAPE = Shape("on four ranks", 37, 37, 8, 4, 6, 4, batch=3, **OPTIONS)
LENGTHS = [(7, 7), (0, 5), (19, 40)]


def head_dim_of(name: str, tensor: Tensor, per_head: bool) -> int | None:
    """Which dimension of an argument has the heads."""
    if name == "lse":
        return tensor.dim() - 2
    if name in ("pe", "w1", "b1", "w2", "b2"):
        return 0 if per_head else None
    return None if name.startswith("cu_seqlens") else tensor.dim() - 2


def distribute(inputs: Inputs, mesh: Any, cuts: str, per_head: bool = False) -> Inputs:
    """`cuts`: for each dimension of the mesh h, b, or a dot for nothing."""
    from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor

    def cut(name: str, tensor: Any) -> Any:
        if not isinstance(tensor, Tensor):
            return tensor
        head, weight = head_dim_of(name, tensor, per_head), name in ("pe", "w1", "b1", "w2", "b2")
        dims = {"h": head, "b": None if weight else 0}
        placements: list[Placement] = [Replicate() if dims.get(axis) is None else Shard(dims[axis]) for axis in cuts]
        return distribute_tensor(tensor, mesh, placements)

    return Inputs(*({name: cut(name, value) for name, value in part.items()} for part in inputs))


def results(op: str, inputs: Inputs, function: Any = None) -> dict[str, Tensor]:
    """Outputs, and gradients of a weighting of them, whole."""
    names = differentiable(inputs)
    leaves = {name: inputs.tensors[name].detach().requires_grad_() for name in names}
    given = (function or getattr(nsa_torch, op))(**(inputs.tensors | leaves), **inputs.options)
    outputs = [whole(out) for out in (given if isinstance(given, tuple) else (given,))]
    if op == "select_blocks":
        return {"out": outputs[0]}
    torch.manual_seed(1)
    total = sum((out * torch.randn(out.shape, dtype=out.dtype)).nan_to_num(0, 0, 0).sum() for out in outputs)
    grads = torch.autograd.grad(total, list(leaves.values()))
    assert all(type(grad) is type(leaf) for grad, leaf in zip(grads, leaves.values(), strict=True))
    named = {f"grad_{name}": whole(grad) for name, grad in zip(names, grads, strict=True)}
    return {f"out_{n}": out.detach() for n, out in enumerate(outputs)} | named


def all_inputs(op: str) -> list[tuple[Inputs, bool]]:
    """Dense and packed ones; the compression's weights are shared, or each head's own."""
    packed = make_packed_inputs(op, SHAPE, LENGTHS)
    if op != "compress":
        return [(make_inputs(op, SHAPE), False), (packed, False)]
    found = []
    for inputs, per_head in itertools.product((make_inputs(op, SHAPE), packed), (False, True)):
        names = ("pe", "w1", "b1", "w2", "b2") if per_head else ()
        own = weights(SHAPE, "mlp", torch.Generator().manual_seed(0), per_head=names)
        found.append((Inputs({"x": inputs.tensors["x"]} | own, inputs.options), per_head))
    return found


def _one_dimension(mesh: Any) -> None:
    for op in OPS:
        for inputs, per_head in all_inputs(op):
            packed = "cu_seqlens_k" in inputs.options
            expected = results(op, inputs)
            for cut in ("h", ".", *(() if packed or per_head else "b")):
                got = results(op, distribute(inputs, mesh, cut, per_head))
                assert_all_near(got, expected, f"{op}, {cut}, packed {packed}, per head {per_head}")


def _two_dimensions(mesh: Any) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    for op in OPS:
        inputs = make_inputs(op, SHAPE)
        if op == "compress":
            inputs = all_inputs(op)[0][0]
        expected = results(op, inputs)
        for cuts in ("bh", "hh", "h.", "bb"):
            assert_all_near(results(op, distribute(inputs, square, cuts)), expected, f"{op}, {cuts}")


def _results_know_where_they_are(mesh: Any) -> None:
    """Three sequences on four ranks: a rank has none, and shapes are those of the whole."""
    from torch.distributed.tensor import Shard

    for cut, dim in (("b", 0), ("h", 1)):
        inputs = distribute(make_inputs("window_attention", SHAPE), mesh, cut)
        out, lse = nsa_torch.window_attention(**inputs.tensors, **inputs.options)
        assert out.shape == (3, 37, 8, 4) and lse.shape == (3, 8, 37)
        assert out.stride() == (37 * 8 * 4, 8 * 4, 4, 1)
        assert lse.placements == (Shard(dim),) and out.placements == (Shard(0 if cut == "b" else 2),)


def _rotation(mesh: Any) -> None:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    torch.manual_seed(2)
    x, cos = torch.randn(4, 9, 4, 6, dtype=torch.float64), torch.randn(9, 1, 6, dtype=torch.float64)
    each = torch.randn(4, 9, 1, 6, dtype=torch.float64)
    for tables, placement in itertools.product((cos, cos[None], each), (Shard(0), Shard(2), Replicate())):
        cut = distribute_tensor(x, mesh, [placement])
        own = tables.size(0) == 4 and placement == Shard(0)
        angles = distribute_tensor(tables, mesh, [Shard(0) if own else Replicate()])
        expected = nsa_torch.rotate(x, tables, 2 * tables)
        assert_near(whole(nsa_torch.rotate(cut, angles, 2 * angles)), expected, f"{placement}")
        if own:
            with pytest.raises(TypeError, match="cos must be a DTensor as x is, with placements"):
                nsa_torch.rotate(cut, tables, 2 * tables)
        else:  # tables are the same on all ranks
            assert_near(whole(nsa_torch.rotate(cut, tables, 2 * tables)), expected, f"{placement}, plain")


def _compiled(mesh: Any) -> None:
    torch.compiler.reset()
    for op in ("nsa_attention", "compress"):
        inputs = distribute(all_inputs(op)[0][0], mesh, "h")
        function = torch.compile(getattr(nsa_torch, op), backend="aot_eager", fullgraph=True)
        assert_all_near(results(op, inputs, function), results(op, inputs), f"{op}, compiled")


def _refusals(mesh: Any) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    inputs = make_inputs("window_attention", SHAPE)
    cut = distribute(inputs, mesh, "h").tensors
    other = init_device_mesh("cpu", (2, 2))
    two, six = (
        {n: distribute_tensor(t[:, :, :heads], mesh, [Shard(2)]) for n, t in inputs.tensors.items()} for heads in (2, 6)
    )
    tokens = distribute_tensor(inputs.tensors["q"], mesh, [Shard(1)])
    channels = distribute_tensor(inputs.tensors["q"], mesh, [Shard(3)])
    partial = DTensor.from_local(inputs.tensors["q"], mesh, [Partial()])
    whole_k = distribute_tensor(inputs.tensors["k"], mesh, [Replicate()])
    elsewhere = distribute_tensor(inputs.tensors["k"], other, [Replicate(), Shard(2)])
    for changes, error, message in (
        ({"k": two["k"], "v": two["v"]}, ValueError, "k must have heads that 4 ranks divide, got 2"),
        ({"q": six["q"]}, ValueError, "q must have heads that 4 ranks divide, got 6"),
        ({"q": tokens}, ValueError, r"q must be whole, or cut over its heads or its batch.*got S\(1\), its tokens"),
        ({"q": channels}, ValueError, r"q must be whole, .* got S\(3\), its channels"),
        ({"q": partial}, ValueError, r"q must be whole, .* got P"),
        ({"q": inputs.tensors["q"]}, TypeError, "q must be a DTensor as k is, got Tensor"),
        ({"k": inputs.tensors["k"]}, TypeError, "k must be a DTensor as q is, with placements .*, got a plain tensor"),
        ({"k": whole_k}, ValueError, r"k must have placements \[Shard\(dim=2\)\], since q has"),
        ({"k": elsewhere}, ValueError, "k must be on the mesh of q"),
    ):
        with pytest.raises(error, match=message):
            nsa_torch.window_attention(**(cut | changes), window=5)
    nested = distribute(Inputs({n: whole(t) for n, t in two.items()}, {}), other, "hh").tensors
    with pytest.raises(ValueError, match="k must have heads that 4 ranks divide, got 2"):
        nsa_torch.window_attention(**(nested | {"q": distribute(inputs, other, "hh").tensors["q"]}), window=5)
    with pytest.raises(NotImplementedError, match=r"window_attention\.default does not have a sharding strategy"):
        torch.ops.nsa.window_attention(*cut.values(), window=5)


def test_on_four_ranks() -> None:
    checks = (_one_dimension, _two_dimensions, _results_know_where_they_are, _rotation, _compiled, _refusals)
    on_ranks(4, *checks)
