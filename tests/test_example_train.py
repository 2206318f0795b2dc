"""examples/train.py: a run end to end, killed and resumed, its data, its options, and sampling through the cache."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import nsa_torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import train
from byte_lm import training
from byte_lm.attention_view import view_attention
from byte_lm.checkpoint import load_checkpoint, save_checkpoint, write_atomically
from byte_lm.config import Config
from byte_lm.data import DataError, WindowSampler, choose_held_out, load_corpus, standard_library_files
from byte_lm.model import ByteTransformer
from byte_lm.plots import block_states
from byte_lm.sample import sample

SIZES = {
    "context": 96, "batch": 2, "steps": 24, "hidden_size": 32, "layers": 2, "heads": 4, "kv_heads": 2, "block_size": 8,
    "block_stride": 4, "select_size": 8, "num_selected": 4, "window": 12, "validate_every": 5, "validation_windows": 3,
}  # fmt: skip
OPTIONS = [part for name, value in SIZES.items() for part in ("--" + name.replace("_", "-"), str(value))]
OPTIONS += ["--checkpoint-every", "3", "--sample-bytes", "12"]
RUNS = ["nsa", "dense"]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """These models are too small to share out, and a killed run must sum in the order of the others."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small files, one of them not text."""
    folder = tmp_path_factory.mktemp("text")
    for index in range(12):
        (folder / f"{index}.txt").write_text("".join(f"{index} + {i} = {index + i}\n" for i in range(60)))
    (folder / "binary").write_bytes(bytes(range(256)) * 2)
    return folder


