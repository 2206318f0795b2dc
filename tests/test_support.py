"""The README's table of what runs where says what runs of tests have shown, and nothing else."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from nsa_torch import _C

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import support

HALVES = ("float16", "bfloat16")
HOPPER = "H100, H200 (9.0)"
REPORT = """<testsuites><testsuite>
<testcase classname="tests.test_a" name="one" time="1"><properties>
<property name="torch" value="2.13.0+cu130" />
<property name="compared" value="nsa_attention cpu float16 64 64" />
<property name="compared" value="window_attention cpu float16 128 128" />
</properties></testcase>
<testcase classname="tests.test_a" name="two" time="1"><properties>
<property name="torch" value="2.13.0+cu130" />
<property name="compared" value="nsa_attention cpu float16 192 128" />
</properties>{failure}</testcase>
</testsuite></testsuites>
"""


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(support, "RESULTS", tmp_path)
    return tmp_path


def run(folder: Path, name: str, version: str, compared: dict[str, list[str]], **more: Any) -> None:
    run = {"torch": version, "commit": "a", "passed": 1, "failed": 0, "compared": compared} | more
    (folder / f"{name}.json").write_text(json.dumps(run))


def test_a_cell_names_the_versions_of_torch_that_were_tested(results: Path) -> None:
    both = {f"cpu {dtype}": ["64 64", "192 128"] for dtype in HALVES}
    run(results, "a", "2.15.0+cu132", both)
    run(results, "b", "2.11.0", both | {"cpu bfloat16": ["64 64"]})
    run(results, "c", "2.12.0", both, failed=1)
    run(results, "d", "2.13.0", {})
    assert support.cell(support.CPU, HALVES, (64, 64)) == "torch 2.11, 2.15"
    assert support.cell(support.CPU, HALVES, (192, 128)) == "torch 2.15"
    assert support.cell(support.CPU, HALVES, (128, 128)) == "not tried"
    assert support.cell(support.CPU, ("float64",), (64, 64)) == "not tried"


@pytest.mark.skipif(_C.build_info()["cuda"] is None, reason="a build with CUDA says what the plans say")
def test_a_gpu_counts_for_its_own_family(results: Path) -> None:
    run(results, "a", "2.11.0", {f"cuda {dtype}": ["64 64"] for dtype in HALVES}, gpu="some", capability=[9, 0])
    run(results, "b", "2.12.0", {f"cuda {dtype}": ["64 64"] for dtype in HALVES}, gpu="some", capability=[8, 6])
    assert support.cell(HOPPER, HALVES, (64, 64)) == "Hopper: torch 2.11"
    assert support.cell(HOPPER, HALVES, (256, 256)) == "portable: not tried"
    assert support.cell("A100 (8.0)", HALVES, (64, 64)) == "portable: not tried"
    smaller = next(family for family in support.GPUS if "8.6" in family)  # 8.9 as well
    assert support.cell(smaller, HALVES, (64, 64)) == "portable: not tried"
    assert support.cell(HOPPER, ("float64",), (64, 64)) == "refused"
    assert "| any GPU | float64 | refused |" in support.tables()


@pytest.mark.parametrize("failure", ["", "<failure message='no' />"])
def test_a_report_is_recorded(failure: str, results: Path) -> None:
    report = results / "report.xml"
    report.write_text(REPORT.format(failure=failure))
    support.record(report)
    recorded = json.loads((results / "cpu-torch-2-13.json").read_text())
    dims = ["64 64"] if failure else ["64 64", "192 128"]
    assert (recorded["torch"], recorded["compared"]) == ("2.13.0+cu130", {"cpu float16": dims})
    assert (recorded["passed"], recorded["failed"]) == ((1, 1) if failure else (2, 0))
    assert support.cell(support.CPU, ("float16",), (64, 64)) == ("not tried" if failure else "torch 2.13")
