"""Text as bytes: what is read, what is held out, and which windows a step trains on."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

# Linux distributions leave the test suites out of their Python packages; leaving them out
# everywhere makes the default text much the same on every machine.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
VALIDATION_SHARE = 0.05
LARGEST_HELD_OUT_FILE = 0.2
FILE_SEPARATOR = b"\0"


class DataError(ValueError):
    """The text to train on is missing, unreadable, empty or too short."""


@dataclass(frozen=True)
class Corpus:
    """Training and held-out bytes, uint8, 1-d; `fingerprint` is a SHA-256 over both."""

    source: str
    train: Tensor
    validation: Tensor
    train_files: int
    validation_files: int
    fingerprint: str


def standard_library_files() -> tuple[Path, list[Path]]:
    """The folder and the .py files of the running interpreter's standard library, sorted."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [
        path
        for path in root.rglob("*.py")
        if not SKIPPED_FOLDERS.intersection(path.relative_to(root).parts) and path.is_file()
    ]
    return root, sorted(files)


def given_files(path: Path) -> tuple[Path, list[Path]]:
    """The file itself, or every file below the folder that is not hidden, sorted."""
    if path.is_file():
        return path.parent, [path]
    if not path.is_dir():
        raise DataError(f"--data {path}: no such file or folder")
    files = [
        file
        for file in path.rglob("*")
        if file.is_file() and not any(part[0] == "." for part in file.relative_to(path).parts)
    ]
    if not files:
        raise DataError(f"--data {path}: the folder holds no files")
    return path, sorted(files)


def load_corpus(path: str | None, context: int) -> Corpus:
    """Read the text and split it.

    Args:
        path: a file or a folder; None means the source files of the standard library.
        context: bytes a window holds; both parts must hold at least one window and its next byte.

    Raises:
        DataError: nothing to read, or less than one window of training or held-out text.
    """
    root, files = standard_library_files() if path is None else given_files(Path(path))
    source = "Python standard library" if path is None else str(path)
    try:
        contents = {file.relative_to(root).as_posix(): file.read_bytes() for file in files}
    except OSError as error:
        raise DataError(f"{source}: {error}") from error
    contents = {name: content for name, content in contents.items() if content}
    if not contents:
        raise DataError(f"{source}: no bytes in {len(files)} file(s)")

    held_out = choose_held_out(contents)
    if held_out:
        train = FILE_SEPARATOR.join(c for name, c in contents.items() if name not in held_out)
        validation = FILE_SEPARATOR.join(c for name, c in contents.items() if name in held_out)
    else:
        text = FILE_SEPARATOR.join(contents.values())
        cut = len(text) - max(int(len(text) * VALIDATION_SHARE), context + 1)
        train, validation = text[: max(cut, 0)], text[max(cut, 0) :]
    for part, content in (("training", train), ("held-out", validation)):
        if len(content) <= context:
            raise DataError(
                f"{source}: {len(content)} bytes of {part} text, but --context {context} needs at "
                f"least {context + 1}; give more text or a smaller --context"
            )
    return Corpus(
        source=source,
        train=_as_tensor(train),
        validation=_as_tensor(validation),
        train_files=max(len(contents) - len(held_out), 1),
        validation_files=len(held_out),
        fingerprint=hashlib.sha256(b"%d,%d:" % (len(train), len(validation)) + train + validation).hexdigest(),
    )


def choose_held_out(contents: dict[str, bytes]) -> set[str]:
    """Names of the files to hold out: about VALIDATION_SHARE of the bytes, by a hash of the name.

    Empty when no file is small enough to be spared; the end of the text is held out then.
    """
    total = sum(map(len, contents.values()))
    held_out: set[str] = set()
    size = 0
    for name in sorted(contents, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if size >= VALIDATION_SHARE * total:
            break
        if len(contents[name]) <= LARGEST_HELD_OUT_FILE * total:
            held_out.add(name)
            size += len(contents[name])
    return held_out if size >= VALIDATION_SHARE * total else set()


class WindowSampler:
    """Endless random windows of a text. Its generator's state is the position in the data."""

    def __init__(self, text: Tensor, batch: int, context: int, seed: int) -> None:
        self.text = text
        self.batch = batch
        self.context = context
        self.generator = torch.Generator().manual_seed(seed)

    def next(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets, int64, (batch, context): the target of a byte is the one after it."""
        last = len(self.text) - self.context
        starts = torch.randint(0, last, (self.batch,), generator=self.generator)
        return windows_at(self.text, starts, self.context)


def validation_windows(text: Tensor, count: int, batch: int, context: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The same `count` windows every time, evenly spread over the text, in batches."""
    starts = torch.linspace(0, len(text) - context - 1, count, dtype=torch.float64).long()
    for chunk in starts.split(batch):
        yield windows_at(text, chunk, context)


def windows_at(text: Tensor, starts: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets, int64, (len(starts), context), of the windows that begin at `starts`."""
    rows = text[starts[:, None] + torch.arange(context + 1)].long()
    return rows[:, :-1], rows[:, 1:]


def _as_tensor(content: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(content, dtype=np.uint8).copy())
