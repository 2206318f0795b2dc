"""Which runs there are: every task by its name, and plans, each a list of runs that answers one question."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from .language import Language, Needle
from .layers import Shape
from .recall import Recall
from .tasks import Task
from .training import Run

SMALL = Shape(hidden=64, layers=2, heads=4, kv_heads=1, head_dim=16)
FIRST_FIVE = ("full", "full+conv", "nsa", "nsa+conv", "window")
LISTED = ("longformer", "bigbird", "reformer")
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
RATES = (1e-3, 2e-3, 5e-4)
SEEDS = (0, 1, 2)
RECALL_TOKENS = 64_000_000
SMALL_TOKENS = 120_000

TASKS: dict[str, Callable[[], Task]] = {
    "recall": Recall,
    "mqar": lambda: Recall(kind="mqar"),
    "language": Language,
    "language-code": lambda: Language(split="code"),
    "needle": Needle,
    "needle-4": lambda: Needle(needles=4),
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


def sweep(task: str, models: tuple[str, ...], tokens: int) -> list[Run]:
    """Every model at every rate, first seed."""
    return [Run(task, model, lr, SEEDS[0], tokens) for lr in RATES for model in models]


PLANS: dict[str, list[Run]] = {
    "small": [Run("recall-small", model, 3e-3, 0, SMALL_TOKENS) for model in (*FIRST_FIVE, *LISTED)],
    "recall-sweep": sweep("recall", FIRST_FIVE, RECALL_TOKENS),
}
