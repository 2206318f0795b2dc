"""What the layers of a trained NSA read of the longest texts: whether the choice works, and which branches count."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import nsa_torch
from nsa_torch.diagnostics import diagnose

from .tasks import EVALUATION, Task, generator, half_precision

MEASURES = ("mass", "mass_best", "mass_forced", "overlap", "gates", "gates_most", "contributions")


def layer_reads(model: nn.Module, task: Task, device: torch.device) -> list[dict[str, Any]]:
    """For each layer the measures of `nsa_torch.diagnostics.diagnose` by head, JSON; empty for other models."""
    if not any(isinstance(module, nsa_torch.NSAAttention) for module in model.modules()):
        return []
    length = max(stage.length for stage in task.sizes.stages)
    batch = task.batch(length, 1, generator(device, EVALUATION, length))
    with half_precision(device):
        layers = diagnose(model, batch.tokens).layers
    return [
        {"queries": layer.queries} | {name: _rounded(getattr(layer, name)) for name in MEASURES} for layer in layers
    ]


def _rounded(values: Tensor) -> Any:
    """Lists of numbers; none where there is nothing to measure, since JSON has no nan."""
    rounded = [_rounded(row) if row.dim() else round(row.item(), 4) for row in values]
    return [None if value != value else value for value in rounded]
