"""Checkpoints of version 0.1, whose rows of k_proj and v_proj are ordered (3, Hkv, D), become today's (Hkv, 3, D)."""

from __future__ import annotations

import io
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nsa_torch
from nsa_torch import NSAAttention
from nsa_torch.checkpoints import convert_rows_0_1
from test_module import DK, DV, KV_HEADS, make, tokens


class Model(nn.Module):
    """A layer within a model, beside one whose projections only share the names."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.attn = make(seed=seed, bias=True)
        self.dense = nn.ModuleDict({"k_proj": nn.Linear(12, 12), "v_proj": nn.Linear(12, 12)})

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x)


def as_0_1(state: dict[str, Any], prefix: str = "") -> OrderedDict[str, Any]:
    """What 0.1 would have saved of the same layer: row by row, the branch before the head."""
    old = OrderedDict(state)
    for name, dim in (("k_proj", DK), ("v_proj", DV)):
        for part in ("weight", "bias"):
            if (rows := state.get(f"{prefix}{name}.{part}")) is not None:
                order = [(h * 3 + b) * dim + c for b in range(3) for h in range(KV_HEADS) for c in range(dim)]
                old[f"{prefix}{name}.{part}"] = rows[order]
    old._metadata = OrderedDict({**state._metadata, prefix.rstrip("."): {"version": 1}})
    return old


@pytest.mark.parametrize("bias", [False, True])
def test_a_state_dict_of_0_1_is_converted(bias: bool) -> None:
    old, new = make(seed=1, bias=bias), make(seed=2, bias=bias)
    new.load_state_dict(as_0_1(old.state_dict()))
    assert torch.equal(new.k_proj.weight, old.k_proj.weight)
    assert torch.equal(new(tokens(2, 29)), old(tokens(2, 29)))


@pytest.mark.parametrize("assign", [False, True])
def test_a_saved_model_of_0_1_is_converted(assign: bool) -> None:
    old, new, file = Model(1), Model(2), io.BytesIO()
    saved = as_0_1(old.state_dict(), "attn.")
    untouched = {name: tensor.clone() for name, tensor in saved.items()}
    torch.save(saved, file)
    file.seek(0)
    new.load_state_dict(torch.load(file, weights_only=True), assign=assign)
    for name, tensor in old.state_dict().items():
        assert torch.equal(new.state_dict()[name], tensor), name
    assert all(torch.equal(saved[name], tensor) for name, tensor in untouched.items())


def test_a_state_dict_of_today_stays() -> None:
    old, new = Model(1), Model(2)
    for state in (old.state_dict(), dict(old.state_dict())):
        new.load_state_dict(state)
        assert torch.equal(new.attn.k_proj.weight, old.attn.k_proj.weight)
        new.attn.reset_parameters()


def test_rows_of_a_dense_layer_stay() -> None:
    """Whatever else has a k_proj is of version 1 in its own metadata."""
    dense = nn.ModuleDict(
        {name: nn.Linear(24, 3 * KV_HEADS * DK, dtype=torch.float64) for name in ("k_proj", "v_proj")}
    )
    state = dense.state_dict()
    state.pop("v_proj.weight"), state.pop("v_proj.bias")
    layer = make(bias=True)
    layer.load_state_dict(state, strict=False)
    assert torch.equal(layer.k_proj.weight, dense["k_proj"].weight)


def test_a_dict_without_metadata_is_converted_when_asked() -> None:
    old, new = Model(1), Model(2)
    plain = dict(as_0_1(old.state_dict(), "attn."))
    converted = nsa_torch.convert_state_dict_0_1(plain, new)
    assert torch.equal(converted["dense.k_proj.weight"], plain["dense.k_proj.weight"])
    new.load_state_dict(converted)
    assert torch.equal(new(tokens(2, 29)), old(tokens(2, 29)))
    layer, alone = make(seed=3), make(seed=4)
    alone.load_state_dict(nsa_torch.convert_state_dict_0_1(dict(as_0_1(layer.state_dict())), alone))
    assert torch.equal(alone.v_proj.weight, layer.v_proj.weight)


def test_nothing_is_converted_twice() -> None:
    old, new = Model(1), Model(2)
    converted = nsa_torch.convert_state_dict_0_1(as_0_1(old.state_dict(), "attn."), new)
    new.load_state_dict(converted)
    assert torch.equal(new.attn.k_proj.weight, old.attn.k_proj.weight)
    for state in (converted, old.state_dict()):
        with pytest.raises(ValueError, match=r"state_dict must be of nsa_torch 0.1, got version 2 of attn"):
            nsa_torch.convert_state_dict_0_1(state, new)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="state_dict must hold k_proj and v_proj of the model's NSAAttention layers"):
        nsa_torch.convert_state_dict_0_1({"k_proj.weight": torch.zeros(48, 24)}, Model(1))
    with pytest.raises(ValueError, match="rows must be three for each of 2 KV heads and channel, got 47"):
        convert_rows_0_1(torch.zeros(47, 24), 2)
    state = as_0_1(make().state_dict())
    state["k_proj.weight"] = torch.zeros(47, 24)
    with pytest.raises(RuntimeError, match=r"size mismatch for k_proj\.weight"):
        make().load_state_dict(state)


def test_the_order_of_rows() -> None:
    """Rows of a head: its compressed, its selected and its window branch."""
    layer = NSAAttention(24, 4, 2, 8, 6, dtype=torch.float64)
    rows = torch.arange(48).view(3, 2, 8)  # branch, head, channel
    converted = convert_rows_0_1(rows.flatten(), 2)
    assert torch.equal(converted, rows.transpose(0, 1).flatten())
    x = torch.randn(1, 3, 24, dtype=torch.float64)
    inputs, _ = layer._inputs(x, None, None, None)
    assert torch.equal(inputs.v_slc, layer.v_proj(x).view(1, 3, 2, 3, 6)[:, :, :, 1])
