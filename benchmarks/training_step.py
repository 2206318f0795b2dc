"""Where a training step of NSAAttention spends its time, against the same layer with dense attention.

    python benchmarks/training_step.py            # 32k tokens, into benchmarks/results/training-step-<gpu>.json
    python benchmarks/training_step.py --quick    # bf16, eager only
    python benchmarks/training_step.py --length 1024 --hidden 64 --heads 4 --kv-heads 2 --dim 16   # something small

Forward and backward of one layer, hidden 2048, 32 query heads, 2 KV heads, d 128, one sequence, the optimizer aside:
with parameters and tokens in bf16, and with float32 ones under autocast; eager, and by torch.compile. A row is one of
these: `ms` is the median by events without the profiler, of steps that follow each other as in training, where the host
runs ahead of the device; `peers` the same layer with torch's dense attention (`peak_bytes` likewise). `groups` divides
profiled steps (benchmarks/step_trace.py): milliseconds of the device, forward and backward, for each part of a step;
`gaps` is when it did nothing (`longest_gaps`: between which kernels); `outside` lists the kernels of the last four
groups, the longest first.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gpu import commit_of, length, slug, write
from nsa_torch import NSAAttention, module, rope
from peers import BACKENDS, sdpa
from speed import ROOT, cpu_model
from step_trace import GROUPS, STEP, groups_of, idle, pieces_of
from timing import Device, bytes_of

OUTSIDE = ("rotary", "copies and casts", "fills", "elementwise")
PRECISIONS = ("bf16", "autocast")
STEPS = 3  # that follow each other
Row = dict[str, Any]


class DenseAttention(nn.Module):
    """The layer with one K and V, and dense attention."""

    def __init__(self, options: argparse.Namespace, dtype: torch.dtype, attend: Callable[..., Tensor]) -> None:
        super().__init__()
        heads, kv_heads, dim = options.heads, options.kv_heads, options.dim
        self.heads, self.kv_heads, self.dim, self.attend = heads, kv_heads, dim, attend
        linear = functools.partial(nn.Linear, bias=False, device=options.device, dtype=dtype)
        self.q_proj = linear(options.hidden, heads * dim)
        self.k_proj, self.v_proj = (linear(options.hidden, kv_heads * dim) for _ in range(2))
        self.o_proj = linear(heads * dim, options.hidden)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q_proj(x).unflatten(-1, (self.heads, self.dim))
        k, v = (p(x).unflatten(-1, (self.kv_heads, self.dim)) for p in (self.k_proj, self.v_proj))
        positions = torch.arange(x.size(1), device=x.device)
        tables = rope.for_heads(rope.rope_tables(positions, self.dim, 10000.0, x.dtype))
        return self.o_proj(self.attend(rope.rotate(q, tables), rope.rotate(k, tables), v).flatten(-2))


def dense_attention(options: argparse.Namespace) -> Callable[..., Tensor]:
    """torch's, by cuDNN on a GPU."""
    if options.device.startswith("cuda"):
        return sdpa(BACKENDS["cudnn"], gqa=True)
    return lambda q, k, v: nn.functional.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (q, k, v)), is_causal=True, enable_gqa=True
    ).transpose(1, 2)


