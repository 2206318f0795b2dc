"""How long a training step takes, each model alone on the device, at each length of a task's curriculum."""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from .tasks import Task
from .training import Run, Trainer, environment, write_json

WARM, TIMED = 3, 7  # times that are left out and that count
TOGETHER = 4  # each time is of so many steps that follow one another; of fewer where a text is longer than a step


def measure_steps(models: list[str], task: Task, device: torch.device) -> dict[str, Any]:
    """Milliseconds of a step (the median), peak memory, and seconds for a million tokens."""
    rows, made_by = [], environment(device)
    for name in models:
        for length in [stage.length for stage in task.sizes.stages]:
            trainer = Trainer(Run("steps", name, 1e-3, 0, tokens=1 << 40), task, device, Path("none"))
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            times = []
            together = max(1, TOGETHER // max(1, length // task.sizes.tokens_per_step))
            for _ in range(WARM + TIMED):
                started = time.perf_counter()
                for _ in range(together):
                    loss = trainer.one_step(length)
                loss.item()
                times.append((time.perf_counter() - started) / together)
            median = statistics.median(times[WARM:])
            tokens = trainer.tokens // trainer.step
            row = {
                "commit": made_by["commit"],
                "model": name,
                "length": length,
                "ms": 1e3 * median,
                "seconds_per_million": 1e6 * median / tokens,
            }
            rows.append(row | {"peak_bytes": trainer.peak_bytes(), "parameters": trainer.sizes.parameters})
            print(f"{name:20} {length:6} {1e3 * median:8.2f} ms", flush=True)
    return {"rows": rows, "tokens_per_step": task.sizes.tokens_per_step} | made_by


def write_times(path: Path, measured: dict[str, Any]) -> None:
    """Write what was measured, and keep the rows of other models that the file has from the same device and step."""
    same = ("device", "tokens_per_step")
    if path.exists():
        before = json.loads(path.read_text())
        if all(before[name] == measured[name] for name in same):
            models = {row["model"] for row in measured["rows"]}
            kept = [row for row in before["rows"] if row["model"] not in models]
            measured = measured | {"rows": kept + measured["rows"]}
    write_json(path, measured)
