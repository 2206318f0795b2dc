"""A training step of the layer does nothing to whole tensors but products, rotations and attention."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nsa_torch import NSAAttention

TOKENS, HIDDEN, HEADS, KV_HEADS, DIM = 200, 128, 8, 2, 16  # the input is as large as q, and larger than all keys


class Written(TorchDispatchMode):
    """Counts ops, not views, whose results have at least as many numbers as the layer's input."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        view = func is torch.ops.aten._unsafe_view.default or any(r.alias_info for r in func._schema.returns)
        if not view:
            outputs = result if isinstance(result, tuple | list) else [result]
            if any(isinstance(t, Tensor) and t.numel() >= TOKENS * HIDDEN for t in outputs):
                self.ops[func.name().split(".")[0]] += 1
        return result


def ops_of_a_step(device: str, dtype: torch.dtype, *, autocast: bool) -> Counter[str]:
    torch.manual_seed(0)
    sizes = {"num_selected": 4, "window": 40, "device": device, "dtype": dtype}
    layer = NSAAttention(HIDDEN, HEADS, KV_HEADS, DIM, **sizes)
    x = torch.randn(1, TOKENS, HIDDEN, device=device, dtype=dtype, requires_grad=True)
    with Written() as written:
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            out = layer(x.view_as(x))
        # The engine runs a GPU's nodes on a thread of its own, where no mode is seen.
        with torch.autograd.set_multithreading_enabled(False):
            out.backward(torch.ones_like(out))
    return written.ops


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_of_one_dtype(dtype: torch.dtype, device: str) -> None:
    ops = ops_of_a_step(device, dtype, autocast=False)
    assert ops.pop("aten::ones_like") == 1
    # q and out of q_proj and o_proj; their gradients, and one for x from each of the four projections, added up.
    assert ops.pop("aten::mm") >= 6
    assert ops.pop("aten::add", 0) + ops.pop("aten::add_", 0) == 3
    assert ops.pop("nsa::rotate") == 2  # q and its gradient; keys are smaller
    assert ops.pop("nsa::nsa_attention_forward") == ops.pop("nsa::nsa_attention_backward") == 1
    assert not ops, ops


def test_a_step_under_autocast_casts_tokens_once(device: str) -> None:
    ops = ops_of_a_step(device, torch.float32, autocast=True)
    assert ops.pop("aten::_to_copy") == 2  # the tokens, and their gradient
