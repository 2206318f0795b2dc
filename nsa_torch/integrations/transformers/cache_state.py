"""What the layers of one of transformers' caches share: an `NSACache` for all of them, and the columns of the batch."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ...cache import NSACache, NSALayerCache
from ...cache_copy import copy_cache, reserve
from ...cache_step import CacheStep
from .cache_layer import NSACacheLayer
from .options import head_dim

MAX_CROP = 64
# Of longer chunks only the last MAX_CROP tokens can be taken back: they are prompts, and rings of their size cost.
_LONGEST_DRAFT = 512


class Before(NamedTuple):
    """What `SharedState.restore` goes back to."""

    nsa: NSACache | None
    step: CacheStep | None
    columns: int
    mask: Tensor | None


class SharedState:
    """The tokens of a cache for all layers. Its length counts columns of the padded batch; padding is not stored.

    Args:
        config: of the model.
        max_length: columns that fit; None: it grows.
        max_crop: tokens that `crop` can always take back.
        expected_length: columns for which there is room at once where it grows.
    """

    def __init__(self, config: Any, max_length: int | None, max_crop: int = MAX_CROP, expected_length: int = 0):
        self.config = config
        self.max_length = max_length
        self.max_crop = max_crop
        self.expected_length = expected_length
        self._nsa: NSACache | None = None
        self.compiled: SharedState | None = None  # of the same buffers, see compiled.py
        self.columns = 0
        # (B, columns or fewer) bool: the tokens that are not padding. None, and columns after the mask's: all.
        self.mask: Tensor | None = None
        self.starts_assisted = False  # whether the next input comes from the start of assisted decoding
        self._records_past = False
        # For beam search: what it fed last, (B, columns or the newest of them), and how rows are to move before more.
        self.searching = False
        self.fed: Tensor | None = None
        self._order: Tensor | None = None

    def share(self, layers: list[NSACacheLayer]) -> None:
        """Make these the layers of this state."""
        for index, layer in enumerate(layers):
            layer.share(self, index)

    def layer(self, index: int, hidden_states: Tensor, ranks: int = 1) -> NSALayerCache:
        """The cache of one layer, to which tokens of hidden_states (B, T, hidden) are about to be appended."""
        if self.nsa is None:
            device = hidden_states.device
            autocast = torch.is_autocast_enabled(device.type)
            dtype = torch.get_autocast_dtype(device.type) if autocast else hidden_states.dtype
            heads = self.config.num_key_value_heads // ranks
            self.nsa = self._new(hidden_states.size(0), heads, dtype, device)
        elif self._records_past and self.nsa.max_crop < hidden_states.size(1) <= _LONGEST_DRAFT and index == 0:
            self._allow_crop(hidden_states.size(1))
        return self.nsa[index]

    def start(self, keys: Tensor) -> None:
        """Make the buffers for keys like these, (B, Hkv, ..., D)."""
        self.nsa = self._new(keys.size(0), keys.size(1), keys.dtype, keys.device)

    def _new(self, batch_size: int, num_kv_heads: int, dtype: torch.dtype, device: torch.device) -> NSACache:
        config = self.config
        nsa = NSACache(
            batch_size,
            self.max_length,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim(config),
            v_head_dim=config.v_head_dim,
            num_layers=config.num_hidden_layers,
            block_size=config.block_size,
            block_stride=config.block_stride,
            window=config.window,
            shared_kv=config.shared_kv,
            kv_conv=config.kv_conv,
            max_crop=self.max_crop,
            dtype=dtype,
            device=device,
        )
        reserve(nsa, self.expected_length)
        return nsa

    @property
    def nsa(self) -> NSACache | None:
        """The buffers; None before the first tokens."""
        return self._nsa

    @nsa.setter
    def nsa(self, nsa: NSACache | None) -> None:
        self._nsa, self.compiled = nsa, None

    @property
    def batch_size(self) -> int:
        return -1 if self.nsa is None else self.nsa.batch_size

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

    def before(self) -> Before | None:
        """For `restore`."""
        self._apply_order()
        return Before(self.nsa, None if self.nsa is None else self.nsa._sequences.step, self.columns, self.mask)

    def restore(self, before: Before) -> None:
        """Undo the step, if any, that came after `before`."""
        self.nsa, self.columns, self.mask = before.nsa, before.columns, before.mask
        if self.nsa is not None and self.nsa._sequences.step is not before.step:
            self.nsa.rollback()

    def activate_past_recording(self) -> None:
        """From now on the tokens of a step, up to 512 of them, can be taken back by the `crop` that follows it."""
        self._records_past = True
        self._allow_crop(MAX_CROP)

    def _allow_crop(self, tokens: int) -> None:
        self.max_crop = max(self.max_crop, tokens)
        if self.nsa is not None and self.nsa.max_crop < self.max_crop:
            self.nsa = copy_cache(self.nsa, max_crop=self.max_crop)

    def crop(self, columns_to_remove: int) -> None:
        """Take back the last columns, exactly. ValueError if that can't be; nothing has changed then."""
        removed = min(columns_to_remove, self.columns)
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
        """Forget all tokens; the buffers stay."""
        nsa, self.nsa, self.columns, self.mask = self.nsa, None, 0, None
        self._order = None
        if nsa is not None:
            nsa.reset()
        self.nsa = nsa

    def reorder(self, beam_idx: Tensor) -> None:
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
            self.select((same.int().argmax(dim=-1) + first).flatten().to(self.nsa.device))
        else:
            self.nsa, self.columns, self.mask = None, 0, None
        self.fed = None

    def repeat(self, repeats: int) -> None:
        """Every sequence `repeats` times, one after the other."""
        if self.nsa is not None:
            self.select(torch.arange(self.batch_size, device=self.nsa.device).repeat_interleave(repeats))

    def select(self, indices: Tensor) -> None:
        """The sequences numbered indices (B',), or those for which indices (B,) bool is true."""
        if self.nsa is None:
            return
        index = torch.arange(self.batch_size, device=self.nsa.device)[indices]
        mask = None if self.mask is None else self.mask[index.to(self.mask.device)]
        self.nsa, self.mask = copy_cache(self.nsa, index), mask
