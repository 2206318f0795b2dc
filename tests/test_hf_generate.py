"""`generate` of the Hugging Face integration: with a cache, given or kept, the tokens are those without one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from hf_models import NSA, TEN_MODES, dense_model, dense_pair, make_model, make_sequences, pad
from nsa_torch.integrations.transformers import CACHE, NSALlamaForCausalLM, NSAModelCache, use_nsa

DTYPES = [torch.float64, torch.float32]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def model(request: pytest.FixtureRequest) -> NSALlamaForCausalLM:
    return make_model(request.param)


def generate(model: NSALlamaForCausalLM, ids: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    torch.manual_seed(2)
    options = {"max_new_tokens": 20, "do_sample": False} | options
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(ids, attention_mask=mask, **options)


MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 10},
    "beams": {"num_beams": 3},
    "sequences": {"do_sample": True, "num_return_sequences": 3},
    "beam_sequences": {"num_beams": 3, "num_return_sequences": 2},
    "static": {"cache_implementation": "static"},
    "chunks": {"prefill_chunk_size": 6},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_generation_with_the_cache_equals_without(model: NSALlamaForCausalLM, mode: str, side: str) -> None:
    lengths = [21, 21, 21] if side == "none" else [21, 4, 12]
    ids, mask = pad(make_sequences(lengths), "left" if side == "none" else side)
    options = MODES[mode]
    without = {name: value for name, value in options.items() if mode not in ("static", "chunks")}
    assert torch.equal(generate(model, ids, mask, **options), generate(model, ids, mask, use_cache=False, **without))


@torch.no_grad()
def reused(model: Any, ids: Tensor, mask: Tensor) -> dict[str, Any]:
    """A cache that an earlier call of `generate` returned."""
    out = generate(model, ids[:, :9], mask[:, :9], max_new_tokens=6, return_dict_in_generate=True)
    out[CACHE].crop(-5)
    return {CACHE: out[CACHE]}


@torch.no_grad()
def repeated(model: Any, ids: Tensor, mask: Tensor) -> dict[str, Any]:
    """A prompt's cache, filled once and repeated for all rows, which begin alike."""
    cache = NSAModelCache(model.config)
    model(ids[:1, :9], **{CACHE: cache})
    cache.batch_repeat_interleave(len(ids))
    return {CACHE: cache}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Qwen3ForCausalLM"])
@pytest.mark.parametrize("mode", TEN_MODES)
def test_ten_modes(mode: str, name: str, dtype: torch.dtype) -> None:
    model = use_nsa(dense_model(name), **NSA).to(dtype)
    sequences = make_sequences([25, 25, 25])
    if mode.endswith("padded"):
        sequences = [sequence[:length] for sequence, length in zip(sequences, (25, 9, 18), strict=True)]
    if mode == "assisted":
        sequences = sequences[:1]
    if mode in ("reused", "repeated_prompt"):  # rows that begin alike
        sequences = [torch.cat((sequences[0][:9], sequence[9:])) for sequence in sequences]
    ids, mask = pad(sequences, "right" if mode == "right_padded" else "left")
    options: dict[str, Any] = dict(TEN_MODES[mode])
    expected = generate(model, ids, mask, use_cache=False, **options)
    if mode == "assisted":
        options = {"assistant_model": use_nsa(dense_model(name), **NSA).to(dtype)}
    elif mode == "static":
        options = {"cache_implementation": "static"}
    elif mode in ("reused", "repeated_prompt"):
        options = (reused if mode == "reused" else repeated)(model, ids, mask)
        assert options[CACHE].get_seq_length() == 9
    assert torch.equal(generate(model, ids, mask, **options), expected)


@pytest.mark.parametrize("draft_seed", [0, 5], ids=["good_draft", "bad_draft"])
@pytest.mark.parametrize("length", [5, 40])
def test_assisted_generation_equals_greedy(model: NSALlamaForCausalLM, draft_seed: int, length: int) -> None:
    ids = make_sequences([length])[0][None]
    draft = make_model(model.dtype, draft_seed, num_hidden_layers=1 if draft_seed else 2)
    expected = generate(model, ids, max_new_tokens=40, use_cache=False)
    assert torch.equal(generate(model, ids, max_new_tokens=40, assistant_model=draft), expected)
    assert torch.equal(generate(model, ids, max_new_tokens=40, prompt_lookup_num_tokens=6), expected)
    cache = NSAModelCache(model.config, max_crop=0)
    with torch.no_grad():
        model(ids[:, :-1], **{CACHE: cache})
    assert torch.equal(generate(model, ids, max_new_tokens=40, assistant_model=draft, **{CACHE: cache}), expected)


