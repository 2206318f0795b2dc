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

import nsa_torch
from nsa_torch import _C, _library

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import cuda_build
import torches

ROOT = Path(__file__).resolve().parents[1]
MINOR = _library.minor_version()
PACKAGE = Path(nsa_torch.__file__).parent
NOT_SOURCES = shutil.ignore_patterns(".git", ".venv*", ".*_cache", ".hypothesis", "build", "dist", "runs", "*.egg-info")

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
    shutil.copy(package / target.relative_to(Path(self.build_lib, "nsa_torch")), target)

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
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, check=False, capture_output=True, text=True).stdout.split()
    assert {"LICENSE", "README.md", "Makefile", "setup.py", "pyproject.toml", ".ci/run"} <= packed
    assert set(tracked) - {".gitignore"} <= packed
    assert not [name for name in packed if name.endswith((".so", ".pyc", "build_info.json"))]


def test_wheel_has_the_library_the_header_and_the_cmake_package(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        "nsa_torch/lib/libnsa_torch_kernels.so",
        f"nsa_torch/lib/{_library.path().name}",
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


def test_wheel_requires_the_minor_version_of_torch_it_was_built_against(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith("METADATA"))
    requirements = message_from_string(archive.read(name).decode()).get_all("Requires-Dist", [])
    major, minor = MINOR.split(".")
    assert [r for r in requirements if r.startswith("torch")] == [f"torch<{major}.{int(minor) + 1},>={MINOR}"]


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


def import_with(info: dict[str, object], installed: Path, tmp_path: Path) -> str:
    """The last line of the error of an import, with other words in build_info.json."""
    package = shutil.copytree(installed / "nsa_torch", tmp_path / "nsa_torch")
    path = package / "build_info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | info))
    result = run("-c", "import nsa_torch", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert result.returncode != 0
    return result.stderr.strip().split("\n")[-1]


def test_importing_under_another_torch_says_what_there_is_and_what_to_do(installed: Path, tmp_path: Path) -> None:
    message = import_with({"torches": {"2.98": "2.98.1", "2.99": "2.99.0"}}, installed, tmp_path)
    assert message.startswith("ImportError: nsa_torch was built for torch 2.98, 2.99, but torch ")
    assert torch.__version__ in message
    assert "Install torch==2.99.*" in message
    assert "pip install --no-build-isolation" in message


def test_importing_under_another_cuda_says_so(installed: Path, tmp_path: Path) -> None:
    message = import_with({"cuda": "99.1"}, installed, tmp_path)
    assert message.startswith("ImportError: nsa_torch was built with CUDA 99.1, but torch ")


def test_a_library_that_does_not_fit_is_named(installed: Path, tmp_path: Path) -> None:
    """As where torch changes its interface within a minor version."""
    (installed / "nsa_torch" / "lib" / "libnsa_torch_2_99.so").write_bytes(b"no library")
    script = "import torch; torch.__version__ = '2.99.0'; import nsa_torch"  # the torch that is not there
    package = shutil.copytree(installed / "nsa_torch", tmp_path / "nsa_torch")
    info = package / "build_info.json"
    info.write_text(json.dumps(json.loads(info.read_text()) | {"torches": {"2.99": "2.99.0"}}))
    result = run("-c", script, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert "libnsa_torch_2_99.so" in result.stderr.strip().split("\n")[-1]
    assert "ImportError: nsa_torch cannot load" in result.stderr


def test_the_libraries_of_other_versions_are_chosen_by_minor_version(monkeypatch: pytest.MonkeyPatch) -> None:
    for version, name in (
        ("2.15.0+cu132", "2_15"),
        ("2.12.1", "2_12"),
        ("2.16.0.dev20270101", "2_16"),
        ("3.0.0a0", "3_0"),
    ):
        monkeypatch.setattr(torch, "__version__", version)
        assert _library.path().name == f"libnsa_torch_{name}.so"


def test_wheel_imports_without_a_compiler_and_without_a_toolkit(installed: Path, tmp_path: Path) -> None:
    script = "import nsa_torch; print(nsa_torch.which_kernel('window_attention', device='cuda'))"
    nowhere = str(tmp_path / "nowhere")
    result = run("-c", script, cwd=tmp_path, PYTHONPATH=str(installed), PATH=nowhere, CUDA_HOME=nowhere, CXX=nowhere)
    assert result.returncode == 0, result.stderr
    assert "KernelPlan" in result.stdout


def test_a_machine_without_network_installs_from_a_folder(wheel: Path, tmp_path: Path) -> None:
    """And keeps its torch."""
    command = ["-m", "pip", "install", "--dry-run", "--no-index", "--find-links", wheel.parent]
    there = run(*command, "--report", tmp_path / "report.json", wheel, cwd=tmp_path)
    assert there.returncode == 0, there.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert {item["metadata"]["name"] for item in report["install"]} <= {"nsa_torch"}
    missing = run(*command, "--ignore-installed", wheel, cwd=tmp_path)
    assert missing.returncode != 0
    assert "ERROR: No matching distribution found for torch<" in missing.stderr


def test_importing_what_is_not_built_says_what_to_do(installed: Path, tmp_path: Path) -> None:
    package = shutil.copytree(installed / "nsa_torch", tmp_path / "nsa_torch")
    (package / "build_info.json").unlink()
    result = run("-c", "import nsa_torch", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert result.returncode != 0
    assert "ImportError: nsa_torch is not built" in result.stderr


def needed(library: Path) -> set[str]:
    text = subprocess.run(["readelf", "-d", library], check=True, capture_output=True, text=True).stdout
    return set(re.findall(r"NEEDED.*\[(.*)\]", text))


def test_kernels_and_the_module_know_no_torch() -> None:
    """So one of each serves every version."""
    kernels = PACKAGE / "lib" / "libnsa_torch_kernels.so"
    module = Path(_C.__file__)
    for library in (kernels, module):
        assert not [name for name in needed(library) if re.match("lib(torch|c10|python)", name)], library
        symbols = subprocess.run(["nm", "-DC", library], check=True, capture_output=True, text=True).stdout
        assert not re.findall(r"\b(?:at|c10|torch)::\w+", symbols), library
    assert kernels.name in needed(module) & needed(_library.path())
    assert not [name for name in needed(_library.path()) if "gomp" in name]  # torch brings the one there may be


def test_library_knows_nothing_of_python() -> None:
    symbols = subprocess.run(
        ["nm", "-D", "--undefined-only", _library.path()], check=True, capture_output=True, text=True
    ).stdout
    assert not re.findall(r"\b_?Py[A-Z]\w*", symbols)
    assert not re.findall(r"\w*pybind11\w*", symbols)


@pytest.mark.parametrize("value", ["", "0", "1", "yes"])
def test_nsa_cuda(value: str, sources: Path) -> None:
    result = run("setup.py", "--name", cwd=sources, NSA_CUDA=value)
    toolkit = cuda_build.toolkit() is not None and torch.version.cuda is not None
    if value == "yes":
        assert result.returncode != 0
        assert "NSA_CUDA must be 0, 1 or unset, got 'yes'" in result.stderr
    elif value == "1" and not toolkit:
        assert result.returncode != 0
        assert "NSA_CUDA=1" in result.stderr
    else:
        assert result.returncode == 0, result.stderr
        with_cuda = value == "1" or (value == "" and toolkit)
        assert ("with CUDA" if with_cuda else "without CUDA") in result.stdout
        assert len(re.findall("building for torch", result.stdout)) == 1
        assert ("compiling for compute capabilities" in result.stdout) == with_cuda


def test_build_requirements_are_stated_alike() -> None:
    listed = re.findall(r"^([^#\n]+)$", (ROOT / "requirements" / "build.txt").read_text(), flags=re.MULTILINE)
    required = re.search(r"^requires = \[(.*?)\]", pyproject(), flags=re.MULTILINE | re.DOTALL)
    assert required is not None
    assert sorted(listed) == sorted([*re.findall(r'"([^"]+)"', required[1]), torches.requirement(torches.SUPPORTED)])


def test_hosts_are_checked_by_any_python() -> None:
    """The check that runs before there is an environment needs nothing but the interpreter."""
    result = run("-S", "-I", "tools/check_host.py", cwd=ROOT)
    assert result.returncode == 0, result.stderr
