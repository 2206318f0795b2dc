"""Native Sparse Attention (arXiv 2502.11089) for PyTorch.

Importing loads the library of C++ ops (``torch.ops.nsa``). The functions here are those ops, typed and documented;
:class:`NSAAttention` is the layer to put into a transformer, :class:`NSACache` its state while decoding, and
:mod:`nsa_torch.reference` the definition in plain PyTorch.
"""

from importlib import import_module, metadata
from pathlib import Path
from types import ModuleType

from nsa_torch import _library

_library.load()

from nsa_torch import flops  # noqa: E402
from nsa_torch.cache import NSACache  # noqa: E402
from nsa_torch.checkpoints import convert_state_dict_0_1  # noqa: E402
from nsa_torch.decode import nsa_attention_with_kvcache  # noqa: E402
from nsa_torch.info import KernelLaunch, KernelPlan, build_info, which_kernel  # noqa: E402
from nsa_torch.module import NSAAttention  # noqa: E402
from nsa_torch.ops import (  # noqa: E402
    compress,
    compressed_attention,
    nsa_attention,
    rotate,
    select_blocks,
    selected_attention,
    window_attention,
)

flops.register()

try:
    __version__ = metadata.version("nsa_torch")
except metadata.PackageNotFoundError:  # run from a checkout that was built in place
    __version__ = "0+checkout"

__all__ = [
    "KernelLaunch",
    "KernelPlan",
    "NSAAttention",
    "NSACache",
    "build_info",
    "cmake_prefix_path",
    "compress",
    "compressed_attention",
    "convert_state_dict_0_1",
    "nsa_attention",
    "nsa_attention_with_kvcache",
    "rotate",
    "select_blocks",
    "selected_attention",
    "which_kernel",
    "window_attention",
]


def __getattr__(name: str) -> ModuleType:
    """nsa_torch.distributed and .diagnostics are loaded when first asked for: what they need takes its time."""
    if name in ("distributed", "diagnostics"):
        return import_module(f"nsa_torch.{name}")
    raise AttributeError(f"module 'nsa_torch' has no attribute {name!r}")


def cmake_prefix_path() -> str:
    """The folder of nsa_torchConfig.cmake, for ``cmake -Dnsa_torch_DIR=...``."""
    package = Path(__file__).parent
    installed = package / "share" / "cmake" / "nsa_torch"
    return str(installed if installed.exists() else package.parent / "cmake")
