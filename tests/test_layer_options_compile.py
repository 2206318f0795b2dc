"""Layers with options under torch.compile, without graph breaks, and torch.export: what eager execution gives."""

from __future__ import annotations

import io
import itertools
from typing import Any

import pytest
import torch

from test_compile import assert_same, compiled, graphs, loss_of, make, tokens, train
from test_layer_options import ALL, OPTIONS
from test_rotary_tables import tables_of

pytestmark = pytest.mark.usefixtures("one_thread", "fresh_compiler")

# Each option, all, and a dtype of the gates.
VARIANTS = [*OPTIONS.values(), ALL | {"gate_dtype": torch.float64}]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_training_step(options: dict[str, Any]) -> None:
    module = make(**options)
    function = compiled(loss_of)
    for length in (37, 50, 61):
        x = tokens(2, length)
        assert_same(train(function, module, x), train(loss_of, module, x), 1e-4)
    assert graphs() == 2


def test_training_step_with_inductor() -> None:
    module, x = make(**ALL), tokens(2, 37)
    assert_same(train(compiled(loss_of, "inductor"), module, x), train(loss_of, module, x), 1e-4)


def test_training_step_on_packed_sequences() -> None:
    module = make(**ALL)
    function = compiled(loss_of)
    for lengths in ([13, 0, 24], [1, 36, 0], [20, 20, 21], [5, 60, 2]):
        cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
        x, options = tokens(sum(lengths)), {"cu_seqlens": cu_seqlens}
        assert_same(train(function, module, x, **options), train(loss_of, module, x, **options), 1e-4)
    assert graphs() == 2


@pytest.mark.parametrize("complex_tables", [False, True])
def test_training_step_with_tables(complex_tables: bool) -> None:
    module, x = make(rope_theta=None, rope_interleaved=True), tokens(2, 37)
    cos, sin = (table.float() for table in tables_of(4, 500.0, 37, interleaved=True))
    given = torch.complex(cos[:, ::2], sin[:, ::2]) if complex_tables else (cos, sin)
    options = {"position_embeddings": given}
    assert_same(train(compiled(loss_of), module, x, **options), train(loss_of, module, x, **options), 1e-4)


def test_training_step_under_autocast() -> None:
    module, x = make(**ALL, gate_dtype=torch.float32), tokens(2, 37)
    function = compiled(loss_of)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, expected = train(function, module, x), train(loss_of, module, x)
    assert_same(got, expected, 2e-2)


@torch.no_grad()
@pytest.mark.parametrize("options", [{"kv_conv": 4}, {"shared_kv": True}, ALL], ids=str)
def test_decoding(options: dict[str, Any]) -> None:
    module, x = make(**options), tokens(2, 37)
    cache = module.new_cache(2, 64)
    function = compiled(lambda part, cache: module(part, cache=cache))
    outs = [function(part, cache) for part in x.split([9] + [1] * 20 + [8], dim=1)]
    torch.testing.assert_close(torch.cat(outs, dim=1), module(x), rtol=1e-5, atol=1e-5)
    assert graphs() <= 4
    function(tokens(2, 8, seed=3), cache)
    assert cache.rollback() and cache.lengths.tolist() == [37, 37]
    more = tokens(2, 8, seed=4)
    expected = module(torch.cat((x, more), dim=1))[:, 37:]
    torch.testing.assert_close(function(more, cache), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "strict"), [(options, False) for options in (*OPTIONS.values(), ALL)] + [(ALL, True)], ids=str
)
def test_export(options: dict[str, Any], strict: bool) -> None:
    module = make(**options).eval()
    sizes = {"hidden_states": {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", min=16)}}
    program = torch.export.export(module, (tokens(2, 37),), dynamic_shapes=sizes, strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    for exported in (program, torch.export.load(file)):
        for shape in ((2, 37), (3, 50), (2, 16), (2, 1003)):
            x = tokens(*shape)
            torch.testing.assert_close(exported.module()(x), module(x), rtol=1e-5, atol=1e-5)


def test_export_of_packed_sequences() -> None:
    module = make(**ALL).eval()
    cu_seqlens = torch.tensor([0, 20, 37], dtype=torch.int32)
    sizes = {"hidden_states": {0: torch.export.Dim("length", min=16)}, "cu_seqlens": None}
    program = torch.export.export(module, (tokens(37),), {"cu_seqlens": cu_seqlens}, dynamic_shapes=sizes)
    for bounds in ([0, 20, 37], [0, 50, 51], [0, 0, 16]):
        x, cu_seqlens = tokens(bounds[-1]), torch.tensor(bounds, dtype=torch.int32)
        out = program.module()(x, cu_seqlens=cu_seqlens)
        torch.testing.assert_close(out, module(x, cu_seqlens=cu_seqlens), rtol=1e-5, atol=1e-5)
