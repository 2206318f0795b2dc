"""Tensor parallelism that takes and gives each rank's part of the tokens, DTensors as inputs, and what is sent."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nsa_torch
from processes import assert_all_near, assert_near, gradients, on_two_ranks, whole
from test_module import BLOCKS, HIDDEN, make, tokens

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")

LENGTH = 40


def parallel(layer: nn.Module, mesh: Any, sequence_parallel: bool = True) -> nn.Module:
    from torch.distributed.tensor.parallel import parallelize_module

    from nsa_torch.distributed import tensor_parallel_plan

    return parallelize_module(
        copy.deepcopy(layer), mesh, tensor_parallel_plan(layer, sequence_parallel=sequence_parallel)
    )


def weighted(out: Tensor, weight: Tensor) -> Tensor:
    return (out * weight).sum()


def expected_of(layer: nn.Module, x: Tensor, weight: Tensor, **options: Any) -> dict[str, Tensor]:
    layer.zero_grad()
    leaf = x.clone().requires_grad_()
    out = layer(leaf, **options)
    weighted(out, weight).backward()
    return {"out": out.detach(), "hidden_states": leaf.grad} | gradients(layer)


def _parts_of_the_tokens(mesh: Any) -> None:
    """Plain parts in, plain parts out: dense, packed, packed with a leading 1, compiled."""
    from torch.distributed.tensor import DTensor, Shard

    packing = {"cu_seqlens": torch.tensor([0, 13, 13, LENGTH], dtype=torch.int32)}
    torch.manual_seed(2)
    tables = (torch.randn(LENGTH, 8, dtype=torch.float64), torch.randn(LENGTH, 8, dtype=torch.float64))
    cases = [
        (tokens(2, LENGTH), {}),
        (tokens(2, LENGTH), {"position_embeddings": tables}),
        (tokens(LENGTH), packing),
        (tokens(1, LENGTH), packing),
    ]
    rank, ranks = mesh.get_local_rank(), mesh.size()
    cases = [
        (options, x, given, None) for options in ({"bias": True}, {"per_head_compression": True}) for x, given in cases
    ]
    for options, x, given, backend in (*cases, ({}, tokens(2, LENGTH), {}, "aot_eager")):
        layer = make(**options)
        weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=x.dtype)
        expected = expected_of(layer, x, weight, **given)
        cut = parallel(layer, mesh)
        call = cut if backend is None else torch.compile(cut, backend=backend, fullgraph=True)
        leaf = x.chunk(ranks, -2)[rank].contiguous().requires_grad_()
        out = call(leaf, **given)
        assert not isinstance(out, DTensor) and out.shape == leaf.shape
        weighted(out, weight.chunk(ranks, -2)[rank]).backward()
        parts = {"out": out.detach(), "hidden_states": leaf.grad}
        joined = {n: DTensor.from_local(t, mesh, [Shard(x.dim() - 2)]).full_tensor() for n, t in parts.items()}
        assert_all_near(joined | gradients(cut), expected, f"{options} {tuple(x.shape)} {backend}")


def _dtensors(mesh: Any) -> None:
    """However hidden_states is placed, tokens that the ranks do not divide among them."""
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    layer = make(bias=True)
    for length, sequence_parallel in itertools.product((LENGTH, LENGTH - 3), (False, True)):
        x = tokens(2, length)
        weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=x.dtype)
        expected = expected_of(layer, x, weight)
        for placement in (Shard(1), Replicate(), Shard(0), Shard(2)):
            cut = parallel(layer, mesh, sequence_parallel)
            leaf = distribute_tensor(x, mesh, [placement]).requires_grad_()
            out = cut(leaf)
            spread = [Shard(1) if sequence_parallel else Replicate()]
            given = DTensor.from_local(out, mesh, spread, shape=x.shape, stride=x.stride())
            own = distribute_tensor(weight, mesh, spread).to_local()
            weighted(out, own).backward()
            got = {"out": whole(given.detach()), "hidden_states": whole(leaf.grad)} | gradients(cut)
            assert_all_near(got, expected, f"{placement} {sequence_parallel} {length}")
            assert_near(cut.choices(leaf).gates, layer.choices(x).gates.chunk(2, -2)[mesh.get_local_rank()], "gates")


def _with_a_cache(mesh: Any) -> None:
    """Decoding takes whole tokens as a DTensor, which a plan without sequence parallelism gives back whole."""
    from torch.distributed.tensor import Replicate, distribute_tensor

    layer, x = make(bias=True), tokens(2, LENGTH)
    with torch.no_grad():
        expected, cut = layer(x), parallel(layer, mesh, False)
        cache = cut.new_cache(2, 64)
        parts = [distribute_tensor(part, mesh, [Replicate()]) for part in x.split([20, 1, 19], dim=1)]
        assert_near(torch.cat([cut(part, cache=cache) for part in parts], dim=1), expected, "out")


def _what_is_sent(mesh: Any) -> None:
    """As Megatron has it: one sum each way; with parts of the tokens one gather and one scatter each way."""
    from torch.distributed.tensor.debug import CommDebugMode

    layer, rank = make(compression="mean"), mesh.get_local_rank()  # without weights that all heads share
    for sequence_parallel, each_way in (
        (False, {"all_reduce": 1}),
        (True, {"all_gather_into_tensor": 1, "reduce_scatter_tensor": 1}),
    ):
        x = tokens(2, LENGTH).chunk(2, 1)[rank].contiguous() if sequence_parallel else tokens(2, LENGTH)
        cut = parallel(layer, mesh, sequence_parallel)
        counts = []
        with CommDebugMode() as sent:
            out = cut(x.requires_grad_())
        counts.append(sent.get_comm_counts())
        with CommDebugMode() as sent:
            out.sum().backward()
        counts.append(sent.get_comm_counts())
        names = [{str(op).split(".")[-1].rstrip("')>"): n for op, n in count.items()} for count in counts]
        assert names == [each_way] * 2


def _refusals(mesh: Any) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_module, distribute_tensor

    layer, x = make(), tokens(2, LENGTH)
    other = init_device_mesh("cpu", (2, 1))
    with pytest.raises(ValueError, match="hidden_states must be on the mesh of the layer's heads"):
        parallel(layer, mesh)(distribute_tensor(x, other, [Replicate(), Replicate()]))
    for placement in (Shard(1), Replicate()):
        with pytest.raises(TypeError, match="hidden_states must be a plain tensor, as the layer's weights are, got"):
            layer(distribute_tensor(x, mesh, [placement]))
    replicated = distribute_module(copy.deepcopy(layer), mesh)
    with pytest.raises(ValueError, match=r"hidden_states must have all tokens on every rank.*no context parallelism"):
        replicated(distribute_tensor(x, mesh, [Shard(1)]))
    with pytest.raises(TypeError, match="hidden_states must be a tensor, got list"):
        parallel(layer, mesh)([[0.0] * HIDDEN])


def _batches_of_dtensors(mesh: Any) -> None:
    """Data parallelism by DTensors alone: weights are whole on every rank, sequences are not."""
    from torch.distributed.tensor import Replicate, Shard, distribute_module, distribute_tensor

    for options in ({}, {"per_head_compression": True, "bias": True}):
        layer, x = make(**options), tokens(2, LENGTH)
        weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=x.dtype)
        expected = expected_of(layer, x, weight)
        for placement in (Shard(0), Replicate()):
            replicated = distribute_module(copy.deepcopy(layer), mesh)
            replicated.zero_grad()
            leaf = distribute_tensor(x, mesh, [placement]).requires_grad_()
            out = replicated(leaf)
            weighted(whole(out), weight).backward()
            got = {"out": whole(out).detach(), "hidden_states": whole(leaf.grad)} | gradients(replicated)
            assert_all_near(got, expected, f"{placement} {options}")


def _padding_after_packed_sequences(mesh: Any) -> None:
    """Rows past the last sequence, which GPUs take: zeros in a DTensor too, and each rank knows its own."""
    from torch.distributed.tensor import Replicate, distribute_tensor

    from nsa_torch import layer_checks
    from nsa_torch.ranks import own_tokens

    layer, x = make(), tokens(7)
    padding = torch.arange(7).unsqueeze(-1) >= 5
    cut = parallel(layer, mesh)
    assert torch.equal(own_tokens(cut, padding), padding[4 * mesh.get_local_rank() :][:4])
    assert own_tokens(layer, padding) is padding
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer_checks, "padding_rows", lambda *_: padding)
        cu_seqlens = torch.tensor([0, 5], dtype=torch.int32)
        got, _ = layer_checks.take_tokens(cut, distribute_tensor(x, mesh, [Replicate()]), cu_seqlens)
    assert torch.equal(whole(got), x.masked_fill(padding, 0))


def _queries_cut_by_hand(mesh: Any) -> None:
    """A rank's queries with the keys up to its last one: the ops put the last query at the last key."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    generator = torch.Generator().manual_seed(3)
    heads = {"q": 4, "k": 2, "v": 2, "gates": 4}
    parts = {
        name: torch.randn(2, LENGTH, count, 3 if name == "gates" else 8, generator=generator, dtype=torch.float64)
        for name, count in heads.items()
    }
    blocks = {"block_size": BLOCKS["block_size"], "block_stride": BLOCKS["block_stride"]}

    def attend(q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> Tensor:
        k_cmp, v_cmp = (nsa_torch.compress(t, **blocks) for t in (k, v))
        return nsa_torch.nsa_attention(q, k_cmp, v_cmp, k, v, k, v, gates.sigmoid(), **BLOCKS)

    whole_parts = {name: part.clone().requires_grad_() for name, part in parts.items()}
    expected = attend(**whole_parts)
    weight = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    weighted(expected, weight).backward()

    rank, each = mesh.get_local_rank(), LENGTH // mesh.size()
    own = {n: part[:, rank * each :][:, :each].contiguous().requires_grad_() for n, part in parts.items()}
    gathered = {
        name: DTensor.from_local(own[name], mesh, [Shard(1)])
        .redistribute(placements=[Replicate()])
        .to_local(grad_placements=[Partial()])[:, : (rank + 1) * each]
        for name in ("k", "v")
    }
    out = attend(**(own | gathered))
    weighted(out, weight.chunk(2, 1)[rank]).backward()
    assert_near(out, expected.chunk(2, 1)[rank], "out")
    for name, part in own.items():
        assert_near(part.grad, whole_parts[name].grad.chunk(2, 1)[rank], name)


def _context_parallel(mesh: Any) -> None:
    """Last, since torch 2.11 leaves its own attention replaced when something fails inside."""
    from torch.distributed.tensor.experimental import context_parallel

    layer, x = make(), tokens(2, LENGTH)
    layer(x)
    with (
        pytest.raises(RuntimeError, match="NSAAttention does not support context_parallel"),
        context_parallel(mesh, buffers=[x], buffer_seq_dims=[1]),
    ):
        layer(x)


def test_on_two_ranks() -> None:
    checks = (_parts_of_the_tokens, _dtensors, _with_a_cache, _what_is_sent, _batches_of_dtensors, _refusals)
    on_two_ranks(*checks, _padding_after_packed_sequences, _queries_cut_by_hand, _context_parallel)
