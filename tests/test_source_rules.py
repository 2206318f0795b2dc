"""Rules of the source tree that no compiler checks."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import layers

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"

INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.MULTILINE)
HOST_ONLY = re.compile(r"^(torch|ATen|c10|caffe2|pybind11)/|(^|/)Python\.h$|(^|/)host/")

# Lines of a file, by where it lives. A longer one says why in its design note.
HEADER_OR_KERNEL, HOST, PYTHON, FUNCTION = 400, 250, 300, 60
CPP = (".cpp", ".h", ".cu", ".cuh")


def device_files() -> list[Path]:
    """Kernels and what they may include: every .cu and .cuh file, and all of common/."""
    kernels = [*CSRC.rglob("*.cu"), *CSRC.rglob("*.cuh")]
    return sorted({*kernels, *(p for p in (CSRC / "common").rglob("*") if p.is_file())})


def includes_with_torch(path: Path, seen: frozenset[Path] = frozenset()) -> Iterator[str]:
    """Includes of `path`, and of the project's headers that it includes, that bring torch in."""
    for name in INCLUDE.findall(path.read_text()):
        if HOST_ONLY.search(name):
            yield f"{path.name} includes {name}"
        for header in (CSRC / name, path.parent / name):
            if header.is_file() and header not in seen:
                yield from includes_with_torch(header, seen | {path, header})


@pytest.mark.parametrize("path", device_files(), ids=lambda p: str(p.relative_to(CSRC)))
def test_device_code_includes_no_torch(path: Path) -> None:
    assert list(includes_with_torch(path)) == []


COMPILED = sorted(path for pattern in ("*.cpp", "*.cu") for path in CSRC.rglob(pattern) if path.parent.name != "python")


@pytest.mark.parametrize("path", COMPILED, ids=lambda p: str(p.relative_to(CSRC)))
def test_a_source_is_in_the_layer_of_what_it_includes(path: Path) -> None:
    """Of the ops, compiled for each torch, if it includes torch; else of the kernels, compiled once; never in both."""
    name = str(path.relative_to(ROOT))
    layers_of_it = [of_torch for of_torch in (False, True) if name in layers.sources(of_torch=of_torch, cuda=True)]
    assert layers_of_it == [bool(list(includes_with_torch(path)))]


def test_what_is_compiled_without_cuda() -> None:
    without = {name for of_torch in (False, True) for name in layers.sources(of_torch=of_torch, cuda=False)}
    device = {path for path in COMPILED if path.suffix == ".cu" or "cuda" in path.relative_to(CSRC).parts}
    assert without == {str(path.relative_to(ROOT)) for path in {*COMPILED} - device}
    for name in without:
        assert not re.search(r"#include [<\"](cuda|ATen/cuda|c10/cuda)", (ROOT / name).read_text()), name


def test_device_code_is_found() -> None:
    assert CSRC / "common" / "geometry.h" in device_files()


@pytest.mark.parametrize(
    ("line", "refused"),
    [
        ("#include <torch/library.h>", True),
        ("#include <ATen/ATen.h>", True),
        ('  # include "c10/core/SymInt.h"', True),
        ("#include <Python.h>", True),
        ("#include <pybind11/pybind11.h>", True),
        ('#include "host/checks.h"', True),
        ('#include "indirect.cuh"', True),
        ("#include <cute/tensor.hpp>", False),
        ("#include <cuda_runtime.h>", False),
        ("#include <cstdint>", False),
    ],
)
def test_the_rule_sees_what_it_forbids(line: str, refused: bool, tmp_path: Path) -> None:
    (tmp_path / "indirect.cuh").write_text("#include <torch/extension.h>\n")
    (tmp_path / "kernel.cu").write_text(f"// a kernel\n{line}\n")
    assert bool(list(includes_with_torch(tmp_path / "kernel.cu"))) == refused


def source_files() -> list[tuple[Path, int]]:
    files: list[tuple[Path, int]] = []
    for path in CSRC.rglob("*"):
        if path.suffix in (".cu", ".cuh", ".h"):
            files.append((path, HEADER_OR_KERNEL))
        elif path.suffix == ".cpp":
            files.append((path, HOST))
    for folder in ("nsa_torch", "tests", "benchmarks", "examples"):
        files += [(path, PYTHON) for path in (ROOT / folder).rglob("*.py")]
    return sorted(files)


@pytest.mark.parametrize(("path", "limit"), source_files(), ids=lambda value: getattr(value, "name", None))
def test_files_are_short(path: Path, limit: int) -> None:
    """A longer file is named in a note under docs/, on a line that says why it is long."""
    lines = len(path.read_text().splitlines())
    name = str(path.relative_to(ROOT))
    assert lines <= limit or name in _excused(), f"{name} has {lines} lines, the limit is {limit}"


@pytest.mark.parametrize(
    "path",
    [path for path, limit in source_files() if limit == PYTHON],
    ids=lambda path: path.name,
)
def test_python_functions_are_short(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[0].lineno, node.end_lineno or 0
            assert body[1] - body[0] < FUNCTION, f"{node.name} has {body[1] - body[0] + 1} lines"


NO_FUNCTION = re.compile(r"(namespace|struct|class|enum|union|if|for|while|switch|else|do|try|return|case)\b")
QUALIFIERS = re.compile(r"template <.*?> (?=\w)|__launch_bounds__\([^)]*\)|__align__\(\d+\)")


def cpp_functions(path: Path) -> Iterator[tuple[str, int]]:
    """Name and lines of every function of a file, by the layout that clang-format gives it."""
    lines = path.read_text().splitlines()
    for first, line in enumerate(lines):
        if not line.endswith("{"):
            continue
        head = first
        while head > 0 and not re.search(r"[;{}]$|^\s*(//|#|public:|private:)|^$", lines[head - 1]):
            head -= 1
        indent = len(lines[head]) - len(lines[head].lstrip())
        signature = QUALIFIERS.sub("", " ".join(part.strip() for part in lines[head : first + 1]))
        name = re.search(r"([\w~:]+)\(", signature)
        no_function = name is None or NO_FUNCTION.match(signature) or re.search(r"\[[&=]|^[^(]*=", signature)
        if indent > 4 or no_function or name is None:
            continue
        end = next((n for n in range(first + 1, len(lines)) if lines[n] == " " * indent + "}"), None)
        if end is not None:
            yield name[1], end - first


@pytest.mark.parametrize(
    "path", sorted(p for p in CSRC.rglob("*") if p.suffix in CPP), ids=lambda p: str(p.relative_to(CSRC))
)
def test_cpp_functions_are_short(path: Path) -> None:
    """The list of schemas is one table, to be read from top to bottom: its reason stands beside it."""
    long = {name: lines for name, lines in cpp_functions(path) if lines > FUNCTION}
    assert path.name == "library.cpp" or not long


def test_the_lengths_of_cpp_functions_are_seen(tmp_path: Path) -> None:
    head = "namespace nsa {\n\ntemplate <typename T>\nvoid long_one(int a,\n              int b) {\n"
    end = "}\n\nstruct Some {\n  int short_one() {\n    return 1;\n  }\n};\n"
    (tmp_path / "a.cpp").write_text(head + "  x();\n" * 70 + end)
    assert dict(cpp_functions(tmp_path / "a.cpp")) == {"long_one": 71, "short_one": 2}


def test_setup_py_is_short() -> None:
    assert len((ROOT / "setup.py").read_text().splitlines()) < 100


def _excused() -> str:
    notes = [note.read_text() for note in sorted((ROOT / "docs").rglob("*.md"))]
    return "\n".join(line for note in notes for line in note.splitlines() if " long" in line)
