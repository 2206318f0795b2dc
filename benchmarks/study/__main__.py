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
from .layer_reads import draw_layers
from .models import ATTENTION
from .runner import checkpoint_path, make_runs, unmade
from .runs import COMPARED, LISTED, ON_CPU, PLANS, TASKS, make_task, predicted_seconds
from .step_times import measure_steps, write_times
from .training import Run, read_results, weights_path

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
    plan.add_argument(
        "plans", nargs="+", choices=(*PLANS, "all"), metavar="PLAN", help=f"all, or of {', '.join(PLANS)}"
    )
    plan.add_argument("--jobs", type=int, default=1, help="runs side by side")
    plan.add_argument("--seconds", type=float, default=math.inf, help="stop after so long; the next call goes on")
    plan.add_argument("--retry", action="store_true", help="make failed runs again")
    plan.add_argument("--keep", action="store_true", help="keep the trained weights, in checkpoints/NAME.weights")
    plan.add_argument("--dry-run", action="store_true", help="only say what would be done")
    one = add("one", "make one run")
    one.add_argument("--task", required=True, choices=tuple(TASKS))
    one.add_argument("--model", required=True, choices=tuple(ATTENTION))
    one.add_argument("--lr", type=float, required=True)
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--tokens", type=int, default=0)
    one.add_argument("--seconds", type=float, default=0.0)
    one.add_argument("--keep", action="store_true", help="keep the trained weights, in checkpoints/NAME.weights")
    layers = add("layers", "draw what the layers of a run whose weights were kept read of a text")
    layers.add_argument("name", help="of the run")
    layers.add_argument("--length", type=int, default=8192, help="of the text")
    layers.add_argument("--picture", type=Path, required=True)
    add("report", "fill docs/study.md and its pictures from the results")
    commands.add_parser("texts", help="prepare the real texts: apt-get download, dpkg -x, strip; into runs/texts")
    steps = add("steps", "time training steps of a task, each model alone, at each length")
    steps.add_argument("--task", default="recall", choices=tuple(TASKS))
    steps.add_argument("--models", nargs="+", default=[*COMPARED, *LISTED], choices=tuple(ATTENTION), metavar="MODEL")
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
        write_times(options.out / f"_steps_{options.task}.json", rows | {"task": options.task})
        return 0
    try:
        return {"one": _one, "layers": _layers, "plan": _plans}[options.command](options)
    except (ValueError, FileNotFoundError) as error:
        print(f"study: error: {error}", file=sys.stderr)
        return 2


def _one(options: argparse.Namespace) -> int:
    run = Run(options.task, options.model, options.lr, options.seed, options.tokens, options.seconds)
    return _say(make_runs([run], options.out, device=options.device, keep=options.keep), options.out)


def _layers(options: argparse.Namespace) -> int:
    run = Run(**json.loads((options.out / f"{options.name}.json").read_text())["run"])
    weights, device = weights_path(checkpoint_path(options.out, run)), torch.device(options.device)
    print(draw_layers(run.model, weights, make_task(run.task), options.length, device, options.picture))
    return 0


def _plans(options: argparse.Namespace) -> int:
    """One plan after the other, since some follow from the results of those before."""
    if options.retry:
        for result in read_results(options.out):
            if result["status"] == "failed":
                (options.out / f"{result['name']}.json").unlink()
    names = [name for name in PLANS if name not in ON_CPU] if "all" in options.plans else options.plans
    end, failed = time.monotonic() + options.seconds, 0
    for name in names:
        runs = PLANS[name](options.out)
        missing = unmade(runs, options.out)
        seconds = None if name in ON_CPU else predicted_seconds(options.out, missing)
        time_needed = "" if seconds is None else f", about {seconds:.0f} s of the GPU"
        print(f"{name}: {len(runs)} runs, {len(missing)} to make{time_needed}", flush=True)
        if options.dry_run:
            print("".join(f"  {'to make' if run in missing else 'exists '}  {run.name}\n" for run in runs), end="")
        elif missing:
            left = end - time.monotonic()
            statuses = make_runs(
                runs, options.out, device=options.device, jobs=options.jobs, seconds=left, keep=options.keep
            )
            failed |= _say(statuses, options.out)
    return failed


def _say(statuses: dict[str, str], out: Path) -> int:
    """Print how many runs ended how; 1 if one failed."""
    counts = {status: list(statuses.values()).count(status) for status in sorted(set(statuses.values()))}
    print(f"{counts}; results are in {out}", flush=True)
    return int("failed" in counts)


if __name__ == "__main__":
    raise SystemExit(main())
