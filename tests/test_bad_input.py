"""Every argument of every function: what is refused, by which exception, in which words."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import nsa_torch
from helpers import OPS, Inputs, make_inputs, make_packed_inputs
from shapes import Shape

SHAPE = Shape(
    "bad_input", 20, 20, 4, 2, 6, 4,
    batch=2, block_size=8, block_stride=4, select_size=16, num_selected=3, num_local=1, window=13,
)  # fmt: skip
LENGTHS = [(9, 9), (5, 20), (0, 3)]  # 32 keys, 14 queries

Change = Callable[[Any], Any]


class Case(NamedTuple):
    """`argument` after `change`, which gets its good value, must raise `error` that names it."""

    op: str
    argument: str
    what: str
    change: Change
    error: type[Exception]
    packed: bool = False
    also: dict[str, Any] = {}

    def __str__(self) -> str:
        return f"{self.op}-{self.argument}-{self.what}"


def constant(value: Any) -> Change:
    return lambda _: value


def _set(index: int | tuple[int, ...], value: int) -> Change:
    def change(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor[index] = value
        return tensor

    return change


def _cut(dim: int) -> Change:
    return lambda x: x.narrow(dim, 0, x.size(dim) - 1)


def _floating(op: str, name: str, *dims: int, like: bool = True) -> Iterator[Case]:
    """dtype and device of a floating tensor, too few dimensions, and one too short in each of dims."""
    yield Case(op, name, "int64", lambda x: x.long(), TypeError)
    yield Case(op, name, "complex", lambda x: x.to(torch.complex64), TypeError)
    if like:
        yield Case(op, name, "float64", lambda x: x.double(), TypeError)
        yield Case(op, name, "meta", lambda x: x.to("meta"), TypeError)
    yield Case(op, name, "flat", lambda x: x.flatten(), ValueError)
    yield Case(op, name, "text", constant("text"), TypeError)
    for dim in dims:
        yield Case(op, name, f"cut_{dim}", _cut(dim), ValueError)


def _integers(op: str, name: str, *values: int) -> Iterator[Case]:
    for value in values:
        yield Case(op, name, str(value), constant(value), ValueError)
    yield Case(op, name, "text", constant("text"), TypeError)


def _lengths(op: str, name: str, total: int) -> Iterator[Case]:
    """cu_seqlens_q or cu_seqlens_k: what its own values and its form can get wrong.

    Beside compressed keys alone, an end of cu_seqlens_k is wrong only when they cannot hold its blocks.
    """
    no_keys = name == "cu_seqlens_k" and op in ("compressed_attention", "select_blocks")
    late = total + 64 if no_keys else total + 1
    for what, change, error in [
        ("int64", lambda x: x.long(), TypeError),
        ("float", lambda x: x.float(), TypeError),
        ("meta", lambda x: x.to("meta"), TypeError),
        ("list", lambda x: x.tolist(), TypeError),
        ("matrix", lambda x: x[None], ValueError),
        ("none", lambda x: x[:0], ValueError),
        ("starts_late", _set(0, 1), ValueError),
        ("negative", _set(1, -1), ValueError),
        ("decreases", _set(2, 3), ValueError),
        ("ends_early", _set(-1, total - 1), ValueError),
        ("ends_late", _set(-1, late), ValueError),
    ]:
        if not (no_keys and what == "ends_early"):
            yield Case(op, name, what, change, error, packed=True)


def _compress() -> Iterator[Case]:
    op = "compress"
    yield from _floating(op, "x", like=False)
    yield Case(op, "x", "dense_with_lengths", lambda x: x[None], ValueError, packed=True)
    yield Case(op, "x", "packed_without_lengths", lambda x: x[0], ValueError)
    yield Case(op, "x", "no_channels", lambda x: x[..., :0], ValueError)
    dims = {"pe": (0, 1), "w1": (-1,), "b1": (-1,), "w2": (-1,), "b2": (-1,)}
    for name, cuts in dims.items():
        yield from (c for c in _floating(op, name, *cuts) if name[0] != "b" or c.what != "flat")
        if name != "w1":
            alone = {other: None for other in dims if other != name}
            yield Case(op, name, "without_w1", lambda x: x, ValueError, also=alone)
        yield Case(op, name, "three_heads", lambda x: x[:1].expand(3, *x.shape[-2:]), ValueError)
    yield Case(op, "b2", "without_w2", lambda x: x, ValueError, also={"w2": None})
    yield from _integers(op, "block_size", 0, -8, 7)
    yield from _integers(op, "block_stride", 0, -4, 3, 16)
    yield from _lengths(op, "cu_seqlens_k", 32)
    yield Case(op, "max_seqlen_k", "too_small", constant(19), ValueError, packed=True)
    yield Case(op, "max_seqlen_k", "text", constant("text"), TypeError, packed=True)


def _queries_keys_values(op: str, k: str, v: str) -> Iterator[Case]:
    yield from _floating(op, "q", 0, 2, 3, like=False)
    yield Case(op, "q", "no_heads", lambda x: x[:, :, :0], ValueError)
    yield Case(op, "q", "no_channels", lambda x: x[..., :0], ValueError)
    yield from _floating(op, k, 0, 3)
    yield Case(op, k, "three_heads", lambda x: x[:, :, [0, 1, 0]], ValueError)
    if v:
        yield from _floating(op, v, 0, 1, 2)
        yield Case(op, v, "no_channels", lambda x: x[..., :0], ValueError)


def _packing(op: str) -> Iterator[Case]:
    yield from _lengths(op, "cu_seqlens_q", 14)
    yield from _lengths(op, "cu_seqlens_k", 32)
    for name in ("cu_seqlens_q", "cu_seqlens_k"):
        yield Case(op, name, "missing", constant(None), ValueError, packed=True)
        yield Case(op, name, "one_sequence_more", lambda x: torch.cat([x, x[-1:]]), ValueError, True)
    yield Case(op, "cu_seqlens_q", "more_than_keys", _set(1, 10), ValueError, packed=True)
    for name, longest in (("max_seqlen_q", 9), ("max_seqlen_k", 20)):
        yield Case(op, name, "too_small", constant(longest - 1), ValueError, packed=True)
        yield Case(op, name, "text", constant("text"), TypeError, packed=True)

    def used(values: list[int], dtype: torch.dtype = torch.int32) -> Change:
        return constant(torch.tensor(values, dtype=dtype))

    yield Case(op, "seqused_k", "dense", used([20, 20]), ValueError)
    yield Case(op, "seqused_k", "int64", used([9, 20, 3], torch.int64), TypeError, packed=True)
    yield Case(op, "seqused_k", "list", constant([9, 20, 3]), TypeError, packed=True)
    yield Case(op, "seqused_k", "two", used([9, 20]), ValueError, packed=True)
    yield Case(op, "seqused_k", "negative", used([9, 20, -1]), ValueError, packed=True)
    yield Case(op, "seqused_k", "more_than_slot", used([9, 20, 4]), ValueError, packed=True)


def _scale(op: str) -> Iterator[Case]:
    yield Case(op, "scale", "nan", constant(torch.nan), ValueError)
    yield Case(op, "scale", "inf", constant(torch.inf), ValueError)
    yield Case(op, "scale", "text", constant("text"), TypeError)
    for value in (1e38, -1e38, 1e300):
        yield Case(op, "scale", str(value), constant(value), ValueError)


def _block_sizes(op: str) -> Iterator[Case]:
    yield from _integers(op, "block_size", 0, -8, 7)
    yield from _integers(op, "block_stride", 0, -4, 3)


def _choice(op: str) -> Iterator[Case]:
    yield from _integers(op, "select_size", 0, -16, 10)
    yield from _integers(op, "num_selected", -1, 0, 1)
    yield from _integers(op, "num_initial", -1, 3)
    yield from _integers(op, "num_local", -1, 3)


def _block_indices(op: str) -> Iterator[Case]:
    name = "block_indices"
    for what, change, error in [
        ("int64", lambda x: x.long(), TypeError),
        ("float", lambda x: x.float(), TypeError),
        ("meta", lambda x: x.to("meta"), TypeError),
        ("list", lambda x: x.tolist(), TypeError),
        ("flat", lambda x: x.flatten(), ValueError),
        ("cut_batch", _cut(0), ValueError),
        ("cut_queries", _cut(1), ValueError),
        ("cut_heads", _cut(2), ValueError),
        ("below_minus_1", _set((1, 7, 0, 1), -2), ValueError),
        ("past_the_keys", _set((1, 7, 0, 1), 2), ValueError),
        ("far_past", _set((0, 19, 1, 2), 2**31 - 1), ValueError),
        ("twice", torch.zeros_like, ValueError),
    ]:
        yield Case(op, name, what, change, error)


def _all_cases() -> Iterator[Case]:
    yield from _compress()
    branches = {
        "compressed_attention": ("k_cmp", "v_cmp"),
        "select_blocks": ("k_cmp", ""),
        "selected_attention": ("k", "v"),
        "window_attention": ("k", "v"),
        "nsa_attention": ("k_slc", "v_slc"),
    }
    for op, (k, v) in branches.items():
        yield from _queries_keys_values(op, k, v)
        yield from _packing(op)
        yield from _scale(op)
    for op in ("compressed_attention", "select_blocks"):
        yield from _block_sizes(op)
        yield from _integers(op, "seqlen_k", -1, 19, 24)
        yield Case(op, "seqlen_k", "missing", constant(None), ValueError)
        yield Case(op, "k_cmp", "one_block_less", _cut(1), ValueError)
    yield from _floating("select_blocks", "lse", 0, 1, 2)
    yield from _choice("select_blocks")
    yield from _integers("selected_attention", "select_size", 0, -16)
    yield from _block_indices("selected_attention")
    yield from _integers("window_attention", "window", 0, -1)
    op = "nsa_attention"
    for name in ("k_cmp", "v_cmp", "k_win", "v_win"):
        yield from _floating(op, name, 0, 1, 2, 3)
    yield Case(op, "gates", "int64", lambda x: x.long(), TypeError)
    yield Case(op, "gates", "meta", lambda x: x.to("meta"), TypeError)
    yield Case(op, "gates", "text", constant("text"), TypeError)
    for dim in range(4):
        yield Case(op, "gates", f"cut_{dim}", _cut(dim), ValueError)
    yield from _block_sizes(op)
    chosen: dict[str, Any] = {"block_indices": None}
    yield from (case._replace(also=chosen) for case in _choice(op))
    yield from _integers(op, "window", 0, -1)
    yield from _block_indices(op)


CASES = list(_all_cases())
# Wrong by the values of a tensor, which only the CPU reads before it starts.
VALUES = ("starts_late", "negative", "decreases", "ends_early", "ends_late", "more_than_keys", "more_than_slot")
VALUES += ("too_small", "below_minus_1", "past_the_keys", "far_past", "twice")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_refused(case: Case) -> None:
    """The message starts from the argument's name and says what it got."""
    assert_refused(case, "cpu")


