"""Tokens after the last packed sequence, which fill a batch of fixed size: nothing of them is kept, and nothing harmed.

They are allowed on a GPU, where cu_seqlens is not read back; the ops fill their rows there (tests/test_packed.py). Here
the layer's part runs on the CPU, with ops that do the same; tests/test_cuda_cache.py has the real ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from nsa_torch import layer_checks, ops
from nsa_torch.cache_step import CacheGeometry, CacheStep, plan_step
from nsa_torch.packing import mark_padding, packed_block_ends, packed_positions, padding_rows
from nsa_torch.sequences import Sequences
from test_module import HIDDEN, make, tokens

PADDING = 7
QUERIES, KEYS = ("q", "gates", "block_indices"), ("x", "k", "v", "k_slc", "v_slc", "k_win", "v_win")


@pytest.fixture(autouse=True)
def _like_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU takes padding: it is marked, and each op gets the tokens before it and returns zeros for it."""
    monkeypatch.setattr(layer_checks, "padding_rows", mark_padding)
    monkeypatch.setattr(Sequences, "_check_chunk", lambda *args: None)
    for name in ("compress", "compressed_attention", "select_blocks", "selected_attention", "window_attention"):
        monkeypatch.setattr(ops, name, _with_padding(getattr(ops, name)))
    monkeypatch.setattr(ops, "nsa_attention", _with_padding(ops.nsa_attention))


def _with_padding(op: Callable[..., Any]) -> Callable[..., Any]:
    import inspect

    names = [n for n, p in inspect.signature(op).parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]

    def call(*args: Any, **options: Any) -> Any:
        options |= dict(zip(names, args, strict=False))
        cu_q, cu_k = options.get("cu_seqlens_q"), options.get("cu_seqlens_k")
        if cu_k is None:
            return op(**options)
        rows = options["q" if cu_q is not None else "x"].size(0)
        for names_of, cu in ((QUERIES, cu_q), (KEYS, cu_k)):
            for name in names_of:
                if cu is not None and isinstance(options.get(name), Tensor):
                    options[name] = options[name][: int(cu[-1])]
        if isinstance(options.get("lse"), Tensor):
            options["lse"] = options["lse"][:, : int(cu_q[-1])]
        result = op(**options)
        if cu_q is None:
            rows //= options["block_stride"]
        fill = -1 if op.__name__ == "select_blocks" else 0
        out = result[0] if isinstance(result, tuple) else result
        out = torch.cat((out, out.new_full((rows - out.size(0), *out.shape[1:]), fill)))
        return (out, result[1]) if isinstance(result, tuple) else out

    return call


def padded(x: Tensor, value: float = torch.nan) -> Tensor:
    return torch.cat((x, x.new_full((PADDING, x.size(-1)), value)))


LENGTHS = [[13, 0, 24], [37], [0, 5], [0, 0]]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("options", [{}, {"bias": True}, {"compression": "mean", "rope_theta": None}], ids=str)
def test_output_and_gradients(lengths: list[int], options: dict[str, Any]) -> None:
    """NaN in padding reaches no live row, no weight gradient; its own rows are zeros."""
    module = make(**options)
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    live = sum(lengths)
    x = tokens(live).requires_grad_()
    expected = module(x, cu_seqlens=cu_seqlens)
    wide = padded(x.detach()).requires_grad_()
    out = module(wide, cu_seqlens=cu_seqlens)
    assert torch.equal(out[live:], torch.zeros(PADDING, HIDDEN, dtype=x.dtype))
    torch.testing.assert_close(out[:live], expected, rtol=1e-12, atol=1e-12)
    with_one = module(wide[None], cu_seqlens=cu_seqlens)
    assert torch.equal(with_one[0], out)

    weight = torch.linspace(-1, 1, expected.numel(), dtype=x.dtype).view_as(expected)
    parameters = list(module.parameters())
    grads = torch.autograd.grad((out * padded(weight, 3.0)).sum(), (wide, *parameters), allow_unused=True)
    want = torch.autograd.grad((expected * weight).sum(), (x, *parameters), allow_unused=True)
    assert torch.equal(grads[0][live:], torch.zeros(PADDING, HIDDEN, dtype=x.dtype))
    for got, exact in zip((grads[0][:live], *grads[1:]), want, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-10, atol=1e-10)


