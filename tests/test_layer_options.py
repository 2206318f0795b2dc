"""The options of NSAAttention, docs/layer.md, each and in pairs: against the layer's definition in float64."""

from __future__ import annotations

import copy
import io
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from layer_reference import reference_forward
from nsa_torch import NSAAttention
from nsa_torch.diagnostics import check_causality
from test_module import BLOCKS, DK, DV, HEADS, HIDDEN, KV_HEADS, assert_gradients_close, gradients, make, tokens

pytestmark = pytest.mark.usefixtures("one_thread")

# One at a time, and every two of different names together.
OPTIONS: dict[str, dict[str, Any]] = {
    "norm": {"qk_norm": True},
    "conv": {"kv_conv": 4},
    "shared": {"shared_kv": True},
    "partial": {"rope_dim": 4},
    "interleaved": {"rope_interleaved": True},
    "qkv_bias": {"qkv_bias": True},
    "o_bias": {"o_bias": True},
    "per_head": {"per_head_compression": True},
    "unrotated": {"rope_theta": None},
}
PAIRS = {
    f"{one}-{other}": OPTIONS[one] | OPTIONS[other]
    for one, other in itertools.combinations(OPTIONS, 2)
    if {one, other} != {"partial", "unrotated"}
}
ALL = {"qk_norm": True, "kv_conv": 4, "shared_kv": True, "rope_dim": 4, "rope_interleaved": True, "qkv_bias": True}
TIGHT = {"rtol": 1e-10, "atol": 1e-10}


def assert_is_the_definition(module: NSAAttention, x: Tensor) -> None:
    x = x.requires_grad_()
    out, expected = module(x), reference_forward(module, x)
    torch.testing.assert_close(out, expected, **TIGHT)
    assert_gradients_close(gradients(module, x, out), gradients(module, x, expected), **TIGHT)


@pytest.mark.parametrize("options", [*OPTIONS.values(), {"kv_conv": 1}, {"kv_conv": 9}, ALL], ids=str)
def test_output_and_gradients_are_the_references(options: dict[str, Any]) -> None:
    for length in (1, 2, 3, 7, 13, 37):
        assert_is_the_definition(make(**options), tokens(2, length))


@pytest.mark.parametrize("options", PAIRS.values(), ids=PAIRS)
def test_pairs_of_options(options: dict[str, Any]) -> None:
    assert_is_the_definition(make(**options), tokens(1, 23))


