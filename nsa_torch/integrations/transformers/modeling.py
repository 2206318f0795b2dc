"""What the base models of all families share: sequences of a batch, the cache of a call."""

from __future__ import annotations

import inspect
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaModel

from ...block_compression import BlockCompression
from ...checkpoints import VERSION, convert_rows_0_1
from ...checks import check_tensors
from ...convolution import CausalConv
from ...norms import HeadNorm
from .attention import NSASelfAttention
from .batches import Packing, check_mask, check_positions, shows_documents
from .cache import NSAModelCache, adopt
from .cache_state import SharedState
from .options import LAYER_TYPE

ATTENTION = "nsa"

# The argument that carries the cache: transformers 5.24 renamed it.
CACHE = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"


def _check_rise(rises: bool) -> None:
    if not rises:
        raise ValueError(
            f"position_ids must rise within a row with {CACHE}, which holds one sequence a row: for several "
            f"documents a row, use_cache=False"
        )


class NSAPreTrained:
    """Before a family's PreTrainedModel among the bases."""

    _supports_flash_attn = _supports_sdpa = _supports_flex_attn = False

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As transformers does it. Models that nsa_torch 0.1 saved are converted."""
        loaded = super().from_pretrained(*args, **kwargs)  # type: ignore[misc]
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if model.config.nsa_version == 1:
            for layer in model.modules():
                if isinstance(layer, NSASelfAttention):
                    for weight in (*layer.k_proj.parameters(), *layer.v_proj.parameters()):
                        weight.data = convert_rows_0_1(weight.data, layer.num_kv_heads)
            model.config.nsa_version = VERSION
        return loaded

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args: Any, **kwargs: Any) -> str:
        if attn_implementation not in (None, ATTENTION):
            raise ValueError(f"attn_implementation must be {ATTENTION!r}, got {attn_implementation!r}")
        return ATTENTION

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (BlockCompression, CausalConv, HeadNorm)):
            if not any(getattr(weight, "_is_hf_initialized", False) for weight in module.parameters()):
                module.reset_parameters()
        else:
            super()._init_weights(module)  # type: ignore[misc]


class NSAModel(NSAPreTrained):
    """Before a family's base model among the bases: every layer's self_attn becomes NSASelfAttention."""

    config: Any
    layers: nn.ModuleList
    _can_record_outputs: dict[str, Any] | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        recorded: dict[str, Any] = super()._can_record_outputs or {}  # type: ignore[misc]
        cls._can_record_outputs = {name: what for name, what in recorded.items() if name != "attentions"}

    def __init__(self, config: Any):
        super().__init__(config)  # type: ignore[call-arg]
        for index, layer in enumerate(self.layers):
            layer.self_attn = NSASelfAttention(config, index, layer.self_attn)
        if config.rope_dim is not None:
            narrow = deepcopy(config)
            narrow.head_dim = config.rope_dim
            self.rotary_emb = type(self.rotary_emb)(config=narrow)  # type: ignore[has-type]
        if config.gate_dtype is not None:
            self._keep_in_fp32_modules_strict = {"self_attn.gate_proj"}
        self.post_init()  # type: ignore[attr-defined]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        cu_seq_lens_q: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """As the family's model; a cache is made when asked for, or by the configuration, and gradients are off.

        A call that fails leaves the cache as it was.

        Raises:
            ValueError: an attention_mask that is not (B, columns of the cache and of the input), or that changes what
                is cached; several documents in a row, or cu_seq_lens_q, together with a cache or padding;
                output_attentions; a cache of other layers or rows.
            TypeError: an input that is not a tensor, or a cache that `cache.adopt` refuses.
        """
        tensors = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        tensors |= {"inputs_embeds": inputs_embeds, "cu_seq_lens_q": cu_seq_lens_q}
        check_tensors(**tensors)
        if kwargs.get("output_attentions") or self.config.output_attentions:
            raise ValueError(
                "output_attentions must be False: no weights of all tokens are computed. Blocks and gates are what "
                "NSAAttention.choices gives, and nsa_torch.diagnostics measures them"
            )
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        if tokens is None or (input_ids is not None and inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if None not in (cache, past_key_values) and cache is not past_key_values:
            raise ValueError("cache must be None with past_key_values: both are names of one argument")
        given = past_key_values if cache is None else cache
        batch, length = tokens.shape[:2]
        given, state = self._cache_for_call(given, batch, use_cache, cu_seq_lens_q)
        past = 0 if state is None else state.columns
        mask = None
        if attention_mask is not None:
            mask = check_mask(attention_mask, batch, past, length).to(tokens.device)
        if position_ids is not None:
            check_positions(position_ids, batch, length)
        packing = self._packing(batch, length, mask, position_ids, cu_seq_lens_q, state)
        kwargs |= tensors | {"attention_mask": self._no_mask(), CACHE: given, "packing": packing}
        kwargs["use_cache"] = given is not None
        before = None if state is None else state.before()
        try:
            out = super().forward(**kwargs)  # type: ignore[misc]
        except BaseException:
            if state is not None and before is not None:
                state.restore(before)
            raise
        if state is not None:
            state.append(length, mask)
            out[CACHE] = given
        return out

    def _no_mask(self) -> dict[str, None] | None:
        """No mask, as the family's model takes it: some have one for each type of layer."""
        return {LAYER_TYPE: None} if "layer_types" in self.config.__dataclass_fields__ else None

    def _cache_for_call(
        self, cache: Cache | None, batch: int, use_cache: bool | None, cu_seq_lens_q: Tensor | None
    ) -> tuple[Cache | None, SharedState | None]:
        """The cache that was given, or a new one if it is wanted, and its state."""
        if cache is None:
            use_cache = self.config.use_cache if use_cache is None else use_cache
            if not use_cache or cu_seq_lens_q is not None or torch.is_grad_enabled():
                return None, None
            cache = NSAModelCache(self.config)
        state = adopt(cache, self.config, CACHE)
        if cu_seq_lens_q is not None:
            raise ValueError(f"cu_seq_lens_q must be None with {CACHE}: a cache continues one sequence a row")
        fits = {
            "layers": (len(cache.layers), self.config.num_hidden_layers),
            "rows": (batch if state.batch_size == -1 else state.batch_size, batch),
        }
        for name, (held, expected) in fits.items():
            if held != expected:
                raise ValueError(f"{CACHE} must have the {expected} {name} of this call, got {held}")
        return cache, state

    def _packing(
        self,
        batch: int,
        length: int,
        mask: Tensor | None,
        position_ids: Tensor | None,
        cu_seq_lens_q: Tensor | None,
        state: SharedState | None,
    ) -> Packing | None:
        """How the rows of the batch are sequences: None if each is one."""
        if mask is not None:
            if cu_seq_lens_q is not None:
                raise ValueError("attention_mask must be None with cu_seq_lens_q")
            if state is None:
                if position_ids is None or not shows_documents(mask, position_ids):
                    return Packing.of_padded(mask)
                if not bool(mask.all()):
                    raise ValueError("attention_mask must have no padding beside rows of several documents: pack them")
                return Packing.of_documents(position_ids, batch)
            state.check_mask(mask)
            mask = mask[:, -length:]
            if position_ids is not None and length > 1 and not torch.compiler.is_compiling():
                _check_rise(not shows_documents(mask, position_ids))
            return Packing.of_chunk(mask)
        if position_ids is None or cu_seq_lens_q is not None or length == 1:
            return None
        if state is None:
            return Packing.of_documents(position_ids, batch)
        if not torch.compiler.is_compiling():
            _check_rise(not bool((position_ids.diff(dim=-1) < 1).any()))
        return None
