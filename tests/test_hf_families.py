"""Every family of the Hugging Face integration: converted, cached, saved, loaded, classified."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from hf_models import LLAMA, NSA, close, dense_model, dense_pair, make_sequences, pad, train
from nsa_torch.integrations import transformers as nsa_transformers
from nsa_torch.integrations.transformers import CACHE, NSAModelCache, families, use_nsa, versions

pytestmark = pytest.mark.usefixtures("one_thread")

FAMILIES = list(families.NAMES)
CLASSIFIED = [name for name in FAMILIES if hasattr(transformers, f"{name}ForSequenceClassification")]


def generate(model: Any, ids: Tensor, mask: Tensor, **options: Any) -> Tensor:
    return model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=20, **options)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_window_over_all_tokens_is_the_dense_model(family: str, side: str) -> None:
    dense, model = dense_pair(f"{family}ForCausalLM")
    assert type(model).__name__ == f"NSA{family}ForCausalLM" and model.config.model_type == f"nsa_{family.lower()}"
    ids, mask = pad(make_sequences([40, 23]), side)
    expected, out = (m(ids, attention_mask=mask).logits[mask.bool()] for m in (dense, model))
    torch.testing.assert_close(out, expected, **close)
    assert torch.equal(generate(model, ids, mask), generate(dense, ids, mask))
    assert torch.equal(generate(model, ids, mask, use_cache=False), generate(dense, ids, mask))


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_with_the_cache_equals_without(family: str) -> None:
    model = use_nsa(dense_model(f"{family}ForCausalLM"), **NSA)
    ids, mask = pad(make_sequences([40, 23]), "left")
    expected = generate(model, ids, mask, use_cache=False)
    cache = NSAModelCache(model.config)
    for options in ({}, {CACHE: cache}, {"cache_implementation": "static"}):
        assert torch.equal(generate(model, ids, mask, **options), expected)
    cache.crop(-12)
    assert torch.equal(generate(model, ids, mask, use_cache=False), expected)
    ids, mask = expected[:, :50], torch.cat((mask, torch.ones(2, 10, dtype=mask.dtype)), dim=1)
    assert torch.equal(generate(model, ids, mask, **{CACHE: cache}), generate(model, ids, mask, use_cache=False))


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_models_load_with_the_same_results(tmp_path: Path, family: str) -> None:
    ids = torch.stack(make_sequences([30, 30]))
    autos = {"Model": AutoModel, "ForCausalLM": AutoModelForCausalLM}
    if family in CLASSIFIED:
        autos["ForSequenceClassification"] = AutoModelForSequenceClassification
    for head, auto in autos.items():
        model = use_nsa(dense_model(family + head), **NSA)
        model.save_pretrained(tmp_path / head)
        loaded, info = auto.from_pretrained(tmp_path / head, dtype=torch.float64, output_loading_info=True)
        assert type(loaded) is type(model) and loaded.config.nsa_options() == model.config.nsa_options()
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert type(model) is getattr(nsa_transformers, type(model).__name__)
        again = pickle.loads(pickle.dumps(model))
        with torch.no_grad():
            torch.testing.assert_close(loaded.eval()(ids)[0], model(ids)[0], **close)
            assert torch.equal(again(ids)[0], model(ids)[0])


@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
def test_models_saved_by_version_0_1_are_converted(tmp_path: Path, family: str) -> None:
    model = use_nsa(dense_model(f"{family}ForCausalLM"), **NSA)
    for weight in model.parameters():  # branches of their own
        weight.data += 0.1 * torch.randn_like(weight)
    ids = torch.stack(make_sequences([30, 30]))
    expected = model(ids).logits
    with torch.no_grad():
        for layer in model.model.layers:
            for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
                for weight in projection.parameters():
                    weight.copy_(weight.unflatten(0, (2, 3, -1)).transpose(0, 1).flatten(0, 2))
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    assert config.pop("nsa_version") == 2
    path.write_text(json.dumps(config))
    for auto in (AutoModelForCausalLM, type(model)):
        loaded = auto.from_pretrained(tmp_path, dtype=torch.float64)
        torch.testing.assert_close(loaded(ids).logits, expected, **close)
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float64)
    torch.testing.assert_close(again(ids).logits, expected, **close)


@torch.no_grad()
@pytest.mark.parametrize("family", CLASSIFIED)
def test_sequences_are_classified_by_their_last_real_token(family: str) -> None:
    dense, model = dense_pair(f"{family}ForSequenceClassification", num_labels=3)
    sequences = make_sequences([33, 12, 20])
    ids, mask = pad(sequences, "right")
    logits = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(logits, dense(ids, attention_mask=mask).logits, **close)
    sparse = use_nsa(dense, **NSA)
    logits = sparse(ids, attention_mask=mask).logits
    for row, sequence in zip(logits, sequences, strict=True):
        torch.testing.assert_close(row, sparse(sequence[None]).logits[0], **close)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_is_trained(family: str) -> None:
    model = use_nsa(dense_model(f"{family}ForCausalLM"), **NSA).train()
    ids = torch.stack(make_sequences([48, 48]))
    losses = train(model, ids)
    assert losses[-1] < 0.8 * losses[0]


def test_versions_of_transformers() -> None:
    """An older one is refused by name, and the tests run under the oldest."""
    root = Path(__file__).parents[1]
    oldest = ".".join(map(str, versions.OLDEST))
    assert f"TRANSFORMERS={oldest}" in (root / ".ci" / "run").read_text()
    for path in ("pyproject.toml", "requirements/test.txt"):
        assert f"transformers>={oldest}" in (root / path).read_text()
    pretend = "import transformers; transformers.__version__ = '5.9.1'; import nsa_torch.integrations.transformers"
    done = subprocess.run([sys.executable, "-c", pretend], capture_output=True, text=True, cwd=root, check=False)
    assert done.returncode != 0
    assert f"needs transformers {oldest} or newer, got 5.9.1" in done.stderr


def test_other_models_are_refused() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    gpt = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(vocab_size=40, **sizes))
    with pytest.raises(TypeError, match=r"one of ArceeModel, .*LlamaForCausalLM, .*got GPTNeoXForCausalLM"):
        use_nsa(gpt)
    with pytest.raises(TypeError, match="got LlamaForQuestionAnswering"):
        use_nsa(transformers.LlamaForQuestionAnswering(transformers.LlamaConfig(**LLAMA)))
    with pytest.raises(TypeError, match="got dict"):
        use_nsa({})  # type: ignore[arg-type]


@torch.no_grad()
@pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe"])
def test_routers_of_experts_are_recorded_and_balanced(family: str) -> None:
    ids, outs = torch.stack(make_sequences([40, 40])), []
    for model in dense_pair(f"{family}ForCausalLM"):
        outs.append(model(ids, labels=ids, output_router_logits=True, output_hidden_states=True))
    for name in ("loss", "aux_loss"):
        torch.testing.assert_close(outs[1][name], outs[0][name], **close)
    for name in ("router_logits", "hidden_states"):
        assert len(outs[1][name]) == len(outs[0][name]) >= 2
        for sparse, dense in zip(outs[1][name], outs[0][name], strict=True):
            torch.testing.assert_close(sparse, dense, **close)
