"""Everything that decides what a run computes, and the command line that sets it."""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
NSA_ONLY = ("block_size", "block_stride", "select_size", "num_selected", "window")


@dataclass(frozen=True)
class Config:
    """Settings of one model's training. Two runs with equal settings and text give equal losses."""

    attention: str = "nsa"
    device: str = "cpu"
    dtype: str = "fp32"
    compile: bool = False
    seed: int = 0
    context: int = 1024
    batch: int = 2
    steps: int = 600
    learning_rate: float = 0.02
    hidden_size: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    block_size: int = 16
    block_stride: int = 8
    select_size: int = 32
    num_selected: int = 6
    window: int = 64
    validate_every: int = 50
    validation_windows: int = 32

    def settings(self) -> dict[str, Any]:
        """What decides this model's losses, by name, as a checkpoint keeps it."""
        unused = NSA_ONLY if self.attention == "dense" else ()
        return {name: value for name, value in asdict(self).items() if name not in unused}


HELP = {
    "device": "where to train: cpu, cuda, cuda:1, ...",
    "dtype": "bf16: matrix products and attention under autocast; weights stay float32",
    "compile": "compile the model with torch.compile",
    "seed": "seed of the weights and of the order of the data",
    "context": "bytes in a window",
    "batch": "windows in a step",
    "steps": "optimizer steps",
    "learning_rate": "peak learning rate of Muon; AdamW, for all but the matrices, has 0.4 of it",
    "hidden_size": "width of the model",
    "layers": "number of transformer layers",
    "heads": "query heads",
    "kv_heads": "key/value heads",
    "block_size": "NSA: compression block length l",
    "block_stride": "NSA: compression stride d",
    "select_size": "NSA: selection block length l'",
    "num_selected": "NSA: blocks read per query n, one initial and two local ones included",
    "window": "NSA: sliding window w",
    "validate_every": "steps between two measurements on held-out text",
    "validation_windows": "windows of held-out text to measure on",
}


def build_parser() -> argparse.ArgumentParser:
    """The command line of examples/train.py."""
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Train a byte-level language model with Native Sparse Attention, and the same "
        "model with dense attention. Run the same command again to go on after a stop.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--attention", choices=["both", "nsa", "dense"], default="both")
    parser.add_argument(
        "--data",
        metavar="PATH",
        help="a file, or a folder whose files are read; without it the source files of the Python "
        "standard library on this machine",
    )
    parser.add_argument("--out", default="runs/demo", help="folder for all that a run writes")
    parser.add_argument("--restart", action="store_true", help="ignore checkpoints in --out")
    parser.add_argument("--checkpoint-every", type=int, default=25, help="steps between two checkpoints")
    parser.add_argument("--prompt", default="import os\n\n\ndef ", help="text a sample begins with")
    parser.add_argument("--sample-bytes", type=int, default=400, help="bytes to sample")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 takes the likeliest byte")
    for field in fields(Config):
        if field.name == "attention":
            continue
        option = "--" + field.name.replace("_", "-")
        if isinstance(field.default, bool):
            parser.add_argument(option, action="store_true", help=HELP[field.name])
        else:
            parser.add_argument(
                option,
                type=type(field.default),
                default=field.default,
                choices=list(DTYPES) if field.name == "dtype" else None,
                help=HELP[field.name],
            )
    return parser


def parse_arguments(arguments: list[str] | None = None) -> tuple[argparse.Namespace, Config]:
    """Parse and check the command line; a bad option ends the program with a message."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    names = [field.name for field in fields(Config) if field.name != "attention"]
    config = Config(**{name: getattr(options, name) for name in names})
    for problem in problems(options, config):
        parser.error(problem)
    return options, config


def problems(options: argparse.Namespace, config: Config) -> list[str]:
    """What is wrong with the options, in the words of the command line."""
    found = [
        f"--{name.replace('_', '-')} {value}: must be at least 1"
        for name, value in (config.settings() | vars(options)).items()
        if type(value) is int and name not in ("seed", "sample_bytes") and value < 1
    ]
    if options.sample_bytes < 0:
        found.append(f"--sample-bytes {options.sample_bytes}: must not be negative")
    if not config.learning_rate > 0:
        found.append(f"--learning-rate {config.learning_rate}: must be positive")
    if not options.temperature >= 0:
        found.append(f"--temperature {options.temperature}: must not be negative")
    if not options.prompt:
        found.append("--prompt: must not be empty")
    return found or shape_problems(config) + device_problems(config.device)


def shape_problems(config: Config) -> list[str]:
    """Sizes that do not fit each other; every size is already known to be positive."""
    found = []
    if config.hidden_size % (2 * config.heads):
        found.append(
            f"--hidden-size {config.hidden_size}: must be a multiple of twice --heads "
            f"({config.heads}), so that rotary embeddings find pairs"
        )
    if config.heads % config.kv_heads:
        found.append(f"--heads {config.heads}: must be a multiple of --kv-heads {config.kv_heads}")
    for name in ("block_size", "select_size"):
        if getattr(config, name) % config.block_stride:
            found.append(
                f"--{name.replace('_', '-')} {getattr(config, name)}: must be a multiple of "
                f"--block-stride {config.block_stride}"
            )
    if config.num_selected < 3:
        found.append(f"--num-selected {config.num_selected}: must be at least 3, one initial and two local blocks")
    return found


def device_problems(name: str) -> list[str]:
    """Why a device cannot be used."""
    try:
        device = torch.device(name)
    except RuntimeError:
        return [f"--device {name}: not a device; cpu, cuda and cuda:N are"]
    if device.type == "cuda" and not torch.cuda.is_available():
        return [f"--device {name}: this PyTorch sees no CUDA device"]
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        return [f"--device {name}: only {torch.cuda.device_count()} CUDA device(s) are visible"]
    if device.type not in ("cpu", "cuda"):
        return [f"--device {name}: only cpu and cuda are supported"]
    return []
