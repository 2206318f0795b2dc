"""One library's side of benchmarks/compare_libraries.py: `python library_worker.py LIBRARY cuda`.

Knows nothing of nsa_torch's Python, so that a library of another commit runs under it: calls torch.ops.nsa with
defaults. Each line on the standard input is a request, each on the standard output its answer, both JSON:

    {"do": "prepare", "dtype": "bfloat16", "seqlen": 1024, "heads": 64, "kv_heads": 4, "dim": 128}
        -> digests of the output and the gradients: equal where two libraries agree in every bit
    {"do": "measure", "direction": "forward", "runs": 5} -> {"ms": [...], "host_us": [...]}
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
from torch import Tensor

BLOCK_SIZE, BLOCK_STRIDE = 32, 16
# Longer than the host needs to issue a call: about a millisecond.
PAUSE_CYCLES = 2_000_000


class Problem:
    """Random tensors of one shape, the same in every process, and their calls."""

    def __init__(self, device: str, dtype: str, seqlen: int, heads: int, kv_heads: int, dim: int) -> None:
        random = torch.Generator(device).manual_seed(seqlen + heads * kv_heads + dim)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=random, device=device).to(getattr(torch, dtype))

        blocks = max(0, (seqlen - BLOCK_SIZE) // BLOCK_STRIDE + 1)
        keys = [normal(1, length, kv_heads, dim) for length in (blocks, blocks, *[seqlen] * 4)]
        gates = torch.rand(1, seqlen, heads, 3, generator=random, device=device).to(getattr(torch, dtype))
        self.leaves = [normal(1, seqlen, heads, dim), *keys, gates]
        self.grad = normal(1, seqlen, heads, dim)
        for leaf in self.leaves:
            leaf.requires_grad_()
        self.out = self.forward()

    def forward(self) -> Tensor:
        return torch.ops.nsa.nsa_attention(*self.leaves)

    def backward(self) -> tuple[Tensor, ...]:
        """Of the forward that was run when the problem was made."""
        return torch.autograd.grad(self.out, self.leaves, self.grad, retain_graph=True)

    def digest(self) -> list[int]:
        return [digest(tensor.detach()) for tensor in (self.out, *self.backward())]


def digest(tensor: Tensor, piece: int = 1 << 24) -> int:
    """A number that depends on every bit and its place; sums of integers are the same in any order."""
    bits = tensor.contiguous().view(torch.int16 if tensor.element_size() == 2 else torch.int32).flatten()
    found = 0
    for start in range(0, bits.numel(), piece):
        part = bits[start : start + piece].long()
        place = torch.arange(start, start + part.numel(), device=part.device)
        found += int((part * (place * 2654435761 % 4294967291 + 1)).sum())
    return found


class Measure:
    """Times of calls on a device; of the CPU, where the same code can be tried, by the clock."""

    def __init__(self, device: str) -> None:
        self.is_cuda = device.startswith("cuda")
        # Larger than the L2 cache of any GPU so far.
        self.flush = torch.empty(256 << 20 if self.is_cuda else 1 << 20, dtype=torch.int8, device=device)

    def __call__(self, run: Any, runs: int) -> dict[str, list[float]]:
        times = [self.once(run) for _ in range(runs)]
        return {"ms": [ms for ms, _ in times], "host_us": [us for _, us in times]}

    def once(self, run: Any) -> tuple[float, float]:
        """Milliseconds of the device, microseconds of the host."""
        self.flush.zero_()
        if not self.is_cuda:
            start = time.perf_counter()
            run()
            seconds = time.perf_counter() - start
            return seconds * 1e3, seconds * 1e6
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(PAUSE_CYCLES)
        begin.record()
        start = time.perf_counter()
        run()
        host = time.perf_counter() - start
        end.record()
        end.synchronize()
        return begin.elapsed_time(end), host * 1e6


def main() -> None:
    library, device = sys.argv[1:]
    torch.ops.load_library(library)
    measure, problem = Measure(device), None

    def answer(value: Any) -> None:
        print(json.dumps(value), flush=True)

    answer("ready")
    for line in sys.stdin:
        request = json.loads(line)
        do = request.pop("do")
        if do == "prepare":
            problem = None  # its memory first
            if measure.is_cuda:
                torch.cuda.empty_cache()
            problem = Problem(device, **request)
            answer(problem.digest())
        else:
            assert problem is not None
            run = problem.forward if request["direction"] == "forward" else problem.backward
            answer(measure(run, request["runs"]))


if __name__ == "__main__":
    main()
