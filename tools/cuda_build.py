"""Whether the CUDA parts are built, by which compiler, and for which GPU architectures. Used by setup.py."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from torches import Torch

Capability = tuple[int, int]

EVERYWHERE = ("8.0+PTX", "9.0a")  # where no GPU is visible
TESTED_CUDA = 13  # the major version of PyPI's torches from 2.11 on
HOPPER = "9.0a"  # the kernels for Hopper use instructions that plain 9.0 has not
NAMES = {  # as torch.utils.cpp_extension takes them
    "Ampere": ("8.0", "8.6+PTX"),
    "Ada": ("8.9+PTX",),
    "Hopper": ("9.0+PTX",),
    "Blackwell": ("10.0", "10.3", "12.0", "12.1+PTX"),
}


class Architectures(NamedTuple):
    """What to compile for, in the words of TORCH_CUDA_ARCH_LIST, and what to tell the user about it."""

    names: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def environment(self) -> str:
        """The value of TORCH_CUDA_ARCH_LIST."""
        return ";".join(self.names)


class Toolkit(NamedTuple):
    """A CUDA toolkit."""

    home: Path
    version: str  # of its compiler


def toolkit() -> Toolkit | None:
    """The toolkit that torch would take, if it has a compiler."""
    from torch.utils.cpp_extension import CUDA_HOME

    nvcc = Path(CUDA_HOME or "", "bin", "nvcc")
    if CUDA_HOME is None or not nvcc.exists():
        return None
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    release = re.search(r"release (\d+\.\d+)", said)
    return Toolkit(Path(CUDA_HOME), release[1]) if release else None


def wanted(torches: Sequence[Torch], beneath: Torch | None = None) -> Toolkit | None:
    """The toolkit to build the CUDA parts with, or None: said in one line.

    Args:
        torches: those that the build is for.
        beneath: the one that is there already, where an isolated build has fetched another of the same minor version.
    """
    asked = os.environ.get("NSA_CUDA", "")
    if asked not in ("", "0", "1"):
        raise SystemExit(f"NSA_CUDA must be 0, 1 or unset, got {asked!r}")
    found = toolkit() if asked != "0" else None
    if asked == "1" and found is None:
        raise SystemExit("nsa_torch: NSA_CUDA=1, but there is no nvcc: install a CUDA toolkit, or set CUDA_HOME to it")
    if found:
        check_kinds(torches)
    given = [*torches, *([beneath] if beneath else [])]
    without = [torch.version for torch in given if torch.cuda is None]
    if asked == "1" and without:
        raise SystemExit(f"nsa_torch: NSA_CUDA=1, but torch {', '.join(without)} was built without CUDA")
    cuda = None if without else found
    for torch in given if cuda else ():
        check_major(cuda, torch)
    with_cuda = f"with CUDA {cuda.version} from {cuda.home}" if cuda else "without CUDA"
    if found and beneath and beneath.cuda is None:
        with_cuda += f", like the torch {beneath.version} that is installed"
    print(f"nsa_torch: building for torch {', '.join(torch.version for torch in torches)}, {with_cuda}")
    return cuda


def check_kinds(torches: Sequence[Torch]) -> None:
    """One library of kernels serves all of them: it has CUDA or not."""
    kinds = {kind: [torch.version for torch in torches if (torch.cuda is not None) == kind] for kind in (True, False)}
    if all(kinds.values()):
        raise SystemExit(
            f"nsa_torch: of NSA_TORCHES torch {', '.join(kinds[True])} was built with CUDA, and torch "
            f"{', '.join(kinds[False])} without: name those of one kind, or set NSA_CUDA=0 to do without CUDA"
        )


def check_major(cuda: Toolkit, torch: Torch) -> None:
    """Libraries of one major version of CUDA serve each other."""
    own, major = (int(str(version).split(".")[0]) for version in (cuda.version, torch.cuda))
    if own != major:
        remedy = f"set CUDA_HOME to a toolkit of CUDA {major}"
        if major < TESTED_CUDA:
            remedy = f"install a torch built with CUDA {TESTED_CUDA}, such as PyPI's"
            remedy += f", and set CUDA_HOME to a toolkit of CUDA {TESTED_CUDA}" if own != TESTED_CUDA else ""
        raise SystemExit(
            f"nsa_torch: nvcc in {cuda.home} is of CUDA {cuda.version}, but torch {torch.version} was built with CUDA "
            f"{torch.cuda}: {remedy}, or NSA_CUDA=0 to do without CUDA"
        )


def choose(requested: str | None, visible: Sequence[Capability], newest: Capability) -> Architectures:
    """The architectures of a build.

    Args:
        requested: TORCH_CUDA_ARCH_LIST, or None or "" or "native" for the visible GPUs'.
        visible: compute capabilities of the GPUs that are there.
        newest: the newest capability that the compiler knows. A newer GPU gets its PTX.

    Raises:
        ValueError: an entry that names no architecture, or none of 8.0 or newer.
    """
    if requested and requested != "native":
        return _requested(requested)
    if not visible:
        return Architectures(EVERYWHERE, ())
    names, notes = [], []
    for capability in sorted(set(visible)):
        if capability < (8, 0):
            notes.append(f"a visible GPU has compute capability {_name(capability)}: the kernels need 8.0 or newer")
        elif capability == (9, 0):
            names.append(HOPPER)
        elif capability > newest:
            names.append(f"{_name(newest)}+PTX")
            notes.append(f"the compiler does not know {_name(capability)}: it gets the PTX of {_name(newest)}")
        else:
            names.append(_name(capability))
    return Architectures(tuple(_unique(names)) or EVERYWHERE, tuple(notes))


def architectures() -> list[str]:
    """Chosen for the visible GPUs, said in a line, and set in the environment, where torch's BuildExtension looks."""
    import torch

    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    known = [re.findall(r"\d+", name)[0] for name in torch.cuda.get_arch_list() if name.startswith("sm_")]
    newest = max(((int(name[:-1]), int(name[-1])) for name in known), default=(9, 0))
    visible = [torch.cuda.get_device_capability(gpu) for gpu in gpus]
    try:
        chosen = choose(os.environ.get("TORCH_CUDA_ARCH_LIST"), visible, newest)
    except ValueError as error:
        raise SystemExit(f"nsa_torch: {error}") from None
    for note in chosen.notes:
        print(f"nsa_torch: {note}")
    print(f"nsa_torch: compiling for compute capabilities {', '.join(chosen.names)}")
    os.environ["TORCH_CUDA_ARCH_LIST"] = chosen.environment
    return list(chosen.names)


