"""Checks of sizes that the user gives.

Each message names the argument, what it was and what is allowed.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor


def check_at_least(least: int, **arguments: int) -> None:
    """TypeError unless every argument is an int, ValueError unless it is at least `least`."""
    for name, value in arguments.items():
        if isinstance(value, bool) or not hasattr(type(value), "__index__"):
            raise TypeError(f"{name} must be an int, got {type(value).__name__}")
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


def check_bools(**arguments: bool) -> None:
    """TypeError unless every argument is a bool."""
    for name, value in arguments.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be a bool, got {type(value).__name__}")


def check_divides(name: str, value: int, whole_name: str, whole: int) -> None:
    """ValueError unless `value` divides `whole`."""
    if whole % value:
        raise ValueError(f"{name} must divide {whole_name}, {whole}, got {value}")


def check_tensors(**arguments: object) -> None:
    """TypeError unless every argument is a tensor or None."""
    for name, value in arguments.items():
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")


def check_integers(name: str, value: object, *shapes: tuple[int, ...]) -> None:
    """TypeError unless `value` is a tensor of integers or, if () is among the shapes, an int.

    ValueError for a tensor of another shape.
    """
    kinds = "an int or a tensor of integers" if () in shapes else "a tensor of integers"
    if isinstance(value, Tensor):
        if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
            raise TypeError(f"{name} must be {kinds}, got {value.dtype}")
        if tuple(value.shape) not in shapes:
            raise ValueError(f"{name} must be of shape {' or '.join(map(str, shapes))}, got {tuple(value.shape)}")
        return
    try:
        if () in shapes and not isinstance(value, bool):
            operator.index(value)  # type: ignore[arg-type]
            return
    except TypeError:
        pass
    raise TypeError(f"{name} must be {kinds}, got {type(value).__name__}")