@pytest.mark.cuda
@pytest.mark.parametrize("case", [case for case in CASES if case.what not in VALUES], ids=str)
def test_refused_on_cuda(case: Case) -> None:
    assert_refused(case, "cuda")


def assert_refused(case: Case, device: str) -> None:
    call = good_call(case.op, case.packed, device)
    changed = case.change(call.get(case.argument))
    if isinstance(changed, Tensor) and changed.device.type == "cpu":
        changed = changed.to(device)
    call |= {case.argument: changed} | case.also
    function = getattr(nsa_torch, case.op)
    with pytest.raises(case.error) as caught:
        function(**call)
    message = str(caught.value)
    assert type(caught.value) is case.error
    assert re.search(rf"\b{case.argument}\b", message), message
    assert re.search(r"\bgot\b", message), message


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_thegood_call_is_good(op: str, packed: bool) -> None:
    """The cases above differ from this call in one argument."""
    getattr(nsa_torch, op)(**good_call(op, packed))


@pytest.mark.parametrize("op", OPS)
def test_every_argument_has_a_case(op: str) -> None:
    tested = {case.argument for case in CASES if case.op == op}
    assert tested == set(inspect.signature(getattr(nsa_torch, op)).parameters)


@pytest.mark.parametrize("op", ["compressed_attention", "select_blocks", "selected_attention"])
def test_fewer_keys_than_queries(op: str) -> None:
    call = good_call(op, False)
    call["q"] = call["q"].repeat(1, 2, 1, 1)
    with pytest.raises(ValueError, match=r"\bq\b.*\bgot\b"):
        getattr(nsa_torch, op)(**call)


@pytest.mark.parametrize("op", OPS)
def test_unknown_argument(op: str) -> None:
    with pytest.raises(TypeError, match="block_length"):
        getattr(nsa_torch, op)(**good_call(op, False), block_length=3)


def good_call(op: str, packed: bool, device: str = "cpu") -> dict[str, Any]:
    exact = make_packed_inputs(op, SHAPE, LENGTHS) if packed else make_inputs(op, SHAPE)
    inputs: Inputs = exact.to(device, torch.float32)
    return inputs.tensors | inputs.options
