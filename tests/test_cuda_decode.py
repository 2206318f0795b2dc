"""nsa_attention_with_kvcache on tensor cores: random batches, and long sequences, which the CPU's tests leave out."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

import nsa_torch
from pages import Pages

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("seed", range(16))
def test_random_batches_in_16_bits(seed: int) -> None:
    """What tensor cores take: rows of multiples of 16 bytes, any group, many sequences, lengths that differ much."""
    draw = random.Random(100 + seed)
    stride = draw.choice([4, 8, 16])
    select = stride * draw.choice([1, 2, 3, 4, 8])
    options = {
        "block_size": stride * draw.choice([1, 2, 4]),
        "block_stride": stride,
        "select_size": select,
        "num_selected": draw.randint(3, 20),
        "num_initial": draw.randint(0, 1),
        "num_local": draw.randint(0, 2),
        "window": draw.choice([1, 7, 100, 600]),
    }
    batch = draw.choice([1, 2, 5, 40])
    group, heads = draw.choice([1, 3, 4, 12, 16, 20, 32]), draw.randint(1, 2)
    most = 3000 if batch <= 2 else 400
    pages = Pages(
        [draw.choice([1, draw.randint(1, 60), draw.randint(8, most)]) for _ in range(batch)],
        [draw.randint(1, 8), *(draw.randint(0, 8) for _ in range(batch - 1))],
        heads=(group * heads, heads),
        dims=draw.choice([(64, 64), (128, 128), (192, 128), (40, 24), (128, 64)]),
        page=select * draw.randint(1, 3),
        seed=seed,
        options=options,
    )
    out = nsa_torch.nsa_attention_with_kvcache(
        **pages.arguments("cuda", torch.bfloat16), num_splits=draw.choice([None, None, 1, 3])
    )
    expected = pages.expected(torch.bfloat16)
    wrong = (out.double().cpu().reshape(expected.shape) - expected).abs().amax(-1) > 2e-2
    assert wrong.float().mean().item() <= 0.02
    assert out.isfinite().all()


@pytest.mark.parametrize(
    ("batch", "heads", "tokens"), [(1, (64, 4), 60_000), (16, (256, 8), 30_000), (70, (8, 2), 2000)]
)
def test_long_sequences_are_as_in_float32(batch: int, heads: tuple[int, int], tokens: int) -> None:
    """Clusters of eight, and of one, whose blocks' weights do not fit into shared memory together; many sequences."""
    generator = torch.Generator("cuda").manual_seed(1)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device="cuda", dtype=torch.bfloat16)

    page, stride, width = 16, 4, -(-tokens // 16)
    given = {"q": normal(batch, 1, heads[0], 64), "gates": normal(batch, 1, heads[0], 3).sigmoid()}
    for name in ("k_cmp", "v_cmp", "k_slc", "v_slc", "k_win", "v_win"):
        given[name] = normal(width * 2, page // (stride if name.endswith("cmp") else 1), heads[1], 64)
    more = {
        "block_table": torch.randint(width * 2, (batch, width), generator=generator, device="cuda", dtype=torch.int32),
        "cache_seqlens": torch.randint(1, tokens, (batch,), generator=generator, device="cuda", dtype=torch.int32),
        "block_size": 8,
        "block_stride": stride,
        "select_size": 8,
        "num_selected": 12,
    }
    more["cache_seqlens"][0] = tokens
    out = nsa_torch.nsa_attention_with_kvcache(**given, **more)
    exact = nsa_torch.nsa_attention_with_kvcache(**{name: x.float() for name, x in given.items()}, **more)
    wrong = (out.float() - exact).abs().amax(-1) > 2e-2
    assert wrong.float().mean().item() <= 0.02
