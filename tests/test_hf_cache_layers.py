"""NSA's cache layers in transformers' own DynamicCache and StaticCache, made from a model's configuration."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, DynamicCache, StaticCache
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, STATIC_LAYER_TYPE_MAPPING, StaticLayer

from hf_models import NSA, close, dense_model, make_model, make_sequences, nsa_of, pad
from nsa_torch.integrations.transformers import (
    CACHE,
    NSADynamicLayer,
    NSALlamaForCausalLM,
    NSAModelCache,
    NSAStaticLayer,
    families,
    use_nsa,
)

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = [torch.float64, torch.float32]
Make = Callable[[Any], Any]
MAKERS: dict[str, Make] = {
    "dynamic": lambda config: DynamicCache(config=config),
    "static": lambda config: StaticCache(config=config, max_cache_len=90),
}


@pytest.fixture(scope="module")
def model() -> NSALlamaForCausalLM:
    return make_model()


def generate(model: Any, ids: Tensor, mask: Tensor, **options: Any) -> Any:
    torch.manual_seed(2)
    return model.generate(ids, attention_mask=mask, **({"max_new_tokens": 20, "do_sample": False} | options))


@pytest.mark.parametrize("family", families.NAMES)
def test_configurations_make_caches_of_nsa_s_layers(family: str) -> None:
    assert DYNAMIC_LAYER_TYPE_MAPPING["nsa_attention"] is NSADynamicLayer
    assert STATIC_LAYER_TYPE_MAPPING["nsa_attention"] is NSAStaticLayer and issubclass(NSAStaticLayer, StaticLayer)
    model = use_nsa(dense_model(f"{family}ForCausalLM"), **NSA)
    assert model.config.layer_types == ["nsa_attention"] * 2
    for kind, layer in {"dynamic": NSADynamicLayer, "static": NSAStaticLayer}.items():
        cache = MAKERS[kind](model.config)
        assert [type(one) for one in cache.layers] == [layer, layer]
        assert cache.is_compileable == (kind == "static") and cache.is_croppable
        assert cache.get_seq_length() == 0 and cache.batch_size == -1 and not cache.is_initialized
        assert cache.get_max_length() == (90 if kind == "static" else -1)


def test_layer_types_are_not_saved_and_not_changed(tmp_path: Any) -> None:
    """Configurations saved before there were any, or with those of the family, load as well."""
    config = use_nsa(dense_model("Qwen3ForCausalLM"), **NSA).config
    assert "layer_types" not in config.to_dict()
    family = config.to_dict() | {"layer_types": ["full_attention", "full_attention"]}
    for saved in (type(config)(**family), type(config).from_dict(family)):
        assert saved.layer_types == ["nsa_attention"] * 2
        saved.save_pretrained(tmp_path)
        assert AutoConfig.from_pretrained(tmp_path).layer_types == ["nsa_attention"] * 2
        saved.num_hidden_layers = 3
        assert len(DynamicCache(config=saved)) == 3


@pytest.mark.parametrize("kind", MAKERS)
def test_a_sliding_window_of_the_family_does_not_shorten_the_cache(kind: str) -> None:
    """A layer of transformers for sliding windows holds no more than the window's columns."""
    model = use_nsa(dense_model("MistralForCausalLM", sliding_window=30), **NSA)
    ids, mask = pad(make_sequences([25, 11]), "left")
    cache = MAKERS[kind](model.config)
    out = generate(model, ids, mask, **{CACHE: cache})
    assert torch.equal(out, generate(model, ids, mask, use_cache=False)) and cache.get_seq_length() == 44


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", MAKERS)
def test_chunks_and_single_tokens_are_the_whole(kind: str, dtype: torch.dtype) -> None:
    model = make_model(dtype)
    ids = torch.stack(make_sequences([40, 40, 40]))
    expected = model(ids, use_cache=False).logits
    cache = MAKERS[kind](model.config)
    start, parts = 0, []
    for size in (17, 1, 1, 9, 1, 11):
        out = model(ids[:, start : start + size], **{CACHE: cache})
        assert out[CACHE] is cache
        parts.append(out.logits)
        start += size
        assert cache.get_seq_length() == cache.get_seq_length(1) == start and cache.batch_size == 3
    tolerance = close if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, **tolerance)


MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True},
    "beams": {"num_beams": 3},
    "num_return_sequences": {"do_sample": True, "num_return_sequences": 2},
    "assisted": {},
    "prompt lookup": {"prompt_lookup_num_tokens": 5},
    "chunks": {"prefill_chunk_size": 6},
    "reused": {},
    "left_padded": {},
    "right_padded": {},
    "repeated_prompt": {},
}


