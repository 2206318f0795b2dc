"""The versions of torch that a build is for. Used by setup.py and by tools/backend.py.

NSA_TORCHES names folders that hold a torch each; unset, it is the torch that is installed. None is imported: a build
needs headers and libraries alone, as `pip install --no-deps --target FOLDER torch==2.13.*` lays them down.
"""

from __future__ import annotations

import os
import re
import site
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

SUPPORTED = ("2.11", "2.12", "2.13", "2.14", "2.15")  # tested; torch's C++ interface is the same within each


class Torch(NamedTuple):
    """One torch, where it lies."""

    root: Path
    version: str
    cuda: str | None

    @property
    def minor(self) -> str:
        return minor_of(self.version)


def minor_of(version: str) -> str:
    """2.13 of 2.13.1+cu130."""
    return ".".join(version.split(".")[:2])


def at(folder: Path) -> Torch:
    """The torch in a folder, or in a folder's folder `torch`."""
    root = folder / "torch" if (folder / "torch").is_dir() else folder
    try:
        text = (root / "version.py").read_text()
    except OSError:
        raise SystemExit(f"nsa_torch: there is no torch in {folder}") from None
    stated = dict(re.findall(r"^(\w+)(?:: [^=]+)? = '([^']*)'", text, flags=re.MULTILINE))
    return Torch(root.resolve(), stated["__version__"], stated.get("cuda"))


def served() -> list[Torch]:
    """What the build is for, oldest first; nothing where no torch is installed."""
    named = os.environ.get("NSA_TORCHES", "")
    found = find_spec("torch")
    installed = list(found.submodule_search_locations or []) if found else []
    torches = [at(Path(folder)) for folder in (named.split(os.pathsep) if named else installed[:1])]
    minors = [torch.minor for torch in torches]
    if others := [torch.version for torch in torches if torch.minor not in SUPPORTED]:
        raise SystemExit(f"nsa_torch: torch must be {' or '.join(SUPPORTED)}, got {', '.join(others)}")
    if len(set(minors)) < len(minors):
        raise SystemExit(f"nsa_torch: NSA_TORCHES names a minor version of torch twice: {', '.join(minors)}")
    return sorted(torches, key=lambda torch: _number(torch.minor))


def requirement(minors: Iterable[str]) -> str:
    """What a package built for these minor versions requires."""
    numbers = sorted({_number(minor) for minor in minors})
    (major, first), (_, last) = numbers[0], numbers[-1]
    gaps = [f"!={major}.{n}.*" for n in range(first, last) if (major, n) not in numbers]
    return ",".join([f"torch>={major}.{first}", f"<{major}.{last + 1}", *gaps])


def beneath(fetched: Sequence[Torch]) -> Torch | None:
    """The torch that is installed where the package goes, where a build has fetched another to build against."""
    installed = None if os.environ.get("NSA_TORCHES") else _installed()
    if installed is None:
        return None
    root = Path(str(installed.locate_file("torch"))).resolve()
    return at(root) if (root / "version.py").exists() and root not in [torch.root for torch in fetched] else None


def for_isolated_build() -> str:
    """The torch that an isolated build fetches: of the minor version installed where the package goes, if there is one.

    Raises:
        SystemExit: that is not a supported one. pip would put another in its place, unasked.
    """
    found = _installed()
    if found is None:
        return requirement(SUPPORTED)
    if minor_of(found.version) not in SUPPORTED:
        raise SystemExit(
            f"nsa_torch: torch {found.version} is installed in {found.locate_file('')}, but torch must be "
            f"{' or '.join(SUPPORTED)}: pip install 'torch=={SUPPORTED[-1]}.*' first, or take a fresh environment"
        )
    return f"torch=={minor_of(found.version)}.*"


def _installed() -> metadata.Distribution | None:
    """Torch where the package goes. pip's isolated environment hides what is installed, but not where that lies."""
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    own = Path(sys.prefix, "pyvenv.cfg")
    if not own.exists() or re.search(r"^include-system-site-packages *= *true", own.read_text(), re.MULTILINE):
        folders += [site.getusersitepackages(), *site.getsitepackages([sys.base_prefix])]
    return next(iter(metadata.distributions(name="torch", path=list(dict.fromkeys(folders)))), None)


def _number(minor: str) -> tuple[int, int]:
    major, _, rest = minor.partition(".")
    return int(major), int(rest)
