"""Builds the library with the address and the undefined-behaviour sanitizer, and runs the tests of the ops on it.

python tools/sanitize.py --build FOLDER        # a second copy of the package, beside the ordinary build
python tools/sanitize.py FOLDER [PYTEST ARGS]  # all tests in SUITE, or what the arguments name
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# -fno-sanitize=vptr: torch's objects come without what that check needs.
FLAGS = "-fsanitize=address,undefined -fno-sanitize=vptr -fno-omit-frame-pointer -fno-sanitize-recover=all -g1 -O1"
SUITE = [
    "test_compression.py",
    "test_compressed_attention.py",
    "test_layouts.py",
    "test_nsa_attention.py",
    "test_packed.py",
    "test_select_blocks.py",
    "test_selected_attention.py",
    "test_window_attention.py",
]


def build(folder: Path) -> int:
    environment = os.environ | {"CFLAGS": FLAGS, "CXXFLAGS": FLAGS, "LDFLAGS": FLAGS, "NSA_CUDA": "0"}
    command = [sys.executable, "setup.py", "--quiet", "build", "--build-base", str(folder / "base")]
    return subprocess.run([*command, "--build-lib", str(folder)], cwd=ROOT, env=environment, check=False).returncode


def runtime(name: str) -> str:
    """Path of one of the compiler's run-time libraries."""
    compiler = os.environ.get("CXX", "c++").split()[-1]
    found = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return str(Path(found.stdout.strip()).resolve())


def test(folder: Path, arguments: list[str]) -> int:
    environment = os.environ | {
        "PYTHONPATH": str(folder),
        # The interpreter is not instrumented: the run-time library must come first, and finds libstdc++ when it starts.
        "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libstdc++.so')}",
        "ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0:strict_string_checks=1",  # Python keeps much to the end
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    named = [argument for argument in arguments if ".py" in argument]
    tests = [] if named else [str(ROOT / "tests" / name) for name in SUITE if (ROOT / "tests" / name).exists()]
    arguments = [str(ROOT / argument) if argument in named else argument for argument in arguments]
    check = "import nsa_torch; print('testing', nsa_torch.__file__)"
    subprocess.run([sys.executable, "-c", check], cwd=folder, env=environment, check=True)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *tests, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, check=False).returncode


def main() -> int:
    arguments = sys.argv[1:]
    if arguments[:1] == ["--build"]:
        return build(Path(arguments[1]).resolve())
    return test(Path(arguments[0]).resolve(), arguments[1:])


if __name__ == "__main__":
    sys.exit(main())
