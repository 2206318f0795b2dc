"""The documentation says what the code says: API pages, links, examples, defaults, commands."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import nsa_torch
from helpers import load_script

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
CURRENT = [page for page in PAGES if "notes" not in page.parts]
# A time, a rate, or a ratio of speeds.
RATIO = r"\d[\d.,]* ?(?:x|times) (?:as fast|faster|its speed)"
MEASURED = re.compile(rf"\d[\d.,]* ?(?:ms|us|µs|[TG]FLOP/s|[TG]B/s)\b|{RATIO}")
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
PUBLIC = [getattr(nsa_torch, name) for name in nsa_torch.__all__ if not name.startswith("_")]
DOCUMENTED = [item for item in PUBLIC if inspect.isfunction(item) or inspect.isclass(item)]


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    return load_script(ROOT / "docs" / "generate_api.py")


def without_code(text: str) -> str:
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Names of a page's headings, as they appear in links."""
    headings = re.findall(r"^#+ +(.*)$", without_code(page.read_text()), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_api_pages_are_up_to_date(generator: ModuleType) -> None:
    written = {page.name: page.read_text() for page in (ROOT / "docs" / "api").glob("*.md")}
    assert written == generator.pages(), "run `make docs`"


@pytest.mark.parametrize("item", DOCUMENTED, ids=lambda item: item.__name__)
def test_public_names_are_documented(generator: ModuleType, item: object) -> None:
    name = item.__name__  # type: ignore[attr-defined]
    assert inspect.getdoc(item), f"{name} has no docstring"
    headings = re.findall(r"^## (\S+)$", "\n".join(generator.pages().values()), flags=re.MULTILINE)
    assert name in {heading.replace("\\", "") for heading in headings}


def test_every_op_has_a_python_and_a_cpp_function(generator: ModuleType) -> None:
    schemas = re.findall(r'"(\w+)\(', (ROOT / "csrc" / "library.cpp").read_text())
    ops = {name for name in schemas if not name.endswith(("_backward", "_forward"))}
    assert ops, "no schemas found"
    pages = generator.pages()
    for name in ops:
        assert hasattr(torch.ops.nsa, name)
        assert callable(getattr(nsa_torch, name))
        assert re.search(rf"^## {name}$", pages["cpp.md"], flags=re.MULTILINE), f"{name} is not in csrc/nsa.h"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(without_code(page.read_text())):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


def test_readme_examples_run() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert blocks
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    decoded = torch.cat([names["prefix"], *names["tokens"]], dim=1)
    torch.testing.assert_close(decoded, names["y"].detach(), atol=1e-5, rtol=1e-4)


def test_the_readme_is_read_in_two_minutes() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("page", CURRENT, ids=lambda page: str(page.relative_to(ROOT)))
def test_measured_figures_stand_in_tables_that_are_made(page: Path) -> None:
    """Of pages that say how things are now; notes are records of a day."""
    prose = re.sub(r"<!-- table: .*?<!-- end of table -->", "", page.read_text(), flags=re.DOTALL)
    assert MEASURED.findall(prose) == []


def test_defaults_in_the_maths_are_those_of_the_code() -> None:
    table = re.findall(r"^\| [^|]+\| ([^|]+)\|[^|]+\| ([\d, ]+) \|$", (ROOT / "docs/math.md").read_text(), flags=re.M)
    stated = {
        name: int(value)
        for names, values in table
        for name, value in zip(re.findall(r"`(\w+)`", names), values.split(","), strict=False)
    }
    assert set(stated) == {
        "block_size",
        "block_stride",
        "select_size",
        "num_selected",
        "num_initial",
        "num_local",
        "window",
    }
    for item in DOCUMENTED:
        for parameter in inspect.signature(item).parameters.values():
            if parameter.name in stated and parameter.default is not inspect.Parameter.empty:
                assert parameter.default == stated[parameter.name], f"{item.__name__}: {parameter.name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_commands_name_exist(page: Path) -> None:
    for name in re.findall(r"\b(?:tests|benchmarks|examples|tools|docs)/[\w/]+\.(?:py|md)\b", page.read_text()):
        assert (ROOT / name).exists(), name


def test_pages_that_sources_name_exist() -> None:
    folders = ("csrc", "nsa_torch", "benchmarks", "tools", "examples")
    for source in (path for folder in folders for path in (ROOT / folder).rglob("*")):
        if source.suffix in (".h", ".cpp", ".cu", ".cuh", ".py"):
            for name in re.findall(r"\bdocs/[\w/]+\.md\b", source.read_text()):
                assert (ROOT / name).exists(), f"{source.relative_to(ROOT)}: {name}"


def test_commands_in_the_documents_are_targets_of_the_makefile() -> None:
    targets = set(re.findall(r"^([a-z]+):.*##", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for page in PAGES:
        for code in re.findall(r"```sh\n.*?```|`[^`\n]+`", page.read_text(), flags=re.DOTALL):
            for target in re.findall(r"^`?make ([a-z]+)", code, flags=re.MULTILINE):
                assert target in targets, f"{page.name}: make {target}"


def test_the_tables_of_what_runs_where_are_up_to_date() -> None:
    """After a run of a suite, or a change of a plan: python tools/support.py."""
    if nsa_torch.build_info()["cuda"] is None:
        pytest.skip("a build with CUDA says what the plans say")
    result = subprocess.run(
        [sys.executable, "tools/support.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