@pytest.fixture(scope="module")
def uninterrupted(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that a run which nobody stopped has written."""
    out = tmp_path_factory.mktemp("uninterrupted")
    assert train.main([*OPTIONS, "--data", str(text), "--out", str(out)]) == 0
    return out


def results_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "results.json").read_text())


def assert_same_losses(out: Path, expected: Path) -> None:
    got, want = results_of(out)["runs"], results_of(expected)["runs"]
    assert got.keys() == want.keys()
    for name, run in want.items():
        assert got[name]["train"] == run["train"]
        assert [v[:2] for v in got[name]["validation"]] == [v[:2] for v in run["validation"]]
        assert got[name]["sample"] == run["sample"]


def test_a_run_leaves_results_and_figures(uninterrupted: Path) -> None:
    results = results_of(uninterrupted)
    assert list(results["runs"]) == RUNS
    assert results["settings"] | SIZES == results["settings"]
    assert results["environment"]["torch"] == torch.__version__
    assert results["text"]["train_bytes"] > results["text"]["validation_bytes"] > SIZES["context"]
    for run in results["runs"].values():
        assert run["steps"] == len(run["train"]) == SIZES["steps"]
        assert [step for step, _, _ in run["validation"]] == [5, 10, 15, 20, 24]
        assert run["validation"][0][1] > run["validation_bits_per_byte"] == run["validation"][-1][1]
        assert run["bytes_per_second"] > 0
        assert run["sessions"] == 1
    nsa, dense = (results["runs"][name] for name in RUNS)
    assert results["nsa_over_dense"] == nsa["validation_bits_per_byte"] / dense["validation_bits_per_byte"]
    assert nsa["parameters"] > dense["parameters"]
    assert len(nsa["gate_means"]) == SIZES["layers"]
    for name in RUNS:
        assert len((uninterrupted / name / "sample.txt").read_bytes()) == len("import os\n\n\ndef ") + 12
    for figure in ("losses.png", "attention.png"):
        assert (uninterrupted / figure).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert not list(uninterrupted.rglob("*.partial"))


def test_a_killed_run_goes_on_as_if_it_had_not_been(text: Path, uninterrupted: Path, tmp_path: Path) -> None:
    arguments = [*OPTIONS, "--data", str(text), "--out", str(tmp_path)]
    command = [sys.executable, train.__file__, *arguments]
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(nsa_torch.__file__).parents[1])}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | environment)
    checkpoint = tmp_path / "nsa" / "checkpoint.pt"
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert 0 < torch.load(checkpoint)["step"] < SIZES["steps"]

    assert train.main(arguments) == 0
    assert_same_losses(tmp_path, uninterrupted)
    assert results_of(tmp_path)["runs"]["nsa"]["sessions"] == 2


@pytest.mark.parametrize("stopped", RUNS)
def test_an_interrupted_run_saves_and_goes_on(
    stopped: str, text: Path, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    validate = training.Trainer.validate

    def validate_and_interrupt(trainer: training.Trainer) -> float:
        if trainer.config.attention == stopped and trainer.step == 10:
            signal.raise_signal(signal.SIGINT)
        return validate(trainer)

    arguments = [*OPTIONS, "--data", str(text), "--out", str(tmp_path)]
    handler = signal.getsignal(signal.SIGINT)  # ignored, where the tests run in the background of a script
    with monkeypatch.context() as patch:
        patch.setattr(training.Trainer, "validate", validate_and_interrupt)
        assert train.main(arguments) == train.STOPPED_BY_USER
    assert "the same command goes on" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is handler
    assert torch.load(tmp_path / stopped / "checkpoint.pt")["step"] in (10, 11)

    assert train.main(arguments) == 0
    assert_same_losses(tmp_path, uninterrupted)


def test_other_settings_are_refused_and_named(
    text: Path, uninterrupted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*OPTIONS, "--data", str(text), "--out", str(uninterrupted), "--steps", "30", "--window", "16"]
    before = (uninterrupted / "nsa" / "checkpoint.pt").read_bytes()
    assert train.main(arguments) == 1
    message = capsys.readouterr().err
    assert "steps: 24 in the checkpoint, 30 now" in message
    assert "window: 12 in the checkpoint, 16 now" in message
    assert "--restart" in message
    assert (uninterrupted / "nsa" / "checkpoint.pt").read_bytes() == before


def test_another_text_is_refused(uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other.txt"
    other.write_text("something else " * 200)
    assert train.main([*OPTIONS, "--data", str(other), "--out", str(uninterrupted)]) == 1
    assert "text: " in capsys.readouterr().err


def test_restart_and_bfloat16(text: Path, tmp_path: Path) -> None:
    arguments = ["--data", str(text), "--out", str(tmp_path), "--attention", "nsa"]
    assert train.main([*OPTIONS, *arguments, "--steps", "4"]) == 0
    assert train.main([*OPTIONS, *arguments, "--steps", "6", "--dtype", "bf16", "--restart"]) == 0
    results = results_of(tmp_path)
    assert list(results["runs"]) == ["nsa"]
    assert len(results["runs"]["nsa"]["train"]) == 6
    assert (tmp_path / "attention.png").exists()


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"settings": {}, "step": 1})

    def fail(file: Any) -> None:
        file.write(b"half")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        write_atomically(path, fail)
    state = load_checkpoint(path, {})
    assert state is not None
    assert state["step"] == 1


def test_a_damaged_checkpoint_is_named(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = tmp_path / "dense" / "checkpoint.pt"
    checkpoint.parent.mkdir()
    checkpoint.write_bytes(b"not a checkpoint")
    assert train.main([*OPTIONS, "--data", str(text), "--out", str(tmp_path)]) == 1
    assert f"{checkpoint} is not a checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "nsa").exists(), "nothing is trained before all checkpoints are opened"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "0"], "--steps 0: must be at least 1"),
        (["--context", "many"], "argument --context: invalid int value: 'many'"),
        (["--attention", "linear"], "argument --attention: invalid choice: 'linear'"),
        (["--dtype", "fp8"], "argument --dtype: invalid choice: 'fp8'"),
        (["--heads", "3"], "--hidden-size 128: must be a multiple of twice --heads (3)"),
        (["--kv-heads", "3"], "--heads 4: must be a multiple of --kv-heads 3"),
        (["--block-size", "20"], "--block-size 20: must be a multiple of --block-stride 8"),
        (["--select-size", "20"], "--select-size 20: must be a multiple of --block-stride 8"),
        (["--num-selected", "2"], "--num-selected 2: must be at least 3"),
        (["--learning-rate", "nan"], "--learning-rate nan: must be positive"),
        (["--temperature", "-1"], "--temperature -1.0: must not be negative"),
        (["--sample-bytes", "-1"], "--sample-bytes -1: must not be negative"),
        (["--prompt", ""], "--prompt: must not be empty"),
        (["--device", "abacus"], "--device abacus: not a device"),
        (["--device", "meta"], "--device meta: only cpu and cuda"),
        (["--device", "cuda:99"], "--device cuda:99: "),
    ],
)
def test_bad_options(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        train.main(options)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_missing_or_short_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty").touch()
    (tmp_path / "short").write_bytes(b"x" * 150)
    cases = {
        "nowhere": "no such file or folder",
        "folder": "holds no files",
        "empty": "no bytes",
        "short": "--context 96",
    }
    for name, message in cases.items():
        with pytest.raises(DataError, match=message):
            load_corpus(str(tmp_path / name), SIZES["context"])
        assert train.main([*OPTIONS, "--data", str(tmp_path / name), "--out", str(tmp_path / "out")]) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_held_out_text_is_not_trained_on(text: Path) -> None:
    corpus = load_corpus(str(text), 96)
    train_text, held_out = (bytes(part.tolist()) for part in (corpus.train, corpus.validation))
    contents = {path.name: path.read_bytes() for path in text.iterdir()}
    for content in contents.values():
        assert (content in train_text) != (content in held_out)
    assert corpus.train_files + corpus.validation_files == len(contents)
    assert load_corpus(str(text), 96).fingerprint == corpus.fingerprint
    # One file, or one far larger than the rest: the end is held out.
    assert choose_held_out({"a": b"x" * 1000}) == set()
    assert choose_held_out({"a": b"x" * 1000, "b": b"y"}) == set()
    single = load_corpus(str(text / "3.txt"), 96)
    assert bytes(torch.cat((single.train, single.validation)).tolist()) == contents["3.txt"]


def test_hidden_files_are_left_out(tmp_path: Path) -> None:
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "object").write_bytes(b"a" * 500)
    (tmp_path / "text").write_bytes(b"b" * 500)
    corpus = load_corpus(str(tmp_path), 10)
    assert set(corpus.train.tolist()) | set(corpus.validation.tolist()) == {ord("b")}


def test_the_default_text_is_the_standard_library() -> None:
    root, files = standard_library_files()
    names = [file.relative_to(root).as_posix() for file in files]
    assert names == sorted(names, key=lambda name: Path(name).parts)
    assert {"os.py", "json/decoder.py"} <= set(names)
    assert not any("site-packages" in name or "/test/" in name for name in names)
    corpus = load_corpus(None, 1024)
    assert len(corpus.train) > 5_000_000
    assert 0.04 < len(corpus.validation) / len(corpus.train) < 0.15


def test_windows_are_the_next_bytes() -> None:
    text = torch.arange(50, dtype=torch.uint8)
    sampler = WindowSampler(text, batch=64, context=49, seed=3)
    inputs, targets = sampler.next()
    assert inputs.shape == targets.shape == (64, 49)
    assert torch.equal(inputs, torch.arange(49).expand(64, 49))
    assert torch.equal(targets, inputs + 1)


def make_model(attention: str) -> ByteTransformer:
    torch.manual_seed(0)
    model = ByteTransformer(Config(attention=attention, **SIZES)).double()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("attention", RUNS)
def test_greedy_sampling_through_the_cache_is_the_full_forward(attention: str) -> None:
    model = make_model(attention)
    text = list(b"for i in range(10):\n")
    start = len(text)
    with torch.no_grad():
        while len(text) < start + 60:
            text.append(int(model(torch.tensor([text]))[0, -1].argmax()))
    assert len(set(text[start:])) > 5, "a model that repeats one byte shows nothing"
    assert sample(model, bytes(text[:start]), 60, temperature=0, seed=0) == bytes(text[start:])


@pytest.mark.parametrize("attention", RUNS)
def test_chunks_through_the_cache_are_the_full_forward(attention: str) -> None:
    model = make_model(attention)
    text = torch.randint(0, 256, (2, 50))
    cache = model.make_cache(2, 50)
    with torch.no_grad():
        chunks = [model(chunk, cache) for chunk in text.split([17, 1, 20, 12], dim=1)]
        torch.testing.assert_close(torch.cat(chunks, dim=1), model(text))


def test_sampling_follows_its_seed() -> None:
    model = make_model("dense")
    texts = [sample(model, b"x", 20, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert sample(model, b"x", 0, temperature=1.0, seed=0) == b""


def test_the_view_of_the_attention() -> None:
    model = make_model("nsa")
    text = torch.randint(0, 256, (50,))
    view = view_attention(model, text)
    assert len(view.block_indices) == len(view.gates) == SIZES["layers"]
    assert view.gates[0].shape == (50, SIZES["heads"], 3)
    assert all(0 < mean < 1 for layer in view.gate_means() for mean in layer)
    states: Tensor = torch.from_numpy(block_states(view, 1, 0))
    assert states.shape == (50, 7)
    own = torch.arange(50) // SIZES["select_size"]
    block = torch.arange(7)
    assert torch.equal(states == 0, block > own[:, None])
    forced = (block <= own[:, None]) & ((block < 1) | (block > own[:, None] - 2))
    assert torch.equal(states == 2, forced)
    assert torch.equal((states >= 2).sum(1), torch.minimum(own + 1, torch.tensor(SIZES["num_selected"])))
