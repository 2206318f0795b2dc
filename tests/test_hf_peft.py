"""PEFT on models of the Hugging Face integration: adapters trained, saved and merged; virtual tokens in `generate`."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from hf_models import NSA, dense_model, make_model, make_sequences, pad
from nsa_torch.integrations.transformers import CACHE, NSALlamaForCausalLM, NSAModelCache, use_nsa

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported"),
]

LORA: dict[str, Any] = {"task_type": "CAUSAL_LM", "init_lora_weights": False}
IA3: dict[str, Any] = {"task_type": "CAUSAL_LM", "target_modules": ["k_proj", "v_proj", "down_proj"]}
ADAPTERS: dict[str, Any] = {
    "all_linear": lambda: peft.LoraConfig(target_modules="all-linear", **LORA),
    "queries": lambda: peft.LoraConfig(target_modules=["q_proj"], use_dora=True, **LORA),
    "gates_saved": lambda: peft.LoraConfig(
        target_modules=["k_proj"], modules_to_save=["self_attn.gate_proj", "compress_k"], **LORA
    ),
    "compression": lambda: peft.LoraConfig(
        target_modules=[], target_parameters=["compress_k.w1", "compress_v.w2"], **LORA
    ),
    "ia3": lambda: peft.IA3Config(feedforward_modules=["down_proj"], **IA3),
}  # fmt: skip


def generate(model: Any, ids: Tensor, mask: Tensor, **options: Any) -> Any:
    torch.manual_seed(2)
    options = {"max_new_tokens": 12, "do_sample": False} | options
    return model.generate(input_ids=ids, attention_mask=mask, **options)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_adapters_are_trained_saved_loaded_and_merged(tmp_path: Path, adapter: str) -> None:
    torch.manual_seed(0)
    base = use_nsa(dense_model("LlamaForCausalLM").float(), **NSA)
    other = copy.deepcopy(base)
    model = peft.get_peft_model(base, ADAPTERS[adapter]()).train()
    trained = {name: weight.clone() for name, weight in model.named_parameters() if weight.requires_grad}
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=1e-3)
    ids = torch.stack(make_sequences([40, 40]))
    losses = []
    for _ in range(3):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(weight.grad is None for weight in model.parameters() if not weight.requires_grad)
    after = dict(model.named_parameters())
    assert trained and all(not torch.equal(weight, after[name]) for name, weight in trained.items())

    model.eval()
    ids, mask = pad(make_sequences([30, 20]), "left")
    expected = generate(model, ids, mask, use_cache=False)
    assert torch.equal(generate(model, ids, mask), expected)
    logits = model(input_ids=ids, attention_mask=mask).logits
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(other, tmp_path).eval()
    torch.testing.assert_close(loaded(input_ids=ids, attention_mask=mask).logits, logits)
    merged = loaded.merge_and_unload()
    assert isinstance(merged, NSALlamaForCausalLM)
    torch.testing.assert_close(merged(ids, attention_mask=mask).logits, logits, rtol=1e-3, atol=1e-3)
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(again(ids, attention_mask=mask).logits, merged(ids, attention_mask=mask).logits)


def with_prompt(kind: str = "prompt", dtype: torch.dtype = torch.float64) -> Any:
    options = {"num_virtual_tokens": 5, "task_type": "CAUSAL_LM"}
    configs = {
        "prompt": peft.PromptTuningConfig,
        "encoder": lambda **o: peft.PromptEncoderConfig(encoder_hidden_size=16, **o),
        "prefix": peft.PrefixTuningConfig,
    }
    torch.manual_seed(3)
    model = peft.get_peft_model(make_model(dtype), configs[kind](**options)).to(dtype).eval()
    for weight in model.prompt_encoder.parameters():
        weight.data.add_(0.3 * torch.randn_like(weight))
    return model


MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "num_return_sequences": 2},
    "beams": {"num_beams": 3},
    "static": {"cache_implementation": "static"},
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["prompt", "encoder"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_virtual_tokens_with_the_cache_and_without(dtype: torch.dtype, mode: str, kind: str, side: str) -> None:
    model = with_prompt(kind, dtype)
    ids, mask = pad(make_sequences([20, 11]), side)
    without = {} if mode == "static" else MODES[mode]
    expected = generate(model, ids, mask, use_cache=False, **without)
    assert torch.equal(generate(model, ids, mask, **MODES[mode]), expected)
    assert not torch.equal(generate(model.get_base_model(), ids, mask, **without), expected)


@torch.no_grad()
def test_virtual_tokens_are_embeddings_before_the_prompt() -> None:
    model = with_prompt()
    base, ids = model.get_base_model(), torch.stack(make_sequences([20, 20]))
    embeddings = torch.cat((model.get_prompt(2), base.model.embed_tokens(ids)), dim=1)
    tokens = base.generate(inputs_embeds=embeddings, max_new_tokens=12, do_sample=False)
    assert torch.equal(generate(model, ids, torch.ones_like(ids))[:, 20:], tokens)


def test_what_prompt_learning_gets_wrong_is_refused() -> None:
    model = with_prompt()
    ids, mask = pad(make_sequences([20, 20]), "left")
    out = generate(model, ids, mask, return_dict_in_generate=True)
    assert out[CACHE].get_seq_length() == 20 + 5 + 11
    longer = torch.cat((out.sequences, ids[:, :6]), dim=1)
    expected = generate(model, longer, torch.ones_like(longer), use_cache=False)
    for options, name in (
        ({CACHE: out[CACHE]}, "a cache that holds tokens"),
        ({"prefill_chunk_size": 4}, "prefill_chunk_size"),
    ):
        with pytest.raises(ValueError, match=f"^{name} must not be given with PEFT's prompt learning"):
            generate(model, longer, torch.ones_like(longer), **options)
    with pytest.raises(ValueError, match=r"^assisted generation must not be given"):
        generate(model, ids[:1], mask[:1], prompt_lookup_num_tokens=3)
    given = {CACHE: NSAModelCache(model.config)}
    assert torch.equal(generate(model, longer, torch.ones_like(longer), **given), expected)
    lora = peft.get_peft_model(make_model(), peft.LoraConfig(target_modules=["q_proj"], **LORA))
    out = generate(lora, ids, mask, return_dict_in_generate=True)
    longer = torch.cat((out.sequences, ids[:, :6]), dim=1)
    expected = generate(lora, longer, torch.ones_like(longer), use_cache=False)
    assert torch.equal(generate(lora, longer, torch.ones_like(longer), **{CACHE: out[CACHE]}), expected)


def test_prefix_tuning_is_refused() -> None:
    model = with_prompt("prefix")
    ids, mask = pad(make_sequences([20, 11]), "left")
    with pytest.raises(TypeError, match=r"got DynamicCache with 5 tokens: .*in place of PEFT's prefix tuning: prompt"):
        model(input_ids=ids, attention_mask=mask, labels=ids)
    for options in ({}, {"use_cache": False}):
        with pytest.raises(TypeError, match="in place of PEFT's prefix tuning: prompt tuning, P-tuning or LoRA"):
            generate(model, ids, mask, **options)
