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
import functools
import inspect
import tempfile
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaModel, LlamaPreTrainedModel

from hf_cache import NSALlamaCache
from hf_packing import Packing, check_mask, check_tensors
from nsa_torch import NSAAttention, ops
from nsa_torch.block_compression import BlockCompression
from nsa_torch.cache import NSALayerCache
from nsa_torch.cache_copy import look
from nsa_torch.rope import Tables, check_tables

ATTENTION = "nsa"
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
        past_key_values: NSALlamaCache | None = None,
        cache: NSALlamaCache | None = None,
        packing: Packing | None = None,
        cu_seq_lens_q: Tensor | None = None,
        max_length_q: int | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """hidden_states (B, T, hidden), position_embeddings cos and sin (B or 1, T, Dk) -> (B, T, hidden), None."""
        cache = past_key_values if cache is None else cache
        layer = None if cache is None else cache.layer(self.layer_idx, hidden_states)
        if packing is None:
            options = {"position_embeddings": position_embeddings, "cache": layer}
            return super().forward(hidden_states, **options, cu_seqlens=cu_seq_lens_q, max_seqlen=max_length_q), None
        cos, sin = position_embeddings
        packed = packing.take(hidden_states), (packing.take(cos), packing.take(sin))
        if packing.ends_padded and not torch.is_grad_enabled():
            if layer is None:
                return self._attend_padded(*packed, packing), None
            out = packing.put_back(self._attend_chunk(*packed, packing, layer))
            last, appended = (hidden_states[:, -1], (cos[:, -1], sin[:, -1])), packed[0].size(0) > 0
            return packing.put_last(out, self._attend_last_padding(*last, layer, appended)), None
        return packing.put_back(self._attend_chunk(*packed, packing, layer)), None

    def _attend_chunk(self, x: Tensor, tables: Tables, packing: Packing, layer: NSALayerCache | None) -> Tensor:
        """Packed tokens x (N, hidden) -> (N, hidden)."""
        options = {"cu_seqlens": packing.cu_seqlens, "max_seqlen": packing.shape[1], "cache": layer}
        return super().forward(x, position_embeddings=tables, **options)

    def _attend_padded(self, x: Tensor, tables: Tables, packing: Packing) -> Tensor:
        """As `_attend_chunk` of a padded batch without a cache; the last column's padding sees its row's real tokens.

        x (B T, hidden), as `Packing.of_padded` sorts it -> (B, T, hidden). The last token of a row is its last column's
        padding, if there is any.
        """
        batch, length = packing.shape
        inputs, packed = self._inputs(x, tables, packing.cu_seqlens, length)
        options = self._block_options() | self._choice_options() | {"window": self.window, "scale": self.scale}
        out = ops.nsa_attention(*inputs, **options, **packed)
        # One query for the first of a row's two sequences, or for its padding if that is all it has.
        real = packing.cu_seqlens.diff()[::2] > 0
        rows = torch.arange(batch, device=x.device, dtype=torch.int32)
        ends = torch.stack((rows + real, rows + 1), dim=1).flatten().to(torch.int32)
        packed |= {"cu_seqlens_q": F.pad(ends, (1, 0)), "max_seqlen_q": 1}
        queries = inputs._replace(q=inputs.q[length - 1 :: length], gates=inputs.gates[length - 1 :: length])
        last = ops.nsa_attention(*queries, **options, **packed).masked_fill(~real[:, None, None], 0)
        out, last = (self.o_proj(attended.flatten(-2)) for attended in (out, last))
        return packing.put_last(packing.put_back(out), last)

    def _attend_last_padding(self, x: Tensor, tables: Tables, layer: NSALayerCache, appended: bool) -> Tensor:
        """Attend from tokens x (B, hidden) that are not appended to all that the cache holds: (B, hidden).

        appended: whether the layer has got tokens in this step.
        """
        cos, sin = (table.expand(x.size(0), -1) for table in tables)
        inputs = self._project(x, check_tables((cos, sin), (x.size(0), self.head_dim)))
        state = layer.sequences
        lengths = state.step.lengths if appended and state.step is not None else state.lengths
        step, window = look(layer, lengths)
        options = self._choice_options() | {"scale": self.scale}
        out = layer.attend(step, inputs.q, inputs.gates, window, **options)
        return self.o_proj(out.masked_fill((lengths == 0)[:, None, None], 0).flatten(-2))


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
        cu_seq_lens_q: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """As LlamaModel; a cache is made when asked for (or by the configuration's use_cache) and gradients are off.

        A call that fails leaves the cache as it was.

        Raises:
            ValueError: an attention_mask that is not (B, columns of the cache and of the input), or that changes what
                is cached; several documents in a row, or cu_seq_lens_q, together with a cache or padding.
            TypeError: an input that is not a tensor, or another kind of cache.
        """
        tensors = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        tensors |= {"inputs_embeds": inputs_embeds, "cu_seq_lens_q": cu_seq_lens_q}
        check_tensors(**tensors)
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        if tokens is None or (input_ids is not None and inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        cache = self._cache_for_call(past_key_values if cache is None else cache, use_cache, cu_seq_lens_q)
        batch, length = tokens.shape[:2]
        past = 0 if cache is None else cache.get_seq_length()
        mask = None
        if attention_mask is not None:
            mask = check_mask(attention_mask, batch, past, length).to(tokens.device)
        packing = self._packing(batch, length, mask, position_ids, cu_seq_lens_q, cache)
        kwargs |= tensors | {"attention_mask": None, CACHE: cache, "use_cache": cache is not None, "packing": packing}
        state = None if cache is None else cache.state()
        try:
            out = super().forward(**kwargs)
        except BaseException:
            if cache is not None:
                cache.restore(state)
            raise
        if cache is not None:
            cache.append(length, mask)
        return out

    def _cache_for_call(self, cache: Cache | None, use_cache: bool | None, cu_seq_lens_q: Tensor | None) -> Any:
        """The cache that was given, or a new one if it is wanted."""
        if cache is None:
            use_cache = self.config.use_cache if use_cache is None else use_cache
            packed = cu_seq_lens_q is not None
            return NSALlamaCache(self.config) if use_cache and not packed and not torch.is_grad_enabled() else None
        if not isinstance(cache, NSALlamaCache):
            raise TypeError(f"{CACHE} must be an NSALlamaCache, got {type(cache).__name__}")
        if cu_seq_lens_q is not None:
            raise ValueError(f"cu_seq_lens_q must be None with {CACHE}: a cache continues one sequence a row")
        return cache

    def _packing(
        self,
        batch: int,
        length: int,
        mask: Tensor | None,
        position_ids: Tensor | None,
        cu_seq_lens_q: Tensor | None,
        cache: NSALlamaCache | None,
    ) -> Packing | None:
        """How the rows of the batch are sequences: None if each is one."""
        if mask is not None:
            if cu_seq_lens_q is not None:
                raise ValueError("attention_mask must be None with cu_seq_lens_q")
            if cache is None:
                return Packing.of_padded(mask)
            cache.check_mask(mask)
            return Packing.of_chunk(mask[:, -length:])
        if position_ids is None or cu_seq_lens_q is not None or length == 1:
            return None
        if cache is None:
            return Packing.of_documents(position_ids, batch)
        if not torch.compiler.is_compiling() and bool((position_ids.diff(dim=-1) < 1).any()):
            raise ValueError(
                f"position_ids must rise within a row with {CACHE}, which holds one sequence a row: for several "
                f"documents a row, use_cache=False"
            )
        return None


class NSALlamaForCausalLM(NSALlamaPreTrainedModel, LlamaForCausalLM):
    def __init__(self, config: NSALlamaConfig):
        LlamaPreTrainedModel.__init__(self, config)
        self.model = NSALlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @functools.wraps(LlamaForCausalLM.forward)  # transformers reads its signature
    def forward(self, *args: Any, **kwargs: Any) -> CausalLMOutputWithPast:
        """As LlamaForCausalLM. A call that fails leaves the cache as it was."""
        cache = args[3] if len(args) > 3 else kwargs.get("cache", kwargs.get("past_key_values"))
        state = cache.state() if isinstance(cache, NSALlamaCache) else None
        try:
            return super().forward(*args, **kwargs)
        except BaseException:
            if state is not None and cache.columns != state.columns:
                cache.restore(state)
            raise

    def _assisted_decoding(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get(CACHE)
        if isinstance(cache, NSALlamaCache):
            cache.starts_assisted = True
        return super()._assisted_decoding(input_ids, *args, **kwargs)

    @functools.wraps(LlamaForCausalLM.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        cache, position_ids = kwargs.get(CACHE), kwargs.get("position_ids")
        if isinstance(cache, NSALlamaCache) and cache.starts_assisted:
            # Assisted decoding would feed all of its input, also what a given cache holds already.
            cache.starts_assisted = False
            if position_ids is not None and position_ids.size(-1) == input_ids.size(1) > cache.columns > 0:
                kwargs["next_sequence_length"] = input_ids.size(1) - cache.columns
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        first = kwargs.get("is_first_iteration", False) or kwargs.get("next_sequence_length") is None
        if isinstance(cache, NSALlamaCache) and cache.columns > 0 and not first:
            inputs.pop("attention_mask", None)  # tokens that `generate` chose are real, and what is cached is known
        return inputs

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], mode: Any, batch_size: int, max_cache_length: int
    ) -> None:
        """Make a cache for `generate`, unless one was given. "static" makes one of fixed length."""
        cache, implementation = model_kwargs.get(CACHE), generation_config.cache_implementation
        if implementation not in (None, "dynamic", "static"):
            raise ValueError(f"cache_implementation must be None, 'dynamic' or 'static', got {implementation!r}")
        if cache is not None:
            if not isinstance(cache, NSALlamaCache):
                raise TypeError(f"{CACHE} must be an NSALlamaCache, got {type(cache).__name__}")
            if implementation is not None:
                raise ValueError(f"cache_implementation must be None with {CACHE}, got {implementation!r}")
            cache._is_user_defined = True
            return
        if not generation_config.use_cache:
            return
        options: dict[str, Any] = {"expected_length": max_cache_length}
        if implementation == "static":
            options = {"max_length": max(max_cache_length, generation_config.max_cache_len or 0)}
        if not generation_config.return_dict_in_generate:
            options["max_crop"] = 0  # nobody gets it
        cache = model_kwargs[CACHE] = NSALlamaCache(self.config, **options)
        if generation_config.is_assistant:
            cache.activate_past_recording()


AutoConfig.register(NSALlamaConfig.model_type, NSALlamaConfig)
AutoModelForCausalLM.register(NSALlamaConfig, NSALlamaForCausalLM)


@torch.no_grad()
def use_nsa(model: LlamaForCausalLM, **nsa_options: Any) -> NSALlamaForCausalLM:
    """A copy of a Llama model with Native Sparse Attention in place of its self-attention, to be trained further.

    Every branch starts with the keys and values of the dense layer, gates near a half, the compression near the mean.
    nsa_options: block_size, block_stride, select_size, num_selected, num_initial, num_local, window, compression.

    Raises:
        TypeError: a model of another class.
    """
    if type(model) is not LlamaForCausalLM:
        raise TypeError(f"model must be a LlamaForCausalLM, got {type(model).__name__}")
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
    unknown = [*unexpected, *(name for name in missing if ".gate_proj." not in name and ".compress_" not in name)]
    if unknown:
        raise ValueError(f"model must have the weights of a LlamaForCausalLM, got others, or none, for {unknown}")
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
