"""`nsa_attention` of two libraries in turns, in one run: what a change costs or gains.

    python benchmarks/compare_libraries.py BEFORE.so AFTER.so                     # 1k to 64k, G 16 and 4, d 64 and 128
    python benchmarks/compare_libraries.py BEFORE.so AFTER.so --lengths 64k --seconds 10

Two libraries cannot be loaded into one process, as they register the same ops. So each has a process of its own
(benchmarks/library_worker.py), which makes the same tensors and waits; this one asks them by turns, A B B A A B B A,
for a burst of runs, and never both at once. A row's ratio is the median, over these pairs of bursts, of after / before:
what the GPU's clock does from one second to the next hits both of a pair. `spread` is half the distance between the
quartiles of those ratios, over the root of their number: by so much a ratio may be off by chance. `same_bits` says
whether output and gradients agree in every bit.

Times are of the GPU, by events, the L2 cache overwritten before each run and the work queued behind a pause, so that
the host's launches do not count; `host_us` is how long the host took to issue a call. 64 query heads; random data.

Exit status 1 if a row is slower by more than --each percent or all of them on average by more than --mean.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WORKER = Path(__file__).with_name("library_worker.py")
HEADS = 64
Row = dict[str, Any]


class Worker:
    """A process that has loaded one library, and answers a line of JSON with another."""

    def __init__(self, library: Path, device: str) -> None:
        self.library = library
        command = [sys.executable, str(WORKER), str(library), device]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def send(self, **request: Any) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended: receive() says so
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()

    def receive(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.library}: its process ended with status {self.process.wait()}")
        return json.loads(line)

    def ask(self, **request: Any) -> Any:
        self.send(**request)
        return self.receive()

    def close(self) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()


@contextlib.contextmanager
def started(libraries: list[Path], device: str) -> Iterator[list[Worker]]:
    workers: list[Worker] = []
    try:
        workers += [Worker(library, device) for library in libraries]
        for worker in workers:  # both load meanwhile
            worker.receive()
        yield workers
    finally:
        for worker in workers:
            worker.close()


def compare(workers: list[Worker], direction: str, seconds: float) -> Row:
    """One direction of the problem that the workers hold: bursts in turns for about `seconds`."""
    first = [worker.ask(do="measure", direction=direction, runs=3) for worker in workers]
    slowest = max(statistics.median(answer["ms"]) for answer in first)
    runs = max(1, min(10, int(20 / slowest)))  # a burst of about 20 ms
    times: list[list[float]] = [[], []]
    host: list[list[float]] = [[], []]
    start, turn = time.perf_counter(), 0
    while turn < 4 or time.perf_counter() - start < seconds or turn % 2:
        order = (0, 1) if turn % 2 == 0 else (1, 0)
        for side in order:
            answer = workers[side].ask(do="measure", direction=direction, runs=runs)
            times[side].append(statistics.median(answer["ms"]))
            host[side].append(statistics.median(answer["host_us"]))
        turn += 1
    return summary(times, host)


def summary(times: list[list[float]], host: list[list[float]]) -> Row:
    """Of the bursts of both sides, pair by pair."""
    ratios = [after / before for before, after in zip(*times, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    return {
        "before_ms": round(statistics.median(times[0]), 4),
        "after_ms": round(statistics.median(times[1]), 4),
        "ratio": round(statistics.median(ratios), 4),
        "spread": round((high - low) / 2 / len(ratios) ** 0.5, 4),
        "pairs": len(ratios),
        "before_host_us": round(statistics.median(host[0]), 1),
        "after_host_us": round(statistics.median(host[1]), 1),
    }


def compare_all(workers: list[Worker], options: argparse.Namespace) -> list[Row]:
    rows: list[Row] = []
    for dim in options.dims:
        for group in options.groups:
            for length in options.lengths:
                sizes = {"seqlen": length, "heads": options.heads, "kv_heads": options.heads // group, "dim": dim}
                for worker in workers:
                    worker.send(do="prepare", dtype=options.dtype, **sizes)
                sums = [worker.receive() for worker in workers]
                for direction in ("forward", "backward"):
                    row = sizes | {"group": group, "direction": direction}
                    rows.append(row | compare(workers, direction, options.seconds) | {"same_bits": sums[0] == sums[1]})
                    print(line_of(rows[-1]), flush=True)
    return rows


def line_of(row: Row) -> str:
    what = f"{row['seqlen']:7} tokens, G {row['group']:2}, d {row['dim']:3}, {row['direction']:8}"
    times = f"{row['before_ms']:9.3f} {row['after_ms']:9.3f} ms"
    ratio = f"after / before {row['ratio']:.4f} +- {row['spread']:.4f}"
    host = f"host {row['before_host_us']:.0f} {row['after_host_us']:.0f} us"
    return f"{what} {times}  {ratio}  {host}{'' if row['same_bits'] else '  other bits'}"


def verdict(rows: list[Row], each: float, mean: float) -> list[str]:
    """What is slower than allowed, in lines; nothing where nothing is."""
    found = [f"slower by {row['ratio'] - 1:.1%}: {line_of(row)}" for row in rows if row["ratio"] > 1 + each / 100]
    average = statistics.fmean(row["ratio"] for row in rows) - 1
    if average > mean / 100:
        found.append(f"slower by {average:.2%} on average")
    return found


def table(rows: list[Row]) -> str:
    """Markdown: a line for each shape, a column for each length and direction, after / before in each."""
    lengths = sorted({row["seqlen"] for row in rows})
    lines = [["after / before", *(f"{n // 1024}k" if n % 1024 == 0 else str(n) for n in lengths)]]
    lines.append(["---"] * len(lines[0]))
    for key in dict.fromkeys((row["group"], row["dim"], row["direction"]) for row in rows):
        found = {row["seqlen"]: row for row in rows if (row["group"], row["dim"], row["direction"]) == key}
        cells = [f"{found[n]['ratio']:.3f}" if n in found else "" for n in lengths]
        lines.append(["G {}, d {}, {}".format(*key), *cells])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def parse() -> argparse.Namespace:
    from gpu import length

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="a library of ops, or the folder of a package that holds it")
    parser.add_argument("after", type=Path)
    parser.add_argument("--lengths", nargs="+", type=length, default=[1 << n for n in range(10, 17)])
    parser.add_argument("--groups", nargs="+", type=int, default=[16, 4])
    parser.add_argument("--dims", nargs="+", type=int, default=[128, 64])
    parser.add_argument("--heads", type=int, default=HEADS)
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=2.5, help="for each shape and direction")
    parser.add_argument("--each", type=float, default=2.0, help="percent that one may be slower")
    parser.add_argument("--mean", type=float, default=0.5, help="percent that all may be slower on average")
    parser.add_argument("--output", type=Path, help="write the rows there, as JSON")
    return parser.parse_args()


def library_at(path: Path) -> Path:
    """The library itself, or the one in a package for the torch that is there; libnsa_torch.so in those before 0.2."""
    minor = "_".join(version("torch").split(".")[:2])
    names = (f"lib/libnsa_torch_{minor}.so", f"libnsa_torch_{minor}.so", "libnsa_torch.so")
    for found in [path / name for name in names] if path.is_dir() else [path]:
        if found.is_file():
            return found.resolve()
    raise SystemExit(f"{path}: no such library")


def main() -> int:
    options = parse()
    libraries = [library_at(path) for path in (options.before, options.after)]
    start = time.perf_counter()
    with started(libraries, options.device) as workers:
        rows = compare_all(workers, options)
    found = verdict(rows, options.each, options.mean)
    print(f"\n{table(rows)}\n{time.perf_counter() - start:.0f} s", *found, sep="\n")
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        head = {"before": str(options.before), "after": str(options.after), "dtype": options.dtype}
        body = ",\n".join(json.dumps(row) for row in rows)
        options.output.write_text(f'{json.dumps(head)[:-1]}, "rows": [\n{body}\n]}}\n')
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
