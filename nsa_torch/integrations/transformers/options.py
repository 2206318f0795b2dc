"""The options of NSAAttention in a model's configuration."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar

from ...checkpoints import VERSION

# Options of NSAAttention that models do not offer: their families say what is biased, normed and rotated.
_LAYER_ALONE = {
    "compression_hidden",
    "gate_dtype",
    "kv_conv",
    "o_bias",
    "per_head_compression",
    "qk_norm",
    "qkv_bias",
    "rope_dim",
    "rope_interleaved",
    "shared_kv",
}


@dataclass(kw_only=True, repr=False, eq=False)
class NSAOptions:
    """What configurations have besides their family's: the options of `nsa_torch.NSAAttention`, with their names."""

    block_size: int = 32
    block_stride: int = 16
    select_size: int = 64
    num_selected: int = 16
    num_initial: int = 1
    num_local: int = 2
    window: int = 512
    compression: str = "mlp"
    # Order of the rows of k_proj and v_proj in a saved model, see nsa_torch.checkpoints.
    nsa_version: int = VERSION
    base_model_tp_plan: ClassVar[dict[str, str] | None]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # The projections of attention are not cut as the family's own are.
        plan = getattr(cls, "base_model_tp_plan", None) or {}
        cls.base_model_tp_plan = {name: how for name, how in plan.items() if "self_attn" not in name}

    def __post_init__(self, **kwargs: Any) -> None:
        if unknown := sorted(kwargs.keys() & _LAYER_ALONE):
            raise TypeError(f"{', '.join(unknown)} must be left to NSAAttention: a configuration does not have it")
        super().__post_init__(**kwargs)  # type: ignore[misc]
        if dropout := getattr(self, "attention_dropout", 0):
            raise ValueError(f"attention_dropout must be 0 with NSA, got {dropout}")

    def nsa_options(self) -> dict[str, Any]:
        """The options by name."""
        names = (field.name for field in fields(NSAOptions) if field.name != "nsa_version")
        return {name: getattr(self, name) for name in names}

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
