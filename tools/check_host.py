"""Says what this machine lacks for a build, before anything is downloaded.

Runs under the system's own Python, of any version from 3.6 on, with nothing installed.
"""

import os
import shutil
import sys
import sysconfig
from importlib.util import find_spec


def missing():
    """One line for each thing that is missing, with the Debian package that has it."""
    if sys.version_info < (3, 10):
        version = ".".join(map(str, sys.version_info[:3]))
        yield "Python 3.10 or newer (python3 is {}): make PYTHON=python3.11 ...".format(version)
    if find_spec("venv") is None or find_spec("ensurepip") is None:
        yield "Python's venv module: apt-get install python3-venv"
    for line in missing_to_compile():
        yield line


def missing_to_compile():
    """The same of what compiles."""
    header = os.path.join(sysconfig.get_paths()["include"], "Python.h")
    if not os.path.exists(header):
        yield "Python's C headers ({}): apt-get install python3-dev".format(header)
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        yield "a C++20 compiler ({}): apt-get install g++".format(compiler)


def main():
    lines = list(missing())
    for line in lines:
        print("missing: " + line, file=sys.stderr)
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
