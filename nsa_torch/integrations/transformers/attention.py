"""NSAAttention as the self-attention of a transformers model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import Cache

from ... import ops
from ...cache import NSALayerCache
from ...cache_copy import look
from ...module import NSAAttention
from ...rope import Tables, check_tables
from .batches import Packing
from .options import head_dim


class NSASelfAttention(NSAAttention):
    """`NSAAttention` behind the call of transformers' LlamaAttention; the model's rotary embedding serves it.

    config: a configuration of `families`. dense: the family's own attention, which says where biases are, whether heads
    are normed, and the scale, unless the configuration does.
    """

    def __init__(self, config: Any, layer_idx: int, dense: Any):
        heads = (config.num_attention_heads, config.num_key_value_heads, head_dim(config))
        super().__init__(config.hidden_size, *heads, rope_theta=None, **_with_family(config.nsa_options(), dense))
        self.layer_idx = layer_idx

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        packing: Packing | None = None,
        cu_seq_lens_q: Tensor | None = None,
        max_length_q: int | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """hidden_states (B, T, hidden), position_embeddings cos and sin (B or 1, T, Dk) -> (B, T, hidden), None."""
        cache = past_key_values if cache is None else cache
        layer = None if cache is None else self._cache_layer(cache, hidden_states)
        if packing is None:
            options: dict[str, Any] = {"position_embeddings": position_embeddings, "cache": layer}
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

    def _cache_layer(self, cache: Cache, hidden_states: Tensor) -> NSALayerCache:
        held: Any = cache.layers[self.layer_idx]
        layer: NSALayerCache = held.take(hidden_states, self.ranks)
        return layer

    def _given_tables(self, position_embeddings: Tables | Tensor | None, x: Tensor) -> Tables | None:
        # transformers' angles stand in both halves, whichever channels are pairs.
        return (
            None if position_embeddings is None else check_tables(position_embeddings, (*x.shape[:-1], self.head_dim))
        )

    def _attend_chunk(self, x: Tensor, tables: Tables, packing: Packing, layer: NSALayerCache | None) -> Tensor:
        """Packed tokens x (N, hidden) -> (N, hidden)."""
        options: dict[str, Any] = {"cu_seqlens": packing.cu_seqlens, "max_seqlen": packing.shape[1], "cache": layer}
        return super().forward(x, position_embeddings=tables, **options)

    def _attend_padded(self, x: Tensor, tables: Tables, packing: Packing) -> Tensor:
        """As `_attend_chunk` of a padded batch without a cache; the last column's padding sees its row's real tokens.

        x (B T, hidden), as `Packing.of_padded` sorts it -> (B, T, hidden). The last token of a row is its last column's
        padding, if there is any.
        """
        batch, length = packing.shape
        inputs, packed = self._inputs(x, tables, packing.cu_seqlens, length)
        options: dict[str, Any] = self._block_options() | self._choice_options() | {"window": self.window}
        options |= {"scale": self.scale} | packed
        q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates = inputs
        keys = (k_cmp, v_cmp, k_slc, v_slc, k_win, v_win)
        out = ops.nsa_attention(q, *keys, gates, **options)
        # One query for the first of a row's two sequences, or for its padding if that is all it has.
        real = packing.cu_seqlens.diff()[::2] > 0
        rows = torch.arange(batch, device=x.device, dtype=torch.int32)
        ends = torch.stack((rows + real, rows + 1), dim=1).flatten().to(torch.int32)
        options |= {"cu_seqlens_q": F.pad(ends, (1, 0)), "max_seqlen_q": 1}
        last = ops.nsa_attention(q[length - 1 :: length], *keys, gates[length - 1 :: length], **options)
        last = last.masked_fill(~real[:, None, None], 0)
        out, last = (self.o_proj(attended.flatten(-2)) for attended in (out, last))
        return packing.put_last(packing.put_back(out), last)

    def _attend_last_padding(self, x: Tensor, tables: Tables, layer: NSALayerCache, appended: bool) -> Tensor:
        """Attend from tokens x (B, hidden) that are not appended to all that the cache holds: (B, hidden).

        appended: whether the layer has got tokens in this step.
        """
        cos, sin = (table.expand(x.size(0), -1).unsqueeze(1) for table in tables)
        inputs = self._project(x.unsqueeze(1), self._given_tables((cos, sin), x.unsqueeze(1)))
        q, gates = inputs.q.flatten(0, 1), inputs.gates.flatten(0, 1)  # keys and values are not needed
        state = layer.sequences
        lengths = state.step.lengths if appended and state.step is not None else state.lengths
        step, window = look(layer, lengths)
        options = self._choice_options() | {"scale": self.scale}
        out = layer.attend(step, q, gates, window, **options)
        return self.o_proj(out.masked_fill((lengths == 0)[:, None, None], 0).flatten(-2))


def _with_family(options: dict[str, Any], dense: Any) -> dict[str, Any]:
    """Options of NSAAttention, those that are None as the family's own attention has them."""
    norms: Any = getattr(dense, "q_norm", None), getattr(dense, "k_norm", None)
    own = None if None in norms else norms
    if own is not None and options["qk_norm"]:
        options["qk_norm"] = own
    family = {
        "qkv_bias": dense.q_proj.bias is not None,
        "o_bias": dense.o_proj.bias is not None,
        "qk_norm": False if own is None else own,
        "scale": dense.scaling,
    }
    return options | {name: of_family for name, of_family in family.items() if options[name] is None}
