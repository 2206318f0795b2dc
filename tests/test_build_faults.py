"""What a build says where something is missing: one line. Which torch it is for, and what metadata say of that."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import backend
import build_command
import check_build
import cuda_build
import torches
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
def test_an_nvcc_of_another_major_version(asked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = fake_toolkit(tmp_path / "cuda", "12.4")
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", str(home))
    monkeypatch.setenv("NSA_CUDA", asked)
    with pytest.raises(SystemExit) as error:
        cuda_build.wanted([Torch(tmp_path, "2.11.0", "12.8"), Torch(tmp_path, "2.15.0", "13.2")])
    assert str(error.value) == (
        f"nsa_torch: nvcc in {home} is of CUDA 12.4, but torch 2.15.0 was built with CUDA 13.2: set CUDA_HOME to a "
        "toolkit of CUDA 13, or NSA_CUDA=0 to do without CUDA"
    )


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


def fake_torch(folder: Path, version: str, cuda: str = "None") -> Path:
    (folder / "torch").mkdir(parents=True)
    (folder / "torch" / "version.py").write_text(
        f"from typing import Optional\n__version__ = '{version}'\ndebug = False\ncuda: Optional[str] = {cuda}\n"
    )
    return folder


def test_torches_are_read_where_they_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [fake_torch(tmp_path / "b", "2.15.0+cu132", "'13.2'"), fake_torch(tmp_path / "a", "2.11.1+cpu")]
    monkeypatch.setenv("NSA_TORCHES", os.pathsep.join(map(str, folders)))
    older, newer = torches.served()
    assert (older.minor, older.cuda, newer.minor, newer.cuda) == ("2.11", None, "2.15", "13.2")
    monkeypatch.setenv("NSA_TORCHES", str(tmp_path / "nothing"))
    with pytest.raises(SystemExit, match="there is no torch in"):
        torches.served()
    monkeypatch.setenv("NSA_TORCHES", os.pathsep.join([str(folders[0])] * 2))
    with pytest.raises(SystemExit, match="twice"):
        torches.served()


def test_the_installed_torch_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NSA_TORCHES", raising=False)
    (found,) = torches.served()
    assert (found.version, found.cuda) == (torch.__version__, torch.version.cuda)
    assert found.root == Path(torch.__file__).parent.resolve()


@pytest.mark.parametrize(
    ("minors", "expected"),
    [
        (["2.15"], "torch>=2.15,<2.16"),
        (["2.12", "2.11"], "torch>=2.11,<2.13"),
        (torches.SUPPORTED, "torch>=2.11,<2.16"),
        (["2.9", "2.11", "2.12"], "torch>=2.9,<2.13,!=2.10.*"),
    ],
)
def test_what_metadata_require(minors: list[str], expected: str) -> None:
    assert torches.requirement(minors) == expected


@pytest.mark.parametrize(
    ("installed", "expected"),
    [("2.13.0", "torch==2.13.*"), ("2.12.1+cu130", "torch==2.12.*"), ("2.10.0", None), (None, None)],
)
def test_an_isolated_build_takes_the_torch_that_is_installed(
    installed: str | None, expected: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if installed is not None:
        stated = tmp_path / f"torch-{installed}.dist-info"
        stated.mkdir()
        (stated / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {installed}\n")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    assert backend.get_requires_for_build_wheel() == [expected or "torch>=2.11,<2.16"]
    assert backend.get_requires_for_build_sdist() == []


def test_a_build_for_another_torch_keeps_what_still_fits(tmp_path: Path) -> None:
    package = tmp_path / "nsa_torch"
    (package / "lib").mkdir(parents=True)
    info = {"cuda": None, "architectures": [], "sources": "a"}

    def held() -> list[str]:
        return list(json.loads((package / "build_info.json").read_text())["torches"])

    for minor in ("2.11", "2.15"):
        (package / "lib" / f"libnsa_torch_{minor.replace('.', '_')}.so").touch()
        build_command.write_info(package, info | {"torches": {minor: f"{minor}.0"}})
    assert held() == ["2.11", "2.15"]
    build_command.write_info(package, info | {"sources": "b", "torches": {"2.11": "2.11.0"}})
    assert held() == ["2.11"]


@pytest.mark.parametrize("version", ["2.10.0", "2.16.1+cu130"])
def test_a_torch_that_is_not_supported_is_named(version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NSA_TORCHES", str(fake_torch(tmp_path / "a", version)))
    with pytest.raises(SystemExit, match=rf"torch must be 2.11 or .* or 2.15, got {re.escape(version)}$"):
        torches.served()


def test_a_build_that_breaks_off_leaves_nothing_listed(tmp_path: Path) -> None:
    info = tmp_path / "build_info.json"
    info.write_text("{}")
    with build_command.unlisted(tmp_path):
        assert not info.exists()
    assert info.read_text() == "{}"
    with pytest.raises(KeyboardInterrupt), build_command.unlisted(tmp_path):
        raise KeyboardInterrupt
    assert not info.exists()
