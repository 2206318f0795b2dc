"""The Hugging Face integration on a GPU: padding without a host sync, and generation as the dense model's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import CompileConfig, DynamicCache, StaticCache

from hf_models import NSA, dense_model, dense_pair, make_sequences, pad
from nsa_torch.integrations.transformers import CACHE, NSAModelCache, use_nsa
from test_cuda_runtime import no_host_sync

pytestmark = pytest.mark.cuda

near = {"rtol": 0.0, "atol": 2e-3}


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    """A dense model and the NSA model that computes the same, in float32: heads of 16 channels."""
    dense, model = dense_pair("Qwen3ForCausalLM")
    return dense.cuda().float(), model.cuda().float()


@torch.no_grad()
def test_padded_single_tokens_without_a_host_sync(pair: tuple[Any, Any]) -> None:
    ids, mask = (x.cuda() for x in pad(make_sequences([9, 4, 7]), "left"))
    steps = torch.stack(make_sequences([6, 6, 6], seed=3)).cuda()
    real = torch.tensor([[1, 1, 0, 1, 1, 1], [0, 0, 1, 1, 0, 1], [1, 1, 1, 1, 1, 0]], device="cuda")
    whole = torch.cat((mask, real), dim=1)
    positions = (whole.cumsum(1) - 1).clamp(min=0)
    dense, model = pair
    caches = {dense: DynamicCache(config=dense.config), model: NSAModelCache(model.config)}
    for run, cache in caches.items():
        run(ids, attention_mask=mask, position_ids=positions[:, :9], **{CACHE: cache})
    for column in range(9, 15):
        step = {"input_ids": steps[:, column - 9, None], "position_ids": positions[:, column, None]}
        step["attention_mask"] = whole[:, : column + 1]
        expected = dense(**step, **{CACHE: caches[dense]}).logits
        if column == 9:
            out = model(**step, **{CACHE: caches[model]}).logits  # what runs once, runs here
        else:
            with no_host_sync():
                out = model(**step, **{CACHE: caches[model]}).logits
        torch.testing.assert_close(out, expected, **near)
    assert caches[model].nsa.lengths.tolist() == whole.sum(1).tolist()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_padded_generation_is_the_dense_model_s(pair: tuple[Any, Any], side: str, use_cache: bool) -> None:
    ids, mask = (x.cuda() for x in pad(make_sequences([40, 23, 31]), side))
    options: dict[str, Any] = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 30}
    dense, model = pair
    assert torch.equal(model.generate(ids, use_cache=use_cache, **options), dense.generate(ids, **options))


@pytest.mark.parametrize("options", [{}, {"shared_kv": True, "kv_conv": 3}], ids=str)
@pytest.mark.parametrize("kind", ["dynamic", "static", "compiled"])
def test_caches_of_transformers(kind: str, options: dict[str, Any]) -> None:
    """A cache gives the tokens of generation without; compiled steps as well."""
    model = use_nsa(dense_model("Qwen3ForCausalLM"), **NSA, **options).cuda().float()
    ids, mask = (x.cuda() for x in pad(make_sequences([40, 23, 31]), "left"))
    given: dict[str, Any] = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 30}
    expected = model.generate(ids, use_cache=False, **given)
    if kind == "compiled":
        given["compile_config"] = CompileConfig(backend="aot_eager", mode=None, fullgraph=True)
    for _ in range(2):
        cache = DynamicCache(config=model.config)
        if kind != "dynamic":
            cache = StaticCache(config=model.config, max_cache_len=80)
        assert torch.equal(model.generate(ids, **given, **{CACHE: cache}), expected)
