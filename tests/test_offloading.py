"""Weights that are elsewhere, or quantized: accelerate's offloading, and what a cache is made of then."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_models import make_model, make_sequences
from test_layer_options import ALL
from test_module import make, tokens

accelerate = pytest.importorskip("accelerate")
Offload = Callable[[nn.Module], nn.Module]


@pytest.fixture(params=["memory", "disk"])
def offload(request: Any, tmp_path: Path) -> Offload:
    where: dict[str, Any] = {"execution_device": torch.device("cpu")}
    if request.param == "memory":
        return lambda module: accelerate.cpu_offload(module, **where)
    return lambda module: accelerate.disk_offload(module, str(tmp_path), **where)


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, ALL], ids=["plain", "options"])
def test_an_offloaded_layer(offload: Offload, options: dict[str, Any]) -> None:
    x = tokens(2, 40)
    expected = make(**options)(x)
    layer = offload(make(**options))
    assert next(layer.parameters()).device.type == "meta"
    torch.testing.assert_close(layer(x), expected)
    cache = layer.new_cache(2, 64)
    assert cache.device == x.device
    parts = [layer(x[:, begin : begin + 8], cache=cache) for begin in range(0, 40, 8)]
    torch.testing.assert_close(torch.cat(parts, 1), expected)


@torch.no_grad()
def test_an_offloaded_model_generates(offload: Offload) -> None:
    ids = make_sequences([23])[0][None]
    options: dict[str, Any] = {"max_new_tokens": 9, "do_sample": False}
    expected = make_model(torch.float32).generate(ids, **options)
    model: Any = offload(make_model(torch.float32))
    assert torch.equal(model.generate(ids, **options), expected)
    assert torch.equal(model.generate(ids, use_cache=False, **options), expected)


def test_another_device_is_still_refused() -> None:
    with pytest.raises(TypeError, match=r"^hidden_states must be on the layer's device meta, got cpu"):
        make().to("meta")(tokens(1, 3))


class Int8Linear(nn.Module):
    """A product by int8 weights, as quantized projections keep them."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.detach()
        self.scale = weight.abs().amax() / 127
        self.weight = nn.Parameter((weight / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight.to(x.dtype) * self.scale.to(x.dtype)).T


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("compression", ["mlp", "mean"])
def test_quantized_projections(compression: str, dtype: torch.dtype) -> None:
    layer = make(compression=compression).to(dtype)
    for name in ("q_proj", "k_proj", "v_proj"):
        setattr(layer, name, Int8Linear(getattr(layer, name)))
    x = tokens(1, 37, dtype=dtype)
    cache = layer.new_cache(1)
    assert cache[0].k_slc.dtype == dtype
    parts = [layer(x[:, begin : begin + 5], cache=cache) for begin in range(0, 37, 5)]
    rounding = {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 0.1, "atol": 0.1}
    torch.testing.assert_close(torch.cat(parts, 1), layer(x), **rounding)


def test_gates_of_another_dtype_do_not_tell_the_caches() -> None:
    layer = make(gate_dtype=torch.float32, dtype=torch.bfloat16)
    for name in ("q_proj", "k_proj", "v_proj"):
        setattr(layer, name, Int8Linear(getattr(layer, name)))
    assert layer.new_cache(1)[0].k_slc.dtype == torch.bfloat16


def test_a_cache_elsewhere() -> None:
    cache = make().new_cache(2, 8, device="meta", dtype=torch.float16)
    assert (cache.device.type, cache[0].k_slc.dtype) == ("meta", torch.float16)
