"""Which GPU architectures a build is for, with GPUs that are not there; what it says on one that it does not serve."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import nsa_torch
from helpers import OPS
from nsa_torch import _C

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import cuda_build

NEWEST = (12, 0)


def names(requested: str | None, *visible: tuple[int, int]) -> list[str]:
    return list(cuda_build.choose(requested, visible, NEWEST).names)


@pytest.mark.parametrize("requested", [None, "", "native"])
def test_a_visible_hopper_gets_its_kernels(requested: str | None) -> None:
    assert names(requested, (9, 0)) == ["9.0a"]
    assert names(requested, (9, 0), (9, 0)) == ["9.0a"]


def test_visible_gpus_are_united() -> None:
    assert names(None, (9, 0), (8, 0), (12, 0), (8, 0)) == ["8.0", "9.0a", "12.0"]
    assert names(None, (8, 6), (8, 9)) == ["8.6", "8.9"]


def test_without_a_gpu_the_build_serves_all() -> None:
    assert names(None) == ["8.0+PTX", "9.0a"]


def test_gpus_that_the_compiler_or_the_kernels_do_not_know() -> None:
    newer = cuda_build.choose(None, [(13, 0), (8, 0)], NEWEST)
    assert (newer.names, len(newer.notes)) == (("8.0", "12.0+PTX"), 1)
    older = cuda_build.choose(None, [(7, 5)], NEWEST)
    assert older.names == cuda_build.EVERYWHERE
    assert "7.5" in older.notes[0]


@pytest.mark.parametrize(
    ("requested", "expected"),
    [
        ("9.0", ["9.0a"]),
        ("Hopper", ["8.0+PTX", "9.0a"]),
        ("9.0+PTX", ["8.0+PTX", "9.0a"]),
        ("8.0;9.0", ["8.0", "9.0a"]),
        ("7.5 8.0 8.6 9.0 10.0 12.0+PTX", ["8.0", "8.6", "9.0a", "10.0", "12.0+PTX"]),
        ("8.0 9.0+PTX", ["8.0+PTX", "9.0a"]),
        ("9.0;9.0a", ["9.0a"]),
        ("8.0+PTX;9.0a", ["8.0+PTX", "9.0a"]),
        ("Ampere", ["8.0", "8.6+PTX"]),
        ("8.0 9.0a+PTX", ["8.0", "9.0a"]),
    ],
)
def test_what_is_asked_for_is_honoured_and_9_0_corrected(requested: str, expected: list[str]) -> None:
    """Whatever GPU is visible."""
    chosen = cuda_build.choose(requested, [(8, 9)], NEWEST)
    assert sorted(chosen.names) == sorted(expected)
    assert chosen.environment == ";".join(chosen.names)
    entries = {entry for part in requested.replace(" ", ";").split(";") for entry in cuda_build.NAMES.get(part, [part])}
    assert bool(chosen.notes) == bool(entries & {"9.0", "9.0+PTX", "9.0a+PTX", "7.5"})


@pytest.mark.parametrize("requested", ["7.5", "hopper", "9", "9.0b", "sm_90"])
def test_what_names_no_architecture_is_refused(requested: str) -> None:
    with pytest.raises(ValueError, match="TORCH_CUDA_ARCH_LIST"):
        cuda_build.choose(requested, [(9, 0)], NEWEST)


def test_build_info_lists_architectures_and_kernels() -> None:
    info = nsa_torch.build_info()
    stated = json.loads((Path(nsa_torch.__file__).parent / "build_info.json").read_text())
    assert info["architectures"] == stated["architectures"]
    assert bool(info["architectures"]) == (info["cuda"] is not None)
    assert info["kernels"][0] == "cpu"
    assert ("sm80" in info["kernels"]) == (info["cuda"] is not None)
    assert ("sm90a" in info["kernels"]) == ("9.0a" in info["architectures"])


def test_a_build_without_hoppers_kernels_warns_on_a_hopper_alone() -> None:
    warning = _C.missing_kernels(["8.0+PTX"], (9, 0))
    assert "9.0a" in warning
    assert "TORCH_CUDA_ARCH_LIST" in warning
    assert _C.missing_kernels(["8.0+PTX", "9.0a"], (9, 0)) == ""
    for other in ((8, 0), (8, 9), (10, 0), (12, 0)):
        assert _C.missing_kernels(["8.0+PTX"], other) == ""


@pytest.mark.cuda
def test_this_build_has_the_kernels_of_this_gpu() -> None:
    if torch.cuda.get_device_capability() == (9, 0):
        assert "9.0a" in json.loads((Path(nsa_torch.__file__).parent / "build_info.json").read_text())["architectures"]


@pytest.mark.parametrize(
    ("architectures", "served", "refused"),
    [
        (["8.0"], [(8, 0), (8, 6), (8, 9)], [(7, 5), (9, 0), (10, 0), (12, 0)]),
        (["8.6", "8.9"], [(8, 6), (8, 7), (8, 9)], [(8, 0), (9, 0), (12, 0)]),
        (["8.0+PTX"], [(8, 0), (8, 9), (9, 0), (10, 3), (12, 1)], [(7, 5)]),
        (["8.6+PTX"], [(8, 6), (9, 0), (12, 0)], [(8, 0)]),
        (["9.0a"], [(9, 0)], [(8, 0), (9, 1), (10, 0), (12, 0)]),
        (["10.0a+PTX"], [(10, 0)], [(9, 0), (10, 3), (12, 0)]),
        (["10.0f", "12.0f+PTX"], [(10, 0), (10, 3), (12, 0), (12, 1)], [(9, 0), (11, 0), (13, 0)]),
        (["8.0", "9.0a", "12.0+PTX"], [(8, 6), (9, 0), (12, 0), (12, 1), (13, 0)], [(10, 0), (7, 0)]),
        (["8.0+PTX", "9.0a"], [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)], [(7, 5)]),
    ],
    ids=str,
)
def test_which_gpus_a_build_serves(
    architectures: list[str], served: list[tuple[int, int]], refused: list[tuple[int, int]]
) -> None:
    assert [gpu for gpu in served if _C.no_kernels(architectures, gpu)] == []
    assert [gpu for gpu in refused if not _C.no_kernels(architectures, gpu)] == []


def test_a_gpu_that_is_not_served_is_told_what_to_do() -> None:
    assert _C.no_kernels(["8.6", "9.0a"], (12, 0)) == (
        "nsa_torch was built for GPUs of compute capability 8.6, 9.0a, and nothing of that runs on one of 12.0. "
        'Build it again with TORCH_CUDA_ARCH_LIST="8.0+PTX;9.0a", which serves every GPU from 8.0 on.'
    )
    assert _C.no_kernels(["8.0+PTX"], (7, 5)) == (
        "nsa_torch needs a GPU of compute capability 8.0 or newer, and this one is of 7.5. "
        "The CPU computes the same: move the tensors there."
    )
    everywhere = list(cuda_build.EVERYWHERE)  # the remedy is one
    assert not [gpu for gpu in ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)) if _C.no_kernels(everywhere, gpu)]


@pytest.fixture
def built_for_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    info = _C.build_info() | {"cuda": "13.0", "architectures": ["9.0a"]}
    monkeypatch.setattr(_C, "build_info", lambda: info)


@pytest.mark.usefixtures("built_for_hopper")
def test_which_kernel_says_so_of_gpus_that_are_not_there() -> None:
    refusal = _C.no_kernels(["9.0a"], (8, 0))
    plan = nsa_torch.which_kernel("window_attention", device="cuda", dtype="bfloat16", capability=(8, 0))
    assert plan.reason.endswith(f"; but a call fails: {refusal}")
    served = nsa_torch.which_kernel("window_attention", device="cuda", dtype="bfloat16", capability=(9, 0))
    assert "fails" not in served.reason


@pytest.mark.usefixtures("built_for_hopper")
@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (12, 0)], ids=str)
def test_which_kernel_says_so_of_the_gpu_that_is_there(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    with pytest.raises(RuntimeError, match=rf"^nsa_torch .* {capability[0]}\.{capability[1]}\. "):
        nsa_torch.which_kernel("window_attention", device="cuda")


# As on a GPU that the build does not serve: the library then finds this in the place of its own.
REFUSES = """
#include <string>
#include <vector>
namespace nsa {
std::string no_kernels(const std::vector<std::string>&, int, int) { return "nothing of that runs here"; }
}
"""
CALLS = """
import torch
import nsa_torch
from helpers import OPS, make_inputs
from launches import launched
from shapes import ADVERSARIAL

