"""Llama of Hugging Face transformers with Native Sparse Attention in place of its self-attention.

    config = NSALlamaConfig(hidden_size=256, num_attention_heads=8, num_key_value_heads=2, window=128)
    model = NSALlamaForCausalLM(config)             # a new model, or
    model = use_nsa(llama, window=128)              # from a LlamaForCausalLM, whose weights it copies

It is an ordinary transformers model: batches padded on either side with an `attention_mask`, `generate` with a cache
(greedy, sampling, beams), gradient checkpointing, torch.compile, `save_pretrained`, and, once this module is imported,
`AutoModelForCausalLM.from_pretrained`. Packed sequences come as `cu_seq_lens_q`, like for FlashAttention. Written for
transformers 5.

Run as a program, it trains a small model on the text of this file, saves, loads and samples from it.
"""

from __future__ import annotations

import argparse
import inspect
import tempfile
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaModel, LlamaPreTrainedModel

from hf_cache import NSALlamaCache
from hf_padding import ATTENTION, RESTARTS, Padding
from nsa_torch import NSAAttention
from nsa_torch.block_compression import BlockCompression
from nsa_torch.cache import NSALayerCache

# The argument that carries the cache: transformers 5.24 renamed it.
CACHE = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"


@strict
class NSALlamaConfig(LlamaConfig):
    """Configuration of Llama, and the options of `nsa_torch.NSAAttention` with their names there."""

    model_type = "nsa_llama"
    # Keys and values of three branches lie in one projection, which cannot be cut by columns.
    base_model_tp_plan = {name: plan for name, plan in LlamaConfig.base_model_tp_plan.items() if "mlp" in name}

    block_size: int = 32
    block_stride: int = 16
    select_size: int = 64
    num_selected: int = 16
    num_initial: int = 1
    num_local: int = 2
    window: int = 512
    compression: str = "mlp"

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.attention_dropout:
            raise ValueError(f"attention_dropout must be 0 with NSA, got {self.attention_dropout}")

    def nsa_options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in NSALlamaConfig.__annotations__}


class NSALlamaAttention(NSAAttention):
    """`NSAAttention` behind the call of transformers' LlamaAttention; the model's rotary embedding serves it."""

    def __init__(self, config: NSALlamaConfig, layer_idx: int):
        heads = (config.num_attention_heads, config.num_key_value_heads, config.head_dim)
        options = config.nsa_options()
        super().__init__(config.hidden_size, *heads, rope_theta=None, bias=config.attention_bias, **options)
        self.layer_idx = layer_idx

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Padding | str | None = None,
        past_key_values: NSALlamaCache | None = None,
        cache: NSALlamaCache | None = None,
        cu_seq_lens_q: Tensor | None = None,
        max_length_q: int | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """hidden_states (B, T, hidden), position_embeddings cos and sin (B or 1, T, Dk) -> (B, T, hidden), None."""
        if isinstance(attention_mask, Tensor):
            shape = tuple(attention_mask.shape)
            raise ValueError(f"attention_mask must be (B, T) ones and zeros, got a mask of shape {shape}")
        if attention_mask == RESTARTS and cu_seq_lens_q is None:
            raise ValueError(f"cu_seq_lens_q must be given when {RESTARTS}")
        layer_cache = self._layer_cache(past_key_values if cache is None else cache, hidden_states)
        if not isinstance(attention_mask, Padding):
            options: dict[str, Any] = {"position_embeddings": position_embeddings, "cache": layer_cache}
            options |= {"cu_seqlens": cu_seq_lens_q, "max_seqlen": max_length_q}
            return super().forward(hidden_states, **options), None
        padding = attention_mask if layer_cache is None else attention_mask.without_padding()
        cos, sin = position_embeddings
        out = super().forward(
            padding.take(hidden_states),
            position_embeddings=(padding.take(cos), padding.take(sin)),
            cu_seqlens=padding.cu_seqlens,
            max_seqlen=hidden_states.size(1),
            cache=layer_cache,
        )
        return padding.put_back(out), None

    def _layer_cache(self, cache: Cache | None, hidden_states: Tensor) -> NSALayerCache | None:
        if cache is None:
            return None
        if not isinstance(cache, NSALlamaCache):
            raise TypeError(f"{CACHE} must be an NSALlamaCache, got {type(cache).__name__}")
        return cache.layer(self.layer_idx, hidden_states)


