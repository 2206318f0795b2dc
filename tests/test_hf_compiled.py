"""Compiled decoding of the Hugging Face integration with caches of fixed length: the tokens of generation without."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CompileConfig, StaticCache

from hf_models import close, make_model, make_sequences, nsa_of, pad
from nsa_torch.integrations.transformers import CACHE, NSAModelCache

pytestmark = pytest.mark.usefixtures("one_thread")


class Backend:
    """Counts graphs and their runs; can fail at a run, before or after it."""

    def __init__(self) -> None:
        torch._dynamo.reset()
        self.inputs: list[list[Any]] = []
        self.runs = 0
        self.fails_at: int | None = None
        self.after = False

    def __deepcopy__(self, memo: Any) -> Backend:
        return self  # `generate` copies its options

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        self.inputs.append(inputs)

        def run(*args: Any) -> Any:
            self.runs += 1
            failing = self.runs == self.fails_at
            if failing and not self.after:
                raise MemoryError
            out = graph.forward(*args)
            if failing:
                raise MemoryError
            return out

        return run


def generate(model: Any, ids: Tensor, mask: Tensor, backend: Backend | None = None, **options: Any) -> Tensor:
    torch.manual_seed(2)
    if backend is not None:
        options["compile_config"] = compiled_config(backend)
    return model.generate(ids, attention_mask=mask, **({"max_new_tokens": 12, "do_sample": False} | options))


def compiled_config(backend: Backend) -> CompileConfig:
    config = CompileConfig(backend=backend, mode=None, fullgraph=True)
    config._compile_all_devices = True
    return config


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("options", [{}, {"shared_kv": True, "kv_conv": 3}], ids=str)
def test_one_graph_serves_all_steps_of_all_caches(options: dict[str, Any], dtype: torch.dtype) -> None:
    model, backend = make_model(dtype, **options), Backend()
    for lengths, side in (([25, 25, 25], "left"), ([25, 9, 18], "left"), ([25, 9, 18], "right")):
        ids, mask = pad(make_sequences(lengths), side)
        expected = generate(model, ids, mask, use_cache=False)
        assert torch.equal(generate(model, ids, mask, backend, cache_implementation="static"), expected)
        shorter = generate(model, ids, mask, backend, cache_implementation="static", max_new_tokens=5)
        assert torch.equal(shorter, expected[:, :30])
    assert len(backend.inputs) == 1 and backend.runs == 3 * (11 + 4)
    assert all(isinstance(one, Tensor) for one in backend.inputs[0])  # no number changes: CUDA graphs can replay it


@pytest.mark.parametrize(
    "mode",
    [{"do_sample": True}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}, {"prefill_chunk_size": 6}],
    ids=str,
)
def test_other_modes(mode: dict[str, Any]) -> None:
    model, backend = make_model(), Backend()
    ids, mask = pad(make_sequences([25, 9]), "left")
    without = {} if "prefill_chunk_size" in mode else mode
    expected = generate(model, ids, mask, use_cache=False, **without)
    assert torch.equal(generate(model, ids, mask, backend, cache_implementation="static", **mode), expected)
    assert len(backend.inputs) <= 1


@pytest.mark.skipif(CACHE == "past_key_values", reason="transformers before 5.24 takes no StaticCache there")
def test_drafts_run_as_they_are() -> None:
    model, backend = make_model(), Backend()
    ids = make_sequences([25])[0][None]
    mask = torch.ones_like(ids)
    expected = generate(model, ids, mask, use_cache=False)
    for options in ({"assistant_model": make_model(seed=5, num_hidden_layers=1)}, {"prompt_lookup_num_tokens": 5}):
        for _ in range(2):
            static = options | {"cache_implementation": "static"}
            assert torch.equal(generate(model, ids, mask, backend, **static), expected)
    assert model._previous_max_cache_length == 37 + 5 - 1


def test_a_given_cache_goes_on_after_crop_and_copies() -> None:
    model, backend = make_model(), Backend()
    ids, mask = pad(make_sequences([25, 9]), "left")
    for make in (lambda: StaticCache(config=model.config, max_cache_len=80), lambda: NSAModelCache(model.config, 80)):
        cache, text, seen = make(), ids, mask
        for turn in range(3):
            expected = generate(model, text, seen, use_cache=False)
            out = generate(model, text, seen, backend, **{CACHE: cache})
            assert torch.equal(out, expected)
            assert cache.get_seq_length() == out.size(1) - 1
            assert nsa_of(cache).lengths.tolist() == [cache.get_seq_length(), cache.get_seq_length() - 16]
            copied = copy.deepcopy(cache)
            cache.crop(-3)
            new = torch.stack(make_sequences([4, 4], seed=turn))
            text = torch.cat((out[:, : out.size(1) - 4], new), dim=1)
            seen = torch.cat((seen, seen.new_ones(2, text.size(1) - seen.size(1))), dim=1)
            longer = torch.cat((out, new), dim=1)
            ones = torch.cat((seen, seen.new_ones(2, longer.size(1) - seen.size(1))), dim=1)
            expected = generate(model, longer, ones, use_cache=False, max_new_tokens=6)
            assert torch.equal(generate(model, longer, ones, backend, max_new_tokens=6, **{CACHE: copied}), expected)
    assert len(backend.inputs) == 1


@pytest.mark.parametrize("after", [False, True])
def test_a_step_that_fails_leaves_the_cache_as_it_was(after: bool) -> None:
    model, backend = make_model(), Backend()
    ids, mask = pad(make_sequences([25, 9]), "left")
    cache = StaticCache(config=model.config, max_cache_len=60)
    backend.fails_at, backend.after = 6, after
    with pytest.raises(MemoryError):
        generate(model, ids, mask, backend, **{CACHE: cache})
    assert cache.get_seq_length() == 30 and nsa_of(cache).lengths.tolist() == [30, 14]
    expected = generate(model, ids, mask, use_cache=False)
    mask = torch.cat((mask, mask.new_ones(2, 6)), dim=1)
    rest = generate(model, expected[:, :31], mask, backend, max_new_tokens=6, **{CACHE: cache})
    assert torch.equal(rest, expected)


@torch.no_grad()
@pytest.mark.parametrize("removed", [2, 3])
def test_crop_after_a_step_that_failed_is_exact_or_refused(removed: int) -> None:
    """What the step wrote to the rings counts as reached."""
    model, backend = make_model(window=4, block_size=4), Backend()
    ids = torch.stack(make_sequences([41, 41]))
    cache = NSAModelCache(model.config, max_length=60, max_crop=2)
    model(ids[:, :40], **{CACHE: cache})
    call = model.get_compiled_call(compiled_config(backend))
    backend.fails_at, backend.after = 1, True
    with pytest.raises(MemoryError):
        call(input_ids=ids[:, 40:], position_ids=torch.tensor([[40]]), **{CACHE: cache})
    assert cache.get_seq_length() == 40 and nsa_of(cache).lengths.tolist() == [40, 40]
    if removed == 3:
        with pytest.raises(ValueError, match="max_crop = 2"):
            cache.crop(-3)
    else:
        cache.crop(-2)
    start = cache.get_seq_length()
    new = torch.stack(make_sequences([9, 9], seed=4))
    expected = model(torch.cat((ids[:, :start], new), 1), use_cache=False).logits[:, start:]
    torch.testing.assert_close(model(new, **{CACHE: cache}).logits, expected, **close)


def test_a_step_that_does_not_fit_is_refused_before_it_runs() -> None:
    model, backend = make_model(), Backend()
    ids, mask = pad(make_sequences([25, 9]), "left")
    cache = StaticCache(config=model.config, max_cache_len=30)
    with pytest.raises(ValueError, match="max_length must be at least 31"):
        generate(model, ids, mask, backend, **{CACHE: cache})
    assert backend.runs == 5 and cache.get_seq_length() == 30 and nsa_of(cache).lengths.tolist() == [30, 14]


def test_what_cannot_be_a_step_of_the_graph_runs_as_it_is() -> None:
    """Growing caches, chunks, masks; and nothing is compiled unasked."""
    model, backend = make_model(), Backend()
    ids, mask = pad(make_sequences([25, 9]), "left")
    expected = generate(model, ids, mask, use_cache=False)
    assert torch.equal(generate(model, ids, mask, backend), expected)
    config = model.generation_config
    assert not model._valid_auto_compile_criteria({CACHE: StaticCache(config=model.config, max_cache_len=9)}, config)
    call = model.get_compiled_call(compiled_config(backend))
    cache = StaticCache(config=model.config, max_cache_len=60)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        whole = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        for start, end in ((0, 20), (20, 21), (21, 24), (24, 25)):
            part = slice(start, end)
            given = {"attention_mask": mask[:, :end], "position_ids": positions[:, part], CACHE: cache}
            logits = call(input_ids=ids[:, part], **given).logits
            torch.testing.assert_close(logits[:, -1], whole[:, end - 1])
        with pytest.raises(ValueError, match="must have the 1 rows of this call, got 2"):
            call(input_ids=ids[:1, :1], position_ids=positions[:1, :1], **{CACHE: cache})
        assert not backend.inputs
        out = call(input_ids=ids[:, :1], position_ids=positions[:, -1:] + 1, **{CACHE: cache})
    assert len(backend.inputs) == 1 and out[CACHE] is cache and cache.get_seq_length() == 26
