"""What every NSAAttention of a model reads of a text: its choice of blocks, its gates, its branches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..heads import NSAInputs
from ..module import NSAAttention
from . import measures
from .modes import layers_of, scoring

BRANCHES = ("compressed", "selected", "window")
SHUT = 0.01  # a gate that is nowhere above it is shut
NEGLIGIBLE = 0.01  # of the three contributions' norms: a branch with less has no say


@dataclass(frozen=True, eq=False)
class LayerDiagnosis:
    """One layer's measures, on the CPU in float64. Hq and Hkv are its heads (under tensor parallelism this rank's).

    Attributes:
        name: of the module in the model; "" where the model is the layer itself.
        tokens: how many tokens it was given.
        queries: how many queries the shares of mass and the overlap are taken over. All have a choice: more than n
            blocks start at or before them. 0: the text is too short for a choice, and those measures are nan.
        mass: (Hq), share of dense attention's mass that the chosen blocks hold, the mean over the queries. Dense
            attention is that of the layer's queries over all of the selected branch's keys (Eq. 1, 2).
        mass_best: (Hq), the same if for each query and KV head the n blocks with the most mass were chosen, the
            forced ones included.
        mass_forced: (Hq), the same of the forced blocks alone.
        gates: (Hq, 3), the mean gate over all tokens, by branch (Eq. 5).
        gates_most: (Hq, 3), the greatest gate of any token.
        contributions: (Hq, 3), the mean over tokens of the norm of gate times output, as shares of the three's sum.
        overlap: (Hkv), share of the blocks that a query chose, the forced ones left out, which the query before it
            read too; nan where no block is left to choose.
        positions: (S), where in their sequences the queries stand.
        mass_at: (S), the share that their chosen blocks hold, the mean over heads.
    """

    name: str
    tokens: int
    queries: int
    mass: Tensor
    mass_best: Tensor
    mass_forced: Tensor
    gates: Tensor
    gates_most: Tensor
    contributions: Tensor
    overlap: Tensor
    positions: Tensor
    mass_at: Tensor

    @property
    def dead(self) -> list[tuple[int, str, str]]:
        """Branches of no use: (query head, branch, "gate" or "norm").

        "gate": no token's gate is above 0.01. "norm": it gives less than 0.01 of the three contributions' norms.
        """
        found = []
        for head, (gates, shares) in enumerate(zip(self.gates_most.tolist(), self.contributions.tolist(), strict=True)):
            for branch, gate, share in zip(BRANCHES, gates, shares, strict=True):
                if gate < SHUT or share < NEGLIGIBLE:
                    found.append((head, branch, "gate" if gate < SHUT else "norm"))
        return found


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """The layers of a model in the order in which they ran; `print` shows a table of their means over heads.

    Attributes:
        layers: one LayerDiagnosis for each call of a layer.
    """

    layers: tuple[LayerDiagnosis, ...]

    def __str__(self) -> str:
        head = ["layer", "queries", "mass", "best", "forced", "overlap"]
        head += [f"{what} {branch[:3]}" for what in ("gate", "norm") for branch in BRANCHES]
        rows = [[*head, "dead"], *(_row(layer) for layer in self.layers)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
        return "\n".join(lines)

    def save_picture(self, path: str | Path) -> None:
        """Draw the measures by layer and head as a PNG; docs/diagnostics.md says how to read it.

        Args:
            path: of the file.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from .picture import draw

        draw(self, Path(path))


def _row(layer: LayerDiagnosis) -> list[str]:
    means = [layer.mass, layer.mass_best, layer.mass_forced, layer.overlap, *layer.gates.T, *layer.contributions.T]
    cells = ["-" if math.isnan(value := mean.mean().item()) else f"{value:.3f}" for mean in means]
    dead = [f"{sum(b == branch for _, b, _ in layer.dead)} {branch}" for branch in BRANCHES]
    shown = ", ".join(count for count in dead if not count.startswith("0 "))
    return [layer.name or "(the layer)", str(layer.queries), *cells, shown or "none"]


