"""Padded batches of Hugging Face transformers for packed attention: what hf_llama.py gets as `attention_mask`.

Importing this module registers masks for the attention implementation "nsa": for models that use it, transformers turns
the 2-D mask given to the model into a `Padding` (or None) once a forward pass, and hands that to every layer.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionMaskInterface
from transformers.masking_utils import causal_mask_function

ATTENTION = "nsa"
RESTARTS = "position_ids restart within a row"


class Padding(NamedTuple):
    """A padded batch (B, T) as packed sequences: which of its tokens follow each other, and where sequences start."""

    mask: Tensor  # (B, T) bool: the real tokens
    tokens: Tensor  # (N,) int64: tokens of the batch, numbered row by row
    cu_seqlens: Tensor  # int32

    @classmethod
    def sorted(cls, mask: Tensor) -> Padding:
        """Each row as two sequences, its real tokens and its padding: N = B * T, and cu_seqlens (2 B + 1,).

        Padding thus attends to padding alone, and no size depends on the mask: nothing is read back from the device.
        """
        starts = torch.arange(mask.size(0), device=mask.device).unsqueeze(1) * mask.size(1)
        tokens = starts + (~mask).to(torch.uint8).argsort(dim=1, stable=True)
        ends = starts + torch.stack((mask.sum(dim=1), torch.full_like(starts[:, 0], mask.size(1))), dim=1)
        return cls(mask, tokens.flatten(), F.pad(ends.flatten(), (1, 0)).to(torch.int32))

    def without_padding(self) -> Padding:
        """The real tokens alone, one sequence a row, cu_seqlens (B + 1,). Reads their number back from the device."""
        ends = self.mask.sum(dim=1).cumsum(dim=0)
        return Padding(self.mask, self.mask.flatten().nonzero().squeeze(1), F.pad(ends, (1, 0)).to(torch.int32))

    def take(self, x: Tensor) -> Tensor:
        """(B or 1, T, C) -> (N, C)."""
        return x.expand(*self.mask.shape, -1).flatten(0, 1).index_select(0, self.tokens)

    def put_back(self, packed: Tensor) -> Tensor:
        """(N, C) -> (B, T, C), zeros where no token comes from."""
        out = packed.new_zeros(self.mask.numel(), packed.size(1))
        return out.index_copy(0, self.tokens, packed).unflatten(0, self.mask.shape)


def padding_mask(
    q_length: int, kv_length: int, mask_function: Any, attention_mask: Tensor | None, **kwargs: Any
) -> Padding | str | None:
    """What transformers hands to every layer as `attention_mask`, made once a forward pass.

    attention_mask (B, T so far) bool is the one given to the model. A single new token of a cached sequence is taken to
    be real, as in `generate`.
    """
    if attention_mask is None:
        # While tracing, transformers wraps the mask function whether positions restart or not.
        restarts = mask_function is not causal_mask_function and not torch.compiler.is_compiling()
        return RESTARTS if restarts else None
    if q_length == 1 and kv_length > 1:
        return None
    return Padding.sorted(attention_mask[:, -q_length:])


AttentionMaskInterface.register(ATTENTION, padding_mask)
