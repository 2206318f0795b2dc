"""Train a byte-level language model with Native Sparse Attention, and with dense attention.

    python examples/train.py                    # on the source of the Python standard library
    python examples/train.py --data ~/texts     # on any file or folder
    python examples/train.py --device cuda --dtype bf16 --context 8192

Run the same command again after a stop, or a kill: it goes on from the last checkpoint. Into --out
go results.json, losses.png, attention.png, and for each model its checkpoint and a sample.
"""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

from byte_lm.attention_view import view_attention
from byte_lm.checkpoint import CheckpointError, write_atomically
from byte_lm.config import Config, parse_arguments
from byte_lm.data import DataError, load_corpus
from byte_lm.plots import plot_attention, plot_losses
from byte_lm.report import corpus_summary, run_results, table, write_results
from byte_lm.sample import sample
from byte_lm.training import Interrupted, Trainer

VIEWED_BYTES = 2048
STOPPED_BY_USER = 130


def main(arguments: list[str] | None = None) -> int:
    """Train, sample, draw; returns the exit status."""
    options, config = parse_arguments(arguments)
    started = time.perf_counter()
    try:
        results = run(options, config)
    except (DataError, CheckpointError, OSError) as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        return 1
    except Interrupted as stop:
        print(f"stopped: {stop}; the same command goes on from there", file=sys.stderr)
        return STOPPED_BY_USER
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return STOPPED_BY_USER
    print(f"\n{table(results['runs'])}\n")
    if "nsa_over_dense" in results:
        change = 100 * (results["nsa_over_dense"] - 1)
        print(f"NSA's held-out loss against dense's: {change:+.2f} %")
    print(f"{time.perf_counter() - started:.0f} s in all; figures and results are in {options.out}")
    return 0


def run(options: Namespace, config: Config) -> dict[str, Any]:
    """All of a run but its last words; returns what results.json holds."""
    out = Path(options.out)
    corpus = load_corpus(options.data, config.context)
    print(f"{corpus.source}: {len(corpus.train):,} bytes to train on, {len(corpus.validation):,} held out")
    names = ["nsa", "dense"] if options.attention == "both" else [options.attention]
    # All checkpoints are opened first: a refusal must not come after an hour of the other model.
    trainers = {
        name: Trainer(
            replace(config, attention=name),
            corpus,
            out / name / "checkpoint.pt",
            restart=options.restart,
        )
        for name in names
    }
    for name, trainer in trainers.items():
        if trainer.step:
            print(f"{name}: goes on at step {trainer.step} of {config.steps}")
        trainer.run(options.checkpoint_every)

    results: dict[str, Any] = {
        "text": corpus_summary(corpus),
        "runs": {name: run_results(trainer) for name, trainer in trainers.items()},
    }
    for name, trainer in trainers.items():
        results["runs"][name] |= write_sample(trainer, options, out / name / "sample.txt")
    if "nsa" in trainers:
        results["runs"]["nsa"]["gate_means"] = draw_attention(trainers["nsa"], out)
    if len(trainers) == 2:
        losses = [results["runs"][name]["validation_bits_per_byte"] for name in names]
        results["nsa_over_dense"] = losses[0] / losses[1]
    plot_losses(
        {name: trainer.history for name, trainer in trainers.items()},
        f"Byte-level language model on {corpus.source}, context {config.context}",
        out / "losses.png",
    )
    write_results(out / "results.json", config, results)
    return results


def write_sample(trainer: Trainer, options: Namespace, path: Path) -> dict[str, Any]:
    """Sample through the cache, show the text and write it; returns the results to keep."""
    prompt = options.prompt.encode()
    started = time.perf_counter()
    text = sample(
        trainer.model,
        prompt,
        options.sample_bytes,
        temperature=options.temperature,
        seed=trainer.config.seed,
    )
    seconds = time.perf_counter() - started
    write_atomically(path, lambda file: file.write(prompt + text))
    shown = (prompt + text).decode(errors="replace")
    name = trainer.config.attention
    print(f"\n--- {name}: {len(text)} bytes sampled in {seconds:.1f} s ---\n{shown}")
    return {"sample": shown, "sample_seconds": seconds}


def draw_attention(trainer: Trainer, out: Path) -> list[list[float]]:
    """Draw what the NSA model reads of the first held-out bytes; returns mean gates by layer."""
    config = trainer.config
    length = min(config.context, VIEWED_BYTES)
    view = view_attention(trainer.model, trainer.corpus.validation[:length].long())
    plot_attention(
        view,
        f"What each query of {length} held-out bytes reads: at most {config.num_selected} selected "
        f"blocks of {config.select_size} bytes, and how far each branch's gate opens",
        out / "attention.png",
    )
    return view.gate_means()


if __name__ == "__main__":
    raise SystemExit(main())
