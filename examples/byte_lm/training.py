"""The training loop: one model, one corpus, resumable at every checkpoint."""

from __future__ import annotations

import math
import resource
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from nsa_torch.checkpoints import VERSION

from .checkpoint import load_checkpoint, save_checkpoint
from .config import DTYPES, Config
from .data import Corpus, WindowSampler, validation_windows
from .model import ByteTransformer
from .muon import Muon

BITS_PER_NAT = 1 / math.log(2)
WARM_UP_SHARE = 0.05
FINAL_SHARE = 0.1
ADAMW_SHARE = 0.4
WEIGHT_DECAY = 0.1
GRADIENT_NORM = 1.0


class Interrupted(Exception):
    """The user asked to stop; the checkpoint named in the message is written."""


@dataclass
class History:
    """What a run has measured so far.

    train: bits per byte of every step's batch.
    validation: (step, bits per byte on held-out text, seconds of training so far).
    train_seconds: steps only; total_seconds and cpu_seconds include measuring and saving.
    sessions: how often the run was started or resumed.
    """

    train: list[float] = field(default_factory=list)
    validation: list[tuple[int, float, float]] = field(default_factory=list)
    train_seconds: float = 0.0
    total_seconds: float = 0.0
    cpu_seconds: float = 0.0
    sessions: int = 0


