"""The cache and the masks of the Hugging Face integration: what transformers asks a cache, padding, failures."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from hf_models import (
    close,
    dense_pair,
    filled,
    make_model,
    make_sequences,
    pad,
)
from nsa_torch.integrations.transformers import CACHE, NSALlamaForCausalLM, NSAModelCache


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model() -> NSALlamaForCausalLM:
    return make_model()


def test_what_transformers_asks_a_cache_is_answered_truly(model: NSALlamaForCausalLM) -> None:
    cache = NSAModelCache(model.config)
    assert len(cache) == len(cache.layers) == 2
    assert not cache.is_initialized and cache.batch_size == -1 and cache.get_seq_length() == 0
    assert cache.is_linear == [False, False] and cache.is_sliding == [False, False]
    assert not cache.is_compileable and cache.is_croppable
    assert cache.get_max_length() == -1 and cache.get_max_length(1) == -1
    with torch.no_grad():
        model(torch.stack(make_sequences([9, 9, 9])), **{CACHE: cache})
    assert cache.is_initialized and cache.batch_size == 3
    assert cache.get_seq_length() == cache.get_seq_length(1) == cache.get_query_offset() == 9
    assert cache.get_mask_sizes(4, 0) == cache.get_mask_sizes(4, 1) == (13, 0)
    assert all(layer.is_initialized and layer.get_seq_length() == 9 for layer in cache.layers)
    fixed = NSAModelCache(model.config, max_length=20, max_crop=0)
    assert fixed.get_max_length() == fixed.get_max_length(0) == 20 and not fixed.is_croppable
    with pytest.raises(NotImplementedError, match="takes tokens from NSAAttention alone"):
        cache.update(torch.zeros(3, 2, 1, 8), torch.zeros(3, 2, 1, 8), 0)
    with pytest.raises(NotImplementedError, match="stays on its device"):
        cache.layers[0].offload()
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.is_initialized


@torch.no_grad()
def test_single_tokens_heed_the_mask(model: NSALlamaForCausalLM) -> None:
    dense, sparse = dense_pair()
    ids, mask = pad(make_sequences([9, 4, 7]), "left")
    steps = torch.stack(make_sequences([6, 6, 6], seed=3))
    real = torch.tensor([[1, 1, 0, 1, 1, 1], [0, 0, 1, 1, 0, 1], [1, 1, 1, 1, 1, 0]])
    positions = (torch.cat((mask, real), 1).cumsum(1) - 1).clamp(min=0)
    rows: list[list[Tensor]] = [[], [], []]
    caches = [DynamicCache(config=dense.config), NSAModelCache(sparse.config), NSAModelCache(model.config)]
    for row, cache, run in zip(rows, caches, (dense, sparse, model), strict=True):
        options: dict[str, Any] = {"position_ids": positions[:, :9], CACHE: cache}
        row.append(run(ids, attention_mask=mask, **options).logits)
        for step in range(6):
            options["position_ids"] = positions[:, 9 + step, None]
            seen = torch.cat((mask, real[:, : step + 1]), dim=1)
            row.append(run(steps[:, step, None], attention_mask=seen, **options).logits)
    logits = [torch.cat(row, dim=1) for row in rows]
    whole = torch.cat((mask, real), dim=1).bool()
    # A padding token, too, sees its row as in Llama; where the row is empty so far, there is nothing to compare.
    seen = whole.cumsum(1) > 0
    torch.testing.assert_close(logits[1][:, 8:][seen[:, 8:]], logits[0][:, 8:][seen[:, 8:]], **close)
    torch.testing.assert_close(logits[1][whole], logits[0][whole], **close)
    tokens = torch.cat((ids, steps), dim=1)
    assert caches[2].nsa.lengths.tolist() == whole.sum(1).tolist()
    for row in range(3):
        alone = model(tokens[row][whole[row]][None], use_cache=False).logits[0]
        torch.testing.assert_close(logits[2][row][whole[row]], alone, **close)


@torch.no_grad()
@pytest.mark.parametrize("lengths", [[21, 9, 0, 1], [8, 8, 3, 7]])
def test_padding_in_the_last_column_sees_its_row_with_a_cache_and_without(
    model: NSALlamaForCausalLM, lengths: list[int]
) -> None:
    ids, mask = pad(make_sequences(lengths), "right")
    whole = model(ids, attention_mask=mask, use_cache=False).logits
    cached = model(ids, attention_mask=mask, use_cache=True).logits
    torch.testing.assert_close(cached, whole, **close)
    cache = NSAModelCache(model.config, max_crop=3)
    for start in range(ids.size(1)):
        part = slice(start, start + 1)
        last = model(ids[:, part], attention_mask=mask[:, : start + 1], **{CACHE: cache}).logits
    torch.testing.assert_close(last[:, -1], whole[:, -1], **close)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_crop_takes_back_columns_of_padded_rows(model: NSALlamaForCausalLM, side: str) -> None:
    sequences = make_sequences([30, 12, 21])
    ids, mask = pad(sequences, side)
    cache = filled(model, ids, mask)
    steps = torch.stack(make_sequences([5, 5, 5], seed=4))
    for step in range(5):
        model(steps[:, step, None], **{CACHE: cache})
    assert cache.nsa.lengths.tolist() == [35, 17, 26]
    cache.crop(-2)
    cache.crop(-6)
    kept = mask[:, :27].sum(1)
    assert cache.get_seq_length() == 27 and cache.nsa.lengths.tolist() == kept.tolist()
    # A mask for all columns goes on after it.
    new = torch.stack(make_sequences([6, 6, 6], seed=5))
    positions = kept[:, None] + torch.arange(6) + (27 - kept[:, None] if side == "left" else 0)
    seen = torch.cat((mask[:, :27], torch.ones_like(new)), dim=1)
    logits = model(new, attention_mask=seen, position_ids=positions, **{CACHE: cache}).logits
    for row, sequence in enumerate(sequences):
        tokens = torch.cat((ids[row, :27][mask[row, :27].bool()], new[row]))
        expected = model(tokens[None], use_cache=False).logits[0, -6:]
        torch.testing.assert_close(logits[row], expected, **close)
        assert len(sequence) == mask[row].sum()
    cache.crop(-100)
    assert cache.get_seq_length() == 0 and cache.nsa.lengths.tolist() == [0, 0, 0]


@torch.no_grad()
def test_crop_is_exact_or_refused(model: NSALlamaForCausalLM) -> None:
    ids = make_sequences([60])[0][None]
    cache = filled(model, ids, max_crop=4)
    before = copy.deepcopy(cache)
    for wrong in (3, 60):
        with pytest.raises(ValueError, match="tokens_to_remove must be 0, or negative"):
            cache.crop(wrong)
    with pytest.raises(TypeError, match="tokens_to_remove must be an int, got float"):
        cache.crop(-1.5)
    with pytest.raises(ValueError, match="max_crop = 4"):
        cache.crop(-30)
    assert cache.get_seq_length() == 60 and cache.nsa.lengths.tolist() == [60]
    cache.crop(0)
    cache.crop(-4)
    more = make_sequences([30], seed=6)[0][None]
    for used, start in ((cache, 56), (before, 60)):
        expected = model(torch.cat((ids[:, :start], more), 1), use_cache=False).logits[:, start:]
        torch.testing.assert_close(model(more, **{CACHE: used}).logits, expected, **close)
    # Steps that are recorded can be taken back whole.
    before.activate_past_recording()
    length = before.get_seq_length()
    for size in (5, 90, 70):
        model(make_sequences([size], seed=size)[0][None], **{CACHE: before})
        before.crop(-size)
    ids = torch.cat((ids, more), dim=1)
    assert before.get_seq_length() == length == ids.size(1)
    last = make_sequences([40], seed=7)[0][None]
    expected = model(torch.cat((ids, last), 1), use_cache=False).logits[:, length:]
    torch.testing.assert_close(model(last, **{CACHE: before}).logits, expected, **close)


@torch.no_grad()
@pytest.mark.parametrize("length", [5, 300])
def test_rows_are_repeated_and_selected(model: NSALlamaForCausalLM, length: int) -> None:
    ids, mask = pad(make_sequences([length, 3]), "left")
    cache = filled(model, ids, mask)
    cache.batch_repeat_interleave(2)
    assert cache.batch_size == 4
    cache.batch_select_indices(torch.tensor([False, True, True, True]))
    cache.reorder_cache(torch.tensor([1, 0, 2]))
    cache.batch_select_indices(torch.tensor([1, 0]))
    assert cache.batch_size == 2 and cache.nsa.lengths.tolist() == [length, 3]
    cache.crop(-1)
    assert cache.nsa.lengths.tolist() == [length - 1, 2]
    new = torch.stack(make_sequences([9, 9], seed=8))
    logits = model(new, **{CACHE: cache}).logits
    for row in range(2):
        tokens = torch.cat((ids[row, :-1][mask[row, :-1].bool()], new[row]))
        torch.testing.assert_close(logits[row], model(tokens[None], use_cache=False).logits[0, -9:], **close)


@torch.no_grad()
@pytest.mark.parametrize("where", ["model.layers.0.mlp", "model.layers.1.mlp", "model.norm", "lm_head"])
@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("held", [0, 23])
def test_a_call_that_fails_leaves_the_cache_as_it_was(where: str, error: type[BaseException], held: int) -> None:
    model = make_model()
    ids, mask = pad(make_sequences([held + 9, 5]), "left")
    cache = NSAModelCache(model.config)
    if held:
        model(ids[:, :held], attention_mask=mask[:, :held], **{CACHE: cache})

    def fail(*args: Any) -> None:
        raise error

    for end in (held + 8, held + 9):  # a chunk, then a single token
        name = CACHE if held else {"cache": "past_key_values"}.get(CACHE, "cache")  # either name, in any version
        step = {"input_ids": ids[:, cache.get_seq_length() : end], "attention_mask": mask[:, :end], name: cache}
        before = cache.get_seq_length()
        module: nn.Module = model.get_submodule(where)
        handle = module.register_forward_pre_hook(fail)
        for _ in range(2):
            with pytest.raises(error):
                model(**step)
            assert cache.get_seq_length() == before
            if cache.nsa is not None:
                assert cache.nsa.lengths.tolist() == mask[:, :before].sum(1).tolist()
        handle.remove()
        logits = model(**step).logits
    expected = model(ids, attention_mask=mask, use_cache=False).logits[:, -1:]
    torch.testing.assert_close(logits, expected, **close)


def documents(lengths: list[int]) -> tuple[Tensor, Tensor]:
    """ids and position_ids (1, T) of documents in one row."""
    sequences = make_sequences(lengths)
    return torch.cat(sequences)[None], torch.cat([torch.arange(len(sequence)) for sequence in sequences])[None]


@pytest.mark.parametrize("compiled", [False, True])
def test_documents_of_a_row_are_separate(model: NSALlamaForCausalLM, compiled: bool) -> None:
    parts = [documents([20, 1, 9, 15]), documents([45]), documents([1, 1, 43])]
    ids, positions = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    expected = model(ids, position_ids=positions, use_cache=False, attention_mask=None).logits
    logits = run(ids, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(logits, expected, **close)
    for row, lengths in enumerate([[20, 1, 9, 15], [45], [1, 1, 43]]):
        pieces = zip(ids[row].split(lengths), logits[row].split(lengths), strict=True)
        for document, part in pieces:
            torch.testing.assert_close(part, model(document[None], use_cache=False).logits[0], **close)


@torch.no_grad()
def test_documents_of_a_row_with_a_mask_of_ones(model: NSALlamaForCausalLM) -> None:
    ids = torch.stack(make_sequences([30, 30]))
    positions = torch.cat((torch.arange(12), torch.arange(18))).expand(2, -1)
    options: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "use_cache": False}
    logits = model(ids, position_ids=positions, **options).logits
    for part in (slice(0, 12), slice(12, 30)):
        torch.testing.assert_close(logits[:, part], model(ids[:, part], use_cache=False).logits, **close)
    run = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = model(ids, use_cache=False).logits
    torch.testing.assert_close(run(ids, position_ids=torch.arange(30)[None], **options).logits, expected, **close)
    with pytest.raises(RuntimeError, match="attention_mask must be None, or cu_seq_lens_q given"):
        run(ids, position_ids=positions, **options)


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
def test_compiled_steps_with_a_cache(padded: bool) -> None:
    model = make_model()
    torch._dynamo.reset()
    run = torch.compile(model, fullgraph=not padded, backend="aot_eager")
    ids, mask = pad(make_sequences([20, 12 if padded else 20]), "left")
    cache = NSAModelCache(model.config, max_length=32)
    expected = model(ids, attention_mask=mask, use_cache=False).logits
    model(ids[:, :15], attention_mask=mask[:, :15] if padded else None, **{CACHE: cache})
    for column in range(15, 20):
        seen = mask[:, : column + 1] if padded and column < 18 else None
        logits = run(ids[:, column, None], attention_mask=seen, **{CACHE: cache}).logits
        torch.testing.assert_close(logits[:, 0], expected[:, column], **close)
        assert cache.get_seq_length() == column + 1
    assert cache.nsa.lengths.tolist() == mask.sum(1).tolist()
