"""Speed, memory and error of every op and of the whole on a GPU, against dense attention in the same process.

    python benchmarks/gpu.py                                 # 1k to 128k, into benchmarks/results/gpu-<model>.json
    python benchmarks/gpu.py --lengths 8k 64k --data random  # some of it
    python benchmarks/gpu.py --models                        # the whole at shapes of models, into gpu-<gpu>-models.json
    python benchmarks/gpu.py --million                       # adds 1M tokens with 16 query heads and 1 KV head
    python benchmarks/gpu.py --flex                          # adds flex_attention, compiled, beside the window branch

64 query heads, 4 KV heads, d 128, bf16, one sequence; with --models, the shapes of shapes.MODELS. Data are standard
normal numbers ("random"), or q and the keys are first-order autoregressive along the tokens, 0.95, of unit variance
("correlated"): then neighbouring queries choose much the same blocks; `shared_choices` says how much. Times are medians
by CUDA events, the L2 cache overwritten before each run; backward is alone, forward not included. Fields: `limit_ms` is
what the operations and bytes that the op needs at least (shapes.cost) take at the measured ceilings; `peak_bytes` the
most memory held with the inputs, of forward and backward together in a backward row; `error` the largest difference
from float64 on sampled rows, over the largest value: of the output, or of any gradient (of select_blocks: by how much a
block left out was better). `notes` says how each peer ran, or why not: torch's cuDNN and FlashAttention-2, and
FlashAttention-4 where the package flash-attn-4 can be imported. That one compiles its kernels when they are first
called: half a minute for each head dimension and group. benchmarks/table.py and benchmarks/plot.py make tables and
charts of the file.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from errors import errors
from peers import dense_peers, flex_window, other_nsa
from problems import Call, Problem, calls, make_problem, shared_choices
from shapes import MODELS, Shape, cost
from speed import ROOT, cpu_model, measured_commit
from timing import Ceilings, Device, bytes_of, measure_ceilings

OPS = ("compress", "compressed_attention", "select_blocks", "selected_attention", "window_attention", "nsa_attention")
Row = dict[str, Any]

needed = functools.lru_cache(maxsize=None)(cost)


class Times(NamedTuple):
    """Milliseconds and peak bytes, of the forward and of the backward; None where there is none."""

    ms: list[float | None]
    peak: list[int | None]


def measure(device: Device, call: Call, budget: float) -> Times:
    forward = device.median(call.run, budget)
    inputs = bytes_of(call.leaves)
    with torch.no_grad():
        peak = device.peak(call.run)
    if call.grad is None:
        return Times([forward, None], [None if peak is None else peak + inputs, None])
    ms = [forward, backward_median(device, call, budget)]
    both = device.peak(lambda: torch.autograd.grad(call.run(), call.leaves, call.grad))
    inputs_and_grad = inputs + bytes_of([call.grad])
    return Times(list(ms), [None if peak is None else peak + inputs, None if both is None else both + inputs_and_grad])


def backward_median(device: Device, call: Call, budget: float) -> float:
    """Of the backward alone."""
    out = call.run()
    return device.median(lambda: torch.autograd.grad(out, call.leaves, call.grad, retain_graph=True), budget)


def measure_peers(
    device: Device, problem: Problem, options: argparse.Namespace, notes: dict[str, str]
) -> dict[str, Times]:
    """Dense attention by each backend; and others' NSA."""
    found: dict[str, Times] = {}
    for name, (peer, tensors) in dense_peers(problem, notes).items():
        leaves = [t.detach().requires_grad_() for t in tensors]
        call = Call(functools.partial(peer, *leaves), leaves, problem.grad.detach())
        found[name] = attempt(name, notes, lambda call=call: measure(device, call, options.budget))
    other = other_nsa(problem, notes)
    if other is not None:
        call = Call(other, [problem.q, problem.keys[1], problem.values[1]], problem.grad)
        found["fla"] = attempt("fla", notes, lambda: measure(device, call, options.budget))
    return {name: times for name, times in found.items() if times is not None}


