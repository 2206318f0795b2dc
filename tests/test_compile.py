"""torch.compile without graph breaks, and torch.export, give what eager execution gives."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from nsa_torch import NSAAttention
from nsa_torch import cache as cache_module
from nsa_torch.rope import rope_tables

pytestmark = pytest.mark.usefixtures("one_thread", "fresh_compiler")

HIDDEN, HEADS, KV_HEADS, DK, DV = 24, 4, 2, 8, 6
BLOCKS = {"block_size": 8, "block_stride": 4, "select_size": 8, "num_selected": 4, "window": 10}


def make(**options) -> NSAAttention:
    torch.manual_seed(0)
    return NSAAttention(HIDDEN, HEADS, KV_HEADS, DK, DV, **(BLOCKS | options))


def tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, HIDDEN, generator=torch.Generator().manual_seed(seed))


def compiled(function: Callable, backend: str = "aot_eager", dynamic: bool | None = None) -> Callable:
    """The function, refusing graph breaks."""
    return torch.compile(function, fullgraph=True, backend=backend, dynamic=dynamic)


def graphs() -> int:
    """Graphs compiled in this test."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def loss_of(module: nn.Module, x: Tensor, **options) -> Tensor:
    out = module(x, **options)
    return (out * torch.linspace(-1, 1, HIDDEN).to(out)).square().sum()


def train(loss_function: Callable, module: nn.Module, x: Tensor, **options) -> dict[str, Tensor]:
    """The loss of a step, and its gradients: the backward is a compiled graph too."""
    module.zero_grad()
    x = x.clone().requires_grad_()
    loss = loss_function(module, x, **options)
    loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in module.named_parameters()}
    return {"loss": loss.detach(), "hidden_states": x.grad} | gradients


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        error = (got[name] - tensor).norm()
        assert error <= tolerance * (tensor.norm() + 1e-3), (name, error, tensor.norm())


def test_training_step_with_inductor():
    module = make()
    function = compiled(loss_of, "inductor")
    for length in (37, 50, 61):
        x = tokens(2, length)
        assert_same(train(function, module, x), train(loss_of, module, x), 1e-4)
    assert graphs() == 2  # for the first length, then for any


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("compression", ["mlp", "linear", "mean"])
def test_training_step(compression, dynamic):
    module = make(compression=compression)
    function = compiled(loss_of, dynamic=dynamic)
    for length in (37, 50, 61):
        x = tokens(2, length)
        assert_same(train(function, module, x), train(loss_of, module, x), 1e-4)
    assert graphs() == (1 if dynamic else 2)


@pytest.mark.parametrize("length", [1, 7, 8, 9])
def test_training_step_on_short_sequences(length):
    module, x = make(), tokens(2, length)
    function = compiled(loss_of)
    assert_same(train(function, module, x), train(loss_of, module, x), 1e-4)


def test_training_step_on_packed_sequences():
    module = make()
    function = compiled(loss_of)
    for lengths in ([13, 0, 24], [1, 36, 0], [20, 20, 21], [5, 60, 2]):
        cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
        x, options = tokens(sum(lengths)), {"cu_seqlens": cu_seqlens}
        assert_same(train(function, module, x, **options), train(loss_of, module, x, **options), 1e-4)
    assert graphs() == 2


def test_training_step_with_position_embeddings():
    module, x = make(rope_theta=None), tokens(2, 37)
    tables = rope_tables(torch.arange(37), DK, 500.0, x.dtype)
    function = compiled(loss_of)
    options = {"position_embeddings": tables}
    assert_same(train(function, module, x, **options), train(loss_of, module, x, **options), 1e-4)


def test_training_step_under_autocast():
    module, x = make(), tokens(2, 37)
    function = compiled(loss_of)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, expected = train(function, module, x), train(loss_of, module, x)
    assert_same(got, expected, 2e-2)


