"""examples/hf_llama.py: NSA in a Hugging Face Llama. Padded, cached and packed runs against each sequence run alone."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from hf_models import (
    LLAMA,
    NSA,
    close,
    dense_pair,
    make_model,
    make_sequences,
    pad,
)
from nsa_torch.integrations.transformers import CACHE, NSALlamaConfig, NSALlamaForCausalLM, NSAModelCache

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import hf_llama


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors this small only make threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model() -> NSALlamaForCausalLM:
    return make_model()


LENGTHS = [45, 1, 7, 0, 8, 31]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch_equals_each_sequence_alone(model: NSALlamaForCausalLM, side: str) -> None:
    sequences = make_sequences(LENGTHS)
    ids, mask = pad(sequences, side)
    labels = ids.masked_fill(mask.cumsum(1) * mask <= 1, -100)  # padding, and first tokens, which only padding precedes

    model.zero_grad()
    out = model(ids, attention_mask=mask, labels=labels)
    out.loss.backward()
    assert getattr(out, CACHE) is None
    gradients = [weight.grad.clone() for weight in model.parameters()]

    model.zero_grad()
    predicted = sum(max(len(sequence) - 1, 0) for sequence in sequences)
    for sequence, row, real in zip(sequences, out.logits, mask.bool(), strict=True):
        if len(sequence) > 0:
            alone = model(sequence[None]).logits[0]
            torch.testing.assert_close(row[real], alone, **close)
            if len(sequence) > 1:
                (torch.nn.functional.cross_entropy(alone[:-1], sequence[1:], reduction="sum") / predicted).backward()
    for gradient, weight in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, weight.grad, **close)


def test_packed_sequences_equal_each_alone(model: NSALlamaForCausalLM) -> None:
    sequences = make_sequences([45, 1, 7, 31])
    ends = torch.tensor([0] + [len(sequence) for sequence in sequences]).cumsum(0).int()
    positions = torch.cat([torch.arange(len(sequence)) for sequence in sequences])
    packed = {"input_ids": torch.cat(sequences)[None], "position_ids": positions[None], "use_cache": False}
    logits = model(**packed, cu_seq_lens_q=ends, cu_seq_lens_k=ends, max_length_q=45, max_length_k=45).logits[0]
    for sequence, part in zip(sequences, logits.split([len(sequence) for sequence in sequences]), strict=True):
        torch.testing.assert_close(part, model(sequence[None]).logits[0], **close)
    torch.testing.assert_close(model(**packed).logits[0], logits, **close)


def test_greedy_generation_equals_full_forward(model: NSALlamaForCausalLM) -> None:
    ids = torch.stack(make_sequences([21, 21, 21]))
    out = model.generate(ids, max_new_tokens=30, do_sample=False)
    assert isinstance(out, Tensor)
    with torch.no_grad():
        for _ in range(30):
            ids = torch.cat((ids, model(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(out, ids)


def test_left_padded_generation_equals_each_alone(model: NSALlamaForCausalLM) -> None:
    sequences = make_sequences([33, 1, 8, 15])
    ids, mask = pad(sequences, "left")
    out = model.generate(ids, attention_mask=mask, max_new_tokens=25, do_sample=False)
    for sequence, row in zip(sequences, out[:, ids.size(1) :], strict=True):
        alone = model.generate(sequence[None], max_new_tokens=25, do_sample=False)[0, len(sequence) :]
        assert torch.equal(row, alone)


@torch.no_grad()
def test_cache_continues_a_right_padded_batch_in_chunks(model: NSALlamaForCausalLM) -> None:
    sequences = make_sequences([40, 23, 31])
    first = [sequence[:length] for sequence, length in zip(sequences, (17, 5, 1), strict=True)]
    ids, mask = pad(first, "right")
    out = model(ids, attention_mask=mask, use_cache=True)
    cache = getattr(out, CACHE)
    assert isinstance(cache, NSAModelCache) and cache.get_seq_length() == 17 and cache.get_max_length() == -1
    assert cache.nsa is not None and cache.nsa.lengths.tolist() == [17, 5, 1]

    rest = [sequence[len(part) :] for sequence, part in zip(sequences, first, strict=True)]
    rest_ids, rest_mask = pad(rest, "right")
    positions = mask.sum(1, keepdim=True) + torch.arange(rest_ids.size(1))
    masks = torch.cat((mask, rest_mask), dim=1)
    out = model(rest_ids, attention_mask=masks, position_ids=positions, **{CACHE: cache})
    assert cache.nsa.lengths.tolist() == [40, 23, 31]
    for sequence, part, row in zip(sequences, rest, out.logits, strict=True):
        full = model(sequence[None], use_cache=False).logits[0, -len(part) :]
        torch.testing.assert_close(row[: len(part)], full, **close)

    cache.reset()
    assert cache.get_seq_length() == 0
    again = model(ids, attention_mask=mask, **{CACHE: cache}).logits
    torch.testing.assert_close(again[0], model(first[0][None]).logits[0], **close)


def test_training_lowers_the_loss_and_checkpointing_keeps_gradients() -> None:
    model = make_model(initializer_range=0.05).train()
    ids = torch.stack(make_sequences([12] * 4)).repeat(1, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses, gradients = [], []
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            newest = hasattr(model, "activation_checkpointing_enable")
            (model.activation_checkpointing_enable if newest else model.gradient_checkpointing_enable)()
        model(ids, labels=ids).loss.backward()
        gradients.append([weight.grad.clone() for weight in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, **close)
    for _ in range(12):
        loss = model(ids, labels=ids).loss
        losses.append(loss.item())
        model.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("compression", ["mlp", "linear", "mean"])
def test_saved_model_loads_with_the_same_logits(tmp_path: Path, compression: str) -> None:
    model = make_model(compression=compression)
    ids = torch.stack(make_sequences([30]))
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64, output_loading_info=True)
    assert isinstance(loaded, NSALlamaForCausalLM)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert loaded.config.nsa_options() == model.config.nsa_options()
    for one, other in zip(loaded.parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, **close)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half(ids).logits.dtype == torch.bfloat16
    assert half.generate(ids, max_new_tokens=4).shape == (1, 34)


@pytest.mark.parametrize(("lengths", "backend"), [([30, 30], "inductor"), ([30, 21], "aot_eager")])
def test_compiled_training_step_has_no_graph_break_and_the_same_gradients(lengths: list[int], backend: str) -> None:
    model = make_model().train()
    ids, mask = pad(make_sequences(lengths), "left")
    batch = {"input_ids": ids, "labels": ids.masked_fill(mask == 0, -100)}
    if lengths[0] != lengths[1]:
        batch["attention_mask"] = mask
    results = []
    for run in (model, torch.compile(model, fullgraph=True, backend=backend)):
        model.zero_grad()
        loss = run(**batch).loss
        loss.backward()
        results.append([loss.detach(), *(weight.grad.clone() for weight in model.parameters())])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, **close)


def test_a_window_over_all_tokens_is_the_dense_model() -> None:
    dense, model = dense_pair()
    assert not model.training and model.dtype == torch.float64
    ids, mask = pad(make_sequences([50, 20]), "left")
    expected, out = (m(ids, attention_mask=mask).logits[mask.bool()] for m in (dense, model))
    torch.testing.assert_close(out, expected, **close)
    tokens = [m.generate(ids, attention_mask=mask, max_new_tokens=10, do_sample=False) for m in (dense, model)]
    assert torch.equal(*tokens)


def test_unsupported_calls_are_refused(model: NSALlamaForCausalLM) -> None:
    ids = torch.stack(make_sequences([12]))
    with pytest.raises(ValueError, match=r"attention_mask must be \(B, T\)"):
        model(ids, attention_mask=torch.ones(1, 1, 12, 12))
    held = DynamicCache()
    held.update(torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 8), 0)
    for cache in (held, [()]):
        with pytest.raises(TypeError, match=f"{CACHE} must be an NSAModelCache, or .* got {type(cache).__name__}"):
            model(ids, **{CACHE: cache})
    with pytest.raises(ValueError, match="attn_implementation must be 'nsa', got 'eager'"):
        NSALlamaForCausalLM._from_config(NSALlamaConfig(**LLAMA, **NSA), attn_implementation="eager")
    with pytest.raises(ValueError, match="attention_dropout must be 0"):
        NSALlamaConfig(attention_dropout=0.1)


def test_the_program_trains_and_samples(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["hf_llama.py", "--steps", "4", "--length", "64", "--new-tokens", "8"])
    hf_llama.main()
    lines = capsys.readouterr().out.splitlines()
    first, last = (float(line.split()[3]) for line in lines[:2])
    assert last < first
    assert "class NSALlama" in "\n".join(lines)
