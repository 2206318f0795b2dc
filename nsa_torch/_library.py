"""Loads the library of ops for the torch that is there, whose ops then stand under ``torch.ops.nsa``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

PACKAGE = Path(__file__).parent
SOURCE = (
    "pip install --no-build-isolation --no-deps --force-reinstall --no-binary nsa_torch nsa_torch "
    "(or, in its source folder, pip install --no-build-isolation --no-deps .)"
)


def built() -> dict[str, Any]:
    """What the package holds. ``torches``: the minor versions of torch, and which version each was built against.

    Raises:
        ImportError: nothing is built.
    """
    info = PACKAGE / "build_info.json"
    if not info.exists():
        raise ImportError(
            f"nsa_torch is not built: {info} is missing. In a checkout, run "
            "`pip install --no-build-isolation -e .` or `make build`."
        )
    found: dict[str, Any] = json.loads(info.read_text())
    return found


def minor_version() -> str:
    """Of the torch that is there. Its C++ interface is the same within one."""
    return ".".join(torch.__version__.split(".")[:2])


def path() -> Path:
    """The library for the torch that is there."""
    return PACKAGE / "lib" / f"libnsa_torch_{minor_version().replace('.', '_')}.so"


def _check_torch(built: dict[str, Any]) -> None:
    minor, held = minor_version(), list(built["torches"])
    if minor not in held:
        raise ImportError(
            f"nsa_torch was built for torch {', '.join(held)}, but torch {torch.__version__} is installed. "
            f"Install torch=={held[-1]}.*, or build nsa_torch for the torch you have: {SOURCE}."
        )
    # A build without CUDA fits every variant (+cpu, +cu130) of a version.
    cuda = torch.version.cuda or "none"
    if built["cuda"] and built["cuda"].split(".")[0] != cuda.split(".")[0]:
        raise ImportError(
            f"nsa_torch was built with CUDA {built['cuda']}, but torch {torch.__version__} with {cuda}. "
            f"Install a torch of the same major version of CUDA, or build nsa_torch for the torch you have: {SOURCE}."
        )


def load() -> None:
    """Raises ImportError when the library is not built, or does not fit the torch that is there."""
    _check_torch(built())
    try:
        torch.ops.load_library(str(path()))
    except OSError as error:
        raise ImportError(
            f"nsa_torch cannot load {path()}: {error}. Build nsa_torch for the torch you have: {SOURCE}."
        ) from None