@contextlib.contextmanager
def annotated() -> Iterator[None]:
    """Rotations stand in the trace under the name "rotary"."""

    def under_a_name(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with torch.profiler.record_function("rotary"):
                return function(*args, **kwargs)

        return call

    places = [(m, name) for m in (module, rope) for name in ("rotate", "rope_tables", "take_rows")]
    before = [getattr(*place) for place in places]
    for place, function in zip(places, before, strict=True):
        setattr(*place, under_a_name(function))
    try:
        yield
    finally:
        for place, function in zip(places, before, strict=True):
            setattr(*place, function)


def make_step(
    options: argparse.Namespace, method: str, precision: str, compiled: bool
) -> tuple[Callable[[], None], int]:
    """A training step, and the bytes of its inputs and parameters."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    if method == "nsa":
        sizes = (options.hidden, options.heads, options.kv_heads, options.dim)
        layer: nn.Module = NSAAttention(*sizes, device=options.device, dtype=dtype)
    else:
        layer = DenseAttention(options, dtype, dense_attention(options))
    called = torch.compile(layer) if compiled else layer
    x = torch.randn(1, options.length, options.hidden, device=options.device, dtype=dtype).requires_grad_()
    grad = torch.randn(x.shape, device=options.device, dtype=torch.bfloat16)
    device_type = options.device.split(":")[0]

    def step() -> None:
        layer.zero_grad(set_to_none=True)
        x.grad = None
        with torch.autocast(device_type, torch.bfloat16, enabled=precision == "autocast"):
            # A view, as a layer within a model gets no leaf, of which autocast would keep the cast.
            out = called(x.view_as(x))
        out.backward(grad)

    return step, bytes_of([x, grad, *layer.parameters()])


def traced(device: Device, step: Callable[[], None], compiled: bool) -> Row:
    """The groups of profiled steps, after some that warm the profiler up."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.is_cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with contextlib.nullcontext() if compiled else annotated():
        for _ in range(2):
            with torch.profiler.profile(activities=activities) as profiler:
                for _ in range(STEPS):
                    with torch.profiler.record_function(STEP):
                        step()
                device.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        trace = json.loads(path.read_text())
    return grouped(trace)


def grouped(trace: dict[str, Any]) -> Row:
    """Of a step in the middle of others: the mean of all but the first."""
    pieces = pieces_of(trace)
    groups = dict(zip(pieces, groups_of(pieces), strict=True))
    before = [piece for piece in pieces if piece.step <= 1][-1]
    pieces = [piece for piece in pieces if piece.step > 1]
    sums: dict[str, dict[str, float]] = {name: {"forward": 0.0, "backward": 0.0} for name in GROUPS}
    outside: dict[tuple[str, str, str, str], list[float]] = defaultdict(list)
    for piece in pieces:
        group = groups[piece]
        direction = "backward" if piece.backward else "forward"
        ms = piece.ms / (STEPS - 1)
        sums[group][direction] += ms
        if group in OUTSIDE:
            outside[group, direction, piece.ops[-1] if piece.ops else "", piece.name[:90]].append(ms)
    total, gaps = idle([before, *pieces])
    longest = sorted(outside.items(), key=lambda item: -sum(item[1]))[:24]
    return {
        "profiled_ms": round((total - before.ms) / (STEPS - 1), 3),
        "gaps": round(sum(ms for ms, _, _ in gaps) / (STEPS - 1), 3),
        "longest_gaps": [[round(ms, 3), after[:60], before[:60]] for ms, after, before in gaps[:5]],
        "groups": {
            name: {d: round(ms, 3) for d, ms in sum_.items()} for name, sum_ in sums.items() if any(sum_.values())
        },
        "outside": [[*key, len(times) // (STEPS - 1), round(sum(times), 3)] for key, times in longest],
    }


def measure(device: Device, options: argparse.Namespace, precision: str, compiled: bool, head: Row) -> list[Row]:
    """One row: NSA, with dense attention as its peer."""
    found: dict[str, Row] = {}
    for method in options.methods:
        if method == "dense" and compiled and not options.dense_compiled:
            continue
        with device.cleared():
            step, held = make_step(options, method, precision, compiled)
            begun = time.perf_counter()
            step()
            device.synchronize()
            first = time.perf_counter() - begun
            ms = device.median(lambda step=step: [step() for _ in range(STEPS)], options.budget) / STEPS
            peak = device.peak(step)
            found[method] = {"ms": round(ms, 3), "peak_bytes": None if peak is None else peak + held}
            found[method] |= {"first_s": round(first, 1)} | traced(device, step, compiled)
            del step
            if compiled:
                torch.compiler.reset()
    own = found.pop("nsa")
    row = head | {"op": f"training step, {'compiled' if compiled else 'eager'}", "direction": "forward+backward"}
    row |= {"dtype": "bfloat16" if precision == "bf16" else "float32, autocast to bfloat16"}
    row |= {"peers": {name: times["ms"] for name, times in found.items()}, "error": None}
    row |= {"peer_peak_bytes": {name: times["peak_bytes"] for name, times in found.items()}}
    return [row | own | {"peer_parts": found}]


def report(row: Row) -> str:
    """A short table of one row."""
    peers = "".join(f", {name} {ms:.1f} ({ms / row['ms']:.2f}x)" for name, ms in row["peers"].items())
    peak = "" if row["peak_bytes"] is None else f", {row['peak_bytes'] / 1e9:.2f} GB"
    lines = [f"{row['op']}, {row['dtype']}: {row['ms']:.2f} ms{peers}{peak}; profiled {row['profiled_ms']:.2f} ms"]
    for name, part in row["groups"].items():
        share = sum(part.values()) / row["profiled_ms"]
        lines.append(f"  {name:22} forward {part['forward']:8.3f}  backward {part['backward']:8.3f}  {share:6.1%}")
    lines.append(f"  {'gaps':22} {row['gaps']:16.3f} {'':18} {row['gaps'] / row['profiled_ms']:6.1%}")
    return "\n".join(lines)


def summary(rows: list[Row]) -> str:
    """Milliseconds of each row, and how much of it is attention, products, outside of both, and idle."""
    lines = []
    for row in rows:
        sums = {name: sum(part.values()) for name, part in row["groups"].items()}
        outside = sum(ms for name, ms in sums.items() if name in OUTSIDE)
        attention = sum(ms for name, ms in sums.items() if name not in (*OUTSIDE, "projections", "compress"))
        products = sums.get("projections", 0.0) + sums.get("compress", 0.0)
        parts = {"attention": attention, "products": products, "outside": outside, "gaps": row["gaps"]}
        shares = ", ".join(f"{name} {ms / row['profiled_ms']:.1%}" for name, ms in parts.items())
        peers = "".join(f", {name} {ms:.2f}" for name, ms in row["peers"].items())
        lines.append(f"{row['op']}, {row['dtype']}: {row['ms']:.2f} ms{peers}; {shares}")
    return "\n".join(lines)


def report_outside(row: Row, most: int) -> str:
    lines = [
        f"    {ms:7.3f} ms {count:3}x {group}, {direction}: {op}, {kernel}"
        for group, direction, op, kernel, count, ms in row["outside"][:most]
    ]
    lines += [f"    {ms:7.3f} ms idle after {after}, before {before}" for ms, after, before in row["longest_gaps"]]
    return "\n".join(lines)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=length, default=1 << 15)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--methods", nargs="+", choices=["nsa", "dense"], default=["nsa", "dense"])
    parser.add_argument("--modes", nargs="+", choices=["eager", "compiled"], default=["eager", "compiled"])
    parser.add_argument("--dense-compiled", action="store_true", help="compile the dense layer, too: it takes longer")
    parser.add_argument("--quick", action="store_true", help="bf16, eager only")
    parser.add_argument("--outside", type=int, default=10, help="kernels outside of attention and products to print")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--budget", type=float, default=0.5, help="seconds for each measured time")
    parser.add_argument("--commit", help="what was measured, where the checkout is not under git")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/training-step-<gpu>.json")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    if options.quick:
        options.precisions, options.modes = ["bf16"], ["eager"]
    device = Device(options.device)
    machine = torch.cuda.get_device_name() if device.is_cuda else cpu_model()
    same = {"gpu": machine if device.is_cuda else None, "cpu": None if device.is_cuda else machine}
    same |= {"torch": torch.__version__, "commit": commit_of(options)}
    head = same | {"batch": 1, "seqlen": options.length, "hidden": options.hidden, "heads": options.heads}
    head |= {"kv_heads": options.kv_heads, "dk": options.dim, "dv": options.dim, "data": "random"}
    output = options.output or ROOT / "benchmarks" / "results" / f"training-step-{slug(machine)}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for mode in options.modes:
        for precision in options.precisions:
            rows += measure(device, options, precision, mode == "compiled", head)
            print(report(rows[-1]), report_outside(rows[-1], options.outside), sep="\n", flush=True)
            write(output, same, rows)
    print(f"\n{summary(rows)}\nwrote {output}")


if __name__ == "__main__":
    main()
