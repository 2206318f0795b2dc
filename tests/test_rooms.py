"""The rooms of csrc: who includes whom, and that every kernel that is listed is compiled, in a file of its own."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[1] / "csrc"
INCLUDE = re.compile(r'^\s*#\s*include\s*"([^"]+)"', re.MULTILINE)

# From the lowest floor up. A file includes what is in its own room, and in rooms of lower floors.
FLOORS = (
    ("common",),
    ("host",),
    ("gates",),
    ("compression", "range", "rotate", "selected", "selection"),
    ("decode",),
    ("nsa", "plans"),
    ("python",),
)
ELEMENTS = (("bf16", "BFloat16"), ("fp16", "Half"))
ROLES = ("forward_", "backward_query_", "backward_keys_")


def room_of(path: str) -> str:
    return path.split("/", maxsplit=1)[0]


def floor_of(path: str) -> int:
    """-1 for what is in no room."""
    return next((floor for floor, rooms in enumerate(FLOORS) if room_of(path) in rooms), -1)


def sources() -> list[str]:
    return sorted(str(path.relative_to(CSRC)) for path in CSRC.glob("*/**/*") if path.is_file())


@pytest.mark.parametrize("name", sources())
def test_no_room_includes_a_higher_one(name: str) -> None:
    assert floor_of(name) >= 0, f"{room_of(name)} is a room that FLOORS does not know"
    for include in INCLUDE.findall((CSRC / name).read_text()):
        if room_of(include) != room_of(name):
            assert 0 <= floor_of(include) < floor_of(name), f"{name} includes {include}"


def listed_tiles() -> tuple[list[tuple[int, int]], int]:
    """Dimensions of keys and values, and the most of keys that Hopper's kernels take, as dispatch.h has them."""
    dispatch = (CSRC / "common" / "dispatch.h").read_text()
    tiles = re.search(r"kTileDims\[\] = \{(.*)\};", dispatch)
    most = re.search(r"has_sm90_kernels\(int32_t tile_k\) \{ return tile_k <= (\d+); \}", dispatch)
    assert tiles is not None and most is not None
    return [(int(k), int(v)) for k, v in re.findall(r"\{(\d+), (\d+)\}", tiles[1])], int(most[1])


def instantiations() -> Iterator[tuple[Path, str]]:
    """Every file that there must be, and the template arguments in it."""
    tiles, most = listed_tiles()
    for branch, machine in product(("range", "selected", "selection"), ("sm80", "sm90")):
        roles = ROLES if machine == "sm90" and branch != "selection" else ("",)
        for (short, element), (k, v), role in product(ELEMENTS, tiles, roles):
            if machine == "sm80" or k <= most:
                dims = [k] if branch == "selection" else [k, v]
                name = "_".join([short, *map(str, dims)])
                arguments = ", ".join([element, *map(str, dims)])
                yield CSRC / branch / machine / "instantiations" / f"{role}{name}.cu", arguments
    for (short, element), (k, v), machine in product(ELEMENTS, tiles, ("sm80", "sm90")):
        if machine == "sm80" or k <= most:
            yield CSRC / "decode" / machine / "instantiations" / f"{short}_{k}_{v}.cu", f"{element}, {k}, {v}"


def test_every_kernel_that_is_listed_is_compiled() -> None:
    expected = dict(instantiations())
    assert {*CSRC.rglob("instantiations/*")} == set(expected)
    for path, arguments in expected.items():
        found = re.findall(r"^template (?:void|struct) \w+<([^>]*)>", path.read_text(), flags=re.MULTILINE)
        assert found and set(found) == {arguments}, path
