"""Tables that say more of a file of benchmarks/gpu.py or benchmarks/training_step.py than its rows one by one.

parts: every op, forward and backward, with its rate and its share of the GPU's limit. `limit_ms` of a row is the larger
of two times, of its operations in large matrix products and of its bytes in a copy; the rate shown is of that one.
sums: the whole against a peer: forward, backward, and both together; and memory.
dense: the whole against the fastest dense attention at each shape, and where it begins to be faster.
step: where a training step's time goes.
libraries: two builds in turns, a file of benchmarks/compare_libraries.py.
gradients: backwards of some of the gradients, a file of benchmarks/gradients.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

Row = dict[str, Any]
File = dict[str, Any]
Lines = list[list[str]]

PARTS = {
    "compress": "compress",
    "compressed_attention": "compressed branch",
    "select_blocks": "choice of blocks",
    "selected_attention": "selected branch",
    "window_attention": "window branch",
    "nsa_attention": "the whole",
}
PEER = "cudnn"
# Dense attention that computes the same thing; other peers compute something else.
DENSE = {"cudnn": "cuDNN", "fa2": "FA2", "fa4": "FA4", "sdpa": "SDPA"}


def markdown(lines: Lines) -> str:
    head, *rest = lines
    return "".join(f"| {' | '.join(line)} |\n" for line in [head, ["---"] * len(head), *rest])


def machine(rows: list[Row]) -> str:
    first = rows[0]
    names = ("dtype", "batch", "heads", "kv_heads", "dk", "dv")
    problem = ", ".join(f"{name} {first[name]}" for name in names if len({row[name] for row in rows}) == 1)
    return f"{problem}; {first['gpu'] or first['cpu']}, torch {first['torch']}, commit {first['commit']}"


def by_problem(rows: list[Row], *names: str) -> dict[tuple[Any, ...], dict[str, Row]]:
    """The rows of both directions of each problem."""
    found: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        found.setdefault(tuple(row.get(name) for name in names), {})[row["direction"]] = row
    return found


def rate(row: Row, ceilings: dict[str, float]) -> str:
    """In what the limit is given by: operations or bytes."""
    if row["tflops"] / ceilings["tflops"] >= row["gbps"] / ceilings["gbps"]:
        return f"{row['tflops']:,.0f} TFLOP/s"
    return f"{row['gbps']:,.0f} GB/s"


def parts(file: File, rows: list[Row]) -> str:
    ceilings = file["ceilings"]
    lines = [["tokens", "data", "part"]]
    for direction in ("forward", "backward"):
        lines[0] += [f"{direction}, ms", "rate", "of the limit", "error"]
    found = by_problem(rows, "seqlen", "data", "op")
    for (seqlen, data, op), directions in found.items():
        line = [f"{seqlen:,}", data, PARTS[op]]
        for direction in ("forward", "backward"):
            row = directions.get(direction)
            if row is None:
                line += [""] * 4
                continue
            error = "" if row["error"] is None else f"{row['error']:.0e}"
            line += [f"{row['ms']:,.2f}", rate(row, ceilings), f"{row['limit_ms'] / row['ms']:.0%}", error]
        lines.append(line)
    limits = f"limits {ceilings['tflops']:,.0f} TFLOP/s, {ceilings['gbps']:,.0f} GB/s"
    return f"{machine(rows)}, {limits}:\n\n{markdown(lines)}"


def own_keys_bytes(row: Row) -> int:
    """K and V that dense attention has not: those of the window branch, and the compressed ones."""
    token = row["kv_heads"] * (row["dk"] + row["dv"]) * (4 if row["dtype"] == "float32" else 2)
    return int(row["batch"] * row["seqlen"] * token * (1 + 1 / 16))


def sums(file: File, rows: list[Row]) -> str:
    del file
    times = ("forward", "backward", "both")
    lines = [["tokens", "data"]]
    for time in times:
        lines[0] += [f"{time}, ms", f"{PEER}, ms", f"{PEER} / this"]
    lines[0] += ["peak, GB", f"{PEER}, GB", f"this less its own K and V / {PEER}"]
    for (seqlen, data), directions in by_problem(rows, "seqlen", "data").items():
        if set(directions) != {"forward", "backward"} or PEER not in directions["backward"]["peers"]:
            continue
        line = [f"{seqlen:,}", data]
        for own, peer in with_both(directions).values():
            line += [f"{own:,.1f}", f"{peer:,.1f}", f"{peer / own:.2f}"]
        line += memory(directions["backward"])
        lines.append(line)
    return f"{machine(rows)}:\n\n{markdown(lines)}"


def memory(row: Row) -> list[str]:
    own, peer = row["peak_bytes"], row["peer_peak_bytes"].get(PEER)
    if own is None or peer is None:
        return ["", "", ""]
    return [f"{own / 1e9:,.2f}", f"{peer / 1e9:,.2f}", f"{(own - own_keys_bytes(row)) / peer:.2f}"]


def with_both(directions: dict[str, Row]) -> dict[str, tuple[float, float]]:
    """Milliseconds of this and of the peer: of each direction, and of both together where there are both."""
    found = {d: (row["ms"], row["peers"][PEER]) for d, row in directions.items() if PEER in row["peers"]}
    if len(found) == 2:
        found["both"] = found["forward"][0] + found["backward"][0], found["forward"][1] + found["backward"][1]
    return found


def dense(file: File, rows: list[Row]) -> str:
    """A line for each shape: milliseconds forward / backward; the ratio is of both, bold where this is faster."""
    del file
    whole = [row for row in rows if row["op"] == "nsa_attention"]
    peers = [peer for peer in DENSE if any(peer in row["peers"] for row in whole)]
    lines = [["heads / KV heads", "d", "tokens", "this, ms", *(f"{DENSE[peer]}, ms" for peer in peers)]]
    lines[0].append("fastest dense / this")
    models = any(row.get("model") for row in whole)
    if models:
        lines[0].insert(0, "as in")
    for directions in by_problem(whole, "model", "batch", "seqlen", "heads", "kv_heads", "dk", "data").values():
        if set(directions) != {"forward", "backward"}:
            continue
        pair = directions["forward"], directions["backward"]
        row = pair[0]
        own = sum(one["ms"] for one in pair)
        both = {
            peer: sum(one["peers"][peer] for one in pair) for peer in peers if all(peer in one["peers"] for one in pair)
        }
        tokens = f"{row['batch']} x {thousands(row['seqlen'])}"
        line = [f"{row['heads']} / {row['kv_heads']}", str(row["dk"]), tokens, in_turn(one["ms"] for one in pair)]
        line += [in_turn(one["peers"][peer] for one in pair) if peer in both else "" for peer in peers]
        ratio = min(both.values()) / own if both else None
        line.append("" if ratio is None else f"**{ratio:.2f}**" if ratio > 1 else f"{ratio:.2f}")
        lines.append([str(row.get("model", "")), *line] if models else line)
    data = ", ".join(sorted({f"{row['data']} data" for row in whole}))
    return f"{machine(whole)}, {data}; forward / backward:\n\n{markdown(lines)}"


def thousands(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)


def in_turn(times: Iterable[float]) -> str:
    return " / ".join(f"{ms:,.2f}" if ms < 10 else f"{ms:,.1f}" for ms in times)


def step(file: File, rows: list[Row]) -> str:
    """A column for each row of the file, milliseconds forward + backward."""
    del file
    lines = [
        ["ms, forward + backward", *(f"{row['op'].removeprefix('training step, ')}, {row['dtype']}" for row in rows)]
    ]
    groups = list(dict.fromkeys(name for row in rows for name in row["groups"]))
    for name in groups:
        cells = [row["groups"].get(name, {"forward": 0.0, "backward": 0.0}) for row in rows]
        lines.append([name, *(f"{cell['forward']:.2f} + {cell['backward']:.2f}" for cell in cells)])
    lines.append(["device idle within the step", *(f"{row['gaps']:.2f}" for row in rows)])
    lines.append(["the step, profiled", *(f"{row['profiled_ms']:.2f}" for row in rows)])
    lines.append(["the step, median without the profiler", *(f"**{row['ms']:.2f}**" for row in rows)])
    for peer in dict.fromkeys(name for row in rows for name in row["peers"]):
        lines.append(
            [
                f"the same layer, {peer} attention",
                *(f"{row['peers'][peer]:.2f}" if peer in row["peers"] else "" for row in rows),
            ]
        )
        memories = [(row["peak_bytes"], row["peer_peak_bytes"].get(peer)) for row in rows]
        shown = ["" if None in pair else " / ".join(f"{n / 1e9:.2f}" for n in pair) for pair in memories]
        lines.append([f"peak GB, this / {peer}", *shown])
    first = rows[0]
    return f"hidden {first['hidden']}, {first['seqlen']:,} tokens, {machine(rows)}:\n\n{markdown(lines)}"


def libraries(file: File, rows: list[Row]) -> str:
    lines = [["heads / KV heads", "d", "tokens", "direction", "before, ms", "after, ms", "after / before"]]
    for row in rows:
        problem = [f"{row['heads']} / {row['kv_heads']}", str(row["dim"]), thousands(row["seqlen"]), row["direction"]]
        lines.append([*problem, f"{row['before_ms']:,.2f}", f"{row['after_ms']:,.2f}", f"{row['ratio']:.3f}"])
    names = f"before: {file['before']}; after: {file['after']}"
    build = f" ({file['build']})" if "build" in file else ""
    return f"{file['dtype']}; {file['gpu']}, torch {file['torch']}; {names}{build}:\n\n" + markdown(lines)


def gradients(file: File, rows: list[Row]) -> str:
    del file
    lines = [["tokens", "op", "gradients of", "backward, ms", "of that of all"]]
    for row in rows:
        names = row["wanted"].replace(" ", ", ")
        lines.append([f"{row['seqlen']:,}", row["op"], names, f"{row['ms']:,.2f}", f"{row['share']:.0%}"])
    return f"{machine(rows)}:\n\n{markdown(lines)}"


def decode(file: File, rows: list[Row]) -> str:
    del file
    names = ["context x batch", "heads / KV heads", "d", "tokens", "us", "dense, us", "dense / this", "TB/s"]
    lines = [names]
    for row in rows:
        peers = {name: us for name, us in row["peers"].items() if not isinstance(us, str)}
        dense = min(peers.values(), default=float("nan"))
        sizes = [f"{row['context'] // 1024}k x {row['batch']}", f"{row['heads']} / {row['kv_heads']}", f"{row['dk']}"]
        times = [
            f"{row['us']:.1f}",
            f"{dense:.1f}",
            f"{dense / row['us']:.2f}",
            f"{row['bytes'] / row['us'] / 1e6:.2f}",
        ]
        lines.append([*sizes, str(row["tokens"]), *times])
    return f"{rows[0]['dtype']}; {machine(rows)}:\n\n{markdown(lines)}"


VIEWS = {
    "parts": parts,
    "sums": sums,
    "dense": dense,
    "step": step,
    "libraries": libraries,
    "gradients": gradients,
    "decode": decode,
}