@torch.no_grad()
def prefilled(model: Any, ids: Tensor, mask: Tensor, make: Make, mode: str) -> Any:
    """A cache that has been through an earlier call of `generate`, or that holds a prompt repeated for all rows."""
    cache = make(model.config)
    if mode == "reused":
        generate(model, ids[:, :9], mask[:, :9], max_new_tokens=6, **{CACHE: cache})
        cache.crop(-5)
    elif mode == "repeated_prompt":
        model(ids[:1, :9], **{CACHE: cache})
        cache.batch_repeat_interleave(len(ids))
    return cache


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("mode", MODES)
def test_generation_is_that_without_a_cache(mode: str, kind: str, dtype: torch.dtype) -> None:
    model = make_model(dtype)
    sequences = make_sequences([25, 25, 25])
    if mode.endswith("padded"):
        sequences = [sequence[:length] for sequence, length in zip(sequences, (25, 9, 18), strict=True)]
    if mode in ("assisted", "prompt lookup"):
        sequences = sequences[:1]
    if mode in ("reused", "repeated_prompt"):  # rows that begin alike
        sequences = [torch.cat((sequences[0][:9], sequence[9:])) for sequence in sequences]
    ids, mask = pad(sequences, "right" if mode == "right_padded" else "left")
    options = dict(MODES[mode])
    without = {} if mode in ("prompt lookup", "chunks") else options
    expected = generate(model, ids, mask, use_cache=False, **without)
    if mode == "assisted":
        options["assistant_model"] = make_model(dtype, 5, num_hidden_layers=1)
    cache = prefilled(model, ids, mask, MAKERS[kind], mode)
    if kind == "static" and mode in ("assisted", "prompt lookup") and CACHE == "past_key_values":
        with pytest.raises(ValueError, match="not supported with Static cache"):  # by transformers before 5.24
            generate(model, ids, mask, **options, **{CACHE: cache})
        return
    assert torch.equal(generate(model, ids, mask, **options, **{CACHE: cache}), expected)
    layer = NSAStaticLayer if kind == "static" else NSADynamicLayer
    assert all(type(one) is layer for one in cache.layers) and len({id(one.state) for one in cache.layers}) == 1


@torch.no_grad()
@pytest.mark.parametrize("kind", MAKERS)
def test_before_a_model_has_seen_it_a_cache_remembers(model: NSALlamaForCausalLM, kind: str) -> None:
    ids = torch.stack(make_sequences([70, 70]))
    cache = MAKERS[kind](model.config)
    cache.crop(-3)
    cache.reset()
    cache.reorder_cache(torch.tensor([0]))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0]))
    with pytest.raises(ValueError, match="tokens_to_remove must be 0, or negative"):
        cache.crop(1)
    with pytest.raises(RuntimeError, match="must have been given to the whole model"):
        model.model.layers[0].self_attn(torch.zeros(2, 1, 32).double(), (torch.zeros(1, 1, 8),) * 2, cache)
    assert not cache.is_recording_past(0)
    cache.activate_past_recording()
    assert cache.is_recording_past(0)
    copied = copy.deepcopy(cache)
    for used in (cache, copied):
        assert used.get_seq_length() == 0
        model(ids[:, :5], **{CACHE: used})
        model(ids[:, 5:], **{CACHE: used})  # of a recorded step all can be taken back
        used.crop(-65)
        expected = model(ids, use_cache=False).logits[:, 5:]
        torch.testing.assert_close(model(ids[:, 5:], **{CACHE: used}).logits, expected, **close)
    assert cache.layers[0].state is not copied.layers[0].state


@torch.no_grad()
@pytest.mark.parametrize("seen", [False, True])
def test_early_initialization_makes_the_buffers(model: NSALlamaForCausalLM, seen: bool) -> None:
    cache = StaticCache(config=model.config, max_cache_len=30)
    if seen:
        model(torch.ones(2, 0, dtype=torch.long), **{CACHE: cache})
    cache.early_initialization(batch_size=2, num_heads=2, head_dim=8, dtype=torch.float64, device="cpu")
    assert cache.is_initialized and cache.batch_size == 2 and cache.get_seq_length() == 0
    ids = torch.stack(make_sequences([12, 12]))
    expected = model(ids, use_cache=False).logits
    torch.testing.assert_close(model(ids, **{CACHE: cache}).logits, expected, **close)
    assert nsa_of(cache).capacity == 30
    with pytest.raises(ValueError, match=f"{CACHE} must have the 3 rows of this call, got 2"):
        model(ids[[0, 0, 0]], **{CACHE: cache})
    wrong = StaticCache(config=model.config, max_cache_len=30)
    wrong.early_initialization(batch_size=2, num_heads=4, head_dim=8, dtype=torch.float64, device="cpu")
    with pytest.raises(ValueError, match=r"cache must have \(num_kv_heads, head_dim, v_head_dim\) \(2, 8, 8\)"):
        model(ids, **{CACHE: wrong})


