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

from layer_reference import convolve, reference_forward, turn
from nsa_torch import NSAAttention
from nsa_torch.convolution import CausalConv
from nsa_torch.diagnostics import check_causality
from nsa_torch.rope import for_heads, rope_tables, rotate
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


# --- each option's own ---


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


@pytest.mark.parametrize("options", [*OPTIONS.values(), ALL], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(options: dict[str, Any], dtype: torch.dtype) -> None:
    module, x = make(**options, dtype=dtype), tokens(2, 37).to(dtype)
    out, expected = module(x), copy.deepcopy(module).double()(x.double())
    assert out.dtype == dtype
    assert (out.double() - expected).norm() < 0.05 * expected.norm()


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


# --- rotary ---

HALVES = [2, 4, 6, 8]


@pytest.mark.parametrize("dim", HALVES)
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_leaves_scores_as_defined(dim: int, interleaved: bool) -> None:
    random = torch.Generator().manual_seed(dim)
    q, k = (torch.randn(2, 9, 3, 8, generator=random, dtype=torch.float64) for _ in range(2))
    position = torch.arange(9)
    tables = for_heads(rope_tables(position, dim, 500.0, torch.float64))
    got = [rotate(t, tables, interleaved) for t in (q, k)]
    expected = [turn(t, position, 500.0, dim=dim, interleaved=interleaved) for t in (q, k)]
    scores = [torch.einsum("bihc,bjhc->bhij", *pair) for pair in (got, expected)]
    torch.testing.assert_close(*scores, **TIGHT)
    assert torch.equal(got[0][..., dim:], q[..., dim:])
    if not interleaved:
        torch.testing.assert_close(got[0], expected[0], **TIGHT)


def tables_of(dim: int, theta: float, length: int, *, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Angles of channels in the order of the pairs, as models have them."""
    angles = torch.arange(length, dtype=torch.float64)[:, None] * theta ** (
        -torch.arange(dim // 2).double() / (dim // 2)
    )
    angles = angles.repeat_interleave(2, -1) if interleaved else angles.repeat(1, 2)
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("dim", HALVES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_tables_of_any_even_width(dim: int, interleaved: bool, packed: bool) -> None:
    """Given as (cos, sin) and as complex numbers, in every shape: what rope_theta and rope_dim give."""
    module = make(rope_dim=dim, rope_interleaved=interleaved, rope_theta=500.0)
    x = tokens(29) if packed else tokens(2, 29)
    options = {"cu_seqlens": torch.tensor([0, 29], dtype=torch.int32)} if packed else {}
    expected = module(x, **options)
    cos, sin = tables_of(dim, 500.0, 29, interleaved=interleaved)
    step = cos[:, ::2], sin[:, ::2]
    freqs_cis = torch.complex(*step) if interleaved else torch.complex(cos[:, : dim // 2], sin[:, : dim // 2])
    batches = (1,) if packed else (1, 2)
    bare = make(rope_interleaved=interleaved, rope_theta=None)
    for given in ((cos, sin), freqs_cis):
        for layer in (module, bare):
            torch.testing.assert_close(layer(x, position_embeddings=given, **options), expected, **TIGHT)
        for batch in batches:
            wide = (
                given.expand(batch, -1, -1) if isinstance(given, Tensor) else [t.expand(batch, -1, -1) for t in given]
            )
            torch.testing.assert_close(bare(x, position_embeddings=wide, **options), expected, **TIGHT)


def test_partial_rotation_is_that_of_gpt_neox() -> None:
    from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb

    x = torch.randn(2, 29, 3, 8)
    cos, sin = rope_tables(torch.arange(29), 4, 1e4, x.dtype)
    expected, _ = apply_rotary_pos_emb(x, x, cos[None], sin[None], unsqueeze_dim=2)
    torch.testing.assert_close(rotate(x, for_heads((cos, sin))), expected)


def test_interleaved_rotation_is_that_of_cohere() -> None:
    """Its tables have each angle twice, side by side; channels come out gathered."""
    from transformers.models.cohere.modeling_cohere import apply_rotary_pos_emb

    x = torch.randn(2, 29, 3, 8)
    cos, sin = (t.float() for t in tables_of(8, 1e4, 29, interleaved=True))
    expected, _ = apply_rotary_pos_emb(x, x, cos[None], sin[None], unsqueeze_dim=2)
    got = rotate(x, for_heads(rope_tables(torch.arange(29), 8, 1e4, x.dtype)), interleaved=True)
    torch.testing.assert_close(got, torch.cat((expected[..., ::2], expected[..., 1::2]), dim=-1))


def test_tables_with_gradients() -> None:
    module, x = make(rope_theta=None, rope_interleaved=True), tokens(1, 21)
    tables = [t.requires_grad_() for t in tables_of(4, 500.0, 21, interleaved=True)]

    def forward(*tables: Tensor) -> Tensor:
        return module(x, position_embeddings=tables)[:, -2:]

    assert torch.autograd.gradcheck(forward, tables)


@pytest.mark.parametrize("width", [0, 3, 10])
def test_tables_of_a_width_that_does_not_fit(width: int) -> None:
    cos = torch.ones(9, width, dtype=torch.float64)
    message = (
        r"position_embeddings must hold tensors of shape \(1, 9, R\) or \(2, 9, R\) or \(9, R\), R even and at most 8"
    )
    with pytest.raises(ValueError, match=message):
        make()(tokens(2, 9), position_embeddings=(cos, cos))


def test_bad_tables() -> None:
    module, x = make(), tokens(2, 9)
    cos, sin = tables_of(4, 500.0, 9, interleaved=False)
    freqs_cis = torch.complex(cos, sin)
    for error, message, given in (
        (ValueError, r"position_embeddings must have one width, got 4 and 2", (cos, sin[:, :2])),
        (ValueError, r"\(9, R\), R at most 4, got \(9, 8\)", torch.cat((freqs_cis, freqs_cis), dim=-1)),
        (ValueError, r"position_embeddings must hold tensors of shape", freqs_cis[:5]),
        (
            TypeError,
            r"position_embeddings must be \(cos, sin\), or one complex tensor, got two",
            (freqs_cis, freqs_cis),
        ),
        (TypeError, r"position_embeddings must be \(cos, sin\) or one complex tensor, got str", "rope"),
    ):
        with pytest.raises(error, match=message):
            module(x, position_embeddings=given)


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
