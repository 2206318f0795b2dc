"""Writes compile_commands.json for the host code, from the extensions that setup.py declares.

Nothing is compiled, so that clang-tidy and editors work in a checkout that was never built.
"""

from __future__ import annotations

import json
import os
import sysconfig
from distutils.core import run_setup
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from setuptools import Extension

ROOT = Path(__file__).resolve().parent.parent
# Those of GCC's that clang does not take, or has no headers for.
DROPPED = ("-fopenmp", "-Wno-psabi", "-fno-gnu-unique", "-fvar-tracking", "-march=", "-flto")


def extensions() -> list[Extension]:
    """The extension modules of setup.py, for a build without CUDA."""
    os.environ["NSA_CUDA"] = "0"
    os.chdir(ROOT)
    distribution = run_setup("setup.py", ["--quiet"], stop_after="init")
    return list(distribution.ext_modules or [])


def arguments(extension: Extension) -> list[str]:
    """The compiler's command line for a C++ source of the extension, less input and output."""
    flags = extension.extra_compile_args
    if isinstance(flags, dict):
        flags = flags.get("cxx", [])
    # torch's own headers are not this project's business: as system headers they cause no warnings.
    includes = [str(path) for path in extension.include_dirs]
    own = [path for path in includes if "site-packages" not in path]
    foreign = [path for path in includes if "site-packages" in path]
    command = ["c++", *(flag for flag in flags if not flag.startswith(DROPPED))]
    command += [f"-D{name}" if value is None else f"-D{name}={value}" for name, value in extension.define_macros]
    command.append("-DTORCH_EXTENSION_NAME=" + extension.name.rpartition(".")[2])
    command += [f"-I{path}" for path in own]
    for path in (*foreign, sysconfig.get_paths()["include"]):
        command += ["-isystem", path]
    return command


def compile_commands() -> list[dict[str, object]]:
    """One entry for each host source, in the format of clang's compilation database."""
    return [
        {"directory": str(ROOT), "file": source, "arguments": [*arguments(extension), "-c", source]}
        for extension in extensions()
        for source in extension.sources
        if source.endswith(".cpp")
    ]


def main() -> None:
    target = ROOT / "build" / "compile_commands.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(compile_commands(), indent=1) + "\n")
    print(target)


if __name__ == "__main__":
    main()
