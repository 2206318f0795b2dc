"""What is compiled, and for what: two layers of libraries and a small Python module.

nsa_torch/lib/libnsa_torch_kernels.so   kernels and plans. No torch: compiled once
nsa_torch/lib/libnsa_torch_2_11.so      the ops, for one minor version of torch: links the kernels and that torch
nsa_torch/_C.*.so                       pybind11: what the kernels' library says of itself. No torch
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from cuda_build import Toolkit
from pybind11.setup_helpers import Pybind11Extension
from setuptools import Extension
from torches import Torch

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
FOLDER = "nsa_torch.lib"
KERNELS = "libnsa_torch_kernels"
# GCC 13 sees array bounds overstepped where torch's headers copy a std::vector<bool>: they are not.
QUIET = ["-Wall", "-Wno-unknown-pragmas", "-Wno-array-bounds"]
# CPython's usual ones. Those of the Python that builds differ between versions and distributions.
BASE_FLAGS = ["-Wsign-compare", "-DNDEBUG", "-g", "-fwrapv", "-O3", "-Wall", "-fPIC"]
HOST_FLAGS = ["-std=c++20", "-O3", "-g0", "-fopenmp", "-fno-math-errno", *QUIET]
DEVICE_FLAGS = ["-std=c++20", "-O3", "--threads=1", "-Xptxas=--warn-on-spills"]


def knows_torch(source: Path) -> bool:
    """Which layer a source belongs to. What knows no torch is device code, plans, and what these share."""
    room = source.relative_to(CSRC).parts[0]
    return source.suffix != ".cu" and not source.name.startswith("plan") and room not in ("common", "plans")


def sources(of_torch: bool, cuda: bool) -> list[str]:
    """The sources of a layer, relative to the root."""
    found = [*CSRC.rglob("*.cpp"), *(CSRC.rglob("*.cu") if cuda else ())]
    kept = [p for p in found if p.parent.name != "python" and (cuda or p.parent.name != "cuda")]
    return sorted(str(p.relative_to(ROOT)) for p in kept if knows_torch(p) == of_torch)


def host_name(torch: Torch) -> str:
    """nsa_torch/_library.py looks for it."""
    return f"libnsa_torch_{torch.minor.replace('.', '_')}"


def kernels(cuda: Toolkit | None, architectures: Sequence[str]) -> Extension:
    library = _library(KERNELS, sources(False, cuda is not None), cuda)
    library.extra_compile_args["cxx"].append(f'-DNSA_CUDA_ARCHITECTURES="{",".join(architectures)}"')
    return library


def host(torch: Torch, cuda: Toolkit | None) -> Extension:
    library = _library(host_name(torch), sources(True, cuda is not None), cuda)
    library.include_dirs += [str(torch.root / "include"), str(torch.root / "include/torch/csrc/api/include")]
    library.library_dirs.append(str(torch.root / "lib"))
    library.libraries += ["c10", "torch", "torch_cpu", *(["c10_cuda", "torch_cuda"] if cuda else [])]
    library.libraries.append(KERNELS.removeprefix("lib"))
    return library


def module() -> Extension:
    return Pybind11Extension(
        "nsa_torch._C",
        ["csrc/python/module.cpp"],
        include_dirs=[str(CSRC)],
        libraries=[KERNELS.removeprefix("lib")],
        extra_link_args=["-Wl,-rpath,$ORIGIN/lib", "-Wl,--allow-shlib-undefined"],
        cxx_std=20,
    )


def digest() -> str:
    """Of all sources: libraries that were built from different ones do not fit together."""
    found = hashlib.sha256()
    for path in sorted(path for path in CSRC.rglob("*") if path.is_file()):
        found.update(str(path.relative_to(CSRC)).encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:16]


def _library(name: str, sources: list[str], cuda: Toolkit | None) -> Extension:
    return Extension(
        f"{FOLDER}.{name}",
        sources,
        include_dirs=[str(CSRC), *([str(cuda.home / "include")] if cuda else [])],
        define_macros=[("NSA_CUDA_VERSION", f'"{cuda.version}"')] if cuda else [],
        library_dirs=[str(cuda.home / folder) for folder in ("lib64", "lib")] if cuda else [],
        libraries=["cudart"] if cuda else [],
        extra_compile_args={"cxx": list(HOST_FLAGS), "nvcc": list(DEVICE_FLAGS)},
        extra_link_args=[f"-Wl,-soname,{name}.so", "-Wl,-rpath,$ORIGIN"],
        language="c++",
    )
