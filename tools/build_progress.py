"""Shows a build by one line of progress: `compiled 37 of 110: selected/plain/attention.cu`.

torch's BuildExtension runs `ninja -v`, which prints a command of some 900 characters for each source. Inside `shown()`
file descriptor 1 is a pipe: what comes through it is printed, except for those commands. Warnings and errors stand as
the compiler wrote them, and a failed command is shown whole. `V=1` in the environment shows everything.

On a terminal the line is written over; elsewhere, in a log, it comes ten times.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# How ninja marks a finished command, for `Progress` to know it by.
NINJA_STATUS = "finished %f of %t> "
STATUS = re.compile(r"finished (\d+) of (\d+)> (.*)")
SOURCE = re.compile(r"\s-c\s+(?!-c\s)(\S+)")
# What torch and ninja say of themselves in every build.
DROPPED = re.compile(r"Emitting ninja build file |Compiling objects\.\.\.|Allowing ninja to set |ninja: no work to do")
LINES_IN_A_LOG = 10


class Progress:
    """Takes a build's output line by line and writes what is worth reading to `target`, a file descriptor."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.on_terminal = os.isatty(target)
        self.unfinished = False  # the terminal's cursor stands behind a line of progress

    def write(self, text: str) -> None:
        os.write(self.target, text.encode(errors="replace"))

    def take(self, line: str) -> None:
        """One line of output, without its end."""
        status = STATUS.match(line)
        if status:
            self.advance(int(status[1]), int(status[2]), source_of(status[3]))
        elif not DROPPED.match(line):
            self.close()
            self.write(line + "\n")

    def advance(self, done: int, total: int, what: str) -> None:
        text = f"compiled {done} of {total}: {what}"
        if self.on_terminal:
            width = shutil.get_terminal_size().columns - 1
            self.write(f"\r{text[:width]}\x1b[K")
            self.unfinished = True
        elif done * LINES_IN_A_LOG // total > (done - 1) * LINES_IN_A_LOG // total:
            self.write(text + "\n")

    def close(self) -> None:
        """Ends a line of progress, so that what follows has a line of its own."""
        if self.unfinished:
            self.write("\n")
            self.unfinished = False


def source_of(command: str) -> str:
    """The source that a command compiles, from csrc/ on where it lies there."""
    source = SOURCE.search(command)
    if source is None:
        return command[:60]
    return source[1].rpartition("/csrc/")[2] if "/csrc/" in source[1] else Path(source[1]).name


def follow(pipe: int, progress: Progress) -> None:
    with os.fdopen(pipe, errors="replace") as lines:
        for line in lines:
            progress.take(line.rstrip("\n"))
    progress.close()


@contextmanager
def shown() -> Iterator[None]:
    """Within, what this process and its children write to file descriptor 1 is shown in short."""
    if os.environ.get("V", "0") not in ("", "0"):
        yield
        return
    sys.stdout.flush()
    target = os.dup(1)
    readable, writable = os.pipe()
    os.dup2(writable, 1)
    os.close(writable)
    before = os.environ.get("NINJA_STATUS")
    os.environ["NINJA_STATUS"] = NINJA_STATUS
    reader = threading.Thread(target=follow, args=(readable, Progress(target)), daemon=True)
    reader.start()
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(target, 1)
        # A compiler cache that the build started may hold the pipe open: what it writes is not waited for.
        reader.join(timeout=5)
        os.environ.pop("NINJA_STATUS")
        if before is not None:
            os.environ["NINJA_STATUS"] = before
