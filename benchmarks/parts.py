"""What each part of nsa_attention takes on the CPU, as the table of docs/notes/cpu_kernels.md.

    python benchmarks/parts.py                  # 8k tokens
    python benchmarks/parts.py --length 32768

Predicted: the operations that the part needs at least (shapes.cost) at this machine's speed in large matrix products.
Measured: the best of some runs, of a call under no_grad, and of its backward alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

import nsa_torch
from shapes import CPU, Shape, cost
from speed import best_time, make_problem, product_speed

REPEAT = 5


def parts(shape: Shape) -> dict[str, tuple[Callable[[], Tensor], list[Tensor]]]:
    """For each op a call of it, and the tensors that it has gradients for."""
    blocks = shape.options("block_size", "block_stride")
    choice = shape.options("select_size", "num_selected", "num_initial", "num_local")
    length = {"seqlen_k": shape.seqlen_k}
    problem = make_problem(shape)
    q, k, v = problem.q, problem.keys[0], problem.values[0]
    k_cmp, v_cmp = (nsa_torch.compress(t, **blocks).detach().requires_grad_() for t in (k, v))
    with torch.no_grad():
        _, lse = nsa_torch.compressed_attention(q, k_cmp, v_cmp, **length, **blocks)
        lists = nsa_torch.select_blocks(q, k_cmp, lse, **length, **blocks, **choice)
    return {
        "compressed_attention": (
            lambda: nsa_torch.compressed_attention(q, k_cmp, v_cmp, **length, **blocks)[0],
            [q, k_cmp, v_cmp],
        ),
        "select_blocks": (lambda: nsa_torch.select_blocks(q, k_cmp, lse, **length, **blocks, **choice), []),
        "selected_attention": (
            lambda: nsa_torch.selected_attention(q, k, v, lists, select_size=shape.select_size)[0],
            [q, k, v],
        ),
        "window_attention": (lambda: nsa_torch.window_attention(q, k, v, window=shape.window)[0], [q, k, v]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=8192, choices=[shape.seqlen_k for shape in CPU])
    options = parser.parse_args()
    (shape,) = (shape for shape in CPU if shape.seqlen_k == options.length)
    limit = product_speed(torch.get_num_threads())
    print(f"{shape.seqlen_k} tokens, {torch.get_num_threads()} threads, products of {limit / 1e9:.0f} GFLOP/s\n")
    print("| ms | forward, predicted | measured | backward, predicted | measured |\n|---|---|---|---|---|")
    for name, (call, inputs) in parts(shape).items():
        needed = cost(name, shape, 4)
        with torch.no_grad():
            times = [(needed.forward_flops, best_time(call, REPEAT))]
        if inputs:
            out = call()
            grad = torch.randn_like(out)
            times.append(
                (
                    needed.backward_flops,
                    best_time(lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True), REPEAT),  # noqa: B023
                )
            )
        cells = [f"{flops / limit * 1e3:.0f} | {seconds * 1e3:.0f}" for flops, seconds in times]
        print(f"| {name} | {' | '.join([*cells, ' | '][: 2 if inputs else None])} |")


if __name__ == "__main__":
    main()
