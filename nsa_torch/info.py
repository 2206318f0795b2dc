"""What the library was built with, and which kernels run for given shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from nsa_torch import _library

if TYPE_CHECKING:
    from nsa_torch import _C

__all__ = ["KernelLaunch", "KernelPlan", "build_info", "which_kernel"]


def build_info() -> dict[str, Any]:
    """What the loaded library was built with.

    Returns:
        ``torch`` (the version that it was built against), ``torches`` (the same of every library that the package
        holds, by minor version), ``cuda`` (toolkit version, None when built without), ``compiler``, ``openmp`` (bool:
        whether the CPU kernels run in parallel), ``architectures`` (compute capabilities that CUDA kernels were made
        for, such as ``["8.0+PTX", "9.0a"]``; `which_kernel` says of a GPU whether any of them runs there),
        ``kernels`` (sets of kernels: ``"cpu"``, ``"sm80"``, the portable ones, ``"sm90a"``, those for Hopper).
    """
    from nsa_torch import _C

    torches = _library.built()["torches"]
    return {"torch": torches[_library.minor_version()], "torches": torches} | _C.build_info()


@dataclass(frozen=True)
class KernelLaunch:
    """A kernel that a call launches.

    Attributes:
        kernel: its name, as a profile shows it; on the CPU, what computes it.
        tile: (rows or queries, keys) of a block of threads: those that it holds, and those of a step. None: it has no
            tiles.
        stages: buffers of what passes by; 0 where it has none.
        shared_bytes: shared memory of a block of threads, what the kernel declares and what the launch adds.
        count: how often it is launched.
    """

    kernel: str
    tile: tuple[int, int] | None = None
    stages: int = 0
    shared_bytes: int = 0
    count: int = 1


class KernelPlan(tuple[str, str]):
    """What `which_kernel` answers: the pair (kernel, reason), with the rest of the plan as attributes.

    Attributes:
        kernel, reason: the kernels' names, joined by " + ", and why these, in words.
        kernels: the names, each once, in the order of their first launch.
        launches: a `KernelLaunch` for each kernel, in order. Products are cuBLAS's, sorting is CUB's: neither is
            among them.
        splits: into how many the rows that see a tile of keys are cut, backward.
        workspace_bytes: what the call takes beside its results.
    """

    kernels: tuple[str, ...]
    launches: tuple[KernelLaunch, ...]
    splits: int
    workspace_bytes: int

    def __new__(
        cls, launches: Sequence[KernelLaunch], reason: str, splits: int = 1, workspace_bytes: int = 0
    ) -> KernelPlan:
        kernels = tuple(dict.fromkeys(launch.kernel for launch in launches))
        plan = super().__new__(cls, (" + ".join(kernels), reason))
        plan.kernels, plan.launches = kernels, tuple(launches)
        plan.splits, plan.workspace_bytes = splits, workspace_bytes
        return plan

    @property
    def kernel(self) -> str:
        return self[0]

    @property
    def reason(self) -> str:
        return self[1]

    def __repr__(self) -> str:
        rest = f"splits={self.splits}, workspace_bytes={self.workspace_bytes}"
        launches = "".join(f"\n  {launch}," for launch in self.launches)
        return f"KernelPlan(kernel={self.kernel!r}, reason={self.reason!r}, {rest}, launches=[{launches}\n])"


def which_kernel(
    op: str,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    backward: bool = False,
    gradients: Sequence[str] = (),
    capability: tuple[int, int] | None = None,
    batch: int = 1,
    num_heads: int = 1,
    num_kv_heads: int = 1,
    head_dim: int = 128,
    v_head_dim: int | None = None,
    num_queries: int | None = None,
    num_keys: int = 1,
    block_size: int = 32,
    block_stride: int = 16,
    select_size: int = 64,
    num_selected: int = 16,
    window: int = 512,
    compression: str = "mlp",
    hidden_size: int | None = None,
    per_head: bool = False,
) -> KernelPlan:
    """Which kernels an op runs for given shapes, and why: what the call itself would decide.

    Args:
        op: a function of this package, such as ``"selected_attention"``.
        device: ``"cpu"`` or ``"cuda"``.
        dtype: ``"float16"``, ``"bfloat16"``, ``"float32"`` or ``"float64"``.
        backward: of the op's backward.
        gradients: the op's inputs whose gradients the backward computes, such as ``("q",)``; default: of all.
        capability: of the GPU, such as ``(9, 0)``: also of one that is not there. Default: the current GPU's;
            where there is none, ``(8, 0)``.
        batch: sequences, each of `num_queries` queries (default `num_keys`) and `num_keys` uncompressed keys.
        num_heads, num_kv_heads: query heads, and key/value heads, which divide them.
        head_dim, v_head_dim: of queries and keys, and of values (default `head_dim`).
        block_size, block_stride, select_size, num_selected, window: as the ops take them.
        compression, hidden_size, per_head: of `compress`, which the layer has as well: "mlp", "linear" or
            "mean"; the rows of w1 of an mlp (default 2 `head_dim`); whether each KV head has weights of its own.

    Returns:
        (kernel, reason), a pair with more attributes: see `KernelPlan`. Tensors are taken to be contiguous. The reason
        also tells if this build has no code that runs on a GPU of `capability`.

    Raises:
        ValueError: an argument is out of range; the message names it and what is allowed.
        RuntimeError: no `capability` is given, and this build has no code that runs on the current GPU: what the call
            raises.
    """
    from nsa_torch import _C

    if device == "cuda" and capability is None and _C.build_info()["cuda"] is None:
        launches = [KernelLaunch("cpu_fallback")]
        return KernelPlan(launches, "this build has no CUDA kernels: tensors are copied to the CPU and back")
    query = _C.KernelQuery()
    query.op, query.device, query.dtype, query.backward = op, device, dtype, backward
    if isinstance(gradients, str):
        raise TypeError(f"gradients must be a sequence of names, such as ({gradients!r},), got a str")
    query.gradients = list(gradients)
    asked = capability is not None
    if not asked and device == "cuda" and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability()
        if refusal := _refusal(capability):
            raise RuntimeError(refusal)
    query.capability = (8, 0) if capability is None else capability
    query.batch, query.num_heads, query.num_kv_heads = batch, num_heads, num_kv_heads
    query.head_dim, query.v_head_dim = head_dim, head_dim if v_head_dim is None else v_head_dim
    query.num_queries, query.num_keys = num_keys if num_queries is None else num_queries, num_keys
    query.block_size, query.block_stride, query.select_size = block_size, block_stride, select_size
    query.num_selected, query.window = num_selected, window
    query.compression, query.per_head = compression, per_head
    query.hidden_size = 2 * head_dim if hidden_size is None else hidden_size
    report = _C.which_kernel(query)
    launches = [_launch(each) for each in report.launches]
    refusal = _refusal(query.capability) if asked and device == "cuda" else ""
    reason = f"{report.reason}; but a call fails: {refusal}" if refusal else report.reason
    return KernelPlan(launches, reason, report.splits, report.workspace_bytes)


def _refusal(capability: tuple[int, int]) -> str:
    """What a call on such a GPU raises for want of code that runs there; empty where there is some."""
    from nsa_torch import _C

    architectures = _C.build_info()["architectures"]
    return _C.no_kernels(architectures, capability) if architectures else ""


def _launch(reported: _C.ReportedLaunch) -> KernelLaunch:
    tile = reported.tile
    sizes = (tile.rows, tile.keys) if tile.rows > 0 else None
    return KernelLaunch(reported.kernel, sizes, tile.stages, tile.static_bytes + tile.dynamic_bytes, reported.count)
