"""NSAAttention under FSDP2: made on the meta device, sharded, materialised, initialised, and trained."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nsa_torch import NSAAttention
from nsa_torch.block_compression import BlockCompression
from processes import assert_near, on_two_ranks, whole
from test_module import BLOCKS, DK, DV, HEADS, HIDDEN, KV_HEADS, make, tokens

VARIANTS: list[dict[str, Any]] = [
    {},
    {"per_head_compression": True, "bias": True},
    {"compression": "linear"},
    {"compression": "mean"},
    {"compression_hidden": 2 * DK - 1},  # too narrow for a mean
    {"compression_hidden": 2 * DK + 3},
    {"qk_norm": True, "kv_conv": 4, "shared_kv": True, "rope_dim": 4, "rope_interleaved": True, "qkv_bias": True},
]


def meta(**options: Any) -> NSAAttention:
    with torch.device("meta"):
        return NSAAttention(HIDDEN, HEADS, KV_HEADS, DK, DV, dtype=torch.float64, **(BLOCKS | options))


def assert_starts_as_a_mean(phi: BlockCompression) -> None:
    """The compression's weights are those of a mean, with noise of a tenth of its size."""
    state = {name: whole(weight) for name, weight in phi.named_parameters()}
    if phi.compression == "mean" or (phi.compression == "mlp" and state["w2"].size(-1) < 2 * phi.dim):
        return
    x = torch.randn(1, phi.block_size, state["pe"].size(0) if phi.per_head else 2, phi.dim, dtype=torch.float64)
    plain = copy.copy(phi)
    plain._parameters = {name: None if name not in state else nn.Parameter(state[name]) for name in phi._parameters}
    mean = x.mean(1)
    error = plain(x).squeeze(1) - mean
    assert error.norm() < 0.5 * mean.norm()


def _torchtitans_recipe(mesh: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    for options in VARIANTS:
        layer = meta(**options)
        fully_shard(layer, mesh=mesh)
        layer.to_empty(device="cpu")
        layer.reset_parameters()
        for phi in (layer.compress_k, layer.compress_v):
            assert_starts_as_a_mean(phi)
        for parameter in layer.parameters():
            assert whole(parameter).isfinite().all()
        single = make(**options)
        single.load_state_dict({name: whole(weight) for name, weight in layer.state_dict().items()})
        x = tokens(2, 75)
        assert_near(layer(x), single(x), str(options))


def _gradients(mesh: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    layer = make(qk_norm=True, kv_conv=4)
    sharded = copy.deepcopy(layer)
    fully_shard(sharded, mesh=mesh)
    x = tokens(2, 75)
    rank = torch.distributed.get_rank()
    sharded(x[rank : rank + 1]).square().mean().backward()
    layer(x).square().mean().backward()
    expected = dict(layer.named_parameters())
    for name, parameter in sharded.named_parameters():
        gradients = parameter.grad, expected[name].grad
        assert gradients[0] is not None and gradients[1] is not None
        assert_near(whole(gradients[0]), gradients[1], name)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
def test_two_processes() -> None:
    on_two_ranks(_torchtitans_recipe, _gradients)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_the_default_device_is_not_the_layers(options: dict[str, Any]) -> None:
    with torch.device("meta"):
        layer = NSAAttention(HIDDEN, HEADS, KV_HEADS, DK, DV, device="cpu", dtype=torch.float64, **(BLOCKS | options))
    for phi in (layer.compress_k, layer.compress_v):
        assert_starts_as_a_mean(phi)
    assert layer(tokens(1, 40)).isfinite().all()


def test_a_layer_on_meta_has_shapes_alone() -> None:
    layer = meta()
    assert {parameter.device.type for parameter in layer.parameters()} == {"meta"}
    out: Tensor = layer(torch.empty(2, 40, HIDDEN, dtype=torch.float64, device="meta"))
    assert out.shape == (2, 40, HIDDEN)
