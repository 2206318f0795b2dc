"""What .ci/run runs: every test under the oldest torch supported, and all that torch can change under the newest."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import torches

ROOT = Path(__file__).resolve().parents[1]
OLDEST, NEWEST = torches.SUPPORTED[0], torches.SUPPORTED[-1]

# The files that run under one torch alone, and why. All others stand in tests/both_ends.txt.
ONE_END = {
    "they need a GPU": [
        "test_cuda_cache.py",
        "test_cuda_decode.py",
        "test_cuda_edges.py",
        "test_cuda_hf.py",
        "test_cuda_module.py",
        "test_cuda_ops.py",
        "test_cuda_runtime.py",
    ],
    "they look at sources, documents and the library of kernels, which know no torch": [
        "test_build_faults.py",
        "test_build_progress.py",
        "test_build_torches.py",
        "test_ci.py",
        "test_compiler_cache.py",
        "test_cuda_build.py",
        "test_docs.py",
        "test_machine_code.py",
        "test_ptx.py",
        "test_rooms.py",
        "test_shapes.py",
        "test_shared_memory.py",
        "test_source_rules.py",
        "test_support.py",
    ],
    "benchmarks and the study run in the environment of a checkout": [
        "test_benchmarks.py",
        "test_compare_libraries.py",
        "test_example_train.py",
        "test_layer_overhead.py",
        "test_study.py",
        "test_study_choices.py",
        "test_study_plans.py",
        "test_study_runs.py",
        "test_study_tasks.py",
        "test_training_step.py",
    ],
}


def listed() -> list[str]:
    return (ROOT / "tests" / "both_ends.txt").read_text().split()


def test_every_test_file_runs_on_both_ends_or_is_excepted_by_name() -> None:
    excepted = [f"tests/{name}" for names in ONE_END.values() for name in names]
    there = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").glob("test_*.py"))
    assert sorted([*listed(), *excepted]) == there
    assert listed() == sorted(listed())


def test_models_are_tested_with_a_transformers_that_is_new_enough() -> None:
    """tests/hf_models.py skips them elsewhere."""
    versions = (ROOT / "nsa_torch" / "integrations" / "transformers" / "versions.py").read_text()
    oldest = ".".join(re.search(r"^OLDEST = \((\d+), (\d+)\)", versions, re.MULTILINE).groups())  # type: ignore[union-attr]
    assert f"transformers>={oldest}\n" in (ROOT / "requirements" / "test.txt").read_text()
    assert f"TRANSFORMERS={oldest} " in (ROOT / ".ci" / "run").read_text()


def test_both_ends_of_what_is_supported_are_tested() -> None:
    """The Makefile's usual torch is the oldest, and .ci/run goes on with the newest, in an environment of its own."""
    assert f",$(strip $(TORCH)),{OLDEST}.0)" in (ROOT / "Makefile").read_text()
    script = (ROOT / ".ci" / "run").read_text()
    assert re.search(rf'make test TORCH={NEWEST}\.0 TRANSFORMERS=[\d.]+ ARGS="@tests/both_ends.txt ', script)
    assert [f"build/tests-{minor}.xml" in script for minor in (OLDEST, NEWEST)] == [True, True]
    if shutil.which("make"):
        plan = ["make", "-n", "test", f"TORCH={NEWEST}.0", "ARGS=-x"]
        said = subprocess.run(plan, cwd=ROOT, check=True, capture_output=True, text=True).stdout
        assert f".venv-{NEWEST}.0/bin/python -m pytest -x" in said
