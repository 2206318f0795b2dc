"""Rotary tables of NSAAttention: any even width, half-split and interleaved pairs, (cos, sin) and complex numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from layer_reference import turn
from nsa_torch.rope import for_heads, rope_tables, rotate
from test_layer_options import TIGHT
from test_module import make, tokens

pytestmark = pytest.mark.usefixtures("one_thread")

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
