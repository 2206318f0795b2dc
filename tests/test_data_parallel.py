"""FSDP2 and DDP as training uses them: two processes, each with half of a batch, give what one gives with all of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nsa_torch import NSAAttention
from processes import assert_all_near, assert_near, gradients, on_two_ranks, whole
from test_module import BLOCKS, DK, DV, HEADS, HIDDEN, KV_HEADS, tokens

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")

LENGTH = 37


class Block(nn.Module):
    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN, dtype=dtype)
        self.attn = NSAAttention(HIDDEN, HEADS, KV_HEADS, DK, DV, dtype=dtype, **BLOCKS)
        self.checkpointed = False

    def forward(self, x: Tensor) -> Tensor:
        if self.checkpointed:
            return checkpoint(self.step, x, use_reentrant=False)
        return self.step(x)

    def step(self, x: Tensor) -> Tensor:
        return x + self.attn(self.norm(x))


class Model(nn.Module):
    """Two blocks, and a layer that may go unused."""

    def __init__(self, dtype: torch.dtype = torch.float64):
        super().__init__()
        self.blocks = nn.ModuleList(Block(dtype) for _ in range(2))
        self.head = nn.Linear(HIDDEN, HIDDEN, dtype=dtype)
        self.headless = False

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x if self.headless else self.head(x)


def make_model(dtype: torch.dtype = torch.float64) -> Model:
    torch.manual_seed(0)
    return Model(dtype)


def shard(model: Model, mesh: Any, **options: Any) -> Model:
    from torch.distributed.fsdp import fully_shard

    for block in model.blocks:
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    out = model(x)
    return (out * torch.linspace(-1, 1, HIDDEN, dtype=out.dtype)).square().mean()


def own(x: Tensor) -> Tensor:
    """This process's half of a batch."""
    return x.chunk(2)[torch.distributed.get_rank()]


def batches(count: int, length: int = LENGTH) -> Iterator[Tensor]:
    return (tokens(4, length, seed=seed) for seed in range(count))


def train(model: nn.Module, steps: int, part: Callable[[Tensor], Tensor] = lambda x: x) -> Any:
    """AdamW with clipped gradients; the optimizer."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for x in batches(steps):
        loss_of(model, part(x)).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        assert whole(norm) > 0.05  # it does clip
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def expected_gradients(x: Tensor, prepare: Callable[[Model], Any] = lambda model: None) -> dict[str, Tensor]:
    model = make_model()
    prepare(model)
    loss_of(model, x).backward()
    return gradients(model)


def _training(mesh: Any) -> None:
    alone, sharded = make_model(), shard(make_model(), mesh)
    train(alone, 5)
    train(sharded, 5, own)
    for name, parameter in alone.named_parameters():
        assert_near(whole(sharded.get_parameter(name)), parameter, name, 1e-7)


def _accumulation(mesh: Any) -> None:
    x = tokens(4, LENGTH)
    sharded = shard(make_model(), mesh)
    for micro, last in zip(own(x).chunk(2), (False, True), strict=True):
        sharded.set_requires_gradient_sync(last)
        (loss_of(sharded, micro) / 2).backward()
    assert_all_near(gradients(sharded), expected_gradients(x), "accumulation")


def _mixed_precision(mesh: Any) -> None:
    """Weights and products in bfloat16, sums over the ranks in float32: as one process that does the same by hand."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    sharded, x = shard(make_model(torch.float32), mesh, mp_policy=policy), tokens(4, LENGTH).float()
    loss_of(sharded, own(x)).backward()
    total: dict[str, Tensor] = {}
    for part in x.chunk(2):
        alone = make_model(torch.float32).bfloat16()
        loss_of(alone, part.bfloat16()).backward()
        for name, grad in gradients(alone).items():
            total[name] = total.get(name, 0) + grad.float() / 2
    assert {parameter.grad.dtype for parameter in sharded.parameters()} == {torch.float32}
    assert_all_near(gradients(sharded), total, "mixed precision", 1e-6)


def _activation_checkpointing(mesh: Any) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    x = tokens(4, LENGTH)
    for wrapper in (False, True):
        model = make_model()
        for n, block in enumerate(model.blocks):
            if wrapper:
                model.blocks[n] = checkpoint_wrapper(block)
            else:
                block.checkpointed = True
        sharded = shard(model, mesh)
        loss_of(sharded, own(x)).backward()
        assert_all_near(gradients(sharded), expected_gradients(x), f"checkpointing, {wrapper}")


