"""Files that a kill at any moment cannot damage, and the training state kept in one."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch


class CheckpointError(RuntimeError):
    """The checkpoint cannot be read, or belongs to a run with other settings."""


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write beside `path` and rename over it: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".partial")
    with open(unfinished, "wb") as file:
        write(file)
        file.flush()
        # Otherwise a power cut could leave the new name on bytes that never reached the disk.
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Replace the checkpoint at `path` by `state`."""
    write_atomically(path, lambda file: torch.save(state, file))


def load_checkpoint(path: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The state saved at `path`, its tensors on the CPU, or None when there is none.

    Raises:
        CheckpointError: the file is unreadable, or was written by a run whose settings differ from
            `settings`; the message lists each difference.
    """
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        saved = state["settings"]
    except Exception as error:
        raise CheckpointError(f"{path} is not a checkpoint of this script: {error}") from error
    differences = [
        f"  {name}: {saved.get(name)} in the checkpoint, {settings.get(name)} now"
        for name in sorted(saved.keys() | settings.keys())
        if saved.get(name) != settings.get(name)
    ]
    if differences:
        raise CheckpointError(
            f"{path} belongs to a run with other settings:\n"
            + "\n".join(differences)
            + "\nUse the same settings to go on, --restart to begin again, or another --out."
        )
    return state
