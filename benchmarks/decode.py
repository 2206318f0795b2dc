"""Times of a decoding step's attention in CUDA graphs, beside dense attention over the same context.

    python benchmarks/decode.py                      # all rows, on a GPU
    python benchmarks/decode.py --rows 8k:1 64k:32   # context:batch

A row is one layer's attention of `tokens` new tokens for each sequence, keys and values in pages of 64 in random order.
Each graph walks several copies of the data, so that a call finds nothing of its own in the cache. Peers are torch's
scaled_dot_product_attention over contiguous keys and values, in graphs of the same process. `error` is the largest
difference from the same op in float32.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

import nsa_torch
from gpu import commit_of, slug, write
from peers import in_a_line

Row = dict[str, Any]
RESULTS = Path(__file__).parent / "results"
CONTEXTS = {"8k": 8192, "32k": 32768, "64k": 65536}
PAGE, STRIDE, WINDOW, SELECTED = 64, 16, 512, 16
CACHE_BYTES = 150e6  # that copies of the data have to exceed together
MOST_COPIES = 16


def median_us(calls: list[Callable[[], object]], rounds: int) -> float:
    """Microseconds of one call: of a graph that makes each of them `rounds` times, the median of nine replays."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    times = []
    for _ in range(9):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / rounds / len(calls))
    return statistics.median(times)


def paged_inputs(row: Row, dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    """A layer's step: tensors of nsa_attention_with_kvcache."""
    random = torch.Generator("cuda").manual_seed(seed)
    pages = row["batch"] * row["context"] // PAGE

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=random, device="cuda", dtype=dtype)

    given = {"q": normal(row["batch"], row["tokens"], row["heads"], row["dk"])}
    for branch in ("cmp", "slc", "win"):
        rows = PAGE // STRIDE if branch == "cmp" else PAGE
        given[f"k_{branch}"] = normal(pages, rows, row["kv_heads"], row["dk"])
        given[f"v_{branch}"] = normal(pages, rows, row["kv_heads"], row["dv"])
    given["gates"] = normal(row["batch"], row["tokens"], row["heads"], 3).sigmoid()
    if row.get("layout") == "heads first":
        for name in [x for x in given if x[:2] in ("k_", "v_")]:
            given[name] = given[name].transpose(1, 2).contiguous().transpose(1, 2)
    order = torch.randperm(pages, generator=random, device="cuda").int()
    given["block_table"] = order.reshape(row["batch"], -1)
    given["cache_seqlens"] = torch.full((row["batch"],), row["context"], dtype=torch.int32, device="cuda")
    return given


def bytes_moved(row: Row) -> int:
    """What a step has to read: compressed keys, the window, and each query's blocks, which it may not share."""
    tokens = row["context"] // STRIDE + WINDOW + row["tokens"] * SELECTED * PAGE
    return row["batch"] * tokens * row["kv_heads"] * (row["dk"] + row["dv"]) * 2


def measure_peers(row: Row, dtype: torch.dtype) -> dict[str, float | str]:
    """Dense attention. Several tokens: without a mask, which is less work than they would have to do."""
    size = row["batch"] * row["context"] * row["kv_heads"] * (row["dk"] + row["dv"]) * 2
    copies = max(1, min(4, int(CACHE_BYTES / size) + 1))
    found: dict[str, float | str] = {}
    for name, backend in {"cudnn": SDPBackend.CUDNN_ATTENTION, "fa2": SDPBackend.FLASH_ATTENTION}.items():
        try:
            sets = []
            for _ in range(copies):
                q = torch.randn(row["batch"], row["heads"], row["tokens"], row["dk"], device="cuda", dtype=dtype)
                k = torch.randn(row["batch"], row["kv_heads"], row["context"], row["dk"], device="cuda", dtype=dtype)
                v = torch.randn(row["batch"], row["kv_heads"], row["context"], row["dv"], device="cuda", dtype=dtype)
                sets.append((q, k, v))
            found[name] = median_us([partial(attend_dense, backend, *each) for each in sets], max(1, 24 // copies))
        except RuntimeError as error:
            found[name] = in_a_line(error)
        sets = []
        torch.cuda.empty_cache()
    return found


def attend_dense(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.nn.attention.sdpa_kernel(backend):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)


@torch.no_grad()
def measure(row: Row) -> Row:
    dtype = getattr(torch, row["dtype"])
    moved = bytes_moved(row)
    pools = row["batch"] * row["context"] * row["kv_heads"] * (row["dk"] + row["dv"]) * 2 * 2.1
    copies = max(1, min(MOST_COPIES, int(CACHE_BYTES / moved) + 1, int(80e9 / pools)))
    sets = [paged_inputs(row, dtype, seed) for seed in range(copies)]
    attend = nsa_torch.nsa_attention_with_kvcache
    us = median_us([partial(attend, **each) for each in sets], max(1, 48 // copies))
    first = {name: x.float() if x.is_floating_point() else x for name, x in sets[0].items()}
    error = (attend(**sets[0]).float() - attend(**first)).abs().max().item() if row["batch"] <= 8 else None
    del sets, first
    torch.cuda.empty_cache()
    return row | {"us": us, "peers": measure_peers(row, dtype), "bytes": moved, "error": error}


def rows_of(options: argparse.Namespace) -> list[Row]:
    rows = []
    usual = {"tokens": 1, "heads": 64, "kv_heads": 4, "dk": 128, "dv": 128, "dtype": "bfloat16", "cache": "pages of 64"}
    for name in options.rows:
        context, batch = name.split(":")
        row = {"context": CONTEXTS[context], "batch": int(batch)} | usual
        rows.append(row)
        if batch != "32":
            rows.append(row | {"heads": 32, "kv_heads": 8})
        if name == "64k:8":
            rows += [row | {"tokens": 4}, row | {"heads": 32, "kv_heads": 8, "dk": 64, "dv": 64}]
    return rows


def line_of(row: Row) -> str:
    peers = {name: us for name, us in row["peers"].items() if not isinstance(us, str)}
    dense = min(peers.values(), default=float("nan"))
    shape = f"{row['heads']}/{row['kv_heads']} d {row['dk']} Tq {row['tokens']}"
    return (
        f"{row['context'] // 1024:3}k x {row['batch']:<3} {shape:22} {row['us']:8.1f} us   dense {dense:8.1f} us"
        f"   {dense / row['us']:5.2f}x   {row['bytes'] / row['us'] / 1e6:5.2f} TB/s   error {row['error']}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="time decoding steps")
    default = [f"{context}:{batch}" for context in CONTEXTS for batch in (1, 8, 32)]
    parser.add_argument("--rows", nargs="+", default=default, metavar="CONTEXT:BATCH")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--commit", help="of the sources; default: git's")
    options = parser.parse_args()
    gpu = torch.cuda.get_device_name()
    head = {
        "gpu": gpu,
        "commit": commit_of(options),
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version(),
    }
    rows = []
    path = options.output or RESULTS / f"decode-{slug(gpu)}.json"
    for row in rows_of(options):
        rows.append(head | measure(row))
        print(line_of(rows[-1]), flush=True)
        write(path, head | {"cudnn": torch.backends.cudnn.version()}, rows)


if __name__ == "__main__":
    main()
