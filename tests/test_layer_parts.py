"""What options put into NSAAttention: norms, biases, shared keys and values, gates of another dtype, a convolution."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

from layer_reference import convolve
from nsa_torch.convolution import CausalConv
from test_layer_options import ALL, assert_is_the_definition
from test_module import DK, DV, HEADS, HIDDEN, KV_HEADS, make, tokens

pytestmark = pytest.mark.usefixtures("one_thread")


def test_modules_as_norms() -> None:
    """Any that keep the shape; their parameters are the layer's."""
    norms = nn.LayerNorm(DK, dtype=torch.float64), nn.Sequential(nn.RMSNorm(DK, eps=0.1, dtype=torch.float64))
    module = make(qk_norm=norms)
    assert (module.q_norm, module.k_norm) == norms
    assert {"q_norm.weight", "q_norm.bias", "k_norm.0.weight"} <= set(module.state_dict())
    x = tokens(2, 21).requires_grad_()
    assert_is_the_definition(module, x)
    nn.init.zeros_(norms[0].weight)
    module.reset_parameters()
    assert torch.equal(norms[0].weight, torch.ones_like(norms[0].weight))


def test_norms_that_change_the_shape_are_refused() -> None:
    module = make(qk_norm=(nn.Identity(), nn.Linear(DK, DK - 1, dtype=torch.float64)))
    with pytest.raises(ValueError, match=r"k_norm must give what it gets, of shape \(2, 9, 2, 3, 8\), got \(2, 9, 2"):
        module(tokens(2, 9))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_norms_are_computed_in_float32(dtype: torch.dtype, size: float) -> None:
    """Rounded once: the squares of large and of small channels neither overflow nor vanish."""
    module = make(qk_norm=True, dtype=dtype)
    heads = (torch.randn(200, HEADS, DK, generator=torch.Generator().manual_seed(0)) * size).to(dtype)
    weight = module.q_norm.weight.double()
    expected = heads.double() / (heads.double().square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
    got = module.q_norm(heads).double()
    assert ((got - expected).abs() <= 0.51 * torch.finfo(dtype).eps * expected.abs() + 1e-6).all()


@pytest.mark.filterwarnings("error")
def test_norms_under_autocast() -> None:
    module, x = make(**ALL, dtype=torch.float32), tokens(2, 37, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inputs, _ = module._inputs(x, None, None, None)
        out = module(x)
    assert {t.dtype for t in inputs[:-1]} == {torch.bfloat16} and inputs.gates.dtype == torch.float32
    expected = module(x)
    assert (out - expected).norm() < 0.05 * expected.norm()


def test_biases_apart() -> None:
    for bias, qkv_bias, o_bias in itertools.product((False, True), (None, False, True), (None, False, True)):
        module = make(bias=bias, qkv_bias=qkv_bias, o_bias=o_bias)
        of_qkv, of_o = (bias if given is None else given for given in (qkv_bias, o_bias))
        assert [p.bias is not None for p in (module.q_proj, module.k_proj, module.v_proj)] == [of_qkv] * 3
        assert (module.o_proj.bias is not None) == of_o
        assert module.gate_proj.bias is not None


def test_shared_keys_and_values() -> None:
    """Two thirds of the rows; what both branches read, and, repeated, a layer with separate ones."""
    shared, separate = make(shared_kv=True), make(seed=3)
    assert shared.k_proj.weight.shape == (2 * KV_HEADS * DK, HIDDEN)
    assert shared.v_proj.weight.shape == (2 * KV_HEADS * DV, HIDDEN)
    state = shared.state_dict()
    for name in ("k_proj.weight", "v_proj.weight"):
        rows = state[name].unflatten(0, (KV_HEADS, 2, -1))
        state[name] = torch.cat((rows, rows[:, 1:]), dim=1).flatten(0, 2)
    separate.load_state_dict(state)
    x = tokens(2, 37)
    torch.testing.assert_close(separate(x), shared(x), rtol=1e-13, atol=1e-13)
    inputs, _ = shared._inputs(x, None, None, None)
    assert inputs.k_slc is inputs.k_win and inputs.v_slc is inputs.v_win


@pytest.mark.parametrize("gate_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("autocast", [False, True])
def test_gates_in_another_dtype(gate_dtype: torch.dtype, autocast: bool) -> None:
    """Of 16-bit tokens, by weights and products that are not rounded to 16 bits."""
    module = make(gate_dtype=gate_dtype, dtype=torch.float32 if autocast else torch.bfloat16)
    assert module.gate_proj.weight.dtype == module.gate_proj.bias.dtype == gate_dtype
    x = tokens(2, 37).to(module.q_proj.weight.dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        gates, out = module.choices(x).gates, module(x)
    expected = copy.deepcopy(module.gate_proj).double()(x.double()).unflatten(-1, (HEADS, 3)).sigmoid()
    torch.testing.assert_close(gates.double(), expected, rtol=0, atol=1e-6)
    assert gates.dtype == gate_dtype and out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert module.gate_proj.weight.grad.dtype == gate_dtype


def test_gates_of_a_layer_cast_later() -> None:
    """The dtype is that of the weights, wherever they go."""
    module = make(gate_dtype=torch.float64, dtype=torch.float32).to(torch.bfloat16)
    assert module(tokens(1, 9).bfloat16()).dtype == torch.bfloat16
    module.gate_proj.float()
    assert module.choices(tokens(1, 9).bfloat16()).gates.dtype == torch.float32


@pytest.mark.parametrize("taps", [1, 2, 4, 7])
def test_the_convolution_is_its_formula(taps: int) -> None:
    torch.manual_seed(0)
    conv, x = CausalConv(6, taps, dtype=torch.float64), torch.randn(2, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(conv(x), convolve(x, conv.weight), rtol=1e-14, atol=1e-14)
    assert conv.weight.shape == (6, 1, taps) and conv.weight.abs().max() <= taps**-0.5
    assert f"6, taps={taps}" in repr(conv)


@pytest.mark.parametrize("taps", [2, 4])
def test_the_convolution_is_torchs(taps: int) -> None:
    """A depthwise conv1d over the tokens, added to them: the weight has the shape of torch's."""
    torch.manual_seed(0)
    conv, x = CausalConv(6, taps), torch.randn(2, 9, 6)
    torchs = nn.Conv1d(6, 6, taps, groups=6, bias=False)
    torchs.load_state_dict(conv.state_dict())
    rows = nn.functional.pad(x.transpose(1, 2), (taps - 1, 0))
    torch.testing.assert_close(conv(x), x + torchs(rows).transpose(1, 2), rtol=1e-6, atol=1e-6)