def test_stack_of_layers_is_one_graph():
    layers = nn.ModuleList(make() for _ in range(2))

    def model_loss(layers: nn.ModuleList, x: Tensor) -> Tensor:
        for layer in layers:
            x = x + layer(x)
        return x.square().mean()

    x = tokens(2, 37)
    function = compiled(model_loss)
    assert_same(train(function, layers, x), train(model_loss, layers, x), 1e-4)
    assert graphs() == 1


@torch.no_grad()
def test_decoding():
    """One graph takes the prompt; a step's first graph knows that the cache held more, others not."""
    module, x = make(), tokens(2, 37)
    cache = module.new_cache(2, 64)
    function = compiled(lambda part, cache: module(part, cache=cache))
    outs = [function(part, cache) for part in x.split([9] + [1] * 28, dim=1)]
    torch.testing.assert_close(torch.cat(outs, dim=1), module(x), rtol=1e-5, atol=1e-5)
    assert cache.lengths.tolist() == [37, 37]
    assert graphs() <= 4


@torch.no_grad()
def test_decoding_of_several_layers_and_ragged_chunks():
    layers = [make() for _ in range(2)]
    cache = layers[0].new_cache(3, 64, num_layers=2)

    def model(x: Tensor, caches, **options) -> Tensor:
        for layer, layer_cache in zip(layers, caches, strict=True):
            x = x + layer(x, cache=layer_cache, **options)
        return x

    function = compiled(model)
    sequences, outs, done = tokens(3, 37), [[], [], []], [0, 0, 0]
    for counts in ([7, 0, 21], [1, 1, 1], [0, 1, 1], [20, 9, 3]):
        ends = [start + count for start, count in zip(done, counts, strict=True)]
        parts = [s[a:b] for s, a, b in zip(sequences, done, ends, strict=True)]
        cu_seqlens = torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32)
        results = function(torch.cat(parts), cache, cu_seqlens=cu_seqlens, max_seqlen=max(counts))
        for out, part in zip(outs, results.split(counts), strict=True):
            out.append(part)
        done = ends
    for sequence, out, end in zip(sequences, outs, done, strict=True):
        expected = model(sequence[None, :end], [None] * 2)[0]
        torch.testing.assert_close(torch.cat(out), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("strict", [True, False])
def test_export(strict):
    module = make().eval()
    sizes = {"hidden_states": {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}}
    program = torch.export.export(module, (tokens(2, 37),), dynamic_shapes=sizes, strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    for exported in (program, torch.export.load(file)):
        for shape in ((2, 37), (3, 50), (2, 1003), (1, 1), (2, 1), (2, 7), (1, 8), (2, 11), (2, 12)):
            x = tokens(*shape)
            torch.testing.assert_close(exported.module()(x), module(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"max_seqlen": 50}])
def test_export_of_packed_sequences(options):
    module = make(bias=True).eval()
    given = {"cu_seqlens": torch.tensor([0, 20, 37], dtype=torch.int32), **options}
    sizes = {"hidden_states": {0: torch.export.Dim("length")}, "cu_seqlens": {0: torch.export.Dim("ends")}}
    sizes |= dict.fromkeys(options)
    program = torch.export.export(module, (tokens(37),), given, dynamic_shapes=sizes)
    for bounds in ([0, 20, 37], [0, 50, 51], [0, 0, 16], [0, 1], [0, 1, 3, 5], [0, 7]):
        x, given["cu_seqlens"] = tokens(bounds[-1]), torch.tensor(bounds, dtype=torch.int32)
        torch.testing.assert_close(program.module()(x, **given), module(x, **given), rtol=1e-5, atol=1e-5)


def test_export_with_position_embeddings():
    module = make(rope_theta=None).eval()
    length = {0: torch.export.Dim("length")}
    sizes = {"hidden_states": {1: length[0]}, "position_embeddings": (length, length)}

    def tables(n: int):
        return rope_tables(torch.arange(n), DK, 500.0, torch.float32)

    program = torch.export.export(module, (tokens(2, 37),), {"position_embeddings": tables(37)}, dynamic_shapes=sizes)
    for n in (1, 5, 50):
        x, given = tokens(2, n), {"position_embeddings": tables(n)}
        torch.testing.assert_close(program.module()(x, **given), module(x, **given), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", [3, 37])
def test_export_of_a_fixed_length(length):
    """Of enough tokens, none are added."""
    module, x = make().eval(), tokens(2, length)
    program = torch.export.export(module, (x,))
    torch.testing.assert_close(program.module()(x), module(x), rtol=1e-5, atol=1e-5)
    sizes = {node.meta["val"].size(1) for node in program.graph.nodes if "linear" in node.name}
    assert sizes == {length if length >= 12 else length + 12, length}


def test_exported_program_trains():
    module, x = make(), tokens(2, 37)
    program = torch.export.export(module, (x,))
    exported = program.module()
    assert_same(train(loss_of, exported, x), train(loss_of, module, x), 1e-4)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:cache layers")
def test_compiled_steps_are_rolled_back():
    """After a step that failed halfway, and when asked for, with rings that have been written round."""
    layers = [make() for _ in range(2)]
    cache = layers[0].new_cache(2, 64, num_layers=2)

    def model(x: Tensor, caches) -> Tensor:
        return layers[1](x + layers[0](x, cache=caches[0]), cache=caches[1])

    x = tokens(2, 40)
    expected = model(x, [None] * 2)
    function = compiled(model)
    done = 0
    for size in (20, 14, 1, 5):
        part, end = x[:, done : done + size].contiguous(), done + size
        if size == 14:
            layers[0](tokens(2, 5, seed=done), cache=cache[0])  # an eager step that ends here
        torch.testing.assert_close(function(part, cache), expected[:, done:end], rtol=1e-5, atol=1e-5)
        assert cache.rollback() and cache.lengths.tolist() == [done, done] and cache.length_bound == done
        function(tokens(2, size, seed=done), cache)
        cache.rollback()
        torch.testing.assert_close(function(part, cache), expected[:, done:end], rtol=1e-5, atol=1e-5)
        done = end
    assert cache.lengths.tolist() == [40, 40]


@torch.no_grad()
@pytest.mark.parametrize("max_length", [20, None])
def test_a_compiled_step_that_does_not_fit_is_refused(max_length, monkeypatch):
    """As in eager: by the same error, before anything is written."""
    monkeypatch.setattr(cache_module, "_FIRST_CAPACITY", 20)
    layers = [make() for _ in range(2)]
    cache = layers[0].new_cache(2, max_length, num_layers=2)

    def model(x: Tensor, caches) -> Tensor:
        return layers[1](x + layers[0](x, cache=caches[0]), cache=caches[1])

    x = tokens(2, 20)
    expected = model(x, [None] * 2)
    function = compiled(model)
    torch.testing.assert_close(function(x[:, :13], cache), expected[:, :13], rtol=1e-5, atol=1e-5)
    for size in (8, 9, 8):
        with pytest.raises(
            ValueError, match=f"^max_length must be at least {13 + size} to hold the cached and the new"
        ):
            function(tokens(2, size), cache)
        assert cache.lengths.tolist() == [13, 13] and cache.length_bound == 13
    for start, end in ((13, 14), (14, 20)):
        torch.testing.assert_close(function(x[:, start:end], cache), expected[:, start:end], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"^max_length must be at least 21 "):
        function(tokens(2, 1), cache)
    cache.reset()
    torch.testing.assert_close(function(x[:, :1], cache), expected[:, :1], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_inductor_keeps_the_refusal():
    module, x = make(), tokens(1, 9)
    cache = module.new_cache(1, 8)
    function = compiled(lambda part: module(part, cache=cache), "inductor")
    with pytest.raises(ValueError, match=r"^max_length must be at least 9 to hold"):
        function(x)
    assert cache.lengths.tolist() == [0] and not cache[0].k_slc.any()
