"""Two libraries measured in turns: what the rows say, and that both processes run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import compare_libraries
import nsa_torch
from library_worker import digest
from nsa_torch import _library

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(nsa_torch.__file__).parent
SMALL = ["--device", "cpu", "--dtype", "float32", "--heads", "4", "--groups", "2", "--dims", "16", "--seconds", "0.01"]


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "benchmarks/compare_libraries.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True, timeout=300)


def row(**changes: Any) -> dict[str, Any]:
    sides = {"before_ms": 2.0, "after_ms": 2.0, "before_host_us": 300.0, "after_host_us": 300.0}
    sizes = {"seqlen": 1024, "group": 4, "dim": 64, "direction": "forward"}
    return sizes | sides | {"ratio": 1.0, "spread": 0.001, "same_bits": True} | changes


def test_a_library_beside_itself(tmp_path: Path) -> None:
    output = tmp_path / "rows.json"
    loose = ["--each", "10000", "--mean", "10000"]
    result = run(PACKAGE, _library.path(), "--lengths", "64", "150", *SMALL, *loose, "--output", output)
    assert result.returncode == 0, result.stderr
    rows = json.loads(output.read_text())["rows"]
    assert [(r["seqlen"], r["direction"]) for r in rows] == [
        (n, direction) for n in (64, 150) for direction in ("forward", "backward")
    ]
    for r in rows:
        assert r["before_ms"] > 0 and r["after_ms"] > 0 and r["ratio"] > 0 and r["pairs"] >= 4
        assert r["same_bits"]
    assert "| after / before | 64 | 150 |" in result.stdout


def test_ratios_are_of_pairs() -> None:
    """A clock that halves after the second pair makes no difference."""
    found = compare_libraries.summary([[1.0, 1.0, 2.0, 2.0], [1.1, 1.1, 2.2, 2.2]], [[5.0] * 4, [6.0] * 4])
    assert found["ratio"] == pytest.approx(1.1)
    assert found["spread"] == pytest.approx(0.0)
    assert (found["before_host_us"], found["after_host_us"]) == (5.0, 6.0)


def test_says_what_is_slower_than_allowed() -> None:
    rows = [row(), row(ratio=1.019), row(ratio=0.96)]
    assert compare_libraries.verdict(rows, 2.0, 0.5) == []
    one, average = compare_libraries.verdict([row(ratio=1.021), row()], 2.0, 0.5)
    assert one.startswith("slower by 2.1%") and average == "slower by 1.05% on average"


def test_table_has_a_line_for_each_shape() -> None:
    rows = [row(), row(seqlen=65536, ratio=0.985), row(direction="backward", ratio=1.0)]
    lines = compare_libraries.table(rows).splitlines()
    assert lines[0] == "| after / before | 1k | 64k |"
    assert lines[2:] == ["| G 4, d 64, forward | 1.000 | 0.985 |", "| G 4, d 64, backward | 1.000 |  |"]


def test_a_library_that_is_not_there_is_named(tmp_path: Path) -> None:
    result = run(tmp_path, PACKAGE, *SMALL)
    assert result.returncode == 1
    assert f"{tmp_path}: no such library" in result.stderr


def test_a_library_that_does_not_load_is_named(tmp_path: Path) -> None:
    broken = tmp_path / "libnsa_torch.so"
    broken.write_bytes(b"not a library")
    result = run(broken, PACKAGE, *SMALL)
    assert result.returncode == 1
    assert f"{broken}: its process ended" in result.stderr


def test_a_digest_knows_each_bit_and_its_place() -> None:
    x = torch.arange(40, dtype=torch.bfloat16)
    assert digest(x) == digest(x.clone()) == digest(x, piece=7)
    assert digest(x) != digest(x.flip(0))
    y = x.clone()
    y.view(torch.int16)[13] ^= 1
    assert digest(x) != digest(y)
