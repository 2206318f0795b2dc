"""The families of models: a configuration, a base model, a causal language model, a sequence classifier of each."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    MistralForSequenceClassification,
    MistralModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
    Qwen2Model,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3ForSequenceClassification,
    Qwen3Model,
)
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3RMSNorm

from .generation import NSAForCausalLM
from .modeling import NSAModel, NSAPreTrained
from .options import NSAOptions, head_dim

Norm = Callable[[], nn.Module]


def _without_attention(plan: dict[str, str]) -> dict[str, str]:
    """A family's tensor parallel plan without self_attn, whose projections are not cut as its own are."""
    return {name: how for name, how in plan.items() if "self_attn" not in name}


@strict
class NSALlamaConfig(NSAOptions, LlamaConfig):
    """Configuration of Llama, and the options of `nsa_torch.NSAAttention` with their names there."""

    model_type = "nsa_llama"
    base_model_tp_plan = _without_attention(LlamaConfig.base_model_tp_plan)

    def projection_biases(self) -> tuple[bool, bool]:
        """Whether q_proj, k_proj and v_proj have biases, and whether o_proj has one."""
        return bool(self.attention_bias), bool(self.attention_bias)

    def head_norm(self) -> Norm | None:
        """What makes a norm of q's and k's heads, if the family has one."""
        return None


class NSALlamaModel(NSAModel, LlamaModel):
    """LlamaModel with NSA."""

    config_class = NSALlamaConfig
    _can_record_outputs = {"hidden_states": LlamaDecoderLayer}


class NSALlamaForCausalLM(NSAForCausalLM, LlamaForCausalLM):
    """LlamaForCausalLM with NSA."""

    config_class = NSALlamaConfig
    base_class = NSALlamaModel


class NSALlamaForSequenceClassification(NSAPreTrained, LlamaForSequenceClassification):
    """LlamaForSequenceClassification with NSA."""

    config_class = NSALlamaConfig


@strict
class NSAMistralConfig(NSAOptions, MistralConfig):
    """Configuration of Mistral, and the options of `nsa_torch.NSAAttention` with their names there."""

    model_type = "nsa_mistral"
    base_model_tp_plan = _without_attention(MistralConfig.base_model_tp_plan)

    def projection_biases(self) -> tuple[bool, bool]:
        """Whether q_proj, k_proj and v_proj have biases, and whether o_proj has one."""
        return False, False

    def head_norm(self) -> Norm | None:
        """What makes a norm of q's and k's heads, if the family has one."""
        return None


class NSAMistralModel(NSAModel, MistralModel):
    """MistralModel with NSA."""

    config_class = NSAMistralConfig
    _can_record_outputs = {"hidden_states": MistralDecoderLayer}


class NSAMistralForCausalLM(NSAForCausalLM, MistralForCausalLM):
    """MistralForCausalLM with NSA."""

    config_class = NSAMistralConfig
    base_class = NSAMistralModel


class NSAMistralForSequenceClassification(NSAPreTrained, MistralForSequenceClassification):
    """MistralForSequenceClassification with NSA."""

    config_class = NSAMistralConfig


@strict
class NSAQwen2Config(NSAOptions, Qwen2Config):
    """Configuration of Qwen2, and the options of `nsa_torch.NSAAttention` with their names there."""

    model_type = "nsa_qwen2"
    base_model_tp_plan = _without_attention(Qwen2Config.base_model_tp_plan)

    def projection_biases(self) -> tuple[bool, bool]:
        """Whether q_proj, k_proj and v_proj have biases, and whether o_proj has one."""
        return True, False

    def head_norm(self) -> Norm | None:
        """What makes a norm of q's and k's heads, if the family has one."""
        return None


class NSAQwen2Model(NSAModel, Qwen2Model):
    """Qwen2Model with NSA."""

    config_class = NSAQwen2Config
    _can_record_outputs = {"hidden_states": Qwen2DecoderLayer}


class NSAQwen2ForCausalLM(NSAForCausalLM, Qwen2ForCausalLM):
    """Qwen2ForCausalLM with NSA."""

    config_class = NSAQwen2Config
    base_class = NSAQwen2Model


class NSAQwen2ForSequenceClassification(NSAPreTrained, Qwen2ForSequenceClassification):
    """Qwen2ForSequenceClassification with NSA."""

    config_class = NSAQwen2Config


@strict
class NSAQwen3Config(NSAOptions, Qwen3Config):
    """Configuration of Qwen3, and the options of `nsa_torch.NSAAttention` with their names there."""

    model_type = "nsa_qwen3"
    base_model_tp_plan = _without_attention(Qwen3Config.base_model_tp_plan)

    def projection_biases(self) -> tuple[bool, bool]:
        """Whether q_proj, k_proj and v_proj have biases, and whether o_proj has one."""
        return bool(self.attention_bias), bool(self.attention_bias)

    def head_norm(self) -> Norm | None:
        """What makes a norm of q's and k's heads, if the family has one."""
        return partial(Qwen3RMSNorm, head_dim(self), eps=self.rms_norm_eps)


class NSAQwen3Model(NSAModel, Qwen3Model):
    """Qwen3Model with NSA."""

    config_class = NSAQwen3Config
    _can_record_outputs = {"hidden_states": Qwen3DecoderLayer}


class NSAQwen3ForCausalLM(NSAForCausalLM, Qwen3ForCausalLM):
    """Qwen3ForCausalLM with NSA."""

    config_class = NSAQwen3Config
    base_class = NSAQwen3Model


class NSAQwen3ForSequenceClassification(NSAPreTrained, Qwen3ForSequenceClassification):
    """Qwen3ForSequenceClassification with NSA."""

    config_class = NSAQwen3Config


# Classes with NSA by the dense ones.
FAMILIES: dict[type[Any], type[Any]] = {
    LlamaModel: NSALlamaModel,
    LlamaForCausalLM: NSALlamaForCausalLM,
    LlamaForSequenceClassification: NSALlamaForSequenceClassification,
    MistralModel: NSAMistralModel,
    MistralForCausalLM: NSAMistralForCausalLM,
    MistralForSequenceClassification: NSAMistralForSequenceClassification,
    Qwen2Model: NSAQwen2Model,
    Qwen2ForCausalLM: NSAQwen2ForCausalLM,
    Qwen2ForSequenceClassification: NSAQwen2ForSequenceClassification,
    Qwen3Model: NSAQwen3Model,
    Qwen3ForCausalLM: NSAQwen3ForCausalLM,
    Qwen3ForSequenceClassification: NSAQwen3ForSequenceClassification,
}

for _dense, _sparse in FAMILIES.items():
    _config = _sparse.config_class
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    _heads = {"Model": AutoModel, "ForCausalLM": AutoModelForCausalLM}
    _head = next((auto for end, auto in _heads.items() if _dense.__name__.endswith(end)), None)
    (_head or AutoModelForSequenceClassification).register(_config, _sparse, exist_ok=True)
