"""Builds libnsa_torch.so (all ops, independent of Python's version) and nsa_torch._C (a small pybind11 module).

NSA_CUDA=0/1 forces the CUDA parts off or on; otherwise they are built when a CUDA toolkit is found.
TORCH_CUDA_ARCH_LIST sets their architectures, the visible GPUs' by default: tools/cuda_build.py.
"""

import json
import os
import shutil
import sys
from pathlib import Path

import torch
from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tools"))  # an isolated build does not look beside setup.py
import cuda_build  # noqa: E402
from build_progress import shown  # noqa: E402

LIBRARY = "nsa_torch.libnsa_torch"
HOST_FLAGS = ["-std=c++20", "-O3", "-g0", "-fopenmp", "-fno-math-errno", "-Wall", "-Wno-unknown-pragmas"]
DEVICE_FLAGS = ["-std=c++20", "-O3", "--threads=1", "-Xptxas=--warn-on-spills"]


def library(cuda: bool) -> CppExtension:
    sources = [p for p in (ROOT / "csrc").rglob("*.cpp") if p.parent.name != "python"]
    defines = [("NSA_CUDA_VERSION", f'"{torch.version.cuda}"')] if cuda else []
    names = ",".join(ARCHITECTURES)
    if cuda:
        sources += (ROOT / "csrc").rglob("*.cu")
    else:
        sources = [p for p in sources if p.parent.name != "cuda"]
    return (CUDAExtension if cuda else CppExtension)(
        LIBRARY,
        sorted(str(p.relative_to(ROOT)) for p in sources),
        include_dirs=[str(ROOT / "csrc")],
        define_macros=defines,
        extra_compile_args={"cxx": [*HOST_FLAGS, f'-DNSA_CUDA_ARCHITECTURES="{names}"'], "nvcc": DEVICE_FLAGS},
        py_limited_api=True,
    )


class Build(BuildExtension):
    """The library keeps a plain name and does not link Python; _C links the library beside it."""

    def get_ext_filename(self, name: str) -> str:
        if name.endswith("libnsa_torch"):  # the whole dotted name, or its last part
            return os.path.join(*name.split(".")) + ".so"
        return super().get_ext_filename(name)

    def build_extension(self, ext) -> None:
        if ext.name == "nsa_torch._C":
            ext.library_dirs.append(str(Path(self.get_ext_fullpath(LIBRARY)).parent))
        super().build_extension(ext)

    def run(self) -> None:
        if os.environ.get("NSA_BUILD") == "0":  # the Makefile installs the links first, and builds in place afterwards
            return
        with shown():
            super().run()
        package = Path(self.get_ext_fullpath(LIBRARY)).parent
        info = {
            "torch": torch.__version__,
            "cuda": torch.version.cuda if CUDA else None,
            "architectures": ARCHITECTURES,
        }
        (package / "build_info.json").write_text(json.dumps(info) + "\n")
        if not self.inplace:
            for source, target in (("csrc/nsa.h", "include"), ("cmake/nsa_torchConfig.cmake", "share/cmake/nsa_torch")):
                (package / target).mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / source, package / target)


CUDA = cuda_build.wanted()
ARCHITECTURES = cuda_build.architectures() if CUDA else []
MODULE = Pybind11Extension(
    "nsa_torch._C",
    ["csrc/python/module.cpp"],
    include_dirs=[str(ROOT / "csrc")],
    libraries=["nsa_torch"],
    extra_link_args=["-Wl,-rpath,$ORIGIN", "-Wl,--allow-shlib-undefined"],
    cxx_std=20,
)
setup(ext_modules=[library(CUDA), MODULE], cmdclass={"build_ext": Build.with_options(no_python_abi_suffix=False)})
