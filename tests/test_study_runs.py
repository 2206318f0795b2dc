"""The study's runs: they stop, go on, fail and are skipped as they should."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from study import report, runner, training
from study.__main__ import main
from study.layers import Shape
from study.recall import Recall
from study.runs import PLANS, make_task
from study.step_times import measure_steps, write_times
from study.tasks import Stage, stage_at
from study.training import Run, Trainer, execute, rate

CPU = torch.device("cpu")
BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
RESULTS = sorted((BENCHMARKS / "results" / "study").glob("[!_]*.json"))
TINY = Shape(hidden=16, layers=1, heads=2, kv_heads=1, head_dim=8)
RUN = Run("recall-small", "full", 3e-3, 0, tokens=8192)


def test_stages_follow_their_shares_and_the_rate_rises_and_falls() -> None:
    stages = (Stage(128, 1), Stage(256, 1), Stage(512, 2))
    assert [stage_at(stages, p).length for p in (0, 0.24, 0.25, 0.5, 0.99, 1)] == [128, 128, 256, 512, 512, 512]
    assert rate(0) < 0.1 and rate(training.WARMUP) == 1 == rate(training.DECAY)
    assert rate(1) == pytest.approx(training.LAST)


@pytest.mark.parametrize("name", [run.model for run in PLANS["small"](Path())])
def test_every_model_learns_something(name: str, tmp_path: Path) -> None:
    result = execute(
        Run("recall-small", name, 3e-3, 0, tokens=24576), make_task("recall-small"), CPU, tmp_path / "c.pt"
    )
    assert result is not None and result["status"] == "done"
    assert result["curve"][-1]["loss"] < math.log(32) - 0.5
    assert set(result["scores"]["accuracy"]) == {"64", "128"}


def test_a_stopped_run_goes_on_to_the_same_model(tmp_path: Path) -> None:
    task, whole, cut = make_task("recall-small"), tmp_path / "whole.pt", tmp_path / "cut.pt"
    one = Trainer(RUN, task, CPU, whole)
    assert one.train(lambda progress: None, math.inf)
    assert execute(RUN, task, CPU, cut, deadline=-math.inf) is None  # after some steps, not after all
    two = Trainer(RUN, task, CPU, cut)
    assert 0 < two.step < one.step or two.step == one.step
    assert two.train(lambda progress: None, math.inf)
    assert (two.step, two.tokens, two.resumed) == (one.step, one.tokens, 1)
    for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True):
        assert torch.equal(a, b)
    other = Run("recall-small", "full", 1e-3, 0, tokens=8192)
    with pytest.raises(ValueError, match="of another run"):
        Trainer(other, task, CPU, cut if cut.exists() else whole)


def test_what_exists_is_skipped_and_what_fails_is_told(tmp_path: Path) -> None:
    runs = [RUN, Run("recall-small", "full", 1e9, 0, tokens=8192), Run("nothing", "full", 1e-3, 0, tokens=1)]
    statuses = runner.make_runs(runs, tmp_path, device="cpu", quiet=True)
    assert statuses == {runs[0].name: "done", runs[1].name: "diverged", runs[2].name: "failed"}
    assert runner.make_runs(runs, tmp_path, device="cpu", quiet=True) == {}
    results = {result["name"]: result for result in training.read_results(tmp_path)}
    assert "task must be one of" in results[runs[2].name]["reason"]
    assert not list((tmp_path / "checkpoints").glob("*.pt"))


def test_processes_end_with_the_command_that_started_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed:
        def is_alive(self) -> bool:
            return False

    def leave(status: int) -> None:
        raise SystemExit(status)

    monkeypatch.setattr(runner.multiprocessing, "parent_process", Killed)
    monkeypatch.setattr(runner.os, "_exit", leave)
    with pytest.raises(SystemExit):
        runner._work(RUN, tmp_path, "cpu", 1, math.inf, False, None)
    assert not list(tmp_path.glob("*.json"))


def test_time_instead_of_tokens_ends_a_run(tmp_path: Path) -> None:
    result = execute(Run("recall-small", "full", 1e-3, 0, seconds=0.5), make_task("recall-small"), CPU, tmp_path / "c")
    assert result is not None and 0.5 <= result["seconds"] < 5 and result["steps"] >= training.TIMED_STEPS
    with pytest.raises(ValueError, match="tokens or seconds"):
        Run("recall", "full", 1e-3, 0)


def test_command_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "study", *RUN.command.split()[3:], "--device", "cpu", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=BENCHMARKS, check=True, capture_output=True, text=True)
    assert "'done': 1" in done.stdout
    result = json.loads((tmp_path / f"{RUN.name}.json").read_text())
    assert result["command"] == RUN.command and result["run"]["tokens"] == 8192
    planned = [sys.executable, "-m", "study", "plan", "small", "--dry-run", "--out", str(tmp_path)]
    done = subprocess.run(planned, cwd=BENCHMARKS, check=True, capture_output=True, text=True)
    assert f"{len(PLANS['small'](tmp_path))} to make" in done.stdout
    assert "exists   " not in done.stdout


def test_kept_weights_are_the_trained_ones_and_can_be_drawn(tmp_path: Path) -> None:
    run, picture = Run("recall-small", "nsa", 3e-3, 0, tokens=2048), tmp_path / "layers.png"
    assert runner.make_runs([run], tmp_path, device="cpu", keep=True, quiet=True) == {run.name: "done"}
    trained = Trainer(run, make_task("recall-small"), CPU, tmp_path / "again.pt")
    trained.train(lambda progress: None, math.inf)
    kept = torch.load(tmp_path / "checkpoints" / f"{run.name}.weights", weights_only=True)
    assert all(torch.equal(kept[name], value) for name, value in trained.model.state_dict().items())
    command = ["layers", run.name, "--length", "128", "--picture", str(picture), "--device", "cpu"]
    assert main([*command, "--out", str(tmp_path)]) == 0
    assert picture.stat().st_size > 1000
    assert main(["layers", "none", "--picture", str(picture), "--device", "cpu", "--out", str(tmp_path)]) == 2


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["full+conv", "nsa+conv", "bigbird", "nsa-no-window"])
def test_recorded_steps_train_as_eager_ones_do(name: str, tmp_path: Path) -> None:
    cuda, run, notes = torch.device("cuda"), Run("recall-small", name, 3e-3, 0, tokens=81920), []
    for graphs in (True, False):
        trainer = Trainer(run, make_task("recall-small"), cuda, tmp_path / "c.pt", graphs=graphs)
        assert trainer.train(lambda progress: None, math.inf)
        assert trainer.make_step.not_recorded == ""
        notes.append([note["loss"] for note in trainer.notes])
    assert notes[0] == pytest.approx(notes[1], rel=0.05)
    assert notes[0][-1] < notes[0][0]


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_results_say_where_they_come_from(path: Path) -> None:
    result: dict[str, Any] = json.loads(path.read_text())
    assert result["name"] == path.stem == Run(**result["run"]).name
    assert result["status"] in ("done", "diverged", "stopped", "failed")
    assert "unknown" not in result["commit"] and "changed" not in result["commit"]
    assert result["command"] == Run(**result["run"]).command


def test_page_shows_what_was_measured(tmp_path: Path) -> None:
    page = tmp_path / "study.md"
    page.write_text(report.PAGE.read_text())
    report.write(BENCHMARKS / "results" / "study", page, tmp_path)
    assert page.read_text() == report.PAGE.read_text(), "run `python -m study report` in benchmarks/"
    assert (tmp_path / "study-recall.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="no place <!-- none -->"):
        report.fill("<!-- some -->\n<!-- /some -->", "none", "")


def test_the_pages_sentences_have_no_scores() -> None:
    """Those stand in the places that the report fills; what is left are settings, and what guessing is worth."""
    prose = re.sub(r"<!-- ([\w-]+) -->.*?<!-- /\1 -->", "", report.PAGE.read_text(), flags=re.DOTALL)
    assert set(re.findall(r"\b0\.\d{2,}\b", prose)) <= {"0.016", "0.03", "0.05", "0.95"}


def test_tables_have_means_over_seeds_at_the_best_rate() -> None:
    results = []
    for lr, seed, right in ((1e-3, 0, 0.5), (2e-3, 0, 0.8), (5e-4, 0, 0.1), (2e-3, 1, 0.6)):
        run = {"task": "recall", "model": "nsa", "lr": lr, "seed": seed, "tokens": 7, "seconds": 0.0}
        scores = {"accuracy": {"128": {"32": right}}}
        results.append({"run": run, "status": "done", "scores": scores, "peak_bytes": 2e9})
    lines = report.recall_table(results, "recall", 7, {"nsa": 2e6}).splitlines()
    assert lines[2] == "| nsa | 0.002 | 2 | 0.700 ± 0.141 | 14.0 | 2.00 |"
    run = results[1]["run"] | {"model": "full", "lr": 5e-4}
    for lr in (5e-4, 1e-3, 2e-3):
        scores = {"accuracy": {"128": {"32": 0.2}, "256": {"32": 0.6 if lr < 1e-3 else 0.0}}}
        results.append({"run": run | {"lr": lr}, "status": "done", "scores": scores, "peak_bytes": 1e9})
    paired = report.paired_table(results, "recall", 7, [("nsa", "full"), ("nsa", "none")]).splitlines()
    assert paired[2:] == ["| nsa | full | 0 | 0.200 |"]
    assert report.sweep_table(results, "recall", 7).splitlines()[2] == "| nsa | 0.100 | 0.500 | 0.700 ± 0.141 |"


def test_needle_table_has_means_over_depths_and_seeds() -> None:
    results = []
    for seed, found in enumerate(([1.0, 0.5], [0.5, 0.0])):
        run = {"task": "needle-ten", "model": "nsa", "lr": 1e-3, "seed": seed, "tokens": 1500000, "seconds": 0.0}
        scores = {"needle": {"codes": {"64": [1.0, 1.0], "128": found}, "digits": {"64": [1.0] * 2, "128": [0.9] * 2}}}
        results.append({"run": run, "status": "done", "scores": scores})
    assert report.needle_table(results, "needle-ten", (64, 128)).splitlines()[2] == (
        "| nsa | 0.001 | 1.5 M | 2 | 1.000 ± 0.000 | 0.500 ± 0.354 | 0.900 ± 0.000 |"
    )
    assert report.needle_table(results, "needle", (64, 128)) == "No run yet: `python -m study plan needle`."


def test_long_language_is_set_against_the_peer_of_the_same_seed() -> None:
    results = []
    for model, seed, bits in (("full", 0, 3.0), ("full", 1, 4.0), ("nsa", 1, 3.5), ("full", 2, 9.0)):
        run = {"task": "language-32k", "model": model, "lr": 1e-3, "seed": seed, "tokens": 8000000, "seconds": 0.0}
        scores = {"language": {"1024": {"bits_per_byte": 0.0}, "32768": {"bits_per_byte": bits}}}
        results.append({"run": run, "status": "done", "scores": scores})
    peers = {"nsa": "full", "nsa+conv": "full+conv"}
    assert report.long_language_table(results, "language-32k", peers).splitlines()[2:] == [
        "| full | 0.001 | 8 M | 3 | 5.333 ± 3.215 |  |",
        "| nsa | 0.001 | 8 M | 1 | 3.500 | -0.500 |",
    ]


def test_step_times_of_other_models_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "steps.json"
    task = Recall(lengths=(64, 128), num_keys=16, shape=TINY, tokens_per_step=128, mlp_width=8)
    measured = [measure_steps([name], task, CPU) for name in ("full", "window")]
    for rows in measured:
        write_times(path, rows)
    rows = json.loads(path.read_text())["rows"]
    assert [(row["model"], row["length"]) for row in rows] == [(m, n) for m in ("full", "window") for n in (64, 128)]
    assert all(row["ms"] > 0 and row["seconds_per_million"] > 0 for row in rows)
    write_times(path, measured[1] | {"device": "another"})
    assert {row["model"] for row in json.loads(path.read_text())["rows"]} == {"window"}
