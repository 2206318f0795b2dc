"""Where a layer computes, on which ranks, and in which dtype: not always where, and as what, its weights are kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .block_compression import BlockCompression

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
    apart = () if layer.gate_dtype is None else ("gate_proj.",)  # in a dtype of its own
    weights = [weight for name, weight in layer.named_parameters() if not name.startswith(apart)]
    held = [weight.dtype for weight in (layer.q_proj.weight, *weights) if weight.dtype in COMPUTED]
    return held[0] if held else torch.get_default_dtype()


def compression_of(layer: NSAAttention) -> BlockCompression | None:
    """That of the keys, around which an adapter may stand; None where another module took its place."""
    return next((module for module in layer.compress_k.modules() if isinstance(module, BlockCompression)), None)


def heads_mesh(layer: NSAAttention) -> DeviceMesh | None:
    """The ranks that a layer's heads are cut over by tensor parallelism."""
    compression = compression_of(layer)
    if compression is not None and compression.tensor_parallel is not None:
        return compression.tensor_parallel
    weight: Any = getattr(layer.o_proj, "weight", None)
    placements = getattr(weight, "placements", ())  # of a DTensor; only tensor parallelism cuts its columns
    dims = [dim for dim, placement in enumerate(placements) if placement.is_shard(1)]
    if not dims:
        return None
    whole: DeviceMesh = weight.device_mesh
    return whole if whole.ndim == 1 else whole[tuple(whole.mesh_dim_names[dim] for dim in dims)]  # type: ignore[index]