def _requested(requested: str) -> Architectures:
    entries = [e for part in re.split(r"[;,\s]+", requested) if part for e in NAMES.get(part, (part,))]
    names: list[str] = []
    notes = []
    for entry in entries:
        found = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if found is None:
            raise ValueError(f"TORCH_CUDA_ARCH_LIST must hold entries such as 8.0, 9.0a or 8.0+PTX, got {entry!r}")
        if (int(found[1]), int(found[2])) < (8, 0):  # images with many libraries list what some of them can run on
            notes.append(f"{entry} is left out: the kernels need 8.0 or newer")
        elif entry == "9.0a+PTX":
            notes.append("9.0a+PTX is built as 9.0a: its PTX would run on no other GPU")
            names.append(HOPPER)
        elif entry == "9.0":
            notes.append("9.0 is built as 9.0a: the kernels for Hopper need it")
            names.append(HOPPER)
        elif entry == "9.0+PTX":
            notes.append(
                "9.0+PTX is built as 9.0a and 8.0+PTX: kernels for Hopper need 9.0a, whose PTX runs nowhere else"
            )
            names += ["8.0+PTX", HOPPER]
        else:
            names.append(entry)
    if not names:
        raise ValueError(f"TORCH_CUDA_ARCH_LIST must hold 8.0 or newer, which the kernels need, got {requested!r}")
    return Architectures(tuple(_unique(names)), tuple(dict.fromkeys(notes)))


def _name(capability: Capability) -> str:
    return f"{capability[0]}.{capability[1]}"


def _unique(names: Iterable[str]) -> list[str]:
    """Each once, and one without PTX not beside the same with it."""
    kept = list(dict.fromkeys(names))
    return [name for name in kept if f"{name}+PTX" not in kept]
