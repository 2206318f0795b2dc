"""The study's models against their definitions, its tasks, and runs that stop and go on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import nsa_torch
from nsa_torch import rope
from nsa_torch.convolution import CausalConv
from study import block_lists, layers, models, reformer
from study.choices import random_blocks
from study.layers import Shape
from study.nsa_layers import ClosedGates, nsa_layer
from study.runs import make_task

SHAPE = Shape(hidden=32, layers=2, heads=4, kv_heads=2, head_dim=16)
ODD_LENGTHS = (1, 31, 64, 65, 200)


def rand(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_qkv(length: int) -> tuple[Tensor, Tensor, Tensor]:
    return rand(2, length, 4, 16, seed=1), rand(2, length, 2, 16, seed=2), rand(2, length, 2, 16, seed=3)


def masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Torch's attention under a mask (Hq or 1, T, T)."""
    heads_first = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(*heads_first, attn_mask=mask, enable_gqa=True).transpose(1, 2)


def lower(length: int) -> Tensor:
    return torch.ones(1, length, length).tril().bool()


# --- models ---


@pytest.mark.parametrize("length", ODD_LENGTHS)
def test_full_and_window_attention_are_what_a_mask_says(length: int) -> None:
    q, k, v = make_qkv(length)
    torch.testing.assert_close(layers.full(q, k, v), masked(q, k, v, lower(length)))
    band = lower(length) & ~lower(length).roll(0).tril(-40)
    torch.testing.assert_close(layers.window(40)(q, k, v), masked(q, k, v, band))


@pytest.mark.parametrize("pattern", [models.LONGFORMER, models.BIGBIRD], ids=["longformer", "bigbird"])
def test_lists_of_the_budget_give_what_the_dense_mask_gives(pattern: block_lists.Pattern) -> None:
    pattern = replace(pattern, size=4)
    length = 4 * 60 + 3
    q, k, v = make_qkv(length)
    make = block_lists.lists_of(pattern, kv_heads=2, seed=1)
    mask = block_lists.dense_mask(make(length, torch.device("cpu")), length, pattern.size)
    assert mask.sum(-1).max() <= pattern.num_blocks * pattern.size
    expected = masked(q, k, v, mask.repeat_interleave(2, 0))
    torch.testing.assert_close(layers.listed(make, pattern.size)(q, k, v), expected)


def test_both_patterns_read_as_many_keys_as_nsa_may() -> None:
    for pattern in (models.LONGFORMER, models.BIGBIRD):
        assert pattern.num_blocks * pattern.size == models.BUDGET
    layer = reformer.ReformerAttention(SHAPE)
    assert layer.rounds * 2 * layer.chunk == models.BUDGET
    for pattern in (models.MINI_LONGFORMER, models.MINI_BIGBIRD):
        assert pattern.num_blocks * pattern.size == models.MINI_BUDGET
    small = models.ATTENTION["mini-reformer"](SHAPE, 0)
    assert isinstance(small, reformer.ReformerAttention) and small.rounds * 2 * small.chunk == models.MINI_BUDGET


def test_bigbird_reads_first_own_and_random_blocks() -> None:
    rows = block_lists.block_rows(block_lists.Pattern(1, 2, 3), 40, seed=0)
    for own, row in enumerate(rows):
        assert row == sorted(set(row)) and row[-1] == own
        assert {0, own, max(0, own - 1)} <= set(row)
        assert len(row) == min(own + 1, 6)
    assert len({tuple(row[1:4]) for row in rows[10:]}) > 20
    assert block_lists.block_rows(block_lists.Pattern(1, 2, 3), 40, seed=1) != rows