def attempt(name: str, notes: dict[str, str], run: Callable[[], Times]) -> Any:
    """None, and a note, when the device has too little memory for a peer."""
    try:
        return run()
    except torch.OutOfMemoryError:
        notes[name] += "; too little memory at some lengths"
        return None


def make_rows(
    head: Row,
    op: str,
    problem: Problem,
    times: Times,
    peers: dict[str, Times],
    found: list[float | None],
    top: Ceilings,
) -> list[Row]:
    shape = problem.shape
    work = needed(op, shape, problem.q.element_size())
    amounts = [(work.forward_flops, work.forward_bytes), (work.backward_flops, work.backward_bytes)]
    rows = []
    for i, direction in enumerate(("forward", "backward")):
        ms = times.ms[i]
        if ms is None:
            continue
        flops, moved = amounts[i]
        limit = top.limit_ms(flops, moved)
        rows.append(
            head
            | {"op": op, "direction": direction, "ms": round(ms, 4)}
            | {"peers": {name: round(t.ms[i], 4) for name, t in peers.items() if t.ms[i] is not None}}
            | {"tflops": round(flops / ms / 1e9, 2), "gbps": round(moved / ms / 1e6, 1)}
            | {"limit_ms": round(limit, 4), "percent_of_limit": round(100 * limit / ms, 1)}
            | {"peak_bytes": times.peak[i], "peer_peak_bytes": {name: t.peak[i] for name, t in peers.items()}}
            | {"error": found[i]}
        )
        report(rows[-1])
    return rows


def report(row: Row) -> None:
    peers = "".join(f", {name} {ms:.3f} ({ms / row['ms']:.2f}x)" for name, ms in row["peers"].items())
    error = "" if row["error"] is None else f", error {row['error']:.1e}"
    peak = "" if row["peak_bytes"] is None else f", {row['peak_bytes'] / 1e9:.2f} GB"
    what = f"{row['batch']} x {row['seqlen']:7} {row['heads']}/{row['kv_heads']} d {row['dk']} {row['data']:10}"
    what = f"{what} {row['op']:20} {row['direction']:8}"
    rate = f"{row['tflops']:6.1f} TFLOP/s {row['gbps']:7.1f} GB/s {row['percent_of_limit']:5.1f} %"
    print(f"{what} {row['ms']:10.3f} ms {rate}{peers}{peak}{error}", flush=True)


def bench_shape(
    device: Device, shape: Shape, options: argparse.Namespace, head: Row, top: Ceilings, notes: dict[str, str]
) -> list[Row]:
    """All rows of one shape. Dense attention takes the same time whatever the data: it is measured once."""
    rows: list[Row] = []
    peers: dict[str, Times] | None = None if options.peers else {}
    for data in options.data:
        with device.cleared():
            problem = make_problem(shape, data, getattr(torch, options.dtype), options.device)
            shared = shared_choices(problem)
            told = head | described(shape) | {"data": data}
            told["shared_choices"] = None if shared is None else round(shared, 3)
            if peers is None:
                peers = measure_peers(device, problem, options, notes)
            for op in options.ops:
                call = calls(problem)[op]
                times = measure(device, call, options.budget)
                beside = peers if op == "nsa_attention" else {}
                if op == "window_attention" and options.flex and (flex := flex_window(problem, notes)):
                    leaves = call.leaves
                    flex_call = Call(functools.partial(flex, *leaves), leaves, problem.grad)
                    beside = {"flex": measure(device, flex_call, options.budget)}
                found = errors(op, problem, call) if options.errors else [None, None]
                rows += make_rows(told, op, problem, times, beside, found, top)
            del problem, call
    return rows


def described(shape: Shape) -> Row:
    """The sizes, and the model that they are those of."""
    sizes = {"batch": shape.batch, "seqlen": shape.seqlen_k, "heads": shape.heads_q, "kv_heads": shape.heads_kv}
    model = {"model": shape.name.partition(",")[0]} if shape in MODELS else {}
    return sizes | {"dk": shape.dim_k, "dv": shape.dim_v} | model