@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("how", ["given", "returned"])
def test_a_cache_goes_on_over_three_turns(model: NSALlamaForCausalLM, how: str, side: str) -> None:
    ids, mask = pad(make_sequences([17, 17] if side == "none" else [17, 5]), "left")
    options: dict[str, Any] = {CACHE: NSAModelCache(model.config)} if how == "given" else {}
    for turn in range(3):
        expected = generate(model, ids, mask, use_cache=False)
        out = generate(model, ids, mask, return_dict_in_generate=True, **options)
        assert torch.equal(out.sequences, expected)
        options = {CACHE: out[CACHE]}
        assert out[CACHE].get_seq_length() == expected.size(1) - 1
        user, user_mask = pad(make_sequences([6, 6] if side == "none" else [3, 6], seed=turn), "left")
        ids = torch.cat((expected, user), dim=1)
        new = torch.ones_like(expected[:, mask.size(1) :])
        mask = torch.cat((mask, new, user_mask), dim=1)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_turns_and_crops_are_the_dense_model_s(side: str) -> None:
    # Behind padding on the right, transformers numbers new tokens differently in the next call: with a cache and
    # without are two things there, also in a dense model.
    runs = []
    for model in dense_pair():
        ids, mask = pad(make_sequences([17, 5]), side)
        options: dict[str, Any] = {}
        runs.append([])
        for turn in range(3):
            out = generate(model, ids, mask, max_new_tokens=8, return_dict_in_generate=True, **options)
            runs[-1].append(out.sequences)
            if turn > 0:
                out[CACHE].crop(-turn)
            options = {CACHE: out[CACHE]}
            user, user_mask = pad(make_sequences([3, 6], seed=turn), side)
            kept = out.sequences[:, : out.sequences.size(1) - turn]
            ids = torch.cat((kept, user), dim=1)
            mask = torch.cat((mask, torch.ones_like(kept[:, mask.size(1) :]), user_mask), dim=1)
    for dense, sparse in zip(*runs, strict=True):
        assert torch.equal(dense, sparse)


@pytest.mark.parametrize("mode", ["beams", "sequences", "beam_sequences"])
def test_a_cache_goes_on_with_more_rows(model: NSALlamaForCausalLM, mode: str) -> None:
    ids, mask = pad(make_sequences([17, 5]), "left")
    out = generate(model, ids, mask, return_dict_in_generate=True)
    new = torch.stack(make_sequences([6, 6], seed=1))
    ids, mask = torch.cat((out.sequences, new), dim=1), torch.cat((mask, mask.new_ones(2, 26)), dim=1)
    expected = generate(model, ids, mask, use_cache=False, **MODES[mode])
    assert torch.equal(generate(model, ids, mask, **MODES[mode], **{CACHE: out[CACHE]}), expected)


@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("stops", [False, True])
def test_a_cache_goes_on_after_beams(model: NSALlamaForCausalLM, side: str, stops: bool) -> None:
    ids, mask = pad(make_sequences([17, 17] if side == "none" else [17, 5]), "left")
    options: dict[str, Any] = {"return_dict_in_generate": True}
    given: dict[str, Any] = {}
    for turn, (beams, returned) in enumerate([(3, 1), (4, 2), (2, 1)]):
        options |= {"num_beams": beams, "num_return_sequences": returned, "max_new_tokens": 10}
        if stops:  # sequences that end early leave the search, and their rows
            options |= {"eos_token_id": [3, 12], "length_penalty": -1.0}
        expected = generate(model, ids, mask, use_cache=False, **options)
        out = generate(model, ids, mask, **options, **given)
        assert torch.equal(out.sequences, expected.sequences)
        cache = given[CACHE] = out[CACHE]
        assert cache.get_seq_length() in (0, expected.sequences.size(1) - 1) and (stops or cache.get_seq_length() > 0)
        if not stops:
            assert cache.batch_size == out.sequences.size(0)
        new = torch.stack(make_sequences([4] * out.sequences.size(0), seed=turn))
        ids = torch.cat((out.sequences, new), dim=1)
        mask = mask.repeat_interleave(returned, dim=0)
        mask = torch.cat((mask, mask.new_ones(len(ids), ids.size(1) - mask.size(1))), dim=1)


def test_only_the_new_tokens_need_to_be_given(model: NSALlamaForCausalLM) -> None:
    first, second = make_sequences([17, 9])
    cache = NSAModelCache(model.config)
    with torch.no_grad():
        model(first[None], **{CACHE: cache})
    ids = torch.cat((first, second))[None]
    out = generate(model, second[None], torch.ones_like(ids), **{CACHE: cache})
    assert torch.equal(out[0, 9:], generate(model, ids, use_cache=False)[0, 26:])