@pytest.mark.parametrize("options", [*OPTIONS.values(), ALL], ids=str)
def test_gradcheck(options: dict[str, Any]) -> None:
    torch.manual_seed(3)
    sizes = {"block_size": 4, "block_stride": 2, "select_size": 2, "num_selected": 3, "window": 3}
    module = NSAAttention(4, 2, 1, 4, 1, **sizes, **options, dtype=torch.float64)
    names, parameters = zip(*module.named_parameters(), strict=True)
    x = torch.randn(1, 7, 4, dtype=torch.float64, requires_grad=True)

    def forward(x: Tensor, *values: Tensor) -> Tensor:
        return functional_call(module, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(forward, (x, *parameters))


@pytest.mark.parametrize("options", [*OPTIONS.values(), {"kv_conv": 9}, ALL], ids=str)
def test_packed_sequences_are_separate_sequences(options: dict[str, Any]) -> None:
    """What stands before a sequence, such as padding on the left, does not reach it."""
    module, lengths = make(**options), [0, 1, 13, 2, 8, 0, 37, 3, 0]
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    x = tokens(sum(lengths)).requires_grad_()
    out = module(x, cu_seqlens=cu_seqlens)
    expected = torch.cat([module(part[None])[0] for part in x.split(lengths)])
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    assert_gradients_close(gradients(module, x, out), gradients(module, x, expected), **TIGHT)
    for start, end in itertools.pairwise(cu_seqlens.tolist()):
        others = x.detach().clone()
        others[:start] += 1.0
        others[end:] += 1.0
        assert torch.equal(module(others, cu_seqlens=cu_seqlens)[start:end], out[start:end])


@pytest.mark.parametrize("options", [OPTIONS["conv"], ALL], ids=str)
def test_nothing_looks_ahead(options: dict[str, Any]) -> None:
    assert not check_causality(make(**options, dtype=torch.float32), tokens(2, 37, dtype=torch.float32)).leaks


def test_no_tokens() -> None:
    module = make(**ALL)
    for x, cu_seqlens in ((tokens(2, 0), None), (tokens(0), torch.zeros(3, dtype=torch.int32))):
        x = x.requires_grad_()
        out = module(x, cu_seqlens=cu_seqlens)
        assert out.shape == x.shape
        assert all(not gradient.any() for gradient in gradients(module, x, out).values())


@pytest.mark.parametrize("options", [*OPTIONS.values(), ALL], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(options: dict[str, Any], dtype: torch.dtype) -> None:
    module, x = make(**options, dtype=dtype), tokens(2, 37).to(dtype)
    out, expected = module(x), copy.deepcopy(module).double()(x.double())
    assert out.dtype == dtype
    assert (out.double() - expected).norm() < 0.05 * expected.norm()


# --- a module among modules ---


def test_state_dict() -> None:
    def shapes(**options: Any) -> dict[str, tuple[int, ...]]:
        return {name: tuple(t.shape) for name, t in make(**options).state_dict().items()}

    plain = shapes()
    added = {
        "q_norm.weight": (DK,),
        "k_norm.weight": (DK,),
        "k_conv.weight": (3 * KV_HEADS * DK, 1, 4),
        "v_conv.weight": (3 * KV_HEADS * DV, 1, 4),
    }
    assert shapes(qk_norm=True, kv_conv=4) == plain | added
    for nothing in ({"qk_norm": False}, {"kv_conv": 0}, {"kv_conv": None}, {"rope_dim": 4, "rope_interleaved": True}):
        assert shapes(**nothing) == plain
    assert shapes(shared_kv=True, kv_conv=2)["v_conv.weight"] == (2 * KV_HEADS * DV, 1, 2)


@pytest.mark.parametrize("options", [*OPTIONS.values(), ALL | {"gate_dtype": torch.float32}], ids=str)
def test_save_load_and_deepcopy(options: dict[str, Any]) -> None:
    module, other, x, file = make(**options), make(seed=5, **options), tokens(2, 21), io.BytesIO()
    expected = module(x)
    assert not torch.allclose(other(x), expected)
    torch.save(module.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x), expected)
    assert torch.equal(copy.deepcopy(module)(x), expected)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), expected)
    module.reset_parameters()
    assert not torch.allclose(module(x), expected)


def test_reset_parameters_is_the_start() -> None:
    def fresh() -> NSAAttention:
        torch.manual_seed(0)
        return NSAAttention(HIDDEN, HEADS, KV_HEADS, DK, DV, **BLOCKS, **ALL)

    module, expected = fresh(), fresh()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(7.0)
    torch.manual_seed(1)
    module.reset_parameters()
    for name in ("q_norm.weight", "k_norm.weight"):
        assert torch.equal(module.state_dict()[name], torch.ones(DK))
    for name, parameter in module.named_parameters():
        assert (parameter != 7.0).all(), name
        assert parameter.std() <= 1.5 * expected.get_parameter(name).std() + 1e-6, name


def test_parameters_are_drawn_in_the_old_order() -> None:
    """An option draws after all that the layer has without it, from the same seed."""

    def state(**options: Any) -> dict[str, Tensor]:
        torch.manual_seed(0)
        return NSAAttention(HIDDEN, HEADS, KV_HEADS, DK, DV, **BLOCKS, **options).state_dict()

    plain, with_options = state(), state(qk_norm=True, kv_conv=4, rope_dim=4, rope_interleaved=True)
    for name, tensor in plain.items():
        assert torch.equal(with_options[name], tensor), name


def test_meta_device() -> None:
    module = NSAAttention(HIDDEN, HEADS, KV_HEADS, DK, DV, **BLOCKS, **ALL, gate_dtype=torch.float32, device="meta")
    assert {parameter.device.type for parameter in module.parameters()} == {"meta"}
    assert module(torch.empty(2, 37, HIDDEN, device="meta")).shape == (2, 37, HIDDEN)
    module = module.to_empty(device="cpu")
    module.reset_parameters()
    assert module(tokens(1, 9, dtype=torch.float32)).isfinite().all()


