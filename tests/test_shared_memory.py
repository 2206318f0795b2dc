"""Shared memory of every kernel: what is stated, what is compiled, what fits which GPU, and calls on GPUs of 99 KB."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import defaultdict
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
import torch

import nsa_torch
from choices import check_choice
from helpers import Target, check_op, load_script, make_inputs
from launches import launched
from nsa_torch import _C
from shapes import Shape
from test_machine_code import LIBRARY, cuobjdump

if TYPE_CHECKING:
    from nsa_torch._C import KernelInstance

ROOT = Path(__file__).resolve().parents[1]
KB = 1024
SMALL, AMPERE, HOPPER = 99 * KB, 163 * KB, 227 * KB
SMALL_GPUS = [(8, 6), (8, 9), (12, 0)]
WIDE = [(256, 256), (192, 192), (192, 128)]
OPS = ("compressed_attention", "select_blocks", "selected_attention", "window_attention", "nsa_attention")
INSTANCES = _C.kernel_instances()


def shared_bytes(instance: KernelInstance) -> int:
    return instance.tile.static_bytes + instance.tile.dynamic_bytes


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    return load_script(ROOT / "tools" / "shared_memory.py")


def test_the_table_lists_what_the_library_states(generator: ModuleType) -> None:
    """After a change of a tile: python tools/shared_memory.py."""
    assert generator.PAGE.read_text() == generator.page()


def test_every_kernel_fits_the_gpus_that_it_runs_on() -> None:
    """A portable kernel has, if need be, a brother of fewer stages that fits the smallest."""
    alike = defaultdict(list)
    for instance in INSTANCES:
        stages = r"stages: \d"
        variant = re.sub(stages, "", instance.variant)
        alike[instance.kernel, instance.element, instance.dim_k, instance.dim_v, variant].append(instance)
    for (kernel, *_), brothers in alike.items():
        most = max(map(shared_bytes, brothers))
        if kernel.endswith("_sm90"):
            assert most <= HOPPER, kernel
        else:
            assert most <= AMPERE, kernel
            assert min(map(shared_bytes, brothers)) <= SMALL, kernel


def compiled(architecture: str, reserved: int = 0) -> dict[str, set[tuple[tuple[int, ...], int]]]:
    """Of each kernel in the library: dimensions of its tiles, where its name has them, and bytes that it declares.

    reserved: what the system takes of a block's shared memory, which the listing counts with it.
    """
    program = cuobjdump()
    assert program is not None, "there is no cuobjdump to read the library with"
    command = [program, "-arch", architecture, "-res-usage", str(LIBRARY)]
    listing = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    kernels = defaultdict(set)
    for mangled, shared in re.findall(r"Function (\w+):\s+REG:\d+ STACK:\d+ SHARED:(\d+)", listing):
        room, *_, name = names_of(mangled)
        if room == "nsa":
            dims = re.search(r"Shape\w*?I(?:6__half|13__nv_bfloat16)Li(\d+)ELi(\d+)E", mangled)
            kernels[name].add((tuple(map(int, dims.groups())) if dims else (), max(int(shared) - reserved, 0)))
    return kernels


def names_of(mangled: str) -> list[str]:
    """The parts of a name that a C++ compiler mangled: namespaces, and the function."""
    rest, names = mangled.removeprefix("_ZN"), []
    while found := re.match(r"\d+", rest):
        end = found.end() + int(found[0])
        names.append(rest[found.end() : end])
        rest = rest[end:]
    return names or [mangled]


def test_what_is_stated_is_what_is_compiled() -> None:
    """Every kernel of the library is listed, and declares as many bytes as the list says.

    Hopper's kernels are read where they are compiled for it: for other GPUs they are empty.
    """
    architectures = " ".join(_C.build_info()["architectures"])
    if "8.0" not in architectures:
        pytest.skip("the build is not for compute capability 8.0")
    found = compiled("sm_80")
    if "9.0a" in architectures:
        for kernel, instances in compiled("sm_90a", reserved=1024).items():
            if kernel.endswith("_sm90"):
                assert {dims for dims, _ in instances} == {dims for dims, _ in found[kernel]}, kernel
                found[kernel] = instances
    stated = defaultdict(set)
    for instance in INSTANCES:
        stated[instance.kernel].add(instance.tile.static_bytes)
    assert set(found) == set(stated)
    for kernel, bytes_stated in stated.items():
        assert {shared for _, shared in found[kernel]} == bytes_stated, kernel
    for kernel in (name for name in found if re.search(r"(forward|query|keys|handed)_sm\d+$", name)):
        dims = {(each.dim_k, each.dim_v) for each in INSTANCES if each.kernel == kernel}
        compiled_dims = {dims[0] if kernel.endswith("handed_sm90") else dims for dims, _ in found[kernel]}
        assert compiled_dims == ({k for k, _ in dims} if kernel.endswith("handed_sm90") else dims), kernel


def sizes(**more: Any) -> dict[str, Any]:
    usual = {"device": "cuda", "dtype": "bfloat16", "num_heads": 16, "num_kv_heads": 1, "num_keys": 8192}
    return usual | more


@pytest.mark.parametrize("capability", SMALL_GPUS, ids=str)
def test_plans_keep_to_what_the_gpu_has(capability: tuple[int, int]) -> None:
    dims = (64, 128, 192, 256)
    for op, dtype, k, v in product(OPS, ("bfloat16", "float16", "float32"), dims, dims):
        for group, backward in product((1, 8, 16, 64), (False, True) if op != "select_blocks" else (False,)):
            arguments = sizes(num_heads=group, head_dim=k, v_head_dim=v, dtype=dtype, num_selected=64)
            plan = nsa_torch.which_kernel(op, capability=capability, backward=backward, **arguments)
            assert max(launch.shared_bytes for launch in plan.launches) <= SMALL, plan


@pytest.mark.parametrize("dims", WIDE, ids=str)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_stages_are_those_that_fit(dims: tuple[int, int], backward: bool) -> None:
    def stages(capability: tuple[int, int]) -> int:
        plan = nsa_torch.which_kernel(
            "selected_attention",
            capability=capability,
            backward=backward,
            **sizes(head_dim=dims[0], v_head_dim=dims[1], select_size=32),
        )
        name = "selected_backward_query_sm80" if backward else "selected_forward_sm80"
        (launch,) = (launch for launch in plan.launches if launch.kernel == name)
        return launch.stages

    assert stages((8, 0)) == stages((9, 0)) == 2
    for capability in SMALL_GPUS:
        assert stages(capability) == (2 if dims == (192, 128) else 1)


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0)], ids=str)
def test_lists_that_do_not_fit_are_refused(capability: tuple[int, int]) -> None:
    arguments = sizes(head_dim=256, capability=capability, num_keys=64, num_queries=1)
    with pytest.raises(ValueError, match=r"^num_selected must be at most \d+ .*, got 1000000$") as refused:
        nsa_torch.which_kernel("selected_attention", num_selected=1000000, **arguments)
    most = int(re.findall(r"at most (\d+)", str(refused.value))[0])
    limit = {(8, 0): AMPERE, (8, 6): SMALL, (9, 0): HOPPER}[capability]
    for backward in (False, True):
        plan = nsa_torch.which_kernel("selected_attention", num_selected=most, backward=backward, **arguments)
        assert max(launch.shared_bytes for launch in plan.launches) <= limit
    with pytest.raises(ValueError, match="num_selected"):
        nsa_torch.which_kernel("selected_attention", num_selected=most + 1, **arguments)
    assert nsa_torch.which_kernel("selected_attention", num_selected=1000000, **arguments | {"dtype": "float32"})


def test_the_switch_for_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = sizes(head_dim=128, capability=(9, 0))
    monkeypatch.setenv("NSA_TORCH_SHARED_KB", "99")
    plan = nsa_torch.which_kernel("window_attention", **arguments)
    assert plan.kernels == ("range_forward_sm80",)
    assert "227 KB" in plan.reason
    monkeypatch.setenv("NSA_TORCH_SHARED_KB", "500")  # more than the GPU has
    assert "227 KB" not in nsa_torch.which_kernel("window_attention", **arguments).reason
    for wrong in ("98", "-1", "lots", "99.5", "1e3"):
        monkeypatch.setenv("NSA_TORCH_SHARED_KB", wrong)
        with pytest.raises(ValueError, match=rf"NSA_TORCH_SHARED_KB must be .*, got '{wrong}'"):
            nsa_torch.which_kernel("window_attention", **arguments)


# --- on a GPU ---

SWITCHED = os.environ.get("NSA_TORCH_SHARED_KB") == "99"
on_99_kb = pytest.mark.skipif(not SWITCHED, reason="runs in the process that test_on_a_gpu_of_99_kb starts")
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)


@pytest.mark.cuda
@pytest.mark.skipif(SWITCHED, reason="this is that process")
def test_on_a_gpu_of_99_kb() -> None:
    """The tests below, in a process of their own: a process asks for a GPU's shared memory once."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "with_99_kb"]
    environment = os.environ | {"NSA_TORCH_SHARED_KB": "99"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert re.search(r"\d+ passed", done.stdout) and "skipped" not in done.stdout.splitlines()[-1], done.stdout[-1000:]


def wide_shape(dims: tuple[int, int], group: int) -> Shape:
    shape = Shape("wide", 197, 197, 4, 2, 64, 64, num_selected=4, window=61)
    return replace(shape, name=f"wide_{dims}_{group}", heads_q=2 * group, dim_k=dims[0], dim_v=dims[1])


@on_99_kb
@pytest.mark.cuda
@pytest.mark.parametrize("op", ["compress", *(op for op in OPS if op != "select_blocks")])
@pytest.mark.parametrize("group", [2, 20])
@pytest.mark.parametrize("dims", WIDE, ids=str)
@dtypes
def test_with_99_kb_results_and_gradients(op: str, group: int, dims: tuple[int, int], dtype: torch.dtype) -> None:
    check_op(op, make_inputs(op, wide_shape(dims, group)), Target("cuda", dtype))


@on_99_kb
@pytest.mark.cuda
@pytest.mark.parametrize("dims", WIDE, ids=str)
@dtypes
def test_with_99_kb_choices(dims: tuple[int, int], dtype: torch.dtype) -> None:
    shape = wide_shape(dims, 4)
    check_choice(make_inputs("select_blocks", shape), shape, Target("cuda", dtype))


@on_99_kb
@pytest.mark.cuda
def test_with_99_kb_the_kernels_of_one_stage_run() -> None:
    inputs = make_inputs("selected_attention", wide_shape((256, 256), 2)).to("cuda", torch.bfloat16)
    leaves = {name: x.requires_grad_() for name, x in inputs.tensors.items() if x.is_floating_point()}

    def both() -> None:
        out, _ = nsa_torch.selected_attention(**inputs.tensors | leaves, **inputs.options)
        torch.autograd.grad(out.sum(), list(leaves.values()))

    both()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        both()
        torch.cuda.synchronize()
    names = [event.key for event in profile.key_averages() if "TokenShape" in event.key]
    assert len(names) == 2 and all(re.search(r"256, 256, 1>", name) for name in names), names


@on_99_kb
@pytest.mark.cuda
@pytest.mark.parametrize("op", ["selected_attention", "nsa_attention"])
def test_with_99_kb_long_lists_are_refused_before_any_kernel(op: str) -> None:
    shape = wide_shape((256, 256), 2)
    lists = torch.full((shape.batch, shape.seqlen_q, shape.heads_kv, 5000), -1, dtype=torch.int32, device="cuda")
    inputs = make_inputs(op, shape).to("cuda", torch.bfloat16).replace(block_indices=lists)

    def call() -> None:
        with pytest.raises(ValueError, match=r"^block_indices must list at most \d+ blocks .*, got 5000$"):
            getattr(nsa_torch, op)(**inputs.tensors, **inputs.options)

    assert not launched(call)
