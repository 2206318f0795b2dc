"""A build says what it compiles in a line, and shows what went wrong in full."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SETUP = f"""
import sys
from setuptools import Extension, setup
from torch.utils.cpp_extension import BuildExtension

sys.path.insert(0, {str(ROOT / "tools")!r})
from build_progress import shown

class Build(BuildExtension):
    def run(self):
        with shown():
            super().run()

sources = ["csrc/first.cpp", "csrc/room/second.cpp"]
flags = {{"cxx": ["-Wall", "-DA_FLAG_OF_THE_COMMAND"]}}
setup(ext_modules=[Extension("small", sources, extra_compile_args=flags)], cmdclass={{"build_ext": Build}})
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """An extension of two sources, the first of which the compiler warns of."""
    (tmp_path / "csrc" / "room").mkdir(parents=True)
    (tmp_path / "setup.py").write_text(SETUP)
    (tmp_path / "csrc" / "first.cpp").write_text("int first() { int never_read; return 1; }\n")
    (tmp_path / "csrc" / "room" / "second.cpp").write_text("int second() { return 2; }\n")
    return tmp_path


def build(project: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    given = os.environ | {"MAX_JOBS": "1", "V": ""} | environment
    return subprocess.run(command, cwd=project, env=given, check=False, capture_output=True, text=True)


def test_sources_are_named_and_commands_are_not_shown(project: Path) -> None:
    result = build(project)
    assert result.returncode == 0, result.stderr
    progress = re.findall(r"^compiled (\d) of 2: (\S+)$", result.stdout, flags=re.MULTILINE)
    assert [done for done, _ in progress] == ["1", "2"]
    assert {name for _, name in progress} == {"first.cpp", "room/second.cpp"}
    assert "A_FLAG_OF_THE_COMMAND" not in result.stdout
    assert "unused variable" in result.stdout and "never_read" in result.stdout
    assert list(project.glob("small*.so"))


def test_v_shows_the_commands(project: Path) -> None:
    result = build(project, V="1")
    assert result.stdout.count(" -DA_FLAG_OF_THE_COMMAND ") == 2
    assert "compiled 1 of 2" not in result.stdout


def test_a_failure_is_shown_whole(project: Path) -> None:
    second = project / "csrc" / "room" / "second.cpp"
    second.write_text("int second() { return ; }\nint third() { return nothing; }\n")
    result = build(project)
    assert result.returncode != 0
    for part in ("FAILED", "-DA_FLAG_OF_THE_COMMAND", "second.cpp:1:", "second.cpp:2:", "'nothing'"):
        assert part in result.stdout.replace("‘", "'").replace("’", "'"), part


def lines_of(tool_output: str, *, terminal: bool) -> str:
    """What `Progress` writes of a build's output to a pipe, or to a terminal."""
    from build_progress import Progress

    readable, writable = pty.openpty() if terminal else os.pipe()
    progress = Progress(writable)
    for line in tool_output.splitlines():
        progress.take(line)
    progress.close()
    os.close(writable)
    written = b"".join(iter(lambda: read_some(readable), b""))
    os.close(readable)
    return written.decode()


def read_some(readable: int) -> bytes:
    """What there is by now: a terminal may give its lines one by one. Nothing at the end."""
    try:
        return os.read(readable, 1 << 16)
    except OSError:  # a terminal that nobody writes to any more
        return b""


@pytest.fixture(autouse=True)
def tools_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "tools")


def command_line(done: int, total: int) -> str:
    return f"finished {done} of {total}> nvcc -O3 -c -c /home/me/csrc/selected/part_{done}.cu -o part_{done}.o"


def test_a_log_has_ten_lines_whatever_the_number_of_sources() -> None:
    written = lines_of("\n".join(command_line(n, 110) for n in range(1, 111)), terminal=False).splitlines()
    assert len(written) == 10
    assert written[-1] == "compiled 110 of 110: selected/part_110.cu"


def test_a_terminal_has_one_line_that_is_written_over() -> None:
    written = lines_of("\n".join(command_line(n, 20) for n in range(1, 21)), terminal=True)
    assert written.count("\n") == 1
    assert written.count("\r") == 21  # one for each source, and the terminal's own at the line's end
    assert "\rcompiled 7 of 20: selected/part_7.cu" in written


def test_a_warning_has_lines_of_its_own_on_a_terminal() -> None:
    warning = "part_1.cu(3): warning #177-D: variable was never read"
    written = lines_of(f"{command_line(1, 2)}\n{warning}\n{command_line(2, 2)}", terminal=True)
    assert f"part_1.cu\x1b[K\r\n{warning}\r\n" in written
