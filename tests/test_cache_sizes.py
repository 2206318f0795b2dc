"""What caches of layers with options hold: no more than the options need; and that others are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nsa_torch import NSAAttention, NSACache
from test_cache import BLOCKS, DK, DV, KV_HEADS, make, tokens
from test_layer_options import ALL

pytestmark = pytest.mark.usefixtures("one_thread", "no_grad")


def test_shared_keys_and_values_take_a_third_less() -> None:
    """No ring of the window, and no copy: as many buffers fewer, and of a short text a third of all tokens' bytes."""
    sizes = {"num_kv_heads": 2, "head_dim": 64, "dtype": torch.float32}
    separate, shared = (NSACache(2, 512, shared_kv=shared, **sizes) for shared in (False, True))
    token = 2 * 64 * 4 * 2  # heads, channels, bytes, k and v
    assert separate.nbytes - shared.nbytes == 2 * 512 * token
    assert shared.nbytes == 2 * token * (512 + (512 // 16 - 1) + 32)
    assert shared[0].k_win is None and shared[0].v_win is None
    held = [t for t in vars(shared[0]).values() if isinstance(t, Tensor)]
    assert len({t.data_ptr() for t in held}) == len(held) == 6
    layers = [NSAAttention(64, 4, 2, compression="mean", shared_kv=shared) for shared in (False, True)]
    rows = [sum(p.numel() for p in (layer.k_proj.weight, layer.v_proj.weight)) for layer in layers]
    assert rows[1] * 3 == rows[0] * 2
    assert set(layers[1].new_cache(1, 8)[0].buffers()) == {"k_slc", "v_slc", "k_cmp", "v_cmp", "k_raw", "v_raw"}


def test_the_convolution_keeps_its_last_taps() -> None:
    cache = make(kv_conv=4).new_cache(2, 64, max_crop=3)
    buffers = cache[0].buffers()
    assert buffers["k_conv"].shape == (2, 4 + 3, KV_HEADS, 3 * DK)
    assert buffers["v_conv"].shape == (2, 4 + 3, KV_HEADS, 3 * DV)
    assert cache.nbytes == sum(buffer.nbytes for buffer in buffers.values())
    assert make(kv_conv=4, shared_kv=True).new_cache(1, 64)[0].buffers()["k_conv"].shape == (1, 4, KV_HEADS, 2 * DK)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "cache must have shared_kv True, got False"),
        ({"shared_kv": True}, "cache must have kv_conv 4, got 0"),
        ({"shared_kv": True, "kv_conv": 3}, "cache must have kv_conv 4, got 3"),
    ],
    ids=str,
)
def test_cache_must_fit_the_layer(options: dict[str, Any], message: str) -> None:
    names = ("block_size", "block_stride", "window")
    sizes = {"num_kv_heads": KV_HEADS, "head_dim": DK, "v_head_dim": DV} | {name: BLOCKS[name] for name in names}
    cache = NSACache(2, 64, **sizes, **options, dtype=torch.float64)
    with pytest.raises(ValueError, match=message):
        make(**ALL)(tokens(2, 9), cache=cache)
    assert cache.lengths.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"kv_conv": -1}, ValueError, "kv_conv must be at least 0, got -1"),
        ({"kv_conv": 2.0}, TypeError, "kv_conv must be an int, got float"),
        ({"shared_kv": 1}, TypeError, "shared_kv must be a bool, got int"),
    ],
    ids=str,
)
def test_constructor_names_the_bad_argument(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        NSACache(2, 64, num_kv_heads=2, head_dim=8, **options)
