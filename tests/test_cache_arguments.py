"""What the methods of a cache take: integers and tensors of integers, and nothing that would be rounded to them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nsa_torch import NSAAttention, NSACache


@torch.no_grad()
def filled(max_crop: int = 0) -> tuple[NSAAttention, NSACache]:
    layer = NSAAttention(16, 2, 1, block_size=4, block_stride=2, select_size=4, num_selected=4, window=6).eval()
    cache = layer.new_cache(2, max_crop=max_crop)
    layer(torch.randn(2, 5, 16), cache=cache)
    return layer, cache


@pytest.mark.parametrize("length", [3.5, 3.0, True, "3", [3, 3], torch.tensor(3.5), torch.tensor([True, False]), None])
def test_crop_takes_integers(length: Any) -> None:
    _, cache = filled()
    with pytest.raises(TypeError, match="length must be an int or a tensor of integers, got"):
        cache.crop(length)
    assert cache.lengths.tolist() == [5, 5]


def test_crop_takes_a_length_for_each_sequence() -> None:
    _, cache = filled()
    for shape in ((1,), (3,), (2, 1)):
        with pytest.raises(ValueError, match=r"length must be of shape \(\) or \(2,\), got"):
            cache.crop(torch.ones(shape, dtype=torch.int64))
    cache.crop(torch.tensor([4, 9]))
    assert cache.lengths.tolist() == [4, 5]
    cache.crop(torch.tensor(4, dtype=torch.int32))
    assert cache.lengths.tolist() == [4, 4]


@pytest.mark.parametrize("index", [[1, 0], 1, torch.tensor([1.0, 0.0])])
def test_reorder_takes_a_tensor_of_integers(index: Any) -> None:
    _, cache = filled()
    with pytest.raises(TypeError, match="index must be a tensor of integers, got"):
        cache.reorder(index)


@torch.no_grad()
def test_crops_count_from_the_longest_length_reached() -> None:
    layer, cache = filled(max_crop=4)
    layer(torch.randn(2, 25, 16), cache=cache)
    cache.crop(28)
    cache.crop(26)
    with pytest.raises(ValueError, match="max_crop = 4"):
        cache.crop(24)
    layer(torch.randn(2, 8, 16), cache=cache)
    cache.crop(30)
    assert cache.lengths.tolist() == [30, 30]
