"""What a backward costs that computes some of the gradients: of frozen layers, of LoRA, of gates alone.

    python benchmarks/gradients.py                           # 32k tokens on the GPU, 2k on a CPU
    python benchmarks/gradients.py --lengths 8k 32k

64 query heads, 4 KV heads, d 128, bf16, one sequence of standard normal numbers; on a CPU float32 with 8 and 2 heads.
Backward alone, medians as in benchmarks/gpu.py. A row's `wanted` names the inputs whose gradients are asked for,
`share` is its time over that of all of them. Into benchmarks/results/gradients/<machine>.json.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from gpu import commit_of, described, length, slug, write
from problems import Call, Problem, calls, make_problem
from shapes import Shape
from speed import ROOT, cpu_model
from timing import Device

WANTED = {
    "nsa_attention": (
        "q k_cmp v_cmp k_slc v_slc k_win v_win gates",
        "q",
        "gates",
        "q gates",
        "k_cmp v_cmp",
        "k_slc v_slc",
        "k_win v_win",
        "k_cmp v_cmp k_slc v_slc k_win v_win",
    ),
    "compress": ("x pe w1 b1 w2 b2", "x", "pe w1 b1 w2 b2", "b2"),
}
NAMES = {op: wanted[0].split() for op, wanted in WANTED.items()}


def backward_ms(device: Device, op: str, problem: Problem, wanted: list[str], budget: float) -> float:
    """Of a backward that is asked for these inputs' gradients."""
    call: Call = calls(problem)[op]
    leaves = dict(zip(NAMES[op], call.leaves, strict=True))
    out = call.run()
    some = [leaves[name] for name in wanted]
    return device.median(lambda: torch.autograd.grad(out, some, call.grad, retain_graph=True), budget)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", nargs="+", type=length)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--budget", type=float, default=0.3, help="seconds for each measured time")
    parser.add_argument("--commit", help="what was measured, where the checkout is not under git")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/gradients/<machine>.json")
    options = parser.parse_args()
    device = Device(options.device)
    machine = torch.cuda.get_device_name() if device.is_cuda else cpu_model()
    heads, dtype = ((64, 4), torch.bfloat16) if device.is_cuda else ((8, 2), torch.float32)
    head = {"gpu": machine if device.is_cuda else None, "cpu": None if device.is_cuda else machine}
    head |= {"torch": torch.__version__, "commit": commit_of(options)}
    rows = []
    for tokens in options.lengths or [32768 if device.is_cuda else 2048]:
        shape = Shape(f"{tokens}", tokens, tokens, *heads, 128, 128)
        problem = make_problem(shape, "random", dtype, options.device)
        for op, sets in WANTED.items():
            whole = 0.0
            for wanted in sets:
                ms = backward_ms(device, op, problem, wanted.split(), options.budget)
                whole = whole or ms
                row = head | {"dtype": str(dtype).removeprefix("torch.")} | described(shape)
                row |= {"data": "random", "op": op, "direction": "backward", "wanted": wanted}
                rows.append(row | {"ms": round(ms, 4), "share": round(ms / whole, 4)})
                print(f"{tokens:7} {op:14} {ms:10.3f} ms {ms / whole:7.1%}  {wanted}", flush=True)
    output = options.output or ROOT / "benchmarks" / "results" / "gradients" / f"{slug(machine)}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    write(output, head, rows)


if __name__ == "__main__":
    main()
