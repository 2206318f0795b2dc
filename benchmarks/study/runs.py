"""Which runs there are: every task by its name, and plans, each of which answers one question."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from .language import Language, Needle
from .layers import Shape
from .recall import Recall
from .tasks import Task
from .training import Run, read_results

SMALL = Shape(hidden=64, layers=2, heads=4, kv_heads=1, head_dim=16)
MINI = Shape(hidden=64, layers=2, heads=4, kv_heads=1, head_dim=32)
MINI_NEEDLE = Shape(hidden=128, layers=2, heads=4, kv_heads=1, head_dim=32, rope_theta=1e6)
ON_CPU = (
    "small",
    "mini",
    "mini-seeds",
    "mini-teachers",
    "mini-listed",
    "mini-needle",
)  # plans that no GPU is needed for
MINI_MODELS = ("full+conv", "mini-nsa+conv", "mini-nsa-dropped+conv", "mini-nsa-random+conv", "mini-nsa-shared+conv")
COMPARED = ("nsa-dropped+conv", "nsa+conv", "full+conv", "nsa", "full", "window")
TEACHERS = ("nsa-taught+conv", "nsa-scaled+conv", "nsa-explored+conv", "nsa-open+conv", "nsa-dropped50+conv")
SHARPER = ("nsa-sharp512+conv", "nsa-taught512+conv", "nsa-sharp+conv", "nsa-taught512-dropped+conv")
MINI_LISTED = ("mini-reformer", "mini-nsa", "mini-bigbird", "mini-longformer", "full")
MINI_TEACHERS = ("mini-nsa-taught+conv", "mini-nsa-scaled+conv", "mini-nsa-explored+conv", "mini-nsa-open+conv")
LISTED = ("longformer", "bigbird")
ABLATIONS = (
    "nsa-no-compressed",
    "nsa-no-selected",
    "nsa-no-window",
    "nsa-linear",
    "nsa-mean",
    "nsa-random",
    "nsa-n4",
    "nsa-n8",
    "nsa-block32",
    "nsa-block128",
)
TIMED_AS = {
    "mqar": "recall",
    "needle-8k": "needle",
    "needle-rare": "needle",
    "needle-ten": "needle",
}  # whose steps are of the same sizes
RATES = (1e-3, 2e-3, 5e-4)
SEEDS = (0, 1, 2)
RECALL_TOKENS, REFORMER_TOKENS = 32_000_000, 8_000_000
SHORT_NEEDLE_TOKENS, NEEDLE_TOKENS, RARE_NEEDLE_TOKENS, TEN_NEEDLE_TOKENS = (
    16_000_000,
    40_000_000,
    30_000_000,
    30_000_000,
)
SWEPT_NEEDLE = ("needle-8k", SHORT_NEEDLE_TOKENS)
RARE_PEERS = {"nsa+conv": "full+conv", "nsa-dropped+conv": "full+conv"}
NEEDLE_PEERS = RARE_PEERS | {"nsa": "full"}
NEEDLE_MODELS = ("full+conv", "nsa-dropped+conv", "nsa+conv", "nsa", "full")
LANGUAGE_TOKENS = 16_000_000
LANGUAGE_MODELS = ("nsa", "full", "nsa+conv", "full+conv")
SWEPT_LANGUAGE = ("language", LANGUAGE_TOKENS)
LANGUAGE_PEERS = {"nsa": "full", "nsa+conv": "full+conv"}
LONG_LANGUAGE_TOKENS = 8_000_000
TIME_ASKED = 0.6  # of full attention's time, to its final loss
PEERS = {
    "nsa": "full",
    "nsa+conv": "full+conv",
    "nsa-dropped+conv": "full+conv",
    "window": "full",
}  # in whose time a model is trained too
SMALL_TOKENS, MINI_TOKENS, MINI_NEEDLE_TOKENS = 120_000, 2_500_000, 1_600_000

Plan = Callable[[Path], list[Run]]  # of the folder of results: some plans follow from what is there

TASKS: dict[str, Callable[[], Task]] = {
    "recall": Recall,
    "recall-long": lambda: Recall(lengths=(2048, 4096, 8192)),
    "mqar": lambda: Recall(kind="mqar"),
    "language": Language,
    "language-32k": lambda: Language(length=32768, scored=(1024, 8192, 32768)),
    "language-code": lambda: Language(split="code"),
    "needle": Needle,
    "needle-8k": lambda: Needle(lengths=(512, 1024, 2048, 4096, 8192)),
    "needle-4": lambda: Needle(needles=4),
    "needle-rare": lambda: Needle(rare=26, distinct=True, shares=(5, 3, 4, 4, 4, 3, 3, 4), scored_texts=8),
    "needle-ten": lambda: Needle(
        signs=3, rare=10, shares=(10, 3, 2, 2, 2, 2, 3, 6), scored_texts=8, scored_together=1 << 18
    ),
    "needle-mini": lambda: Needle(
        lengths=(256, 512), shares=(7, 3), signs=3, rare=10, shape=MINI_NEEDLE, tokens_per_step=2048, mlp_width=128,
        reference="mini-nsa+conv", scored_together=1 << 14,
    ),
    "recall-mini": lambda: Recall(
        lengths=(64, 128, 256, 512), num_keys=64, num_values=16, num_noise=16, spacing=16, shape=MINI,
        tokens_per_step=2048, mlp_width=64, reference="mini-nsa+conv", evaluated_tokens=32768,
    ),
    "recall-small": lambda: Recall(
        lengths=(64, 128), num_keys=16, num_values=8, num_noise=8, shape=SMALL, tokens_per_step=1024, mlp_width=64,
        evaluated_tokens=4096,
    ),
}  # fmt: skip


@lru_cache(maxsize=8)
def make_task(name: str) -> Task:
    """ValueError for a name that TASKS has not."""
    if name not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {name!r}")
    return TASKS[name]()


def sweep(task: str, models: tuple[str, ...], tokens: int) -> Plan:
    """Every model at every rate, first seed."""
    return lambda out: [Run(task, model, lr, SEEDS[0], tokens) for lr in RATES for model in models]


def seeds(task: str, models: tuple[str, ...], tokens: int) -> Plan:
    """Every model at the best rate of its sweep, with the other seeds."""

    def plan(out: Path) -> list[Run]:
        rates = best_rates(read_results(out), task, tokens)
        return [
            Run(task, model, rates[model], seed, tokens) for seed in SEEDS[1:] for model in models if model in rates
        ]

    return plan


def equal_time(
    task: str,
    pairs: dict[str, str],
    tokens: int,
    *,
    share: float = 1.0,
    swept: tuple[str, int] | None = None,
    lr: float | None = None,
    seeds: tuple[int, ...] = SEEDS,
) -> Plan:
    """Each model with the tokens that it can take in `share` of the time that its peer takes for `tokens`, both alone.

    Times are those of `python -m study steps`, so that runs may be made side by side, on any machine. Rates are the
    best of the sweep of a task with so many tokens, this one or `swept`; or `lr` for all.
    """

    def plan(out: Path) -> list[Run]:
        results = read_results(out)
        rates = dict.fromkeys(pairs, lr) if lr else best_rates(results, *(swept or (task, tokens)))
        cost = seconds_per_million(out, task)
        runs = []
        for seed in seeds:
            for model, peer in pairs.items():
                if model in rates and {model, peer} <= set(cost):
                    fitting = round(share * tokens * cost[peer] / cost[model], -5)
                    runs.append(Run(task, model, rates[model], seed, int(fitting)))
        return runs

    return plan


def at_best_rates(
    task: str, models: tuple[str, ...], tokens: int, swept: tuple[str, int], *, seeds: tuple[int, ...] = SEEDS
) -> Plan:
    """Every model at the best rate of another task's sweep."""

    def plan(out: Path) -> list[Run]:
        rates = best_rates(read_results(out), *swept)
        return [Run(task, model, rates[model], seed, tokens) for seed in seeds for model in models if model in rates]

    return plan


