"""What a build says where something is missing: one line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import build_command
import check_build
import cuda_build
from torches import Torch

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """What setup.py reads before anything is compiled."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "tools", "csrc", "nsa_torch", "requirements"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def setup(sources: Path, *arguments: str, before: str = "", **environment: str) -> str:
    """What `python setup.py` says when it fails, with its own fault made up by `before`."""
    script = f"import runpy, sys\n{before}\nsys.argv = ['setup.py', *{list(arguments)}]\nrunpy.run_path('setup.py')"
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=sources,
        env=os.environ | {"NSA_CUDA": "0"} | environment,
        check=False,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1, result.stdout + result.stderr
    return "\n".join(line for line in result.stderr.splitlines() if "No CUDA runtime is found" not in line)


def fake_toolkit(folder: Path, version: str) -> Path:
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {version}, V{version}.99'\n")
    nvcc.chmod(0o755)
    return folder


def test_an_older_setuptools(sources: Path) -> None:
    said = setup(sources, "--name", before="import setuptools; setuptools.__version__ = '65.5.0'")
    assert said == (
        "nsa_torch: setuptools 65.5.0 is too old, 77 or newer is needed: pip install -r requirements/build.txt"
    )


@pytest.mark.parametrize("module", ["torch", "pybind11"])
def test_a_module_that_the_build_needs(module: str, sources: Path) -> None:
    hide = (
        "import importlib.util as u; there = u.find_spec\n"
        f"u.find_spec = lambda name, *rest: None if name == '{module}' else there(name, *rest)"
    )
    said = setup(sources, "--name", before=hide)
    assert said == (
        f"nsa_torch: {module} is missing, and the build is not isolated: pip install -r requirements/build.txt"
    )


def test_a_folder_that_cannot_be_written_to(sources: Path) -> None:
    said = setup(sources, "--name", before="import os; os.access = lambda *_: False")
    assert said.startswith("nsa_torch: ")
    assert said.endswith("a build writes there: copy it to a folder of yours, and build that")
    assert len(said.splitlines()) == 1


def test_no_compiler_and_no_ninja(sources: Path, tmp_path: Path) -> None:
    empty = tmp_path / "bin"
    empty.mkdir()
    (empty / "python").symlink_to(sys.executable)
    hide = f"import sys; sys.executable = {str(empty / 'python')!r}"
    said = setup(sources, "build_ext", before=hide, PATH=str(empty), CXX="g++-none")
    assert said.splitlines() == [
        "nsa_torch: missing: a C++20 compiler (g++-none): apt-get install g++",
        "nsa_torch: missing: ninja: pip install ninja",
    ]


