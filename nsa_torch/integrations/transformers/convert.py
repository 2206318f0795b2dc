"""Dense models to models with NSA."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import fields
from typing import Any

import torch
from transformers import PreTrainedModel

from .families import FAMILIES
from .options import NSAOptions, head_dim


@torch.no_grad()
def use_nsa(model: PreTrainedModel, **nsa_options: Any) -> Any:
    """A copy of a dense model with Native Sparse Attention in place of its self-attention, to be trained further.

    Every branch starts with the keys and values of the dense layer, gates near a half, the compression near the mean.

    Args:
        model: the base model, the causal language model or the sequence classifier of a family with NSA, such as Llama,
            Mistral, Qwen2 or Qwen3.
        nsa_options: block_size, block_stride, select_size, num_selected, num_initial, num_local, window, compression.

    Returns:
        The class with NSA of the same family and head, with the model's device, dtype, mode and generation_config.

    Raises:
        TypeError: a model of another class, or another option.
        ValueError: an option out of range, or a model with other weights than its class has.
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
    copy = family(family.config_class(**dense, **nsa_options)).to(model.device, model.dtype)
    weights = model.state_dict()
    for name in list(weights):
        if ".self_attn.k_proj." in name or ".self_attn.v_proj." in name:
            # The same rows for each branch of a head.
            rows = weights[name].unflatten(0, (-1, 1, head_dim(model.config)))
            weights[name] = torch.cat([rows] * 3, dim=1).flatten(0, 2)
    missing, unexpected = copy.load_state_dict(weights, strict=False)
    unknown = [*unexpected, *(name for name in missing if ".gate_proj." not in name and ".compress_" not in name)]
    if unknown:
        raise ValueError(f"model must have the weights of {type(model).__name__}, got others, or none, for {unknown}")
    if model.can_generate():
        copy.generation_config = deepcopy(model.generation_config)
    return copy.train(model.training)
