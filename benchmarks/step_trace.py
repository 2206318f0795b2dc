"""Which part of a training step each piece of device time belongs to, from a trace of torch.profiler.

A kernel is traced back to the call that launched it and to the ops around that call; an op of the backward also to the
annotation around its forward, by the sequence number that autograd gives both. On the CPU the ops themselves are the
pieces: the time of each that no op within it takes.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

Event = dict[str, Any]

ON_DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}
LAUNCHES = {"cuda_runtime", "cuda_driver"}
BACKWARD = "autograd::engine::evaluate_function"
STEP = "training step"  # the annotation around each step

PRODUCTS = re.compile(r"gemm|cutlass|nvjet|xmma|splitk|cublas|aten::(addmm|mm|bmm|addbmm|baddbmm)$", re.IGNORECASE)
COPIES = re.compile(r"memcpy|copy_|copy_kernel|catarray|aten::(cat|clone|stack|_to_copy)$", re.IGNORECASE)
FILLS = re.compile(r"memset|fillfunctor|aten::(fill_|zero_|zeros|zeros_like)$", re.IGNORECASE)
# Ops within nsa_attention, forward: each branch is one.
BRANCH_OPS = {
    "nsa::compressed_attention": "compressed attention",
    "nsa::select_blocks": "choice of blocks",
    "nsa::selected_attention": "selected attention",
    "nsa::window_attention": "window attention",
}
GROUPS = (
    "compressed attention",
    "choice of blocks",
    "selected attention",
    "window attention",
    "gates",
    "dense attention",
    "compress",
    "projections",
    "rotary",
    "copies and casts",
    "fills",
    "elementwise",
)


class Piece(NamedTuple):
    """Device time of one kernel, copy or fill; milliseconds from the trace's origin."""

    name: str
    begin: float
    ms: float
    ops: tuple[str, ...]  # around the launch, outermost first
    annotation: str | None  # of the program, around the op or around its forward
    backward: bool
    step: int  # the number of steps that had begun, on the host, when it was launched


def pieces_of(trace: Event) -> list[Piece]:
    """What ran on the device, in order; where nothing did, the ops of the CPU."""
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    launches = {e["args"]["correlation"]: e for e in events if e.get("cat") in LAUNCHES and "correlation" in e["args"]}
    on_device = [e for e in events if e.get("cat") in ON_DEVICE]
    host = [e for e in events if e.get("cat") in ("cpu_op", "user_annotation")]
    if on_device:
        calls = [(launches.get(e["args"].get("correlation")), e) for e in on_device]
        found = enclosing(host, [call for call, _ in calls if call is not None])
        around = [(e, (call or e)["ts"], e["dur"], found.get(id(call), [])) for call, e in calls]
    else:
        around = [(e, e["ts"], duration, outer) for e, duration, outer in with_own_time(host)]
    steps = [event["ts"] for event in host if event["name"] == STEP]
    annotations = annotations_by_sequence(host)
    pieces = [
        make_piece(event, duration, outer, annotations)._replace(step=sum(begin <= called for begin in steps))
        for event, called, duration, outer in around
    ]
    return sorted(pieces, key=lambda piece: piece.begin)


def annotation_in(events: list[Event]) -> list[str]:
    names = [e["name"] for e in events if e["cat"] == "user_annotation"]
    return [name for name in names if name != STEP and not name.startswith("ProfilerStep")]


def make_piece(event: Event, duration: float, outer: list[Event], annotations: dict[int, str]) -> Piece:
    ops = tuple(e["name"] for e in outer if e["cat"] == "cpu_op")
    said = annotation_in(outer)
    backward = any(name.startswith(BACKWARD) for name in ops)
    if backward:
        numbers = [e["args"].get("Sequence number") for e in outer if e["name"].startswith(BACKWARD)]
        said = [annotations[n] for n in numbers if annotations.get(n)]
    return Piece(event["name"], event["ts"] / 1e3, duration / 1e3, ops, said[-1] if said else None, backward, 0)


def by_thread(events: Iterable[Event]) -> dict[Any, list[Event]]:
    threads: dict[Any, list[Event]] = defaultdict(list)
    for event in events:
        threads[event.get("pid"), event["tid"]].append(event)
    return threads


