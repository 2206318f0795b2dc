"""Which GPU architectures a build is for, with GPUs that are not there; what one without Hopper's kernels says."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

import nsa_torch

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
    ],
)
def test_what_is_asked_for_is_honoured_and_9_0_corrected(requested: str, expected: list[str]) -> None:
    """Whatever GPU is visible."""
    chosen = cuda_build.choose(requested, [(8, 9)], NEWEST)
    assert sorted(chosen.names) == sorted(expected)
    assert chosen.environment == ";".join(chosen.names)
    entries = {entry for part in requested.replace(" ", ";").split(";") for entry in cuda_build.NAMES.get(part, [part])}
    assert bool(chosen.notes) == bool(entries & {"9.0", "9.0+PTX", "7.5"})


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
    from nsa_torch import _C

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
