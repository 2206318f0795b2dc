"""Checkpoints of version 0.1: there the rows of k_proj and v_proj are ordered (3, Hkv, D), now (Hkv, 3, D)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, MutableMapping
from typing import Any

from torch import Tensor, nn

VERSION = 2  # of NSAAttention's state dict; 1: that of 0.1


def convert_rows_0_1(rows: Tensor, num_kv_heads: int) -> Tensor:
    """Rows (3 Hkv D, ...) of k_proj or v_proj, or of what goes with them, from the order of 0.1 to today's."""
    if rows.size(0) % (3 * num_kv_heads):
        raise ValueError(f"rows must be three for each of {num_kv_heads} KV heads and channel, got {rows.size(0)}")
    return rows.unflatten(0, (3, num_kv_heads, -1)).transpose(0, 1).flatten(0, 2)


def convert_layer_0_1(state_dict: MutableMapping[str, Any], prefix: str, num_kv_heads: int) -> int:
    """Convert, in `state_dict`, the projections of the layer whose names begin with `prefix`; returns how many.

    What has no such number of rows stays, for load_state_dict to refuse.
    """
    count = 0
    for name in ("k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias"):
        rows = state_dict.get(prefix + name)
        if rows is not None and rows.dim() > 0 and rows.size(0) % (3 * num_kv_heads) == 0:
            state_dict[prefix + name] = convert_rows_0_1(rows, num_kv_heads)
            count += 1
    return count


def convert_state_dict_0_1(state_dict: Mapping[str, Any], model: nn.Module) -> OrderedDict[str, Any]:
    """A checkpoint of nsa_torch 0.1 in today's order of rows, to be loaded into `model`.

    For files that do not tell the version of their modules, such as safetensors: load_state_dict takes them to be of
    today's. What `torch.save(model.state_dict())` wrote tells, and is converted when it is loaded. What an optimizer
    keeps of a weight's shape, such as moments, has the order of the weight: `nsa_torch.checkpoints.convert_rows_0_1`
    converts one tensor.

    Args:
        state_dict: names and tensors as of `model.state_dict()`.
        model: an NSAAttention, or a model that contains some.

    Returns:
        A new dict. Its tensors are those of state_dict except the rows of each NSAAttention's k_proj and v_proj.

    Raises:
        ValueError: no projection of an NSAAttention was found, or state_dict says that it is not of 0.1.
    """
    from .module import NSAAttention

    metadata = getattr(state_dict, "_metadata", None) or {}
    converted = OrderedDict(state_dict)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, NSAAttention)}
    count = 0
    for name, layer in layers.items():
        version = metadata.get(name, {}).get("version", 1)
        if version != 1:
            raise ValueError(f"state_dict must be of nsa_torch 0.1, got version {version} of {name or 'the layer'}")
        count += convert_layer_0_1(converted, f"{name}." if name else "", layer.num_kv_heads)
    if count == 0:
        raise ValueError("state_dict must hold k_proj and v_proj of the model's NSAAttention layers, got none of them")
    if metadata:
        of_today = {name: {**metadata.get(name, {}), "version": VERSION} for name in layers}
        converted._metadata = OrderedDict(metadata | of_today)  # type: ignore[attr-defined]
    return converted
