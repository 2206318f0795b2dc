"""Configurations of Hugging Face with options of NSAAttention: what weights they make, keep and refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_models import LLAMA, NSA, dense_model, make_sequences
from nsa_torch.convolution import CausalConv
from nsa_torch.integrations.transformers import NSALlamaConfig, use_nsa
from test_hf_options import OPTIONS, generate, new_model

pytestmark = pytest.mark.usefixtures("one_thread")


def test_weights_that_a_checkpoint_does_not_have_start_anew(tmp_path: Path) -> None:
    new_model().save_pretrained(tmp_path)
    options = {"kv_conv": 4, "qk_norm": True, "shared_kv": False}
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, **options, output_loading_info=True)
    names = ("k_conv", "v_conv", "q_norm", "k_norm")
    assert {name.split(".")[-2] for name in info["missing_keys"]} == set(names)
    attention = loaded.model.layers[1].self_attn
    for conv in (attention.k_conv, attention.v_conv):
        assert 0.2 < conv.weight.std() < 0.4 and conv.weight.abs().max() <= 0.5
    assert all((norm.weight == 1).all() for norm in (attention.q_norm, attention.k_norm))


@pytest.mark.parametrize("name", ["shared", "both", "all"])
def test_sizes_of_weights(name: str) -> None:
    model = use_nsa(dense_model("LlamaForCausalLM"), **NSA | OPTIONS[name])
    attention = model.model.layers[0].self_attn
    assert attention.k_proj.weight.shape == attention.v_proj.weight.shape == (2 * 2 * 8, 32)
    if "kv_conv" in OPTIONS[name]:
        assert isinstance(attention.k_conv, CausalConv) and not attention.k_conv.weight.any()


def test_gates_stay_float32_in_a_16_bit_model(tmp_path: Path) -> None:
    def dtypes(model: Any) -> set[torch.dtype]:
        return {weight.dtype for name, weight in model.named_parameters() if ".self_attn.gate_proj." in name}

    for given in ("float32", torch.float32):
        model = use_nsa(dense_model("LlamaForCausalLM").bfloat16(), **NSA, gate_dtype=given)
        assert model.config.gate_dtype == "float32"
        assert dtypes(model) == {torch.float32} and model.dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    for dtype in (torch.bfloat16, torch.float16, "auto"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        assert dtypes(loaded) == {torch.float32} and loaded.model.layers[0].mlp.gate_proj.weight.dtype != torch.float32
        assert loaded.lm_head.weight.dtype == (torch.bfloat16 if dtype == "auto" else dtype)
    ids = torch.stack(make_sequences([20]))
    assert generate(loaded, ids, torch.ones_like(ids)).shape == (1, 36)
    for gate in (loaded, model):
        torch.testing.assert_close(
            gate.model.layers[0].self_attn.gate_proj.weight, model.model.layers[0].self_attn.gate_proj.weight
        )


def test_options_that_make_no_sense_are_refused_and_why() -> None:
    llama, qwen3 = dense_model("LlamaForCausalLM"), dense_model("Qwen3ForCausalLM")
    for name in ("qk_norm", "qkv_bias", "o_bias"):
        dense = qwen3 if name == "qk_norm" else llama
        with pytest.raises(ValueError, match="qk_norm, qkv_bias and o_bias must keep what the model has"):
            use_nsa(dense, **NSA, **{name: False})
    with pytest.raises(ValueError, match="v_head_dim must be None or 8, the channels of the model's values, got 4"):
        use_nsa(llama, **NSA, v_head_dim=4)
    for name in ("rope_theta", "bias", "hidden_size", "num_select"):
        with pytest.raises(TypeError, match=rf"^nsa_options must be among v_head_dim, block_size, .*, got {name}$"):
            use_nsa(llama, **{name: 3})
    with pytest.raises(TypeError, match="bias must not be given in a configuration: qkv_bias and o_bias say it"):
        NSALlamaConfig(bias=True)
    with pytest.raises(ValueError, match="gate_dtype must be 'float32' or None in a configuration, got 'bfloat16'"):
        NSALlamaConfig(gate_dtype=torch.bfloat16)
    for width in (3, 10):
        with pytest.raises(ValueError, match=f"rope_dim must be even and at most head_dim, 8, got {width}"):
            NSALlamaConfig(**LLAMA, rope_dim=width)
    for name in ("shared_kv", "rope_interleaved", "per_head_compression", "qk_norm", "qkv_bias", "o_bias"):
        with pytest.raises(TypeError, match=f"{name} must be a bool, got int"):
            use_nsa(llama, **NSA, **{name: 3})
    with pytest.raises(TypeError, match="qk_norm must be a bool, got tuple"):
        NSALlamaConfig(**LLAMA, qk_norm=(torch.nn.Identity(), torch.nn.Identity()))
    with pytest.raises(ValueError, match="kv_conv must be at least 0, got -1"):
        use_nsa(llama, **NSA, kv_conv=-1)
