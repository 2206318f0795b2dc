"""rotate, the op of rotary positions: the formula in float64, strides, both layouts, and its gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import nsa_torch
from nsa_torch.rope import for_heads, rope_tables, rotate

SIZES = [
    (7, 1, 2),
    (13, 3, 6),
    (33, 4, 20),
    (5, 33, 64),
    (50, 32, 128),
    (17, 2, 256),
    (3, 70, 192),
    (0, 2, 8),
    (2, 1, 600),
]
LAYOUTS = ["dense", "packed", "batch_of_tables", "view"]


def formula(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x cos + (-second half, first half) sin, as Llama has it."""
    first, second = x.double().chunk(2, dim=-1)
    return x.double() * cos.double() + torch.cat((-second, first), dim=-1) * sin.double()


def make(layout: str, size: tuple[int, int, int], dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """x, and tables whose two halves differ, so that each must be read at its place."""
    tokens, heads, dim = size
    random = torch.Generator().manual_seed(tokens)
    batch = () if layout == "packed" else (2,)
    x = torch.randn(*batch, tokens, 3, heads, dim, generator=random).to(device, dtype)
    x = x.unbind(-3)[1] if layout == "view" else x[..., 0, :, :].contiguous()
    rows = (2, tokens) if layout == "batch_of_tables" else (tokens,)
    table_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    cos, sin = (torch.randn(*rows, 1, dim, generator=random).to(device, table_dtype) for _ in range(2))
    return x, cos, sin


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_is_the_formula(layout: str, size: tuple[int, int, int], low_precision) -> None:
    dtype = low_precision.dtype
    x, cos, sin = make(layout, size, dtype, low_precision.device)
    out = nsa_torch.rotate(x.requires_grad_(), cos, sin)
    assert out.dtype == dtype and out.shape == x.shape
    expected = formula(x, cos, sin)
    # Rounded once, from float32.
    bound = torch.finfo(dtype).eps * expected.abs() + 8 * torch.finfo(torch.float32).eps
    assert ((out.double() - expected).abs() <= bound + 1e-6).all()
    grad = torch.randn_like(out)
    (got,) = torch.autograd.grad(out, x, grad)
    wide = x.detach().double().requires_grad_()
    (truth,) = torch.autograd.grad(formula(wide, cos, sin), wide, grad.double())
    assert ((got.double() - truth).abs() <= torch.finfo(dtype).eps * truth.abs() + 2e-6).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradcheck(layout: str) -> None:
    x, cos, sin = make(layout, (5, 2, 6), torch.float64, "cpu")
    x = x.contiguous().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: nsa_torch.rotate(x, cos, sin), x)
    assert torch.autograd.gradgradcheck(lambda x: nsa_torch.rotate(x, cos, sin), x)


def test_gradients_of_tables(device: str) -> None:
    """Tables that a model learns get their gradients, and the layer the same output."""
    x, cos, sin = make("dense", (9, 3, 8), torch.float32, device)
    expected = rotate(x, (cos, sin))
    out = rotate(x, (cos.requires_grad_(), sin.requires_grad_()))
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    assert cos.grad is not None and cos.grad.abs().sum() > 0
    assert sin.grad is not None and sin.grad.abs().sum() > 0


def test_tables_of_half_precision(device: str) -> None:
    """As Hugging Face's models in bfloat16 give them."""
    x, _, _ = make("dense", (9, 3, 8), torch.bfloat16, device)
    tables = for_heads(rope_tables(torch.arange(9, device=device), 8, 1e4, torch.float32))
    assert tables is not None
    cos, sin = (table.bfloat16() for table in tables)
    torch.testing.assert_close(rotate(x, (cos, sin)).double(), formula(x, cos, sin), atol=0.05, rtol=0.02)


def test_bad_input_is_named(device: str) -> None:
    x, cos, sin = make("dense", (9, 3, 8), torch.float32, device)
    for error, name, arguments in [
        (TypeError, "x", (x.long(), cos, sin)),
        (ValueError, "x", (x[0, 0], cos, sin)),
        (ValueError, "x", (x[..., :7], cos, sin)),
        (TypeError, "cos", (x, cos.long(), sin)),
        (ValueError, "cos", (x, cos[..., :4], sin)),
        (ValueError, "sin", (x, cos, sin.squeeze(-2))),
        (TypeError, "sin", (x, cos, sin.to("meta"))),
        (TypeError, "cos", (x, 1.0, sin)),
    ]:
        with pytest.raises(error, match=f"^{name} must"):
            nsa_torch.rotate(*arguments)
