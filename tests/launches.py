"""What a profile shows of a call: this library's kernels, and how often each was launched."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

KERNEL = re.compile(r"nsa::(?:\(anonymous namespace\)::|\w+::)?(\w+)")


def launched(function: Callable[[], Any]) -> Counter[str]:
    """The kernels of this library that run, by their names without arguments, with the number of their launches."""
    function()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    counts: Counter[str] = Counter()
    for event in profile.key_averages():
        if found := KERNEL.search(event.key):
            counts[found[1]] += event.count
    return counts
