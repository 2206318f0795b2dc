"""Pictures of the results: accuracy by length, and maps of what was found by length and depth."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

Result = dict[str, Any]
Lines = dict[str, dict[int, list[float]]]  # model -> length -> one value for each seed


def picture(lines: Lines, title: str, path: Path) -> None:
    """Accuracy over the length, a band from the least to the greatest of the seeds."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), constrained_layout=True)
    for model, row in lines.items():
        lengths = sorted(row)
        means = [statistics.mean(row[n]) for n in lengths]
        style = "--" if model.startswith(("full", "window")) else "-"
        (line,) = axes.plot(lengths, means, style, marker="o", markersize=3, label=model)
        low, high = ([f(row[n]) for n in lengths] for f in (min, max))
        axes.fill_between(lengths, low, high, color=line.get_color(), alpha=0.2)
    axes.set_xscale("log", base=2)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("tokens")
    axes.set_ylabel("accuracy")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, ncol=2)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def heat_maps(results: list[Result], task: str, path: Path) -> bool:
    """Codes found by length (across) and depth (down), for each model the mean of its runs; False if there are none."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    maps: dict[str, list[list[list[float]]]] = {}
    for result in results:
        if result["run"]["task"] == task and "needle" in result.get("scores", {}):
            codes = result["scores"]["needle"]["codes"]
            columns = [codes[length] for length in sorted(codes, key=int)]
            maps.setdefault(result["run"]["model"], []).append([list(row) for row in zip(*columns, strict=True)])
            lengths = sorted(codes, key=int)
    if not maps:
        return False
    figure, axes = plt.subplots(1, len(maps), figsize=(3.2 * len(maps), 3), squeeze=False, constrained_layout=True)
    for axis, (model, runs) in zip(axes[0], maps.items(), strict=True):
        mean = [[statistics.mean(cells) for cells in zip(*rows, strict=True)] for rows in zip(*runs, strict=True)]
        image = axis.imshow(mean, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axis.set_title(f"{model}: {statistics.mean(value for row in mean for value in row):.2f}", fontsize=9)
        axis.set_xticks(range(len(lengths)), lengths, rotation=60, fontsize=7)
        axis.set_yticks(range(len(mean)), [f"{(i + 0.5) / len(mean):.0%}" for i in range(len(mean))], fontsize=7)
    figure.colorbar(image, ax=axes)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True
