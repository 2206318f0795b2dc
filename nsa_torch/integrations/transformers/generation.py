"""What the causal language models of all families share: `generate` with an NSAModelCache."""

from __future__ import annotations

import functools
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from . import peft
from .cache import NSAModelCache, adopt
from .compiled import call_compiled
from .modeling import CACHE, NSAPreTrained


class NSAForCausalLM(NSAPreTrained):
    """Before a family's causal language model, `dense_class`, among the bases; `base_class`: the family's NSAModel."""

    base_class: type[Any]
    dense_class: type[Any]
    config: Any
    _previous_max_cache_length = -1

    def __init__(self, config: Any):
        # The family's own would build the dense model: what it has besides is taken from one without weights.
        PreTrainedModel.__init__(self, config)
        plain = deepcopy(config)
        plain._attn_implementation = "eager"
        with torch.device("meta"):
            dense = self.dense_class(plain)
        vars(self).update({name: what for name, what in vars(dense).items() if name not in vars(self)})
        self.model = self.base_class(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=dense.lm_head.bias is not None)
        self.post_init()  # type: ignore[attr-defined]

    @functools.wraps(LlamaForCausalLM.forward)  # transformers reads its signature
    def forward(self, *args: Any, **kwargs: Any) -> CausalLMOutputWithPast:
        """As the family's model. A call that fails leaves the cache as it was."""
        other = "past_key_values" if CACHE == "cache" else "cache"
        if other in kwargs and CACHE not in kwargs:
            kwargs[CACHE] = kwargs.pop(other)
        given = args[3] if len(args) > 3 else kwargs.get(CACHE)
        state = None if given is None else adopt(given, self.config, CACHE)
        before = None if state is None else state.before()
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        except BaseException:
            if state is not None and before is not None and state.columns != before.columns:
                state.restore(before)
            raise

    def get_compiled_call(self, compile_config: Any) -> Any:
        """The model's call, compiled for steps of single tokens with a cache of fixed length; else as it is."""
        return functools.partial(call_compiled, self, super().get_compiled_call(compile_config))  # type: ignore[misc]

    def _valid_auto_compile_criteria(self, model_kwargs: dict[str, Any], generation_config: Any) -> bool:
        # Only when asked: the CUDA graphs of transformers' default have not been measured with these caches.
        if generation_config.compile_config is None:
            return False
        valid: bool = super()._valid_auto_compile_criteria(model_kwargs, generation_config)  # type: ignore[misc]
        return valid

    def _assisted_decoding(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        peft.check_prompt_learning(self, 0, None, assisted=True)
        if kwargs.get(CACHE) is not None:
            adopt(kwargs[CACHE], self.config, CACHE).starts_assisted = True
        return super()._assisted_decoding(input_ids, *args, **kwargs)  # type: ignore[misc]

    def _beam_search(
        self, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any, generation_config: Any, **kwargs: Any
    ) -> Any:
        given = kwargs.get(CACHE)
        returned = generation_config.return_dict_in_generate or hasattr(given, "_is_user_defined")
        state = adopt(given, self.config, CACHE) if given is not None and returned else None
        if state is not None:
            state.searching = True
        try:
            searched = super()._beam_search(  # type: ignore[misc]
                input_ids, logits_processor, stopping_criteria, generation_config, **kwargs
            )
        except BaseException:
            if state is not None:
                state.stop_search()
            raise
        if state is not None:
            sequences = searched if isinstance(searched, Tensor) else searched.sequences
            state.keep_sequences(sequences, input_ids.size(0) // generation_config.num_beams)
        return searched

    @functools.wraps(LlamaForCausalLM.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As the family's model."""
        cache, position_ids = kwargs.get(CACHE), kwargs.get("position_ids")
        state = None if cache is None else adopt(cache, self.config, CACHE)
        if state is not None:
            state.fed = input_ids if state.searching else None
            if state.starts_assisted:
                # Assisted decoding would feed all of its input, also what a given cache holds already.
                state.starts_assisted = False
                if position_ids is not None and position_ids.size(-1) == input_ids.size(1) > state.columns > 0:
                    kwargs["next_sequence_length"] = input_ids.size(1) - state.columns
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)  # type: ignore[misc]
        first = kwargs.get("is_first_iteration", False) or kwargs.get("next_sequence_length") is None
        if state is not None and state.columns > 0 and not first:
            inputs.pop("attention_mask", None)  # tokens that `generate` chose are real, and what is cached is known
        if CACHE in inputs and peft.wrapper(self) is not None:
            inputs["past_key_values"] = inputs.pop(CACHE)  # PEFT knows it by its old name alone
        return inputs

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], mode: Any, batch_size: int, max_cache_length: int
    ) -> None:
        """Make a cache for `generate`, unless one was given. "static" makes one of fixed length.

        A given one of the batch's rows gets as many as there are beams, or sequences to return, for each.
        """
        cache, implementation = model_kwargs.get(CACHE), generation_config.cache_implementation
        if implementation not in (None, "dynamic", "static"):
            raise ValueError(f"cache_implementation must be None, 'dynamic' or 'static', got {implementation!r}")
        max_cache_length += peft.num_virtual_tokens(self)
        if generation_config.use_cache:
            columns = 0 if cache is None else cache.get_seq_length()
            peft.check_prompt_learning(self, columns, generation_config.prefill_chunk_size, assisted=False)
        if cache is not None:
            state = adopt(cache, self.config, CACHE)
            if implementation is not None:
                raise ValueError(f"cache_implementation must be None with {CACHE}, got {implementation!r}")
            cache._is_user_defined = True
            repeats = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
            if repeats > 1 and state.batch_size == batch_size:
                cache.batch_repeat_interleave(repeats)
            return
        if not generation_config.use_cache:
            return
        options: dict[str, Any] = {"expected_length": max_cache_length}
        if implementation == "static":
            # Looking up the prompt drafts past the end.
            needed = max_cache_length + (generation_config.prompt_lookup_num_tokens or 0)
            # As long as the last one at least: what is compiled serves again.
            longest = max(needed, generation_config.max_cache_len or 0, self._previous_max_cache_length)
            options = {"max_length": longest}
            self._previous_max_cache_length = longest
        if not generation_config.return_dict_in_generate:
            options["max_crop"] = 0  # nobody gets it
        cache = model_kwargs[CACHE] = NSAModelCache(self.config, **options)
        if generation_config.is_assistant:
            cache.activate_past_recording()