def test_choices() -> None:
    module, x = make(), tokens(37)
    cu_seqlens = torch.tensor([0, 13, 37], dtype=torch.int32)
    expected, got = module.choices(x, cu_seqlens=cu_seqlens), module.choices(padded(x), cu_seqlens=cu_seqlens)
    assert torch.equal(got.block_indices[:37], expected.block_indices) and (got.block_indices[37:] == -1).all()
    torch.testing.assert_close(got.gates[:37], expected.gates)
    assert torch.equal(got.gates[37:], torch.zeros_like(got.gates[37:]))


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
def test_a_cache_does_not_take_padding(bias: bool) -> None:
    """Chunks of one size for any number of tokens: NaN in what fills them up."""
    module, size = make(bias=bias), 24
    sequences, outs, done = tokens(2, 37), [[], []], [0, 0]
    cache = module.new_cache(2, 37)
    for counts in ([9, 8], [1, 1], [0, 20], [14, 7], [0, 0], [13, 1]):
        ends = [start + count for start, count in zip(done, counts, strict=True)]
        chunk = torch.cat([s[a:b] for s, a, b in zip(sequences, done, ends, strict=True)])
        x = torch.cat((chunk, chunk.new_full((size - len(chunk), HIDDEN), torch.nan)))
        cu_seqlens = torch.tensor([0, counts[0], sum(counts)], dtype=torch.int32)
        out = module(x, cu_seqlens=cu_seqlens, cache=cache, max_seqlen=20)
        assert torch.equal(out[len(chunk) :], torch.zeros(size - len(chunk), HIDDEN, dtype=x.dtype))
        for one, part in zip(outs, out[: len(chunk)].split(counts), strict=True):
            one.append(part)
        done = ends
        assert cache.lengths.tolist() == done
    assert done == [37, 37]
    torch.testing.assert_close(torch.stack([torch.cat(o) for o in outs]), module(sequences), rtol=1e-12, atol=1e-12)


GEOMETRY = CacheGeometry(2, 37, 8, 4, 10, 8, 10)


def assert_same_rows(step: CacheStep, bare: CacheStep, live: int) -> None:
    """The plan of the tokens alone, and scratch rows for the padding."""
    for name in ("lengths", "asked", "before"):
        assert torch.equal(getattr(step, name), getattr(bare, name))
    assert torch.equal(step.positions[:live], bare.positions)
    for got, expected, scratch in (
        (step.slots, bare.slots, 2 * 37),
        (step.raw.write, bare.raw.write, 2 * 8),
        (step.window.write, bare.window.write, 2 * 10),
    ):
        assert torch.equal(got[:live], expected) and (got[live:] == scratch).all()
    blocks = bare.block_slots.numel()
    assert torch.equal(step.block_slots[:blocks], bare.block_slots)
    assert (step.block_slots[blocks:] == GEOMETRY.block_rows).all()
    for got, expected in ((step.raw, bare.raw), (step.window, bare.window)):
        assert torch.equal(got.used, expected.used) and torch.equal(got.cu_seqlens, expected.cu_seqlens)
        if expected.gather is not None:
            slots, used = expected.cu_seqlens.tolist(), expected.used.tolist()
            rows = [row for start, count in zip(slots, used, strict=False) for row in range(start, start + count)]
            assert torch.equal(got.gather[rows], expected.gather[rows])


@pytest.mark.parametrize("lengths", [[0, 0], [9, 20], [30, 3], [5, 37]])
@pytest.mark.parametrize("counts", [[1, 1], [5, 0], [0, 2], [7, 17]])
@pytest.mark.parametrize("spare", [1, 3, 30])
def test_plan_of_a_step(lengths: list[int], counts: list[int], spare: int) -> None:
    before, live = torch.tensor(lengths, dtype=torch.int32), sum(counts)
    cu_seqlens = torch.tensor([0, counts[0], live], dtype=torch.int32)
    bare = plan_step(GEOMETRY, before, cu_seqlens, live, max(counts))
    assert_same_rows(plan_step(GEOMETRY, before, cu_seqlens, live + spare, max(counts)), bare, live)


def test_plan_of_padding_alone() -> None:
    before = torch.tensor([9, 20], dtype=torch.int32)
    step = plan_step(GEOMETRY, before, torch.zeros(3, dtype=torch.int32), 5, 1)
    assert torch.equal(step.lengths, before)
    assert (step.slots == 2 * 37).all() and (step.block_slots == GEOMETRY.block_rows).all()
    assert (step.raw.write == 2 * 8).all() and (step.window.write == 2 * 10).all()


def test_packing() -> None:
    cu_seqlens = torch.tensor([0, 13, 37], dtype=torch.int32)
    assert mark_padding(cu_seqlens, 40).flatten().tolist() == [False] * 37 + [True] * 3
    assert padding_rows(cu_seqlens, 40) is None  # refused on the CPU
    assert torch.equal(packed_positions(cu_seqlens, 40)[:37], packed_positions(cu_seqlens, 37))
    ends = packed_block_ends(cu_seqlens, 37, 9, 8, 4)
    assert torch.equal(packed_block_ends(cu_seqlens, 40, 10, 8, 4)[:7], ends[:7])
