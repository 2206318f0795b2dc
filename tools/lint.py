"""Every check of `make lint`, or the ones named: `python tools/lint.py clang-tidy mypy`.

All of them run, whatever fails, and the last lines say which did. `--fix` lets those that can repair
what they find do so.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
TIDY_CACHE = ROOT / "build" / "clang-tidy"
CPP_SUFFIXES = (".cpp", ".h", ".cu", ".cuh")
TEXT_SUFFIXES = (*CPP_SUFFIXES, ".py", ".pyi", ".md", ".toml", ".yaml", ".cmake", ".txt", ".cfg")
OWN_INCLUDE = re.compile(r'^\s*#\s*include\s*"([^"]+)"', re.MULTILINE)


def files(*suffixes: str) -> list[Path]:
    """The repository's files with these suffixes: tracked ones, and new ones that git would take."""
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listing, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    paths = (ROOT / name for name in sorted(set(names.split("\0"))) if name.endswith(suffixes))
    return [path for path in paths if path.is_file()]


def run(*command: str | Path) -> bool:
    return subprocess.run([str(part) for part in command], cwd=ROOT, check=False).returncode == 0


def output(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)


# --- C++ ---


def clang_format(fix: bool) -> bool:
    """Layout of C++ and CUDA."""
    tool, sources = str(BIN / "clang-format"), [str(path.relative_to(ROOT)) for path in files(*CPP_SUFFIXES)]
    if fix:
        return run(tool, "-i", *sources)
    result = output(tool, "--dry-run", "-Werror", *sources)
    places = re.findall(r"^(\S+?):(\d+):\d+: error: code should be", result.stderr, flags=re.MULTILINE)
    for source in dict.fromkeys(source for source, _ in places):
        lines = dict.fromkeys(line for other, line in places if other == source)
        print(f"{source}: lines {', '.join(lines)}: run `make format`")
    if result.returncode != 0 and not places:
        print(result.stderr, end="")
    return result.returncode == 0


def included(source: Path, seen: set[Path]) -> set[Path]:
    """The source and every header of this project that it includes, directly or not."""
    if source not in seen:
        seen.add(source)
        for name in OWN_INCLUDE.findall(source.read_text()):
            for folder in (ROOT / "csrc", source.parent):
                if (folder / name).is_file():
                    included((folder / name).resolve(), seen)
                    break
    return seen


def tidy_key(entry: dict[str, object], version: str) -> str:
    """A name for everything that clang-tidy's verdict on one source depends on."""
    digest = hashlib.sha256()
    for part in (version, (ROOT / ".clang-tidy").read_text(), json.dumps(entry["arguments"])):
        digest.update(part.encode())
    for path in sorted(included(ROOT / str(entry["file"]), set())):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def clang_tidy(fix: bool) -> bool:
    """Likely bugs and naming in host code; a source that passed is not looked at again until it changes."""
    commands = output(sys.executable, "tools/compile_commands.py")
    if commands.returncode != 0:
        print(commands.stdout, commands.stderr, sep="")
        return False
    database = ROOT / "build" / "compile_commands.json"
    tool = [str(BIN / "clang-tidy"), "-p", str(database.parent), "--quiet"]
    version = output(tool[0], "--version").stdout
    TIDY_CACHE.mkdir(parents=True, exist_ok=True)

    def check(entry: dict[str, object]) -> bool:
        passed = TIDY_CACHE / tidy_key(entry, version)
        if passed.exists():
            return True
        start = time.monotonic()
        result = output(*tool, *(["--fix"] if fix else []), str(entry["file"]))
        print(f"  {entry['file']}  {time.monotonic() - start:.0f} s\n{result.stdout}", end="", flush=True)
        if result.returncode != 0 and not result.stdout.strip():
            print(result.stderr)
        if result.returncode == 0:
            passed.touch()
        return result.returncode == 0

    entries = json.loads(database.read_text())
    with ThreadPoolExecutor(1 if fix else int(os.environ.get("MAX_JOBS", "2"))) as pool:
        return all(list(pool.map(check, entries)))


# --- Python ---


def ruff_check(fix: bool) -> bool:
    """Likely bugs and import order in Python."""
    return run(BIN / "ruff", "check", *(["--fix"] if fix else []), ".")


def ruff_format(fix: bool) -> bool:
    """Layout of Python."""
    return run(BIN / "ruff", "format", *([] if fix else ["--check"]), ".")


def mypy(fix: bool) -> bool:
    """Types of the package."""
    return run(sys.executable, "-m", "mypy", "nsa_torch")


# --- everything else ---


def pre_commit(fix: bool) -> bool:
    """The pre-commit configuration is one that pre-commit accepts."""
    return run(sys.executable, "-m", "pre_commit", "validate-config", ".pre-commit-config.yaml")


def docs(fix: bool) -> bool:
    """docs/api says what the docstrings say."""
    return run(sys.executable, "docs/generate_api.py", *([] if fix else ["--check"]))


def tables(fix: bool) -> bool:
    """Tables of figures say what was measured."""
    return run(sys.executable, "benchmarks/table.py", "--write" if fix else "--check")


def text_findings(path: Path) -> Iterator[str]:
    content = path.read_text()
    if content and not content.endswith("\n"):
        yield "no newline at the end"
    if content.endswith("\n\n"):
        yield "empty lines at the end"
    for number, line in enumerate(content.split("\n"), 1):
        if line != line.rstrip():
            yield f"{number}: white space at the end of the line"
        if "\t" in line:
            yield f"{number}: a tab"
        if line.startswith(("<<<<<<< ", ">>>>>>> ")):
            yield f"{number}: a merge conflict"


def text(fix: bool) -> bool:
    """White space, and what merges leave behind."""
    findings = [
        f"{path.relative_to(ROOT)}: {finding}" for path in files(*TEXT_SUFFIXES) for finding in text_findings(path)
    ]
    print(*findings, sep="\n", end="\n" if findings else "")
    return not findings


CHECKS: dict[str, Callable[[bool], bool]] = {
    "text": text,
    "ruff-check": ruff_check,
    "ruff-format": ruff_format,
    "clang-format": clang_format,
    "docs": docs,
    "tables": tables,
    "pre-commit": pre_commit,
    "mypy": mypy,
    "clang-tidy": clang_tidy,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checks", nargs="*", metavar="CHECK", help=", ".join(CHECKS))
    parser.add_argument("--fix", action="store_true", help="repair what can be repaired")
    options = parser.parse_args()
    unknown = set(options.checks) - set(CHECKS)
    if unknown:
        parser.error(f"no such check: {', '.join(sorted(unknown))}; there are {', '.join(CHECKS)}")
    failed = []
    for name in options.checks or CHECKS:
        start = time.monotonic()
        print(f"{name}: {CHECKS[name].__doc__}", flush=True)
        if not CHECKS[name](options.fix):
            failed.append(name)
        print(f"{name}: {'FAILED' if name in failed else 'ok'}, {time.monotonic() - start:.1f} s", flush=True)
    print(f"lint: {'failed: ' + ', '.join(failed) if failed else 'all checks passed'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
