"""What the layers of a trained NSA read of the longest texts: whether the choice works, and which branches count."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import nsa_torch
from nsa_torch.diagnostics import diagnose

from .models import make_model
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


def draw_layers(name: str, weights: Path, task: Task, length: int, device: torch.device, picture: Path) -> str:
    """What the layers of a model `name`, whose weights a run kept, read of one text: a picture, and the table."""
    sizes = task.sizes
    model, _ = make_model(name, sizes.vocabulary, sizes.shape, sizes.mlp_width, sizes.reference)
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    model.to(device)
    batch = task.batch(length, 1, generator(device, EVALUATION, length))
    with half_precision(device):
        diagnosis = diagnose(model, batch.tokens, queries=1024)
    diagnosis.save_picture(picture)
    return str(diagnosis)


def _rounded(values: Tensor) -> Any:
    """Lists of numbers; none where there is nothing to measure, since JSON has no nan."""
    rounded = [_rounded(row) if row.dim() else round(row.item(), 4) for row in values]
    return [None if value != value else value for value in rounded]
