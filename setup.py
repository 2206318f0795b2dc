"""Builds the libraries that tools/layers.py lists, for the versions of torch that tools/torches.py finds.

NSA_CUDA=0/1 forces the CUDA parts off or on; otherwise they are built when a CUDA toolkit is found.
TORCH_CUDA_ARCH_LIST sets their architectures, the visible GPUs' by default: tools/cuda_build.py.
NSA_TORCHES names folders with several versions of torch: `make wheel TORCH="2.11 2.12"` fills it in.
"""

import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tools"))  # an isolated build does not look beside setup.py
import check_build  # noqa: E402
import torches  # noqa: E402

SDIST = "sdist" in sys.argv  # which needs neither torch nor compilers
check_build.demand(check_build.for_metadata(ROOT, needs_torch=not SDIST))


def built() -> dict:
    """What is compiled, and what the metadata say of it."""
    import compiler_cache
    import cuda_build
    import layers
    from build_command import Build

    served = torches.served()
    cuda = cuda_build.wanted(served, torches.beneath(served))
    compiler_cache.use(cuda)
    Build.torches = served
    Build.info = {
        "torches": {torch.minor: torch.version for torch in served},
        "cuda": cuda.version if cuda else None,
        "architectures": cuda_build.architectures() if cuda else [],
        "sources": layers.digest(),
    }
    hosts = [layers.host(torch, cuda) for torch in served]
    return {
        "ext_modules": [layers.kernels(cuda, Build.info["architectures"]), *hosts, layers.module()],
        "cmdclass": {"build_ext": Build},
        "install_requires": [torches.requirement(Build.info["torches"])],
    }


setup(**({"install_requires": [torches.requirement(torches.SUPPORTED)]} if SDIST else built()))
