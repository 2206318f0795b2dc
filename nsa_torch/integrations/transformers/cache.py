"""transformers' interface to `nsa_torch.NSACache`."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import Cache, DynamicCache, StaticCache

from ...cache import NSACache, NSALayerCache
from ...cache_copy import copy_cache, reserve
from ...cache_step import CacheStep
from ...checks import check_at_least
from .cache_layer import NSAModelCacheLayer
from .options import head_dim
from .peft import NO_PREFIX

_MAX_CROP = 64
# Of longer chunks only the last _MAX_CROP tokens can be taken back: they are prompts, and rings of their size cost.
_LONGEST_DRAFT = 512


class _State(NamedTuple):
    """What `NSAModelCache.restore` goes back to."""

    nsa: NSACache | None
    step: CacheStep | None
    columns: int
    mask: Tensor | None


class NSAModelCache(Cache):
    """The cache of these models: an `NSACache` for all layers, made when the first tokens arrive.

    Models take it as `cache`, and as `past_key_values`, its name before transformers 5.24. Its length counts columns of
    the padded batch; padding itself is not stored. A model's call that fails leaves it as it was.

    Args:
        config: of the model.
        max_length: columns that fit; None: the cache grows.
        max_crop: tokens that `crop` can always take back. More of them enlarge what is kept of the last tokens.
        expected_length: columns for which a growing cache has room at once.

    TypeError for a length that is no int, ValueError for one that is negative, or a max_length of 0.
    """

    def __init__(
        self,
        config: Any,
        max_length: int | None = None,
        max_crop: int = _MAX_CROP,
        expected_length: int = 0,
    ):
        check_at_least(0, max_crop=max_crop, expected_length=expected_length)
        check_at_least(1, max_length=1 if max_length is None else max_length)
        super().__init__(layers=[NSAModelCacheLayer(self, index) for index in range(config.num_hidden_layers)])
        self.config = config
        self.max_length = max_length
        self.max_crop = max_crop
        self.expected_length = expected_length
        self.nsa: NSACache | None = None
        self.columns = 0
        # (B, columns or fewer) bool: the tokens that are not padding. None, and columns after the mask's: all.
        self.mask: Tensor | None = None
        self.starts_assisted = False  # whether the next input comes from the start of assisted decoding
        self._records_past = False
        # For beam search: what it fed last, (B, columns or the newest of them), and how rows are to move before more.
        self.searching = False
        self.fed: Tensor | None = None
        self._order: Tensor | None = None

    def layer(self, index: int, hidden_states: Tensor) -> NSALayerCache:
        """The cache of one layer, to which tokens of hidden_states (B, T, hidden) are about to be appended."""
        if self.nsa is None:
            self.nsa = self._new(hidden_states)
        elif self._records_past and self.nsa.max_crop < hidden_states.size(1) <= _LONGEST_DRAFT and index == 0:
            self._allow_crop(hidden_states.size(1))
        return self.nsa[index]

    def _new(self, hidden_states: Tensor) -> NSACache:
        config, device = self.config, hidden_states.device
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else hidden_states.dtype
        nsa = NSACache(
            hidden_states.size(0),
            self.max_length,
            num_kv_heads=config.num_key_value_heads,
            head_dim=head_dim(config),
            num_layers=config.num_hidden_layers,
            block_size=config.block_size,
            block_stride=config.block_stride,
            window=config.window,
            max_crop=self.max_crop,
            dtype=dtype,
            device=device,
        )
        reserve(nsa, self.expected_length)
        return nsa

    def append(self, columns: int, mask: Tensor | None) -> None:
        """Count columns that all layers have got. mask (B, all columns) bool: the real tokens; None: these are."""
        self.columns += columns
        if mask is not None:
            self.mask = mask

    def check_mask(self, mask: Tensor) -> None:
        """ValueError if a mask (B, columns and more) hides or shows other tokens than those that were stored.

        On other devices than the CPU nothing is read back, so nothing is checked.
        """
        if torch.compiler.is_compiling() or mask.device.type != "cpu" or self.columns == 0:
            return
        held = self.mask if self.mask is not None else mask.new_ones(mask.size(0), 0)
        held = F.pad(held, (0, self.columns - held.size(1)), value=True)
        if held.shape[0] == mask.size(0) and not torch.equal(held, mask[:, : self.columns]):
            raise ValueError(
                f"attention_mask must be for the {self.columns} cached columns what it was when they were stored"
            )

    def state(self) -> _State:
        """For `restore`."""
        self._apply_order()
        return _State(self.nsa, None if self.nsa is None else self.nsa._sequences.step, self.columns, self.mask)

    def restore(self, state: _State) -> None:
        """Undo the step, if any, that came after `state`."""
        self.nsa, self.columns, self.mask = state.nsa, state.columns, state.mask
        if self.nsa is not None and self.nsa._sequences.step is not state.step:
            self.nsa.rollback()

    @property
    def batch_size(self) -> int:
        return -1 if self.nsa is None else self.nsa.batch_size

    @property
    def is_initialized(self) -> bool:
        return self.nsa is not None

    @property
    def is_croppable(self) -> bool:
        return self.max_crop > 0

    def activate_past_recording(self) -> None:
        """From now on the tokens of a step, up to 512 of them, can be taken back by the `crop` that follows it."""
        self._records_past = True
        self._allow_crop(_MAX_CROP)

    def _allow_crop(self, tokens: int) -> None:
        self.max_crop = max(self.max_crop, tokens)
        if self.nsa is not None and self.nsa.max_crop < self.max_crop:
            self.nsa = copy_cache(self.nsa, max_crop=self.max_crop)

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last -tokens_to_remove columns, exactly; 0 does nothing.

        Works for up to max_crop of the columns that were ever reached, and for any number as long as no sequence
        outgrew its window and its compression block. More than there are empty the cache.

        Raises:
            TypeError: not an int.
            ValueError: a positive number (it meant the remaining length before transformers 5.18), or more columns
                than can be taken back. Nothing has changed then.
        """
        try:
            tokens_to_remove = operator.index(tokens_to_remove)
        except TypeError:
            got = type(tokens_to_remove).__name__
            raise TypeError(f"tokens_to_remove must be an int, got {got}") from None
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove must be 0, or negative: -n takes back n, got {tokens_to_remove}")
        removed = min(-tokens_to_remove, self.columns)
        if removed == 0:
            return
        columns = self.columns - removed
        mask = None if self.mask is None else self.mask[:, :columns]
        # Tokens that are not padding, an int or (B,). In columns after the mask's none is padding.
        kept: int | Tensor = columns if mask is None else mask.sum(dim=1) + columns - mask.size(1)
        if self.nsa is not None:
            held = self.nsa.lengths.clone()
            try:
                self.nsa.crop(kept)
            except BaseException:  # an interrupt: all of it is done, or nothing
                if not torch.equal(self.nsa.lengths, held):
                    self.nsa.crop(kept)
                    self.columns, self.mask = columns, mask
                raise
        self.columns, self.mask = columns, mask

    def reset(self) -> None:
        nsa, self.nsa, self.columns, self.mask = self.nsa, None, 0, None
        self._order = None
        if nsa is not None:
            nsa.reset()
        self.nsa = nsa

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row b becomes the former row beam_idx[b]. If it is interrupted, call it again with the same indices."""
        # The last time that beam search reorders, it is for a step that does not come: `keep_sequences` does without.
        if not self._reorders():
            self._order = beam_idx if self._order is None else self._order.index_select(0, beam_idx)
        if not self.searching:
            try:
                self._apply_order()
            except BaseException:
                if not self._reorders():
                    self._order = None
                raise

    def _reorders(self) -> bool:
        """Whether a `reorder` of the sequences was interrupted halfway."""
        return self.nsa is not None and self.nsa._sequences.reordering is not None

    def _apply_order(self) -> None:
        order = self._order
        if order is not None and self.nsa is not None:
            mask = None if self.mask is None else self.mask.index_select(0, order.to(self.mask.device))
            self.nsa.reorder(order)
            self.mask = mask
        self._order = None

    def stop_search(self) -> None:
        """A beam search failed: rows are where it moved them last."""
        self.searching, self.fed = False, None
        self._apply_order()

    def keep_sequences(self, sequences: Tensor, batch: int) -> None:
        """Keep the rows of these sequences (batch * R, T), that a beam search over more rows returned.

        A sequence that ended before the search did has left no row: then the cache is emptied, to be filled anew.
        """
        self.searching, self._order = False, None
        if (fed := self.fed) is None or self.nsa is None:
            return
        length = fed.size(1)
        rows = fed.view(batch, 1, -1, length)
        wanted = F.pad(sequences, (0, max(length - sequences.size(1), 0)), value=-1)[:, :length]
        same = (rows == wanted.to(fed.device).view(batch, -1, 1, length)).all(dim=-1)
        if bool(same.any(dim=-1).all()):
            first = torch.arange(batch, device=fed.device).unsqueeze(1) * same.size(2)
            self.batch_select_indices((same.int().argmax(dim=-1) + first).flatten().to(self.nsa.device))
        else:
            self.nsa, self.columns, self.mask = None, 0, None
        self.fed = None

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence `repeats` times, one after the other."""
        if self.nsa is not None:
            index = torch.arange(self.batch_size, device=self.nsa.device)
            self.batch_select_indices(index.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """The sequences numbered indices (B',), or those for which indices (B,) bool is true."""
        if self.nsa is None:
            return
        index = torch.arange(self.batch_size, device=self.nsa.device)[indices]
        mask = None if self.mask is None else self.mask[index.to(self.mask.device)]
        self.nsa, self.mask = copy_cache(self.nsa, index), mask

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("NSAModelCache takes tokens from NSAAttention alone")

    update = early_initialization = _refuse


def adopt(cache: Any, config: Any, name: str) -> NSAModelCache:
    """The NSAModelCache of a cache that was given as `name`: itself, or what a transformers' cache holds.

    A DynamicCache or a StaticCache without tokens gets an NSAModelCache's layers in place of its own, and from then on
    speaks for it; a StaticCache's is of its fixed length.

    TypeError for any other cache. One that holds keys and values of a single attention, as the prefix of PEFT's prefix
    tuning, says nothing of the three branches' own. The compressed branch would need keys before rotation, and a
    gradient into the prefix would have to pass through the cache.
    """
    if isinstance(cache, NSAModelCache):
        return cache
    layers = cache.layers if type(cache) in (DynamicCache, StaticCache) else None
    if layers and all(isinstance(layer, NSAModelCacheLayer) for layer in layers):
        return layers[0].cache
    if layers is None or cache.offloading or any(layer.is_initialized for layer in layers):
        expected = "an NSAModelCache, or a DynamicCache or StaticCache without tokens and offloading"
        message = f"{name} must be {expected}, got {type(cache).__name__}"
        if layers is not None and cache.get_seq_length() > 0:
            message += f" with {cache.get_seq_length()} tokens: {NO_PREFIX}"
        raise TypeError(message)
    adopted = NSAModelCache(config, layers[0].max_cache_len if type(cache) is StaticCache else None)
    cache.layers, cache.layer_class_to_replicate = adopted.layers, None
    return adopted
