"""What is installed, and when it refuses: source distribution, wheel, build settings, the check of torch's version."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_string
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import CUDA_HOME

import nsa_torch

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(nsa_torch.__file__).parent
NOT_SOURCES = shutil.ignore_patterns(".git", ".venv", ".*_cache", ".hypothesis", "build", "dist", "runs", "*.egg-info")

# Makes a wheel as pip does, but takes the extension modules from the package that the tests run on.
WHEEL_OF_WHAT_IS_BUILT = """
import shutil, sys
from pathlib import Path
from setuptools import build_meta
from setuptools.command.build_ext import build_ext

package, wheels = map(Path, sys.argv[1:])

def take(self, extension):
    target = Path(self.get_ext_fullpath(extension.name))
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(package / target.name, target)

build_ext.build_extension = take
build_meta.build_wheel(wheels)
"""


def run(*arguments: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=os.environ | environment, check=False, capture_output=True, text=True)


def pyproject() -> str:
    return (ROOT / "pyproject.toml").read_text()


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout, in which setuptools may write."""
    return shutil.copytree(ROOT, tmp_path_factory.mktemp("sources") / "nsa_torch", ignore=NOT_SOURCES)


@pytest.fixture(scope="module")
def wheel(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    built_with_cuda = nsa_torch.build_info()["cuda"] is not None
    result = run("-c", WHEEL_OF_WHAT_IS_BUILT, PACKAGE, folder, cwd=sources, NSA_CUDA="1" if built_with_cuda else "0")
    assert result.returncode == 0, result.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PYTHONPATH with what the wheel installs."""
    folder = tmp_path_factory.mktemp("site")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def test_sdist_has_what_a_build_and_its_tests_need(sources: Path, tmp_path: Path) -> None:
    script = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    result = run("-c", script, tmp_path, cwd=sources, NSA_CUDA="0")
    assert result.returncode == 0, result.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        packed = {name.partition("/")[2] for name in tar.getnames()}
    for folder in ("csrc", "cmake", "nsa_torch", "tests", "docs", "examples", "requirements", "tools"):
        paths = [
            path for path in (ROOT / folder).rglob("*") if path.suffix in (".cpp", ".cu", ".h", ".py", ".md", ".txt")
        ]
        assert {str(path.relative_to(ROOT)) for path in paths if "build" not in path.parts} <= packed
    assert {"LICENSE", "README.md", "Makefile", "setup.py", "pyproject.toml"} <= packed
    assert not [name for name in packed if name.endswith((".so", ".pyc", "build_info.json"))]


def test_wheel_has_the_library_the_header_and_the_cmake_package(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        "nsa_torch/libnsa_torch.so",
        "nsa_torch/build_info.json",
        "nsa_torch/py.typed",
        "nsa_torch/include/nsa.h",
        "nsa_torch/share/cmake/nsa_torch/nsa_torchConfig.cmake",
        *(str(path.relative_to(ROOT)) for path in (ROOT / "nsa_torch").rglob("*.py")),
    }
    assert expected <= names
    assert len([name for name in names if re.fullmatch(r"nsa_torch/_C\..*so", name)]) == 1
    assert all(re.match(r"nsa_torch(-[^/]*\.dist-info)?/", name) for name in names)
    assert not [name for name in names if name.endswith((".cpp", ".cu", ".pyc"))]


def test_wheel_requires_the_torch_it_was_built_against(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith("METADATA"))
    requirements = message_from_string(archive.read(name).decode()).get_all("Requires-Dist", [])
    assert f"torch=={torch.__version__.split('+')[0]}" in requirements


def test_wheel_works_where_it_is_installed(installed: Path, tmp_path: Path) -> None:
    script = (
        "import torch, nsa_torch; q = torch.randn(1, 9, 2, 8); "
        "out, lse = nsa_torch.window_attention(q, q, q, window=3); print(nsa_torch.__file__, tuple(out.shape)); "
        "print(nsa_torch.cmake_prefix_path(), nsa_torch.build_info()['torch'])"
    )
    result = run("-c", script, cwd=tmp_path, PYTHONPATH=str(installed))
    assert result.returncode == 0, result.stderr
    assert result.stdout.split("\n")[0] == f"{installed}/nsa_torch/__init__.py (1, 9, 2, 8)"
    assert (installed / "nsa_torch" / "share" / "cmake" / "nsa_torch").samefile(result.stdout.split("\n")[1].split()[0])


def test_importing_under_another_torch_says_what_to_do(installed: Path, tmp_path: Path) -> None:
    package = shutil.copytree(installed / "nsa_torch", tmp_path / "nsa_torch")
    info = package / "build_info.json"
    info.write_text(json.dumps(json.loads(info.read_text()) | {"torch": "2.99.0"}))
    result = run("-c", "import nsa_torch", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert result.returncode != 0
    message = result.stderr.strip().split("\n")[-1]
    assert message.startswith("ImportError: nsa_torch was built for torch 2.99.0")
    assert torch.__version__ in message
    assert "torch==2.99.0" in message


def test_importing_what_is_not_built_says_what_to_do(installed: Path, tmp_path: Path) -> None:
    package = shutil.copytree(installed / "nsa_torch", tmp_path / "nsa_torch")
    (package / "libnsa_torch.so").unlink()
    result = run("-c", "import nsa_torch", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert result.returncode != 0
    assert "ImportError: nsa_torch is not built" in result.stderr


def test_library_knows_nothing_of_python() -> None:
    symbols = subprocess.run(
        ["nm", "-D", "--undefined-only", PACKAGE / "libnsa_torch.so"], check=True, capture_output=True, text=True
    ).stdout
    assert not re.findall(r"\b_?Py[A-Z]\w*", symbols)
    assert not re.findall(r"\w*pybind11\w*", symbols)


@pytest.mark.parametrize("value", ["", "0", "1", "yes"])
def test_nsa_cuda(value: str, sources: Path) -> None:
    result = run("setup.py", "--name", cwd=sources, NSA_CUDA=value)
    toolkit = CUDA_HOME is not None and torch.version.cuda is not None
    if value == "yes":
        assert result.returncode != 0
        assert "NSA_CUDA must be 0, 1 or unset, got 'yes'" in result.stderr
    elif value == "1" and not toolkit:
        assert result.returncode != 0
        assert "NSA_CUDA=1" in result.stderr
    else:
        assert result.returncode == 0, result.stderr
        with_cuda = value == "1" or (value == "" and toolkit)
        assert (f"with CUDA {torch.version.cuda}" if with_cuda else "without CUDA") in result.stdout
        assert len(re.findall("building for torch", result.stdout)) == 1
        assert ("compiling for compute capabilities" in result.stdout) == with_cuda


def test_build_requirements_are_stated_alike() -> None:
    listed = re.findall(r"^([^#\n]+)$", (ROOT / "requirements" / "build.txt").read_text(), flags=re.MULTILINE)
    required = re.search(r"^requires = \[(.*?)\]", pyproject(), flags=re.MULTILINE | re.DOTALL)
    assert required is not None
    assert sorted(listed) == sorted(re.findall(r'"([^"]+)"', required[1]))
    assert re.search(r'^dependencies = \["torch==([\d.]+)"', pyproject(), flags=re.MULTILINE)
    assert set(re.findall(r"torch==([\d.]+)", pyproject())) == {torch.__version__.split("+")[0]}


def test_hosts_are_checked_by_any_python() -> None:
    """The check that runs before there is an environment needs nothing but the interpreter."""
    result = run("-S", "-I", "tools/check_host.py", cwd=ROOT)
    assert result.returncode == 0, result.stderr
