"""NSAAttention cut into its heads by torch's tensor parallelism: two processes give what one gives."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import nn

from processes import assert_near, gradients, on_ranks, on_two_ranks, train, whole
from test_module import DK, DV, HEADS, HIDDEN, KV_HEADS, make, tokens

RANKS = 2

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")


def parallel(layer: nn.Module, mesh: Any) -> nn.Module:
    from torch.distributed.tensor.parallel import parallelize_module

    from nsa_torch.distributed import tensor_parallel_plan

    return parallelize_module(layer, mesh, tensor_parallel_plan(layer))


def parallel_by_hand(layer: nn.Module, mesh: Any) -> nn.Module:
    """What one writes without the package's plan: the compression's weights stay as they are."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    plan = {name: ColwiseParallel() for name in ("q_proj", "k_proj", "v_proj", "gate_proj")}
    return parallelize_module(layer, mesh, plan | {"o_proj": RowwiseParallel()})


VARIANTS = [
    {},
    {"bias": True, "per_head_compression": True},
    {"compression": "linear"},
    {"compression": "linear", "per_head_compression": True},
    {"compression": "mean", "rope_theta": None},
    {"qk_norm": True, "kv_conv": 4},
    {"shared_kv": True, "kv_conv": 3, "rope_dim": 4, "rope_interleaved": True, "per_head_compression": True},
]


def _outputs_and_gradients(mesh: Any) -> None:
    packed = {"cu_seqlens": torch.tensor([0, 13, 13, 37], dtype=torch.int32)}
    inputs = ((tokens(2, 37), {}), (tokens(37), packed))
    for options, (x, packing), plan in itertools.product(VARIANTS, inputs, (parallel, parallel_by_hand)):
        layer = make(**options)
        cut = plan(copy.deepcopy(layer), mesh)
        results = []
        for module in (layer, cut):
            leaf = x.clone().requires_grad_()
            out = module(leaf, **packing)
            weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
            (out * weight).sum().backward()
            grads = {name: whole(parameter.grad) for name, parameter in module.named_parameters()}
            results.append({"out": out.detach(), "hidden_states": leaf.grad} | grads)
        expected, got = results
        assert got.keys() == expected.keys()
        for name, tensor in expected.items():
            assert_near(got[name], tensor, f"{plan.__name__} {options} {name}")
        heads = HEADS // RANKS
        assert cut.q_proj.weight.to_local().shape == (heads * DK, HIDDEN)
        assert cut.k_proj.weight.to_local().shape == (KV_HEADS // RANKS * layer.kv_branches * DK, HIDDEN)
        assert cut.choices(x, **packing).gates.shape == (*x.shape[:-1], heads, 3)
        if options.get("per_head_compression") and plan is parallel:
            assert cut.compress_v.w1.to_local().shape[0] == KV_HEADS // RANKS
        if options.get("kv_conv") and plan is parallel:
            assert cut.v_conv.weight.to_local().shape[0] == KV_HEADS // RANKS * layer.kv_branches * DV


def _training(mesh: Any) -> None:
    """Ten steps of AdamW: shared weights stay equal on all ranks, and equal to one process."""
    layer = make(qk_norm=True, kv_conv=3)
    cut = parallel(copy.deepcopy(layer), mesh)
    x, target = tokens(2, 29), tokens(2, 29, seed=5)
    for module in (layer, cut):
        train(module, x, target, 10, 1.0)
    for name, parameter in layer.named_parameters():
        got = whole(dict(cut.named_parameters())[name])
        torch.testing.assert_close(got, parameter, rtol=1e-6, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_training() -> None:
    on_two_ranks(_outputs_and_gradients, _training)


@torch.no_grad()
def _decoding(mesh: Any) -> None:
    options = {"qk_norm": True, "kv_conv": 4, "shared_kv": True}
    variants = ({}, {"per_head_compression": True, "bias": True}, options)
    for options, plan in itertools.product(variants, (parallel, parallel_by_hand)):
        layer, x = make(**options), tokens(2, 37)
        expected, cut = layer(x), plan(layer, mesh)
        cache = cut.new_cache(2, 64)
        assert cache[0].k_slc.shape[1:] == (KV_HEADS // RANKS, DK) and cache[0].v_slc.size(-1) == DV
        outs = [cut(part, cache=cache) for part in x.split([20, 1, 1, 15], dim=1)]
        assert_near(torch.cat(outs, dim=1), expected, "out")
        assert cut(x[:, :0], cache=cache).shape == (2, 0, HIDDEN)


def _refusals(mesh: Any) -> None:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    with pytest.raises(ValueError, match="the ranks of tensor parallelism must divide num_kv_heads, 1, got 2"):
        parallel(make_one_head(), mesh)
    columns = {name: ColwiseParallel() for name in ("q_proj", "k_proj", "v_proj", "gate_proj")}
    for name, plan, message in (
        (
            "one KV head",
            columns,
            "k_proj must give whole heads, of 24 channels each, and at least one, got 12 channels",
        ),
        ("three heads", columns, "q_proj must give whole heads, of 8 channels each, and at least one, got 12 channels"),
        ("k whole", {n: columns[n] for n in ("q_proj", "gate_proj")}, "must give 2 query heads for each KV head"),
        ("gates whole", {n: columns[n] for n in ("q_proj", "k_proj", "v_proj")}, "got 2, 1, 1 and 4 heads"),
    ):
        layer = {"one KV head": make_one_head, "three heads": make_three_heads}.get(name, make)()
        cut = parallelize_module(layer, mesh, plan | {"o_proj": RowwiseParallel()})
        with pytest.raises(ValueError, match=message):
            cut(tokens(2, 9))


def make_one_head() -> nn.Module:
    from nsa_torch import NSAAttention

    return NSAAttention(HIDDEN, HEADS, 1, DK, DV, dtype=torch.float64)


def make_three_heads() -> nn.Module:
    from nsa_torch import NSAAttention

    return NSAAttention(HIDDEN, 3, 3, DK, DV, dtype=torch.float64)


def test_decoding_and_refusals() -> None:
    on_two_ranks(_decoding, _refusals)


def _alone(mesh: Any) -> None:
    """One rank has all heads: what its weights are made of does not matter."""
    for options in VARIANTS:
        layer, x = make(**options), torch.randn(2, 30, HIDDEN, dtype=torch.float64)
        expected = layer(x)
        expected.sum().backward()
        wanted = gradients(layer)
        layer.zero_grad()
        for style in (parallel, parallel_by_hand):
            cut = style(copy.deepcopy(layer), mesh)
            out = cut(x)
            assert_near(whole(out), expected, f"{options}")
            out.sum().backward()
            for name, gradient in gradients(cut).items():
                assert_near(gradient, wanted[name], f"{options} {name}")


def test_on_one_rank() -> None:
    on_ranks(1, _alone)