@pytest.mark.parametrize("side", ["none", "left"])
def test_a_prompt_cache_serves_several_continuations(model: NSALlamaForCausalLM, side: str) -> None:
    lengths = [30, 30] if side == "none" else [30, 18]
    prompt, prompt_mask = pad(make_sequences(lengths), "left")
    positions = (prompt_mask.cumsum(1) - 1).clamp(min=0)  # as `generate` numbers them
    cache = NSAModelCache(model.config)
    with torch.no_grad():
        model(prompt, attention_mask=prompt_mask, position_ids=positions, **{CACHE: cache})
    for seed, options in enumerate([{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 3}]):
        end = torch.stack(make_sequences([5, 5], seed=seed))
        ids, mask = torch.cat((prompt, end), 1), torch.cat((prompt_mask, torch.ones_like(end)), 1)
        used = copy.deepcopy(cache)
        used.batch_repeat_interleave(3 if options else 1)
        out = generate(model, ids, mask, **options, **{CACHE: used})
        assert torch.equal(out, generate(model, ids, mask, use_cache=False, **options))
        assert cache.get_seq_length() == 30


@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("back", [1, 7, 19])
def test_generation_goes_on_after_crop(model: NSALlamaForCausalLM, side: str, back: int) -> None:
    ids, mask = pad(make_sequences([26, 26] if side == "none" else [26, 11]), "left")
    out = generate(model, ids, mask, return_dict_in_generate=True)
    cache, ids = out[CACHE], out.sequences[:, :-1]
    mask = torch.cat((mask, torch.ones_like(ids[:, mask.size(1) :])), dim=1)
    assert cache.is_croppable and cache.get_seq_length() == ids.size(1)
    cache.crop(-back)
    assert cache.get_seq_length() == ids.size(1) - back
    user = torch.stack(make_sequences([4, 4], seed=3))
    ids, mask = torch.cat((ids[:, :-back], user), 1), torch.cat((mask[:, :-back], torch.ones_like(user)), 1)
    assert torch.equal(generate(model, ids, mask, **{CACHE: cache}), generate(model, ids, mask, use_cache=False))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_padded_generation_is_the_dense_model_s(side: str, use_cache: bool) -> None:
    dense, model = dense_pair()
    ids, mask = pad(make_sequences([21, 9, 14]), side)
    assert torch.equal(generate(model, ids, mask, use_cache=use_cache), generate(dense, ids, mask))


@pytest.mark.parametrize("kind", ["empty", "configured", "static"])
@pytest.mark.parametrize("side", ["none", "left"])
def test_caches_of_transformers_go_on(model: NSALlamaForCausalLM, kind: str, side: str) -> None:
    ids, mask = pad(make_sequences([17, 17] if side == "none" else [17, 5]), "left")
    make = {
        "empty": DynamicCache,
        "configured": lambda: DynamicCache(config=model.config),
        "static": lambda: StaticCache(config=model.config, max_cache_len=70),
    }
    cache = make[kind]()
    out = generate(model, ids, mask, return_dict_in_generate=True, **{CACHE: cache})
    assert out[CACHE] is cache and cache.get_seq_length() == 36 and len(cache) == 2
    assert (
        cache.is_croppable
        and cache.is_compileable == (kind == "static")
        and cache.is_linear == cache.is_sliding == [False, False]
    )
    assert cache.get_max_length() == (70 if kind == "static" else -1)
    assert torch.equal(out.sequences, generate(model, ids, mask, use_cache=False))
    cache.crop(-3)
    ids, new = out.sequences[:, :33], torch.stack(make_sequences([4, 4], seed=3))
    ids, mask = torch.cat((ids, new), dim=1), torch.cat((mask, mask.new_ones(2, 20)), dim=1)
    used = copy.deepcopy(cache)
    assert used.batch_size == 2
    used.batch_repeat_interleave(2)
    out = generate(model, ids, mask, num_beams=2, **{CACHE: used})
    assert torch.equal(out, generate(model, ids, mask, num_beams=2, use_cache=False))
    assert cache.get_seq_length() == 33 and used.get_seq_length() == 56
    out = generate(model, ids, mask, **{CACHE: cache})
    assert torch.equal(out, generate(model, ids, mask, use_cache=False))
    cache.reset()
    assert cache.get_seq_length() == 0


def test_generate_refuses_other_caches(model: NSALlamaForCausalLM) -> None:
    ids = torch.stack(make_sequences([12]))
    with pytest.raises(ValueError, match="cache_implementation must be None, 'dynamic' or 'static', got 'offloaded'"):
        generate(model, ids, cache_implementation="offloaded")
    held = DynamicCache()
    held.update(torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 8), 0)
    with pytest.raises(TypeError, match=f"{CACHE} must be an NSAModelCache, .* got DynamicCache"):
        generate(model, ids, **{CACHE: held})
    with pytest.raises(ValueError, match=f"cache_implementation must be None with {CACHE}"):
        generate(model, ids, cache_implementation="static", **{CACHE: NSAModelCache(model.config)})
    with pytest.raises(ValueError, match="max_length must be at least 13"):
        generate(model, ids, **{CACHE: NSAModelCache(model.config, max_length=12)})
