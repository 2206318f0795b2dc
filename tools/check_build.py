"""What a build needs, and says in a line where it is missing, instead of failing deep inside setuptools or torch."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

import check_host
import setuptools

OLDEST_SETUPTOOLS = 77  # the first that reads `license = "MIT"` in pyproject.toml
HOW = "pip install -r requirements/build.txt"


def demand(lines: Iterable[str]) -> None:
    """Ends the build if something is missing."""
    found = [f"nsa_torch: {line}" for line in lines]
    if found:
        raise SystemExit("\n".join(found))


def for_metadata(root: Path, needs_torch: bool = True) -> Iterator[str]:
    """What must be there before setup.py can say anything."""
    version = setuptools.__version__
    if int(re.findall(r"\d+", version)[0]) < OLDEST_SETUPTOOLS:
        yield f"setuptools {version} is too old, {OLDEST_SETUPTOOLS} or newer is needed: {HOW}"
    for module in ("torch", "pybind11") if needs_torch else ():
        if find_spec(module) is None:
            yield f"{module} is missing, and the build is not isolated: {HOW}"
    if not os.access(root, os.W_OK):
        yield f"{root} cannot be written to, and a build writes there: copy it to a folder of yours, and build that"


def for_compiling() -> Iterator[str]:
    """What must be there to compile. Adds the interpreter's own scripts, where pip puts ninja, to the PATH."""
    scripts = str(Path(sys.executable).parent)
    if scripts not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join([scripts, os.environ.get("PATH", "")])
    for line in check_host.missing_to_compile():
        yield f"missing: {line}"
    if shutil.which("ninja") is None:
        yield "missing: ninja: pip install ninja"
