"""Writes docs/shared_memory.md: every CUDA kernel, and the shared memory of its blocks of threads.

    python tools/shared_memory.py            # writes the page
    python tools/shared_memory.py --check    # fails when the page is not what it should be

Reads what the library says of itself, which the kernels are compiled from: no GPU is needed, and no build with CUDA.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "shared_memory.md"
LIMITS = {"8.6, 8.9, 12.0": 99, "8.0": 163, "9.0, 10.0": 227}  # KB, by compute capability
COLUMNS = " | ".join(f"{kilobytes} KB" for kilobytes in LIMITS.values())

if TYPE_CHECKING:
    from nsa_torch._C import KernelInstance

HEAD = f"""# Shared memory

What a block of threads may take depends on the GPU:
{", ".join(f"{limit} KB on {gpus}" for gpus, limit in LIMITS.items())}.
Below is every kernel that the library is compiled for, with what it declares (static) and what a launch adds (dynamic),
in bytes, and whether both fit. The numbers are those that the kernels are made of (`csrc/<branch>/tiles.h`).
`tests/test_shared_memory.py` holds this page to them and them to the compiled code. `tools/shared_memory.py` writes it.

Kernels whose names end in `_sm90` run on 9.0 alone. Of two that differ in stages alone, a plan takes the one with more
if it fits. Where lists of blocks lie in shared memory, they have 64 blocks here, or as many as the kernel takes. The
portable kernels of selected attention take longer ones, 4 bytes a block; the op refuses those that do not fit, before
any kernel starts.

`NSA_TORCH_SHARED_KB=99` is a switch for tests: plans take every GPU for one of so little, so that the portable kernels
run, with the stages that fit.

## Newer GPUs

Those of 10.x and 12.x run the PTX of 8.0, which their driver compiles. `tests/test_ptx.py` assembles all of it by ptxas
instead, for 10.0 and 12.0. Of CUDA 13.0's PTX all 322 kernels assemble, with the static shared memory of the table: so
the columns of 99 and of 227 KB are theirs. None spills registers for 8.0; for these two some do, a few bytes a thread:

| kernel | elements | Dk, Dv | stored + loaded, 10.0 | 12.0 |
|---|---|---|---|---|
| `range_forward_sm80` | bfloat16, float16 | 128, 128 | 8 + 16 | 12 + 12 |
| `range_backward_query_sm80` | bfloat16, float16 | 64, 64 | | 4 + 4 |
| `select_blocks_plain` | float32 | any | | 16 + 16 |
| `mean_forward` | bfloat16 | any | 8 + 8 | |

## The kernels

| kernel | elements | Dk, Dv | variant | rows x keys | stages | static + dynamic | {COLUMNS} |
|---|---|---|---|---|---|---|{"---|" * len(LIMITS)}
"""


def rows(instances: Iterable[KernelInstance]) -> Iterator[str]:
    """A line of the table for each kernel, with the elements that share all its numbers."""

    def numbers(each: KernelInstance) -> tuple[str | int, ...]:
        tile = each.tile
        sizes = (tile.rows, tile.keys, tile.stages, tile.static_bytes, tile.dynamic_bytes)
        return (each.kernel, each.dim_k, each.dim_v, each.variant, *sizes)

    ordered = sorted(instances, key=numbers)
    for (kernel, dim_k, dim_v, variant, *sizes), group in groupby(ordered, key=numbers):
        count_rows, keys, stages, static, dynamic = (int(size) for size in sizes)
        elements = ", ".join(sorted({each.element for each in group}))
        dims = f"{dim_k}, {dim_v}" if dim_v else str(dim_k or "any")
        tile = f"{count_rows} x {keys}" if count_rows and keys else str(count_rows or "")
        fits = ["yes" if static + dynamic <= limit * 1024 else "no" for limit in LIMITS.values()]
        cells = [f"`{kernel}`", elements, dims, variant, tile, stages or "", f"{static} + {dynamic}", *fits]
        yield "".join(f"| {cell} " if cell else "| " for cell in map(str, cells)) + "|"


def page() -> str:
    from nsa_torch._C import kernel_instances

    return HEAD + "\n".join(rows(kernel_instances())) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description="write docs/shared_memory.md")
    parser.add_argument("--check", action="store_true", help="write nothing, fail when the page differs")
    arguments = parser.parse_args()
    expected = page()
    if not arguments.check:
        PAGE.write_text(expected)
        return 0
    if not PAGE.exists() or PAGE.read_text() != expected:
        print(f"{PAGE.relative_to(ROOT)} is not up to date: run python tools/shared_memory.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
