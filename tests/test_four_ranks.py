"""Four processes: tensor parallelism over all of them, with FSDP2 on a 2 x 2 mesh, HSDP, and checkpoints that move."""

from __future__ import annotations

import copy
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nsa_torch import NSAAttention
from processes import assert_all_near, assert_near, gradients, on_ranks, train, whole
from test_data_parallel import Block, Model, batches, loss_of, make_model
from test_module import BLOCKS, DK, DV, HIDDEN, tokens

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")

LENGTH = 37


def make_wide(kv_heads: int = 4, **options: Any) -> NSAAttention:
    torch.manual_seed(0)
    return NSAAttention(HIDDEN, 8, kv_heads, DK, DV, dtype=torch.float64, **(BLOCKS | options))


def parallel(layer: nn.Module, mesh: Any, prefix: str = "", whole_compression: bool = False) -> nn.Module:
    from torch.distributed.tensor.parallel import parallelize_module

    from nsa_torch.distributed import tensor_parallel_plan

    plan = tensor_parallel_plan(layer.get_submodule(prefix.rstrip(".")))
    if whole_compression:
        plan = {name: style for name, style in plan.items() if name.endswith("_proj")}
    return parallelize_module(layer, mesh, {prefix + name: style for name, style in plan.items()})


def run(module: nn.Module, x: Tensor, **options: Any) -> dict[str, Tensor]:
    leaf = x.clone().requires_grad_()
    out = module(leaf, **options)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=out.dtype)
    (out * weight).sum().backward()
    return {"out": out.detach(), "hidden_states": leaf.grad} | gradients(module)


def _one_head_each(mesh: Any) -> None:
    packed = {"cu_seqlens": torch.tensor([0, 13, 13, LENGTH], dtype=torch.int32)}
    for kv_heads, options in ((4, {"bias": True}), (8, {"per_head_compression": True})):
        layer = make_wide(kv_heads, **options)
        for x, packing in ((tokens(2, LENGTH), {}), (tokens(LENGTH), packed)):
            cut = parallel(copy.deepcopy(layer), mesh)
            layer.zero_grad()
            assert_all_near(run(cut, x, **packing), run(layer, x, **packing), f"{kv_heads} {options} {packing}")
            assert cut.choices(x, **packing).block_indices.size(-2) == kv_heads // 4


def _training_and_decoding(mesh: Any) -> None:
    alone = make_wide()
    cut, target = parallel(copy.deepcopy(alone), mesh), tokens(2, LENGTH, seed=5)
    x = tokens(2, LENGTH)
    for module in (alone, cut):
        train(module, x, target, 5, 0.1)
    for name, parameter in alone.named_parameters():
        assert_near(whole(cut.get_parameter(name)), parameter, name, 1e-7)
    with torch.no_grad():
        cache = cut.new_cache(2, 64)
        outs = [cut(part, cache=cache) for part in x.split([20, 1, 16], dim=1)]
        assert_near(torch.cat(outs, dim=1), alone(x), "decoding", 1e-7)


def _compiled(mesh: Any) -> None:
    torch.compiler.reset()
    layer, x = make_wide(), tokens(2, LENGTH)
    cut = torch.compile(parallel(copy.deepcopy(layer), mesh), backend="aot_eager", fullgraph=True)
    assert_all_near(run(cut, x), run(layer, x), "compiled")


def _too_few_heads(mesh: Any) -> None:
    """Fewer KV heads than ranks, or a number that they do not divide: refused before anything is cut, or runs."""
    from torch.distributed.tensor import DTensor

    for kv_heads in (1, 2):
        layer = make_wide(kv_heads)
        with pytest.raises(
            ValueError, match=f"the ranks of tensor parallelism must divide num_kv_heads, {kv_heads}, got 4"
        ):
            parallel(layer, mesh)
        assert not any(isinstance(parameter, DTensor) for parameter in layer.parameters())
        cut = parallel(make_wide(kv_heads), mesh, whole_compression=True)
        with pytest.raises(ValueError, match="k_proj must give whole heads, of 24 channels each, and at least one"):
            cut(tokens(1, 9))