@pytest.mark.parametrize("length", [64, 128])
def test_reformer_is_transformers(length: int) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.models.reformer.modeling_reformer import LSHSelfAttention

    config = transformers.ReformerConfig(
        hidden_size=32, num_attention_heads=4, attention_head_size=8, is_decoder=True, hash_seed=7, num_hashes=3,
        lsh_attn_chunk_length=8, num_buckets=reformer.num_buckets(length, 8), lsh_attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    oracle, x = LSHSelfAttention(config).double(), torch.randn(2, length, 32).double()
    expected = oracle(x)
    qk, v = (p(x).unflatten(-1, (4, 8)).transpose(1, 2) for p in (oracle.query_key, oracle.value))
    torch.manual_seed(7)
    buckets = reformer.hash_buckets(qk, torch.randn(4, 8, 3, config.num_buckets // 2, dtype=torch.float64))
    offsets = torch.arange(3)[:, None] * config.num_buckets
    assert torch.equal(buckets + offsets, expected.buckets)
    out = reformer.lsh_attention(qk, v, buckets, 8).transpose(1, 2).flatten(-2)
    torch.testing.assert_close(out, expected.hidden_states, atol=1e-9, rtol=1e-9)


def test_reformer_of_one_chunk_reads_all_keys_but_its_own() -> None:
    qk, v = rand(2, 4, 12, 8, seed=1), rand(2, 4, 12, 8, seed=2)
    out = reformer.lsh_attention(qk, v, torch.zeros(2, 4, 1, 12, dtype=torch.int64), 12)
    scores = qk @ F.normalize(qk, dim=-1).transpose(-1, -2)
    scores = scores.masked_fill(torch.eye(12).bool(), -1e5).masked_fill(~lower(12)[0], -torch.inf)
    torch.testing.assert_close(out, scores.softmax(-1) @ v, atol=1e-5, rtol=1e-5)


def test_convolution_is_its_formula_and_refuses_packed_tokens() -> None:
    conv = CausalConv(6, layers.CONV_TAPS).double()
    x = rand(2, 9, 6)
    expected = x.clone()
    for back in range(layers.CONV_TAPS):
        expected[:, back:] += conv.weight[:, 0, layers.CONV_TAPS - 1 - back] * x[:, : 9 - back]
    torch.testing.assert_close(conv(x), expected)
    with pytest.raises(ValueError, match="packed"):
        conv(x[0])


def test_convolution_in_nsa_works_on_all_branches_before_compression() -> None:
    torch.manual_seed(0)
    plain, mixed = nsa_layer(SHAPE).double(), nsa_layer(SHAPE, conv=True).double()
    x = rand(1, 70, SHAPE.hidden)
    mixed.load_state_dict(mixed.state_dict() | plain.state_dict())
    for conv in (mixed.k_conv, mixed.v_conv):
        torch.nn.init.zeros_(conv.weight)
    torch.testing.assert_close(mixed(x), plain(x))
    torch.nn.init.ones_(mixed.v_conv.weight[..., -1])  # y = 2 x: twice the output, but for the compression
    for layer in (plain, mixed):
        layer.gate_proj = ClosedGates(layer.gate_proj, ("compressed",))
    torch.testing.assert_close(mixed(x), 2 * plain(x))


def test_the_layers_option_is_the_convolution_of_full_attention() -> None:
    """One function for all models: a projection with the convolution behind it, in NSA too."""
    torch.manual_seed(0)
    option, behind = nsa_layer(SHAPE, conv=True).double(), nsa_layer(SHAPE).double()
    behind.load_state_dict({name: t for name, t in option.state_dict().items() if "_conv" not in name})
    for name in ("k", "v"):
        wrapped = layers.ConvolvedLinear(getattr(behind, f"{name}_proj")).double()
        wrapped.conv.load_state_dict(getattr(option, f"{name}_conv").state_dict())
        setattr(behind, f"{name}_proj", wrapped)
    x = rand(2, 70, SHAPE.hidden)
    torch.testing.assert_close(option(x), behind(x), rtol=0, atol=0)


@pytest.mark.parametrize("shut", [("compressed",), ("selected",), ("window",)])
def test_shut_branches_have_no_weight(shut: tuple[str, ...]) -> None:
    layer = nsa_layer(SHAPE, without=shut).double()
    x = rand(1, 100, SHAPE.hidden)
    gates = layer.choices(x).gates
    assert (gates == 0).all((0, 1, 2)).tolist() == [name in shut for name in ("compressed", "selected", "window")]
    layer(x).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters() if p.grad is not None)


def test_dropped_branches_leave_some_sequences_the_compressed_one() -> None:
    layer = nsa_layer(SHAPE, dropped=0.5).double()
    x = rand(64, 40, SHAPE.hidden)
    assert (layer.eval().choices(x).gates > 0).all()
    torch.manual_seed(0)
    gates = layer.train().choices(x).gates
    alone = (gates[..., 1:] == 0).all((1, 2, 3))
    assert 16 < alone.sum() < 48
    assert ((gates > 0).all((1, 2, 3)) | alone).all() and (gates[..., 0] > 0).all()
    with pytest.raises(ValueError, match="share"):
        nsa_layer(SHAPE, dropped=1.5)


def test_shared_keys_choose_by_means_of_the_selected_branchs_keys() -> None:
    options = {
        "compression": "mean",
        "block_size": 8,
        "block_stride": 8,
        "select_size": 8,
        "num_selected": 4,
        "window": 8,
    }
    layer = nsa_layer(SHAPE, choice="shared", num_initial=0, num_local=1, **options).double()
    x = rand(2, 72, SHAPE.hidden)
    inputs, _ = layer._inputs(x, None, None, None)
    tables = rope.rope_tables(torch.arange(72), SHAPE.head_dim, SHAPE.rope_theta, x.dtype)
    cos, sin = rope.for_heads(tables)
    unrotated = nsa_torch.rotate(inputs.k_slc, cos, sin, transposed=True)
    expected = unrotated.unflatten(1, (9, 8)).mean(2)
    ends = torch.arange(9) * 8 + 7
    expected = nsa_torch.rotate(expected, cos[ends], sin[ends])
    torch.testing.assert_close(inputs.k_cmp, expected)


def test_random_blocks_are_lists_as_nsa_makes_them() -> None:
    layer = nsa_layer(SHAPE, select_size=16, num_selected=6, block_size=16, block_stride=16, choice="random")
    lists = random_blocks(300, 2, layer, torch.device("cpu"))
    for p in (0, 15, 16, 100, 299):
        row = [block for block in lists[0, p, 0].tolist() if block >= 0]
        own = p // 16
        assert row == sorted(set(row)) and {0, own, max(0, own - 1)} <= set(row) and len(row) == min(6, own + 1)
        assert max(row) <= own
    assert layer(torch.randn(2, 300, SHAPE.hidden)).isfinite().all()


# Later tokens sort into Reformer's chunks and so move earlier ones: which keys are read depends on them.
@pytest.mark.parametrize("name", [name for name in models.ATTENTION if "reformer" not in name])
def test_model_is_causal_and_its_parameters_match(name: str) -> None:
    shape = replace(SHAPE, heads=2, kv_heads=1)
    _, reference = models.make_model(models.REFERENCE, 40, Shape())
    _, sizes = models.make_model(name, 40, Shape())
    assert abs(sizes.parameters / reference.parameters - 1) < 0.02
    torch.manual_seed(0)
    model = models.make_model(name, 40, shape, 300)[0].eval()
    tokens = torch.randint(40, (2, 270))
    changed = tokens.clone()
    changed[:, 150:] = (changed[:, 150:] + 1) % 40
    with torch.no_grad():
        torch.manual_seed(1)  # blocks by chance: the same ones in both
        before = model(tokens)
        torch.manual_seed(1)
        after = model(changed)
    torch.testing.assert_close(before[:, :150], after[:, :150])
    assert not torch.allclose(before[:, 150:], after[:, 150:])


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="model must be one of"):
        models.make_model("dense", 40, SHAPE)
    with pytest.raises(ValueError, match="task must be one of"):
        make_task("copy")
    with pytest.raises(ValueError, match="branches are"):
        nsa_layer(SHAPE, without=("local",))
    assert isinstance(nsa_layer(SHAPE), nsa_torch.NSAAttention)
