"""The buffers of one layer of a cache, written and read step by step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import ops
from .cache_step import CacheStep, RingStep
from .convolution import ContextRows
from .sequences import Sequences


class NSALayerCache:
    """The buffers of one layer, made by NSACache; NSAAttention reads and writes them."""

    def __init__(self, sequences: Sequences, index: int, num_kv_heads: int, like: tuple[Tensor, ...]):
        self.sequences = sequences
        self.index = index
        self.capacity = sequences.geometry.capacity

        def pair(rows: int, branches: int = 1) -> tuple[Tensor, Tensor]:
            k, v = (x.new_zeros(rows + 1, num_kv_heads, branches * x.size(-1)) for x in like)
            return k, v

        geometry = sequences.geometry
        self.k_slc, self.v_slc = pair(geometry.batch_size * geometry.capacity)
        self.k_cmp, self.v_cmp = pair(geometry.block_rows)
        self.k_raw, self.v_raw = pair(geometry.batch_size * geometry.raw_size)
        self.k_win: Tensor | None = None
        self.v_win: Tensor | None = None
        if not geometry.shared_kv:
            self.k_win, self.v_win = pair(geometry.batch_size * geometry.window_size)
        self.k_conv: Tensor | None = None
        self.v_conv: Tensor | None = None
        if geometry.kv_conv:
            branches = 2 if geometry.shared_kv else 3
            self.k_conv, self.v_conv = pair(geometry.batch_size * geometry.conv_size, branches)

    @property
    def dtype(self) -> torch.dtype:
        """Of the buffers, and of the attention over them."""
        return self.k_slc.dtype

    def begin(self, cu_seqlens: Tensor, tokens: int, max_seqlen: int) -> CacheStep:
        """Start to append `tokens` packed tokens, chunk b of at most max_seqlen to sequence b."""
        step = self.sequences.begin(self.index, cu_seqlens, tokens, max_seqlen)
        if step.capacity != self.capacity:
            self._grow()
        return step

    def extend_raw(self, step: CacheStep, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add unrotated tokens (N, Hkv, D); returns pending ones and these, in step.raw's slots."""
        return self._extend(self.k_raw, k, step.raw), self._extend(self.v_raw, v, step.raw)

    def extend_window(self, step: CacheStep, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor] | None:
        """Add rotated tokens (N, Hkv, D); returns all that they see, in step.window's slots.

        None, and nothing is added, where the window branch reads what `store_tokens` has stored.
        """
        if step.window is None or self.k_win is None or self.v_win is None:
            return None
        return self._extend(self.k_win, k, step.window), self._extend(self.v_win, v, step.window)

    def extend_conv(self, k: Tensor, v: Tensor) -> tuple[ContextRows, Tensor, Tensor]:
        """Add projected tokens of all branches (N, Hkv, branches * D) in the step that has begun.

        Returns how they lie with those before them, and them so.
        """
        step = self.sequences.step
        assert step is not None and step.conv is not None and self.k_conv is not None and self.v_conv is not None
        laid_out = step.conv.rows.lay_out(k, self.k_conv), step.conv.rows.lay_out(v, self.v_conv)
        for ring, new in ((self.k_conv, k), (self.v_conv, v)):
            self.sequences.keep(self.index, ring, step.conv.write)
            _store(ring, new, step.conv.write)
        return step.conv.rows, *laid_out

    def store_tokens(self, step: CacheStep, k: Tensor, v: Tensor) -> None:
        """Add rotated selection-branch tokens (N, Hkv, D)."""
        _store(self.k_slc, k, step.slots)
        _store(self.v_slc, v, step.slots)

    def store_blocks(self, step: CacheStep, k: Tensor, v: Tensor) -> None:
        """Add those that are complete of the blocks (R, Hkv, D) made of `extend_raw`'s slots."""
        _store(self.k_cmp, k, step.block_slots)
        _store(self.v_cmp, v, step.block_slots)

    def attend(
        self,
        step: CacheStep,
        q: Tensor,
        gates: Tensor,
        window_slots: tuple[Tensor, Tensor] | None,
        *,
        select_size: int,
        num_selected: int,
        num_initial: int,
        num_local: int,
        scale: float | None,
    ) -> Tensor:
        """The gated sum of the three branches over all that is held, the new tokens included.

        q (N, Hq, Dk) rotated, gates (N, Hq, 3), window_slots of `extend_window` -> (N, Hq, Dv) of
        q's dtype. The branches are separate ops since each has its own slots: positions count from
        the end of a slot, so the window's need not hold what no query sees.
        """
        geometry, dtype, q = self.sequences.geometry, q.dtype, q.to(self.dtype)
        queries: dict[str, Any] = {
            "scale": scale,
            "cu_seqlens_q": step.cu_seqlens,
            "max_seqlen_q": step.max_seqlen,
        }
        slots = queries | {
            "cu_seqlens_k": step.cu_slots,
            "max_seqlen_k": step.capacity,
            "seqused_k": step.lengths,
        }
        if step.window is None or window_slots is None:
            near, window_slots = slots, (self.k_slc[:-1], self.v_slc[:-1])
        else:
            near = queries | {
                "cu_seqlens_k": step.window.cu_seqlens,
                "max_seqlen_k": step.window.max_seqlen,
                "seqused_k": step.window.used,
            }
        blocks = slots | {
            "block_size": geometry.block_size,
            "block_stride": geometry.block_stride,
        }
        o_cmp, lse = ops.compressed_attention(q, self.k_cmp[:-1], self.v_cmp[:-1], **blocks)
        block_indices = ops.select_blocks(
            q,
            self.k_cmp[:-1],
            lse,
            select_size=select_size,
            num_selected=num_selected,
            num_initial=num_initial,
            num_local=num_local,
            **blocks,
        )
        o_slc, _ = ops.selected_attention(
            q, self.k_slc[:-1], self.v_slc[:-1], block_indices, select_size=select_size, **slots
        )
        o_win, _ = ops.window_attention(q, *window_slots, window=geometry.window, **near)
        g_cmp, g_slc, g_win = gates.unsqueeze(-1).unbind(-2)
        return (g_cmp * o_cmp + g_slc * o_slc + g_win * o_win).to(dtype)

    def buffers(self) -> dict[str, Tensor]:
        """Every buffer, seen as (B, rows of one sequence, Hkv, D)."""
        geometry = self.sequences.geometry._replace(capacity=self.capacity)
        batch = geometry.batch_size
        rows = {"slc": geometry.capacity, "cmp": geometry.blocks, "raw": geometry.raw_size}
        if not geometry.shared_kv:
            rows["win"] = geometry.window_size
        if geometry.kv_conv:
            rows["conv"] = geometry.conv_size
        names = {f"{tensor}_{branch}": size for branch, size in rows.items() for tensor in "kv"}
        return {name: getattr(self, name)[: batch * size].unflatten(0, (batch, size)) for name, size in names.items()}

    def finish(self) -> None:
        """All that the layer does in the step is done; the step is committed when every layer has said so."""
        self.sequences.finish(self.index)

    def _extend(self, ring: Tensor, new: Tensor, step: RingStep) -> Tensor:
        """Write new tokens to the ring; returns the slots of the tokens held before and these."""
        new = new.to(ring.dtype)
        slots = None if step.gather is None else torch.cat((ring, new)).index_select(0, step.gather)
        self.sequences.keep(self.index, ring, step.write)
        ring.index_copy_(0, step.write, new)
        return ring[:-1] if slots is None else slots

    def _grow(self) -> None:
        """Move tokens and blocks to buffers of the capacity that the sequences now need, all of them or none."""
        old, geometry = self.buffers(), self.sequences.geometry
        rows = {"slc": geometry.capacity, "cmp": geometry.blocks}
        spare = {"slc": 1, "cmp": geometry.block_rows + 1 - geometry.batch_size * geometry.blocks}
        new: dict[str, Any] = {"capacity": geometry.capacity}
        with torch.inference_mode(False), torch.no_grad():
            for name in ("k_slc", "v_slc", "k_cmp", "v_cmp"):
                size, held = rows[name[2:]], old[name]
                shape = held.shape[2:]
                new[name] = held.new_zeros(geometry.batch_size * size + spare[name[2:]], *shape)
                slots = new[name][: geometry.batch_size * size].unflatten(0, (geometry.batch_size, size))
                slots[:, : held.size(1)] = held
        vars(self).update(new)


def _store(buffer: Tensor, new: Tensor, rows: Tensor) -> None:
    buffer.index_copy_(0, rows, new.to(buffer.dtype))
