"""transformers' caches for models with NSA: one of their own, and those of transformers, which have the same layers."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, StaticCache, StaticLayer

from ...cache import NSACache
from ...checks import check_at_least
from .cache_layer import NSACacheLayer, NSADynamicLayer, NSAStaticLayer
from .cache_state import MAX_CROP, SharedState
from .peft import NO_PREFIX


class NSAModelCache(Cache):
    """As a DynamicCache or, with max_length, a StaticCache of the model's configuration, with the sizes named below.

    Models take it as `cache`, and as `past_key_values`, its name before transformers 5.24. Its length counts columns of
    the padded batch; padding itself is not stored. A model's call that fails leaves it as it was.

    Args:
        config: of the model.
        max_length: columns that fit; None: the cache grows.
        max_crop: tokens that `crop` can always take back. More of them enlarge what is kept of the last tokens.
        expected_length: columns for which a growing cache has room at once.

    TypeError for a length that is no int, ValueError for one that is negative, or a max_length of 0.
    """

    layers: list[Any]

    def __init__(
        self,
        config: Any,
        max_length: int | None = None,
        max_crop: int = MAX_CROP,
        expected_length: int = 0,
    ):
        check_at_least(0, max_crop=max_crop, expected_length=expected_length)
        check_at_least(1, max_length=1 if max_length is None else max_length)
        super().__init__(layers=_new_layers(config, max_length))
        self.state = SharedState(config, max_length, max_crop, expected_length)
        self.state.share(self.layers)

    @property
    def nsa(self) -> NSACache | None:
        """The NSACache of all layers; None before the first tokens."""
        return self.state.nsa

    @property
    def max_crop(self) -> int:
        """Columns that `crop` can always take back."""
        return self.state.max_crop

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last -tokens_to_remove columns, exactly; 0 does nothing.

        Works for up to max_crop of the columns that were ever reached, and for any number as long as no sequence
        outgrew its window and its compression block. More than there are empty the cache.

        Raises:
            TypeError: not an int.
            ValueError: a positive number (it meant the remaining length before transformers 5.18), or more columns
                than can be taken back. Nothing has changed then.
        """
        super().crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row b becomes the former row beam_idx[b]. If it is interrupted, call it again with the same indices."""
        super().reorder_cache(beam_idx)

    def activate_past_recording(self) -> None:
        """From now on the tokens of a step, up to 512 of them, can be taken back by the `crop` that follows it."""
        super().activate_past_recording()

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence `repeats` times, one after the other."""
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """The sequences numbered indices (B',), or those for which indices (B,) bool is true."""
        super().batch_select_indices(indices)


def _new_layers(config: Any, max_length: int | None) -> list[NSACacheLayer]:
    kind = NSADynamicLayer if max_length is None else NSAStaticLayer
    return [kind(max_cache_len=max_length) for _ in range(config.num_hidden_layers)]


def adopt(cache: Any, config: Any, name: str) -> SharedState:
    """The state of a cache that was given as `name`; its layers get one if they have none.

    A DynamicCache or a StaticCache without tokens and of other layers, such as one that knows no configuration, gets
    those of NSA in place of its own.

    TypeError for any other cache. One that holds keys and values of a single attention, as the prefix of PEFT's prefix
    tuning, says nothing of the three branches' own. The compressed branch would need keys before rotation, and a
    gradient into the prefix would have to pass through the cache.
    """
    if isinstance(cache, NSAModelCache):
        return cache.state
    layers = cache.layers if isinstance(cache, Cache) else []
    if layers and all(isinstance(layer, NSACacheLayer) for layer in layers) and not cache.offloading:
        state: SharedState | None = layers[0].state
        if any(layer.state is not state for layer in layers):
            raise TypeError(f"{name} must have layers of one cache, got those of {len({id(x.state) for x in layers})}")
        if state is None:
            state = SharedState(config, layers[0].max_cache_len)
            state.share(layers)
        return state
    if not _can_take_layers(cache):
        expected = "an NSAModelCache, or a DynamicCache or StaticCache of the model's configuration, without offloading"
        message = f"{name} must be {expected}, got {type(cache).__name__}"
        if isinstance(cache, Cache) and cache.offloading:
            message += " with offloading"
        elif type(cache) in (DynamicCache, StaticCache):
            held = cache.get_seq_length()
            message += f" with {held} tokens: {NO_PREFIX}" if held > 0 else f" of {type(layers[0]).__name__}"
        raise TypeError(message)
    cache.layers = _new_layers(config, layers[0].max_cache_len if type(cache) is StaticCache else None)
    cache.layer_class_to_replicate = None
    return adopt(cache, config, name)


def _can_take_layers(cache: Any) -> bool:
    """Whether a cache is one of transformers' that holds nothing, and says how many columns it is to have."""
    if type(cache) not in (DynamicCache, StaticCache) or cache.offloading:
        return False
    if any(layer.is_initialized for layer in cache.layers):
        return False
    # A static layer with a sliding window does not tell for how many columns it was made.
    return type(cache) is DynamicCache or all(type(layer) is StaticLayer for layer in cache.layers)
