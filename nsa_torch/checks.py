"""Checks of sizes that the user gives.

Each message names the argument, what it was and what is allowed.
"""

from __future__ import annotations


def check_at_least(least: int, **arguments: int) -> None:
    """ValueError unless every argument is at least `least`."""
    for name, value in arguments.items():
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


def check_divides(name: str, value: int, whole_name: str, whole: int) -> None:
    """ValueError unless `value` divides `whole`."""
    if whole % value:
        raise ValueError(f"{name} must divide {whole_name}, {whole}, got {value}")
