"""The two figures: how the losses fell, and what the model attends to."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from .attention_view import AttentionView
from .training import History

COLORS = {"nsa": "#1f6fb4", "dense": "#d9822b"}
NAMES = {"nsa": "NSA", "dense": "dense"}
BRANCHES = ("compressed", "selected", "window")
BRANCH_COLORS = ("#7a5195", "#ef5675", "#2f9e8f")
BLOCK_STATES = {
    "not in the past": "#ffffff",
    "not read": "#e4e8ee",
    "read: first and local blocks, always": "#9db8d6",
    "read: chosen by importance": "#0b3c6f",
}
SMOOTHING_SHARE = 0.04
RESOLUTION = 130


def plot_losses(histories: dict[str, History], title: str, path: Path) -> None:
    """Bits per byte by step and by training time, one colour a model.

    Thin lines are training batches, smoothed; thick ones with dots are held-out text.
    """
    figure, (by_step, by_time) = plt.subplots(1, 2, figsize=(12, 5), sharey=True, layout="constrained")
    highest = 0.0
    for name, history in histories.items():
        if not history.validation:
            continue
        steps, held_out, seconds = map(np.array, zip(*history.validation, strict=True))
        color = COLORS[name]
        smooth = smoothed(history.train)
        by_step.plot(
            np.arange(1, len(smooth) + 1),
            smooth,
            color=color,
            linewidth=0.8,
            alpha=0.6,
            label=f"{NAMES[name]}, training batches",
        )
        label = f"{NAMES[name]}, held-out: {held_out[-1]:.3f} at the end"
        by_step.plot(steps, held_out, "o-", color=color, markersize=4, linewidth=2, label=label)
        by_time.plot(seconds, held_out, "o-", color=color, markersize=4, linewidth=2)
        highest = max(highest, *held_out, smooth[len(smooth) // 10])
    by_step.set(xlabel="optimizer step", ylabel="loss (bits per byte)", title="by optimizer step")
    by_time.set(xlabel="seconds of training, validation left out", title="by time")
    for axes in (by_step, by_time):
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    if highest:
        by_step.set_ylim(top=highest * 1.05)
    by_step.legend(frameon=False)
    by_time.tick_params(labelleft=True)
    finish(figure, title, path)


def smoothed(losses: list[float]) -> np.ndarray:
    """Mean of the last few steps' losses, at every step."""
    width = max(1, round(SMOOTHING_SHARE * len(losses)))
    sums = np.concatenate(([0.0], np.cumsum(losses)))
    ends = np.arange(1, len(losses) + 1)
    starts = np.maximum(ends - width, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def plot_attention(view: AttentionView, title: str, path: Path) -> None:
    """Blocks read by every query of one text, a panel a layer, beside each layer's gates."""
    layers = len(view.block_indices)
    figure = plt.figure(figsize=(15, 1.4 + 2.1 * layers), layout="constrained")
    grid = figure.add_gridspec(layers, 2, width_ratios=(3, 1.25))
    blocks: Axes | None = None
    for layer in range(layers):
        blocks = figure.add_subplot(grid[layer, 0], sharex=blocks)
        draw_blocks(blocks, view, layer)
        blocks.tick_params(labelbottom=layer == layers - 1)
        gates = figure.add_subplot(grid[layer, 1])
        draw_gates(gates, view, layer)
        gates.tick_params(labelbottom=layer == layers - 1)
    assert blocks is not None
    blocks.set_xlabel("query position (bytes)")
    gates.set_xlabel("branch")
    figure.legend(
        handles=[Patch(facecolor=c, edgecolor="#888888", label=n) for n, c in BLOCK_STATES.items()],
        loc="outside lower left",
        ncols=len(BLOCK_STATES),
        frameon=False,
    )
    figure.legend(
        handles=[
            Patch(facecolor="#cccccc", label="mean gate"),
            Line2D([], [], color="#555555", marker="o", markersize=4, label="one head: mean, 10 to 90 % of queries"),
        ],
        loc="outside lower right",
        ncols=2,
        frameon=False,
    )
    finish(figure, title, path)


def draw_blocks(axes: Axes, view: AttentionView, layer: int) -> None:
    """Queries along x, selection blocks along y; block 0 is the beginning of the text."""
    head = view.kv_head
    states = block_states(view, layer, head)
    axes.imshow(
        states.T,
        aspect="auto",
        origin="lower",
        interpolation="nearest",
        cmap=ListedColormap(list(BLOCK_STATES.values())),
        norm=BoundaryNorm(np.arange(-0.5, len(BLOCK_STATES)), len(BLOCK_STATES)),
        extent=(0, states.shape[0], -0.5, states.shape[1] - 0.5),
    )
    axes.set_ylabel(f"block of {view.select_size} bytes")
    axes.set_title(f"layer {layer}, KV head {head}", fontsize=10, loc="left")


def block_states(view: AttentionView, layer: int, kv_head: int) -> np.ndarray:
    """Index into BLOCK_STATES for every (query, block)."""
    indices = view.block_indices[layer][:, kv_head].numpy()
    length = len(indices)
    own = np.arange(length) // view.select_size
    block = np.arange(own[-1] + 1)
    states = (block <= own[:, None]).astype(int)
    query, slot = np.nonzero(indices >= 0)
    states[query, indices[query, slot]] = 3
    forced = (block < view.num_initial) | (block > own[:, None] - view.num_local)
    states[forced & (states == 3)] = 2
    return states


def draw_gates(axes: Axes, view: AttentionView, layer: int) -> None:
    """Mean gate of each branch as a bar; a dot a head on a line between its 10 and 90 % quantiles."""
    gates = view.gates[layer].numpy()
    heads = gates.shape[1]
    for branch, color in enumerate(BRANCH_COLORS):
        axes.bar(branch, gates[..., branch].mean(), width=0.8, color=color, alpha=0.35)
        x = branch + np.linspace(-0.28, 0.28, heads) * (heads > 1)
        low, high = np.quantile(gates[..., branch], (0.1, 0.9), axis=0)
        axes.vlines(x, low, high, color=color, linewidth=1.2)
        axes.plot(x, gates[..., branch].mean(axis=0), "o", color=color, markersize=4)
    axes.set(ylim=(0, 1), ylabel="gate")
    axes.set_xticks(range(len(BRANCHES)), BRANCHES)
    axes.set_title(f"layer {layer}, gates of {heads} query heads", fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


def finish(figure: plt.Figure, title: str, path: Path) -> None:
    """Title, write, and free a figure."""
    figure.suptitle(title, fontsize=12)
    figure.savefig(path, dpi=RESOLUTION)
    plt.close(figure)
