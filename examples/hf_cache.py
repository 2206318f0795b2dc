"""The cache of examples/hf_llama.py: transformers' interface to `nsa_torch.NSACache`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers.cache_utils import Cache

from nsa_torch import NSACache
from nsa_torch.cache import NSALayerCache

if TYPE_CHECKING:
    from hf_llama import NSALlamaConfig


class NSALlamaCache(Cache):
    """The cache of these models: an `NSACache` for all layers, made when the first tokens arrive.

    Models take it as `cache`, and as `past_key_values`, its name before transformers 5.24. Its length counts columns of
    the padded batch; padding itself is not stored.

    Args:
        config: of the model.
        max_length: columns that fit; None: the cache grows.
    """

    def __init__(self, config: NSALlamaConfig, max_length: int | None = None):
        super().__init__(layers=[])
        self.config = config
        self.max_length = max_length
        self.nsa: NSACache | None = None
        self.columns = [0] * config.num_hidden_layers

    def layer(self, index: int, hidden_states: Tensor) -> NSALayerCache:
        """The cache of one layer, to which the tokens of hidden_states (B, T, hidden) are about to be appended."""
        if self.nsa is None:
            config = self.config
            heads = {"num_kv_heads": config.num_key_value_heads, "head_dim": config.head_dim}
            sizes = {name: getattr(config, name) for name in ("block_size", "block_stride", "window")}
            like = {"dtype": hidden_states.dtype, "device": hidden_states.device}
            batch, layers = hidden_states.size(0), config.num_hidden_layers
            self.nsa = NSACache(batch, self.max_length, num_layers=layers, **heads, **sizes, **like)
        self.columns[index] += hidden_states.size(1)
        return self.nsa[index]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.columns[layer_idx]

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.columns[layer_idx] + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1 if self.max_length is None else self.max_length

    @property
    def batch_size(self) -> int:
        return -1 if self.nsa is None else self.nsa.batch_size

    @property
    def is_croppable(self) -> bool:
        return False

    def reset(self) -> None:
        self.columns = [0] * len(self.columns)
        if self.nsa is not None:
            self.nsa.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.nsa is not None:
            self.nsa.reorder(beam_idx)

    def _refuse(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(
            "NSALlamaCache takes tokens from NSAAttention alone and keeps them and its batch size"
        )

    update = crop = batch_repeat_interleave = batch_select_indices = _refuse
