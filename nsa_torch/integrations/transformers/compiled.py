"""Compiled decoding with a cache of fixed length: one graph for all steps, and for all caches of its sizes.

The numbers that the host keeps of a cache change with every step; a graph that read them would be compiled anew, or
could not be replayed. So the compiled model is given another cache, which has the same buffers and nothing but tensors
that change. What the host has to count and to refuse, it does before and after.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ...cache import NSACache, NSALayerCache
from ...cache_step import CacheStep, plan_step
from ...sequences import Sequences
from .cache import NSAModelCache, adopt
from .cache_layer import NSAStaticLayer
from .cache_state import Before, SharedState
from .modeling import CACHE

if TYPE_CHECKING:
    from collections.abc import Callable


class _Steps(Sequences):
    """Sequences that get single tokens, and for which nobody on the host counts."""

    def __init__(self, sequences: Sequences):
        # Lengths are the cache's own; what else Sequences has is not needed.
        self.geometry, self.max_length, self.num_layers = sequences.geometry, sequences.max_length, sequences.num_layers
        self.lengths = sequences.lengths
        self.step: CacheStep | None = None

    def begin(self, layer: int, cu_seqlens: Tensor, tokens: int, max_seqlen: int) -> CacheStep:
        if self.step is None:
            self.step = plan_step(self.geometry, self.lengths, cu_seqlens, tokens, max_seqlen)
        return self.step

    def keep(self, layer: int, ring: Tensor, rows: Tensor) -> None:
        """Single tokens need no log."""

    def finish(self, layer: int) -> None:
        if layer == self.num_layers - 1 and self.step is not None:
            self.lengths.copy_(self.step.lengths)
            self.step = None


class StepState(SharedState):
    """The state of a cache as compiled steps see it."""

    def __init__(self, state: SharedState, nsa: NSACache):
        super().__init__(state.config, state.max_length, state.max_crop)
        self.nsa = nsa
        self.steps = _Steps(nsa._sequences)
        self.layers = [copy.copy(layer) for layer in nsa.layers]
        for layer in self.layers:
            layer.sequences = self.steps
        self.cache = _StepCache(self)

    def layer(self, index: int, hidden_states: Tensor, ranks: int = 1) -> NSALayerCache:
        return self.layers[index]

    def before(self) -> Before | None:
        """Whoever calls the compiled model sees to it."""
        return None

    def append(self, columns: int, mask: Tensor | None) -> None:
        """Whoever calls the compiled model counts."""


class _StepCache(NSAModelCache):
    """The cache that compiled steps are given."""

    def __init__(self, state: StepState):
        self.state = state
        Cache.__init__(self, layers=[NSAStaticLayer(max_cache_len=state.max_length) for _ in state.layers])
        state.share(self.layers)


def call_compiled(model: Any, compiled: Callable[..., Any], **inputs: Any) -> Any:
    """The model's call for these inputs: compiled, if they are a step of single tokens with a cache of fixed length."""
    tokens, cache = inputs.get("input_ids"), inputs.get(CACHE)
    state = None if cache is None else adopt(cache, model.config, CACHE)
    if state is None or state.nsa is None or state.max_length is None:
        return model(**inputs)
    single = tokens is not None and tokens.shape == (state.batch_size, 1) and inputs.get("position_ids") is not None
    if not single or inputs.get("attention_mask") is not None or torch.is_grad_enabled():
        return model(**inputs)
    state.before()
    if not isinstance(state.compiled, StepState):
        state.compiled = StepState(state, state.nsa)
    state.compiled.steps.step = None  # of a step that failed
    columns = state.columns
    try:
        with state.nsa._sequences.elsewhere():
            out = compiled(**inputs | {CACHE: state.compiled.cache})
            state.append(1, None)
    except BaseException:
        state.columns = columns
        raise
    out[CACHE] = cache
    return out
