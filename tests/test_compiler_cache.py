"""A build compiles nothing that was compiled before: by pip elsewhere with ccache, or editable in the same folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import compiler_cache
from cuda_build import Toolkit
from torches import Torch

ROOT = Path(__file__).resolve().parents[1]
# What setup.py of this project builds, in small: of each layer a source. The second knows torch.
SOURCES = {
    "csrc/common/kernels.cpp": "int nsa_kernels() { return 1; }\n",
    "csrc/library.cpp": "#include <torch/small.h>\n#include <api.h>\nint nsa_ops() { return small() + api(); }\n",
    "csrc/python/module.cpp": "#include <pybind11/pybind11.h>\nPYBIND11_MODULE(_C, m) {}\n",
    "csrc/nsa.h": "",
    "cmake/nsa_torchConfig.cmake": "",
    "nsa_torch/__init__.py": "",
}
BUILD = """
import os, sys, sysconfig
sysconfig.get_config_vars()["CFLAGS"] += os.environ.get("FLAGS_OF_THIS_PYTHON", "")
sys.path.insert(0, "tools")
import backend
getattr(backend, "build_" + sys.argv[1])(sys.argv[2])
"""


def project(folder: Path) -> Path:
    """A checkout, or what pip unpacks of a source distribution."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "tools", "requirements"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        copy(ROOT / name, folder / name)
    for package in ("diagnostics", "integrations", "integrations/transformers"):
        (folder / "nsa_torch" / package).mkdir(parents=True)
        (folder / "nsa_torch" / package / "__init__.py").touch()
    for name, text in SOURCES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def small_torch(folder: Path, version: str = "2.15.0+cpu") -> Path:
    """The torch of an environment, as pip fetches it into a new folder for each isolated build."""
    include = folder / "torch" / "include" / "torch"
    api = include / "csrc" / "api" / "include"
    api.mkdir(parents=True)
    (include / "small.h").write_text("inline int small() { return 2; }\n")
    (api / "api.h").write_text("inline int api() { return 3; }\n")
    (folder / "torch" / "version.py").write_text(f"__version__ = '{version}'\ncuda = None\n")
    (folder / "torch" / "lib").mkdir()
    for name in ("c10", "torch", "torch_cpu"):
        library = folder / "torch" / "lib" / f"lib{name}.so"
        subprocess.run(["c++", "-shared", "-x", "c++", "/dev/null", "-o", library], check=True)
    return folder


