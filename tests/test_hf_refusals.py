"""What the Hugging Face integration refuses: inputs, masks and caches that do not fit, before anything happens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Cache, DynamicCache, QuantizedCache, StaticCache

from hf_models import close, dense_model, filled, make_model, make_sequences, pad
from nsa_torch.integrations.transformers import CACHE, NSALlamaForCausalLM, NSAModelCache

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model() -> NSALlamaForCausalLM:
    return make_model()


@torch.no_grad()
def test_inputs_are_refused_before_anything_happens(model: NSALlamaForCausalLM) -> None:
    ids = torch.stack(make_sequences([12, 12]))
    cache = filled(model, ids)
    new: dict[str, Any] = {"input_ids": ids[:, :3], CACHE: cache}
    for shape in ((2, 3), (2, 14), (3, 15), (15,), (2, 1, 3, 15)):
        with pytest.raises(ValueError, match=r"attention_mask must be \(B, T\) = \(2, 15\) ones and zeros"):
            model(**new, attention_mask=torch.ones(shape))
    for shape in ((2, 11), (2, 13)):
        with pytest.raises(ValueError, match=r"attention_mask must be \(B, T\) = \(2, 12\)"):
            model(ids, attention_mask=torch.ones(shape), use_cache=False)
    changed = torch.ones(2, 15)
    changed[1, 4] = 0
    with pytest.raises(ValueError, match="attention_mask must be for the 12 cached columns what it was"):
        model(**new, attention_mask=changed)
    for name in ("input_ids", "attention_mask", "position_ids", "cu_seq_lens_q"):
        with pytest.raises(TypeError, match=f"{name} must be a tensor, got list"):
            model(**({"input_ids": ids} | {name: [[1, 1]]}))
    ends = torch.tensor([0, 5, 12], dtype=torch.int32)
    with pytest.raises(ValueError, match=f"cu_seq_lens_q must be None with {CACHE}"):
        model(**new, cu_seq_lens_q=ends)
    with pytest.raises(ValueError, match="attention_mask must be None with cu_seq_lens_q"):
        model(ids[:1], cu_seq_lens_q=ends, attention_mask=torch.ones(1, 12))
    with pytest.raises(ValueError, match="position_ids must rise within a row"):
        model(ids, position_ids=torch.arange(12)[None] % 5)
    assert cache.get_seq_length() == 12 and cache.nsa.lengths.tolist() == [12, 12]
    # A longer mask, as for a cache of fixed length, is read as far as there are columns.
    expected = model(torch.cat((ids, ids[:, :3]), 1), use_cache=False).logits[:, 12:]
    torch.testing.assert_close(model(**new, attention_mask=torch.ones(2, 40)).logits, expected, **close)


@torch.no_grad()
def test_caches_that_do_not_fit_are_refused(model: NSALlamaForCausalLM) -> None:
    ids, mask = pad(make_sequences([12, 7]), "left")
    for layers in (1, 3):
        cache = NSAModelCache(make_model(num_hidden_layers=layers).config)
        with pytest.raises(ValueError, match=f"{CACHE} must have the 2 layers of this call, got {layers}"):
            model(ids, **{CACHE: cache})
    cache = filled(model, ids, mask)
    for options in ({}, {"attention_mask": torch.ones(1, 13)}):
        with pytest.raises(ValueError, match=f"{CACHE} must have the 1 rows of this call, got 2"):
            model(ids[:1, :1], **options, **{CACHE: cache})
    with pytest.raises(ValueError, match="cache must have window 10, got 20"):
        model(ids, **{CACHE: NSAModelCache(make_model(window=20).config)})
    with pytest.raises(TypeError, match="max_length must be an int, got float"):
        NSAModelCache(model.config, max_length=16.5)
    for name in ("max_length", "max_crop", "expected_length"):
        with pytest.raises(ValueError, match=f"{name} must be at least"):
            NSAModelCache(model.config, **{name: -1})


def test_attention_weights_are_refused(model: NSALlamaForCausalLM) -> None:
    ids = torch.stack(make_sequences([12]))
    with pytest.raises(ValueError, match="output_attentions must be False"):
        model(ids, output_attentions=True)
    with pytest.raises(ValueError, match="output_attentions must be False"):
        model.generate(ids, output_attentions=True, return_dict_in_generate=True, max_new_tokens=2)
    out = model(ids, output_hidden_states=True)
    assert len(out.hidden_states) == 3


def test_documents_beside_a_mask_are_never_joined(model: NSALlamaForCausalLM) -> None:
    """Not by a cache that a call without gradients makes by itself, and not where another row is padded."""
    ids = torch.stack(make_sequences([24, 24]))
    positions = torch.cat((torch.arange(10), torch.arange(14)))[None].expand(2, -1)
    ones = torch.ones(2, 24, dtype=torch.long)
    with torch.no_grad(), pytest.raises(ValueError, match="position_ids must rise within a row"):
        model(ids, attention_mask=ones, position_ids=positions)
    padded = ones.clone()
    padded[1, :3] = 0
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients), pytest.raises(ValueError, match="attention_mask must have no padding"):
            model(ids, attention_mask=padded, position_ids=positions, use_cache=False)
    # Positions as generate counts them are no documents.
    counted = (padded.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        model(ids, attention_mask=padded, position_ids=counted)


def test_two_caches_are_refused(model: NSALlamaForCausalLM) -> None:
    ids = torch.stack(make_sequences([12]))
    with torch.no_grad():
        caches = {name: filled(model, ids) for name in ("cache", "past_key_values")}
        with pytest.raises(ValueError, match="cache must be None with past_key_values"):
            model.model(ids, **caches)
    assert [cache.get_seq_length() for cache in caches.values()] == [12, 12]


def test_what_caches_cannot_do_is_refused_by_name(model: NSALlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.stack(make_sequences([12]))
    monkeypatch.setattr(torch, "Stream", lambda *args, **kwargs: None)  # torch has none without a GPU
    for make in (DynamicCache, StaticCache):
        sizes = {} if make is DynamicCache else {"max_cache_len": 50}
        cache = make(config=model.config, offloading=True, **sizes)
        with (
            torch.no_grad(),
            pytest.raises(TypeError, match=f"without offloading, got {make.__name__} with offloading"),
        ):
            model(ids, **{CACHE: cache})
        with pytest.raises(TypeError, match="with offloading"):
            model.generate(ids, **{CACHE: cache})
    with pytest.raises(ValueError, match="nsa_attention"):
        QuantizedCache("quanto", model.config)
    for name, value in {"offloaded": "offloaded", "quantized": "quantized"}.items():
        with pytest.raises(
            ValueError, match=f"cache_implementation must be None, 'dynamic' or 'static', got '{value}'"
        ):
            model.generate(ids, cache_implementation=name)
    # Of a static layer with a sliding window nobody knows the length that was asked for.
    sliding = dense_model("MistralForCausalLM", sliding_window=8).config
    cache = StaticCache(config=sliding, max_cache_len=50)
    with torch.no_grad(), pytest.raises(TypeError, match="got StaticCache of StaticSlidingWindowLayer"):
        model(ids, **{CACHE: cache})
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    with torch.no_grad():
        for cache in caches:
            model(ids, **{CACHE: cache})
        mixed = Cache(layers=[caches[0].layers[0], caches[1].layers[1]])
        with pytest.raises(TypeError, match=f"{CACHE} must have layers of one cache, got those of 2"):
            model(ids, **{CACHE: mixed})
    with pytest.raises(NotImplementedError, match="takes tokens from NSAAttention alone"):
        caches[0].update(torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 1, 8), 0)
