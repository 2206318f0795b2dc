"""Lengths of a cache's sequences, and the step under way: it is committed at its end, or rolled back.

A step begins with the first layer and ends when the last has finished. Until then the lengths stay as they were, and
ring rows that it overwrites are kept in an undo log. A step that failed halfway is rolled back by whatever uses the
cache next, so that a retry is just calling again; a committed one by `rollback`, until the next begins.

What one token overwrites in a ring, nobody needs: a ring has a row more than `crop` and the layers ask for. So a step
of single tokens keeps no log.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .cache_step import CacheGeometry, CacheStep, plan_step

_INTERRUPTED = "reorder was interrupted: call it again with the same index, or reset()"


class Overwritten(NamedTuple):
    """Rows of a ring as they were before a layer wrote to them."""

    layer: int
    ring: Tensor
    rows: Tensor | None  # (N,) int64; None: all
    values: Tensor

    def put_back(self) -> None:
        if self.rows is None:
            self.ring.copy_(self.values)
        else:
            self.ring.index_copy_(0, self.rows, self.values)


class Reordering(NamedTuple):
    """A `reorder` under way: tensors before the one of this number are done, and this one is to hold `rows`."""

    order: Tensor
    number: int
    rows: Tensor


class Sequences:
    """Lengths of the sequences and the step under way: what all layers of a cache share."""

    def __init__(self, geometry: CacheGeometry, max_length: int | None, num_layers: int, device: torch.device):
        check_addressable(geometry.batch_size, geometry.capacity)
        self.geometry = geometry
        self.max_length = max_length
        self.num_layers = num_layers
        self.lengths = torch.zeros(geometry.batch_size, dtype=torch.int32, device=device)
        # The longest each sequence was before it was cropped: what its rings were written up to.
        self.reach = torch.zeros_like(self.lengths)
        # The longest each sequence was asked to become where the host could not refuse it.
        self.asked = torch.zeros(geometry.batch_size, dtype=torch.int64, device=device)
        self.length_bound = self.bound_before = self.bound_after = 0
        self.step: CacheStep | None = None
        self.first = 0  # the layer that has begun the step
        self.finished: list[bool] = []  # which layers have finished it
        self.undo: list[Overwritten] = []
        self.keeps_log = False
        self.open = False  # a step has begun and is not committed
        self.undoable = False  # the last step is committed and can be rolled back
        self.capturing = False  # the step is captured, not executed
        self.captured = False  # a step was captured: lengths may have moved since the host saw them
        self.unseen = False  # the same for compiled steps, which may be captured without a word to the host
        self.reordering: Reordering | None = None

    def forget(self) -> None:
        """Empty all sequences."""
        if self.reordering is None:
            self.settle()
        for tensor in (self.lengths, self.reach, self.asked):
            tensor.zero_()
        self.length_bound = 0
        self.reordering = None

    def begin(self, layer: int, cu_seqlens: Tensor, tokens: int, max_seqlen: int) -> CacheStep:
        """The step of this chunk: the first layer that asks makes it, the others join.

        That layer called again begins the next step; another one called again, after an error, takes part again.
        """
        if self.open and self.step is not None and layer != self.first:
            self._check_same_chunk(self.step, layer, cu_seqlens, tokens, max_seqlen)
            for overwritten in self.undo:
                if overwritten.layer == layer:
                    overwritten.put_back()
            return self.step
        capturing, compiling = _capturing(self.lengths.device), torch.compiler.is_compiling()
        if capturing and self.open and not self.capturing:
            raise RuntimeError("a step that failed must be undone before another is captured: call rollback()")
        late = [other for other, finished in enumerate(self.finished) if not finished] if self.open else []
        self.settle()
        if late and any(self.finished) and not compiling:
            message = f"cache layers {late} have not finished the previous step, which is undone"
            warnings.warn(message, stacklevel=4)
        self._check_chunk(cu_seqlens, tokens, max_seqlen)
        if self.unseen and not (capturing or compiling):
            self._look()
        bound, cu_seqlens = self._reserve(cu_seqlens, max_seqlen, capturing, compiling)
        self.step = plan_step(self.geometry, self.lengths, cu_seqlens, tokens, max_seqlen)
        self.first, self.finished = layer, [False] * self.num_layers
        self.bound_before, self.bound_after = self.length_bound, bound
        self.capturing = capturing
        self.keeps_log = max_seqlen > 1 and not capturing and (self.length_bound > 0 or self.captured)
        if capturing:
            self.captured = True
        if capturing or compiling:
            self.unseen = True
        self.open = True
        return self.step

    def keep(self, layer: int, ring: Tensor, rows: Tensor) -> None:
        """Called before `rows` (N,) of a ring are overwritten."""
        if self.keeps_log:
            # A compiled step is the same for short and long chunks.
            if torch.compiler.is_compiling() or rows.numel() < ring.size(0):
                self.undo.append(Overwritten(layer, ring, rows, ring.index_select(0, rows)))
            else:
                self.undo.append(Overwritten(layer, ring, None, ring.clone()))

    def finish(self, layer: int) -> None:
        """The layer has done all its work in this step; the last one to say so commits it."""
        self.finished[layer] = True
        if not all(self.finished) or self.step is None:
            return
        self.lengths.copy_(self.step.lengths)
        if self.capturing or torch.compiler.is_compiling():
            self.asked.copy_(torch.maximum(self.asked, self.step.asked))
        self.length_bound = self.bound_after
        self.undoable = not self.capturing
        self.open = False

    def settle(self) -> None:
        """Roll back a step that failed halfway; a committed one stays, for good."""
        if self.reordering is not None:
            raise RuntimeError(_INTERRUPTED)
        if self.open and not self.capturing:  # a capture that failed has executed nothing
            self._put_all_back()
        self._close()

    def settle_commit(self) -> None:
        """Take back a commit that was interrupted; the step stays open."""
        if self.open and not self.capturing and self.step is not None and all(self.finished):
            self.lengths.copy_(self.step.before)
            self.length_bound = self.bound_before

    def rollback(self) -> bool:
        """Undo the last step, committed or not; False if there is none to undo."""
        if self.reordering is not None:
            raise RuntimeError(_INTERRUPTED)
        done = (self.open and not self.capturing) or self.undoable
        if done:
            self._put_all_back()
        self._close()
        return done

    @contextmanager
    def elsewhere(self) -> Iterator[None]:
        """Around a step of one token of each sequence that others make, lengths included: it counts, or is undone.

        ValueError if the tokens do not fit, before anything is written. `rollback` does not undo it.
        """
        self.settle()
        if self.unseen:
            self._look()
        batch, device = self.geometry.batch_size, self.lengths.device
        bound, _ = self._reserve(torch.arange(batch + 1, device=device, dtype=torch.int32), 1, False, False)
        before = self.lengths.clone()
        try:
            yield
        except BaseException:
            self.reach.copy_(torch.maximum(self.reach, before + 1).masked_fill(before == 0, 0))
            self.lengths.copy_(before)
            raise
        self.length_bound = bound

    def _close(self) -> None:
        self.open = self.undoable = False
        self.undo = []

    def _put_all_back(self) -> None:
        """Can be repeated if it fails itself."""
        step = self.step
        if step is None:
            return
        for overwritten in self.undo:
            overwritten.put_back()
        if not self.keeps_log:
            reach = torch.maximum(self.reach, step.lengths).masked_fill(step.before == 0, 0)
            self.reach.copy_(reach)
        self.lengths.copy_(step.before)
        self.length_bound = self.bound_before

    def _look(self) -> None:
        """Read back what replays of CUDA graphs have made of the lengths. RuntimeError if tokens did not fit."""
        longest, asked = torch.stack((self.lengths.max().long(), self.asked.max())).tolist()
        if asked > self.geometry.capacity:
            sequences = [b for b, length in enumerate(self.asked.tolist()) if length > self.geometry.capacity]
            raise RuntimeError(
                f"a CUDA graph was replayed past the end of sequences {sequences}: what did not fit into max_length "
                f"{self.geometry.capacity} was left out; crop() or reset() the cache"
            )
        self.length_bound = longest

    def _check_same_chunk(self, step: CacheStep, layer: int, cu_seqlens: Tensor, tokens: int, max_seqlen: int) -> None:
        same = (step.tokens, step.max_seqlen) == (tokens, max_seqlen)
        if same and self.lengths.device.type == "cpu" and not torch.compiler.is_compiling():
            same = torch.equal(step.cu_seqlens, cu_seqlens)
        if not same:
            first = f"{step.tokens} with max_seqlen {step.max_seqlen}"
            raise ValueError(
                f"hidden_states must have the tokens that the other layers of the cache got, "
                f"{first}, got {tokens} with max_seqlen {max_seqlen} in layer {layer}"
            )

    def _check_chunk(self, cu_seqlens: Tensor, tokens: int, max_seqlen: int) -> None:
        shape, device = (self.geometry.batch_size + 1,), self.lengths.device
        if tuple(cu_seqlens.shape) != shape:
            got = tuple(cu_seqlens.shape)
            raise ValueError(f"cu_seqlens must be (batch_size + 1,) = {shape}, got {got}")
        if cu_seqlens.device != device:
            raise TypeError(f"cu_seqlens must be on {device} like the cache, got {cu_seqlens.device}")
        if device.type == "cpu" and not torch.compiler.is_compiling():
            ends = cu_seqlens.tolist()
            chunks = [end - start for start, end in pairwise(ends)]
            if ends[0] != 0 or ends[-1] != tokens or min(chunks) < 0:
                raise ValueError(f"cu_seqlens must rise from 0 to the {tokens} tokens, got {ends}")
            if max(chunks) > max_seqlen:
                expected = f"at least the longest chunk, {max(chunks)}"
                raise ValueError(f"max_seqlen must be {expected}, got {max_seqlen}")

    def _reserve(self, cu_seqlens: Tensor, max_seqlen: int, capturing: bool, compiling: bool) -> tuple[int, Tensor]:
        """Make room for a chunk or refuse it; reads the lengths only if their bound overflows.

        Returns the bound of the lengths with the chunk, and cu_seqlens. Where nothing may be read back, the bound alone
        decides in a compiled step, whose graph raises the error; a captured one is replayed at lengths that nobody
        knows yet, and is clamped on the device.
        """
        capacity = self.geometry.capacity
        bound = max_seqlen if capturing else self.length_bound + max_seqlen
        hint = " (a bound: give max_seqlen if chunks are shorter than all tokens)" if capturing or compiling else ""
        if bound > capacity and not (capturing or compiling):
            bound = int((self.lengths + cu_seqlens.diff()).max())
            if bound > capacity and self.max_length is None and not self.captured:
                capacity = max(bound, 2 * capacity)
                check_addressable(self.geometry.batch_size, capacity)
                self.geometry = self.geometry._replace(capacity=capacity)
            elif self.captured and self.max_length is None:
                hint = " (a cache that a CUDA graph has captured cannot grow)"
        if bound > capacity:
            message = (
                f"max_length must be at least {bound} to hold the cached and the new tokens{hint}, "
                f"got {self.max_length}, with buffers for {capacity}"
            )
            if not compiling:
                raise ValueError(message)
            cu_seqlens = refuse(cu_seqlens, message)
        return (self.length_bound if capturing else bound), cu_seqlens


@torch.library.custom_op("nsa_torch::refuse", mutates_args=())
def refuse(cu_seqlens: Tensor, message: str) -> Tensor:
    """Raise ValueError when it runs: in a compiled graph, whose code cannot. All of a step follows from cu_seqlens."""
    raise ValueError(message)


@refuse.register_fake
def _(cu_seqlens: Tensor, message: str) -> Tensor:
    return torch.empty_like(cu_seqlens)


def _capturing(device: torch.device) -> bool:
    compiling = torch.compiler.is_compiling()
    return not compiling and device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def check_addressable(batch_size: int, capacity: int) -> None:
    """Offsets of the slots are int32."""
    if batch_size * capacity >= 2**31:
        got = f"{capacity} * {batch_size}"
        raise ValueError(f"max_length * batch_size must be below 2^31, got {got}")
