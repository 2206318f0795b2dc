"""Batches of Hugging Face transformers, padded or of several documents a row, as packed sequences."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Packing(NamedTuple):
    """A batch (B, T) as packed sequences: which of its tokens follow each other, and where sequences start."""

    shape: tuple[int, int]  # B, T
    cu_seqlens: Tensor  # int32
    mask: Tensor | None = None  # (B, T) bool: the tokens that are not padding; None: all
    tokens: Tensor | None = None  # (N,) int64: tokens of the batch, numbered row by row; None: all in this order
    ends_padded: bool = False  # whether the last column may have padding

    @classmethod
    def of_padded(cls, mask: Tensor) -> Packing:
        """Each row as two sequences, its real tokens and its padding: N = B * T, and cu_seqlens (2 B + 1,).

        No size depends on the mask: nothing is read back from the device.
        """
        batch, length = mask.shape
        starts = torch.arange(batch, device=mask.device).unsqueeze(1) * length
        tokens = starts + (~mask).to(torch.uint8).argsort(dim=1, stable=True)
        ends = starts + torch.stack((mask.sum(dim=1), torch.full_like(starts[:, 0], length)), dim=1)
        cu_seqlens = F.pad(ends.flatten(), (1, 0)).to(torch.int32)
        return cls((batch, length), cu_seqlens, mask, tokens.flatten(), _may_end_padded(mask))

    @classmethod
    def of_chunk(cls, mask: Tensor) -> Packing:
        """The real tokens alone, one sequence a row: what continues the sequences of a cache. cu_seqlens (B + 1,).

        Their number is read back from the device, except on a GPU for single tokens or in a compiled model: there the
        padding comes after the last sequence, where tokens count for nothing.
        """
        batch, length = mask.shape
        cu_seqlens = F.pad(mask.sum(dim=1).cumsum(dim=0), (1, 0)).to(torch.int32)
        if mask.is_cuda and (length == 1 or torch.compiler.is_compiling()):
            tokens = (~mask).flatten().to(torch.uint8).argsort(stable=True)
        else:
            tokens = mask.flatten().nonzero().squeeze(1)
        return cls((batch, length), cu_seqlens, mask, tokens, _may_end_padded(mask))

    @classmethod
    def of_documents(cls, position_ids: Tensor, batch: int) -> Packing | None:
        """Rows that hold several documents each: one starts wherever positions don't rise by 1. None: no row does.

        position_ids: (B or 1, T). The number of documents is read back from the device; a compiled model, where that
        can't be, takes as many sequences as tokens, most of them empty: slower than with cu_seq_lens_q.
        """
        position_ids = position_ids.expand(batch, -1)
        length = position_ids.size(1)
        starts = F.pad(position_ids.diff(dim=1) != 1, (1, 0), value=True).flatten()
        total = starts.numel()
        if torch.compiler.is_compiling():
            index = torch.arange(total, device=starts.device)
            begins = torch.where(starts, index, total).sort().values
        else:
            begins = starts.nonzero().squeeze(1)
            if begins.numel() == batch:
                return None
        return cls((batch, length), F.pad(begins, (0, 1), value=total).to(torch.int32))

    def take(self, x: Tensor) -> Tensor:
        """(B or 1, T, C) -> (N, C)."""
        x = x.expand(*self.shape, -1).flatten(0, 1)
        return x if self.tokens is None else x.index_select(0, self.tokens)

    def put_back(self, packed: Tensor) -> Tensor:
        """(N, C) -> (B, T, C), zeros for padding."""
        if self.tokens is None or self.mask is None:
            return packed.unflatten(0, self.shape)
        out = packed.new_zeros(self.mask.numel(), packed.size(1))
        out = out.index_copy(0, self.tokens, packed).unflatten(0, self.shape)
        return out.masked_fill(~self.mask.unsqueeze(-1), 0)

    def put_last(self, out: Tensor, last: Tensor) -> Tensor:
        """out (B, T, C) with the padding of its last column taken from last (B, C)."""
        assert self.mask is not None
        return torch.cat((out[:, :-1], torch.where(self.mask[:, -1:], out[:, -1], last).unsqueeze(1)), dim=1)


def shows_documents(mask: Tensor, position_ids: Tensor) -> bool:
    """Whether real tokens that follow each other have positions that do not rise: rows hold several documents.

    mask (B, T) bool, position_ids (B or 1, T). Around padding `generate` numbers tokens so, too. A compiled model can't
    tell, and raises RuntimeError when it runs.
    """
    restarts = ((position_ids.diff(dim=1) < 1) & mask[:, 1:] & mask[:, :-1]).any()
    if not torch.compiler.is_compiling():
        return bool(restarts)
    message = "attention_mask must be None, or cu_seq_lens_q given, for rows of several documents in a compiled model"
    torch._assert_async(~restarts, message)
    return False


def _may_end_padded(mask: Tensor) -> bool:
    """Whether the last column of mask (B, T) has padding; True where that can't be read without waiting."""
    return mask.device.type != "cpu" or torch.compiler.is_compiling() or not bool(mask[:, -1].all())


def check_positions(position_ids: Tensor, batch: int, length: int) -> None:
    """ValueError unless position_ids are (B or 1, T)."""
    shape = tuple(position_ids.shape)
    if len(shape) != 2 or shape[0] not in (1, batch) or shape[1] != length:
        allowed = " or ".join(str((rows, length)) for rows in dict.fromkeys((batch, 1)))
        raise ValueError(f"position_ids must be (B or 1, T) = {allowed}, got shape {shape}")


def check_mask(attention_mask: Tensor, batch: int, past: int, length: int) -> Tensor:
    """attention_mask (B, past + length) as bool; after cached columns it may be longer. ValueError otherwise."""
    shape = tuple(attention_mask.shape)
    longer = past > 0 and len(shape) == 2 and shape[1] > past + length
    if len(shape) != 2 or shape[0] != batch or (shape[1] != past + length and not longer):
        columns = f"{past} cached and {length} new columns" if past else f"{length} columns"
        expected = f"({batch}, {past + length}) ones and zeros, for {columns}"
        raise ValueError(f"attention_mask must be (B, T) = {expected}, got a mask of shape {shape}")
    return attention_mask[:, : past + length].bool()
