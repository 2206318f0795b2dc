"""What a run leaves behind for its reader: results as JSON, and a table."""

from __future__ import annotations

import json
import platform
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import nsa_torch

from .checkpoint import write_atomically
from .config import Config
from .data import Corpus
from .training import Trainer


def run_results(trainer: Trainer) -> dict[str, Any]:
    """Figures of one model's training. Losses in bits per byte."""
    history, config = trainer.history, trainer.config
    trained = trainer.step * config.batch * config.context
    return {
        "parameters": trainer.model.parameter_count(),
        "steps": trainer.step,
        "bytes_trained_on": trained,
        "validation_bits_per_byte": history.validation[-1][1],
        "train_seconds": history.train_seconds,
        "total_seconds": history.total_seconds,
        "cpu_seconds": history.cpu_seconds,
        "bytes_per_second": trained / history.train_seconds,
        "sessions": history.sessions,
        "validation": history.validation,
        "train": history.train,
    }


def environment() -> dict[str, Any]:
    """What the figures depend on besides the settings."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "nsa_torch": nsa_torch.__version__,
        "platform": platform.platform(),
        "processor": processor_name(),
        "threads": torch.get_num_threads(),
        "cuda_device": device,
    }


def processor_name() -> str:
    """The processor's name where the system tells it, else its architecture."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def corpus_summary(corpus: Corpus) -> dict[str, Any]:
    """Where the text comes from, how much there is, and its fingerprint."""
    return {
        "source": corpus.source,
        "train_files": corpus.train_files,
        "train_bytes": len(corpus.train),
        "validation_files": corpus.validation_files,
        "validation_bytes": len(corpus.validation),
        "sha256": corpus.fingerprint,
    }


def write_results(path: Path, config: Config, results: dict[str, Any]) -> None:
    """Write results as JSON, with the command line, the settings and the environment."""
    settings = {name: value for name, value in asdict(config).items() if name != "attention"}
    head = {"command": sys.argv, "environment": environment(), "settings": settings}
    text = json.dumps(head | results, indent=1) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def table(runs: dict[str, dict[str, Any]]) -> str:
    """One line a model."""
    header = ("attention", "parameters", "steps", "held-out bits/byte", "training s", "bytes/s")
    rows = [header] + [
        (
            name,
            f"{run['parameters']:,}",
            f"{run['steps']:,}",
            f"{run['validation_bits_per_byte']:.4f}",
            f"{run['train_seconds']:.1f}",
            f"{run['bytes_per_second']:,.0f}",
        )
        for name, run in runs.items()
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
