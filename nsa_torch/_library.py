"""Loads libnsa_torch.so, whose ops then stand under ``torch.ops.nsa``."""

import json
from pathlib import Path

import torch

PACKAGE = Path(__file__).parent


def _check_torch(built: dict[str, str | None]) -> None:
    """The library links torch's C++ interface, which is the same only within one version."""
    built_torch = built["torch"] or ""
    # A build without CUDA fits every variant (+cpu, +cu130) of its version.
    same = (
        torch.__version__ == built_torch
        if built["cuda"]
        else torch.__version__.split("+")[0] == built_torch.split("+")[0]
    )
    if not same:
        raise ImportError(
            f"nsa_torch was built for torch {built_torch}, but torch {torch.__version__} is installed. "
            f"Install torch=={built_torch}, or build nsa_torch again with the torch you have: "
            "pip install --no-build-isolation --force-reinstall --no-deps nsa_torch (or its source folder)."
        )


def load() -> None:
    """Raises ImportError when the library is not built, or was built for another torch."""
    library = PACKAGE / "libnsa_torch.so"
    info = PACKAGE / "build_info.json"
    if not library.exists() or not info.exists():
        raise ImportError(
            f"nsa_torch is not built: {library} is missing. In a checkout, run "
            "`pip install --no-build-isolation -e .` or `make build`."
        )
    _check_torch(json.loads(info.read_text()))
    torch.ops.load_library(str(library))
