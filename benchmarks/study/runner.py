"""Many runs: several side by side, each in a process that lives on for the next; what exists is skipped.

A run that raises is written down as failed, with its error, and so are runs whose processes keep dying.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import time
import traceback
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from multiprocessing.managers import DictProxy
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .runs import make_task
from .training import Run, environment, execute, write_json

ATTEMPTS = 2  # pools of processes that die in a row without a new result


def result_path(out: Path, run: Run) -> Path:
    return out / f"{run.name}.json"


def checkpoint_path(out: Path, run: Run) -> Path:
    return out / "checkpoints" / f"{run.name}.pt"


def _work(
    run: Run, out: Path, device: str, jobs: int, deadline: float, keep: bool, progress: DictProxy[str, float] | None
) -> str:
    """Make one run and write its result. Returns its status, "unfinished" at the deadline."""
    if time.monotonic() > deadline:
        return "unfinished"
    place = torch.device(device)
    if place.type == "cpu" and jobs > 1:
        torch.set_num_threads(1)

    def report(done: float) -> None:
        parent = multiprocessing.parent_process()
        if parent is not None and not parent.is_alive():
            os._exit(1)  # a killed command must not go on behind the back of the next one
        if progress is not None:
            progress[run.name] = done

    checkpoint = checkpoint_path(out, run)
    try:
        task = make_task(run.task)
        result = execute(run, task, place, checkpoint, side_by_side=jobs, deadline=deadline, report=report, keep=keep)
    except Exception as error:
        result = _failure(run, device, repr(error), traceback.format_exc())
    if result is None:
        return "unfinished"
    write_json(result_path(out, run), result)
    checkpoint.unlink(missing_ok=True)
    if result["status"] == "failed" and progress is not None and not _usable(place):
        os._exit(1)  # after an error of the device nothing else works in this process
    return str(result["status"])


def _usable(place: torch.device) -> bool:
    try:
        torch.zeros(1, device=place).item()
    except RuntimeError:
        return False
    return True


def _failure(run: Run, device: str, reason: str, trace: str = "") -> dict[str, Any]:
    head = {"name": run.name, "run": asdict(run), "command": run.command, "status": "failed", "reason": reason}
    return head | {"traceback": trace} | environment(torch.device(device))


def unmade(runs: list[Run], out: Path) -> list[Run]:
    """The runs that have no result yet, each once."""
    return [run for run in dict.fromkeys(runs) if not result_path(out, run).exists()]


def make_runs(
    runs: list[Run],
    out: Path,
    *,
    device: str,
    jobs: int = 1,
    seconds: float = math.inf,
    keep: bool = False,
    quiet: bool = False,
) -> dict[str, str]:
    """Make the runs that do not exist yet; returns the status of each of those.

    Args:
        runs: in the order in which they start.
        out: folder of the results NAME.json; of checkpoints below it.
        device: "cuda" or "cpu".
        jobs: how many run side by side. Runs that a clock ends are made alone, after the others.
        seconds: stop after so long; what is under way goes on in the next call.
        keep: write the trained weights too.
        quiet: no progress bar.
    """
    deadline = time.monotonic() + seconds
    missing = unmade(runs, out)
    together, alone = ([r for r in missing if bool(r.tokens) == counted] for counted in (True, False))
    statuses: dict[str, str] = {}
    with tqdm(total=len(missing), unit="run", disable=quiet) as bar:
        for group, processes in ((together, jobs), (alone, 1)):
            _make_group(group, out, device, processes, deadline, keep, statuses, bar)
    return statuses


def _make_group(
    runs: list[Run],
    out: Path,
    device: str,
    jobs: int,
    deadline: float,
    keep: bool,
    statuses: dict[str, str],
    bar: tqdm[Any],
) -> None:
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        progress: DictProxy[str, float] = manager.dict()
        deaths = 0
        while left := [run for run in unmade(runs, out) if statuses.get(run.name) != "unfinished"]:
            if deaths == ATTEMPTS:
                break
            with ProcessPoolExecutor(min(jobs, len(left)), mp_context=context) as pool:
                futures = {pool.submit(_work, run, out, device, jobs, deadline, keep, progress): run for run in left}
                _watch(futures, statuses, progress, bar)
            deaths = deaths + 1 if len(unmade(left, out)) == len(left) else 0
        for run in left:
            write_json(result_path(out, run), _failure(run, device, f"its process died {deaths} times"))
            statuses[run.name] = "failed"


def _watch(
    futures: dict[Future[str], Run], statuses: dict[str, str], progress: DictProxy[str, float], bar: tqdm[Any]
) -> None:
    """Move the bar until all are done, or a process died, which breaks the others of its pool too."""
    waiting = set(futures)
    finished = bar.n - bar.n % 1
    while waiting:
        try:
            for future in as_completed(waiting, timeout=1.0):
                waiting.discard(future)
                run = futures[future]
                statuses[run.name] = future.result()
                progress.pop(run.name, None)
                finished += 1
                tqdm.write(f"{statuses[run.name]:10} {run.name}")
        except TimeoutError:
            pass
        except BrokenProcessPool:
            return
        bar.n = min(bar.total, round(finished + sum(progress.values()), 2))
        bar.refresh()
