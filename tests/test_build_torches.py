"""Which versions of torch a build is for, what metadata say of that, and what environments of a checkout share."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import backend
import build_command
import torches

ROOT = Path(__file__).resolve().parents[1]


def fake_torch(folder: Path, version: str, cuda: str = "None") -> Path:
    (folder / "torch").mkdir(parents=True)
    (folder / "torch" / "version.py").write_text(
        f"from typing import Optional\n__version__ = '{version}'\ndebug = False\ncuda: Optional[str] = {cuda}\n"
    )
    return folder


def test_torches_are_read_where_they_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [fake_torch(tmp_path / "b", "2.15.0+cu132", "'13.2'"), fake_torch(tmp_path / "a", "2.11.1+cpu")]
    monkeypatch.setenv("NSA_TORCHES", os.pathsep.join(map(str, folders)))
    older, newer = torches.served()
    assert (older.minor, older.cuda, newer.minor, newer.cuda) == ("2.11", None, "2.15", "13.2")
    monkeypatch.setenv("NSA_TORCHES", str(tmp_path / "nothing"))
    with pytest.raises(SystemExit, match="there is no torch in"):
        torches.served()
    monkeypatch.setenv("NSA_TORCHES", os.pathsep.join([str(folders[0])] * 2))
    with pytest.raises(SystemExit, match="twice"):
        torches.served()


def test_the_installed_torch_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NSA_TORCHES", raising=False)
    (found,) = torches.served()
    assert (found.version, found.cuda) == (torch.__version__, torch.version.cuda)
    assert found.root == Path(torch.__file__).parent.resolve()


@pytest.mark.parametrize(
    ("minors", "expected"),
    [
        (["2.15"], "torch>=2.15,<2.16"),
        (["2.12", "2.11"], "torch>=2.11,<2.13"),
        (torches.SUPPORTED, "torch>=2.11,<2.16"),
        (["2.9", "2.11", "2.12"], "torch>=2.9,<2.13,!=2.10.*"),
    ],
)
def test_what_metadata_require(minors: list[str], expected: str) -> None:
    assert torches.requirement(minors) == expected


def install(folder: Path, version: str, cuda: str = "None") -> Path:
    """As pip lays it down."""
    stated = fake_torch(folder, version, cuda) / f"torch-{version}.dist-info"
    stated.mkdir()
    (stated / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
    return folder


@pytest.mark.parametrize(
    ("installed", "expected"),
    [("2.13.0", "torch==2.13.*"), ("2.12.1+cu130", "torch==2.12.*"), (None, "torch>=2.11,<2.16")],
)
def test_an_isolated_build_takes_the_torch_that_is_installed(
    installed: str | None, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if installed is not None:
        install(tmp_path, installed)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    assert backend.get_requires_for_build_wheel() == [expected]
    assert backend.get_requires_for_build_sdist() == []


@pytest.mark.parametrize("installed", ["2.10.0", "2.16.0+cu132"])
def test_an_isolated_build_does_not_replace_a_torch_that_is_not_supported(
    installed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, installed)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(SystemExit) as error:
        backend.get_requires_for_build_wheel()
    assert str(error.value) == (
        f"nsa_torch: torch {installed} is installed in {tmp_path}, but torch must be 2.11 or 2.12 or 2.13 or 2.14 or "
        "2.15: pip install 'torch==2.15.*' first, or take a fresh environment"
    )
    assert backend.get_requires_for_build_sdist() == []


@pytest.mark.parametrize("shared", ["true", "false"])
def test_a_torch_that_an_environment_shares_is_seen(
    shared: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in one made with `python -m venv --system-site-packages`."""
    (tmp_path / "pyvenv.cfg").write_text(f"include-system-site-packages = {shared}\n")
    install(tmp_path / "system", "2.12.1")
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path / "own"))
    monkeypatch.setattr("site.getsitepackages", lambda prefixes: [str(tmp_path / "system")])
    monkeypatch.setattr("site.getusersitepackages", lambda: str(tmp_path / "user"))
    expected = {"true": "torch==2.12.*", "false": "torch>=2.11,<2.16"}
    assert backend.get_requires_for_build_wheel() == [expected[shared]]
    own = torches.at(install(tmp_path / "own", "2.13.0"))  # comes before what is shared
    assert backend.get_requires_for_build_wheel() == ["torch==2.13.*"]
    assert torches.beneath([own]) is None


