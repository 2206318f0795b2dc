"""Tables that say more of a file of benchmarks/gpu.py or benchmarks/training_step.py than its rows one by one.

parts: every op, forward and backward, with its rate and its share of the GPU's limit. `limit_ms` of a row is the larger
of two times, of its operations in large matrix products and of its bytes in a copy; the rate shown is of that one.
sums: the whole against a peer: forward, backward, and both together; and memory.
targets: what was to be reached on an H100, beside what is: how many times as fast as the peer; and milliseconds.
step: where a training step's time goes.
"""

from __future__ import annotations

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

# (least, aim): how many times as fast as the peer, by data, direction and tokens.
RATIO_TARGETS = {
    ("random", "forward"): {8192: (1.0, 1.3), 16384: (1.6, 2.1), 32768: (2.5, 3.2), 65536: (4.0, 5.2)},
    ("correlated", "forward"): {8192: (1.1, 1.4), 16384: (1.9, 2.4), 32768: (3.0, 3.8), 65536: (5.0, 6.5)},
    ("random", "backward"): {8192: (1.0, 1.5), 16384: (1.8, 2.6), 32768: (3.2, 4.4), 65536: (5.4, 7.5)},
    ("correlated", "backward"): {65536: (5.8, 8.0)},
    ("random", "both"): {65536: (4.9, 6.5)},
}
# Milliseconds of each part at 64k on random data: (at most, aim).
PART_TARGETS = {
    ("compressed_attention", "forward"): (8.5, 7.0),
    ("select_blocks", "forward"): (6.0, 4.5),
    ("selected_attention", "forward"): (13.0, 11.0),
    ("window_attention", "forward"): (3.0, 2.2),
    ("compressed_attention", "backward"): (None, 20.0),
    ("selected_attention", "backward"): (None, 18.0),
    ("window_attention", "backward"): (None, 6.0),
}


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
        found.setdefault(tuple(row[name] for name in names), {})[row["direction"]] = row
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


def verdict(least_reached: bool, aim_reached: bool) -> str:
    return "aim reached" if aim_reached else "reached" if least_reached else "**missed**"


def targets(file: File, rows: list[Row]) -> str:
    del file
    lines = [["tokens", "data", "what", "measured", "at least", "aim", ""]]
    whole = [row for row in rows if row["op"] == "nsa_attention"]
    for (seqlen, data), directions in by_problem(whole, "seqlen", "data").items():
        for direction, (own, peer) in with_both(directions).items():
            least, aim = RATIO_TARGETS.get((data, direction), {}).get(seqlen, (None, None))
            if least is not None and aim is not None:
                ratio = peer / own
                said = verdict(ratio >= least, ratio >= aim)
                what = f"{PEER} / this, {'forward and backward' if direction == 'both' else direction}"
                lines.append([f"{seqlen:,}", data, what, f"{ratio:.2f}", f"{least:.1f}", f"{aim:.1f}", said])
    for row in rows:
        most, aim = PART_TARGETS.get((row["op"], row["direction"]), (None, None))
        if aim is not None and row["seqlen"] == 65536 and row["data"] == "random":
            said = verdict(most is None or row["ms"] <= most, row["ms"] <= aim)
            said = "" if most is None and row["ms"] > aim else said
            cells = [f"{row['ms']:.2f} ms", "" if most is None else f"{most:.1f} ms", f"{aim:.1f} ms", said]
            lines.append([f"{row['seqlen']:,}", row["data"], f"{PARTS[row['op']]}, {row['direction']}", *cells])
    return f"{machine(rows)}:\n\n{markdown(lines)}"


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


VIEWS = {"parts": parts, "sums": sums, "targets": targets, "step": step}
