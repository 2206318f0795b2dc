"""Writes the README's tables of what runs where: from what tests have shown, and what the plans say of other GPUs.

    python tools/support.py            # writes the tables
    python tools/support.py --check    # fails when they are not what they should be

What has been shown stands in benchmarks/results/suite: a JSON for each GPU's suite (tools/gpu_suite.py --out), and one
for each run of tests without a GPU (tools/support.py --record REPORT.xml, of `pytest --junitxml REPORT.xml`). Needs a
build with CUDA, but no GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
RESULTS = ROOT / "benchmarks" / "results" / "suite"
README = ROOT / "README.md"
BEGIN, END = "<!-- support: by tools/support.py -->\n", "<!-- end of support -->"
Capability = tuple[int, int]

GPUS: dict[str, tuple[Capability, ...]] = {
    "A100 (8.0)": ((8, 0),),
    "RTX 30 and 40, A10, L4, L40 (8.6, 8.9)": ((8, 6), (8, 9)),
    "H100, H200 (9.0)": ((9, 0),),
    "B200, B300 (10.0, 10.3)": ((10, 0), (10, 3)),
    "RTX 50, RTX PRO (12.0)": ((12, 0),),
}
NAMES = {"H100": (9, 0), "H200": (9, 0)}  # in the names of GPUs that a suite ran on
DTYPES = {"float16, bfloat16": "bfloat16", "float32": "float32"}
DIMS = ((64, 64), (128, 128), (192, 128), (256, 256))
MACHINES = {"plain": "plain", "sm80": "portable", "sm90": "Hopper"}


def shown() -> list[dict[str, Any]]:
    """Every run of tests, those without failures."""
    runs = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    return [run for run in runs if run["failed"] == 0]


def tested_capabilities() -> set[Capability]:
    return {capability for run in shown() for name, capability in NAMES.items() if name in run.get("gpu", "")}


def kernels_of(capability: Capability, dtype: str, dims: tuple[int, int]) -> str:
    """The sets of kernels that a forward and a backward of nsa_attention take, with the paper's groups and blocks."""
    import nsa_torch

    names: list[str] = []
    for backward in (False, True):
        sizes = {"num_heads": 64, "num_kv_heads": 4, "num_keys": 8192, "head_dim": dims[0], "v_head_dim": dims[1]}
        asked: dict[str, Any] = {"device": "cuda", "dtype": dtype, "capability": capability, "backward": backward}
        names += nsa_torch.which_kernel("nsa_attention", **asked, **sizes).kernels
    found = {name.rpartition("_")[2] for name in names} & MACHINES.keys()
    return " and ".join(word for machine, word in MACHINES.items() if machine in found)


def gpu_rows() -> Iterator[str]:
    yield "| GPU (compute capability) | elements | " + " | ".join(f"Dk {k}, Dv {v}" for k, v in DIMS) + " |"
    yield "|---|---|" + "---|" * len(DIMS)
    tested = tested_capabilities()
    rows: dict[tuple[str, ...], list[str]] = {}  # families that share all cells share a row
    for name, dtype in DTYPES.items():
        for family, capabilities in GPUS.items():
            state = "tested" if set(capabilities) <= tested else "not tried"
            kinds = {tuple(kernels_of(each, dtype, dims) for dims in DIMS) for each in capabilities}
            if len(kinds) != 1:
                raise SystemExit(f"support: the GPUs of {family} differ: {kinds}")
            rows.setdefault((name, *(f"{kind}: {state}" for kind in kinds.pop())), []).append(family)
    for cells, families in rows.items():
        yield f"| {'; '.join(families)} | " + " | ".join(cells) + " |"
    yield "| any | float64 | " + " | ".join(["refused"] * len(DIMS)) + " |"
    yield "| none: the CPU | all four | " + " | ".join(["tested"] * len(DIMS)) + " |"


def torch_rows() -> Iterator[str]:
    from torches import SUPPORTED, minor_of

    yield "| torch | what has run |"
    yield "|---|---|"
    for minor in SUPPORTED:
        runs = [run for run in shown() if minor_of(run["torch"]) == minor]
        of = [f"{run['passed']:,} tests on {run.get('gpu', 'a CPU')}" for run in runs]
        yield f"| {minor} | {'; '.join(of) or 'nothing'} |"


def tables() -> str:
    return "\n".join([*gpu_rows(), "", *torch_rows()]) + "\n"


def record(report: Path) -> None:
    """A run of tests without a GPU, by the torch that is here."""
    import torch
    from gpu_suite import commit, summarize

    files, failures, _ = summarize([ElementTree.parse(report).getroot()])
    counts = {name: sum(file[name] for file in files.values()) for name in ("passed", "failed", "skipped")}
    result = {"torch": torch.__version__, "commit": commit(), **counts, "failures": failures}
    minor = "-".join(torch.__version__.split(".")[:2])
    (RESULTS / f"cpu-torch-{minor}.json").write_text(json.dumps(result, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, fail when the tables differ")
    parser.add_argument("--record", type=Path, help="a JUnit report of tests that ran without a GPU")
    options = parser.parse_args()
    if options.record:
        record(options.record)
    text = README.read_text()
    before, _, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    expected = before + BEGIN + tables() + end + after
    if options.check:
        if text != expected:
            print("the README's tables of what runs where are not up to date: run python tools/support.py")
        return int(text != expected)
    README.write_text(expected)
    return 0


if __name__ == "__main__":
    sys.exit(main())
