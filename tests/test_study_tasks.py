"""The study's tasks: what they ask, how they are scored, and the texts they are made of."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from study import report, texts
from study.language import DIGITS, RARE_BYTES, Language, Needle
from study.layers import Shape
from study.models import Decoder
from study.recall import Recall
from study.runs import score
from study.tasks import generator
from study.training import Run, execute

CPU = torch.device("cpu")
TINY = Shape(hidden=16, layers=1, heads=2, kv_heads=1, head_dim=8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Texts of one line each."""
    for split in texts.SPLITS:
        line = f"This is the {split} text, line {{}}, and it says {{}}.\n"
        text = "".join(line.format(i, hash((split, i)) % 9973) for i in range(400))
        (tmp_path / f"{split}.txt").write_text(text)
    return tmp_path


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


@pytest.mark.parametrize("needles", [1, 3])
def test_needles_are_in_the_text_and_all_asked_for_at_its_end(needles: int, folder: Path) -> None:
    task = Needle(needles=needles, folder=folder)
    batch = task.batch(400, 8, generator(CPU, 5))
    assert batch.positions is not None and batch.targets.shape == batch.positions.shape == (8, needles * DIGITS)
    sentence = re.compile(r"\nThe code of ([a-z]{4}) is (\d{6})\.\n")
    for tokens, targets, positions in zip(batch.tokens, batch.targets, batch.positions, strict=True):
        text, codes = bytes(tokens.tolist()).decode(), bytes(targets.tolist()).decode()
        assert [text[place + 1] for place in positions[:-1].tolist()] == list(codes[:-1])
        assert positions[-1] == len(text) - 1
        told = sentence.findall(text + codes[-1] + ".\n")  # each hidden one, then each answered question
        assert len(told) == 2 * needles and sorted(told[:needles]) == sorted(told[needles:])
        assert "".join(code for _, code in told[needles:]) == codes


def test_rare_codes_are_of_different_signs_that_no_text_has(folder: Path) -> None:
    task = Needle(rare=12, distinct=True, needles=2, folder=folder)
    batch = task.batch(400, 8, generator(CPU, 5))
    codes = batch.targets.unflatten(1, (2, DIGITS)).tolist()
    assert all(len(set(code)) == DIGITS and set(code) <= set(RARE_BYTES[:12]) for row in codes for code in row)
    assert len({code for row in codes for code in map(tuple, row)}) == 16
    assert not set(RARE_BYTES) & set(task.training.on(CPU).tolist())
    short = Needle(rare=2, signs=3, needles=2, folder=folder).batch(400, 8, generator(CPU, 5))
    assert short.targets.shape == (8, 6) and set(short.targets.flatten().tolist()) == set(RARE_BYTES[:2])


def test_needles_lie_at_their_depths_and_the_last_is_asked_for(folder: Path) -> None:
    task = Needle(needles=3, folder=folder)
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
