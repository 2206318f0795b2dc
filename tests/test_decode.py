"""nsa_attention_with_kvcache: against the reference over the same keys, gathered from their pages."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

import nsa_torch
from helpers import sharpest
from launches import launched
from pages import Pages

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


def error(actual: Tensor, expected: Tensor) -> float:
    return (actual.double().cpu().reshape(expected.shape) - expected).abs().max().item() if expected.numel() else 0.0


def check(pages: Pages, device: str, dtype: torch.dtype, tolerance: float, **more: Any) -> None:
    out = nsa_torch.nsa_attention_with_kvcache(**pages.arguments(device, dtype), **more)
    assert out.dtype == dtype
    assert error(out, pages.expected(dtype)) <= tolerance


CASES = {
    "plain": Pages([200, 64, 1], [1, 1, 1]),
    "four": Pages([300, 129], [4, 4]),
    "ragged": Pages([300, 40, 31, 700], [3, 1, 0, 8]),
    "shorter than its queries": Pages([3, 90], [5, 5]),
    "long": Pages([2500, 1999], [1, 1], page=128),
    "one page": Pages([500, 100], [2, 2], page=512, spare=0),
    "many heads": Pages([400, 170], [1, 1], heads=(40, 1)),
    "many heads and queries": Pages([400, 170], [3, 3], heads=(48, 2)),
    "wide": Pages([300], [1], dims=(192, 128)),
    "widest": Pages([300], [2], dims=(256, 256), heads=(2, 1)),
    "equal": Pages([1100, 64], [1, 1], dims=(64, 64), heads=(16, 1)),
    "d 128": Pages([900, 650], [1, 1], dims=(128, 128), heads=(16, 1)),
    "other sizes": Pages(
        [333, 470],
        [2, 2],
        page=96,
        options={"block_size": 64, "block_stride": 8, "select_size": 48, "num_selected": 5, "window": 33},
    ),
    "blocks of one piece": Pages(
        [333], [1], page=32, options={"block_size": 64, "block_stride": 16, "select_size": 16, "num_selected": 7}
    ),
    "few chosen": Pages([1500], [1], options={"num_selected": 4}),
    "scale": Pages([400], [1], options={"scale": 0.7, "num_selected": 5}),
    "negative scale": Pages([400], [1], options={"scale": -0.2, "num_selected": 5}),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES)
def test_is_the_reference(case: str, device: str) -> None:
    dtype, tolerance = sharpest(device)
    check(CASES[case], device, dtype, tolerance)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_in_16_bits(case: str, dtype: torch.dtype) -> None:
    """The choice is made of 16-bit inputs in float32: where two blocks nearly tie, another list is right as well."""
    pages = CASES[case]
    out = nsa_torch.nsa_attention_with_kvcache(**pages.arguments("cuda", dtype))
    expected = pages.expected(dtype)
    wrong = (out.double().cpu().reshape(expected.shape) - expected).abs().amax(-1) > 2e-2
    assert wrong.float().mean().item() <= 0.02
    assert out.isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seed", range(12))
def test_random_batches(seed: int, device: str) -> None:
    draw = random.Random(seed)
    stride = draw.choice([4, 8, 16])
    select = stride * draw.choice([1, 2, 4])
    options = {
        "block_size": stride * draw.choice([1, 2, 4]),
        "block_stride": stride,
        "select_size": select,
        "num_selected": draw.randint(3, 12),
        "num_initial": draw.randint(0, 1),
        "num_local": draw.randint(0, 2),
        "window": draw.choice([1, 7, 100]),
    }
    batch = draw.randint(1, 4)
    group, heads = draw.choice([1, 3, 16]), draw.randint(1, 3)
    pages = Pages(
        [draw.randint(8, 600) for _ in range(batch)],
        [draw.randint(1, 8) for _ in range(batch)],
        heads=(group * heads, heads),
        dims=(draw.choice([8, 24]), draw.choice([8, 16])),
        page=select * draw.randint(1, 3),
        seed=seed,
        options=options,
    )
    dtype, tolerance = sharpest(device)
    check(pages, device, dtype, tolerance, num_splits=draw.choice([None, 1, 3]))


@pytest.mark.parametrize("device", DEVICES)
def test_strides_of_a_packed_cache(device: str) -> None:
    """K and V side by side in one tensor, and heads before rows, as serving engines hold them."""
    dtype, tolerance = sharpest(device)
    pages = Pages([300, 170], [1, 1], dims=(16, 16))
    given = pages.arguments(device, dtype)
    for branch in ("slc", "win"):
        both = torch.stack((given[f"k_{branch}"], given[f"v_{branch}"]), 1).transpose(2, 3).contiguous()
        given[f"k_{branch}"], given[f"v_{branch}"] = both.transpose(2, 3).unbind(1)
    assert error(nsa_torch.nsa_attention_with_kvcache(**given), pages.expected(dtype)) <= tolerance


@pytest.mark.parametrize("device", DEVICES)
def test_window_in_pages_of_its_own(device: str) -> None:
    """Those that no query can see are gone: the table names a page that is not there."""
    dtype, tolerance = sharpest(device)
    pages = Pages([300, 170], [2, 2])
    given = pages.arguments(device, dtype)
    size = 20
    table = torch.full((2, 15), 10**6, dtype=torch.int32)
    for name in ("k_win", "v_win"):
        pool = torch.full((30, size, *given[name].shape[2:]), float("nan"), dtype=dtype)
        for b, (length, dense) in enumerate(zip(pages.lengths, pages.dense, strict=True)):
            first = max(length - 2 + 1 - pages.options["window"], 0)
            for page in range(first // size, -(-length // size)):
                table[b, page] = 15 * b + page
                rows = dense[name][page * size : (page + 1) * size]
                pool[15 * b + page, : len(rows)] = rows.to(dtype)
        given[name] = pool.to(device)
    out = nsa_torch.nsa_attention_with_kvcache(**given, window_table=table.to(device))
    assert error(out, pages.expected(dtype)) <= tolerance


@pytest.mark.parametrize("device", DEVICES)
def test_four_tokens_are_four_steps_of_one(device: str) -> None:
    dtype, tolerance = sharpest(device)
    pages = Pages([300, 170], [4, 4])
    given = pages.arguments(device, dtype)
    together = nsa_torch.nsa_attention_with_kvcache(**given)
    for i in range(4):
        one = given | {name: given[name][:, i : i + 1] for name in ("q", "gates")}
        alone = nsa_torch.nsa_attention_with_kvcache(**one | {"cache_seqlens": given["cache_seqlens"] - 3 + i})
        assert (alone - together[:, i : i + 1]).abs().max().item() <= tolerance


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_sequence_is_the_same_in_any_batch(dtype: torch.dtype) -> None:
    pages = Pages([900, 700, 650], [1, 1, 1], dims=(128, 128), heads=(16, 1))
    given = pages.arguments("cuda", dtype)
    together = nsa_torch.nsa_attention_with_kvcache(**given, num_splits=4)
    alone = {name: given[name][1:2] for name in ("q", "gates", "cache_seqlens", "block_table")}
    assert torch.equal(nsa_torch.nsa_attention_with_kvcache(**given | alone, num_splits=4), together[1:2])


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_graph_is_replayed_while_lengths_and_tables_change(dtype: torch.dtype) -> None:
    pages = Pages([900, 700], [1, 1], dims=(64, 64), heads=(16, 1))
    given = pages.arguments("cuda", dtype)
    lengths, table = given["cache_seqlens"], given["block_table"]
    nsa_torch.nsa_attention_with_kvcache(**given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = nsa_torch.nsa_attention_with_kvcache(**given)
    lengths -= torch.tensor([200, 3], device="cuda", dtype=torch.int32)
    table.copy_(table.flip(0))
    lengths.copy_(lengths.flip(0))
    graph.replay()
    assert torch.equal(out, nsa_torch.nsa_attention_with_kvcache(**given))


@pytest.mark.cuda
def test_lengths_past_the_table_read_nothing_past_it() -> None:
    pages = Pages([256, 128], [1, 1], page=64, spare=0)
    given = pages.arguments("cuda", torch.float32)
    held = nsa_torch.nsa_attention_with_kvcache(**given)
    given["cache_seqlens"][0] = 100_000
    assert torch.equal(nsa_torch.nsa_attention_with_kvcache(**given)[0], held[0])
    given["block_table"][0, 0] = 10**6
    assert nsa_torch.nsa_attention_with_kvcache(**given).isfinite().all()


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (lambda g: g | {"q": g["q"].expand(-1, 9, -1, -1), "gates": g["gates"].expand(-1, 9, -1, -1)}, 0, "at most 8"),
        (lambda g: g | {"q": g["q"][..., :-1]}, 0, "k_cmp must be"),
        (lambda g: g | {"cache_seqlens": g["cache_seqlens"].long()}, 1, "cache_seqlens must be int32"),
        (lambda g: g | {"cache_seqlens": g["cache_seqlens"][:1]}, 0, "cache_seqlens must be"),
        (lambda g: g | {"block_table": g["block_table"].float()}, 1, "block_table must be int32"),
        (lambda g: g | {"block_table": g["block_table"][0]}, 0, "block_table must be"),
        (lambda g: g | {"select_size": 48}, 0, "pages of a multiple of select_size"),
        (lambda g: g | {"k_cmp": g["k_cmp"][:, 1:], "v_cmp": g["v_cmp"][:, 1:]}, 0, "one row a page"),
        (lambda g: g | {"k_win": g["k_win"][:, 1:], "v_win": g["v_win"][:, 1:]}, 0, "window_table"),
        (lambda g: g | {"v_slc": g["v_slc"][1:]}, 0, "v_slc must"),
        (lambda g: g | {"v_slc": g["v_slc"].float()}, 1, "v_slc must"),
        (lambda g: g | {"gates": g["gates"][..., :2]}, 0, "gates must"),
        (lambda g: g | {"num_splits": 0}, 0, "num_splits must"),
        (lambda g: g | {"num_selected": 2}, 0, "num_selected must"),
        (lambda g: g | {"window": 0}, 0, "window must"),
        (lambda g: g | {"max_seqlen_q": 3}, 0, "max_seqlen_q must"),
        (lambda g: g | {"q": g["q"].requires_grad_()}, 0, "no gradient"),
        (lambda g: g | {"cache_seqlens": g["cache_seqlens"] + 1000}, 0, "cache_seqlens must be between"),
        (lambda g: g | {"block_table": g["block_table"] + 1000}, 0, "must name pages of the pool"),
    ],
)
def test_bad_input(change: Any, kind: int, words: str) -> None:
    given = change(Pages([200, 64], [1, 1]).arguments("cpu", torch.float64))
    with pytest.raises((ValueError, TypeError)[kind], match=words):
        nsa_torch.nsa_attention_with_kvcache(**given)


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device: str) -> None:
    given = Pages([200, 64], [1, 1]).arguments(device, torch.float32)
    names = ("q", "k_cmp", "v_cmp", "k_slc", "v_slc", "k_win", "v_win", "gates")
    tensors = tuple(given.pop(name) for name in names)
    torch.library.opcheck(torch.ops.nsa.nsa_attention_with_kvcache, tensors, given)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("case", ["plain", "four", "many heads", "wide", "one page"])
def test_a_profile_shows_the_kernels_of_the_plan(case: str, dtype: str) -> None:
    pages = CASES[case]
    given = pages.arguments("cuda", getattr(torch, dtype))
    sizes = {name: pages.options[name] for name in ("block_size", "block_stride", "select_size", "window")}
    plan = nsa_torch.which_kernel(
        "nsa_attention_with_kvcache",
        device="cuda",
        dtype=dtype,
        batch=len(pages.lengths),
        num_heads=pages.heads[0],
        num_kv_heads=pages.heads[1],
        head_dim=pages.dims[0],
        v_head_dim=pages.dims[1],
        num_queries=max(pages.queries),
        num_keys=pages.table.size(1) * pages.page,
        **sizes,
    )
    expected = {launch.kernel: launch.count for launch in plan.launches}
    assert launched(lambda: nsa_torch.nsa_attention_with_kvcache(**given)) == expected
