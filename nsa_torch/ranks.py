"""The tokens of a layer under tensor parallelism: whole inside, perhaps cut over the ranks before and after."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .checks import check_tensors
from .placement import compression_of, heads_mesh

if TYPE_CHECKING:
    from .module import NSAAttention


def _takes_parts(layer: NSAAttention) -> bool:
    """Whether sequence parallelism cuts the tokens around the layer."""
    compression = compression_of(layer)
    return compression is not None and compression.sequence_parallel


def check_no_context_parallel() -> None:
    """RuntimeError inside torch's context_parallel, which cuts tokens and tells nobody but torch's own attention.

    It replaces that, which is how it is known here. Compiled code is not checked.
    """
    module = sys.modules.get("torch.distributed.tensor.experimental._context_parallel._attention")
    if torch.nn.functional.scaled_dot_product_attention in getattr(module, "_replaced_functions", ()):
        raise RuntimeError(
            "NSAAttention does not support context_parallel: each rank would attend to its own tokens alone. "
            "Cut the heads by nsa_torch.distributed.tensor_parallel_plan instead"
        )


def gather_tokens(layer: NSAAttention, hidden_states: Tensor) -> Tensor:
    """All tokens: a DTensor that is whole on every rank, where they were one, or cut over the ranks.

    Raises:
        ValueError: a DTensor on another mesh than the layer's heads, or, in a layer whose heads are not cut, one whose
            tokens are.
        TypeError: a DTensor into a layer whose weights are plain.
        RuntimeError: inside torch's context_parallel.
    """
    if not torch.compiler.is_compiling():
        check_no_context_parallel()
    check_tensors(hidden_states=hidden_states)
    mesh, placements = heads_mesh(layer), getattr(hidden_states, "placements", None)
    if placements is None and not _takes_parts(layer):
        return hidden_states
    from torch.distributed.tensor import DTensor, Replicate, Shard

    tokens = Shard(hidden_states.dim() - 2)
    if mesh is None:
        if not hasattr(getattr(layer.q_proj, "weight", None), "placements"):
            raise TypeError(f"hidden_states must be a plain tensor, as the layer's weights are, got {placements}")
        if tokens in (placements or ()):
            raise ValueError(
                f"hidden_states must have all tokens on every rank, got {placements}: a layer has no context "
                "parallelism. Cut its heads by nsa_torch.distributed.tensor_parallel_plan"
            )
        return hidden_states
    if placements is None:
        hidden_states = DTensor.from_local(hidden_states, mesh, [tokens], run_check=False)
    other: Any = hidden_states
    if other.device_mesh != mesh:
        raise ValueError(f"hidden_states must be on the mesh of the layer's heads, {mesh}, got {other.device_mesh}")
    gathered = other.redistribute(placements=[Replicate()])
    # Torch views a DTensor by the strides of the whole, which its local tensor does not always have.
    return gathered if gathered.to_local().is_contiguous() else gathered.clone(memory_format=torch.contiguous_format)


def spread_tokens(layer: NSAAttention, x: Tensor) -> Tensor:
    """As one DTensor for all projections, so that their gradients of it are added up before they are sent."""
    mesh, projections = heads_mesh(layer), (layer.q_proj, layer.k_proj, layer.v_proj, layer.gate_proj)
    if mesh is None or hasattr(x, "placements"):
        return x
    if not all(type(linear) is nn.Linear and hasattr(linear.weight, "placements") for linear in projections):
        return x
    from torch.distributed.tensor import DTensor, Replicate

    return DTensor.from_local(x, mesh, [Replicate()], run_check=False)


def whole_like(x: Any, other: Tensor) -> Tensor:
    """`other`, which every rank has, as a DTensor if x is one."""
    if not hasattr(x, "placements"):
        return other
    from torch.distributed.tensor import DTensor, Replicate

    return DTensor.from_local(other, x.device_mesh, [Replicate()] * x.device_mesh.ndim, run_check=False)


def own_tokens(layer: NSAAttention, tokens: Tensor) -> Tensor:
    """Of (sum T, 1) for all tokens what this rank's results are for, where a layer's results are cut."""
    mesh = heads_mesh(layer)
    if mesh is None or not _takes_parts(layer):
        return tokens
    each = -(-tokens.size(0) // mesh.size())  # as Shard cuts them
    return tokens[mesh.get_local_rank() * each :][:each]
