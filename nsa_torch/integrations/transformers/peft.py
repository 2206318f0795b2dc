"""PEFT's models around these: what their `generate` asks besides. PEFT itself is not imported."""

from __future__ import annotations

from typing import Any

NO_PREFIX = (
    "keys and values of one attention are not those of NSA's three branches (in place of PEFT's prefix tuning: prompt "
    "tuning, P-tuning or LoRA)"
)


def wrapper(model: object) -> Any:
    """PEFT's model while its `generate` runs, when it prepares inputs from what this model prepares; else None."""
    around = getattr(vars(model).get("prepare_inputs_for_generation"), "__self__", model)
    return None if around is model else around


def num_virtual_tokens(model: object) -> int:
    """Embeddings that PEFT puts before the tokens of a running `generate`: prompt tuning, P-tuning and the like."""
    config = _prompt_learning(model)
    return 0 if config is None else int(config.num_virtual_tokens)


def _prompt_learning(model: object) -> Any:
    config = getattr(wrapper(model), "active_peft_config", None)
    return config if getattr(config, "is_prompt_learning", False) else None


def check_prompt_learning(model: object, held: int, chunk_size: int | None, assisted: bool) -> None:
    """ValueError for what PEFT's prompt learning gets wrong with a cache, in any model: it feeds other tokens.

    held: columns of the cache that is given to `generate`; chunk_size: prefill_chunk_size. TypeError for prefix tuning.
    """
    config = _prompt_learning(model)
    if config is None:
        return
    if config.peft_type in ("PREFIX_TUNING", "CARTRIDGE"):
        raise TypeError(f"the model must not be one of PEFT's {config.peft_type.value}: {NO_PREFIX}")
    wrong = {"a cache that holds tokens": held > 0, "prefill_chunk_size": chunk_size is not None}
    for name in (name for name, given in (wrong | {"assisted generation": assisted}).items() if given):
        raise ValueError(
            f"{name} must not be given with PEFT's prompt learning, which puts virtual tokens before the prompt alone "
            "and feeds one token a step after it: use_cache=False generates without, and LoRA has no such limit"
        )
