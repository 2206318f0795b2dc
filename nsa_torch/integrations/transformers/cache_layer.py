"""What transformers sees of one layer of an NSAModelCache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

if TYPE_CHECKING:
    from .cache import NSAModelCache


class NSAModelCacheLayer(CacheLayerMixin):
    """One layer of an NSAModelCache, or of a DynamicCache or StaticCache that speaks for one (see `cache.adopt`).

    Tokens come and go in all layers at once: the first layer acts for all, the others do nothing.
    """

    is_sliding = False
    is_compileable = False
    supports_early_init = False

    def __init__(self, cache: NSAModelCache, index: int):
        self.cache = cache
        self.index = index
        self.keys = self.values = None

    @property
    def is_initialized(self) -> bool:
        return self.cache.is_initialized

    @property
    def is_croppable(self) -> bool:
        return self.cache.is_croppable

    @property
    def batch_size(self) -> int:
        return self.cache.batch_size

    def get_seq_length(self) -> int:
        return self.cache.columns

    def get_max_length(self) -> int:
        return -1 if self.cache.max_length is None else self.cache.max_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.columns + query_length, 0

    def activate_past_recording(self) -> None:
        if self.index == 0:
            self.cache.activate_past_recording()

    def crop(self, tokens_to_remove: int) -> None:
        if self.index == 0:
            self.cache.crop(tokens_to_remove)

    def reset(self) -> None:
        if self.index == 0:
            self.cache.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.index == 0:
            self.cache.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.index == 0:
            self.cache.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.index == 0:
            self.cache.batch_select_indices(indices)

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(
            "a layer of NSAModelCache takes tokens from NSAAttention alone and stays on its device"
        )

    update = lazy_initialization = offload = prefetch = _refuse
