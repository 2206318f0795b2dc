"""The study's plans: which runs they hold, at which rates, and with how many tokens."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from study import models
from study.runs import (
    LANGUAGE_TOKENS,
    LONG_LANGUAGE_TOKENS,
    NEEDLE_TOKENS,
    PLANS,
    RATES,
    RECALL_TOKENS,
    SHORT_NEEDLE_TOKENS,
    TEN_NEEDLE_TOKENS,
    make_task,
    predicted_seconds,
)
from study.training import Run, write_json


def test_runs_of_a_plan_have_names_of_their_own(tmp_path: Path) -> None:
    for plan in PLANS.values():
        runs = plan(tmp_path)
        assert len({run.name for run in runs}) == len(set(runs))
        for run in runs:
            assert run.model in models.ATTENTION and make_task(run.task).sizes.stages


def test_seeds_and_equal_time_follow_from_the_sweep(tmp_path: Path) -> None:
    for lr, right in zip(RATES, (0.2, 0.9, 0.4), strict=True):
        run = Run("recall", "nsa", lr, 0, RECALL_TOKENS)
        scores = {"accuracy": {"128": {"32": right}}}
        write_json(tmp_path / f"{run.name}.json", {"run": asdict(run), "status": "done", "scores": scores})
    assert PLANS["recall-seeds"](tmp_path) == [Run("recall", "nsa", RATES[1], seed, RECALL_TOKENS) for seed in (1, 2)]
    assert PLANS["recall-time"](tmp_path) == []
    lengths = [stage.length for stage in make_task("recall").sizes.stages]
    cost = {"full": 1.0, "nsa": 2.0}
    rows = [{"model": name, "length": n, "seconds_per_million": s} for name, s in cost.items() for n in lengths]
    write_json(tmp_path / "_steps_recall.json", {"rows": rows})
    runs = PLANS["recall-time"](tmp_path)
    assert [(run.model, run.lr, run.seed, run.tokens) for run in runs] == [
        ("nsa", RATES[1], seed, RECALL_TOKENS // 2) for seed in (0, 1, 2)
    ]


def test_needle_runs_are_made_in_their_peers_time_at_the_rates_of_the_short_task(tmp_path: Path) -> None:
    for model in ("full+conv", "nsa-dropped+conv", "nsa+conv"):
        for lr in RATES:
            run = Run("needle-8k", model, lr, 0, SHORT_NEEDLE_TOKENS)
            cells = {"512": [0.5, 0.5 if lr == RATES[2] else 0.0]}
            scores = {"needle": {"codes": cells, "digits": cells}}
            write_json(tmp_path / f"{run.name}.json", {"run": asdict(run), "status": "done", "scores": scores})
    assert PLANS["needle"](tmp_path) == [Run("needle", "full+conv", RATES[2], 0, NEEDLE_TOKENS)]
    lengths = [stage.length for stage in make_task("needle").sizes.stages]
    cost = {"full+conv": 3.0, "nsa-dropped+conv": 2.0, "nsa+conv": 1.5}
    rows = [{"model": name, "length": n, "seconds_per_million": s} for name, s in cost.items() for n in lengths]
    write_json(tmp_path / "_steps_needle.json", {"rows": rows})
    runs = PLANS["needle-ten"](tmp_path)
    assert {run.lr for run in runs} == {RATES[0]}
    assert {run.lr for run in PLANS["needle-rare"](tmp_path)} == {RATES[2]}
    assert [(run.model, run.seed, run.tokens) for run in runs] == [
        (model, seed, round(TEN_NEEDLE_TOKENS * 3 / cost[model]))
        for seed in (0, 1, 2)
        for model in ("full+conv", "nsa+conv", "nsa-dropped+conv")
    ]
    assert predicted_seconds(tmp_path, runs[:1]) == pytest.approx(3.0 * TEN_NEEDLE_TOKENS * 1e-6)
    short = Run("needle-8k", "full+conv", 1e-3, 0, SHORT_NEEDLE_TOKENS)
    assert predicted_seconds(tmp_path, [short]) == pytest.approx(3.0 * SHORT_NEEDLE_TOKENS * 1e-6)


def test_a_share_of_the_peers_time_gives_that_share_of_tokens(tmp_path: Path) -> None:
    for model in ("full", "nsa"):
        for lr in RATES:
            run = Run("language", model, lr, 0, LANGUAGE_TOKENS)
            bits = {"language": {"8192": {"bits_per_byte": 2.0 if lr == RATES[1] else 3.0}}}
            write_json(tmp_path / f"{run.name}.json", {"run": asdict(run), "status": "done", "scores": bits})
    rows = [{"model": name, "length": 32768, "seconds_per_million": s} for name, s in (("full", 2.0), ("nsa", 1.0))]
    write_json(tmp_path / "_steps_language-32k.json", {"rows": rows})
    runs = PLANS["language-32k"](tmp_path)
    assert {(run.model, run.tokens, run.lr) for run in runs} == {
        ("full", LONG_LANGUAGE_TOKENS, RATES[1]),
        ("nsa", round(1.2 * LONG_LANGUAGE_TOKENS), RATES[1]),
    }
    assert [run.seed for run in runs] == [0, 0, 1, 1, 2, 2]