def _with_fsdp(mesh: Any) -> None:
    """Sharded over two, cut over two: each block at once, or its parts each for itself; compressions cut, or whole."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    rank = square["dp"].get_local_rank()
    for nested, whole_compression in ((False, False), (True, True)):
        alone, model = make_model(), make_model()
        for n, block in enumerate(model.blocks):
            parallel(model, square["tp"], f"blocks.{n}.attn.", whole_compression)
            for part in block.attn.children() if nested else ():
                fully_shard(part, mesh=square["dp"])
            fully_shard(block, mesh=square["dp"])
        fully_shard(model, mesh=square["dp"])
        optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (alone, model)]
        for x in batches(2):
            loss_of(alone, x).backward()
            loss_of(model, x.chunk(2)[rank]).backward()
            for module in (alone, model):  # all that are on one mesh, as torch asks
                weights = [weight for name, weight in module.named_parameters() if "_proj" in name]
                nn.utils.clip_grad_norm_(weights, 0.01)
            assert_all_near(gradients(model), gradients(alone), f"{nested} {whole_compression}", 1e-8)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()


def _replicated_shards(mesh: Any) -> None:
    """HSDP: sharded over two, replicated over two."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    alone, model, x = make_model(), make_model(), tokens(4, LENGTH)
    for block in model.blocks:
        fully_shard(block, mesh=square)
    fully_shard(model, mesh=square)
    loss_of(alone, x).backward()
    loss_of(model, x.chunk(4)[torch.distributed.get_rank()]).backward()
    assert_all_near(gradients(model), gradients(alone), "HSDP")


def _checkpoint(mesh: Any, folder: str, saved: str) -> None:
    """What one process saved is loaded by four, sharded and cut; and saved again."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = Model()
    for n in range(len(model.blocks)):
        parallel(model, square["tp"], f"blocks.{n}.attn.")
    fully_shard(model, mesh=square["dp"])
    state = get_model_state_dict(model)
    dcp.load({"model": state}, checkpoint_id=folder)
    set_model_state_dict(model, state)
    expected = make_model().state_dict()
    for name, parameter in model.state_dict().items():
        assert_near(whole(parameter), expected[name], name, 0)
    dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=saved)


class Decoder(nn.Module):
    """What the recipe of docs/distributed.md is for."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, HIDDEN, dtype=torch.float64)
        self.blocks = nn.ModuleList(Block(torch.float64) for _ in range(2))
        self.norm = nn.LayerNorm(HIDDEN, dtype=torch.float64)
        self.head = nn.Linear(HIDDEN, 16, bias=False, dtype=torch.float64)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def loss(self, ids: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def _recipe(mesh: Any) -> None:
    """The page's own code: made on the meta device, initialised, given one process's weights, trained with clipping."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh

    torch.compiler.reset()
    page = (Path(__file__).parents[1] / "docs" / "distributed.md").read_text()
    names: dict[str, Any] = {}
    exec(re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)[0], names)
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    with torch.device("meta"):
        model = Decoder()
    model = names["parallelize"](model, square, backend="aot_eager")
    model.to_empty(device="cpu")
    for module in model.modules():
        if callable(reset := getattr(module, "reset_parameters", None)):
            reset()
    assert all(whole(parameter).isfinite().all() for parameter in model.parameters())
    torch.manual_seed(0)
    alone = Decoder()
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, alone.state_dict() if torch.distributed.get_rank() == 0 else {}, options=options)
    ids = torch.randint(16, (4, LENGTH), generator=torch.Generator().manual_seed(1))
    for module, part in ((alone, ids), (model, ids.chunk(2)[square["dp"].get_local_rank()])):
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
        for _ in range(3):
            module.loss(part).backward()
            nn.utils.clip_grad_norm_(module.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
    for name, parameter in alone.named_parameters():
        assert_near(whole(model.get_parameter(name)), parameter, name, 1e-7)


def test_on_four_ranks(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    first, second = str(tmp_path / "of one"), str(tmp_path / "of four")
    dcp.save({"model": make_model().state_dict()}, checkpoint_id=first, no_dist=True)
    tensor_parallel = (_one_head_each, _training_and_decoding, _compiled, _too_few_heads)
    two_by_two = (_recipe, _with_fsdp, _replicated_shards, partial(_checkpoint, folder=first, saved=second))
    on_ranks(4, *tensor_parallel, *two_by_two)
    loaded = Model().state_dict()
    dcp.load({"model": loaded}, checkpoint_id=second, no_dist=True)
    for name, parameter in make_model().state_dict().items():
        assert_near(loaded[name], parameter, name, 0)