def length(text: str) -> int:
    """8k, 1M, 8192."""
    match = re.fullmatch(r"(\d+)([kM]?)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text}: a length is a number, such as 8192, 8k or 1M")
    return int(match[1]) * {"": 1, "k": 1 << 10, "M": 1 << 20}[match[2]]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", nargs="*", type=length, default=[1 << n for n in range(10, 18)])
    parser.add_argument("--million", action="store_true", help="also 1M tokens, 16 query heads, 1 KV head, no peers")
    parser.add_argument("--models", action="store_true", help="shapes.MODELS, the whole, random data")
    parser.add_argument("--data", nargs="+", choices=["random", "correlated"])
    parser.add_argument("--ops", nargs="+", choices=OPS)
    parser.add_argument("--heads", type=int, default=64)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--dim", type=int, nargs=2, default=[128, 128], metavar=("DK", "DV"))
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--budget", type=float, default=0.3, help="seconds for each measured time")
    parser.add_argument("--minutes", type=float, default=8.0, help="start no further length after this")
    parser.add_argument(
        "--flex", action="store_true", help="flex_attention beside the window branch: it compiles first"
    )
    parser.add_argument("--no-peers", dest="peers", action="store_false")
    parser.add_argument("--no-errors", dest="errors", action="store_false")
    parser.add_argument("--commit", help="what was measured, where the checkout is not under git")
    parser.add_argument("--add", action="store_true", help="keep the rows that the output file already has")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/gpu-<model>.json")
    options = parser.parse_args()
    options.data = options.data or (["random"] if options.models else ["random", "correlated"])
    options.ops = options.ops or (["nsa_attention"] if options.models else list(OPS))
    return options


def shapes_of(options: argparse.Namespace) -> list[Shape]:
    if options.models:
        return list(MODELS)
    sizes = (options.heads, options.kv_heads, *options.dim)
    million = [Shape("million", 1 << 20, 1 << 20, 16, 1, *options.dim)] if options.million else []
    return [Shape(f"{t}", t, t, *sizes) for t in options.lengths] + million


def commit_of(options: argparse.Namespace) -> str:
    try:
        return options.commit or measured_commit()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def main() -> None:
    options = parse()
    device, started = Device(options.device), time.perf_counter()
    machine = torch.cuda.get_device_name() if device.is_cuda else cpu_model()
    top = measure_ceilings(device, getattr(torch, options.dtype))
    print(
        f"{machine}, torch {torch.__version__}: {top.flops / 1e12:.1f} TFLOP/s, {top.bytes / 1e9:.0f} GB/s", flush=True
    )
    same = {"gpu": machine if device.is_cuda else None, "cpu": None if device.is_cuda else machine}
    same |= {"torch": torch.__version__, "commit": commit_of(options)}
    head = same | {"dtype": options.dtype}
    rows: list[Row] = []
    notes: dict[str, str] = {}
    output = options.output or ROOT / "benchmarks" / "results" / f"gpu-{slug(machine)}{'-models' * options.models}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    if options.add and output.exists():
        before = json.loads(output.read_text())
        rows, notes = before["rows"], before["notes"]
    for shape in shapes_of(options):
        if time.perf_counter() - started > 60 * options.minutes:
            print(f"{shape} and what follows: no time left (--minutes)")
            break
        given = options
        if shape.name == "million":
            given = argparse.Namespace(**vars(options) | {"peers": False})
        rows += bench_shape(device, shape, given, head, top, notes)
        ceilings = {"tflops": round(top.flops / 1e12, 1), "gbps": round(top.bytes / 1e9, 1)}
        write(output, same | {"ceilings": ceilings, "notes": notes}, rows)
    print(f"wrote {output}, {time.perf_counter() - started:.0f} s; " + "; ".join(f"{k}: {v}" for k, v in notes.items()))


def slug(text: str) -> str:
    return "-".join(re.findall(r"[a-z0-9]+", text.lower()))


def write(path: Path, head: Row, rows: list[Row]) -> None:
    lines = ",\n".join(json.dumps(row) for row in rows)
    path.write_text(f'{json.dumps(head)[:-1]}, "rows": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
