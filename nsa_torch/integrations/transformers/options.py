"""The options of NSAAttention in a model's configuration."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch

from ...checkpoints import VERSION
from ...checks import check_at_least, check_bools

# What transformers calls the attention of a layer, and the cache layers that it needs.
LAYER_TYPE = "nsa_attention"

# Options of NSAAttention that models do not offer, and what says it instead.
_SAID_OTHERWISE = {
    "bias": "qkv_bias and o_bias say it",
    "num_kv_heads": "num_key_value_heads says it",
    "num_heads": "num_attention_heads says it",
}


@dataclass(kw_only=True, repr=False, eq=False)
class NSAOptions:
    """What configurations have besides their family's: the options of `nsa_torch.NSAAttention`, with their names.

    Of qkv_bias, o_bias, qk_norm and scale None means: as the family has it.
    """

    v_head_dim: int | None = None
    block_size: int = 32
    block_stride: int = 16
    select_size: int = 64
    num_selected: int = 16
    num_initial: int = 1
    num_local: int = 2
    window: int = 512
    compression: str = "mlp"
    compression_hidden: int | None = None
    per_head_compression: bool = False
    rope_dim: int | None = None
    rope_interleaved: bool = False
    qkv_bias: bool | None = None
    o_bias: bool | None = None
    qk_norm: bool | None = None
    shared_kv: bool = False
    kv_conv: int | None = None
    gate_dtype: str | torch.dtype | None = None
    scale: float | None = None
    # Order of the rows of k_proj and v_proj in a saved model, see nsa_torch.checkpoints.
    nsa_version: int = VERSION
    base_model_tp_plan: ClassVar[dict[str, str] | None]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # The projections of attention are not cut as the family's own are.
        plan = getattr(cls, "base_model_tp_plan", None) or {}
        cls.base_model_tp_plan = {name: how for name, how in plan.items() if "self_attn" not in name}

    def __post_init__(self, **kwargs: Any) -> None:
        for name in kwargs.keys() & _SAID_OTHERWISE.keys():
            raise TypeError(f"{name} must not be given in a configuration: {_SAID_OTHERWISE[name]}")
        super().__post_init__(**kwargs)  # type: ignore[misc]
        if dropout := getattr(self, "attention_dropout", 0):
            raise ValueError(f"attention_dropout must be 0 with NSA, got {dropout}")
        own = {name: getattr(self, name) for name in ("qkv_bias", "o_bias", "qk_norm")}
        check_bools(**{name: False if given is None else given for name, given in own.items()})
        check_bools(shared_kv=self.shared_kv, rope_interleaved=self.rope_interleaved)
        check_bools(per_head_compression=self.per_head_compression)
        check_at_least(0, kv_conv=0 if self.kv_conv is None else self.kv_conv)
        if self.gate_dtype is not None:
            # from_pretrained keeps some weights in float32, and in no other dtype than its own.
            self.gate_dtype = str(self.gate_dtype).removeprefix("torch.")
            if self.gate_dtype != "float32":
                raise ValueError(f"gate_dtype must be 'float32' or None in a configuration, got {self.gate_dtype!r}")
        if self.rope_dim is not None:
            check_at_least(2, rope_dim=self.rope_dim)
            if self.rope_dim % 2 or self.rope_dim > head_dim(self):
                raise ValueError(f"rope_dim must be even and at most head_dim, {head_dim(self)}, got {self.rope_dim}")

    @property
    def layer_types(self) -> list[str]:
        """Of every layer the kind of attention, from which transformers' caches know their layers."""
        return [LAYER_TYPE] * self.num_hidden_layers  # type: ignore[attr-defined]

    @layer_types.setter
    def layer_types(self, types: list[str] | None) -> None:
        """What a family says of full and sliding attention does not matter here."""

    def validate_layer_type(self) -> None:
        """In place of transformers' check, which knows its own types alone."""

    def nsa_options(self) -> dict[str, Any]:
        """The options by name, but for the rotary tables', which the model makes."""
        names = (field.name for field in fields(NSAOptions) if field.name not in ("nsa_version", "rope_dim"))
        options = {name: getattr(self, name) for name in names}
        if self.gate_dtype is not None:
            options["gate_dtype"] = getattr(torch, str(self.gate_dtype))
        return options

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers does it. What was saved by nsa_torch 0.1 does not tell its version."""
        return super().from_dict({"nsa_version": 1} | config_dict, **kwargs)  # type: ignore[misc]

    def to_dict(self) -> dict[str, Any]:
        """As transformers does it. What is in memory has today's order of rows."""
        return super().to_dict() | {"nsa_version": VERSION}  # type: ignore[misc]


def head_dim(config: Any) -> int:
    """Dk of a configuration that may not name it."""
    named: int | None = getattr(config, "head_dim", None)
    return config.hidden_size // config.num_attention_heads if named is None else named
