"""Small random models of the Hugging Face integration, and batches for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

try:
    from nsa_torch.integrations.transformers import CACHE, NSALlamaConfig, NSALlamaForCausalLM, NSAModelCache, use_nsa
except ImportError as error:  # on a machine of others; requirements/test.txt asks for one that is new enough
    if "needs transformers" not in str(error):
        raise
    pytest.skip(str(error), allow_module_level=True)

# Large weights, so that attention and the choice of blocks matter in a model that has not been trained.
LLAMA: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.3, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
# What a family needs besides: heads that do not follow from the hidden size; experts that compute in float64.
EXTRA: dict[str, dict[str, Any]] = {
    "Arcee": {"attention_bias": True},
    "Gemma": {"head_dim": 16},
    "Granite": {"attention_multiplier": 0.5, "residual_multiplier": 0.7, "logits_scaling": 1.5},
    "Llama": {"attention_bias": True},
    "Ministral": {"head_dim": 16},
    "Mixtral": {"num_local_experts": 4, "experts_implementation": "eager"},
    "Qwen3": {"head_dim": 16},
    "Qwen3Moe": {"head_dim": 16, "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2},
}
EXTRA["Qwen3Moe"]["experts_implementation"] = "eager"
NSA = {"block_size": 8, "block_stride": 4, "select_size": 8, "num_selected": 4, "window": 10}

# Ways to call `generate`; what a mode needs besides is in the tests.
TEN_MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True},
    "beams": {"num_beams": 3},
    "num_return_sequences": {"do_sample": True, "num_return_sequences": 2},
    "assisted": {},
    "static": {},
    "reused": {},
    "left_padded": {},
    "right_padded": {},
    "repeated_prompt": {},
}

# Llama's norms round to float32 in a float64 model too.
close = {"rtol": 0.0, "atol": 2e-5}


def make_model(dtype: torch.dtype = torch.float64, seed: int = 0, **options: Any) -> NSALlamaForCausalLM:
    torch.manual_seed(seed)
    return NSALlamaForCausalLM(NSALlamaConfig(**(LLAMA | NSA | options))).to(dtype).eval()


def make_sequences(lengths: list[int], seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, LLAMA["vocab_size"], (length,), generator=generator) for length in lengths]


def pad(sequences: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """ids and attention_mask, (B, T)."""
    ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_side=side)
    return ids, (ids != 0).long()


def dense_model(name: str, **options: Any) -> Any:
    """A dense model of transformers by its class's name, such as Qwen3ForCausalLM, in float64; no weight is zero."""
    family = name.split("For", maxsplit=1)[0].removesuffix("Model")
    config = getattr(transformers, f"{family}Config")(**LLAMA | EXTRA.get(family, {}) | options)
    torch.manual_seed(0)
    model = getattr(transformers, name)(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms and biases start as ones and zeros
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def dense_pair(name: str = "LlamaForCausalLM", **options: Any) -> tuple[Any, Any]:
    """A dense model, and the NSA model that computes the same: only the window counts, and it covers all tokens."""
    dense = dense_model(name, **options)
    model = use_nsa(dense, **(NSA | {"window": 128}))
    only_the_window = torch.tensor([-40.0, -40.0, 40.0]).repeat(LLAMA["num_attention_heads"])
    for layer in (model if name.endswith("Model") else model.model).layers:
        layer.self_attn.gate_proj.weight.zero_()
        layer.self_attn.gate_proj.bias.copy_(only_the_window)
    return dense, model


@torch.no_grad()
def filled(model: NSALlamaForCausalLM, ids: Tensor, mask: Tensor | None = None, **options: Any) -> NSAModelCache:
    """A cache that holds these tokens."""
    cache = NSAModelCache(model.config, **options)
    model(ids, attention_mask=mask, **{CACHE: cache})
    return cache


def nsa_of(cache: Any) -> Any:
    """The NSACache behind a cache of any class whose layers are NSA's; None before the first tokens."""
    state = cache.layers[0].state
    return None if state is None else state.nsa


def train(model: Any, ids: Tensor, steps: int = 8) -> list[float]:
    """Losses of some steps, in which every weight gets a gradient."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        assert all(weight.grad is not None for weight in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    return losses
