"""The families of models: a configuration, a base model, a causal language model, a sequence classifier of each.

Their attention is Llama's: projections, perhaps with biases and with norms of the heads of q and k, half-split rotary
positions. What a family's own has of that, `NSASelfAttention` takes from it.
"""

from __future__ import annotations

from typing import Any

import transformers
from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from .generation import NSAForCausalLM
from .modeling import NSAModel, NSAPreTrained
from .options import NSAOptions

NAMES = ("Arcee", "Gemma", "Granite", "Llama", "Ministral", "Mistral", "Mixtral", "Qwen2", "Qwen3", "Qwen3Moe")
# Classes with NSA by the dense ones.
FAMILIES: dict[type[Any], type[Any]] = {}


def _family(name: str) -> list[Any]:
    """The classes with NSA of a family, the configuration first; Auto classes and FAMILIES know them from now on."""

    def derive(ending: str, base: type[Any], **attributes: Any) -> Any:
        dense = getattr(transformers, name + ending)
        attributes |= {"__module__": __name__, "__doc__": f"{dense.__name__} with NSA.", "dense_class": dense}
        return type(f"NSA{dense.__name__}", (base, dense), attributes)

    config = strict(derive("Config", NSAOptions, model_type=f"nsa_{name.lower()}"))
    model = derive("Model", NSAModel, config_class=config)
    classes = {AutoModel: model}
    classes[AutoModelForCausalLM] = derive("ForCausalLM", NSAForCausalLM, config_class=config, base_class=model)
    if hasattr(transformers, f"{name}ForSequenceClassification"):
        classifier = derive("ForSequenceClassification", NSAPreTrained, config_class=config)
        classes[AutoModelForSequenceClassification] = classifier
    AutoConfig.register(config.model_type, config, exist_ok=True)
    for auto, sparse in classes.items():
        auto.register(config, sparse, exist_ok=True)
        FAMILIES[sparse.dense_class] = sparse
    return [config, *classes.values()]


# By name, as attributes of this module too.
CLASSES: dict[str, Any] = {sparse.__name__: sparse for name in NAMES for sparse in _family(name)}
globals().update(CLASSES)