def _compile(mesh: Any) -> None:
    """Each block is one graph, checkpointed inside FSDP, as torchtitan has it."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    torch.compiler.reset()
    model = make_model()
    for n, block in enumerate(model.blocks):
        model.blocks[n] = checkpoint_wrapper(block)
        model.blocks[n].compile(backend="aot_eager", fullgraph=True)
    sharded = shard(model, mesh)
    for length in (LENGTH, 50):  # of another length, without another graph for each
        x = tokens(4, length)
        sharded.zero_grad()
        loss_of(sharded, own(x)).backward()
        assert_all_near(gradients(sharded), expected_gradients(x), f"compile, {length}")


def freeze(model: Model) -> None:
    """What one trains after the rest: queries and gates of the layers, as adapters do."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("q_proj" in name or "gate_proj" in name)


def _frozen_parts(mesh: Any) -> None:
    x, model = tokens(4, LENGTH), make_model()
    freeze(model)
    sharded = shard(model, mesh)
    loss_of(sharded, own(x)).backward()
    assert_all_near(gradients(sharded), expected_gradients(x, freeze), "frozen")


def _ddp(mesh: Any) -> None:
    from torch.nn.parallel import DistributedDataParallel

    def headless(model: Model) -> None:
        model.headless = True

    cases: list[tuple[str, Callable[[Model], Any], dict[str, Any], int]] = [
        ("plain", lambda model: None, {}, LENGTH),
        ("shorter than a block", lambda model: None, {}, 5),
        ("frozen", freeze, {}, LENGTH),
        ("unused", headless, {"find_unused_parameters": True}, LENGTH),
        ("unused, static", headless, {"static_graph": True}, LENGTH),
        ("static", freeze, {"static_graph": True, "gradient_as_bucket_view": True}, LENGTH),
    ]
    for name, prepare, options, length in cases:
        model = make_model()
        prepare(model)
        replicated = DistributedDataParallel(model, **options)
        for x in batches(2, length):
            replicated.zero_grad()
            loss_of(replicated, own(x)).backward()
            expected = expected_gradients(x, prepare)
            got = {n: grad for n, grad in gradients(replicated).items() if n in expected or grad.abs().sum() > 0}
            assert_all_near(got, expected, f"DDP, {name}")


def _ddp_accumulates(mesh: Any) -> None:
    from torch.nn.parallel import DistributedDataParallel

    x, replicated = tokens(4, LENGTH), DistributedDataParallel(make_model())
    first, last = own(x).chunk(2)
    with replicated.no_sync():
        (loss_of(replicated, first) / 2).backward()
    (loss_of(replicated, last) / 2).backward()
    assert_all_near(gradients(replicated), expected_gradients(x), "DDP, no_sync")


def _save(mesh: Any, folder: str) -> None:
    """After three steps: weights and the optimizer's state, by DCP, and the whole as one file."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_state_dict

    sharded = shard(make_model(), mesh)
    optimizer = train(sharded, 3, own)
    weights, state = get_state_dict(sharded, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder)
    full = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if torch.distributed.get_rank() == 0:
        assert full.keys() == make_model().state_dict().keys()
        torch.save(full, Path(folder) / "whole.pt")


def _resume(mesh: Any, folder: str) -> None:
    """Another model, that has what was saved, goes on as the first would; a whole file is handed out by one rank."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_state_dict,
        set_model_state_dict,
        set_state_dict,
    )

    torch.distributed.barrier()
    sharded = shard(Model(), mesh)
    optimizer = torch.optim.AdamW(sharded.parameters(), lr=1e-2)
    weights, state = get_state_dict(sharded, optimizer)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder)
    set_state_dict(sharded, optimizer, model_state_dict=weights, optim_state_dict=state)
    saved = torch.load(Path(folder) / "whole.pt")
    for name, parameter in sharded.state_dict().items():
        assert_near(whole(parameter), saved[name], name, 0)
    assert {value["step"].item() for value in optimizer.state.values()} == {3}
    other, rank = shard(Model(), mesh), torch.distributed.get_rank()
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(other, saved if rank == 0 else {}, options=options)
    x = own(tokens(4, LENGTH))
    assert_near(other(x), sharded(x), "out", 0)


def test_fsdp(tmp_path: Path) -> None:
    """Its checkpoint, saved by two processes, is loaded by two, and by one that knows nothing of FSDP."""
    import torch.distributed.checkpoint as dcp

    folder = str(tmp_path / "checkpoint")
    checks = (_training, _accumulation, _mixed_precision, _activation_checkpointing, _compile, _frozen_parts)
    replicated = (_ddp, _ddp_accumulates)
    on_two_ranks(*checks, *replicated, partial(_save, folder=folder), partial(_resume, folder=folder))
    alone = make_model()
    train(alone, 3)
    loaded = Model().state_dict()
    dcp.load({"model": loaded}, checkpoint_id=folder, no_dist=True)
    for name, parameter in alone.state_dict().items():
        assert_near(loaded[name], parameter, name, 1e-7)
