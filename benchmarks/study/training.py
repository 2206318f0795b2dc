"""One run: train a model on a task, stop and go on at any time, score it, and write what happened as JSON."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .layer_reads import layer_reads
from .models import Decoder, make_model
from .steps import Step
from .tasks import TRAINING, Task, generator, stage_at

MAX_SECONDS = 480.0  # of training; a run that needs more is recorded as stopped
CHECKPOINT_SECONDS = 30.0
WARMUP, DECAY, LAST = 0.05, 0.7, 0.05  # the rate rises until WARMUP, falls from DECAY on to LAST of itself
NOTE_EVERY = 50  # steps
TIMED_STEPS = 10  # the same, where the clock ends the run
DIVERGED = 20.0  # a loss above this, or one that is no number


@dataclass(frozen=True)
class Run:
    """What settles a run. `seconds` instead of a number of tokens: it trains for so long, alone on its device."""

    task: str
    model: str
    lr: float
    seed: int
    tokens: int = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        if (self.tokens > 0) == (self.seconds > 0):
            raise ValueError(f"a run has tokens or seconds above 0, one of them; got {self.tokens} and {self.seconds}")
        if not self.lr > 0:
            raise ValueError(f"lr must be above 0, got {self.lr}")

    @property
    def name(self) -> str:
        budget = f"{self.tokens / 1e6:g}M" if self.tokens else f"{self.seconds:g}s"
        return f"{self.task}_{self.model}_{budget}_lr{self.lr:g}_seed{self.seed}"

    @property
    def command(self) -> str:
        """What makes this run again, from benchmarks/."""
        budget = f"--tokens {self.tokens}" if self.tokens else f"--seconds {self.seconds:g}"
        return (
            f"python -m study one --task {self.task} --model {self.model} --lr {self.lr:g} --seed {self.seed} {budget}"
        )


class Diverged(Exception):
    """The loss is no number, or far above that of guessing."""


def rate(progress: float) -> float:
    """The learning rate's factor, `progress` (0 to 1) through a run."""
    rise = min(1.0, progress / WARMUP)
    fall = min(1.0, LAST + (1 - LAST) * (1 - progress) / (1 - DECAY))
    return max(0.01, rise) * fall


