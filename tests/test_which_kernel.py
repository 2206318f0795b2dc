"""Which kernels a call runs: what plans say of every shape on GPUs that are not here, and what a profile shows."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

import nsa_torch
from helpers import make_inputs, weights
from launches import launched
from shapes import ADVERSARIAL, GPU, MODELS, TILED, Shape

CAPABILITIES = [(8, 0), (8, 6), (9, 0), (10, 0), (12, 0)]
SHAPES = [s for s in (*ADVERSARIAL, *TILED, *GPU, *MODELS) if s.batch > 0 and s.dim_k <= 256 and s.dim_v <= 256]
OPS = ("compressed_attention", "select_blocks", "selected_attention", "window_attention", "nsa_attention")
MACHINE = re.compile(r"_(plain|sm80|sm90)$")


def query(shape: Shape, **more: Any) -> dict[str, Any]:
    sizes = {"batch": shape.batch, "num_heads": shape.heads_q, "num_kv_heads": shape.heads_kv}
    sizes |= {"head_dim": shape.dim_k, "v_head_dim": shape.dim_v}
    sizes |= {"num_queries": shape.seqlen_q, "num_keys": shape.seqlen_k}
    names = ("block_size", "block_stride", "select_size", "num_selected", "window")
    return sizes | shape.options(*names) | more


def machines(plan: nsa_torch.KernelPlan) -> set[str]:
    return {found[1] for name in plan.kernels if (found := MACHINE.search(name))}


@pytest.mark.parametrize("capability", CAPABILITIES, ids=str)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("op", OPS)
def test_every_shape_has_kernels_on_every_gpu(op: str, dtype: str, capability: tuple[int, int]) -> None:
    for shape in SHAPES:
        for backward in (False, True) if op != "select_blocks" else (False,):
            arguments = query(shape, device="cuda", dtype=dtype, capability=capability, backward=backward)
            plan = nsa_torch.which_kernel(op, **arguments)
            assert tuple(plan) == (plan.kernel, plan.reason)
            assert plan.reason
            allowed = {"plain"} if dtype == "float32" else {"sm80", "sm90"} if capability == (9, 0) else {"sm80"}
            assert machines(plan) <= allowed, (shape.name, plan)
            assert len(plan.kernels) == len(set(plan.kernels)) or op == "nsa_attention"
            assert plan.splits >= 1 and plan.workspace_bytes >= 0
            assert tuple(dict.fromkeys(launch.kernel for launch in plan.launches)) == plan.kernels
            for launch in plan.launches:
                assert launch.count >= 1 and launch.shared_bytes >= 0, launch
                assert launch.tile is None or launch.tile[0] > 0, launch
                assert f"{launch}" in repr(plan)


def kernels(op: str, **more: Any) -> list[str]:
    sizes: dict[str, Any] = {"device": "cuda", "dtype": "bfloat16", "capability": (9, 0), "num_heads": 64}
    sizes |= {"num_kv_heads": 4, "num_keys": 8192}
    return list(nsa_torch.which_kernel(op, **sizes | more).kernels)


def test_the_papers_shape_on_a_hopper() -> None:
    if nsa_torch.build_info()["cuda"] is not None and "sm90a" not in nsa_torch.build_info()["kernels"]:
        pytest.skip("a build without Hopper's kernels says so")
    assert kernels("compressed_attention") == ["range_forward_sm90"]
    assert kernels("window_attention") == ["range_forward_sm90"]
    assert kernels("select_blocks") == ["select_blocks_sm90"]
    assert kernels("selected_attention") == ["selected_forward_sm90"]
    backward = kernels("compressed_attention", backward=True)
    assert backward[:3] == ["delta", "range_backward_query_sm90", "range_backward_keys_sm90"]
    lists = ["list_pairs", "find_edges", "count_pieces", "list_pieces"]
    expected = ["delta", *lists, "selected_backward_keys_sm90", "selected_query_handed_sm90"]
    assert kernels("selected_attention", backward=True) == expected
    assert "combine_gates" not in kernels("nsa_attention")


@pytest.mark.parametrize(
    ("op", "change", "kernel", "reason"),
    [
        ("window_attention", {"capability": (8, 0)}, "range_forward_sm80", "not of compute capability 9.0"),
        ("window_attention", {"capability": (12, 0)}, "range_forward_sm80", "not of compute capability 9.0"),
        ("window_attention", {"head_dim": 256}, "range_forward_sm80", "head dimensions"),
        ("window_attention", {"num_heads": 65, "num_kv_heads": 1}, "range_forward_sm80", "more than 64 heads"),
        ("window_attention", {"dtype": "float32"}, "forward_plain", "float32"),
        ("compressed_attention", {"num_keys": 31}, "range_forward_sm80", "no keys"),
        ("selected_attention", {"select_size": 32}, "selected_forward_sm80", "64"),
        ("selected_attention", {"num_selected": 65}, "selected_forward_sm80", "more than 64 blocks"),
        ("select_blocks", {"num_heads": 4, "head_dim": 192, "num_selected": 33}, "select_blocks_sm80", "32 blocks"),
    ],
)
def test_what_does_not_suit_hopper_runs_elsewhere_and_says_why(
    op: str, change: dict[str, Any], kernel: str, reason: str
) -> None:
    sizes: dict[str, Any] = {"device": "cuda", "dtype": "bfloat16", "capability": (9, 0), "num_heads": 64}
    plan = nsa_torch.which_kernel(op, **sizes | {"num_kv_heads": 4, "num_keys": 8192} | change)
    assert plan.kernels == (kernel,)
    assert reason in plan.reason or "the build has no kernels" in plan.reason


@pytest.mark.parametrize(
    ("change", "tile", "stages"),
    [
        ({"head_dim": 64}, (128, 64), 1),
        ({"head_dim": 256}, (64, 32), 1),
        ({"head_dim": 192, "v_head_dim": 128, "backward": True}, (64, 32), 2),
        ({"capability": (9, 0), "head_dim": 64}, (192, 96), 2),
        ({"capability": (9, 0), "head_dim": 64, "backward": True}, (192, 80), 4),
        ({"dtype": "float32"}, (4, 32), 0),
    ],
    ids=str,
)
def test_tiles_are_told(change: dict[str, Any], tile: tuple[int, int], stages: int) -> None:
    if change.get("capability") == (9, 0) and "sm90a" not in nsa_torch.build_info()["kernels"]:
        pytest.skip("a build without Hopper's kernels says so")
    arguments: dict[str, Any] = {"device": "cuda", "dtype": "bfloat16", "capability": (8, 0), "num_heads": 16}
    plan = nsa_torch.which_kernel("window_attention", **arguments | {"num_kv_heads": 1, "num_keys": 4096} | change)
    launch = plan.launches[1 if change.get("backward") else 0]
    assert (launch.tile, launch.stages) == (tile, stages)
    assert 0 < launch.shared_bytes <= 227 * 1024


def test_heads_that_are_handed_over_take_several_launches() -> None:
    """What is handed over of a head at 64k fills the workspace: each has launches of its own."""
    if nsa_torch.build_info()["cuda"] is not None and "sm90a" not in nsa_torch.build_info()["kernels"]:
        pytest.skip("a build without Hopper's kernels says so")

    def count(length: int) -> int:
        sizes: dict[str, Any] = {"num_heads": 64, "num_kv_heads": 4, "num_keys": length, "capability": (9, 0)}
        plan = nsa_torch.which_kernel("selected_attention", device="cuda", dtype="bfloat16", backward=True, **sizes)
        counts = {launch.kernel: launch.count for launch in plan.launches}
        assert counts["selected_backward_keys_sm90"] == counts["selected_query_handed_sm90"]
        assert counts["list_pairs"] == counts["list_pieces"] == 1
        return counts["selected_query_handed_sm90"]

    assert count(4096) == 1
    assert count(65536) == 4


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("compression", ["mlp", "linear", "mean"])
def test_the_products_of_compress_are_planned(compression: str, backward: bool) -> None:
    sizes: dict[str, Any] = {"num_kv_heads": 4, "num_heads": 4, "num_keys": 4096, "capability": (8, 0)}
    sizes |= {"device": "cuda", "dtype": "bfloat16", "backward": backward, "compression": compression}
    plan = nsa_torch.which_kernel("compress", **sizes)
    products = {"mlp": (2, 5), "linear": (1, 2), "mean": (0, 0)}[compression][backward]
    counts = {launch.kernel: launch.count for launch in plan.launches}
    if compression == "mean":
        assert plan.kernel == ("mean_backward" if backward else "mean_forward")
        assert plan.workspace_bytes == 0 and "no product" in plan.reason
    else:
        assert f"products: {products}" in plan.reason
        hidden = 1 if compression == "mlp" else 0
        assert counts.get("shift_and_add", 0) == (hidden if backward else hidden + 1)
        assert ("scatter_chunks" in counts) == backward and counts["gather_chunks"] == 1
        chunks = 4096 // 16 * 4 * 16 * 128 * 2  # bytes
        assert plan.workspace_bytes > chunks
    assert "each head with its own weight" not in plan.reason
    of_heads = nsa_torch.which_kernel("compress", **sizes, per_head=True)
    assert ("each head with its own weight" in of_heads.reason) == (compression != "mean")
    assert nsa_torch.which_kernel("compress", **sizes | {"num_keys": 31}).kernels == ()


@pytest.mark.parametrize("length", [16, 256, 4096, 32768, 131072])
@pytest.mark.parametrize("capability", CAPABILITIES, ids=str)
def test_splits_have_sums_to_add(length: int, capability: tuple[int, int]) -> None:
    """Partial sums take workspace, and a kernel that adds them, where there are several, and nowhere else."""
    sizes: dict[str, Any] = {"num_heads": 16, "num_kv_heads": 1, "num_keys": length, "capability": capability}
    plan = nsa_torch.which_kernel("compressed_attention", device="cuda", dtype="bfloat16", backward=True, **sizes)
    assert (plan.splits > 1) == (plan.workspace_bytes > 0) == any("add_partials" in name for name in plan.kernels)
    if length == 4096:  # too few tiles of keys for all multiprocessors
        assert plan.splits > 1


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"op": "attention"}, "op"),
        ({"device": "tpu"}, "device"),
        ({"dtype": "int8"}, "dtype"),
        ({"dtype": "float64"}, "dtype"),
        ({"num_heads": 3, "num_kv_heads": 2}, "num_heads"),
        ({"head_dim": 257}, "head_dim"),
        ({"num_keys": -1}, "num_keys"),
        ({"num_keys": 2**40}, "num_keys"),
        ({"op": "selected_attention", "num_keys": 2**20, "num_selected": 2**28}, "num_selected"),
        ({"op": "select_blocks", "num_selected": 65}, "num_selected"),
        ({"op": "select_blocks", "num_heads": 257}, "num_heads / num_kv_heads"),
        ({"window": 0}, "window"),
        ({"capability": (7, 5)}, "capability"),
        ({"op": "select_blocks", "backward": True}, "backward"),
        ({"op": "compress", "compression": "max"}, "compression"),
        ({"op": "compress", "hidden_size": 0}, "hidden_size"),
    ],
)
def test_bad_questions_are_refused(change: dict[str, Any], named: str) -> None:
    arguments: dict[str, Any] = {"op": "window_attention", "device": "cuda", "dtype": "bfloat16", "capability": (9, 0)}
    with pytest.raises(ValueError, match=rf"^{named} must .*, got "):
        nsa_torch.which_kernel(**arguments | change)


def test_every_op_of_the_package_is_known() -> None:
    from nsa_torch import _C

    registered = {
        name.removeprefix("nsa::") for name in torch._C._dispatch_get_all_op_names() if name.startswith("nsa::")
    }
    assert set(_C.ops_with_kernels()) == registered & set(nsa_torch.__all__)


def test_cpu_kernels_are_named() -> None:
    for op in (*OPS, "compress", "rotate", "nsa_attention_with_kvcache"):
        assert nsa_torch.which_kernel(op, num_heads=4, num_kv_heads=2, num_keys=100).reason


# --- on a GPU ---


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [s for s in TILED if s.seqlen_q > 1], ids=lambda s: s.name)
@pytest.mark.parametrize("op", OPS)
def test_a_profile_shows_what_is_named(op: str, shape: Shape, dtype: torch.dtype) -> None:
    """Every kernel of a plan runs, as often as it says, and no other of this library does."""
    exact = make_inputs(op, shape)
    inputs = exact.to("cuda", dtype)
    if op == "select_blocks":
        inputs = inputs.replace(lse=exact.tensors["lse"].to("cuda", torch.float32))
    function = getattr(nsa_torch, op)
    leaves = {name: x.requires_grad_() for name, x in inputs.tensors.items() if x.is_floating_point() and name != "lse"}
    arguments = query(shape, device="cuda", dtype=str(dtype).removeprefix("torch."))
    options = inputs.options | ({"block_indices": None} if op == "nsa_attention" else {})

    def call() -> Tensor:
        result = function(**inputs.tensors | leaves, **options)
        return result[0] if isinstance(result, tuple) else result

    with torch.no_grad():
        check(launched(call), nsa_torch.which_kernel(op, **arguments))
    if op != "select_blocks":
        out = call()
        weights = torch.randn_like(out)
        shown = launched(lambda: torch.autograd.grad(out, list(leaves.values()), weights, retain_graph=True))
        check(shown, nsa_torch.which_kernel(op, **arguments, backward=True))


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("compression", ["mlp", "linear", "mean"])
def test_a_profile_shows_what_is_named_for_compress(compression: str, dtype: torch.dtype) -> None:
    shape = Shape("compress", 300, 300, 2, 2, 64, 64)
    random = torch.Generator().manual_seed(0)
    tensors = {"x": torch.randn(1, 300, 2, 64, generator=random), **weights(shape, compression, random, hidden=128)}
    leaves = {name: x.to("cuda", dtype).requires_grad_() for name, x in tensors.items()}
    arguments: dict[str, Any] = {"device": "cuda", "dtype": str(dtype).removeprefix("torch."), "num_keys": 300}
    arguments |= {"num_kv_heads": 2, "num_heads": 2, "head_dim": 64, "compression": compression, "per_head": True}
    with torch.no_grad():
        check(launched(lambda: nsa_torch.compress(**leaves)), nsa_torch.which_kernel("compress", **arguments))
    out = nsa_torch.compress(**leaves)
    shown = launched(lambda: torch.autograd.grad(out.sum(), list(leaves.values()), retain_graph=True))
    check(shown, nsa_torch.which_kernel("compress", **arguments, backward=True))


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_profile_shows_what_is_named_for_rotate(dtype: torch.dtype) -> None:
    x = torch.randn(1, 300, 2, 64, device="cuda", dtype=dtype, requires_grad=True)
    angles = torch.rand(300, 1, 32, device="cuda").repeat(1, 1, 2)
    arguments: dict[str, Any] = {"device": "cuda", "dtype": str(dtype).removeprefix("torch."), "num_keys": 300}
    arguments |= {"num_kv_heads": 2, "num_heads": 2, "head_dim": 64}
    with torch.no_grad():
        shown = launched(lambda: nsa_torch.rotate(x, angles.cos(), angles.sin()))
    check(shown, nsa_torch.which_kernel("rotate", **arguments))
    out = nsa_torch.rotate(x, angles.cos(), angles.sin())
    shown = launched(lambda: torch.autograd.grad(out.sum(), x, retain_graph=True))
    check(shown, nsa_torch.which_kernel("rotate", **arguments, backward=True))


def check(shown: Counter[str], plan: nsa_torch.KernelPlan) -> None:
    named: Counter[str] = Counter()
    for launch in plan.launches:
        named[launch.kernel] += launch.count
    assert {name: shown[name] for name in named} == dict(named)
    assert set(shown) == set(named), f"named {dict(named)}, shown {dict(shown)}"
