"""Options of NSAAttention in models of Hugging Face: converted, computed, generated with, saved and loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from hf_models import EXTRA, LLAMA, NSA, TEN_MODES, close, dense_model, make_sequences, nsa_of, pad, train
from nsa_torch import NSAAttention
from nsa_torch.integrations import transformers as nsa_transformers
from nsa_torch.integrations.transformers import CACHE, NSAModelCache, families, use_nsa

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS: dict[str, dict[str, Any]] = {
    "shared": {"shared_kv": True},
    "conv": {"kv_conv": 4},
    "both": {"shared_kv": True, "kv_conv": 3},
    "interleaved": {"rope_interleaved": True},
    "partial": {"rope_dim": 6},
    "biases": {"qkv_bias": True, "o_bias": True},
    "norms": {"qk_norm": True},
    "gates": {"gate_dtype": "float32"},
    "compression": {"compression_hidden": 24, "per_head_compression": True},
    "scale": {"scale": 0.3},
    "all": {"shared_kv": True, "kv_conv": 4, "rope_interleaved": True, "rope_dim": 4, "qkv_bias": True, "o_bias": True}
    | {"qk_norm": True, "compression_hidden": 24, "per_head_compression": True, "scale": 0.4},
}
NEW = OPTIONS | {"values": {"v_head_dim": 12}, "all": OPTIONS["all"] | {"v_head_dim": 4}}
FAMILIES = ["Llama", "Qwen3"]
DTYPES = [torch.float64, torch.float32]


@torch.no_grad()
def new_model(family: str = "Llama", dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """A model with random weights everywhere, large enough for attention to matter."""
    sparse = getattr(nsa_transformers, f"NSA{family}Config")(**LLAMA | EXTRA.get(family, {}) | NSA | options)
    torch.manual_seed(0)
    model = getattr(nsa_transformers, f"NSA{family}ForCausalLM")(sparse).double().eval()
    for name, weight in model.named_parameters():
        if weight.dim() == 1 or "_conv." in name:
            weight.add_(0.3 * torch.randn_like(weight))
    model.to(dtype)
    for layer in model.model.layers:
        if layer.self_attn.gate_dtype is not None:
            layer.self_attn.gate_proj.to(layer.self_attn.gate_dtype)
    return model


def generate(model: Any, ids: Tensor, mask: Tensor, **options: Any) -> Tensor:
    torch.manual_seed(2)
    return model.generate(ids, attention_mask=mask, **({"max_new_tokens": 16, "do_sample": False} | options))


@torch.no_grad()
@pytest.mark.parametrize("name", NEW)
@pytest.mark.parametrize("family", FAMILIES)
def test_attention_is_that_of_the_layer(family: str, name: str) -> None:
    """NSAAttention by itself with these options, the same weights, and tables that are written out here."""
    model, options = new_model(family, **NEW[name]), dict(NEW[name])
    config = model.config
    width, dim = options.pop("rope_dim", None), 16 if family == "Qwen3" else 8
    options |= {"gate_dtype": torch.float32} if "gate_dtype" in options else {}
    norms = {"qk_norm": True} if family == "Qwen3" else {}
    given = {"qkv_bias": family == "Llama", "o_bias": family == "Llama"} | norms | NSA | options
    alone = NSAAttention(32, 4, 2, dim, **given, rope_theta=None, dtype=torch.float64)
    attention = model.model.layers[1].self_attn
    alone.load_state_dict(attention.state_dict())
    width = dim if width is None else width
    angles = torch.arange(30)[:, None] / 10000.0 ** (torch.arange(0, width, 2) / width)
    # transformers computes frequencies in float32.
    angles = (torch.arange(30)[:, None] * (1.0 / 10000.0 ** (torch.arange(0, width, 2) / width))).float()
    twice = angles.repeat_interleave(2, -1) if "rope_interleaved" in options else torch.cat((angles, angles), -1)
    x = torch.randn(2, 30, 32, dtype=torch.float64)
    expected = alone(x, position_embeddings=(twice.cos().double(), twice.sin().double()))
    tables = model.model.rotary_emb(x, torch.arange(30)[None])
    torch.testing.assert_close(attention(x, tables)[0], expected, rtol=1e-5, atol=1e-5)
    assert config.nsa_options()["window"] == alone.window


def options_of(mode: str, model: Any, draft: Any, ids: Tensor, mask: Tensor) -> dict[str, Any]:
    if mode == "assisted":
        return {"assistant_model": draft}
    if mode == "static":
        return {"cache_implementation": "static"}
    cache = DynamicCache(config=model.config)
    if mode == "reused":
        generate(model, ids[:, :9], mask[:, :9], max_new_tokens=6, **{CACHE: cache})
        cache.crop(-5)
    elif mode == "repeated_prompt":
        with torch.no_grad():
            model(ids[:1, :9], **{CACHE: cache})
        cache.batch_repeat_interleave(len(ids))
    return {CACHE: cache} if mode in ("reused", "repeated_prompt") else {}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["shared", "conv", "both", "all"])
@pytest.mark.parametrize("mode", TEN_MODES)
def test_ten_modes_with_what_caches_hold(mode: str, name: str, dtype: torch.dtype) -> None:
    model = new_model("Qwen3" if name == "both" else "Llama", dtype, **NEW[name])
    sequences = make_sequences([25, 25, 25])
    if mode.endswith("padded"):
        sequences = [sequence[:length] for sequence, length in zip(sequences, (25, 9, 18), strict=True)]
    if mode == "assisted":
        sequences = sequences[:1]
    if mode in ("reused", "repeated_prompt"):
        sequences = [torch.cat((sequences[0][:9], sequence[9:])) for sequence in sequences]
    ids, mask = pad(sequences, "right" if mode == "right_padded" else "left")
    expected = generate(model, ids, mask, use_cache=False, **TEN_MODES[mode])
    options = TEN_MODES[mode] | options_of(mode, model, new_model("Llama", dtype, num_hidden_layers=1), ids, mask)
    assert torch.equal(generate(model, ids, mask, **options), expected)


@pytest.mark.parametrize("family", [name for name in families.NAMES if name not in FAMILIES])
def test_generation_of_other_families(family: str) -> None:
    options = {"rope_dim": 4, "shared_kv": True, "kv_conv": 2, "rope_interleaved": True}
    model = use_nsa(dense_model(f"{family}ForCausalLM"), **NSA, **options)
    assert model.model.rotary_emb.inv_freq.shape == (2,)
    ids, mask = pad(make_sequences([25, 9]), "left")
    expected = generate(model, ids, mask, use_cache=False)
    for given in ({CACHE: DynamicCache(config=model.config)}, {"cache_implementation": "static"}):
        assert torch.equal(generate(model, ids, mask, **given), expected)


@pytest.mark.parametrize("name", NEW)
@pytest.mark.parametrize("side", ["left", "right"])
def test_generation_with_every_option(name: str, side: str) -> None:
    model = new_model(**NEW[name])
    ids, mask = pad(make_sequences([25, 9]), side)
    expected = generate(model, ids, mask, use_cache=False)
    caches = [NSAModelCache(model.config), DynamicCache(config=model.config)]
    for cache in (*caches, StaticCache(config=model.config, max_cache_len=41)):
        assert torch.equal(generate(model, ids, mask, **{CACHE: cache}), expected)
        geometry = nsa_of(cache)._sequences.geometry
        assert geometry.shared_kv == model.config.shared_kv and geometry.kv_conv == (model.config.kv_conv or 0)


@torch.no_grad()
@pytest.mark.parametrize("name", NEW)
def test_padding_in_the_last_column_sees_its_row_with_a_cache_and_without(name: str) -> None:
    model = new_model(**NEW[name])
    ids, mask = pad(make_sequences([21, 9, 0, 1]), "right")
    whole = model(ids, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(model(ids, attention_mask=mask, use_cache=True).logits, whole, **close)
    for row, length in enumerate([21, 9, 0, 1]):
        if length:
            alone = model(ids[row : row + 1, :length], use_cache=False).logits[0]
            torch.testing.assert_close(whole[row, :length], alone, **close)


@pytest.mark.parametrize("name", NEW)
@pytest.mark.parametrize("family", FAMILIES)
def test_saved_models_load_with_the_same_results(tmp_path: Path, family: str, name: str) -> None:
    model = new_model(family, **NEW[name])
    ids = torch.stack(make_sequences([30, 30]))
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64, output_loading_info=True)
    assert type(loaded) is type(model) and loaded.config.nsa_options() == model.config.nsa_options()
    assert not info["missing_keys"] and not info["unexpected_keys"]
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-6, atol=1e-6)
    mask = torch.ones_like(ids)
    assert torch.equal(generate(loaded, ids, mask), generate(loaded, ids, mask, use_cache=False))


@pytest.mark.parametrize("name", NEW)
def test_padded_and_packed_training_is_that_of_each_sequence(name: str) -> None:
    model = new_model(**NEW[name])
    sequences = make_sequences([31, 1, 17, 8])
    ends = torch.tensor([0, 31, 32, 49, 57], dtype=torch.int32)
    positions = torch.cat([torch.arange(len(sequence)) for sequence in sequences])[None]
    packed = {"input_ids": torch.cat(sequences)[None], "position_ids": positions}
    rows = [model(**packed).logits[0], model(**packed, cu_seq_lens_q=ends, max_length_q=31).logits[0]]
    for side in ("left", "right"):
        ids, mask = pad(sequences, side)
        rows.append(model(ids, attention_mask=mask).logits[mask.bool()])
    alone = [model(sequence[None]).logits[0] for sequence in sequences]
    model.zero_grad()
    torch.cat(alone).square().mean().backward()
    expected = [weight.grad.clone() for weight in model.parameters()]
    for row in rows:
        torch.testing.assert_close(row, torch.cat(alone), **close)
        model.zero_grad()
        row.square().mean().backward()
        for weight, gradient in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(weight.grad, gradient, **close)


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in OPTIONS if name not in ("partial", "norms", "scale", "all")])
@pytest.mark.parametrize("family", [*FAMILIES, "Qwen2", "Mistral"])
def test_a_converted_model_starts_as_the_dense_one(family: str, name: str) -> None:
    """Where only the window counts, and it covers all tokens."""
    dense = dense_model(f"{family}ForCausalLM")
    model = use_nsa(dense, **NSA | OPTIONS[name] | {"window": 128})
    only_the_window = torch.tensor([-40.0, -40.0, 40.0]).repeat(4)
    for layer in model.model.layers:
        layer.self_attn.gate_proj.weight.zero_()
        layer.self_attn.gate_proj.bias.copy_(only_the_window)
    ids, mask = pad(make_sequences([40, 23]), "left")
    expected, out = (m(ids, attention_mask=mask).logits[mask.bool()] for m in (dense, model))
    torch.testing.assert_close(out, expected, **close)
    assert torch.equal(generate(model, ids, mask), generate(dense, ids, mask))


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_converted_models_are_trained_saved_and_generated_from(tmp_path: Path, family: str, name: str) -> None:
    model = use_nsa(dense_model(f"{family}ForCausalLM", initializer_range=0.05), **NSA | OPTIONS[name]).train()
    ids = torch.stack(make_sequences([12, 12])).repeat(1, 4)
    losses = train(model, ids)
    assert losses[-1] < 0.9 * losses[0]
    model.eval().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    ids, mask = pad(make_sequences([30, 21]), "left")
    assert torch.equal(generate(loaded, ids, mask), generate(loaded, ids, mask, use_cache=False))
