"""What nvcc made of the Hopper kernels: their instructions, no spills, and loads that are done before buffers go back.

Reads the built library with cuobjdump, of the CUDA toolkit or of triton, whose wheel torch's CUDA builds bring along.
Skipped where the build says that it is not for Hopper. Where it says that it is, the code must be there.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "nsa_torch"
LIBRARY = PACKAGE / "lib" / "libnsa_torch_kernels.so"
KERNEL = re.compile(r"\d+([a-z_]+_sm90)I")  # of a mangled name
MULTIPLIES = {
    "range_forward_sm90",
    "range_backward_query_sm90",
    "range_backward_keys_sm90",
    "select_blocks_sm90",
    "selected_forward_sm90",
    "selected_backward_query_sm90",
    "selected_query_handed_sm90",
    "selected_backward_keys_sm90",
}
ADDS = {"range_add_partials_sm90"}
STREAMS = {"decode_ranges_sm90", "decode_selected_sm90"}  # few rows: products of a warp, copies by lanes


class Instruction(NamedTuple):
    at: str
    name: str
    operands: list[str]


class Kernel(NamedTuple):
    name: str  # mangled
    instructions: list[Instruction]

    @property
    def short_name(self) -> str:
        found = KERNEL.search(self.name)
        return found[1] if found else ""

    def has(self, *names: str) -> bool:
        return any(instruction.name.startswith(names) for instruction in self.instructions)


def parse(lines: Iterable[str]) -> Iterator[Kernel]:
    """The kernels for Hopper in a listing of cuobjdump -sass, one at a time."""
    line_of_code = re.compile(r"\s+/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\w+ )?\s*(\S+)(.*?) ;")
    kernel: Kernel | None = None
    for line in lines:
        if "Function : " in line:
            if kernel is not None:
                yield kernel
            name = line.split("Function : ")[1].strip()
            kernel = Kernel(name, []) if KERNEL.search(name) else None
        elif kernel is not None and (found := line_of_code.match(line)):
            kernel.instructions.append(Instruction(found[1], found[2], found[3].split(",")))
    if kernel is not None:
        yield kernel


def registers(operands: Iterable[str], width: int) -> set[int]:
    first = [int(number) for number in re.findall(r"\bR(\d+)", ",".join(operands))]
    return {number + i for number in first for i in range(width)}


def early_arrivals(kernel: Kernel) -> list[str]:
    """Arrivals at a barrier before which something has been loaded by ldmatrix that no instruction has used yet.

    A thread's arrival may overtake its loads. If it gives back the buffer that they read, the next copy may come first.
    """
    pending: set[int] = set()  # first registers of what was loaded
    early = []
    for at, name, operands in kernel.instructions:
        if pending:
            writes = 0 if name.startswith(("ST", "RED", "HGMMA")) else 1  # operands, which come first
            used = registers(operands[writes:], 4 if name.startswith(("HMMA", "HGMMA")) or ".128" in name else 1)
            pending = {first for first in pending if not used & set(range(first, first + 4))}
        if name.startswith("LDSM"):
            pending |= registers(operands[:1], 1)
        elif name.startswith("SYNCS.ARRIVE"):
            if pending:
                early.append(f"{kernel.name}: {at}, before R{min(pending)}")
            pending = set()
    return early


def cuobjdump() -> str | None:
    in_path = shutil.which("cuobjdump")
    triton = importlib.util.find_spec("triton")
    if in_path is None and triton is not None and triton.origin is not None:
        own = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        return str(own) if own.exists() else None
    return in_path


def read_library(*options: str) -> str:
    if "9.0a" not in json.loads((PACKAGE / "build_info.json").read_text())["architectures"]:
        pytest.skip("the build is not for compute capability 9.0a")
    program = cuobjdump()
    assert program is not None, "there is no cuobjdump to read the library with"
    command = [program, "-arch", "sm_90a", *options, str(LIBRARY)]
    listing = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    assert KERNEL.search(listing), "build_info.json says 9.0a, but the library holds no kernels for it"
    return listing


def test_hopper_kernels_use_no_local_memory() -> None:
    usage = re.findall(r"Function (\w+):\s+(REG:.*)", read_library("-res-usage"))
    kernels = [(name, used) for name, used in usage if KERNEL.search(name)]
    assert {KERNEL.search(name)[1] for name, _ in kernels} == MULTIPLIES | ADDS | STREAMS  # type: ignore[index]
    assert [name for name, used in kernels if "STACK:0 " not in used or "LOCAL:0 " not in used] == []


def test_hopper_kernels_multiply_and_copy_and_load_in_time() -> None:
    kernels = 0
    early = []
    for kernel in parse(read_library("-sass").splitlines()):
        if kernel.short_name in MULTIPLIES:
            assert kernel.has("HGMMA"), kernel.name
            assert kernel.has("UTMALDG", "UBLKCP"), kernel.name
            kernels += 1
        if kernel.short_name in STREAMS:
            assert kernel.has("HMMA") and kernel.has("LDGSTS"), kernel.name
            kernels += 1
        assert not kernel.has("STL", "LDL"), kernel.name
        early += early_arrivals(kernel)
    assert kernels >= len(MULTIPLIES | STREAMS)
    assert early == []


LISTING = """
        Function : _ZN3nsa21selected_forward_sm90IXEEv
        /*0010*/                   LDSM.16.M88.4 R8, [R2] ;                    /* 0x01 */
        /*0020*/                   LDSM.16.M88.4 R12, [R2+0x800] ;             /* 0x02 */
        /*0030*/                   HMMA.16816.F32.BF16 R32, R20, R8, R32 ;     /* 0x03 */
        /*0040*/              @!P0 SYNCS.ARRIVE.TRANS64.A1T0 RZ, [UR4], RZ ;   /* 0x04 */
        /*0050*/                   HMMA.16816.F32.BF16 R36, R20, R14, R36 ;    /* 0x05 */
"""


def test_an_arrival_before_its_loads_are_used_is_found() -> None:
    (kernel,) = parse(LISTING.splitlines())
    assert early_arrivals(kernel) == [f"{kernel.name}: 0040, before R12"]
    lines = LISTING.splitlines()
    (in_order,) = parse([*lines[:5], lines[6], lines[5]])
    assert early_arrivals(in_order) == []