@torch.no_grad()
def test_a_static_cache_is_of_its_length(model: NSALlamaForCausalLM) -> None:
    ids = torch.stack(make_sequences([30]))
    cache = StaticCache(config=model.config, max_cache_len=20)
    with pytest.raises(ValueError, match="max_length must be at least 30"):
        model(ids, **{CACHE: cache})
    assert cache.get_seq_length() == 0
    model(ids[:, :20], **{CACHE: cache})
    with pytest.raises(ValueError, match="max_length must be at least 21"):
        model(ids[:, 20:21], **{CACHE: cache})
    cache.crop(-2)
    expected = model(ids[:, :20], use_cache=False).logits[:, 18:]
    torch.testing.assert_close(model(ids[:, 18:20], **{CACHE: cache}).logits, expected, **close)


@torch.no_grad()
@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("where", ["model.layers.0.mlp", "model.layers.1.mlp", "lm_head"])
@pytest.mark.parametrize("held", [0, 12])
def test_a_call_that_fails_leaves_the_cache_as_it_was(kind: str, where: str, held: int) -> None:
    model = make_model()
    ids, mask = pad(make_sequences([held + 9, 5]), "left")
    cache = MAKERS[kind](model.config)
    if held:
        model(ids[:, :held], attention_mask=mask[:, :held], **{CACHE: cache})

    def fail(*args: Any) -> None:
        raise KeyboardInterrupt

    for end in (held + 8, held + 9):  # a chunk, then a single token
        before = cache.get_seq_length()
        step = {"input_ids": ids[:, before:end], "attention_mask": mask[:, :end], CACHE: cache}
        handle = model.get_submodule(where).register_forward_pre_hook(fail)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                model(**step)
            assert cache.get_seq_length() == before and cache.is_initialized == (before > 0)
        handle.remove()
        logits = model(**step).logits
    expected = model(ids, attention_mask=mask, use_cache=False).logits[:, -1:]
    torch.testing.assert_close(logits, expected, **close)


@torch.no_grad()
def test_an_empty_cache_of_another_configuration_takes_nsa_s_layers(model: NSALlamaForCausalLM) -> None:
    ids = torch.stack(make_sequences([12, 12]))
    expected = model(ids, use_cache=False).logits
    dense = dense_model("LlamaForCausalLM").config
    for cache in (DynamicCache(), DynamicCache(config=dense), StaticCache(config=dense, max_cache_len=20)):
        torch.testing.assert_close(model(ids, **{CACHE: cache}).logits, expected, **close)
        static = type(cache) is StaticCache
        assert all(type(layer) is (NSAStaticLayer if static else NSADynamicLayer) for layer in cache.layers)
    assert cache.get_max_length() == 20


@torch.no_grad()
def test_caches_of_all_kinds_hold_the_same(model: NSALlamaForCausalLM) -> None:
    """An NSAModelCache is a Cache of the same layers."""
    ids = torch.stack(make_sequences([30, 30]))
    caches = [make(model.config) for make in MAKERS.values()]
    caches += [NSAModelCache(model.config), NSAModelCache(model.config, max_length=90)]
    assert [type(cache.layers[0]) for cache in caches] == [NSADynamicLayer, NSAStaticLayer] * 2
    for cache in caches:
        model(ids, **{CACHE: cache})
    for other in caches[1:]:
        for one, two in zip(nsa_of(caches[0]), nsa_of(other), strict=True):
            for name, buffer in one.buffers().items():
                rows = min(buffer.size(1), two.buffers()[name].size(1))
                assert torch.equal(buffer[:, :rows], two.buffers()[name][:, :rows])


def test_the_example_of_the_documentation_runs() -> None:
    page = (Path(__file__).parents[1] / "docs" / "hugging_face.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(block, "hugging_face.md", "exec"), names)
    length = names["out"].size(1)  # it may end early
    assert 41 <= length <= 48 and names["cache"].get_seq_length() == length - 1
