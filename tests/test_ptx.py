"""What GPUs of 10.x and 12.x run: the library's PTX of 8.0, which their driver compiles, assembled here by ptxas.

That all of it assembles, spills next to no registers, and takes the shared memory that plans reckon with, can be told
without such a GPU. What came of it: docs/shared_memory.md.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

from nsa_torch import _C
from test_machine_code import LIBRARY, cuobjdump
from test_shared_memory import names_of

NEWER = ["sm_100", "sm_120"]
SPILLED = 64  # bytes of a thread, stored and loaded, that another compiler's few registers more may cost a kernel
# Of a kernel in what `ptxas -v` says.
USAGE = re.compile(
    r"Compiling entry function '(\w+)' for '\w+'.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
    r".*?Used (\d+) registers(?:.*?(\d+) bytes smem)?",
    re.DOTALL,
)


class Usage(NamedTuple):
    """What one kernel takes: of a thread and, in bytes, of a block."""

    name: str
    registers: int
    spilled: int
    shared: int


def ptxas() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("ptxas") or shutil.which("ptxas", path=str(Path(home, "bin")))


@pytest.fixture(scope="module")
def extracted(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The PTX of every source."""
    if "8.0+PTX" not in _C.build_info()["architectures"]:
        pytest.skip("the build has no PTX of 8.0")
    program = cuobjdump()
    assert program is not None, "there is no cuobjdump to read the library with"
    if ptxas() is None:
        pytest.skip("needs ptxas, of a CUDA toolkit")
    folder = tmp_path_factory.mktemp("ptx")
    subprocess.run([program, "-xptx", "all", str(LIBRARY)], cwd=folder, check=True, capture_output=True)
    return sorted(folder.glob("*.ptx"), key=lambda path: -path.stat().st_size)


def usage_of(text: str) -> Iterator[Usage]:
    for part in text.split("ptxas info    : Compiling")[1:]:
        found = USAGE.search("Compiling" + part)
        assert found is not None, part
        room, *_, name = names_of(found[1])
        if room == "nsa":
            yield Usage(name, int(found[4]), int(found[2]) + int(found[3]), int(found[5] or 0))


def assembled(source: Path, architecture: str) -> list[Usage]:
    command = [str(ptxas()), f"-arch={architecture}", "-v", str(source), "-o", os.devnull]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{source.name} for {architecture}: {done.stderr[:1000]}"
    return list(usage_of(done.stderr))


@pytest.mark.parametrize("architecture", NEWER)
def test_the_ptx_assembles_for_newer_gpus(architecture: str, extracted: list[Path]) -> None:
    """Every kernel is there, spills next to nothing, and declares the shared memory that plans state."""
    with ThreadPoolExecutor(2) as pool:
        kernels = [each for found in pool.map(lambda path: assembled(path, architecture), extracted) for each in found]
    assert [each for each in kernels if each.spilled > SPILLED] == []
    shared = defaultdict(set)
    for each in kernels:
        shared[each.name].add(each.shared)
    stated = defaultdict(set)
    for instance in _C.kernel_instances():
        stated[instance.kernel].add(instance.tile.static_bytes)
    assert shared.keys() == stated.keys()
    for name in (name for name in stated if not name.endswith("_sm90")):
        assert shared[name] == stated[name], name


SAID = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN3nsa5deltaEv' for 'sm_120'
ptxas info    : Function properties for _ZN3nsa5deltaEv
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 256 bytes smem
ptxas info    : Compile time = 245.049 ms
ptxas info    : Compiling entry function '_ZN3cub5otherEv' for 'sm_120'
ptxas info    : Function properties for _ZN3cub5otherEv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 10 registers, used 0 barriers
"""


def test_what_ptxas_says_is_understood() -> None:
    assert list(usage_of(SAID)) == [Usage("delta", 40, 16, 256)]