def together(*plans: Plan) -> Plan:
    """Their runs, all first seeds first."""
    return lambda out: sorted((run for plan in plans for run in plan(out)), key=lambda run: run.seed)


def score(result: dict[str, Any]) -> float:
    """What rates are chosen by: mean accuracy over lengths and numbers of pairs; the fewest bits; codes found."""
    scores = result["scores"]
    if "accuracy" in scores:
        cells = [cell for row in scores["accuracy"].values() for cell in row.values()]
    elif "language" in scores:
        cells = [-row["bits_per_byte"] for row in scores["language"].values()]
    else:
        cells = [cell for row in scores["needle"]["digits"].values() for cell in row]
    return sum(cells) / len(cells)


def best_rates(results: list[dict[str, Any]], task: str, tokens: int) -> dict[str, float]:
    """For each model whose sweep is complete its best rate; a run that failed is no candidate."""
    found: dict[str, dict[float, float]] = {}
    for result in results:
        run = result["run"]
        if (run["task"], run["tokens"], run["seed"]) == (task, tokens, SEEDS[0]) and run["lr"] in RATES:
            value = score(result) if result["status"] != "failed" else float("-inf")
            found.setdefault(run["model"], {})[run["lr"]] = value
    return {model: max(row, key=row.__getitem__) for model, row in found.items() if len(row) == len(RATES)}


