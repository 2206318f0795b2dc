"""Where a layer computes, on which ranks, and in which dtype: not always where, and as what, its weights are kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from .module import NSAAttention

COMPUTED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def moves_weights(module: nn.Module) -> bool:
    """Whether accelerate's hooks bring a module's weights when it is called (`cpu_offload`, `disk_offload`)."""
    return getattr(module, "_hf_hook", None) is not None


def compute_device(layer: NSAAttention) -> torch.device:
    """Of the layer's weights; where they are brought from elsewhere, of where they are brought to."""
    device = getattr(getattr(layer.q_proj, "_hf_hook", None), "execution_device", None)
    if device is None:
        return layer.q_proj.weight.device
    return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)


def compute_dtype(layer: NSAAttention, device: torch.device) -> torch.dtype:
    """Of autocast where it is on; else of the layer's first weight that is not quantized, or torch's default."""
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    held = [weight.dtype for weight in (layer.q_proj.weight, *layer.parameters()) if weight.dtype in COMPUTED]
    return held[0] if held else torch.get_default_dtype()


def heads_mesh(layer: NSAAttention) -> DeviceMesh | None:
    """The ranks that a layer's heads are cut over by tensor parallelism."""
    ranks: DeviceMesh | None = getattr(layer.compress_k, "tensor_parallel", None)
    if ranks is not None:
        return ranks
    weight: Any = getattr(layer.o_proj, "weight", None)
    placements = getattr(weight, "placements", ())  # of a DTensor; only tensor parallelism cuts its columns
    dims = [dim for dim, placement in enumerate(placements) if placement.is_shard(1)]
    if not dims:
        return None
    mesh: DeviceMesh = weight.device_mesh
    return mesh if mesh.ndim == 1 else mesh[tuple(mesh.mesh_dim_names[dim] for dim in dims)]  # type: ignore[index]