def test_repr_names_what_is_on() -> None:
    plain = repr(make())
    for name in ("rope_dim", "rope_interleaved", "shared_kv", "kv_conv", "gate_dtype", "norm", "Conv"):
        assert name not in plain
    text = repr(make(**ALL, gate_dtype=torch.float32))
    assert "rope_dim=4, rope_interleaved=True, shared_kv=True, kv_conv=4, gate_dtype=torch.float32" in text
    assert "(q_norm): HeadNorm((8,), eps=1e-06" in text and "(v_conv): CausalConv(24, taps=4)" in text


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"qk_norm": "rms"}, TypeError, r"qk_norm must be a bool or two modules \(q_norm, k_norm\), got 'rms'"),
        ({"qk_norm": 1}, TypeError, "qk_norm must be a bool or two modules"),
        ({"qk_norm": nn.RMSNorm(DK)}, TypeError, "qk_norm must be a bool or two modules"),
        ({"qk_norm": (nn.RMSNorm(DK), None)}, TypeError, "qk_norm must be a bool or two modules"),
        ({"kv_conv": -1}, ValueError, "kv_conv must be at least 0, got -1"),
        ({"kv_conv": True}, TypeError, "kv_conv must be an int, got bool"),
        ({"kv_conv": 4.0}, TypeError, "kv_conv must be an int, got float"),
        ({"shared_kv": 1}, TypeError, "shared_kv must be a bool, got int"),
        ({"rope_interleaved": None}, TypeError, "rope_interleaved must be a bool, got NoneType"),
        ({"qkv_bias": "yes"}, TypeError, "qkv_bias must be a bool, got str"),
        ({"o_bias": 0}, TypeError, "o_bias must be a bool, got int"),
        ({"rope_dim": 3}, ValueError, "rope_dim must be even and at most head_dim, 8, got 3"),
        ({"rope_dim": 10}, ValueError, "rope_dim must be even and at most head_dim, 8, got 10"),
        ({"rope_dim": 0}, ValueError, "rope_dim must be at least 2, got 0"),
        ({"rope_dim": 4.0}, TypeError, "rope_dim must be an int, got float"),
        ({"rope_dim": 4, "rope_theta": None}, ValueError, "rope_dim must be None when rope_theta is"),
        ({"gate_dtype": "float32"}, TypeError, "gate_dtype must be a dtype or None, got str"),
        ({"gate_dtype": torch.int32}, ValueError, "gate_dtype must be one of torch.float16, .* got torch.int32"),
    ],
    ids=str,
)
def test_constructor_names_the_bad_argument(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        NSAAttention(HIDDEN, HEADS, KV_HEADS, DK, DV, **BLOCKS, **options)


def test_a_head_of_an_odd_dimension_is_rotated_in_part() -> None:
    module = NSAAttention(HIDDEN, HEADS, KV_HEADS, 7, DV, **BLOCKS, rope_dim=6, dtype=torch.float64)
    assert_is_the_definition(module, tokens(2, 23))


class Recorded(TorchDispatchMode):
    """The ops that run, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


def test_an_option_that_is_off_costs_nothing() -> None:
    off = {"qk_norm": False, "kv_conv": 0, "shared_kv": False, "rope_dim": None, "rope_interleaved": False}
    x = tokens(2, 37)
    counted = []
    for module in (make(), make(**off, qkv_bias=False, o_bias=False, gate_dtype=None)):
        with Recorded() as recorded:
            module(x)
        counted.append(recorded.ops)
    assert counted[0] == counted[1]
    own = [op for op in counted[0] if op.startswith("nsa.")]
    assert own == ["nsa.rotate.default"] * 3 + ["nsa.compress.default"] * 2 + ["nsa.rotate.default", own[-1]]
    assert own[-1].startswith("nsa.nsa_attention")
    others = {"pad": 0, "addcmul": 0, "rms_norm": 0, "cat": 1, "index_select": 2, "mm": 4, "addmm": 1}  # cat: of angles
    for op, count in others.items():
        assert sum(name.startswith(f"aten.{op}.") for name in counted[0]) == count, op
