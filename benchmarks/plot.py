"""PNG charts of a file that benchmarks/gpu.py has measured: times, and memory, over the length.

python benchmarks/plot.py benchmarks/results/NAME.json          # NAME-forward.png, -backward, -both, -memory
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("agg")
import matplotlib.pyplot as plt

from views import DENSE, thousands

Row = dict[str, Any]
Lines = dict[str, list[tuple[int, float]]]


def lines_of(rows: list[Row], own: Callable[[Row], float | None], peers: Callable[[Row], dict[str, Any]]) -> Lines:
    """By what was measured, (length, value): each op, and the whole's peers. Two kinds of data are two lines."""
    lines: Lines = {}
    several = len({row["data"] for row in rows}) > 1
    for row in sorted(rows, key=lambda row: row["seqlen"]):
        value = own(row)
        if value is not None:
            name = f"{row['op']}, {row['data']}" if several else row["op"]
            lines.setdefault(name, []).append((row["seqlen"], value))
        if row["op"] == "nsa_attention":
            for name, value in peers(row).items():
                points = lines.setdefault(name, [])
                if value is not None and (row["seqlen"], value) not in points:
                    points.append((row["seqlen"], value))
    return {name: points for name, points in lines.items() if points}


def draw(lines: Lines, label: str, title: str, path: Path) -> None:
    """One chart on logarithmic axes; the whole and its peers are thick."""
    figure, axes = plt.subplots(figsize=(8, 5.5), constrained_layout=True)
    for name, points in lines.items():
        whole = name.startswith("nsa_attention")
        dense = name in DENSE
        axes.plot(
            *zip(*sorted(points), strict=True),
            marker="o",
            markersize=3,
            linewidth=2.5 if whole or dense else 1.0,
            linestyle="--" if dense else "-",
            label=f"dense, {DENSE[name]}" if name in DENSE else name,
        )
    lengths = sorted({length for points in lines.values() for length, _ in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [thousands(length) for length in lengths])
    axes.set_yscale("log")
    axes.set_xlabel("tokens")
    axes.set_ylabel(label)
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, ncol=2)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def both(rows: list[Row]) -> list[Row]:
    """Forward and backward of the whole together, and of its peers."""
    pairs: dict[tuple[int, str], list[Row]] = {}
    for row in rows:
        if row["op"] == "nsa_attention":
            pairs.setdefault((row["seqlen"], row["data"]), []).append(row)
    return [
        pair[0]
        | {"ms": sum(row["ms"] for row in pair)}
        | {"peers": {name: sum(row["peers"][name] for row in pair) for name in pair[-1]["peers"]}}
        for pair in pairs.values()
        if len(pair) == 2
    ]


def draw_all(path: Path, folder: Path) -> list[Path]:
    """The charts of one file of rows; rows of the most common heads only."""
    rows: list[Row] = json.loads(path.read_text())["rows"]
    heads = [(row["heads"], row["kv_heads"]) for row in rows]
    most = max(set(heads), key=heads.count)
    rows = [row for row, pair in zip(rows, heads, strict=True) if pair == most]
    first = rows[0]
    problem = f"{first['gpu'] or first['cpu']}, {most[0]} / {most[1]} heads, d {first['dk']}, {first['dtype']}"
    made = []
    for direction in ("forward", "backward"):
        lines = lines_of(
            [row for row in rows if row["direction"] == direction], lambda row: row["ms"], lambda row: row["peers"]
        )
        made.append(folder / f"{path.stem}-{direction}.png")
        draw(lines, "ms", f"{direction}: {problem}", made[-1])
    made.append(folder / f"{path.stem}-both.png")
    draw(
        lines_of(both(rows), lambda row: row["ms"], lambda row: row["peers"]),
        "ms",
        f"forward and backward: {problem}",
        made[-1],
    )
    whole = [row for row in rows if row["op"] == "nsa_attention" and row["direction"] == "backward"]

    def gigabytes(row: Row) -> float | None:
        return None if row["peak_bytes"] is None else row["peak_bytes"] / 1e9

    def of_peers(row: Row) -> dict[str, float]:
        return {name: value / 1e9 for name, value in row["peer_peak_bytes"].items() if value is not None}

    memory = lines_of(whole, gigabytes, of_peers)
    if memory:
        made.append(folder / f"{path.stem}-memory.png")
        draw(memory, "peak GB, forward and backward", problem, made[-1])
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--folder", type=Path, help="where the charts go: beside the file")
    options = parser.parse_args()
    print(*draw_all(options.file, options.folder or options.file.parent), sep="\n")


if __name__ == "__main__":
    main()
