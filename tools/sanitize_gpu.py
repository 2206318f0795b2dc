"""compute-sanitizer over tools/small_run.py: memcheck, racecheck, initcheck and synccheck. Fails if one finds anything.

python tools/sanitize_gpu.py                   # all four
python tools/sanitize_gpu.py memcheck          # one of them
"""

from __future__ import annotations

import collections
import os
import re
import subprocess
import sys
import time
from pathlib import Path

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
ROOT = Path(__file__).resolve().parents[1]


def check(tool: str) -> tuple[bool, str]:
    """Whether the tool found nothing, and its last line. PyTorch's allocator would hide what lies beyond a tensor."""
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--print-limit", "10000"]
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
    if result.returncode != 0:
        print(*distinct_findings(output), result.stdout[-2000:], result.stderr[-2000:], sep="\n", flush=True)
    return result.returncode == 0, summary[-1] if summary else f"exit status {result.returncode}"


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
