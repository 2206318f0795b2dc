"""Lets ccache, where it is installed, know again what it has compiled: in any checkout, environment or folder of pip.

Its entries hold the paths of a command. Those below the sources' folder are made relative, as in the Makefile. Torch's
headers lie outside, in another folder in each isolated build: the compiler reads them through a link in build/.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from cuda_build import Toolkit
from setuptools import Distribution
from torches import Torch

ROOT = Path(__file__).resolve().parent.parent
LINKS = ROOT / "build"
COMPILERS = ("/usr/lib/ccache", "/usr/lib64/ccache")  # Debian's and Fedora's folder of compilers that go through it


def use(cuda: Toolkit | None, folders: Sequence[str] = COMPILERS) -> None:
    """Has ccache called for each compiler, if there is one. What the environment says of it stays."""
    if shutil.which("ccache") is None:
        return
    os.environ.setdefault("CCACHE_BASEDIR", str(ROOT))
    os.environ.setdefault("CCACHE_NOHASHDIR", "1")
    path = os.environ["PATH"].split(os.pathsep)
    for folder in folders:
        if Path(folder, "c++").exists() and folder not in path:
            os.environ["PATH"] = os.pathsep.join([folder, *path])
            break
    if cuda:  # torch calls nvcc by its path, past ccache's own
        os.environ.setdefault("PYTORCH_NVCC", f"ccache {cuda.home}/bin/nvcc")


def steady(folders: Iterable[str], torches: Sequence[Torch]) -> list[str]:
    """The same include folders, but torch's through links whose paths stay: one for each of its versions.

    Their names are short: of a link's path and its target's, ccache takes the shorter one.
    """
    found = [str(folder) for folder in folders]
    for torch in torches:
        link = LINKS / f"t-{torch.version}"
        if any(Path(folder).is_relative_to(torch.root) for folder in found):
            point(link, torch.root)
        found = [_moved(folder, torch.root, link) for folder in found]
    return found


def point(link: Path, target: Path) -> None:
    """Makes a link, or turns it to another target, in one step: builds that run at once share it."""
    if link.is_symlink() and link.readlink() == target:
        return
    link.parent.mkdir(parents=True, exist_ok=True)
    new = link.with_name(f"{link.name}.{os.getpid()}")
    with suppress(FileNotFoundError):
        new.unlink()
    new.symlink_to(target)
    new.replace(link)


def lasting_folder() -> str:
    """Where objects lie in an ordinary build. An editable one has a folder that is thrown away."""
    usual = Distribution().get_command_obj("build")
    usual.ensure_finalized()
    return str(usual.build_temp)  # type: ignore[attr-defined]


def _moved(folder: str, root: Path, link: Path) -> str:
    return str(link / Path(folder).relative_to(root)) if Path(folder).is_relative_to(root) else folder
