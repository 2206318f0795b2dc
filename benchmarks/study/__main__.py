"""The study's commands, from benchmarks/: python -m study plan small --device cpu --out ../runs/study."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch

from . import report, texts
from .models import ATTENTION
from .runner import make_runs, result_path, unmade
from .runs import PLANS, TASKS, make_task
from .step_times import measure_steps
from .training import Run, read_results, write_json

RESULTS = Path(__file__).resolve().parents[1] / "results" / "study"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m study", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, about: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=about)
        command.add_argument("--device", default=DEVICE, choices=("cuda", "cpu"))
        command.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
        return command

    plan = add("plan", "make the runs of plans that do not exist yet")
    plan.add_argument("plans", nargs="+", choices=tuple(PLANS), metavar="PLAN", help=", ".join(PLANS))
    plan.add_argument("--jobs", type=int, default=1, help="runs side by side")
    plan.add_argument("--seconds", type=float, default=math.inf, help="stop after so long; the next call goes on")
    plan.add_argument("--retry", action="store_true", help="make failed runs again")
    plan.add_argument("--dry-run", action="store_true", help="only say what would be done")
    one = add("one", "make one run")
    one.add_argument("--task", required=True, choices=tuple(TASKS))
    one.add_argument("--model", required=True, choices=tuple(ATTENTION))
    one.add_argument("--lr", type=float, required=True)
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--tokens", type=int, default=0)
    one.add_argument("--seconds", type=float, default=0.0)
    add("report", "fill docs/study.md and its pictures from the results")
    commands.add_parser("texts", help="prepare the real texts: apt-get download, dpkg -x, strip; into runs/texts")
    steps = add("steps", "time training steps of a task, each model alone, at each length")
    steps.add_argument("--task", default="recall", choices=tuple(TASKS))
    steps.add_argument("--models", nargs="+", default=["full", "nsa"], choices=tuple(ATTENTION), metavar="MODEL")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 1 if a run failed."""
    options = parse(arguments)
    if options.command == "texts":
        print(json.dumps(texts.prepare(), indent=1))
        return 0
    if options.command == "report":
        report.write(options.out)
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        print("study: error: --device cuda, but torch sees no GPU", file=sys.stderr)
        return 2
    if options.command == "steps":
        rows = measure_steps(options.models, make_task(options.task), torch.device(options.device))
        write_json(options.out / f"_steps_{options.task}.json", rows | {"task": options.task})
        return 0
    try:
        runs = _one(options) if options.command == "one" else _planned(options)
    except ValueError as error:
        print(f"study: error: {error}", file=sys.stderr)
        return 2
    if options.command == "plan" and options.dry_run:
        return 0
    started = time.monotonic()
    limits = {"jobs": options.jobs, "seconds": options.seconds} if options.command == "plan" else {}
    statuses = make_runs(runs, options.out, device=options.device, **limits)
    counts = {status: list(statuses.values()).count(status) for status in sorted(set(statuses.values()))}
    print(f"{counts} in {time.monotonic() - started:.0f} s; results are in {options.out}")
    return int("failed" in counts)


def _one(options: argparse.Namespace) -> list[Run]:
    return [Run(options.task, options.model, options.lr, options.seed, options.tokens, options.seconds)]


def _planned(options: argparse.Namespace) -> list[Run]:
    runs = list(dict.fromkeys(run for name in options.plans for run in PLANS[name](options.out)))
    if options.retry:
        for result in read_results(options.out):
            if result["status"] == "failed":
                (options.out / f"{result['name']}.json").unlink()
    todo = unmade(runs, options.out)
    print(f"{len(runs)} runs, {len(todo)} to make: {sum(run.tokens for run in todo) / 1e6:g} million tokens", end="")
    print(f" and {sum(run.seconds for run in todo):g} s")
    for run in runs:
        print(f"  {'to make' if run in todo else 'exists '}  {result_path(options.out, run).name}")
    return runs


if __name__ == "__main__":
    raise SystemExit(main())
