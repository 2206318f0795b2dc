"""What version 0.1 offered is still there: names, arguments, fields."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

import nsa_torch
from nsa_torch.module import BlockCompression

PACKED = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "seqused_k")
BLOCKS = ("block_size", "block_stride")
CHOICE = (*BLOCKS, "select_size", "num_selected", "num_initial", "num_local", "scale")
SIZES = ("hidden_size", "num_heads", "num_kv_heads", "head_dim", "v_head_dim")
LAYER = (*SIZES, *CHOICE, "window", "compression", "rope_theta", "bias", "compression_hidden", "per_head_compression")
CALL = ("hidden_states", "position_embeddings", "cu_seqlens", "max_seqlen")
CACHE = (
    "batch_size",
    "max_length",
    "num_kv_heads",
    "head_dim",
    "v_head_dim",
    "num_layers",
    *BLOCKS,
    "window",
    "max_crop",
)
OLD: list[tuple[Any, tuple[str, ...]]] = [
    (nsa_torch.compress, ("x", "pe", "w1", "b1", "w2", "b2", *BLOCKS, "cu_seqlens_k", "max_seqlen_k")),
    (nsa_torch.compressed_attention, ("q", "k_cmp", "v_cmp", "seqlen_k", *BLOCKS, "scale", *PACKED)),
    (nsa_torch.select_blocks, ("q", "k_cmp", "lse", "seqlen_k", *CHOICE, *PACKED)),
    (nsa_torch.selected_attention, ("q", "k", "v", "block_indices", "select_size", "scale", *PACKED)),
    (nsa_torch.window_attention, ("q", "k", "v", "window", "scale", *PACKED)),
    (nsa_torch.nsa_attention, ("q", "k_cmp", "v_cmp", "k_slc", "v_slc", "k_win", "v_win", "gates", *CHOICE, *PACKED)),
    (nsa_torch.NSAAttention, (*LAYER, "device", "dtype")),
    (nsa_torch.NSAAttention.forward, (*CALL, "cache")),
    (nsa_torch.NSAAttention.choices, CALL),
    (nsa_torch.NSAAttention.new_cache, ("batch_size", "max_length", "num_layers", "max_crop")),
    (nsa_torch.NSACache, (*CACHE, "dtype", "device")),
    (nsa_torch.NSACache.crop, ("length",)),
    (nsa_torch.NSACache.reorder, ("index",)),
    (BlockCompression, ("dim", *BLOCKS, "compression", "hidden_size", "num_heads", "device", "dtype")),
    (nsa_torch.build_info, ()),
    (nsa_torch.cmake_prefix_path, ()),
]


@pytest.mark.parametrize(("callable_", "arguments"), OLD, ids=[old[0].__qualname__ for old in OLD])
def test_arguments_of_version_0_1(callable_: Any, arguments: tuple[str, ...]) -> None:
    assert set(arguments) <= set(inspect.signature(callable_).parameters)


def test_attributes_of_version_0_1() -> None:
    for name in ("lengths", "length_bound", "capacity", "dtype", "device", "nbytes", "reset"):
        assert hasattr(nsa_torch.NSACache, name)