def seconds_per_million(out: Path, task: str) -> dict[str, float]:
    """Of each model measured by `python -m study steps`, over the curriculum's shares of tokens."""
    path = out / f"_steps_{TIMED_AS.get(task, task)}.json"
    if not path.exists():
        return {}
    stages = make_task(task).sizes.stages
    share = {stage.length: stage.share / sum(s.share for s in stages) for stage in stages}
    cost: dict[str, float] = {}
    for row in json.loads(path.read_text())["rows"]:
        cost[row["model"]] = cost.get(row["model"], 0.0) + share.get(row["length"], 0.0) * row["seconds_per_million"]
    return cost


def predicted_seconds(out: Path, runs: list[Run]) -> float | None:
    """What the runs take, each alone, by step times; a model without has the slowest's. None: a task without any."""
    total = 0.0
    for run in runs:
        cost = seconds_per_million(out, run.task) or seconds_per_million(out, run.task.split("-")[0])
        if run.tokens and not cost:
            return None
        total += run.seconds or cost.get(run.model, max(cost.values())) * run.tokens / 1e6
    return total


def ablations(task: str, of: str, models: tuple[str, ...], tokens: int) -> Plan:
    """NSA without a part, or with another one, at the rate that is best for `of`; all seeds."""

    def plan(out: Path) -> list[Run]:
        rate = best_rates(read_results(out), task, tokens).get(of)
        return [Run(task, model, rate, seed, tokens) for seed in SEEDS for model in models] if rate else []

    return plan


def first(task: str, models: tuple[str, ...], tokens: int, lr: float = 1e-3) -> Plan:
    """One run of each model, to see where to look."""
    return lambda out: [Run(task, model, lr, SEEDS[0], tokens) for model in models]


