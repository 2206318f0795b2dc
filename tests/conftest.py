"""What all tests share: the shapes, the devices and the dtypes they run on."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic products, before CUDA starts

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))  # the list of shapes is shared with the benchmarks

import nsa_torch  # noqa: E402
from helpers import COMPARED, Inputs, Target, differentiable  # noqa: E402

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
LOW_PRECISION = [torch.float32, torch.bfloat16, torch.float16]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cuda: needs a GPU")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(autouse=True)
def noted(request: pytest.FixtureRequest) -> Iterator[None]:
    """What the test compares with the reference, and under which torch, in the report of the run."""
    COMPARED.clear()
    yield
    if COMPARED:
        noted = [("compared", what) for what in sorted(COMPARED)]
        request.node.user_properties += [("torch", str(torch.__version__)), *noted]


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Nothing compiled before the test, and nothing left after it."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch.compiler.reset()


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(
    params=[
        Target(device, dtype)
        for device in DEVICES
        for dtype in ([torch.float64] if device == "cpu" else [torch.float32, torch.bfloat16])
    ],
    ids=str,
)
def target(request: pytest.FixtureRequest) -> Target:
    """Where results are judged as sharply as the device allows: in float64 where it has it."""
    return request.param


@pytest.fixture(params=[Target(device, dtype) for device in DEVICES for dtype in LOW_PRECISION], ids=str)
def low_precision(request: pytest.FixtureRequest) -> Target:
    return request.param


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tensors here are so small that threads would spend their time waiting for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def num_threads() -> Iterator[None]:
    """Lets a test set the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def gradcheck_attention() -> Callable[[str, Inputs], None]:
    """torch's gradcheck on every output of an attention op."""

    def check(op: str, inputs: Inputs) -> None:
        names = differentiable(inputs)

        def call(*leaves: torch.Tensor) -> list[torch.Tensor]:
            tensors = inputs.tensors | dict(zip(names, leaves, strict=True))
            result = getattr(nsa_torch, op)(**tensors, **inputs.options)
            outputs = result if isinstance(result, tuple) else (result,)
            # gradcheck subtracts outputs, and an lse of -inf is one that nothing moves.
            return [o.masked_fill(o.isneginf(), 0.0) for o in outputs]

        leaves = [inputs.tensors[name].requires_grad_() for name in names]
        assert torch.autograd.gradcheck(call, leaves)

    return check


@pytest.fixture
def deterministic() -> Iterator[None]:
    """torch.use_deterministic_algorithms for one test."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
