"""compute-sanitizer over tools/small_run.py: memcheck, racecheck, initcheck and synccheck. Fails if one finds anything
but what KNOWN explains.

python tools/sanitize_gpu.py                   # all four
python tools/sanitize_gpu.py memcheck          # one of them
"""

from __future__ import annotations

import collections
import functools
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
ROOT = Path(__file__).resolve().parents[1]


class Known(NamedTuple):
    """Reports of racecheck that are no race, between such an instruction of a kernel that writes and one that reads."""

    kernel: str
    write: str
    read: str
    reason: str


KNOWN = [
    Known(
        r"_ZN3nsa\d+selected_(forward|query_handed|backward_query)_sm90I",
        r"STS\.128 \[R\d+(\+0x[0-9a-f]+)?\], RZ$",
        r"LDSM\.",
        "rows past the last key become zeros in a buffer that warps read a round before: one lane each gave it back, "
        "after __syncwarp, which the tool does not follow (docs/hopper_kernels.md)",
    )
]


def check(tool: str) -> tuple[bool, str]:
    """Whether the tool found nothing, and its last line. PyTorch's allocator would hide what lies beyond a tensor."""
    command = [
        "compute-sanitizer",
        "--demangle",
        "no",
        "--tool",
        tool,
        "--error-exitcode",
        "9",
        "--print-limit",
        "10000",
    ]
    if tool != "initcheck":  # which must see who else writes
        command += ["--kernel-name", "kns=nsa"]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": str(ROOT)}
    if tool == "initcheck":  # does not see what the copy engine writes
        environment["NSA_TORCH_KERNELS"] = "portable"
    options = ["--no-16-bit-products"] if tool in ("racecheck", "initcheck") else []
    result = subprocess.run(
        [*command, sys.executable, str(ROOT / "tools" / "small_run.py"), *options],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    output = result.stdout + result.stderr
    summary = re.findall(r"^=+ (.*(?:SUMMARY|ERROR).*)$", output, re.MULTILINE)
    if result.returncode == 9 and tool == "racecheck":
        known = explained_races(output)
        if known > 0 and f"RACECHECK SUMMARY: {known} hazards displayed ({known} errors, 0 warnings)" in output:
            return True, f"{summary[-1]}, all of them known"
    if result.returncode != 0:
        print(*distinct_findings(output), result.stdout[-2000:], result.stderr[-2000:], sep="\n", flush=True)
    return result.returncode == 0, summary[-1] if summary else f"exit status {result.returncode}"


def explained_races(output: str) -> int:
    """How many reports of racecheck are among KNOWN."""
    accesses = re.compile(r"(Write|Read) access at (\w+)(?:\([^)]*\))?\+0x([0-9a-f]+)")
    reports = re.split(r"^=+ (?=\w+: Race reported)", output, flags=re.MULTILINE)[1:]
    count = 0
    for report in reports:
        found = accesses.findall(report)
        for known in KNOWN:
            patterns = {"Write": known.write, "Read": known.read}
            count += {kind for kind, _, _ in found} == {"Write", "Read"} and all(
                re.match(known.kernel, kernel) and re.match(patterns[kind], instruction(kernel, int(at, 16)))
                for kind, kernel, at in found
            )
    return count


@functools.cache
def instructions(kernel: str) -> dict[int, str]:
    """A kernel's machine code by place, from the library; empty where cuobjdump is missing."""
    cuobjdump = shutil.which("cuobjdump") or "/usr/local/cuda/bin/cuobjdump"
    library = ROOT / "nsa_torch" / "libnsa_torch.so"
    if not Path(cuobjdump).exists():
        return {}
    command = [cuobjdump, "-arch", "sm_90a", "-sass", "-fun", kernel, str(library)]
    code = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?) *;", code, re.MULTILINE)
    return {int(at, 16): line for at, line in lines}


def instruction(kernel: str, at: int) -> str:
    return instructions(kernel).get(at, "")


def distinct_findings(output: str) -> list[str]:
    """The first of each lot of lines that differ in places and numbers alone, and how many there are."""
    lines = [line for line in output.splitlines() if line.startswith("=====") and "Host Frame" not in line]
    kinds = [re.sub(r"\+0x[0-9a-f]+|0x[0-9a-f]+|\(\d+,\d+,\d+\)|\[\d+ hazards\]", "", line) for line in lines]
    first = dict(zip(reversed(kinds), reversed(lines), strict=True))
    return [f"{count:5} {first[kind]}" for kind, count in collections.Counter(kinds).items()]


def main() -> int:
    failed = 0
    for tool in sys.argv[1:] or TOOLS:
        started = time.perf_counter()
        clean, summary = check(tool)
        failed += not clean
        print(
            f"{tool:10} {'clean' if clean else 'FAILED':7} {time.perf_counter() - started:6.1f} s  {summary}",
            flush=True,
        )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
