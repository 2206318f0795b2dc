"""The bench of a training step: its trace is divided into parts, and its rows make a table."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import step_trace
import table
import views

ROOT = Path(__file__).resolve().parents[1]
ENGINE = "autograd::engine::evaluate_function: "


def event(name: str, begin: float, duration: float, category: str = "cpu_op", thread: int = 1, **args: Any) -> Any:
    return {
        "ph": "X",
        "cat": category,
        "name": name,
        "ts": begin,
        "dur": duration,
        "pid": 1,
        "tid": thread,
        "args": args,
    }


def launched(kernel: str, called: float, begin: float, duration: float, thread: int = 1) -> list[Any]:
    """A kernel, and the call that launched it."""
    number = round(called * 1000)
    call = event("cudaLaunchKernel", called, 0.5, "cuda_runtime", thread, correlation=number)
    return [call, event(kernel, begin, duration, "kernel", 7, correlation=number)]


def made_up_trace() -> dict[str, Any]:
    """Microseconds: a projection, a rotation, the branches, and their backward on another thread."""
    return {
        "traceEvents": [
            {"ph": "M", "name": "process_name", "pid": 1},
            event(step_trace.STEP, -1, 161, "user_annotation"),
            event("aten::linear", 0, 10),
            event("aten::mm", 2, 6, **{"Sequence number": 1}),
            *launched("nvjet_hsh_128x256", 4, 100, 1000),
            event("rotary", 20, 20, "user_annotation"),
            event("aten::mul", 22, 6, **{"Sequence number": 5}),
            *launched("elementwise_kernel<MulFunctor>", 24, 1100, 200),
            event("aten::cos", 30, 6, **{"Sequence number": 9}),  # of tables, without a gradient
            event("aten::to", 42, 4, **{"Sequence number": 9}),
            event("nsa::nsa_attention_forward", 50, 100),
            event("nsa::compressed_attention", 52, 10),
            *launched("range_forward_sm90", 54, 1400, 3000),
            event("nsa::window_attention", 70, 10),
            *launched("range_forward_sm90", 72, 4400, 2000),
            *launched("combine_gates", 90, 6400, 500),
            event(f"{ENGINE}NsaFunction", 200, 100, thread=2, **{"Sequence number": 6}),
            event("nsa::nsa_attention_backward", 210, 80, thread=2),
            *launched("gate_gradients", 212, 7000, 100, 2),
            *launched("range_backward_query", 214, 7100, 400, 2),
            *launched("list_pairs", 216, 7500, 50, 2),
            *launched("selected_backward_keys", 218, 7550, 600, 2),
            *launched("range_backward_query", 220, 8150, 300, 2),
            event(f"{ENGINE}MulBackward0", 320, 20, thread=2, **{"Sequence number": 5}),
            event("aten::mul", 322, 10, thread=2),
            *launched("elementwise_kernel<MulFunctor>", 324, 8450, 250, 2),
            event(f"{ENGINE}MmBackward0", 350, 20, thread=2, **{"Sequence number": 1}),
            event("aten::fill_", 352, 6, thread=2),
            *launched("vectorized_elementwise_kernel<FillFunctor>", 354, 8700, 20, 2),
            event(f"{ENGINE}ToCopyBackward0", 380, 20, thread=2, **{"Sequence number": 9}),
            event("aten::copy_", 382, 6, thread=2),
            *launched("bfloat16_copy_kernel", 384, 8720, 30, 2),
        ]
    }


def test_a_trace_is_divided_into_parts() -> None:
    pieces = step_trace.pieces_of(made_up_trace())
    found = [
        (g, "backward" if p.backward else "forward") for g, p in zip(step_trace.groups_of(pieces), pieces, strict=True)
    ]
    assert found == [
        ("projections", "forward"),
        ("rotary", "forward"),
        ("compressed attention", "forward"),
        ("window attention", "forward"),
        ("gates", "forward"),
        ("gates", "backward"),
        ("compressed attention", "backward"),
        ("selected attention", "backward"),
        ("selected attention", "backward"),
        ("window attention", "backward"),
        ("rotary", "backward"),
        ("fills", "backward"),
        ("copies and casts", "backward"),
    ]
    assert {piece.step for piece in pieces} == {1}
    total, gaps = step_trace.idle(pieces)
    assert total == pytest.approx(8.65)
    assert [round(ms, 6) for ms, _, _ in gaps if ms > 1e-9] == [0.1, 0.1]
    assert sum(piece.ms for piece in pieces) + sum(ms for ms, _, _ in gaps) == pytest.approx(total)


@pytest.mark.parametrize("quick", [True, False])
def test_training_step_writes_rows_of_which_views_make_a_table(quick: bool, tmp_path: Path) -> None:
    output = tmp_path / "step.json"
    sizes = ["--length", "256", "--hidden", "32", "--heads", "4", "--kv-heads", "2", "--dim", "8", "--device", "cpu"]
    more = ["--quick"] if quick else ["--modes", "eager", "--methods", "nsa", "dense"]
    command = [sys.executable, "benchmarks/training_step.py", *sizes, "--budget", "0.01", "--commit", "x", *more]
    done = subprocess.run([*command, "--output", str(output)], cwd=ROOT, check=True, capture_output=True, text=True)
    assert "attention " in done.stdout.splitlines()[-2]
    file = json.loads(output.read_text())
    assert len(file["rows"]) == (1 if quick else 2)
    for row in file["rows"]:
        assert {*table.MACHINE, *table.PROBLEM, "direction", "ms", "peers", "peak_bytes", "error"} <= set(row)
        assert row["ms"] > 0 and row["peers"]["dense"] > 0
        parts = row["groups"]
        for name in ("compressed attention", "selected attention", "window attention", "projections"):
            assert parts[name]["forward"] > 0 and parts[name]["backward"] > 0, name
        assert parts["choice of blocks"]["forward"] > 0
        assert row["peer_parts"]["dense"]["groups"]["dense attention"]["forward"] > 0
    page = views.step(file, file["rows"])
    assert "| selected attention |" in page
    assert "**" in page


def test_views_of_the_gpu_bench() -> None:
    """The parts of a whole with their rates; forward and backward together against the peer; memory."""
    file = json.loads((ROOT / "benchmarks" / "results" / "gpu-nvidia-h100-80gb-hbm3.json").read_text())
    rows = table.chosen(file["rows"], ["seqlen=65536", "data=random"])
    lines = views.parts(file, rows).splitlines()
    assert len(lines) == 2 + 2 + len(views.PARTS)
    assert "GB/s" in lines[4] and "TFLOP/s" in lines[5]
    whole = {row["direction"]: row for row in rows if row["op"] == "nsa_attention"}
    both = sum(row["peers"]["cudnn"] for row in whole.values()) / sum(row["ms"] for row in whole.values())
    line = views.sums(file, [*whole.values()]).splitlines()[-1]
    assert f"| {both:.2f} |" in line
    own, peer = whole["backward"]["peak_bytes"], whole["backward"]["peer_peak_bytes"]["cudnn"]
    keys_and_values = 65536 * 4 * 2 * 128 * 2
    assert line.endswith(f"| {(own - keys_and_values * (1 + 1 / 16)) / peer:.2f} |")
