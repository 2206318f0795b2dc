"""Speed and memory of nsa_attention against torch's dense causal attention, on the CPU: one JSON file of rows.

    python benchmarks/speed.py                                  # 1k to 32k, into benchmarks/results/cpu-<model>.json
    python benchmarks/speed.py --max-length 8192 --threads 1 --output speed.json

Random float32 data, compression by the mean included. Each method and length is measured in a process of its own.
Fields: `ms` and `peers` are the best of some runs; `limit_ms` what the operations that NSA needs at least (shapes.cost)
would take at this machine's matrix product speed; `peak_bytes` the most memory that the process held beyond what it
held with the inputs made (Linux only); `error` the largest difference from the same call in float64 with the same
blocks, over the largest value: of the output, and for forward+backward of every gradient too. `commit` is the last one
that changed csrc or nsa_torch. benchmarks/table.py makes a table of such a file.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import nsa_torch
from shapes import CPU, Shape, cost

ROOT = Path(__file__).resolve().parent.parent
DIRECTIONS = ("forward", "forward+backward")


class Measured(NamedTuple):
    """Of one direction: seconds, bytes beyond the inputs, relative error."""

    seconds: float
    peak_bytes: int
    error: float | None = None


class Problem(NamedTuple):
    q: Tensor
    keys: list[Tensor]  # of the compressed, selected and window branches
    values: list[Tensor]
    gates: Tensor
    grad: Tensor

    def inputs(self) -> list[Tensor]:
        return [self.q, *self.keys, *self.values, self.gates]

    def double(self) -> Problem:
        def widen(tensor: Tensor) -> Tensor:
            return tensor.detach().double().requires_grad_(tensor.requires_grad)

        keys, values = ([widen(t) for t in tensors] for tensors in (self.keys, self.values))
        return Problem(widen(self.q), keys, values, widen(self.gates), widen(self.grad))


def make_problem(shape: Shape) -> Problem:
    torch.manual_seed(0)
    heads = (shape.batch, shape.seqlen_k, shape.heads_kv)
    rows = (shape.batch, shape.seqlen_q, shape.heads_q)
    return Problem(
        torch.randn(*rows, shape.dim_k, requires_grad=True),
        [torch.randn(*heads, shape.dim_k, requires_grad=True) for _ in range(3)],
        [torch.randn(*heads, shape.dim_v, requires_grad=True) for _ in range(3)],
        torch.rand(*rows, 3, requires_grad=True),
        torch.randn(*rows, shape.dim_v),
    )


def nsa(shape: Shape, problem: Problem, block_indices: Tensor | None = None) -> Tensor:
    blocks = shape.options("block_size", "block_stride")
    options = shape.options("select_size", "num_selected", "num_initial", "num_local", "window")
    (k, *keys), (v, *values) = problem.keys, problem.values
    branches = [t for pair in zip(keys, values, strict=True) for t in pair]
    k_cmp, v_cmp = nsa_torch.compress(k, **blocks), nsa_torch.compress(v, **blocks)
    return nsa_torch.nsa_attention(
        problem.q, k_cmp, v_cmp, *branches, problem.gates, **blocks, **options, block_indices=block_indices
    )


def sdpa(shape: Shape, problem: Problem) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (problem.q, problem.keys[0], problem.values[0]))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def relative_errors(shape: Shape, problem: Problem) -> list[float]:
    """Of the output, and of output and gradients, given the blocks: a choice is right or wrong, not off by a little."""
    blocks = shape.options("block_size", "block_stride")
    choice = shape.options("select_size", "num_selected", "num_initial", "num_local")
    with torch.no_grad():
        k_cmp, v_cmp = (nsa_torch.compress(t[0], **blocks) for t in (problem.keys, problem.values))
        _, lse = nsa_torch.compressed_attention(problem.q, k_cmp, v_cmp, seqlen_k=shape.seqlen_k, **blocks)
        indices = nsa_torch.select_blocks(problem.q, k_cmp, lse, seqlen_k=shape.seqlen_k, **blocks, **choice)

    def results(given: Problem) -> list[Tensor]:
        out = nsa(shape, given, indices)
        return [out.detach(), *torch.autograd.grad(out, given.inputs(), given.grad)]

    pairs = zip(results(problem), results(problem.double()), strict=True)
    errors = [float((value - truth).abs().max() / truth.abs().max()) for value, truth in pairs]
    return [errors[0], max(errors)]


def peak_memory() -> int:
    """Bytes of resident memory: the most since reset_peak."""
    found = re.search(r"^VmHWM:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError("this system does not say how much memory a process held at most")
    return int(found[1]) * 1024


def reset_peak() -> int:
    """Bytes of resident memory held now. (getrusage cannot forget a peak, and starts with that of the parent.)"""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_memory()


def best_time(run: Callable[[], object], repeat: int) -> float:
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def measure(shape: Shape, method: str, threads: int, repeat: int) -> list[Measured]:
    """One for each direction."""
    torch.set_num_threads(threads)
    call = {"nsa": nsa, "sdpa": sdpa}[method]
    small = replace(shape, seqlen_q=128, seqlen_k=128)
    call(small, make_problem(small)).sum().backward()
    problem = make_problem(shape)

    def forward() -> None:
        with torch.no_grad():
            call(shape, problem)

    def both() -> None:
        torch.autograd.grad(call(shape, problem), problem.inputs(), problem.grad, allow_unused=True)

    measured = []
    for run in (forward, both):
        before = reset_peak()
        measured.append(Measured(best_time(run, repeat), peak_memory() - before))
    if method == "nsa":
        measured = [m._replace(error=e) for m, e in zip(measured, relative_errors(shape, problem), strict=True)]
    return measured


def product_speed(threads: int) -> float:
    """Operations a second of a large float32 matrix product."""
    torch.set_num_threads(threads)
    a = torch.randn(2048, 2048)
    return 2 * 2048**3 / best_time(lambda: a @ a, 20)


def cpu_model() -> str:
    found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found[1].strip() if found else "unknown"


def measured_commit() -> str:
    sources = ("--", "csrc", "nsa_torch")

    def git(*command: str) -> str:
        command = ("git", *command, *sources)
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    return git("log", "-1", "--format=%h") + ("-changed" if git("status", "--porcelain") else "")


def make_rows(shape: Shape, threads: int, repeat: int, limit: float) -> list[dict[str, Any]]:
    found = {}
    for method in ("nsa", "sdpa"):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found[method] = pool.apply(measure, (shape, method, threads, repeat))
    needed = cost("nsa_attention", shape, 4)
    operations = (needed.forward_flops, needed.forward_flops + needed.backward_flops)
    problem = {
        "gpu": None,
        "cpu": f"{cpu_model()}, {threads} threads",
        "torch": torch.__version__,
        "commit": measured_commit(),
        "op": "nsa_attention",
        "dtype": "float32",
        "batch": shape.batch,
        "seqlen": shape.seqlen_k,
        "heads": shape.heads_q,
        "kv_heads": shape.heads_kv,
        "dk": shape.dim_k,
        "dv": shape.dim_v,
        "data": "random normal",
    }
    rows = []
    for direction, own, peer, flops in zip(DIRECTIONS, found["nsa"], found["sdpa"], operations, strict=True):
        figures = {"ms": round(own.seconds * 1e3, 2), "limit_ms": round(flops / limit * 1e3, 2)}
        peers = {"sdpa": round(peer.seconds * 1e3, 2)}
        last = {"peers": peers, "peak_bytes": own.peak_bytes, "error": own.error}
        rows.append(problem | {"direction": direction} | figures | last)
        print(f"{shape.seqlen_k:6} {direction:17} {figures['ms']:9.1f} ms, sdpa {peers['sdpa']:9.1f} ms", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-length", type=int, default=32768)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/cpu-<model>.json")
    options = parser.parse_args()
    name = "-".join(re.findall(r"[a-z0-9]+", cpu_model().lower()))
    output = options.output or ROOT / "benchmarks" / "results" / f"cpu-{name}.json"
    limit = product_speed(options.threads)
    shapes = [shape for shape in CPU if shape.seqlen_k <= options.max_length]
    rows = [row for shape in shapes for row in make_rows(shape, options.threads, options.repeat, limit)]
    output.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(row) for row in rows)
    output.write_text(f'{{"rows": [\n{lines}\n]}}\n')
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
