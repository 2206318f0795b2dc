"""The benchmarks run, and the README's tables are what they measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
FIELDS = {*table.MACHINE, *table.PROBLEM, "direction", "ms", "peers", "peak_bytes", "error"}


def make_row(**changes: Any) -> dict[str, Any]:
    return dict.fromkeys(FIELDS) | {"seqlen": 1024, "direction": "forward", "ms": 2.0, "peers": {"sdpa": 5.0}} | changes


def test_readme_shows_what_was_measured() -> None:
    page = (ROOT / "README.md").read_text()
    assert table.TABLE.search(page)
    assert table.fill(page) == page, "run `make tables`"


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_rows_have_every_field(path: Path) -> None:
    rows = json.loads(path.read_text())["rows"]
    assert rows
    for row in rows:
        assert set(row) >= FIELDS
        assert not row["commit"].endswith("-changed"), "measured on sources that no commit holds"


def test_table_joins_directions_and_leaves_gaps() -> None:
    rows = [
        make_row(peak_bytes=3_000_000, error=1e-7, limit_ms=1.0),
        make_row(direction="backward", ms=4.0, peers={}),
        make_row(seqlen=2048, ms=1000.0),
    ]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.table(rows).splitlines()[2:]]
    heading, _, both, forward = lines
    assert heading[:4] == ["seqlen", "forward, ms", "sdpa, ms", "sdpa / this"]
    assert both == ["1,024", "2.0", "5.0", "2.50", "50%", "3", "1e-07", "4.0", "", "", "", "", ""]
    assert forward == ["2,048", "1,000.0", "5.0", "0.01", *[""] * 9]


def test_speed_writes_rows_of_which_table_makes_a_table(tmp_path: Path) -> None:
    output = tmp_path / "speed.json"
    command = [sys.executable, "benchmarks/speed.py", "--max-length", "1024", "--repeat", "1", "--output", str(output)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    rows = json.loads(output.read_text())["rows"]
    assert [row["direction"] for row in rows] == ["forward", "forward+backward"]
    for row in rows:
        assert set(row) >= FIELDS
        assert row["ms"] > 0 and row["peers"]["sdpa"] > 0 and row["peak_bytes"] > 0
        assert row["error"] < 1e-5
    assert "| 1,024 |" in table.table(rows)