def enclosing(host: list[Event], calls: list[Event]) -> dict[int, list[Event]]:
    """For each call, by its id(): the events of its thread that it lies in, outermost first."""
    found: dict[int, list[Event]] = {}
    threads, wanted = by_thread(host), {id(call) for call in calls}
    for thread, theirs in by_thread(calls).items():
        open_events: list[Event] = []
        # Where two begin together, the longer one lies outside.
        for event in sorted(threads[thread] + theirs, key=lambda e: (e["ts"], -e["dur"])):
            while open_events and open_events[-1]["ts"] + open_events[-1]["dur"] <= event["ts"]:
                open_events.pop()
            if id(event) in wanted:
                found[id(event)] = list(open_events)
            else:
                open_events.append(event)
    return found


def with_own_time(host: list[Event]) -> Iterator[tuple[Event, float, list[Event]]]:
    """Each op, its time outside the ops within it, and what lies around it, itself included."""
    found = enclosing(host, [])
    for theirs in by_thread(host).values():
        open_events: list[Event] = []
        inner: dict[int, float] = defaultdict(float)
        ordered = sorted(theirs, key=lambda e: (e["ts"], -e["dur"]))
        for event in ordered:
            while open_events and open_events[-1]["ts"] + open_events[-1]["dur"] <= event["ts"]:
                open_events.pop()
            if open_events:
                inner[id(open_events[-1])] += event["dur"]
            found[id(event)] = [*open_events, event]
            open_events.append(event)
        for event in ordered:
            if event["cat"] == "cpu_op" and not event["name"].startswith(BACKWARD):
                yield event, max(event["dur"] - inner[id(event)], 0), found[id(event)]


def annotations_by_sequence(host: list[Event]) -> dict[int, str]:
    """The program's annotation around the forward op of each sequence number, "" where there is none."""
    found: dict[int, str] = {}
    for theirs in by_thread(host).values():
        open_events: list[Event] = []
        for event in sorted(theirs, key=lambda e: (e["ts"], -e["dur"])):
            while open_events and open_events[-1]["ts"] + open_events[-1]["dur"] <= event["ts"]:
                open_events.pop()
            said = annotation_in(open_events)
            number = event["args"].get("Sequence number") if event["cat"] == "cpu_op" else None
            inside_backward = any(e["name"].startswith(BACKWARD) for e in (*open_events, event))
            if number is not None and not inside_backward:
                # Ops that have no gradient show the number of the next that has one: the last to show it counts.
                found[number] = said[-1] if said else ""
            open_events.append(event)
    return found


def groups_of(pieces: list[Piece]) -> list[str]:
    """One of GROUPS for each piece, given in the order in which they ran."""
    groups, phase = [], "gates"
    for piece in pieces:
        group = branch = next((BRANCH_OPS[op] for op in piece.ops if op in BRANCH_OPS), None)
        within = any(op.startswith("nsa::nsa_attention") for op in piece.ops)
        if branch is None and within:
            # The backward is one op: gates first, then the branches in turn; range kernels serve two of them.
            phase = next_phase(phase, piece.name) if piece.backward else "gates"
            group = phase
        elif not within:
            phase = "gates"
        groups.append(group or other_group(piece))
    return groups


def next_phase(phase: str, kernel: str) -> str:
    if re.search(r"gate|delta", kernel):
        return "gates"
    if re.search(r"select|list|segment|find_begins|RadixSort", kernel):
        return "selected attention"
    if "range" in kernel or "attention" in kernel:
        return "window attention" if phase in ("selected attention", "window attention") else "compressed attention"
    return phase


def other_group(piece: Piece) -> str:
    if any(op.startswith("nsa::compress") for op in piece.ops):
        return "compress"
    if any(re.search(r"scaled_dot_product|_flash_attention|_cudnn_attention", op) for op in piece.ops):
        return "dense attention"
    if PRODUCTS.search(piece.name):
        return "projections"
    if piece.annotation == "rotary" or any("rotate" in name for name in (piece.name, *piece.ops)):
        return "rotary"
    for pattern, group in ((COPIES, "copies and casts"), (FILLS, "fills")):
        if pattern.search(piece.name):
            return group
    return "elementwise"


def idle(pieces: list[Piece]) -> tuple[float, list[tuple[float, str, str]]]:
    """From the first piece's begin to the last one's end: all, and each time without a piece, between which two."""
    gaps, last, end = [], pieces[0], pieces[0].begin
    for piece in pieces:
        if piece.begin > end:
            gaps.append((piece.begin - end, last.name, piece.name))
        if piece.begin + piece.ms > end:
            last, end = piece, piece.begin + piece.ms
    return end - pieces[0].begin, sorted(gaps, reverse=True)