class Trainer:
    """The state of a run; `checkpoint` holds all of it."""

    def __init__(self, run: Run, task: Task, device: torch.device, checkpoint: Path, *, graphs: bool = True) -> None:
        self.run, self.task, self.device, self.checkpoint = run, task, device, checkpoint
        torch.manual_seed(run.seed)
        sizes = task.sizes
        model, self.sizes = make_model(run.model, sizes.vocabulary, sizes.shape, sizes.mlp_width, sizes.reference)
        self.model: Decoder = model.to(device)
        self.make_step = Step(self.model, device, weight_decay=sizes.weight_decay, graphs=graphs)
        self.step, self.tokens, self.seconds, self.resumed, self.peak = 0, 0, 0.0, 0, 0
        self.notes: list[dict[str, Any]] = []
        self.stages: dict[str, dict[str, float]] = {}
        if checkpoint.exists():
            self._load()

    def _load(self) -> None:
        state = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
        if state["run"] != asdict(self.run):
            raise ValueError(f"{self.checkpoint} is of another run: {state['run']}")
        self.model.load_state_dict(state["model"])
        self.make_step.optimizer.load_state_dict(state["optimizer"])
        for name in ("step", "tokens", "seconds", "notes", "stages", "peak"):
            setattr(self, name, state[name])
        self.resumed = state["resumed"] + 1

    def save(self) -> None:
        """Write the checkpoint whole or not at all."""
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        names = ("step", "tokens", "seconds", "notes", "stages", "resumed")
        state = {name: getattr(self, name) for name in names}
        state |= {"run": asdict(self.run), "model": self.model.state_dict(), "peak": self.peak_bytes()}
        state |= {"optimizer": self.make_step.optimizer.state_dict()}
        part = self.checkpoint.with_suffix(f".{os.getpid()}.part")
        torch.save(state, part)
        part.replace(self.checkpoint)

    def peak_bytes(self) -> int:
        now = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0
        return max(self.peak, now)

    @property
    def length(self) -> int:
        return stage_at(self.task.sizes.stages, self.progress).length

    @property
    def progress(self) -> float:
        done = self.tokens / self.run.tokens if self.run.tokens else self.seconds / self.run.seconds
        return min(1.0, done)

    def one_step(self, length: int) -> torch.Tensor:
        """The loss before the step, still on the device."""
        self.make_step.set_rate(self.run.lr * rate(self.progress))
        sequences = max(1, self.task.sizes.tokens_per_step // length)
        batch = self.task.batch(length, sequences, generator(self.device, TRAINING, self.run.seed, self.step))
        loss = self.make_step(batch)
        self.step += 1
        self.tokens += batch.tokens.numel()
        return loss

    def some_steps(self) -> None:
        """Steps of one length, whose time ends when the device has done them."""
        started, before = time.monotonic(), self.tokens
        length = self.length
        losses = [self.one_step(length)]
        while (
            len(losses) < (NOTE_EVERY if self.run.tokens else TIMED_STEPS)
            and self.length == length
            and self.progress < 1
        ):
            losses.append(self.one_step(length))
        mean = torch.stack(losses).mean().item()
        spent = time.monotonic() - started
        self.seconds += spent
        row = self.stages.setdefault(str(length), {"steps": 0, "tokens": 0, "seconds": 0.0})
        for name, more in (("steps", len(losses)), ("tokens", self.tokens - before), ("seconds", spent)):
            row[name] += more
        note: dict[str, Any] = {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": round(self.seconds, 3),
            "length": length,
        }
        self.notes.append(note | {"loss": round(mean, 5) if math.isfinite(mean) else str(mean)})
        if not mean < DIVERGED:
            raise Diverged(f"loss {mean} at step {self.step}")

    def train(self, report: Callable[[float], None], deadline: float) -> bool:
        """Train to the end, or until `deadline` (time.monotonic) or MAX_SECONDS; False if stopped before the end."""
        self.model.train()
        saved = time.monotonic()
        while self.progress < 1:
            self.some_steps()
            report(self.progress)
            now = time.monotonic()
            stop = self.progress < 1 and (self.seconds > MAX_SECONDS or now > deadline)
            if stop or now - saved > CHECKPOINT_SECONDS:
                self.save()
                saved = now
            if stop:
                return False
        return True


def weights_path(checkpoint: Path) -> Path:
    """Where a trained model's weights are kept."""
    return checkpoint.with_suffix(".weights")


def _commit() -> str:
    """Of this checkout, "-changed" behind it where the sources differ; "unknown" outside one."""
    root = Path(__file__).resolve().parents[2]
    try:
        head, changed = (
            subprocess.run(("git", *command), cwd=root, capture_output=True, text=True, check=True).stdout.strip()
            for command in (
                ("rev-parse", "--short=12", "HEAD"),
                ("status", "--porcelain", "--", "csrc", "nsa_torch", "benchmarks/study"),
            )
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{head}-changed" if changed else head


def environment(device: torch.device) -> dict[str, Any]:
    """What a result depends on besides the run."""
    return {
        "commit": os.environ.get("STUDY_COMMIT") or _commit(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
    }


def execute(
    run: Run,
    task: Task,
    device: torch.device,
    checkpoint: Path,
    *,
    side_by_side: int = 1,
    deadline: float = math.inf,
    report: Callable[[float], None] = lambda progress: None,
    keep: bool = False,
) -> dict[str, Any] | None:
    """Train and score a run; None if `deadline` came first: called again, it goes on.

    keep: write the weights too, beside the checkpoint (`weights_path`).

    The result's `status` is "done", "diverged" or "stopped" (MAX_SECONDS); the last two are scored as they are.
    """
    made_by = environment(device)  # before the sources can change
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    trainer = Trainer(run, task, device, checkpoint)
    status, reason = "done", ""
    try:
        if not trainer.train(report, deadline):
            if trainer.seconds <= MAX_SECONDS:
                return None
            status, reason = "stopped", f"{MAX_SECONDS:g} s of training"
    except Diverged as error:
        status, reason = "diverged", str(error)
    peak = trainer.peak_bytes()
    if keep:
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        torch.save(trainer.model.state_dict(), weights_path(checkpoint))
    started = time.monotonic()
    trainer.model.eval()
    scores = task.evaluate(trainer.model, device)
    result = {
        "name": run.name,
        "run": asdict(run),
        "command": run.command,
        "status": status,
        "reason": reason,
        "scores": scores,
        "layers": layer_reads(trainer.model, task, device),
        "sizes": asdict(task.sizes),
        "parameters": trainer.sizes.parameters,
        "mlp_width": trainer.sizes.width,
        "steps": trainer.step,
        "tokens": trainer.tokens,
        "seconds": round(trainer.seconds, 3),
        "evaluation_seconds": round(time.monotonic() - started, 3),
        "peak_bytes": peak,
        "side_by_side": side_by_side,
        "resumed": trainer.resumed,
        "not_recorded": trainer.make_step.not_recorded,
        "stages": trainer.stages,
        "curve": trainer.notes,
    }
    return result | made_by


def write_json(path: Path, result: dict[str, Any]) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(result, indent=1) + "\n")
    part.replace(path)


def read_results(out: Path) -> list[dict[str, Any]]:
    """All results of a folder, by name."""
    return [json.loads(path.read_text()) for path in sorted(out.glob("*.json")) if not path.name.startswith("_")]
