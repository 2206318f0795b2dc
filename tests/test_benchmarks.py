"""The benchmarks run, and the tables of figures are what they measured."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import gpu
import peers
import table
from problems import make_problem
from shapes import MODELS, Shape
from timing import Ceilings, Device
from views import VIEWS

ROOT = Path(__file__).resolve().parents[1]
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
FIELDS = {*table.MACHINE, *table.PROBLEM, "direction", "ms", "peers", "peak_bytes", "error"}

OF_DECODING = {"gpu", "commit", "context", "batch", "tokens", "heads", "kv_heads", "dk", "dv", "dtype", "cache"}
OF_DECODING |= {"us", "peers", "bytes", "error"}


def make_row(**changes: Any) -> dict[str, Any]:
    return dict.fromkeys(FIELDS) | {"seqlen": 1024, "direction": "forward", "ms": 2.0, "peers": {"sdpa": 5.0}} | changes


def test_tables_show_what_was_measured() -> None:
    pages = table.pages()
    assert {ROOT / "README.md", ROOT / "docs" / "performance.md"} <= set(pages)
    for page in pages:
        text = page.read_text()
        assert table.fill(text) == text, f"{page.relative_to(ROOT)}: run `make tables`"


def test_tables_out_of_date_are_named(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text((ROOT / "README.md").read_text().replace("| 64 / 4 |", "| 65 / 4 |", 1))
    command = [sys.executable, "benchmarks/table.py"]
    result = subprocess.run([*command, "--check", page], cwd=ROOT, check=False, capture_output=True, text=True)
    assert result.returncode == 1
    assert f"{page}: tables differ" in result.stdout
    subprocess.run([*command, "--write", page], cwd=ROOT, check=True)
    assert page.read_text() == (ROOT / "README.md").read_text()


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_rows_have_every_field(path: Path) -> None:
    rows = json.loads(path.read_text())["rows"]
    assert rows
    for row in rows:
        assert set(row) >= (OF_DECODING if path.stem.startswith("decode-") else FIELDS)
        assert not row["commit"].endswith("-changed"), "measured on sources that no commit holds"


def test_table_joins_directions_and_leaves_gaps() -> None:
    rows = [
        make_row(peak_bytes=3_000_000, error=1e-7, limit_ms=1.0),
        make_row(direction="backward", ms=4.0, peers={}),
        make_row(seqlen=2048, ms=1000.0),
    ]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.table(rows).splitlines()[2:]]
    heading, _, both, forward = lines
    assert heading[:4] == ["seqlen", "forward, ms", "sdpa, ms", "sdpa / this"]
    assert both == ["1,024", "2.0", "5.0", "2.50", "50%", "3", "1e-07", "4.0", "", "", "", "", ""]
    assert forward == ["2,048", "1,000.0", "5.0", "0.01", *[""] * 9]


def test_speed_writes_rows_of_which_table_makes_a_table(tmp_path: Path) -> None:
    output = tmp_path / "speed.json"
    command = [sys.executable, "benchmarks/speed.py", "--max-length", "1024", "--repeat", "1", "--output", str(output)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    rows = json.loads(output.read_text())["rows"]
    assert [row["direction"] for row in rows] == ["forward", "forward+backward"]
    for row in rows:
        assert set(row) >= FIELDS
        assert row["ms"] > 0 and row["peers"]["sdpa"] > 0 and row["peak_bytes"] > 0
        assert row["error"] < 1e-5
    assert "| 1,024 |" in table.table(rows)


SMALL = Shape("small, 2 x 150", 150, 150, 4, 2, 16, 16, batch=2, window=40)


def test_a_batch_is_measured_and_right() -> None:
    options = Namespace(data=["random", "correlated"], dtype="float32", device="cpu", budget=0.0)
    options = Namespace(**vars(options), ops=list(gpu.OPS), peers=True, errors=True, flex=False)
    head = {"gpu": None, "cpu": "here", "torch": torch.__version__, "commit": "none", "dtype": "float32"}
    rows = gpu.bench_shape(Device("cpu"), SMALL, options, head, Ceilings(1e12, 1e11), {})
    assert len(rows) == 2 * (2 * len(gpu.OPS) - 1)  # two kinds of data; no backward of the choice
    for row in rows:
        assert set(row) >= FIELDS and row["batch"] == 2 and row["ms"] > 0
        assert row["error"] < 1e-5, row["op"]


def test_models_name_their_rows() -> None:
    assert {(s.heads_q, s.heads_kv, s.dim_k) for s in MODELS} == {(32, 8, 128), (32, 8, 64), (64, 8, 128), (64, 4, 128)}
    assert {(s.batch, s.seqlen_k) for s in MODELS} == {(1, 8192), (1, 32768), (8, 4096), (4, 8192)}
    assert gpu.described(MODELS[0]) | {"model": "Llama 3 8B", "batch": 1, "heads": 32} == gpu.described(MODELS[0])
    assert "model" not in gpu.described(SMALL)


def flash_attn_4(answer: Any) -> dict[str, ModuleType]:
    """Modules in the place of flash_attn and flash_attn.cute."""
    package, cute = ModuleType("flash_attn"), ModuleType("flash_attn.cute")
    package.__path__ = []
    package.__spec__ = Namespace(name="flash_attn")  # type: ignore[assignment]
    cute.flash_attn_func = answer  # type: ignore[attr-defined]
    return {"flash_attn": package, "flash_attn.cute": cute}


def causal(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    assert causal
    heads_first = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True).transpose(1, 2)


@pytest.mark.parametrize("with_lse", [False, True], ids=["out", "out and lse"])
def test_flash_attention_4_is_a_peer_where_it_is_installed(monkeypatch: pytest.MonkeyPatch, with_lse: bool) -> None:
    def answer(q: Tensor, k: Tensor, v: Tensor, **options: bool) -> Any:
        out = causal(q, k, v, **options)
        return (out, None) if with_lse else out

    for name, module in flash_attn_4(answer).items():
        monkeypatch.setitem(sys.modules, name, module)
    notes: dict[str, str] = {}
    peer, tensors = peers.dense_peers(make_problem(SMALL, "random", torch.float32, "cpu"), notes)["fa4"]
    assert notes["fa4"] == "flash-attn-4 of unknown version, K and V in groups"
    assert [t.size(2) for t in tensors] == [4, 2, 2]
    torch.testing.assert_close(peer(*tensors), causal(*tensors, causal=True))


def test_why_flash_attention_4_does_not_run_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make_problem(SMALL, "random", torch.float32, "cpu")
    notes: dict[str, str] = {}
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    assert "fa4" not in peers.dense_peers(problem, notes)
    assert notes["fa4"] == "not installed"

    def refuse(*_: Tensor, causal: bool) -> Tensor:
        raise RuntimeError(f"not for this GPU, causal {causal}")

    for name, module in flash_attn_4(refuse).items():
        monkeypatch.setitem(sys.modules, name, module)
    assert "fa4" not in peers.dense_peers(problem, notes)
    assert notes["fa4"] == "not run: not for this GPU, causal True"
    monkeypatch.delattr(sys.modules["flash_attn.cute"], "flash_attn_func")
    assert "fa4" not in peers.dense_peers(problem, notes)
    assert notes["fa4"].startswith("not run: module 'flash_attn.cute' has no attribute")


def test_dense_view_marks_where_this_is_faster_than_every_peer() -> None:
    def pair(seqlen: int, forward: float, **changes: Any) -> list[dict[str, Any]]:
        row = {"op": "nsa_attention", "seqlen": seqlen, "batch": 1, "heads": 64, "kv_heads": 4, "dk": 128, "dv": 128}
        row |= {"data": "random", "dtype": "bfloat16", "gpu": "a GPU", "torch": "2", "commit": "c"} | changes
        return [
            make_row(**row, direction="forward", ms=forward, peers={"cudnn": 2.0, "fa2": 4.0}),
            make_row(**row, direction="backward", ms=2 * forward, peers={"cudnn": 7.0, "fa2": 4.0}),
        ]

    lines = VIEWS["dense"]({}, [*pair(1024, 4.0), *pair(65536, 2.0)]).splitlines()[2:]
    assert lines[0] == "| heads / KV heads | d | tokens | this, ms | cuDNN, ms | FA2, ms | fastest dense / this |"
    assert lines[2] == "| 64 / 4 | 128 | 1 x 1k | 4.00 / 8.00 | 2.00 / 7.00 | 4.00 / 4.00 | 0.67 |"
    assert lines[3] == "| 64 / 4 | 128 | 1 x 64k | 2.00 / 4.00 | 2.00 / 7.00 | 4.00 / 4.00 | **1.33** |"
    named = VIEWS["dense"]({}, pair(4096, 4.0, batch=8, model="Llama")).splitlines()[2:]
    assert named[0].startswith("| as in | heads") and named[2].startswith("| Llama | 64 / 4 | 128 | 8 x 4k |")


def test_backwards_of_some_gradients_are_measured(tmp_path: Path) -> None:
    output = tmp_path / "new" / "gradients.json"
    command = [sys.executable, "benchmarks/gradients.py", "--device", "cpu", "--lengths", "128", "--budget", "0.01"]
    subprocess.run([*command, "--commit", "none", "--output", output], cwd=ROOT, check=True, capture_output=True)
    file = json.loads(output.read_text())
    first, gates = file["rows"][0], file["rows"][2]
    assert first["share"] == 1 and gates["wanted"] == "gates" and 0 < gates["share"] < 1
    lines = VIEWS["gradients"](file, file["rows"]).splitlines()[2:]
    assert len(lines) == 2 + len(file["rows"]) and "| k_cmp, v_cmp |" in lines[6]
