"""Times and memory of calls on a device, and what the device can do at most."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

MOST_RUNS = 30


class Device:
    """A GPU, or the CPU, where the same calls run to try the bench out."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.is_cuda = name.startswith("cuda")
        # Written between runs: larger than the L2 cache of any GPU so far.
        self._flush = torch.empty(256 << 20 if self.is_cuda else 1 << 20, dtype=torch.int8, device=name)

    def synchronize(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize()

    def once(self, run: Callable[[], object]) -> float:
        """Milliseconds of one run that finds nothing of its inputs in the cache."""
        self._flush.zero_()
        if not self.is_cuda:
            start = time.perf_counter()
            run()
            return (time.perf_counter() - start) * 1e3
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    def median(self, run: Callable[[], object], budget: float) -> float:
        """Median milliseconds over at least 3 runs and about `budget` seconds, after one that warms up."""
        self.once(run)
        times: list[float] = []
        start = time.perf_counter()
        while len(times) < 3 or (time.perf_counter() - start < budget and len(times) < MOST_RUNS):
            times.append(self.once(run))
        return statistics.median(times)

    def peak(self, run: Callable[[], object]) -> int | None:
        """Bytes that a run held at most beyond those held before; None on the CPU."""
        if not self.is_cuda:
            run()
            return None
        self.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        self.synchronize()
        return torch.cuda.max_memory_allocated() - before

    @contextmanager
    def cleared(self) -> Iterator[None]:
        """Gives memory back to the device afterwards."""
        yield
        if self.is_cuda:
            torch.cuda.empty_cache()


class Ceilings(NamedTuple):
    """What this device reaches at most: matrix products in operations a second, memory in bytes a second."""

    flops: float
    bytes: float

    def limit_ms(self, flops: int, moved: int) -> float:
        """The time below which a call of these operations and bytes cannot come."""
        return max(flops / self.flops, moved / self.bytes) * 1e3


def measure_ceilings(device: Device, dtype: torch.dtype) -> Ceilings:
    """The best of some large products, and of some copies that no cache holds; a copy reads and writes."""
    size, items = (8192, 1 << 30) if device.is_cuda else (512, 1 << 22)
    a, b = (torch.randn(size, size, device=device.name, dtype=dtype) for _ in range(2))
    product = min(device.once(lambda: a @ b) for _ in range(20))
    source = torch.empty(items, dtype=torch.int8, device=device.name).random_(0, 100)
    target = torch.empty_like(source)
    copy = min(device.once(lambda: target.copy_(source)) for _ in range(20))
    return Ceilings(2 * size**3 / product * 1e3, 2 * items / copy * 1e3)


def bytes_of(tensors: list[Tensor]) -> int:
    """Bytes of tensors that share no memory."""
    return sum(t.numel() * t.element_size() for t in tensors)