shape = next(shape for shape in ADVERSARIAL if shape.batch and shape.seqlen_q > 1)
calls = {op: make_inputs(op, shape).to("cuda", torch.bfloat16) for op in OPS}
calls["select_blocks"] = calls["select_blocks"].replace(lse=calls["select_blocks"].tensors["lse"].float())
angles = torch.zeros(4, 1, 8, device="cuda")

def refused(op):
    try:
        if op == "rotate":
            nsa_torch.rotate(torch.zeros(1, 4, 2, 8, device="cuda"), angles, angles)
        else:
            getattr(nsa_torch, op)(**calls[op].tensors, **calls[op].options)
    except RuntimeError as error:
        return str(error).splitlines()[0]

for op in (*OPS, "rotate"):
    print(op, refused(op), *launched(lambda: refused(op)))
"""


@pytest.mark.cuda
@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a compiler")
def test_no_op_starts_a_kernel_on_a_gpu_that_is_not_served(tmp_path: Path) -> None:
    (tmp_path / "refuses.cpp").write_text(REFUSES)
    library = tmp_path / "refuses.so"
    subprocess.run(["c++", "-shared", "-fPIC", "-o", library, tmp_path / "refuses.cpp"], check=True)
    root = Path(__file__).resolve().parents[1]
    paths = os.pathsep.join(str(root / name) for name in (".", "tests", "benchmarks"))
    environment = os.environ | {"LD_PRELOAD": str(library), "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", CALLS], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{op} nothing of that runs here" for op in (*OPS, "rotate")]
