"""A `Diagnosis` as a PNG: layers down, heads across; the shares of mass over positions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .diagnosis import BRANCHES, Diagnosis, LayerDiagnosis

BINS = 16  # of positions, in the curve


def draw(diagnosis: Diagnosis, path: Path) -> None:
    """Write the picture; ImportError without matplotlib, whose global state stays as it is."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    layers = diagnosis.layers
    height = 2 * (1.6 + 0.22 * min(len(layers), 40))
    figure = Figure(figsize=(16, height), constrained_layout=True)
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 5)
    _heat(axes[0, 0], "mass that the chosen blocks hold", [layer.mass for layer in layers])
    _heat(axes[0, 1], "the same of the best blocks", [layer.mass_best for layer in layers])
    _heat(axes[1, 0], "overlap with the query before", [layer.overlap for layer in layers], heads="KV head")
    _curves(axes[1, 1], layers)
    for index, branch in enumerate(BRANCHES):
        gates, norms = ([getattr(layer, name)[:, index] for layer in layers] for name in ("gates", "contributions"))
        _heat(axes[0, 2 + index], f"gate, {branch}", gates)
        _heat(axes[1, 2 + index], f"share of the norm, {branch}", norms)
        for row, layer in enumerate(layers):
            for head, dead, how in layer.dead:
                if dead == branch:
                    axis = axes[0 if how == "gate" else 1, 2 + index]
                    axis.plot(head, row, "x", color="tab:red", markersize=6)
    figure.savefig(path, dpi=90, format="png")


def _heat(axis: Any, title: str, rows: list[Tensor], heads: str = "head") -> None:
    """Values from 0 to 1, white where there is none."""
    width = max(map(len, rows))
    grid = torch.full((len(rows), width), float("nan"), dtype=torch.float64)
    for index, row in enumerate(rows):
        grid[index, : len(row)] = row
    image = axis.imshow(grid.tolist(), vmin=0, vmax=1, cmap="viridis", aspect="auto", interpolation="nearest")
    axis.set_title(title, fontsize=9)
    axis.set_xlabel(heads, fontsize=8)
    axis.set_ylabel("layer", fontsize=8)
    axis.tick_params(labelsize=7)
    for side in (axis.xaxis, axis.yaxis):
        side.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axis.figure.colorbar(image, ax=axis).ax.tick_params(labelsize=7)


def _curves(axis: Any, layers: tuple[LayerDiagnosis, ...]) -> None:
    """The share of mass over the position, a line for each layer: means over parts of equally many queries."""
    for index, layer in enumerate(layers):
        order = layer.positions.argsort()
        places, shares = (t[order].double().tensor_split(BINS) for t in (layer.positions, layer.mass_at))
        points = [(p.mean().item(), s.mean().item()) for p, s in zip(places, shares, strict=True) if len(p)]
        if points:
            shade = index / max(1, len(layers) - 1)
            axis.plot(*zip(*points, strict=True), color=(shade, 0.3, 1 - shade), label=f"layer {index}")
    axis.set_ylim(0, 1.02)
    axis.set_title("mass that the chosen blocks hold", fontsize=9)
    axis.set_xlabel("position", fontsize=8)
    axis.tick_params(labelsize=7)
    axis.grid(alpha=0.3)
    if 0 < len(axis.lines) <= 8:
        axis.legend(fontsize=7)
