"""How a model is run to be looked at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ..module import NSAAttention


@contextmanager
def scoring(model: nn.Module) -> Iterator[None]:
    """The model in eval mode; afterwards every module is in the mode it was in. TypeError if it is no Module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    trained = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in trained:
            module.training = True


def layers_of(model: nn.Module) -> dict[str, NSAAttention]:
    """The model's NSAAttention layers by name. ValueError where there is none."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, NSAAttention)}
    if not layers:
        raise ValueError("model must hold an NSAAttention, got none")
    return layers
