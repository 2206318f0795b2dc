"""The study's tasks, and its runs: they stop, go on, fail and are skipped as they should."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from study import report, runner, texts, training
from study.language import DIGITS, Language, Needle
from study.layers import Shape
from study.models import Decoder
from study.recall import Recall
from study.runs import PLANS, make_task, score
from study.step_times import measure_steps, write_times
from study.tasks import Stage, generator, stage_at
from study.training import Run, Trainer, execute, rate

CPU = torch.device("cpu")
BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
RESULTS = sorted((BENCHMARKS / "results" / "study").glob("[!_]*.json"))
TINY = Shape(hidden=16, layers=1, heads=2, kv_heads=1, head_dim=8)
RUN = Run("recall-small", "full", 3e-3, 0, tokens=8192)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Texts of one line each."""
    for split in texts.SPLITS:
        line = f"This is the {split} text, line {{}}, and it says {{}}.\n"
        text = "".join(line.format(i, hash((split, i)) % 9973) for i in range(400))
        (tmp_path / f"{split}.txt").write_text(text)
    return tmp_path


# --- tasks ---


@pytest.mark.parametrize("kind", ["noise", "mqar"])
@pytest.mark.parametrize("length", [64, 100, 512])
def test_recall_asks_for_what_it_told(kind: str, length: int) -> None:
    task = Recall(kind=kind)
    batch = task.batch(length, 3, generator(CPU, 0, 1), spacing=16)
    assert batch.positions is not None
    for tokens, positions, targets in zip(batch.tokens, batch.positions, batch.targets, strict=True):
        text = tokens.tolist()
        assert len(set(positions.tolist())) == len(positions) == length // 16
        for position, target in zip(positions.tolist(), targets.tolist(), strict=True):
            told = text.index(text[position])
            assert told < position and text[told + 1] == target
            assert text.count(text[position]) == 2  # told once, asked for once
            assert task.num_keys <= target < task.num_keys + task.num_values


def test_distances_of_mqar_are_mostly_short() -> None:
    batch = Recall(kind="mqar").batch(1024, 64, generator(CPU, 0), spacing=64)
    assert batch.positions is not None
    gap = (batch.positions - 2 * 16).float()
    assert gap.min() == 0 and gap.max() > 900
    assert gap.median() < 200  # half of it, were they spread evenly


def test_needle_is_in_the_text_and_asked_for_at_its_end(folder: Path) -> None:
    task = Needle(needles=3, folder=folder)
    batch = task.batch(600, 4, generator(CPU, 5))
    for tokens, targets in zip(batch.tokens, batch.targets, strict=True):
        text, code = bytes(tokens.tolist()).decode(), bytes(targets.tolist()).decode()
        assert text.endswith(" is " + code[:-1])
        key = text.rpartition("\nThe code of ")[2][:4]
        assert f"\nThe code of {key} is {code}.\n" in text
    ends = task.hide(
        task.training.pieces(300, 2, generator(CPU, 1)),
        torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.5, 1.0]]),
        generator(CPU, 2),
    )
    starts = [
        bytes(row.tolist()).decode().find(f"is {bytes(code.tolist()).decode()}.")
        for row, code in zip(ends.tokens, ends.targets, strict=True)
    ]
    assert starts[0] < 20 and starts[1] > 200
    with pytest.raises(ValueError, match="length must be at least"):
        task.batch(50, 1, generator(CPU, 5))


def test_right_digits_count_only_together(folder: Path) -> None:
    class Copies(nn.Module):
        """Names the digits of the code by finding them in the text."""

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            out = torch.zeros(*tokens.shape, 256)
            for row, stream in zip(tokens, out, strict=True):
                text = bytes(row.tolist()).decode()
                key = text.rpartition("\nThe code of ")[2][:4]
                code = text.partition(f"\nThe code of {key} is ")[2][:DIGITS]
                for i, digit in enumerate(code):
                    stream[len(text) - DIGITS + i, ord(digit)] = 1
            return out

        def logits(self, stream: torch.Tensor) -> torch.Tensor:
            return stream

    task = Needle(lengths=(512,), depths=2, scored_texts=3, folder=folder)
    scores = task.evaluate(Copies(), CPU)["needle"]  # type: ignore[arg-type]
    assert scores == {"codes": {"512": [1.0, 1.0]}, "digits": {"512": [1.0, 1.0]}}


def test_language_is_scored_in_bits_by_position(folder: Path) -> None:
    task = Language(length=128, scored=(64, 128), shape=TINY, tokens_per_step=256, scored_bytes=2048, folder=folder)
    model = Decoder("full", 256, TINY, 8)
    nn.init.zeros_(model.head.weight)
    scores = task.evaluate(model, CPU)["language"]
    assert scores["64"]["bits_per_byte"] == pytest.approx(8)
    assert scores["128"]["by_position"] == {"0": pytest.approx(8), "64": pytest.approx(8)}
    batch = task.batch(128, 2, generator(CPU, 0))
    assert torch.equal(batch.tokens[:, 1:], batch.targets[:, :-1])
    with pytest.raises(FileNotFoundError, match="study texts"):
        Language(folder=folder / "none").batch(128, 1, generator(CPU, 0))


@pytest.mark.parametrize("kind", ["language", "needle"])
def test_tasks_on_texts_train_and_are_scored(kind: str, folder: Path, tmp_path: Path) -> None:
    task = (
        Language(length=256, scored=(128, 256), shape=TINY, tokens_per_step=512, scored_bytes=1024, folder=folder)
        if kind == "language"
        else Needle(lengths=(128, 256), depths=2, scored_texts=2, shape=TINY, tokens_per_step=512, folder=folder)
    )
    result = execute(Run(kind, "full+conv", 1e-2, 0, tokens=10240), task, CPU, tmp_path / "c.pt")
    assert result is not None and result["status"] == "done"
    losses = [note["loss"] for note in result["curve"]]
    assert losses[-1] < 5.5  # bytes by chance: 5.55
    assert score(result) <= 1
    if kind == "needle":
        assert (
            report.heat_maps([result], "needle", tmp_path / "map.png") and (tmp_path / "map.png").stat().st_size > 1000
        )
        assert not report.heat_maps([result], "needle-4", tmp_path / "none.png")


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


def test_prose_has_no_markup_and_no_navigation() -> None:
    page = (
        "<html><head><title>T</title></head><body><div class='navheader'><p>Up<p>Next</div><h1>Title</h1>\n"
        "<p>Some <b>bold</b>\n words &amp; more.<br>Next line.</p><pre>a\n  b</pre><nav>Home</nav></body></html>"
    )
    assert texts.prose(page) == "Title\n\nSome bold words & more.\nNext line.\n\na\n  b"


def test_repeated_paragraphs_are_left_out_across_documents() -> None:
    first, second = "one " * 60, "two " * 60
    documents = [f"{first}\n\nmenu", f"{second}\n\nmenu\n\n{first}", "short"]
    kept = list(texts.without_repeats(documents, set()))
    assert [document.count("menu") for document in kept] == [1, 0]
    assert kept[1].strip() == second.strip()


# --- runs ---


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
        runner._work(RUN, tmp_path, "cpu", 1, math.inf, None)
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
