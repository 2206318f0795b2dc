"""The C++ side: the CMake package, every function of csrc/nsa.h, and examples/cpp, each built as a user would."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

import nsa_torch

ROOT = Path(__file__).parents[1]
# pip puts cmake and ninja beside the interpreter, which is on the PATH only in an activated environment.
PATH = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))


def run(*command: str | Path, succeeds: bool = True) -> str:
    """What a command prints, which must succeed or must fail."""
    # One thread: tensors as small as the programs' only make threads wait for each other.
    environment = os.environ | {"PATH": PATH, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        command, check=False, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert (result.returncode == 0) == succeeds, f"{' '.join(map(str, command))}\n{result.stdout}"
    return result.stdout


def configure(source: Path, build: Path, package: str | Path, succeeds: bool = True) -> str:
    options = [f"-Dnsa_torch_DIR={package}", f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"]
    if shutil.which("ninja", path=PATH):
        options.append("-GNinja")
    if shutil.which("ccache", path=PATH):
        options.append("-DCMAKE_CXX_COMPILER_LAUNCHER=ccache")
    return run("cmake", "-S", source, "-B", build, *options, succeeds=succeeds)


def compile_program(source: Path, build: Path) -> None:
    configure(source, build, nsa_torch.cmake_prefix_path())
    run("cmake", "--build", build)


def test_every_function_of_the_header(tmp_path: Path) -> None:
    compile_program(ROOT / "tests" / "cpp", tmp_path)
    run(tmp_path / "interface")


def test_example_trains_saves_and_reloads_without_python(tmp_path: Path) -> None:
    compile_program(ROOT / "examples" / "cpp", tmp_path)
    program = tmp_path / "train_layer"
    output = run(program, "100", tmp_path / "layer.pt")
    losses = [float(line.split()[-1]) for line in output.splitlines() if line.startswith("step")]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    assert "reloaded from" in output
    if shutil.which("ldd"):
        assert "libpython" not in run("ldd", program)
    assert "did not fall" in run(program, "1", tmp_path / "untrained.pt", succeeds=False)


def test_cmake_package_says_that_the_library_is_missing(tmp_path: Path) -> None:
    package = tmp_path / "cmake"
    package.mkdir()
    shutil.copy(Path(nsa_torch.cmake_prefix_path()) / "nsa_torchConfig.cmake", package)
    output = configure(ROOT / "tests" / "cpp", tmp_path / "build", package, succeeds=False)
    assert "missing: nsa_torch_LIBRARY" in output
    assert "build the Python package first" in " ".join(output.split())


def test_cmake_package_names_the_versions_of_torch_that_it_holds(tmp_path: Path) -> None:
    """LibTorch of a version that there is no library for."""
    stated = tmp_path / "torch" / "share" / "cmake" / "Torch" / "TorchConfigVersion.cmake"
    header = tmp_path / "torch" / "include" / "torch" / "csrc" / "api" / "include" / "torch" / "torch.h"
    for path, text in ((stated, 'set(PACKAGE_VERSION "2.99.1")\n'), (header, "")):
        path.parent.mkdir(parents=True)
        path.write_text(text)
    package = Path(nsa_torch.cmake_prefix_path())
    command = ["cmake", "-S", ROOT / "tests" / "cpp", "-B", tmp_path / "build", f"-Dnsa_torch_DIR={package}"]
    said = " ".join(run(*command, f"-Dnsa_torch_TORCH_ROOT={tmp_path / 'torch'}", succeeds=False).split())
    assert f"nsa_torch was built for torch {', '.join(nsa_torch.build_info()['torches'])}, but torch 2.99 is in" in said
