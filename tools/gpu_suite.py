"""Runs the tests with CUDA from a checkout with a built library; prints a table of the files, and writes JSON.

    python tools/gpu_suite.py --out suite.json
    python tools/gpu_suite.py --jobs 8                      # shared out to eight processes
    python tools/gpu_suite.py tests/test_packed.py -- --maxfail=5

Tests that need pip, a compiler or long training on a CPU are left out: they run in `make test`.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import json
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
NO_TESTS = 5  # pytest's exit status for a file in which -k leaves nothing
LEFT_OUT = ("test_packaging.py", "test_cpp_example.py", "test_example_train.py")


def run_share(paths: list[str], more: list[str], share: int, shares: int) -> tuple[int, ElementTree.Element, str]:
    """Exit status, report and output of one process of pytest, which runs every `shares`-th test."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        ignored = [f"--ignore=tests/{name}" for name in LEFT_OUT]
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "tools.share_tests",
            "-k",
            "cuda",
            *ignored,
            f"--junit-xml={report}",
            *more,
            *paths,
        ]
        threads = max(1, (os.cpu_count() or 1) // shares)  # of the references
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)}
        environment |= {"NSA_TEST_SHARE": f"{share}/{shares}"}
        result = subprocess.run(
            command, cwd=ROOT, env=environment, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        if report.exists():
            return result.returncode, ElementTree.parse(report).getroot(), result.stdout
        died = ElementTree.Element("testcase", classname=" ".join(paths), name="the process")
        ElementTree.SubElement(died, "failure", message=f"ended with status {result.returncode}, without a report")
        nothing = ElementTree.Element("report")
        nothing.append(died)
        return result.returncode, nothing, result.stdout


def run_tests(paths: list[str], more: list[str], jobs: int) -> tuple[int, list[ElementTree.Element]]:
    """All tests, by so many processes."""
    status, reports = 0, []
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        for future in concurrent.futures.as_completed(
            [pool.submit(run_share, paths, more, share, jobs) for share in range(jobs)]
        ):
            code, report, output = future.result()
            print(output if code not in (0, NO_TESTS) else output.strip().rpartition("\n")[2], flush=True)
            status = status if code in (0, NO_TESTS) else code
            reports.append(report)
    return status, reports


def summarize(
    roots: list[ElementTree.Element],
) -> tuple[dict[str, collections.Counter[str]], list[str], collections.Counter[str]]:
    """Counts and seconds of each file; a line for each failure; how many were skipped for each reason."""
    files: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    failures = []
    skips: collections.Counter[str] = collections.Counter()
    for case in (case for root in roots for case in root.iter("testcase")):
        name = case.get("classname", "").rpartition(".")[2]
        problem = next((child for child in case if child.tag in ("failure", "error")), None)
        skipped = case.find("skipped")
        files[name]["failed" if problem is not None else "passed" if skipped is None else "skipped"] += 1
        if skipped is not None:
            skips[skipped.get("message") or "no reason given"] += 1
        files[name]["milliseconds"] += round(1000 * float(case.get("time", 0)))
        if problem is not None:
            failures.append(f"{name}::{case.get('name')}: {(problem.get('message') or '').splitlines()[0][:200]}")
    return files, failures, skips


def compared(roots: list[ElementTree.Element]) -> dict[str, list[str]]:
    """On which device and in which dtype nsa_attention was held to the reference, and at which "Dk Dv"."""
    found: dict[str, set[str]] = collections.defaultdict(set)
    for case in (case for root in roots for case in root.iter("testcase")):
        if case.find("failure") is None and case.find("error") is None:
            for noted in case.iterfind("properties/property[@name='compared']"):
                op, device, dtype, dims = noted.get("value", "").split(maxsplit=3)
                if op == "nsa_attention":
                    found[f"{device} {dtype}"].add(dims)
    return {where: sorted(dims, key=lambda pair: [int(dim) for dim in pair.split()]) for where, dims in found.items()}


def commit() -> str:
    result = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return result.stdout.strip() or "unknown"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", default=["tests"])
    parser.add_argument("--out", type=Path, help="where to write JSON")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--commit", help="what is tested, where the checkout is not under git")
    own = sys.argv[1:]
    more = own[own.index("--") + 1 :] if "--" in own else []
    options = parser.parse_args(own[: own.index("--")] if "--" in own else own)
    if not torch.cuda.is_available():
        print("gpu_suite: no GPU is visible to torch", file=sys.stderr)
        return 2
    started = time.perf_counter()
    status, reports = run_tests(options.paths, more, options.jobs)
    files, failures, skips = summarize(reports)
    total: collections.Counter[str] = collections.Counter()
    print(f"\n{'file':32} {'passed':>7} {'failed':>7} {'skipped':>8} {'seconds':>8}")
    for name, counts in [*sorted(files.items()), ("all", None)]:
        counts = total if counts is None else counts
        if counts is not total:
            total += counts
        seconds = counts["milliseconds"] / 1000
        print(f"{name:32} {counts['passed']:7} {counts['failed']:7} {counts['skipped']:8} {seconds:8.1f}")
    for reason, count in skips.items():
        print(f"skipped {count}: {reason}")
    if options.out is not None:
        result: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
        result |= {"capability": torch.cuda.get_device_capability(), "cuda": torch.version.cuda}
        result |= {"commit": options.commit or commit()}
        result |= {"passed": total["passed"], "failed": total["failed"], "skipped": total["skipped"]}
        result |= {"seconds": round(time.perf_counter() - started, 1), "failures": failures, "skips": skips}
        result |= {"compared": compared(reports)}
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
