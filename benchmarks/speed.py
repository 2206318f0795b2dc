"""Speed and memory of nsa_attention against torch's dense causal attention, on the CPU, as a Markdown table.

    python benchmarks/speed.py                          # lengths up to 16k
    python benchmarks/speed.py --max-length 32768 --threads 1

Random float32 data, compression by the mean included. Each line is measured in a process of its own: the best of some
runs, and the most memory that the process held beyond what it held before. "limit" is the share of this machine's
matrix product speed, with the operations that NSA needs at least (shapes.cost); "error" the largest difference from the
same call in float64 with the same blocks, over the largest value.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import nsa_torch
from shapes import CPU, Shape, cost

LONGEST_CHECKED = 8192


class Row(NamedTuple):
    """Seconds, and bytes of memory."""

    forward: float
    both: float
    memory: int
    error: float | None = None


class Problem(NamedTuple):
    q: Tensor
    keys: list[Tensor]  # of the compressed, selected and window branches
    values: list[Tensor]
    gates: Tensor
    grad: Tensor


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


def dense(shape: Shape, problem: Problem) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (problem.q, problem.keys[0], problem.values[0]))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def relative_error(shape: Shape, problem: Problem) -> float:
    """Of the float32 result, where the blocks are given: a choice is right or wrong, not off by a little."""
    blocks = shape.options("block_size", "block_stride")
    choice = shape.options("select_size", "num_selected", "num_initial", "num_local")
    k_cmp, v_cmp = (nsa_torch.compress(t, **blocks) for t in (problem.keys[0], problem.values[0]))
    _, lse = nsa_torch.compressed_attention(problem.q, k_cmp, v_cmp, seqlen_k=shape.seqlen_k, **blocks)
    indices = nsa_torch.select_blocks(problem.q, k_cmp, lse, seqlen_k=shape.seqlen_k, **blocks, **choice)
    wide = Problem(*([t.double() for t in part] if isinstance(part, list) else part.double() for part in problem))
    truth = nsa(shape, wide, indices)
    return float((nsa(shape, problem, indices) - truth).abs().max() / truth.abs().max())


def best_time(run: Callable[[], object], repeat: int) -> float:
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def measure(shape: Shape, method: str, threads: int, repeat: int, check: bool) -> Row:
    torch.set_num_threads(threads)
    call = {"nsa": nsa, "dense": dense}[method]
    problem = make_problem(shape)
    call(CPU[0], make_problem(CPU[0])).sum().backward()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    both = best_time(lambda: call(shape, problem).backward(problem.grad), repeat)
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    with torch.no_grad():
        forward = best_time(lambda: call(shape, problem), repeat)
        error = relative_error(shape, problem) if check else None
    return Row(forward, both, memory, error)


def product_speed(threads: int) -> float:
    """Operations a second of a large float32 matrix product."""
    torch.set_num_threads(threads)
    a = torch.randn(2048, 2048)
    return 2 * 2048**3 / best_time(lambda: a @ a, 5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-length", type=int, default=16384)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    limit = product_speed(options.threads)
    print(f"torch {torch.__version__}, {options.threads} threads, matrix product {limit / 1e9:.0f} GFLOP/s\n")
    print("| tokens | NSA fwd, ms | fwd + bwd | limit | MB | error | dense fwd, ms | fwd + bwd | MB | dense / NSA |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    context = multiprocessing.get_context("spawn")
    for shape in (shape for shape in CPU if shape.seqlen_k <= options.max_length):
        check = shape.seqlen_k <= LONGEST_CHECKED
        rows = []
        for method, checked in (("nsa", check), ("dense", False)):
            with context.Pool(1) as pool:
                rows.append(pool.apply(measure, (shape, method, options.threads, options.repeat, checked)))
        sparse, full = rows
        needed = cost("nsa_attention", shape, 4)
        share = (needed.forward_flops + needed.backward_flops) / sparse.both / limit
        error = "" if sparse.error is None else f"{sparse.error:.1e}"
        print(
            f"| {shape.seqlen_k:,} | {sparse.forward * 1e3:.0f} | {sparse.both * 1e3:.0f} | {share:.0%} "
            f"| {sparse.memory / 1e6:.0f} | {error} | {full.forward * 1e3:.0f} | {full.both * 1e3:.0f} "
            f"| {full.memory / 1e6:.0f} | {full.both / sparse.both:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
