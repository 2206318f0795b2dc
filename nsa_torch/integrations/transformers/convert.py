"""Dense models to models with NSA."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...convolution import CausalConv
from .attention import NSASelfAttention
from .families import FAMILIES
from .options import NSAOptions, head_dim

# Weights that a dense model does not have.
_NEW = (".gate_proj.", ".compress_", ".k_conv.", ".v_conv.", ".q_norm.", ".k_norm.", "_proj.bias")


@torch.no_grad()
def use_nsa(model: PreTrainedModel, **nsa_options: Any) -> Any:
    """A copy of a dense model with Native Sparse Attention in place of its self-attention, to be trained further.

    Every branch starts with the keys and values of the dense layer, gates near a half, the compression near the mean,
    convolutions and new biases at zero. rope_interleaved moves channels, so that scores stay. Norms of heads that the
    dense model has not, another rope_dim and another scale change what its weights compute.

    Args:
        model: the base model, the causal language model or the sequence classifier of a family with NSA, such as Llama,
            Mistral, Qwen2 or Qwen3.
        nsa_options: options of `nsa_torch.NSAAttention`: block_size, block_stride, select_size, num_selected,
            num_initial, num_local, window, compression, compression_hidden, per_head_compression, shared_kv, kv_conv,
            gate_dtype, qk_norm, qkv_bias, o_bias, rope_dim, rope_interleaved, scale.

    Returns:
        The class with NSA of the same family and head, with the model's device, dtype, mode and generation_config.

    Raises:
        TypeError: a model of another class, or another option.
        ValueError: an option out of range, or one that leaves out weights of the model (v_head_dim, or False for its
            norms or biases); a model with other weights than its class has.
    """
    family = FAMILIES.get(type(model))
    if family is None:
        known = ", ".join(dense.__name__ for dense in FAMILIES)
        raise TypeError(f"model must be one of {known}, got {type(model).__name__}")
    known_options = [field.name for field in fields(NSAOptions) if field.name != "nsa_version"]
    if unknown_options := sorted(nsa_options.keys() - set(known_options)):
        raise TypeError(f"nsa_options must be among {', '.join(known_options)}, got {', '.join(unknown_options)}")
    dense = model.config.to_dict()
    for name in ("model_type", "architectures", "transformers_version"):
        dense.pop(name, None)
    config = family.config_class(**dense, **nsa_options)
    if config.v_head_dim not in (None, head_dim(config)):
        expected = f"{head_dim(config)}, the channels of the model's values"
        raise ValueError(f"v_head_dim must be None or {expected}, got {config.v_head_dim}")
    copy = family(config).to(model.device, model.dtype)
    weights = _with_branches(model.state_dict(), config)
    missing, unexpected = copy.load_state_dict(weights, strict=False)
    if unexpected and all("_norm." in name or name.endswith("_proj.bias") for name in unexpected):
        raise ValueError(f"qk_norm, qkv_bias and o_bias must keep what the model has, got options without {unexpected}")
    new = [name for name in missing if ".self_attn." in name and any(part in name for part in _NEW)]
    if unknown := [*unexpected, *(name for name in missing if name not in new)]:
        raise ValueError(f"model must have the weights of {type(model).__name__}, got others, or none, for {unknown}")
    for layer in copy.modules():
        if isinstance(layer, CausalConv):
            layer.weight.zero_()
        elif isinstance(layer, NSASelfAttention) and layer.gate_dtype is not None:
            layer.gate_proj.to(layer.gate_dtype)
    if model.can_generate():
        copy.generation_config = deepcopy(model.generation_config)
    return copy.train(model.training)


def _with_branches(weights: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    """The weights of a dense model, with the same rows of k_proj and v_proj for each branch of a head."""
    dim, branches = head_dim(config), 2 if config.shared_kv else 3
    for name, weight in weights.items():
        _, _, part = name.rpartition(".self_attn.")
        if config.rope_interleaved and part.startswith(("q_proj.", "k_proj.", "q_norm.", "k_norm.")):
            # Channels c and c + D / 2 of a head become 2 c and 2 c + 1.
            weight = weight.unflatten(0, (-1, 2, dim // 2)).transpose(1, 2).flatten(0, 2)
        if part.startswith(("k_proj.", "v_proj.")):
            rows = weight.unflatten(0, (-1, 1, dim))
            weight = torch.cat([rows] * branches, dim=1).flatten(0, 2)
        weights[name] = weight
    return weights
