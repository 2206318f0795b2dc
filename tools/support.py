"""Writes the README's tables of what runs where: from what tests have shown, and what the plans say of other GPUs.

    python tools/support.py            # writes the tables
    python tools/support.py --check    # fails when they are not what they should be

What has been shown stands in benchmarks/results/suite: a JSON for each GPU's suite (tools/gpu_suite.py --out), and one
for each torch whose tests ran without a GPU (tools/support.py --record REPORT.xml, of `pytest --junitxml REPORT.xml`,
which .ci/run leaves in build/). A cell names the versions of torch under which nsa_attention, its outputs and
gradients, was held to the reference at just these head dimensions. Needs a build with CUDA, but no GPU.
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
from gpu_suite import commit, compared, summarize  # noqa: E402
from torches import SUPPORTED, minor_of  # noqa: E402

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
DTYPES = {"float16, bfloat16": ("float16", "bfloat16"), "float32": ("float32",), "float64": ("float64",)}
DIMS = ((64, 64), (128, 128), (192, 128), (256, 256))
MACHINES = {"plain": "plain", "sm80": "portable", "sm90": "Hopper"}
CPU = "none: the CPU"


def shown() -> list[dict[str, Any]]:
    """Every run of tests, those without failures."""
    runs = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    return [run for run in runs if run["failed"] == 0]


def tested(device: str, capabilities: tuple[Capability, ...], dtypes: tuple[str, ...], dims: tuple[int, int]) -> str:
    """The versions of torch under which the whole was compared with the reference: in all dtypes, on all these GPUs."""

    def minors(capability: Capability | None) -> set[str]:
        runs = [run for run in shown() if capability is None or run.get("capability") == list(capability)]
        held = [(run["torch"], run.get("compared", {})) for run in runs]
        wanted = f"{dims[0]} {dims[1]}"
        return {
            minor_of(torch)
            for torch, where in held
            if all(wanted in where.get(f"{device} {dtype}", ()) for dtype in dtypes)
        }

    found = set.intersection(*(minors(capability) for capability in capabilities or (None,)))
    return "torch " + ", ".join(sorted(found, key=SUPPORTED.index)) if found else "not tried"


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


def cell(family: str, dtypes: tuple[str, ...], dims: tuple[int, int]) -> str:
    if family == CPU:
        return tested("cpu", (), dtypes, dims)
    try:
        kinds = {kernels_of(capability, dtype, dims) for capability in GPUS[family] for dtype in dtypes}
    except ValueError:  # what the op raises for this dtype
        return "refused"
    if len(kinds) != 1:
        raise SystemExit(f"support: {family} with {', '.join(dtypes)} takes several sets of kernels: {kinds}")
    return f"{kinds.pop()}: {tested('cuda', GPUS[family], dtypes, dims)}"


def device_rows() -> Iterator[str]:
    yield "| GPU (compute capability) | elements | " + " | ".join(f"Dk {k}, Dv {v}" for k, v in DIMS) + " |"
    yield "|---|---|" + "---|" * len(DIMS)
    alike: dict[tuple[str, tuple[str, ...]], list[str]] = {}  # families that share all cells share a row
    for name, dtypes in DTYPES.items():
        for family in (*GPUS, CPU):
            row = tuple(cell(family, dtypes, dims) for dims in DIMS)
            alike.setdefault((name, row), []).append(family)
    rows: dict[tuple[str, tuple[str, ...]], list[str]] = {}  # and so do elements of the same families
    for (name, row), families in alike.items():
        rows.setdefault(("any GPU" if families == [*GPUS] else "; ".join(families), row), []).append(name)
    for (families, row), names in sorted(rows.items(), key=lambda item: item[0][0] == CPU):
        yield f"| {families} | {', '.join(names)} | " + " | ".join(row) + " |"


def torch_rows() -> Iterator[str]:
    yield "| torch | what has run |"
    yield "|---|---|"
    for minor in SUPPORTED:
        runs = [run for run in shown() if minor_of(run["torch"]) == minor]
        of = [f"{run['passed']:,} tests on {run.get('gpu', 'a CPU')}" for run in runs]
        yield f"| {minor} | {'; '.join(of) or 'nothing'} |"


def tables() -> str:
    return "\n".join([*device_rows(), "", *torch_rows()]) + "\n"


def record(report: Path) -> None:
    """A run of tests without a GPU, under the torch that the report names."""
    root = ElementTree.parse(report).getroot()
    files, failures, _ = summarize([root])
    counts = {name: sum(file[name] for file in files.values()) for name in ("passed", "failed", "skipped")}
    version = next(each.get("value", "") for each in root.iter("property") if each.get("name") == "torch")
    result = {"torch": version, "commit": commit(), **counts, "failures": failures, "compared": compared([root])}
    (RESULTS / f"cpu-torch-{minor_of(version).replace('.', '-')}.json").write_text(json.dumps(result, indent=1) + "\n")


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
