"""Several processes for a test, on the CPU by gloo, and what their tensors are compared by."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

Check = Callable[[Any], None]  # what every process runs, given the mesh of all of them


def _process(rank: int, store: str, ranks: int, checks: tuple[Check, ...]) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    try:
        mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("ranks",))
        for check in checks:
            check(mesh)
        torch.distributed.barrier()  # a rank that leaves first would break the others' connections
    finally:
        torch.distributed.destroy_process_group()


def on_ranks(ranks: int, *checks: Check) -> None:
    """Processes take seconds to start: they run several checks."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_process, (str(Path(folder) / "store"), ranks, checks), nprocs=ranks)


def on_two_ranks(*checks: Check) -> None:
    on_ranks(2, *checks)


def whole(tensor: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_near(got: Tensor, expected: Tensor, name: str, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance, msg=lambda m: f"{name}: {m}")


def train(module: nn.Module, x: Tensor, target: Tensor, steps: int, norm: float) -> None:
    """Steps of AdamW towards a target, gradients clipped at this norm."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    for _ in range(steps):
        (module(x) - target).square().mean().backward()
        nn.utils.clip_grad_norm_(module.parameters(), norm)
        optimizer.step()
        optimizer.zero_grad()


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """The whole gradients of a module's parameters, by the names that they have without wrappers."""
    found = {}
    for name, parameter in module.named_parameters():
        for wrapper in ("_checkpoint_wrapped_module.", "_orig_mod.", "module."):
            name = name.replace(wrapper, "")
        if parameter.grad is not None:
            found[name] = whole(parameter.grad)
    return found


def assert_all_near(got: dict[str, Tensor], expected: dict[str, Tensor], case: str, tolerance: float = 1e-10) -> None:
    assert got.keys() == expected.keys(), f"{case}: {got.keys() ^ expected.keys()}"
    for name, tensor in expected.items():
        assert_near(got[name], tensor, f"{case}: {name}", tolerance)
