"""Tensor parallelism of NSAAttention: each rank has some of the heads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel

from .block_compression import BlockCompression

if TYPE_CHECKING:
    from .module import NSAAttention


def tensor_parallel_plan(layer: NSAAttention, *, sequence_parallel: bool = False) -> dict[str, ParallelStyle]:
    """The plan for `torch.distributed.tensor.parallel.parallelize_module` that cuts a layer into its heads.

    Every rank gets num_kv_heads / ranks KV heads and their query heads: their columns of q_proj, k_proj, v_proj and
    gate_proj, and the rows of o_proj that read them. Weights of the compression are cut, too, where each head has its
    own, and those of kv_conv; shared ones and those of norms stay whole on every rank, and their gradients are summed
    over the ranks in the backward. Inputs and outputs of the layer are whole on every rank. `new_cache` and `choices`
    are of the rank's heads.

        parallelize_module(layer, mesh, tensor_parallel_plan(layer))

    sequence_parallel: the layer takes each rank's part of the tokens, (B, T / ranks, hidden_size) or packed
    (sum T / ranks, hidden_size), and gives the same: it gathers them, and scatters the sums, as is usual around norms
    with torch's SequenceParallel. position_embeddings and cu_seqlens are of all tokens. The ranks must divide the
    tokens, unless they come as a DTensor.

    With either, hidden_states may be a DTensor on the mesh, placed in any way. The result is a plain tensor.

    For a model, prefix the names: {f"layers.{i}.attn.{name}": style for name, style in plan.items()}. A plan of your
    own may leave out all but the projections: the rest stay ordinary parameters, whose gradients are summed, too.

    Raises:
        ValueError: by parallelize_module, before anything is cut, when the ranks do not divide num_kv_heads.
    """
    # The compression comes first: it refuses what cannot be cut.
    plan: dict[str, ParallelStyle] = {
        name: CompressionParallel(layer.num_kv_heads, sequence_parallel) for name in ("compress_k", "compress_v")
    }
    plan |= {name: ColwiseParallel() for name in ("q_proj", "k_proj", "v_proj", "gate_proj")}
    options = {"k_conv": Shard(0), "v_conv": Shard(0), "q_norm": Replicate(), "k_norm": Replicate()}
    plan |= {name: HeadParallel(cut) for name, cut in options.items() if getattr(layer, name) is not None}
    return plan | {"o_proj": RowwiseParallel(output_layouts=Shard(-2) if sequence_parallel else Replicate())}


class HeadParallel(ParallelStyle):
    """Parameters of a module of a rank's heads: cut with the channels of all heads, or those that all heads share.

    The layer gives the module what its heads need of them: `local_weight`.

    Args:
        placement: of every parameter.
    """

    def __init__(self, placement: Placement):
        super().__init__()
        self.placement = placement

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        _distribute(module, device_mesh, self.placement, self.src_data_rank)
        return module


class CompressionParallel(ParallelStyle):
    """BlockCompression of a rank's KV heads: its own weights, or those that all heads share.

    Args:
        num_kv_heads: of the whole layer.
        sequence_parallel: the layer's inputs and outputs are cut over the same ranks, along the tokens.

    Raises:
        ValueError: when applied to more ranks than divide num_kv_heads.
    """

    def __init__(self, num_kv_heads: int, sequence_parallel: bool = False):
        super().__init__()
        self.num_kv_heads = num_kv_heads
        self.sequence_parallel = sequence_parallel

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, BlockCompression):
            raise TypeError(f"CompressionParallel must be applied to a BlockCompression, got {type(module).__name__}")
        ranks = device_mesh.size()
        if self.num_kv_heads % ranks:
            raise ValueError(
                f"the ranks of tensor parallelism must divide num_kv_heads, {self.num_kv_heads}, got {ranks}"
            )
        _distribute(module, device_mesh, Shard(0) if module.per_head else Replicate(), self.src_data_rank)
        module.tensor_parallel, module.sequence_parallel = device_mesh, self.sequence_parallel
        return module


def _distribute(module: nn.Module, mesh: DeviceMesh, placement: Placement, src_data_rank: int | None) -> None:
    """Make all parameters of a module DTensors, those of its parts too."""
    for part in module.modules():
        for name, weight in list(part.named_parameters(recurse=False)):
            cut = distribute_tensor(weight, mesh, [placement], src_data_rank=src_data_rank)
            part.register_parameter(name, nn.Parameter(cut, requires_grad=weight.requires_grad))


def cut_like(weight: DTensor, values: Tensor) -> DTensor:
    """This rank's part of values that every rank has whole, cut as a weight is; nothing is sent."""
    return distribute_tensor(values.contiguous(), weight.device_mesh, weight.placements, src_data_rank=None)


class _SumOfGradients(torch.autograd.Function):
    """The tensor as it is, the same on all ranks; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, mesh: DeviceMesh) -> Tensor:
        ctx.mesh = mesh
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=ctx.mesh.get_group())
        return total, None


def local_weight(weight: Tensor | None, mesh: DeviceMesh, per_head: bool) -> Tensor | None:
    """What this rank's heads need of a weight of compression, convolution or norm, be it whole or cut by the plan."""
    if weight is None:
        return None
    cut = False
    if isinstance(weight, DTensor):
        cut = any(placement.is_shard() for placement in weight.placements)
        weight = weight.to_local()
    if cut:
        return weight
    shared: Tensor = _SumOfGradients.apply(weight, mesh)
    return shared.chunk(mesh.size())[mesh.get_local_rank()] if per_head else shared