class Trainer:
    """Trains one model to the end of its schedule, from its checkpoint when there is one.

    Everything that decides the next step is in the checkpoint (weights, optimizer, position in the
    data, random state, step), so a run that was killed gives the losses of one that was not.
    """

    def __init__(self, config: Config, corpus: Corpus, checkpoint: Path, *, restart: bool) -> None:
        """Build model and optimizer, then take up the checkpoint unless `restart`.

        Raises:
            CheckpointError: the checkpoint was written with other settings or another text.
        """
        self.config = config
        self.corpus = corpus
        self.checkpoint = checkpoint
        self.device = torch.device(config.device)
        self.settings = config.settings() | {"text": corpus.fingerprint, "layer_version": VERSION}
        torch.manual_seed(config.seed)
        self.model = ByteTransformer(config).to(self.device)
        self.optimizers = make_optimizers(self.model, config)
        # The peaks: a resumed optimizer brings the rates of its last step.
        self.peak_rates = [group["lr"] for optimizer in self.optimizers for group in optimizer.param_groups]
        self.sampler = WindowSampler(corpus.train, config.batch, config.context, config.seed)
        self.history = History()
        self.step = 0
        self._random_states = random_states(self.device)
        state = None if restart else load_checkpoint(checkpoint, self.settings)
        if state is not None:
            self._restore(state)

    @property
    def finished(self) -> bool:
        """All steps are taken."""
        return self.step >= self.config.steps

    def run(self, checkpoint_every: int) -> None:
        """Train until the last step, measuring and saving on the way.

        Raises:
            Interrupted: by SIGINT or SIGTERM, after the step in hand is done and saved.
        """
        if self.finished:
            return
        self.history.sessions += 1
        set_random_states(self._random_states, self.device)
        model = torch.compile(self.model) if self.config.compile else self.model
        # Losses stay on the device until they are wanted: reading one waits for the device.
        losses: list[Tensor] = []
        clock = Clock(self.device, self.history)
        with StopRequest() as stop, self._progress_bar() as bar:
            while not self.finished:
                losses.append(self._train_step(model))
                self.step += 1
                bar.update()
                validate = self.step % self.config.validate_every == 0 or self.finished
                save = self.step % checkpoint_every == 0 or self.finished
                if validate or save or self.step % 10 == 0 or stop.requested:
                    self.history.train += [loss.item() * BITS_PER_NAT for loss in losses]
                    losses.clear()
                    clock.lap(training=True)
                if validate:
                    seconds = self.history.train_seconds
                    self.history.validation.append((self.step, self.validate(), seconds))
                    clock.lap(training=False)
                self._show(bar)
                # Losses not yet read would be missing from the checkpoint: the next step reads them then.
                stopping = stop.requested and not losses
                if save or stopping:
                    self._save()
                if stopping and not self.finished:
                    raise Interrupted(f"{self.checkpoint} holds step {self.step}")

    @torch.no_grad()
    def validate(self) -> float:
        """Bits per byte on the held-out windows."""
        self.model.eval()
        total = 0.0
        config = self.config
        for inputs, targets in validation_windows(
            self.corpus.validation, config.validation_windows, config.batch, config.context
        ):
            total += self._loss(self.model, inputs, targets).item() * len(inputs)
        self.model.train()
        return total / config.validation_windows * BITS_PER_NAT

    def _train_step(self, model: nn.Module) -> Tensor:
        loss = self._loss(model, *self.sampler.next())
        self.model.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), GRADIENT_NORM)
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        for group, peak_rate in zip(groups, self.peak_rates, strict=True):
            group["lr"] = peak_rate * schedule(self.step, self.config.steps)
        for optimizer in self.optimizers:
            optimizer.step()
        return loss.detach()

    def _loss(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        inputs = inputs.to(self.device, non_blocking=True)
        targets = targets.to(self.device, non_blocking=True)
        dtype = DTYPES[self.config.dtype]
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype != torch.float32):
            logits = model(inputs)
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    def _progress_bar(self) -> tqdm:
        terminal = sys.stderr.isatty()
        return tqdm(
            desc=f"{self.config.attention:>5}",
            initial=self.step,
            total=self.config.steps,
            unit="step",
            # A log file gets a line now and then in place of a bar that redraws itself.
            mininterval=0.1 if terminal else 15.0,
            dynamic_ncols=terminal,
        )

    def _show(self, bar: tqdm) -> None:
        shown = {}
        if self.history.train:
            shown["train"] = f"{self.history.train[-1]:.3f}"
        if self.history.validation:
            shown["held-out"] = f"{self.history.validation[-1][1]:.3f} bits/byte"
        bar.set_postfix(shown, refresh=False)

    def _save(self) -> None:
        state = {
            "settings": self.settings,
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "data_position": self.sampler.generator.get_state(),
            "random_states": random_states(self.device),
            "history": dict(vars(self.history)),
        }
        save_checkpoint(self.checkpoint, state)

    def _restore(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.sampler.generator.set_state(state["data_position"])
        self._random_states = state["random_states"]
        self.history = History(**state["history"])


def make_optimizers(model: nn.Module, config: Config) -> list[torch.optim.Optimizer]:
    """Muon for the matrices that map activations, AdamW for embeddings, position encodings and vectors.

    Muon (orthogonalized momentum) takes a model of this size in a few hundred steps to where AdamW alone is far from.
    """
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        maps = parameter.ndim == 2 and name.startswith("layers.") and not name.endswith(".pe")
        (matrices if maps else others).append(parameter)
    return [
        Muon(matrices, lr=config.learning_rate, weight_decay=WEIGHT_DECAY),
        torch.optim.AdamW(
            others, lr=ADAMW_SHARE * config.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        ),
    ]


def schedule(step: int, steps: int) -> float:
    """Share of the peak learning rate: linear warm-up, then a cosine down to FINAL_SHARE."""
    warm_up = max(1, round(WARM_UP_SHARE * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    done = (step - warm_up) / max(1, steps - warm_up)
    return FINAL_SHARE + (1 - FINAL_SHARE) * 0.5 * (1 + math.cos(math.pi * done))


def random_states(device: torch.device) -> dict[str, Tensor]:
    """State of torch's global random generators, by device type."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_states(states: dict[str, Tensor], device: torch.device) -> None:
    """Undo what has happened to torch's global random generators since `random_states`."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)


class Clock:
    """Adds the time since the last lap, wall and processor, to a history."""

    def __init__(self, device: torch.device, history: History) -> None:
        self.device = device
        self.history = history
        self.wall, self.processor = time.perf_counter(), processor_seconds()

    def lap(self, *, training: bool) -> None:
        """End a stretch of training, or of anything else."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        wall, processor = time.perf_counter(), processor_seconds()
        self.history.total_seconds += wall - self.wall
        self.history.cpu_seconds += processor - self.processor
        if training:
            self.history.train_seconds += wall - self.wall
        self.wall, self.processor = wall, processor


def processor_seconds() -> float:
    """Processor time of this process so far, all threads, user and system."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


class StopRequest:
    """Turns the first SIGINT or SIGTERM into a flag; a second one acts as it always did."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *exception: object) -> None:
        self._reset()

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self._reset()
        tqdm.write("stopping after this step; once more to stop at once", file=sys.stderr)

    def _reset(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