class NSALlamaPreTrainedModel(LlamaPreTrainedModel):
    config: NSALlamaConfig
    config_class = NSALlamaConfig
    _supports_flash_attn = _supports_sdpa = _supports_flex_attn = False
    _can_record_outputs = {"hidden_states": LlamaDecoderLayer}

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args: Any, **kwargs: Any) -> str:
        if attn_implementation not in (None, ATTENTION):
            raise ValueError(f"attn_implementation must be {ATTENTION!r}, got {attn_implementation!r}")
        return ATTENTION

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, BlockCompression):
            if not any(getattr(weight, "_is_hf_initialized", False) for weight in module.parameters()):
                module.reset_parameters()
        else:
            super()._init_weights(module)


class NSALlamaModel(NSALlamaPreTrainedModel, LlamaModel):
    def __init__(self, config: NSALlamaConfig):
        super().__init__(config)
        for index, layer in enumerate(self.layers):
            layer.self_attn = NSALlamaAttention(config, index)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: NSALlamaCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cache: NSALlamaCache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """As LlamaModel; a cache is made when asked for (or by the configuration's use_cache) and gradients are off."""
        cache = past_key_values if cache is None else cache
        if cache is None:
            use_cache = (self.config.use_cache if use_cache is None else use_cache) and not torch.is_grad_enabled()
            cache = NSALlamaCache(self.config) if use_cache else None
        kwargs |= {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        kwargs |= {CACHE: cache, "inputs_embeds": inputs_embeds, "use_cache": use_cache}
        return super().forward(**kwargs)


class NSALlamaForCausalLM(NSALlamaPreTrainedModel, LlamaForCausalLM):
    def __init__(self, config: NSALlamaConfig):
        LlamaPreTrainedModel.__init__(self, config)
        self.model = NSALlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], mode: Any, batch_size: int, max_cache_length: int
    ) -> None:
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(f"cache_implementation must be None, got {generation_config.cache_implementation!r}")
        if generation_config.use_cache and model_kwargs.get(CACHE) is None:
            model_kwargs[CACHE] = NSALlamaCache(self.config, max_cache_length)


AutoConfig.register(NSALlamaConfig.model_type, NSALlamaConfig)
AutoModelForCausalLM.register(NSALlamaConfig, NSALlamaForCausalLM)


@torch.no_grad()
def use_nsa(model: LlamaForCausalLM, **nsa_options: Any) -> NSALlamaForCausalLM:
    """A copy of a Llama model with Native Sparse Attention in place of its self-attention, to be trained further.

    Every branch starts with the keys and values of the dense layer, gates near a half, the compression near the mean.
    nsa_options: block_size, block_stride, select_size, num_selected, num_initial, num_local, window, compression.
    """
    llama = model.config.to_dict()
    for name in ("model_type", "architectures", "transformers_version"):
        llama.pop(name, None)
    copy = NSALlamaForCausalLM(NSALlamaConfig(**llama, **nsa_options)).to(model.device, model.dtype)
    weights = model.state_dict()
    for name in list(weights):
        if ".self_attn.k_proj." in name or ".self_attn.v_proj." in name:
            # The same rows for each branch of a head.
            rows = weights[name].unflatten(0, (-1, 1, model.config.head_dim))
            weights[name] = torch.cat([rows] * 3, dim=1).flatten(0, 2)
    missing, unexpected = copy.load_state_dict(weights, strict=False)
    assert not unexpected and all(".gate_proj." in name or ".compress_" in name for name in missing)
    copy.generation_config = deepcopy(model.generation_config)
    return copy.train(model.training)


def train(model: NSALlamaForCausalLM, data: Tensor, steps: int, length: int) -> None:
    """Fit the model to tokens (N,) int64, printing the loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(steps):
        starts = torch.randint(len(data) - length, (8,)).tolist()
        batch = torch.stack([data[start : start + length] for start in starts])
        loss = model(batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == steps - 1:
            print(f"step {step:4d}  loss {loss.item():.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--length", type=int, default=256, help="tokens of a training sequence")
    parser.add_argument("--new-tokens", type=int, default=200)
    options = parser.parse_args()
    torch.manual_seed(0)

    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    sparse = {"block_size": 16, "block_stride": 8, "select_size": 16, "num_selected": 6, "window": 64}
    tokens = {"vocab_size": 256, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    model = NSALlamaForCausalLM(NSALlamaConfig(num_key_value_heads=2, **sizes, **sparse, **tokens))
    train(model, torch.tensor(list(Path(__file__).read_bytes())), options.steps, options.length)

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([list(prompt.rjust(14, b"\0")) for prompt in (b"class NSALlama", b"def ")])
    out = model.generate(ids, attention_mask=(ids != 0).long(), max_new_tokens=options.new_tokens, do_sample=True)
    for row in out.tolist():
        print("-" * 40, bytes(row).lstrip(b"\0").decode(errors="replace"), sep="\n")


if __name__ == "__main__":
    main()