def build(kind: str, folder: Path, torch: Path, out: Path, **environment: str) -> None:
    """As pip calls it: in a process of its own, from the project's folder. PATH knows ccache, but not its compilers."""
    path = [part for part in os.environ["PATH"].split(os.pathsep) if part not in compiler_cache.COMPILERS]
    given = {name: value for name, value in os.environ.items() if not name.startswith(("CCACHE_", "NSA_", "CXX"))}
    given |= {"NSA_CUDA": "0", "NSA_TORCHES": str(torch), "PATH": os.pathsep.join(path)} | environment
    out.mkdir(exist_ok=True)
    command = [sys.executable, "-c", BUILD, kind, str(out)]
    result = subprocess.run(command, cwd=folder, env=given, check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def hits_and_misses(cache: Path) -> tuple[int, int]:
    command = ["ccache", "--print-stats"]
    said = subprocess.run(
        command, env=os.environ | {"CCACHE_DIR": str(cache)}, check=True, capture_output=True, text=True
    )
    counts = dict(line.split("\t") for line in said.stdout.splitlines())
    hits = int(counts["direct_cache_hit"]) + int(counts["preprocessed_cache_hit"])
    return hits, int(counts["cache_miss"])


needs_ccache = pytest.mark.skipif(
    shutil.which("ccache") is None or not any(Path(folder, "c++").exists() for folder in compiler_cache.COMPILERS),
    reason="needs ccache, with compilers that go through it",
)


@needs_ccache
@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_a_build_in_another_folder_with_torch_in_another_comes_from_ccache(kind: str, tmp_path: Path) -> None:
    """As isolated builds do, and those of a source distribution."""
    cache = tmp_path / "cache"
    for n, expected in ((1, (0, 3)), (2, (3, 3))):
        folder, torch = project(tmp_path / f"checkout-{n}"), small_torch(tmp_path / f"environment-of-pip-{n}")
        build(kind, folder, torch, tmp_path / "out", CCACHE_DIR=str(cache))
        assert hits_and_misses(cache) == expected


@needs_ccache
def test_a_build_for_another_torch_of_the_same_version_is_compiled(tmp_path: Path) -> None:
    """The path of its headers is the same, but not what is in them."""
    cache, folder = tmp_path / "cache", project(tmp_path / "checkout")
    build("wheel", folder, small_torch(tmp_path / "environment-1"), tmp_path / "out", CCACHE_DIR=str(cache))
    other = small_torch(tmp_path / "environment-2")
    (other / "torch" / "include" / "torch" / "small.h").write_text("inline int small() { return 4; }\n")
    build("wheel", folder, other, tmp_path / "out", CCACHE_DIR=str(cache))
    assert hits_and_misses(cache) == (0, 4)


@needs_ccache
def test_libraries_are_the_same_whatever_python_builds_them(tmp_path: Path) -> None:
    """Pythons were compiled with other flags, which they pass on."""
    cache, torch = tmp_path / "cache", small_torch(tmp_path / "environment")
    build("wheel", project(tmp_path / "checkout-1"), torch, tmp_path / "out", CCACHE_DIR=str(cache))
    flags = {"FLAGS_OF_THIS_PYTHON": " -O1 -DANOTHER"}
    build("wheel", project(tmp_path / "checkout-2"), torch, tmp_path / "out", CCACHE_DIR=str(cache), **flags)
    assert hits_and_misses(cache) == (2, 4)  # _C alone is compiled anew
    flags = {"CFLAGS": "-O1"}
    build("wheel", project(tmp_path / "checkout-3"), torch, tmp_path / "out", CCACHE_DIR=str(cache), **flags)
    assert hits_and_misses(cache) == (2, 7)


def objects(folder: Path) -> dict[str, int]:
    """When each was compiled."""
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*.o")}


def test_an_editable_build_keeps_what_it_compiled(tmp_path: Path) -> None:
    folder, torch = project(tmp_path / "checkout"), small_torch(tmp_path / "environment")
    build("editable", folder, torch, tmp_path / "out", CCACHE_DISABLE="1")
    first = objects(folder)
    assert len(first) == 3 and all(name.startswith("build/temp.") for name in first)
    build("editable", folder, torch, tmp_path / "out", CCACHE_DISABLE="1")
    assert objects(folder) == first
    (folder / "csrc" / "library.cpp").write_text("int nsa_ops() { return 5; }\n")
    build("editable", folder, torch, tmp_path / "out", CCACHE_DISABLE="1")
    assert [name.rpartition("/")[2] for name, time in objects(folder).items() if time != first[name]] == ["library.o"]
    build("wheel", folder, torch, tmp_path / "out", CCACHE_DISABLE="1")
    assert len(objects(folder)) == 3


def test_torch_is_read_through_a_link_of_its_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler_cache, "LINKS", tmp_path / "build")
    older, newer = (Torch(tmp_path / name / "torch", f"{name}.0", None) for name in ("2.11", "2.15"))
    folders = ["csrc", f"{older.root}/include", f"{older.root}/include/torch/csrc/api/include", "/usr/include"]
    link = tmp_path / "build" / "t-2.11.0"
    expected = ["csrc", f"{link}/include", f"{link}/include/torch/csrc/api/include", "/usr/include"]
    assert compiler_cache.steady(folders, [older, newer]) == expected
    assert link.readlink() == older.root
    moved = older._replace(root=tmp_path / "elsewhere" / "torch")
    assert compiler_cache.steady([f"{moved.root}/include"], [moved]) == [f"{link}/include"]
    assert link.readlink() == moved.root
    assert compiler_cache.steady(["csrc"], [newer]) == ["csrc"]
    assert [path.name for path in link.parent.iterdir()] == [link.name]


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with a ccache, and a folder of compilers that go through it."""
    for name in ("bin/ccache", "compilers/c++"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    for name in ("CCACHE_BASEDIR", "CCACHE_NOHASHDIR", "PYTORCH_NVCC"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_compilers_go_through_ccache_where_there_is_one(there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(2):  # the second time there is nothing left to do
        compiler_cache.use(Toolkit(Path("/cuda"), "13.0"), [str(there / "none"), str(there / "compilers")])
        assert os.environ["PATH"] == f"{there / 'compilers'}{os.pathsep}{there / 'bin'}"
        assert os.environ["CCACHE_BASEDIR"] == str(ROOT)
        assert os.environ["PYTORCH_NVCC"] == "ccache /cuda/bin/nvcc"


def test_what_the_environment_says_of_ccache_stays(there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = {"CCACHE_BASEDIR": "/home", "CCACHE_NOHASHDIR": "0", "PYTORCH_NVCC": "nvcc"}
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    compiler_cache.use(Toolkit(Path("/cuda"), "13.0"))
    assert {name: os.environ[name] for name in said} == said


def test_without_ccache_nothing_changes(there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (there / "bin" / "ccache").unlink()
    before = dict(os.environ)
    compiler_cache.use(Toolkit(Path("/cuda"), "13.0"), [str(there / "compilers")])
    assert dict(os.environ) == before
