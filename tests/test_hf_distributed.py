"""Models of the Hugging Face integration trained by two processes with FSDP2, torch.compile and checkpointing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from hf_models import NSA, dense_model, make_sequences, nsa_of, pad
from nsa_torch.distributed import tensor_parallel_plan
from nsa_torch.integrations.transformers import CACHE, use_nsa
from test_tensor_parallel import on_two_ranks

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")

# Inductor's code takes a minute to compile in two processes on two cores: one model has it.
BACKENDS = {"LlamaForCausalLM": "aot_eager", "Qwen3ForCausalLM": "inductor"}
STEPS, RATE = 20, 3e-3


def make(name: str) -> Any:
    torch.manual_seed(0)
    return use_nsa(dense_model(name, initializer_range=0.05), **NSA).train()


def batches() -> list[Tensor]:
    """One for each step, (2, T): a row for each rank, of few different tokens, so that there is something to learn."""
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(1, 5, (2, 11), generator=generator).repeat(1, 3) for _ in range(STEPS)]


def train(model: Any, rows: slice) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    losses = []
    for ids in batches():
        loss = model(ids[rows], labels=ids[rows]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


class Sharded:
    """What each process does: trains its part of a model, and saves the whole."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __call__(self, mesh: Any) -> None:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
        from torch.distributed.fsdp import fully_shard

        rank = torch.distributed.get_rank()
        for name, backend in BACKENDS.items():
            torch.compiler.reset()
            model = make(name)
            newest = hasattr(model, "activation_checkpointing_enable")
            (model.activation_checkpointing_enable if newest else model.gradient_checkpointing_enable)()
            for layer in model.model.layers:
                layer.compile(backend=backend)
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
            losses = train(model, slice(rank, rank + 1))
            gathered: list[Any] = [None, None]
            torch.distributed.all_gather_object(gathered, losses)
            state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
            if rank == 0:
                model.save_pretrained(self.folder / name, state_dict=state)
                torch.save(torch.tensor(gathered).mean(0), self.folder / f"{name}.losses")


@pytest.mark.usefixtures("one_thread")
def test_trained_sharded_saved_loaded_and_generated_from(tmp_path: Path) -> None:
    on_two_ranks(Sharded(tmp_path))
    for name in BACKENDS:
        single = make(name)
        expected = torch.tensor(train(single, slice(0, 2)))
        losses = torch.load(tmp_path / f"{name}.losses")
        assert losses[-1] < 0.7 * losses[0]
        torch.testing.assert_close(losses, expected, rtol=1e-3, atol=1e-3)
        loaded, info = AutoModelForCausalLM.from_pretrained(
            tmp_path / name, dtype=torch.float64, output_loading_info=True
        )
        assert type(loaded) is type(single) and not info["missing_keys"] and not info["unexpected_keys"]
        single.eval()
        ids, mask = pad(make_sequences([30, 21]), "left")
        with torch.no_grad():
            logits = (m(ids, attention_mask=mask).logits[mask.bool()] for m in (loaded, single))
            torch.testing.assert_close(*logits, rtol=1e-2, atol=1e-2)
        runs = [
            loaded.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, use_cache=use_cache)
            for use_cache in (True, False)
        ]
        assert torch.equal(*runs)


class Cut:
    """What each process does: generates with its heads of every layer."""

    def __init__(self, folder: Path, options: dict[str, Any]):
        self.folder = folder
        self.options = options

    def __call__(self, mesh: Any) -> None:
        from torch.distributed.tensor.parallel import parallelize_module

        model = use_nsa(dense_model("Qwen3ForCausalLM"), **NSA | self.options)
        for layer in model.model.layers:
            parallelize_module(layer.self_attn, mesh, tensor_parallel_plan(layer.self_attn))
        ids, mask = pad(make_sequences([30, 21]), "left")
        caches = [DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=50), None]
        runs = []
        for cache in caches:
            given = {"use_cache": False} if cache is None else {CACHE: cache}
            runs.append(model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, **given))
            if cache is not None:
                assert nsa_of(cache)[0].k_slc.size(1) == 1  # of two KV heads
        torch.save(runs, self.folder / f"{torch.distributed.get_rank()}.tokens")


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("options", [{}, {"shared_kv": True, "kv_conv": 3, "rope_interleaved": True}], ids=str)
def test_generation_with_tensor_parallel_attention(tmp_path: Path, options: dict[str, Any]) -> None:
    """A rank's cache holds the rank's heads."""
    on_two_ranks(Cut(tmp_path, options))
    model = use_nsa(dense_model("Qwen3ForCausalLM"), **NSA | options)
    ids, mask = pad(make_sequences([30, 21]), "left")
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, use_cache=False)
    for rank in range(2):
        for tokens in torch.load(tmp_path / f"{rank}.tokens"):
            assert torch.equal(tokens, expected)
