"""The tables of measured figures in README.md and docs, made from the files under benchmarks/results.

    python benchmarks/table.py FILE.json            # print the table of one file
    python benchmarks/table.py --write              # fill in every table of every page, or of the pages named
    python benchmarks/table.py --check              # fail if one differs from its file

In a page, a table stands between `<!-- table: benchmarks/results/NAME.json -->` and `<!-- end of table -->`; after the
name, fields choose among the rows: `op=nsa_attention seqlen=8192,65536`; `view=parts` shows them by one of
benchmarks/views.py. A row of a file is one op in one direction on one problem: benchmarks/speed.py says what its fields
mean. Files of other machines have the same fields; rows that differ only in direction share a line.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from views import VIEWS

ROOT = Path(__file__).resolve().parent.parent
TABLE = re.compile(r"(<!-- table: (\S+)((?: \w+=\S+)*) -->\n).*?(<!-- end of table -->)", re.DOTALL)
MACHINE = ("gpu", "cpu", "torch", "commit")
PROBLEM = ("op", "dtype", "batch", "seqlen", "heads", "kv_heads", "dk", "dv", "data")

Row = dict[str, Any]


def share(numerator: float | None, denominator: float) -> str:
    return "" if numerator is None else f"{numerator / denominator:.0%}"


def number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def cells(row: Row, peers: list[str]) -> list[str]:
    """What the table shows of one direction."""
    of_peers = [row["peers"].get(peer) for peer in peers]
    ratios = [number(None if ms is None else ms / row["ms"], ".2f") for ms in of_peers]
    times = [number(ms, ",.1f") for ms in (row["ms"], *of_peers)]
    peak = row["peak_bytes"]
    memory = number(None if peak is None else peak / 1e6, ",.0f")
    return [*times, *ratios, share(row.get("limit_ms"), row["ms"]), memory, number(row["error"], ".0e")]


def headings(direction: str, peers: list[str]) -> list[str]:
    return [
        f"{direction}, ms",
        *(f"{peer}, ms" for peer in peers),
        *(f"{peer} / this" for peer in peers),
        "of the limit",
        "MB",
        "error",
    ]


def table(rows: list[Row]) -> str:
    """Markdown: one line for each problem, with columns for each direction."""
    shown = [name for name in PROBLEM if len({row[name] for row in rows}) > 1 or name == "seqlen"]
    machine = ", ".join(
        f"{name} {value}" for name in MACHINE for value in sorted({str(row[name]) for row in rows if row[name]})
    )
    common = ", ".join(f"{name} {rows[0][name]}" for name in PROBLEM if name not in shown)
    peers = sorted({peer for row in rows for peer in row["peers"]})
    directions = list(dict.fromkeys(row["direction"] for row in rows))
    head = [*shown, *(heading for direction in directions for heading in headings(direction, peers))]
    problems: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        problems.setdefault(tuple(row[name] for name in PROBLEM), {})[row["direction"]] = row
    lines = [head, ["---"] * len(head)]
    for found in problems.values():
        first = next(iter(found.values()))
        values = [f"{first[name]:,}" if name == "seqlen" else str(first[name]) for name in shown]
        for direction in directions:
            empty = [""] * len(headings(direction, peers))
            values += cells(found[direction], peers) if direction in found else empty
        lines.append(values)
    return f"{common}; {machine}:\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def chosen(rows: list[Row], conditions: list[str]) -> list[Row]:
    """The rows whose fields have one of the values that each condition, `field=value,value`, allows."""
    for condition in conditions:
        name, _, values = condition.partition("=")
        rows = [row for row in rows if str(row[name]) in values.split(",")]
    return rows


def fill(page: str) -> str:
    """The page with every table made anew."""

    def made(match: re.Match[str]) -> str:
        file = json.loads((ROOT / match[2]).read_text())
        fields = match[3].split()
        wanted = [field.removeprefix("view=") for field in fields if field.startswith("view=")]
        rows = chosen(file["rows"], [field for field in fields if not field.startswith("view=")])
        return match[1] + (VIEWS[wanted[0]](file, rows) if wanted else table(rows)) + match[4]

    return TABLE.sub(made, page)


def pages() -> list[Path]:
    """The project's pages that have a table."""
    found = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    return sorted(page for page in found if TABLE.search(page.read_text()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="files of results; with --write or --check, pages")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--write", action="store_true", help="fill in the tables of pages")
    action.add_argument("--check", action="store_true", help="fail if tables of pages are not up to date")
    options = parser.parse_args()
    if not options.write and not options.check:
        for path in options.files:
            print(table(json.loads(path.read_text())["rows"]), end="")
        return 0
    differ = []
    for page in options.files or pages():
        text = page.read_text()
        filled = fill(text)
        if filled != text:
            differ.append(page)
            if options.write:
                page.write_text(filled)
    if options.check and differ:
        names = ", ".join(str(page.relative_to(ROOT) if page.is_relative_to(ROOT) else page) for page in differ)
        print(f"{names}: tables differ from benchmarks/results: run `make tables`")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
