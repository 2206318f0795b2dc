"""The layers of transformers' caches for models with NSA. They register themselves: see docs/hugging_face.md."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, StaticLayer

from .options import LAYER_TYPE

if TYPE_CHECKING:
    from ...layer_cache import NSALayerCache
    from .cache_state import SharedState


class NSACacheLayer(CacheLayerMixin):
    """One layer of a cache, which shares its state with the others once a model has seen them (`cache.adopt`).

    Tokens come and go in all layers at once: the first layer acts for all, the others do nothing.
    """

    is_sliding = False
    supports_early_init = True

    def __init__(self, max_cache_len: int | None = None, **kwargs: Any):
        # transformers' own constructors make buffers, or set attributes that are properties here.
        self.keys = self.values = None
        self.max_cache_len = max_cache_len
        self.state: SharedState | None = None
        self.index = -1
        # What was asked for before there was a state.
        self.early: Tensor | None = None
        self.record_past = False

    def share(self, state: SharedState, index: int) -> None:
        """Be layer `index` of this state from now on."""
        self.state, self.index = state, index
        if index == 0:
            if self.early is not None:
                state.start(self.early)
            if self.record_past:
                state.activate_past_recording()
        self.early = None

    def take(self, hidden_states: Tensor, ranks: int = 1) -> NSALayerCache:
        """The buffers of this layer, to which tokens of hidden_states (B, T, hidden) are about to be appended.

        ranks: over how many the heads are cut.
        """
        if self.state is None:
            raise RuntimeError("a cache's layers must have been given to the whole model before one is called alone")
        return self.state.layer(self.index, hidden_states, ranks)

    @property
    def acts(self) -> SharedState | None:
        """The state, of the layer that acts for all."""
        return self.state if self.index == 0 else None

    @property
    def is_initialized(self) -> bool:
        return self.early is not None if self.state is None else self.state.nsa is not None

    @property
    def is_croppable(self) -> bool:
        return self.state is None or self.state.max_crop > 0

    @property
    def batch_size(self) -> int:
        if self.state is not None:
            return self.state.batch_size
        return -1 if self.early is None else self.early.size(0)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make buffers for keys like key_states (B, Hkv, 0, D), of its dtype and device: `early_initialization`."""
        if self.state is None:
            self.early = key_states
        elif self.index == 0 and self.state.nsa is None:
            self.state.start(key_states)

    def get_seq_length(self) -> int:
        return 0 if self.state is None else self.state.columns

    def get_max_length(self) -> int:
        return -1 if self.max_cache_len is None else self.max_cache_len

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def activate_past_recording(self) -> None:
        self.record_past = True
        if self.acts is not None:
            self.acts.activate_past_recording()

    def crop(self, tokens_to_remove: int) -> None:
        """As NSAModelCache.crop."""
        removed = columns_to_remove(tokens_to_remove)
        if self.acts is not None:
            self.acts.crop(removed)

    def reset(self) -> None:
        if self.acts is not None:
            self.acts.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.acts is not None:
            self.acts.reorder(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.acts is not None:
            self.acts.repeat(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.acts is not None:
            self.acts.select(indices)

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("a cache layer of NSA takes tokens from NSAAttention alone and stays on its device")

    update = offload = prefetch = _refuse


class NSADynamicLayer(NSACacheLayer):
    """Of a DynamicCache: it grows."""

    _layer_type = LAYER_TYPE
    is_compileable = False


class NSAStaticLayer(NSACacheLayer, StaticLayer):
    """Of a StaticCache: as many columns as it will ever have, from the start."""

    _layer_type = LAYER_TYPE
    is_compileable = True


def columns_to_remove(tokens_to_remove: int) -> int:
    """n of an argument -n of `crop`."""
    try:
        tokens_to_remove = operator.index(tokens_to_remove)
    except TypeError:
        got = type(tokens_to_remove).__name__
        raise TypeError(f"tokens_to_remove must be an int, got {got}") from None
    if tokens_to_remove > 0:
        raise ValueError(f"tokens_to_remove must be 0, or negative: -n takes back n, got {tokens_to_remove}")
    return -tokens_to_remove