def test_ninja_is_found_beside_the_interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip puts it there, and nobody need activate the environment."""
    ninja = tmp_path / "ninja"
    ninja.write_text("#!/bin/sh\n")
    ninja.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", "/nowhere")
    assert not [line for line in check_build.for_compiling() if "ninja" in line]


def test_no_nvcc(sources: Path, tmp_path: Path) -> None:
    said = setup(sources, "--name", NSA_CUDA="1", CUDA_HOME=str(tmp_path / "nowhere"))
    assert said == "nsa_torch: NSA_CUDA=1, but there is no nvcc: install a CUDA toolkit, or set CUDA_HOME to it"


def test_no_nvcc_and_none_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("NSA_CUDA", "")
    assert cuda_build.wanted([Torch(tmp_path, "2.15.0", "13.2")]) is None


@pytest.mark.parametrize("asked", ["", "1"])
@pytest.mark.parametrize(
    ("toolkit", "cuda", "remedy"),
    [
        ("12.4", "13.2", "set CUDA_HOME to a toolkit of CUDA 13"),
        ("13.0", "14.1", "set CUDA_HOME to a toolkit of CUDA 14"),
        ("13.0", "12.6", "install a torch built with CUDA 13, such as PyPI's"),
        (
            "11.8",
            "12.6",
            "install a torch built with CUDA 13, such as PyPI's, and set CUDA_HOME to a toolkit of CUDA 13",
        ),
    ],
)
def test_an_nvcc_of_another_major_version(
    toolkit: str, cuda: str, remedy: str, asked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = fake_toolkit(tmp_path / "cuda", toolkit)
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", str(home))
    monkeypatch.setenv("NSA_CUDA", asked)
    with pytest.raises(SystemExit) as error:
        cuda_build.wanted([Torch(tmp_path, "2.11.0", toolkit), Torch(tmp_path, "2.15.0", cuda)])
    assert str(error.value) == (
        f"nsa_torch: nvcc in {home} is of CUDA {toolkit}, but torch 2.15.0 was built with CUDA {cuda}: {remedy}, "
        "or NSA_CUDA=0 to do without CUDA"
    )


@pytest.mark.parametrize("asked", ["", "1"])
def test_torches_with_cuda_and_without_in_one_build(
    asked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", str(fake_toolkit(tmp_path / "cuda", "13.0")))
    monkeypatch.setenv("NSA_CUDA", asked)
    mixed = [
        Torch(tmp_path, "2.11.0+cpu", None),
        Torch(tmp_path, "2.12.1", "13.0"),
        Torch(tmp_path, "2.15.0", "13.2"),
    ]
    with pytest.raises(SystemExit) as error:
        cuda_build.wanted(mixed)
    assert str(error.value) == (
        "nsa_torch: of NSA_TORCHES torch 2.12.1, 2.15.0 was built with CUDA, and torch 2.11.0+cpu without: name those "
        "of one kind, or set NSA_CUDA=0 to do without CUDA"
    )
    monkeypatch.setenv("NSA_CUDA", "0")
    assert cuda_build.wanted(mixed) is None


def test_another_minor_version_of_cuda_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", str(fake_toolkit(tmp_path / "cuda", "13.0")))
    monkeypatch.setenv("NSA_CUDA", "1")
    found = cuda_build.wanted([Torch(tmp_path, "2.15.0", "13.2")])
    assert found == (tmp_path / "cuda", "13.0")


def test_cuda_is_asked_for_with_a_torch_that_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", str(fake_toolkit(tmp_path / "cuda", "13.0")))
    monkeypatch.setenv("NSA_CUDA", "1")
    with pytest.raises(SystemExit, match=r"NSA_CUDA=1, but torch 2\.15\.0\+cpu was built without CUDA"):
        cuda_build.wanted([Torch(tmp_path, "2.15.0+cpu", None)])


def test_an_isolated_build_heeds_the_torch_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The torch that pip fetches for it is PyPI's, which may have been built otherwise."""
    home = fake_toolkit(tmp_path / "cuda", "13.0")
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", str(home))
    monkeypatch.setenv("NSA_CUDA", "")
    fetched = [Torch(tmp_path, "2.13.0", "13.0")]
    assert cuda_build.wanted(fetched, Torch(tmp_path, "2.13.0+cu130", "13.0")) == (home, "13.0")
    assert cuda_build.wanted(fetched, Torch(tmp_path, "2.13.0+cpu", None)) is None
    assert capsys.readouterr().out.splitlines()[-1] == (
        "nsa_torch: building for torch 2.13.0, without CUDA, like the torch 2.13.0+cpu that is installed"
    )
    with pytest.raises(SystemExit, match=r"torch 2\.13\.0\+cu126 was built with CUDA 12\.6: install a torch"):
        cuda_build.wanted(fetched, Torch(tmp_path, "2.13.0+cu126", "12.6"))


def test_a_build_that_breaks_off_leaves_nothing_listed(tmp_path: Path) -> None:
    info = tmp_path / "build_info.json"
    info.write_text("{}")
    with build_command.unlisted(tmp_path):
        assert not info.exists()
    assert info.read_text() == "{}"
    with pytest.raises(KeyboardInterrupt), build_command.unlisted(tmp_path):
        raise KeyboardInterrupt
    assert not info.exists()
