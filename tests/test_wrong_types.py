"""What is given as the wrong kind of thing: an error that names the argument, before any work, and nothing changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_models import make_model, make_sequences
from nsa_torch import NSAAttention
from nsa_torch.block_compression import BlockCompression
from test_module import DK, HEADS, HIDDEN, KV_HEADS, make, tokens


@pytest.mark.parametrize("value", [16.5, 16.0, True, "16"], ids=repr)
@pytest.mark.parametrize("name", ["batch_size", "max_length", "num_layers", "max_crop"])
def test_sizes_of_a_cache(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=rf"^{name} must be an int, got {type(value).__name__}$"):
        make().new_cache(**{"batch_size": 1, "max_length": 16} | {name: value})


@pytest.mark.parametrize("name", ["num_heads", "head_dim", "window", "num_selected", "num_local", "block_stride"])
def test_sizes_of_a_layer(name: str) -> None:
    sizes: dict[str, Any] = {"num_heads": HEADS, "num_kv_heads": KV_HEADS, "head_dim": DK}
    with pytest.raises(TypeError, match=rf"^{name} must be an int, got float$"):
        NSAAttention(HIDDEN, **sizes | {name: 4.0})


def test_sizes_of_a_compression() -> None:
    with pytest.raises(TypeError, match=r"^hidden_size must be an int, got float$"):
        BlockCompression(DK, hidden_size=16.0)  # type: ignore[arg-type]


X = tokens(1, 10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden_states": X.tolist()}, "hidden_states must be a tensor, got list"),
        ({"hidden_states": X, "cu_seqlens": [0, 10]}, "cu_seqlens must be a tensor, got list"),
        (
            {"hidden_states": X, "position_embeddings": X},
            r"position_embeddings must be \(cos, sin\) or one complex tensor, got torch.float64",
        ),
        ({"hidden_states": X, "position_embeddings": (1, 2)}, r"position_embeddings\[0\] must be a tensor, got int"),
        ({"hidden_states": X, "cache": "new"}, "cache must be an NSACache or a layer of one, got str"),
    ],
    ids=lambda x: "" if isinstance(x, str) else str(list(x)),
)
def test_a_layers_input(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=f"^{message}$"), torch.no_grad():
        make()(**arguments)


def test_a_cache_records_no_gradient_of_the_input() -> None:
    layer = make().requires_grad_(False)
    cache = layer.new_cache(1)
    with pytest.raises(RuntimeError, match=r"^a cache records no gradients: use torch.no_grad\(\)$"):
        layer(X.clone().requires_grad_(), cache=cache)
    assert cache.lengths.tolist() == [0]
    assert layer(X, cache=cache).shape == X.shape


@pytest.mark.parametrize("shape", [(1, 7), (2, 12), (12,)], ids=str)
def test_position_ids_of_a_model(shape: tuple[int, ...]) -> None:
    model, ids = make_model(torch.float32), make_sequences([12])[0][None]
    with pytest.raises(ValueError, match=r"^position_ids must be \(B or 1, T\) = \(1, 12\), got shape "):
        model(ids, position_ids=torch.zeros(shape, dtype=torch.long))


def test_a_mask_of_another_length() -> None:
    model, ids = make_model(torch.float32), make_sequences([12])[0][None]
    with pytest.raises(ValueError, match=r"^attention_mask must be \(B, T\) = \(1, 12\)"):
        model(ids, attention_mask=torch.ones(1, 7))
    with pytest.raises(ValueError, match=r"must be \(B"):
        model.generate(ids, attention_mask=torch.ones(1, 7, dtype=torch.long), max_new_tokens=3)
