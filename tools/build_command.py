"""setup.py's build_ext: torch's, for libraries that keep plain names and do not link Python."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import check_build
import compiler_cache
import layers
from build_progress import shown
from setuptools import Extension
from torch.utils.cpp_extension import BuildExtension
from torches import Torch

SETTINGS = layers.ROOT / "build" / "settings"  # on which the Makefile's stamps depend, in every environment
INSTALLED = (("csrc/nsa.h", "include"), ("cmake/nsa_torchConfig.cmake", "share/cmake/nsa_torch"))


class Build(BuildExtension):
    """`info` is what build_info.json says: torches by minor version, cuda, architectures, and the sources' digest.

    `torches` are those that the build is for.
    """

    info: dict[str, Any]
    torches: Sequence[Torch] = ()

    def __init__(self, *arguments: Any, **options: Any) -> None:
        check_build.demand(check_build.for_compiling())  # torch's own would warn, and compile without ninja
        super().__init__(*arguments, **options)

    def finalize_options(self) -> None:
        super().finalize_options()
        if self.editable_mode:
            self.build_temp = compiler_cache.lasting_folder()

    def get_ext_filename(self, name: str) -> str:
        if name.rsplit(".", maxsplit=1)[-1].startswith("lib"):  # the whole dotted name, or its last part
            return os.path.join(*name.split(".")) + ".so"
        return super().get_ext_filename(name)

    def build_extension(self, ext: Extension) -> None:
        name = ext.name.split(".")[-1]
        ext.library_dirs.append(str(self._package() / "lib"))
        ext.include_dirs = compiler_cache.steady(ext.include_dirs, self.torches)
        with self._apart(name):
            super().build_extension(ext)

    def run(self) -> None:
        if os.environ.get("NSA_BUILD") == "0":  # the Makefile installs the links first, and builds in place afterwards
            return
        for left in Path(self.build_lib, "nsa_torch").rglob("*.so"):  # by a build for other versions of torch
            left.unlink()
        (layers.ROOT / "nsa_torch" / "lib").mkdir(exist_ok=True)
        package = self._package()
        with unlisted(package), shown():
            super().run()
        if write_info(package, self.info) and self.inplace and SETTINGS.exists():
            SETTINGS.touch()  # the Makefile then builds again for the torches whose libraries are out of date
        if not self.inplace:
            for source, target in INSTALLED:
                (package / target).mkdir(parents=True, exist_ok=True)
                shutil.copy(layers.ROOT / source, package / target)

    def _package(self) -> Path:
        return Path(self.get_ext_fullpath(f"{layers.FOLDER}.{layers.KERNELS}")).parent.parent

    @contextmanager
    def _apart(self, name: str) -> Iterator[None]:
        """Objects in a folder of their own: a source is compiled for several versions of torch.

        The libraries know no Python: neither its headers nor its flags, unless the environment has flags of its own.
        """
        before = self.build_temp, self.compiler.include_dirs, self.compiler.compiler_so
        self.build_temp = f"{self.build_temp}-{name}"
        if name != "_C":
            print(f"nsa_torch: compiling {name}.so", flush=True)
            self.compiler.set_include_dirs([])
            if not {"CFLAGS", "CPPFLAGS"} & os.environ.keys():
                self.compiler.set_executable("compiler_so", [before[2][0], *layers.BASE_FLAGS])
        yield
        self.build_temp, self.compiler.include_dirs, self.compiler.compiler_so = before


@contextmanager
def unlisted(package: Path) -> Iterator[None]:
    """No build_info.json while libraries change: after a build that breaks off, new kernels may lie beside old ops."""
    path = package / "build_info.json"
    before = path.read_text() if path.exists() else None
    path.unlink(missing_ok=True)
    yield
    if before is not None:
        path.write_text(before)


def write_info(package: Path, info: dict[str, Any]) -> list[str]:
    """build_info.json. In a checkout, libraries that an earlier build made from the same sources stay listed.

    Returns:
        The minor versions of torch that are listed no more.
    """
    path = package / "build_info.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    same = all(before.get(key) == info[key] for key in ("cuda", "architectures", "sources"))
    kept = {
        minor: version
        for minor, version in (before.get("torches", {}) if same else {}).items()
        if (package / "lib" / f"libnsa_torch_{minor.replace('.', '_')}.so").exists()
    }
    held = dict(sorted((kept | info["torches"]).items()))
    path.write_text(json.dumps(info | {"torches": held}) + "\n")
    return sorted(set(before.get("torches", {})) - set(held))
