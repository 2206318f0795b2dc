"""Random configurations of every op and of the whole, against the float64 reference: outputs and every gradient.

    python tools/soak.py                        # 500 configurations on the GPU, or on the CPU where there is none
    python tools/soak.py --seed 7 --only 123    # one of them again

Shapes, strides, packings, dtypes and options are drawn at random. A result may err at most twice what the same maths by
torch's ops in the same dtype errs, plus a few ulps (tests/helpers.py). Prints the seed, and for each failure the line
that repeats it.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

import nsa_torch  # noqa: E402
from helpers import (  # noqa: E402
    DIFFERENTIABLE_OPS,
    OPTIONS,
    Inputs,
    assert_errs_at_most_twice,
    evaluate,
    make_inputs,
    make_packed_inputs,
)
from nsa_torch import reference  # noqa: E402
from shapes import Shape  # noqa: E402

DIMS = [(64, 64), (128, 128), (192, 128), (256, 256), (40, 24), (6, 4), (96, 80), (100, 100), (128, 64), (16, 16)]


def draw_shape(draw: random.Random, index: int) -> Shape:
    stride = draw.choice([8, 16, 32, 64, 4])
    size = stride * draw.choice([1, 2, 4])
    select = stride * max(1, draw.choice([32, 64, 128]) // stride)
    initial, local = draw.randint(0, 2), draw.randint(0, 3)
    keys = draw.choice([0, 1, draw.randint(1, 64), draw.randint(1, 400), draw.randint(1, 1200)])
    queries = draw.choice([keys, keys, draw.randint(min(1, keys), keys)])
    kv_heads = draw.choice([1, 1, 2, 3])
    dk, dv = draw.choice(DIMS)
    return Shape(
        f"soak_{index}",
        queries,
        keys,
        kv_heads * draw.choice([1, 2, 3, 4, 6, 8, 12, 16, 24]),
        kv_heads,
        dk,
        dv,
        batch=draw.choice([1, 1, 2]),
        block_size=size,
        block_stride=stride,
        select_size=select,
        num_selected=draw.choice([max(1, initial + local), 4 + initial + local, 16, 64]),
        num_initial=initial,
        num_local=local,
        window=draw.choice([1, 17, 64, 512, 5000]),
    )


def draw_lengths(draw: random.Random, shape: Shape) -> list[tuple[int, int]]:
    """Of packed sequences that hold as many keys as the shape."""
    lengths = []
    left = shape.seqlen_k
    while left > 0 and len(lengths) < 5:
        keys = draw.randint(0, left) if len(lengths) < 4 else left
        lengths.append((draw.choice([keys, draw.randint(0, keys)]), keys))
        left -= keys
    return [*lengths, (0, 0)][: max(1, len(lengths) + draw.randint(0, 1))]


def restride(draw: random.Random, tensor: Tensor) -> Tensor:
    """The same numbers in a wider tensor: rows and heads then lie further apart, at an odd offset."""
    if tensor.dim() < 3 or not tensor.is_floating_point() or draw.random() < 0.6:
        return tensor
    wide = tensor.new_zeros(*tensor.shape[:-1], tensor.size(-1) + draw.choice([1, 8]))
    first = draw.choice([0, wide.size(-1) - tensor.size(-1)])
    wide.narrow(-1, first, tensor.size(-1)).copy_(tensor)
    return wide.narrow(-1, first, tensor.size(-1))


def case(seed: int, index: int, device: str) -> tuple[str, Inputs, torch.dtype]:
    draw = random.Random(f"{seed} {index}")
    op = draw.choice(DIFFERENTIABLE_OPS)
    shape = draw_shape(draw, index)
    dtype = draw.choice([torch.bfloat16, torch.float16, torch.float32])
    if draw.random() < 0.4:
        inputs = make_packed_inputs(op, shape, draw_lengths(draw, shape), seed=seed)
    else:
        inputs = make_inputs(op, shape, seed=seed)
    given = inputs.to(device, dtype)
    tensors = {name: value if name == "lse" else restride(draw, value) for name, value in given.tensors.items()}
    return op, Inputs(tensors, given.options), dtype


def fixed_choice(op: str, inputs: Inputs) -> Inputs:
    """The whole on blocks that it chose itself: rounding may choose others, and their error is no error."""
    if op != "nsa_attention":
        return inputs
    t, o = inputs.tensors, inputs.options
    packing = {name: o[name] for name in ("cu_seqlens_q", "cu_seqlens_k", "seqused_k") if name in o}
    dense = {} if packing else {"seqlen_k": t["k_slc"].size(-3)}
    blocks = {name: o[name] for name in OPTIONS["compressed_attention"]}
    lse = nsa_torch.compressed_attention(t["q"], t["k_cmp"], t["v_cmp"], **dense, **blocks, **packing)[1]
    choice = {name: o[name] for name in OPTIONS["select_blocks"]}
    lists = nsa_torch.select_blocks(t["q"], t["k_cmp"], lse, **dense, **choice, **packing)
    return inputs.replace(block_indices=lists)


def run(seed: int, index: int, device: str) -> str:
    """What is wrong, or nothing."""
    op, inputs, dtype = case(seed, index, device)
    try:
        inputs = fixed_choice(op, inputs)
        actual = evaluate(getattr(nsa_torch, op), inputs)
        exact = inputs.to(device, torch.float64)
        truth = evaluate(getattr(reference, op), exact)
        baseline = evaluate(getattr(reference, op), inputs)
        assert_errs_at_most_twice(actual, truth, baseline, dtype)
    except Exception as error:  # every kind is a finding
        return f"{op} {dtype}: {type(error).__name__}: {str(error).splitlines()[0][:300]}"
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the number of one configuration")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=10.0)
    options = parser.parse_args()
    print(f"seed {options.seed}, {options.device}", flush=True)
    started = time.perf_counter()
    failures: list[str] = []
    done = 0
    for index in [options.only] if options.only is not None else range(options.count):
        if time.perf_counter() - started > 60 * options.minutes:
            print(f"stopped after {options.minutes:g} minutes")
            break
        problem = run(options.seed, index, options.device)
        done += 1
        if problem:
            failures.append(problem)
            print(f"--seed {options.seed} --only {index}: {problem}", flush=True)
        if done % 50 == 0:
            print(f"{done} of {options.count}, {len(failures)} failed", file=sys.stderr, flush=True)
    seconds = time.perf_counter() - started
    print(f"{done} configurations, seed {options.seed}: {len(failures)} failed, {seconds:.0f} s")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
