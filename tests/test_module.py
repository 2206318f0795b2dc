"""NSAAttention and BlockCompression against the float64 reference, and against dense attention."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

import nsa_torch
from layer_reference import reference_forward, turn
from nsa_torch import NSAAttention, reference
from nsa_torch.module import BlockCompression
from nsa_torch.rope import rope_tables, rotate

pytestmark = pytest.mark.usefixtures("one_thread")

HIDDEN, HEADS, KV_HEADS, DK, DV = 24, 4, 2, 8, 6
BLOCKS = {"block_size": 8, "block_stride": 4, "select_size": 8, "num_selected": 4, "window": 10}
LENGTHS = (1, 2, 7, 8, 9, 12, 13, 31, 37)  # around l = l' = 8 and l + d = 12, and primes


def make(*, seed: int = 0, dtype: torch.dtype = torch.float64, **options) -> NSAAttention:
    torch.manual_seed(seed)
    module = NSAAttention(HIDDEN, HEADS, KV_HEADS, DK, DV, **(BLOCKS | options), dtype=dtype)
    with torch.no_grad():  # every parameter counts, biases too
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return module


def tokens(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)


def gradients(module: NSAAttention, x: Tensor, out: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*module.named_parameters(), strict=True)
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device).view_as(out)
    grads = torch.autograd.grad((out * weight).sum(), (x, *parameters), materialize_grads=True, allow_unused=True)
    return dict(zip(("hidden_states", *names), grads, strict=True))


def assert_gradients_close(got: dict[str, Tensor], expected: dict[str, Tensor], **tolerance):
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, msg=lambda m, n=name: f"{n}: {m}", **tolerance)


VARIANTS = [
    {},
    {"per_head_compression": True},
    {"compression_hidden": 5},
    {"compression": "linear"},
    {"compression": "linear", "per_head_compression": True},
    {"compression": "mean"},
    {"rope_theta": None},
    {"rope_theta": 500.0, "bias": True, "scale": 0.2},
    {"num_initial": 0, "num_local": 1, "num_selected": 1},
    {"block_size": 4, "block_stride": 4, "select_size": 12, "window": 1},
    {"block_size": 8, "block_stride": 2, "select_size": 2, "num_selected": 9, "num_initial": 2},
]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_output_and_gradients_are_the_references(options):
    module = make(**options)
    for length in LENGTHS if not options else (7, 13, 37):
        x = tokens(2, length).requires_grad_()
        out, expected = module(x), reference_forward(module, x)
        torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
        assert_gradients_close(gradients(module, x, out), gradients(module, x, expected), rtol=1e-10, atol=1e-10)


def test_float32():
    module, x = make(dtype=torch.float32), tokens(2, 37)
    expected = reference_forward(copy.deepcopy(module).double(), x)
    out = module(x.float())
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)


def test_paper_sizes_are_the_default():
    module = NSAAttention(64, 4, 2, dtype=torch.float64)
    x = torch.randn(1, 131, 64, dtype=torch.float64)
    torch.testing.assert_close(module(x), reference_forward(module, x), rtol=1e-10, atol=1e-10)
    sizes = [module.block_size, module.block_stride, module.select_size, module.num_selected]
    assert sizes == [32, 16, 64, 16]
    assert (module.num_initial, module.num_local, module.window) == (1, 2, 512)
    assert (module.head_dim, module.v_head_dim) == (16, 16)


@pytest.mark.parametrize("compression", ["mlp", "linear", "mean"])
def test_gradcheck(compression):
    torch.manual_seed(3)
    sizes = {"block_size": 4, "block_stride": 2, "select_size": 2, "num_selected": 3, "window": 3}
    module = NSAAttention(4, 2, 1, 2, 1, **sizes, compression=compression, dtype=torch.float64)
    names, parameters = zip(*module.named_parameters(), strict=True)
    x = torch.randn(1, 7, 4, dtype=torch.float64, requires_grad=True)

    def forward(x: Tensor, *values: Tensor) -> Tensor:
        return functional_call(module, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(forward, (x, *parameters))


def open_gate(module: NSAAttention, branch: int) -> None:
    with torch.no_grad():
        module.gate_proj.weight.zero_()
        module.gate_proj.bias.view(-1, 3).fill_(-1e4)[:, branch] = 1e4


def dense_forward(module: NSAAttention, x: Tensor, branch: int) -> Tensor:
    batch, length, _ = x.shape
    position = torch.arange(length)
    q = turn(module.q_proj(x).unflatten(-1, (HEADS, DK)), position, module.rope_theta)
    k = module.k_proj(x).view(batch, length, KV_HEADS, 3, DK)[:, :, :, branch]
    v = module.v_proj(x).view(batch, length, KV_HEADS, 3, DV)[:, :, :, branch]
    out, _ = reference.dense_attention(q, turn(k, position, module.rope_theta), v)
    return module.o_proj(out.flatten(2))


@pytest.mark.parametrize("length", LENGTHS)
def test_long_window_is_dense_attention(length):
    module, x = make(window=length), tokens(2, length)
    open_gate(module, 2)
    torch.testing.assert_close(module(x), dense_forward(module, x, 2), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("length", LENGTHS)
def test_all_blocks_selected_is_dense_attention(length):
    module, x = make(num_selected=max(3, -(-length // 8))), tokens(2, length)
    open_gate(module, 1)
    torch.testing.assert_close(module(x), dense_forward(module, x, 1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rope_theta", [10000.0, None])
@pytest.mark.parametrize("max_seqlen", [None, 37])
def test_packed_sequences_are_separate_sequences(rope_theta, max_seqlen):
    module = make(rope_theta=rope_theta)
    lengths = [0, 1, 13, 8, 0, 37, 7, 0]
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    x = tokens(sum(lengths)).requires_grad_()
    out = module(x, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)
    expected = torch.cat([module(part[None])[0] for part in x.split(lengths)])
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    got = gradients(module, x, out)
    assert_gradients_close(got, gradients(module, x, expected), rtol=1e-10, atol=1e-10)
    with_one = module(x[None], cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)
    torch.testing.assert_close(with_one, out[None], rtol=0, atol=0)


def test_position_embeddings_replace_rope_theta():
    module, x = make(), tokens(2, 29)
    bare = copy.deepcopy(module)
    bare.rope_theta = None
    cos, sin = rope_tables(torch.arange(29), DK, module.rope_theta, torch.float64)
    expected = module(x)
    for tables in ((cos, sin), (cos[None], sin[None]), (cos[None].expand(2, -1, -1), sin[None])):
        for layer in (module, bare):
            torch.testing.assert_close(layer(x, position_embeddings=tables), expected)


def test_position_embeddings_of_packed_sequences():
    module, x = make(), tokens(29)
    cu_seqlens = torch.tensor([0, 11, 29], dtype=torch.int32)
    positions = torch.cat((torch.arange(11), torch.arange(18)))
    cos, sin = rope_tables(positions, DK, module.rope_theta, torch.float64)
    expected = module(x, cu_seqlens=cu_seqlens)
    for tables in ((cos, sin), (cos[None], sin[None])):
        out = module(x, cu_seqlens=cu_seqlens, position_embeddings=tables)
        torch.testing.assert_close(out, expected)


def test_position_embeddings_may_differ_within_a_batch():
    module, x = make(), tokens(2, 29)
    positions = torch.stack((torch.arange(29), torch.arange(29) + 5))
    tables = rope_tables(positions, DK, module.rope_theta, torch.float64)
    # Scores depend on differences of positions only, so a shift changes nothing.
    torch.testing.assert_close(module(x, position_embeddings=tables), module(x))


def test_rope_is_that_of_llama():
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import (
        LlamaRotaryEmbedding,
        apply_rotary_pos_emb,
    )

    config = LlamaConfig(hidden_size=HEADS * DK, num_attention_heads=HEADS, head_dim=DK)
    x = torch.randn(2, 29, HEADS, DK)
    cos, sin = LlamaRotaryEmbedding(config)(x, torch.arange(29)[None])
    theta = config.rope_parameters["rope_theta"]
    own_cos, own_sin = rope_tables(torch.arange(29), DK, theta, x.dtype)
    torch.testing.assert_close(own_cos[None], cos)
    torch.testing.assert_close(own_sin[None], sin)
    expected, _ = apply_rotary_pos_emb(x, x, cos, sin, unsqueeze_dim=2)
    torch.testing.assert_close(rotate(x, (cos[:, :, None], sin[:, :, None])), expected)


def test_causal():
    module, x = make(), tokens(1, 37)
    changed = x.clone()
    changed[:, 20:] += 1.0
    before, after = module(x)[:, :20], module(changed)[:, :20]
    torch.testing.assert_close(before, after, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("packed", [False, True])
def test_no_tokens(packed):
    module = make()
    x = tokens(0).requires_grad_() if packed else tokens(2, 0).requires_grad_()
    cu_seqlens = torch.zeros(3, dtype=torch.int32) if packed else None
    out = module(x, cu_seqlens=cu_seqlens)
    assert out.shape == x.shape
    for gradient in gradients(module, x, out).values():
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_large_inputs_give_no_nan():
    for dtype in (torch.float32, torch.bfloat16):
        module = make(dtype=dtype)
        x = (tokens(2, 37) * 1e4).to(dtype).requires_grad_()
        out = module(x)
        assert out.isfinite().all()
        assert all(gradient.isfinite().all() for gradient in gradients(module, x, out).values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_module(dtype):
    module = make(dtype=dtype)
    x = tokens(2, 37).to(dtype)
    wide = copy.deepcopy(module).double()
    out = module(x)
    assert out.dtype == dtype
    expected = wide(x.double())
    assert (out.double() - expected).norm() < 0.05 * expected.norm()
    assert module.choices(x).gates.dtype == torch.float32


def test_autocast():
    module, x = make(dtype=torch.float32), tokens(2, 37, dtype=torch.float32).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(x)
        assert module.choices(x).gates.dtype == torch.float32
    assert out.dtype == torch.bfloat16
    expected = module(x)
    assert (out - expected).norm() < 0.05 * expected.norm()
    got, exact = gradients(module, x, out), gradients(module, x, expected)
    for name, gradient in exact.items():
        assert got[name].dtype == torch.float32
        assert (got[name] - gradient).norm() < 0.1 * gradient.norm() + 1e-3, name


def test_choices_show_what_forward_reads():
    module, x = make(), tokens(2, 37)
    choices = module.choices(x)
    assert choices.block_indices.shape == (2, 37, KV_HEADS, BLOCKS["num_selected"])
    assert choices.gates.shape == (2, 37, HEADS, 3)
    assert choices.block_indices.dtype == torch.int32
    current = torch.arange(37).view(1, 37, 1, 1) // BLOCKS["select_size"]
    assert (choices.block_indices <= current).all()
    assert (choices.block_indices == current).any(-1).all()  # the query's own block is forced
    torch.testing.assert_close(choices.gates, module.gate_proj(x).unflatten(-1, (HEADS, 3)).sigmoid())
    cu_seqlens = torch.tensor([0, 37, 74], dtype=torch.int32)
    packed = module.choices(x.flatten(0, 1), cu_seqlens=cu_seqlens)
    assert torch.equal(packed.block_indices, choices.block_indices.flatten(0, 1))
    torch.testing.assert_close(packed.gates, choices.gates.flatten(0, 1))


def test_parameters():
    shapes = {name: tuple(p.shape) for name, p in make(bias=True).named_parameters()}
    phi = {
        f"compress_{side}.{name}": shape
        for side, d in (("k", DK), ("v", DV))
        for name, shape in {
            "pe": (8, d), "w1": (2 * d, 8 * d), "b1": (2 * d,), "w2": (d, 2 * d), "b2": (d,),
        }.items()
    }  # fmt: skip
    assert shapes == phi | {
        "q_proj.weight": (HEADS * DK, HIDDEN),
        "q_proj.bias": (HEADS * DK,),
        "k_proj.weight": (3 * KV_HEADS * DK, HIDDEN),
        "k_proj.bias": (3 * KV_HEADS * DK,),
        "v_proj.weight": (3 * KV_HEADS * DV, HIDDEN),
        "v_proj.bias": (3 * KV_HEADS * DV,),
        "gate_proj.weight": (HEADS * 3, HIDDEN),
        "gate_proj.bias": (HEADS * 3,),
        "o_proj.weight": (HIDDEN, HEADS * DV),
        "o_proj.bias": (HIDDEN,),
    }
    assert make(per_head_compression=True).compress_k.w1.shape == (KV_HEADS, 2 * DK, 8 * DK)
    assert make(compression="linear").compress_v.w1.shape == (DV, 8 * DV)
    assert not list(make(compression="mean").compress_k.parameters())


@pytest.mark.parametrize("compression", ["mlp", "linear"])
@pytest.mark.parametrize("num_heads", [None, KV_HEADS])
def test_compression_starts_close_to_the_mean(compression, num_heads):
    torch.manual_seed(0)
    options = {"compression": compression, "num_heads": num_heads, "dtype": torch.float64}
    phi = BlockCompression(16, **options)
    x = torch.randn(2, 100, KV_HEADS, 16, dtype=torch.float64)
    mean = nsa_torch.ops.compress(x)
    error = (phi(x) - mean).norm() / mean.norm()
    assert 0.02 < error < 0.3


def test_state_dict_and_deepcopy():
    module, x = make(), tokens(2, 21)
    expected = module(x)
    other = make(seed=5)
    assert not torch.allclose(other(x), expected)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x), expected)
    assert torch.equal(copy.deepcopy(module)(x), expected)
    module.reset_parameters()
    assert not torch.allclose(module(x), expected)


def test_meta_device():
    module = NSAAttention(HIDDEN, HEADS, KV_HEADS, DK, DV, **BLOCKS, device="meta")
    assert module(torch.empty(2, 37, HIDDEN, device="meta")).shape == (2, 37, HIDDEN)
    module = module.to_empty(device="cpu")
    module.reset_parameters()
    assert module(tokens(1, 9, dtype=torch.float32)).isfinite().all()


def test_repr_names_the_options():
    text = repr(make())
    assert "hidden_size=24, num_heads=4, num_kv_heads=2, head_dim=8, v_head_dim=6" in text
    assert "block_size=8, block_stride=4, select_size=8, num_selected=4" in text
    assert "compression='mlp', hidden_size=16" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 0}, "hidden_size must be at least 1, got 0"),
        ({"num_heads": 0}, "num_heads must be at least 1, got 0"),
        ({"num_heads": 3}, "num_kv_heads must divide num_heads, 3, got 2"),
        ({"num_kv_heads": 0}, "num_kv_heads must be at least 1, got 0"),
        ({"hidden_size": 25, "head_dim": None}, "num_heads must divide hidden_size .* 25, got 4"),
        ({"head_dim": 0}, "head_dim must be at least 1, got 0"),
        ({"head_dim": 7}, "head_dim must be even unless rope_theta is None, got 7"),
        ({"v_head_dim": -1}, "v_head_dim must be at least 1, got -1"),
        ({"block_size": 0}, "block_size must be at least 1, got 0"),
        ({"block_size": 6}, "block_stride must divide block_size, 6, got 4"),
        ({"block_stride": 0}, "block_stride must be at least 1, got 0"),
        ({"select_size": 10}, "block_stride must divide select_size, 10, got 4"),
        ({"num_selected": 2}, "num_selected must be at least 3, got 2"),
        ({"num_initial": -1}, "num_initial must be at least 0, got -1"),
        ({"num_local": -1}, "num_local must be at least 0, got -1"),
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"compression": "conv"}, "compression must be one of 'mlp', 'linear', 'mean', got 'conv'"),
        ({"compression_hidden": 0}, "hidden_size must be at least 1, got 0"),
        ({"rope_theta": 0.0}, "rope_theta must be above 0, or None, got 0.0"),
    ],
    ids=str,
)
def test_constructor_names_the_bad_argument(options, message):
    sizes = {"hidden_size": HIDDEN, "num_heads": HEADS, "num_kv_heads": KV_HEADS, "head_dim": DK}
    with pytest.raises(ValueError, match=message):
        NSAAttention(**(sizes | BLOCKS | options))


def test_forward_names_the_bad_argument():
    module, x, flat = make(), tokens(2, 9), tokens(9)
    cu_seqlens = torch.tensor([0, 4, 9], dtype=torch.int32)
    tables = rope_tables(torch.arange(9), DK, 1e4, torch.float64)
    for bad in (x[..., :-1], flat, x[None]):
        with pytest.raises(ValueError, match=r"hidden_states must be .B, T, hidden_size = 24., got"):
            module(bad)
    for bad in (x, flat[None, None], flat[:, :-1]):
        with pytest.raises(ValueError, match=r"hidden_states must be .sum T, hidden_size = 24."):
            module(bad, cu_seqlens=cu_seqlens)
    for dtype in (torch.float32, torch.int64):
        with pytest.raises(TypeError, match=rf"hidden_states must have the layer's dtype torch.float64, got {dtype}"):
            module(torch.zeros(1, 5, HIDDEN, dtype=dtype))
    with pytest.raises(TypeError, match="hidden_states must be on the layer's device cpu, got meta"):
        module(torch.zeros(1, 5, HIDDEN, dtype=torch.float64, device="meta"))
    with pytest.raises(TypeError, match=r"cu_seqlens must be int32, got torch.int64"):
        module(flat, cu_seqlens=cu_seqlens.long())
    with pytest.raises(ValueError, match=r"cu_seqlens must be .B . 1,. with B >= 1"):
        module(flat, cu_seqlens=cu_seqlens[:1])
    with pytest.raises(ValueError, match="cu_seqlens_k must end with the number of tokens, 9, got 8"):
        module(flat, cu_seqlens=cu_seqlens - cu_seqlens // 9)
    with pytest.raises(ValueError, match=r"max_seqlen_. must be at least the longest sequence"):
        module(flat, cu_seqlens=cu_seqlens, max_seqlen=4)
    with pytest.raises(ValueError, match=r"position_embeddings must be .cos, sin., got 1 entries"):
        module(x, position_embeddings=tables[:1])
    for cut in (slice(0, 8), slice(0, 0)):
        bad = tuple(table[cut] for table in tables)
        with pytest.raises(ValueError, match="position_embeddings must hold tensors of shape"):
            module(x, position_embeddings=bad)
    with pytest.raises(ValueError, match="position_embeddings must hold tensors of shape"):
        module(x, position_embeddings=tuple(table.expand(3, -1, -1) for table in tables))
