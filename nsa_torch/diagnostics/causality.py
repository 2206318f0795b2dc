"""Does an output depend on later inputs, or on another sequence's? Changes them and looks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..module import NSAAttention
from .modes import scoring
from .rows import TokenRows, tensor_of

MOST_ELEMENTS = 1 << 22  # compared at once in float64
LOOKED_AT = 64  # rows before the change, and as many that leak, of which each module's outputs are compared


@dataclass(frozen=True)
class Leak:
    """A change of inputs that reached an output which must not know of them.

    Attributes:
        sequence, cut: which sequence's inputs were changed, from which position on.
        reached, position: the first output that changed: of which sequence, at which position.
        outputs: how many outputs changed that must not.
        difference: the largest change of an element of them.
        module: the first module, in the order in which they end, whose output changed too early; "" if none was found
            whose output has a row for every token.
    """

    sequence: int
    cut: int
    reached: int
    position: int
    outputs: int
    difference: float
    module: str

    def __str__(self) -> str:
        where = f" in {self.module}" if self.module else ""
        return (
            f"sequence {self.sequence} changed from {self.cut} on: {self.outputs} outputs that must not know of it "
            f"changed by up to {self.difference:.3g}, first sequence {self.reached} at {self.position}{where}"
        )


@dataclass(frozen=True)
class CausalityReport:
    """What `check_causality` found; `print` shows it.

    Attributes:
        trials: how many changes were tried.
        tolerance: differences up to it were taken for rounding.
        leaks: one for each trial that leaked.
    """

    trials: int
    tolerance: float
    leaks: tuple[Leak, ...]

    @property
    def causal(self) -> bool:
        """Whether nothing leaked."""
        return not self.leaks

    def __str__(self) -> str:
        head = f"{self.trials} trials, {len(self.leaks)} leaks (differences above {self.tolerance:.3g})"
        return "\n".join([head, *map(str, self.leaks)])


@torch.no_grad()
def check_causality(
    model: nn.Module,
    inputs: Tensor,
    *,
    trials: int = 8,
    tolerance: float | None = None,
    vocabulary: int | None = None,
    cu_seqlens: Tensor | None = None,
    seed: int = 0,
    **keywords: Any,
) -> CausalityReport:
    """Change a sequence's inputs from a position on, and look for outputs before it, or of others, that change too.

    The model runs in its eval mode, twice and once for every trial, on batches of the given size; where something
    leaks once more, to name the module. Positions are the edges of the first NSAAttention's blocks and windows as far
    as they lie in the sequence, and others by chance.

    Args:
        model: a layer or a model, called as model(inputs, **keywords): on the CPU or on CUDA. What it returns, or the
            `logits`, the `last_hidden_state` or the first item of that, has a row for each token.
        inputs: hidden states (B, T, C), or token ids (B, T); packed (sum T, C) or (sum T), also with a leading 1, with
            cu_seqlens. Floating inputs are replaced by noise of three times their spread, ids by others.
        trials: how many changes; they take the sequences in turn.
        tolerance: differences up to it are no leaks; default 0 for what two runs give alike to the bit, as they should
            on the CPU and on CUDA, else twice their difference.
        vocabulary: how many token ids there are; default one more than the greatest that is given.
        cu_seqlens: (B + 1,) int32, given on to the model.
        seed: of the changes.
        keywords: given on to the model. No cache: to Hugging Face's models give use_cache=False.

    Returns:
        The leaks, with the sequence, the position and the module where each is seen first.

    Raises:
        ValueError: inputs without a second token in any sequence, or that cannot change; a cache; an output without a
            row for each token; trials below 1.
        TypeError: a model that is no Module, inputs that are no tensor.
    """
    _check_arguments(model, inputs, trials, keywords)
    if cu_seqlens is not None:
        keywords["cu_seqlens"] = cu_seqlens
    rows = TokenRows(inputs, cu_seqlens)
    cuts = _cuts(model, rows, trials, seed)
    with scoring(model):
        before = rows.of_output(model(inputs, **keywords))
        noise = _differences(before, rows.of_output(model(inputs, **keywords))).max().item()
        allowed = 2 * noise if tolerance is None else tolerance
        leaks = []
        for number, (sequence, cut) in enumerate(cuts):
            changed = _change(inputs, rows, sequence, cut, vocabulary, seed + number)
            kept = rows.kept(sequence, cut, before.device)
            difference = _differences(before, rows.of_output(model(changed, **keywords))).masked_fill(~kept, 0.0)
            leaking = (difference > allowed).nonzero().flatten()
            if len(leaking):
                looked_at = _looked_at(rows, kept, leaking, sequence, cut)
                module = _first_module(model, (inputs, changed), keywords, rows, looked_at, allowed)
                place = rows.place(int(leaking[0]))
                leaks.append(Leak(sequence, cut, *place, len(leaking), difference.max().item(), module))
    return CausalityReport(len(cuts), allowed, tuple(leaks))


def _check_arguments(model: nn.Module, inputs: Tensor, trials: int, keywords: dict[str, Any]) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(inputs, Tensor):
        raise TypeError(f"inputs must be a tensor, got {type(inputs).__name__}")
    if trials < 1:
        raise ValueError(f"trials must be at least 1, got {trials}")
    if keywords.get("cache") is not None or keywords.get("past_key_values") is not None:
        raise ValueError("a cache would carry one run into the next: give none")


def _cuts(model: nn.Module, rows: TokenRows, trials: int, seed: int) -> list[tuple[int, int]]:
    """Which sequence is changed from which position on: block edges first, then by chance."""
    long_enough = [i for i, own in enumerate(rows.sequences) if len(own) > 1]
    if not long_enough:
        raise ValueError("inputs must have a sequence of two tokens or more")
    layer = next((module for module in model.modules() if isinstance(module, NSAAttention)), None)
    edges = [1]
    if layer is not None:
        sizes = (layer.select_size, layer.block_size, layer.window)
        edges += [size + shift for size in sizes for shift in (0, -1)]
    random = torch.Generator().manual_seed(seed)
    cuts: list[tuple[int, int]] = []
    for number in range(trials):
        sequence = long_enough[number % len(long_enough)]
        length, wanted = len(rows.sequences[sequence]), number // 2
        cut = int(torch.randint(1, length, (), generator=random))
        if number % 2 == 0 and wanted < len(edges) and 0 < edges[wanted] < length:
            cut = edges[wanted]
        cuts.append((sequence, cut))
    return cuts


def _change(inputs: Tensor, rows: TokenRows, sequence: int, cut: int, vocabulary: int | None, seed: int) -> Tensor:
    """A copy of the inputs whose sequence is another from `cut` on."""
    own = rows.sequences[sequence]
    changed = inputs.clone(memory_format=torch.contiguous_format)
    part = changed.view(-1, *inputs.shape[len(rows.leading) :])[own.start + cut : own.stop]
    random = torch.Generator().manual_seed(seed)
    if inputs.is_floating_point():
        spread = 3 * (inputs.double().std().item() or 1.0)
        part.copy_(spread * torch.randn(part.shape, generator=random, dtype=torch.float64))
        return changed
    count = int(inputs.max()) + 1 if vocabulary is None else vocabulary
    if count < 2:
        raise ValueError(f"inputs cannot change among {count} token ids: give vocabulary")
    shift = torch.randint(1, count, part.shape, generator=random).to(part)
    part.copy_((part + shift) % count)
    return changed


def _looked_at(rows: TokenRows, kept: Tensor, leaking: Tensor, sequence: int, cut: int) -> Tensor:
    """Some of the rows that must not change: those that leak, and those just before the change."""
    end = rows.sequences[sequence].start + cut
    near = torch.arange(max(0, end - LOOKED_AT), end, device=kept.device)
    wanted = torch.cat((leaking[:LOOKED_AT], near)).unique()
    return wanted[kept[wanted]]


def _differences(before: Tensor, after: Tensor) -> Tensor:
    """The largest change of each row, some rows at a time; infinity where a number came or went."""
    size = max(1, MOST_ELEMENTS // max(1, before[:1].numel()))
    pairs = zip(before.flatten(1).split(size), after.flatten(1).split(size), strict=True)
    return torch.cat([_largest_of_rows(*pair) for pair in pairs])


def _largest_of_rows(before: Tensor, after: Tensor) -> Tensor:
    same = (before == after) | (before.isnan() & after.isnan())
    change = (before.double() - after.double()).abs().nan_to_num(nan=torch.inf, posinf=torch.inf)
    return change.masked_fill(same, 0.0).amax(1)


@contextmanager
def _recorded(model: nn.Module, rows: TokenRows, looked_at: Tensor) -> Iterator[list[tuple[str, Tensor]]]:
    """While it lasts, the list gets some rows of every module's output, in the order in which the modules end."""
    outputs: list[tuple[str, Tensor]] = []

    def keep(name: str, output: Any) -> None:
        out = tensor_of(output)
        found = rows.of(out) if isinstance(out, Tensor) and out.is_floating_point() else None
        if found is not None:
            outputs.append((name, found[looked_at.to(found.device)].clone()))

    hooks = [
        module.register_forward_hook(lambda _module, _inputs, output, name=name: keep(name, output))
        for name, module in model.named_modules()
    ]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def _first_module(
    model: nn.Module,
    pair: tuple[Tensor, Tensor],
    keywords: dict[str, Any],
    rows: TokenRows,
    looked_at: Tensor,
    allowed: float,
) -> str:
    """The first module whose output at those rows differs between the two inputs."""
    runs = []
    for given in pair:
        with _recorded(model, rows, looked_at) as outputs:
            model(given, **keywords)
        runs.append(outputs)
    for (name, before), (_, after) in zip(*runs, strict=False):
        if _differences(before, after).max() > allowed:
            return name or "(the model)"
    return ""