PLANS: dict[str, Plan] = {
    "small": lambda out: [
        Run("recall-small", model, 3e-3, 0, SMALL_TOKENS) for model in (*COMPARED, *LISTED, "reformer")
    ],
    "mini": first("recall-mini", MINI_MODELS, MINI_TOKENS, lr=3e-3),
    "mini-seeds": lambda out: [
        Run("recall-mini", model, 3e-3, seed, MINI_TOKENS) for seed in SEEDS[1:] for model in MINI_MODELS[:3]
    ],
    "mini-teachers": first("recall-mini", MINI_TEACHERS, MINI_TOKENS, lr=3e-3),
    "mini-listed": first("recall-mini", MINI_LISTED, MINI_TOKENS, lr=3e-3),
    "mini-needle": first("needle-mini", ("mini-nsa+conv", "full+conv"), MINI_NEEDLE_TOKENS, lr=2e-3),
    "recall-sweep": sweep("recall", COMPARED, RECALL_TOKENS),
    "recall-seeds": seeds("recall", COMPARED, RECALL_TOKENS),
    "recall-time": equal_time("recall", PEERS, RECALL_TOKENS),
    "recall-listed-sweep": sweep("recall", LISTED, RECALL_TOKENS),
    "recall-listed-seeds": seeds("recall", LISTED, RECALL_TOKENS),
    "recall-choice": first("recall", ("nsa-shared+conv", "nsa-random+conv", "nsa-dropped"), RECALL_TOKENS),
    "recall-long": first("recall-long", ("full+conv", "nsa+conv"), RECALL_TOKENS),
    "recall-teachers": first("recall", TEACHERS, RECALL_TOKENS),
    "recall-taught-sweep": sweep("recall", TEACHERS[:2], RECALL_TOKENS),
    "recall-taught-seeds": seeds("recall", TEACHERS[:2], RECALL_TOKENS),
    "recall-sharper": first("recall", SHARPER, RECALL_TOKENS),
    "recall-sharp-sweep": sweep("recall", SHARPER[:1], RECALL_TOKENS),
    "recall-sharp-seeds": seeds("recall", SHARPER[:1], RECALL_TOKENS),
    "mqar-first": first("mqar", COMPARED, RECALL_TOKENS),
    "mqar-sweep": sweep("mqar", COMPARED, RECALL_TOKENS),
    "mqar-seeds": seeds("mqar", COMPARED, RECALL_TOKENS),
    "recall-ablations": ablations("recall", "nsa", ABLATIONS, RECALL_TOKENS),
    "recall-reformer-first": first("recall", ("reformer",), REFORMER_TOKENS),
    "recall-reformer-sweep": sweep("recall", ("reformer",), RECALL_TOKENS),
    "recall-reformer-seeds": seeds("recall", ("reformer",), RECALL_TOKENS),
    "needle-8k-sweep": sweep("needle-8k", NEEDLE_MODELS, SHORT_NEEDLE_TOKENS),
    "needle": at_best_rates("needle", ("full+conv", "full"), NEEDLE_TOKENS, SWEPT_NEEDLE, seeds=SEEDS[:1]),
    "needle-time": equal_time("needle", NEEDLE_PEERS, NEEDLE_TOKENS, swept=SWEPT_NEEDLE, seeds=SEEDS[:1]),
    "needle-rare": together(
        at_best_rates("needle-rare", ("full+conv",), RARE_NEEDLE_TOKENS, SWEPT_NEEDLE, seeds=SEEDS[:2]),
        equal_time("needle-rare", RARE_PEERS, RARE_NEEDLE_TOKENS, swept=SWEPT_NEEDLE, seeds=SEEDS[:2]),
        at_best_rates("needle-rare", ("full",), RARE_NEEDLE_TOKENS, SWEPT_NEEDLE, seeds=SEEDS[:1]),
        equal_time("needle-rare", {"nsa": "full"}, RARE_NEEDLE_TOKENS, swept=SWEPT_NEEDLE, seeds=SEEDS[:1]),
    ),
    "needle-ten": together(
        lambda out: [Run("needle-ten", "full+conv", RATES[0], seed, TEN_NEEDLE_TOKENS) for seed in SEEDS],
        equal_time("needle-ten", RARE_PEERS, TEN_NEEDLE_TOKENS, lr=RATES[0]),
    ),
    "language-first": lambda out: [
        Run("language", model, RATES[0], seed, LANGUAGE_TOKENS) for seed in SEEDS for model in COMPARED
    ],
    "language-sweep": sweep("language", LANGUAGE_MODELS, LANGUAGE_TOKENS),
    "language-seeds": seeds("language", LANGUAGE_MODELS, LANGUAGE_TOKENS),
    "language-32k": together(
        at_best_rates("language-32k", ("full", "full+conv"), LONG_LANGUAGE_TOKENS, SWEPT_LANGUAGE),
        equal_time("language-32k", LANGUAGE_PEERS, LONG_LANGUAGE_TOKENS, share=TIME_ASKED, swept=SWEPT_LANGUAGE),
    ),
}