@torch.no_grad()
def diagnose(model: nn.Module, *inputs: Any, queries: int = 256, seed: int = 0, **keywords: Any) -> Diagnosis:
    """Run a model once on a text, in its eval mode, and measure every NSAAttention on the way.

    What is measured for all tokens takes as much time and memory as the layer itself; dense attention is computed for
    a sample of the queries, some at a time. It is that of the paper's question (section 6.1): do the chosen blocks hold
    what full attention would look at?

    Args:
        model: an NSAAttention, or a module that holds some: on the CPU or on CUDA, any dtype, under autocast or not.
        inputs, keywords: what the model takes: token ids, or hidden states (B, T, hidden_size); packed ones with
            `cu_seqlens`. Without a cache: Hugging Face's models need `use_cache=False`, and their padding counts as
            sequences of its own.
        queries: how many queries of a layer are compared with dense attention, over all sequences.
        seed: of the sample.

    Returns:
        The measures of every call of a layer.

    Raises:
        ValueError: no NSAAttention in the model, none that was called with whole sequences, no tokens, or
            queries below 1.
        TypeError: a model that is no Module.
    """
    if queries < 1:
        raise ValueError(f"queries must be at least 1, got {queries}")
    found: list[LayerDiagnosis] = []

    def measure(name: str, layer: NSAAttention, given: NSAInputs, packing: dict[str, Any]) -> None:
        found.append(_measure(name, layer, given, packing, queries, seed))

    with scoring(model), _watched(layers_of(model), measure):
        model(*inputs, **keywords)
    if not found:
        raise ValueError(
            "no NSAAttention of the model was called with whole sequences: give no cache, to Hugging Face's "
            "models use_cache=False"
        )
    return Diagnosis(tuple(found))


Measure = Callable[[str, NSAAttention, NSAInputs, dict[str, Any]], None]


@contextmanager
def _watched(layers: dict[str, NSAAttention], measure: Measure) -> Iterator[None]:
    """While it lasts, `measure` gets what each layer is about to attend with."""

    def watch(name: str, layer: NSAAttention) -> None:
        original = layer._inputs

        def inputs_of(*arguments: Any) -> tuple[NSAInputs, dict[str, Any]]:
            given, packing = original(*arguments)
            measure(name, layer, given, packing)
            return given, packing

        layer.__dict__["_inputs"] = inputs_of  # in the way of the class's own

    for name, layer in layers.items():
        watch(name, layer)
    try:
        yield
    finally:
        for layer in layers.values():
            layer.__dict__.pop("_inputs", None)


def _measure(
    name: str, layer: NSAAttention, inputs: NSAInputs, packing: dict[str, Any], queries: int, seed: int
) -> LayerDiagnosis:
    sequences = measures.sequences_of(inputs, packing)
    tokens = sequences[-1].stop  # on a GPU rows of no sequence may follow
    if tokens == 0:
        raise ValueError(f"layer {name!r} was given no tokens")
    branches = measures.attend_apart(layer, inputs, packing, tokens)
    gates = inputs.gates.flatten(0, -3)[:tokens].double()
    places = measures.sample_choosing(layer, sequences, queries, seed)
    q, k = (t.flatten(0, -3) for t in (inputs.q, inputs.k_slc))
    held, same, of, positions = [], torch.zeros(k.size(1), dtype=torch.float64), 0, []
    for rows, drawn in zip(sequences, places, strict=True):
        if len(drawn) == 0:
            continue
        place, own = drawn.to(q.device), slice(rows.start, rows.stop)
        indices = branches.block_indices[own]
        held.append(measures.held_by_blocks(layer, q[own][place], k[own], place, indices[place]))
        shared, free = measures.shared_with_last(layer, indices, place)
        same, of = same + shared, of + free
        positions.append(drawn)
    chosen, best, forced = _joined(held, heads=q.size(1))
    return LayerDiagnosis(
        name=name,
        tokens=tokens,
        queries=chosen.size(1),
        mass=chosen.mean(1),
        mass_best=best.mean(1),
        mass_forced=forced.mean(1),
        gates=gates.mean(0).cpu(),
        gates_most=gates.amax(0).cpu(),
        contributions=branches.norms / branches.norms.sum(-1, keepdim=True),
        overlap=same / of if of else torch.full_like(same, math.nan),
        positions=torch.cat(positions) if positions else torch.zeros(0, dtype=torch.int64),
        mass_at=chosen.mean(0),
    )


def _joined(held: list[measures.Held], heads: int) -> measures.Held:
    if not held:
        return measures.Held(*(torch.zeros(heads, 0, dtype=torch.float64) for _ in measures.Held._fields))
    return measures.Held(*(torch.cat(shares, dim=1) for shares in zip(*held, strict=True)))
