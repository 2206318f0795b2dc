"""Which rows of a model's inputs and outputs are which tokens."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


def tensor_of(output: Any) -> Any:
    for name in ("logits", "last_hidden_state"):
        if isinstance(getattr(output, name, None), Tensor):
            return getattr(output, name)
    return output[0] if isinstance(output, (tuple, list)) and output else output


class TokenRows:
    """Where the sequences of inputs (B, T, ...) or packed (sum T, ...) lie among all rows."""

    def __init__(self, inputs: Tensor, cu_seqlens: Tensor | None) -> None:
        dims = inputs.dim() - inputs.is_floating_point()
        if dims not in ((2,) if cu_seqlens is None else (1, 2)):
            shape = tuple(inputs.shape)
            raise ValueError(f"inputs must be (B, T) or (B, T, C), packed (sum T) or (sum T, C), got shape {shape}")
        self.leading = inputs.shape[:dims]
        if cu_seqlens is None:
            batch, length = self.leading[-2:]
            self.sequences = [range(b * length, (b + 1) * length) for b in range(batch)]
        else:
            ends = cu_seqlens.tolist()
            self.sequences = [range(start, end) for start, end in pairwise(ends)]
        self.total = self.sequences[-1].stop

    def place(self, row: int) -> tuple[int, int]:
        """The sequence and the position of a row."""
        sequence = next(i for i, rows in enumerate(self.sequences) if row in rows)
        return sequence, row - self.sequences[sequence].start

    def kept(self, sequence: int, cut: int, device: torch.device) -> Tensor:
        """Rows that a change of a sequence from `cut` on must not reach, (rows,) bool."""
        row, own = torch.arange(self.total, device=device), self.sequences[sequence]
        return (row < own.start + cut) | (row >= own.stop)

    def of_output(self, output: Any) -> Tensor:
        """The rows of what a model returns; ValueError if it has not one for each token."""
        out = tensor_of(output)
        found = self.of(out) if isinstance(out, Tensor) else None
        if found is None:
            got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(f"the model must return a row for each of the tokens {tuple(self.leading)}, got {got}")
        return found

    def of(self, out: Tensor) -> Tensor | None:
        """A tensor's rows (rows, ...), or None if it has not one for each token."""
        count = self.leading.numel()
        for dims in (1, 2):
            leading = out.shape[:dims]
            if out.dim() > dims and leading.numel() == count and (leading == self.leading or count in leading):
                return out.flatten(0, dims - 1)[: self.total]
        return None