def test_the_torch_beneath_an_isolated_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = install(tmp_path / "site", "2.13.0+cpu")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(site))
    monkeypatch.delenv("NSA_TORCHES", raising=False)
    fetched = torches.at(fake_torch(tmp_path / "fetched", "2.13.1+cu130", "'13.0'"))
    there = torches.beneath([fetched])
    assert there is not None and (there.version, there.cuda) == ("2.13.0+cpu", None)
    assert torches.beneath([there]) is None  # the build is not isolated
    monkeypatch.setenv("NSA_TORCHES", str(tmp_path / "fetched"))
    assert torches.beneath([fetched]) is None


def test_a_build_for_another_torch_keeps_what_still_fits(tmp_path: Path) -> None:
    package = tmp_path / "nsa_torch"
    (package / "lib").mkdir(parents=True)
    info = {"cuda": None, "architectures": [], "sources": "a"}

    def held() -> list[str]:
        return list(json.loads((package / "build_info.json").read_text())["torches"])

    for minor in ("2.11", "2.15"):
        (package / "lib" / f"libnsa_torch_{minor.replace('.', '_')}.so").touch()
        assert build_command.write_info(package, info | {"torches": {minor: f"{minor}.0"}}) == []
    assert held() == ["2.11", "2.15"]
    assert build_command.write_info(package, info | {"sources": "b", "torches": {"2.11": "2.11.0"}}) == ["2.15"]
    assert held() == ["2.11"]


@pytest.mark.parametrize("version", ["2.10.0", "2.16.1+cu130"])
def test_a_torch_that_is_not_supported_is_named(version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NSA_TORCHES", str(fake_torch(tmp_path / "a", version)))
    with pytest.raises(SystemExit, match=rf"torch must be 2.11 or .* or 2.15, got {re.escape(version)}$"):
        torches.served()


# Stands for an environment's Python, and for the build that it runs.
PYTHON = """#!/bin/sh
echo "$@" >> {log}
mkdir -p nsa_torch && touch nsa_torch/build_info.json
"""


class Checkout:
    """The Makefile, with environments in which everything is installed and nothing is compiled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.copy(ROOT / "Makefile", folder)
        for name in ("setup.py", "pyproject.toml", "tools/layers.py", "tools/torches.py", "requirements/build.txt"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).touch()
        for venv in ("a", "b"):
            (folder / venv / "bin").mkdir(parents=True)
            (folder / venv / "stamps").mkdir()
            python = folder / venv / "bin" / "python"
            python.write_text(PYTHON.format(log=folder / f"{venv}.log"))
            python.chmod(0o755)
            for stamp in ("venv", "requirements", "install"):
                (folder / venv / "stamps" / stamp).touch()

    def builds(self, venv: str, **settings: str) -> bool:
        """Whether `make build` in an environment compiles."""
        log = self.folder / f"{venv}.log"
        log.unlink(missing_ok=True)
        environment = {name: value for name, value in os.environ.items() if name not in SETTINGS} | settings
        subprocess.run(["make", "build", f"VENV={venv}"], cwd=self.folder, env=environment, check=True)
        return log.exists() and "build_ext" in log.read_text()


SETTINGS = ("NSA_CUDA", "NSA_TORCHES", "TORCH_CUDA_ARCH_LIST", "MAKEFLAGS", "MAKELEVEL", "MFLAGS", "TORCH")


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    if shutil.which("make") is None:
        pytest.skip("needs make")
    return Checkout(tmp_path)


@pytest.mark.parametrize("setting", [{"NSA_CUDA": "0"}, {"NSA_TORCHES": "x"}, {"TORCH_CUDA_ARCH_LIST": "9.0"}], ids=str)
def test_environments_share_libraries_and_so_what_they_were_built_with(
    setting: dict[str, str], checkout: Checkout
) -> None:
    assert [checkout.builds(venv) for venv in "aabba"] == [True, False, True, False, False]
    assert checkout.builds("b", **setting)
    assert not checkout.builds("b", **setting)
    assert checkout.builds("a")
    assert not checkout.builds("a")


def test_an_environment_builds_again_what_another_has_dropped(checkout: Checkout) -> None:
    assert checkout.builds("a") and checkout.builds("b")
    (checkout.folder / "build" / "settings").touch()  # as tools/build_command.py does
    assert checkout.builds("a")
    assert not checkout.builds("a")


def test_an_environment_builds_again_after_a_build_of_another_broke_off(checkout: Checkout) -> None:
    assert checkout.builds("a") and checkout.builds("b")
    (checkout.folder / "nsa_torch" / "build_info.json").unlink()
    assert checkout.builds("a")
    assert not checkout.builds("a")
