"""`nsa_torch.diagnostics.diagnose` against dense attention in float64, query by query."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nsa_torch
from nsa_torch.diagnostics import BRANCHES, LayerDiagnosis, diagnose, measures

SIZES: dict[str, Any] = {"block_size": 8, "block_stride": 4, "select_size": 8, "num_selected": 4, "window": 10}
HIDDEN = 32
ALL = 10**6
MEASURES = ("mass", "mass_best", "mass_forced", "gates", "gates_most", "contributions", "overlap")

pytestmark = pytest.mark.usefixtures("one_thread")


def make_layer(heads: int = 4, kv_heads: int = 2, **options: Any) -> nsa_torch.NSAAttention:
    torch.manual_seed(0)
    layer = nsa_torch.NSAAttention(HIDDEN, heads, kv_heads, head_dim=16, **(SIZES | options)).double()
    with torch.no_grad():
        layer.q_proj.weight.mul_(6)  # attention that prefers some keys
        layer.k_proj.weight.mul_(2)
        layer.gate_proj.weight.mul_(3)
    return layer


def states(*leading: int, seed: int = 1) -> Tensor:
    return torch.randn(*leading, HIDDEN, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def starts(*lengths: int) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def only(layer: nn.Module, *inputs: Any, **keywords: Any) -> LayerDiagnosis:
    (found,) = diagnose(layer, *inputs, **keywords).layers
    return found


def expected_shares(layer: nsa_torch.NSAAttention, x: Tensor) -> dict[str, Tensor]:
    """Of one sequence (T, hidden): shares of mass (Hq, S), and [shared, chosen] blocks (Hkv, 2), in plain loops."""
    inputs, _ = layer._inputs(x[None], None, None, None)
    chosen_by = layer.choices(x[None]).block_indices[0]
    q, k = inputs.q[0], inputs.k_slc[0]
    group, size, n = q.size(1) // k.size(1), layer.select_size, layer.num_selected
    shares: dict[str, list[list[float]]] = {"mass": [], "mass_best": [], "mass_forced": []}
    overlap = torch.zeros(k.size(1), 2, dtype=torch.float64)
    for p in range(n * size, x.size(0)):
        own = p // size
        forced = {*range(layer.num_initial), *range(own - layer.num_local + 1, own + 1)}
        columns: dict[str, list[float]] = {name: [] for name in shares}
        for kv in range(k.size(1)):
            of_heads = []
            for head in range(kv * group, (kv + 1) * group):
                softmax = (k[: p + 1, kv] @ q[p, head] / 4.0).softmax(0)
                of_heads.append([softmax[b * size : (b + 1) * size].sum().item() for b in range(own + 1)])
            listed, before = set(chosen_by[p, kv].tolist()), set(chosen_by[p - 1, kv].tolist())
            free = sorted(set(range(own + 1)) - forced, key=lambda b: -sum(head[b] for head in of_heads))
            best = forced | set(free[: n - len(forced)])
            overlap[kv] += torch.tensor([len((listed - forced) & before), len(listed - forced)])
            for mass in of_heads:
                for name, blocks in zip(columns, (listed, best, forced), strict=True):
                    columns[name].append(sum(mass[b] for b in blocks))
        for name, column in columns.items():
            shares[name].append(column)
    empty = torch.zeros(q.size(1), 0, dtype=torch.float64)
    found = {name: torch.tensor(rows, dtype=torch.float64).T if rows else empty for name, rows in shares.items()}
    return found | {"overlap": overlap}


def expected(layer: nsa_torch.NSAAttention, sequences: list[Tensor]) -> dict[str, Tensor]:
    parts = [expected_shares(layer, x) for x in sequences]
    found = {name: torch.cat([part[name] for part in parts], 1).mean(1) for name in MEASURES[:3]}
    overlap = torch.stack([part["overlap"] for part in parts]).sum(0)
    gates = torch.cat([layer.choices(x[None]).gates[0] for x in sequences])
    return found | {
        "overlap": overlap[:, 0] / overlap[:, 1],
        "gates": gates.mean(0),
        "gates_most": gates.amax(0),
        "contributions": expected_contributions(layer, sequences),
    }


def expected_contributions(layer: nsa_torch.NSAAttention, sequences: list[Tensor]) -> Tensor:
    """The whole op with all gates but one branch's at zero."""
    options = layer._block_options() | layer._choice_options() | {"window": layer.window}
    norms = []
    for branch in range(3):
        outs = []
        for x in sequences:
            inputs, _ = layer._inputs(x[None], None, None, None)
            gates = torch.zeros_like(inputs.gates)
            gates[..., branch] = inputs.gates[..., branch]
            outs.append(nsa_torch.nsa_attention(*inputs._replace(gates=gates), **options)[0].norm(dim=-1))
        norms.append(torch.cat(outs).mean(0))
    return torch.stack(norms, -1) / torch.stack(norms, -1).sum(-1, keepdim=True)


def assert_same(found: LayerDiagnosis, wanted: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    for name in MEASURES:
        torch.testing.assert_close(getattr(found, name), wanted[name], atol=tolerance, rtol=0.0, msg=name)


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("heads", [(4, 2), (4, 1), (2, 2)], ids=str)
def test_measures_are_those_of_dense_attention(heads: tuple[int, int]) -> None:
    layer, x = make_layer(*heads), states(2, 75)
    found = only(layer, x, queries=ALL)
    assert (found.tokens, found.queries) == (150, 2 * (75 - 32))
    assert_same(found, expected(layer, list(x)))
    assert found.mass.max() < 1 and (found.mass <= found.mass_best).all() and (found.mass >= found.mass_forced).all()


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("leading", [(), (1,)])
def test_packed_sequences_are_measured_apart(leading: tuple[int, ...]) -> None:
    layer, lengths = make_layer(), (3, 50, 0, 33, 7, 61)
    x = states(sum(lengths))
    found = only(layer, x.view(*leading, *x.shape), cu_seqlens=starts(*lengths), queries=ALL)
    sequences = [part for part in x.split(lengths) if len(part)]
    assert found.queries == 18 + 1 + 29
    assert_same(found, expected(layer, sequences))


@pytest.mark.usefixtures("no_grad")
def test_a_sample_is_drawn_by_the_seed_and_measured_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = make_layer(), states(1, 120)
    every = only(layer, x, queries=ALL)
    some = only(layer, x, queries=20, seed=3)
    assert some.queries == 20 and some.positions.min() >= 32
    assert some.positions.tolist() == sorted(set(some.positions.tolist()))
    torch.testing.assert_close(some.mass_at, every.mass_at[some.positions - 32])
    torch.testing.assert_close(some.mass.mean(), some.mass_at.mean())
    assert not torch.equal(some.positions, only(layer, x, queries=20, seed=4).positions)
    assert only(layer, x, queries=87).queries == 87
    monkeypatch.setattr(measures, "MOST_SCORES", 4 * 120 * 3)
    again = only(layer, x, queries=20, seed=3)
    torch.testing.assert_close(again.mass_at, some.mass_at)


@pytest.mark.parametrize("length", [1, 7, 8, 32])
def test_texts_without_a_choice_have_no_shares(length: int) -> None:
    found = only(make_layer(), states(2, length))
    assert found.queries == 0 and found.mass.isnan().all() and found.overlap.isnan().all()
    assert found.gates.isfinite().all() and found.contributions.isfinite().all()
    assert " - " in str(diagnose(make_layer(), states(2, length)))


def test_a_choice_without_free_blocks_has_no_overlap() -> None:
    found = only(make_layer(num_selected=3), states(1, 60))
    assert found.queries > 0 and found.overlap.isnan().all()
    torch.testing.assert_close(found.mass, found.mass_forced)


def test_dead_branches_are_named() -> None:
    layer, x = make_layer(), states(1, 60)
    assert only(layer, x).dead == []
    with torch.no_grad():
        layer.gate_proj.weight.unflatten(0, (4, 3))[1, 2] = 0.0
        layer.gate_proj.bias.unflatten(0, (4, 3))[1, 2] = -20.0
        layer.v_proj.weight.unflatten(0, (2, 3, 16))[1, 1] = 0.0  # the selected branch's values of the second KV head
    assert only(layer, x).dead == [(1, "window", "gate"), (2, "selected", "norm"), (3, "selected", "norm")]
    assert str(diagnose(layer, x)).splitlines()[1].endswith("2 selected, 1 window")


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, HIDDEN, dtype=torch.float64)
        self.layers = nn.ModuleList([make_layer(), make_layer(heads=2)])
        self.drop = nn.Dropout(0.5)

    def forward(self, ids: Tensor, broken: bool = False) -> Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = x + self.drop(layer(x))
        if broken:
            raise RuntimeError("broken")
        return x


def test_every_layer_of_a_model_is_measured_and_the_model_left_as_it_was() -> None:
    model, ids = Model(), torch.randint(50, (2, 70), generator=torch.Generator().manual_seed(0))
    model.layers[1].eval()
    diagnosis = diagnose(model, ids)
    assert [layer.name for layer in diagnosis.layers] == ["layers.0", "layers.1"]
    assert_same(diagnosis.layers[0], expected(model.layers[0], list(model.embedding(ids).detach())))
    assert len(diagnosis.layers[1].mass) == 2 and len(str(diagnosis).splitlines()) == 3
    with pytest.raises(RuntimeError, match="broken"):
        diagnose(model, ids, broken=True)
    assert model.training and model.drop.training and not model.layers[1].training
    assert all("_inputs" not in layer.__dict__ for layer in model.layers)
    assert model(ids).requires_grad


def test_maps_of_one_layer_and_one_head_have_whole_ticks() -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from nsa_torch.diagnostics.picture import _heat

    figure = Figure()
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    _heat(axis, "one", [torch.ones(1)])
    figure.canvas.draw()
    for ticks in (axis.get_xticks(), axis.get_yticks()):
        assert all(tick == round(tick) for tick in ticks)


def test_the_picture_is_a_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    model = Model()
    with torch.no_grad():
        model.layers[0].gate_proj.weight.zero_()
        model.layers[0].gate_proj.bias.fill_(-20.0)
    for length in (20, 70):
        diagnose(model, torch.zeros(1, length, dtype=torch.int64)).save_picture(tmp_path / "a.png")
        assert (tmp_path / "a.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_what_cannot_be_measured_is_refused() -> None:
    layer, x = make_layer(), states(1, 40)
    with pytest.raises(ValueError, match="NSAAttention"):
        diagnose(nn.Linear(2, 2), torch.zeros(2, 2))
    with pytest.raises(TypeError, match="Module"):
        diagnose(lambda x: x, x)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="queries must be at least 1, got 0"):
        diagnose(layer, x, queries=0)
    with pytest.raises(ValueError, match="no cache"):
        diagnose(layer, x, cache=layer.new_cache(1, 64))
    with pytest.raises(ValueError, match="no tokens"):
        diagnose(layer, x[:, :0])


def test_models_of_hugging_face() -> None:
    pytest.importorskip("transformers")
    from hf_models import make_model, make_sequences

    ids = make_sequences([60])[0][None]
    diagnosis = diagnose(make_model(), ids, use_cache=False)
    assert [layer.queries for layer in diagnosis.layers] == [28, 28]
    with pytest.raises(ValueError, match="use_cache=False"):
        diagnose(make_model(), ids)


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_measures_on_each_device(device: str, dtype: torch.dtype) -> None:
    layer, x = make_layer().to(dtype), states(2, 75).to(dtype)
    on_device = only(layer.to(device), x.to(device), queries=ALL)
    wanted = only(make_layer().to(dtype), x, queries=ALL)
    tolerance = 1e-4 if dtype == torch.float32 else 0.03
    for name in MEASURES[:-1]:
        torch.testing.assert_close(getattr(on_device, name), getattr(wanted, name), atol=tolerance, rtol=0.0)
    assert on_device.mass.dtype == torch.float64 and on_device.mass.device.type == "cpu"


@pytest.mark.cuda
@pytest.mark.usefixtures("no_grad")
def test_rows_of_no_sequence_do_not_count() -> None:
    layer, x, cu_seqlens = make_layer().float().cuda(), states(100).float().cuda(), starts(40, 45).cuda()
    found = only(layer, x, cu_seqlens=cu_seqlens, queries=ALL)
    exact = only(layer, x[:85], cu_seqlens=cu_seqlens, queries=ALL)
    assert found.tokens == 85
    assert_same(found, {name: getattr(exact, name) for name in MEASURES}, tolerance=1e-5)


def test_branches_are_in_the_order_of_the_gates() -> None:
    layer = make_layer()
    with torch.no_grad():
        layer.gate_proj.weight.zero_()
        layer.gate_proj.bias.copy_(torch.tensor([-1.0, 0.0, 2.0]).repeat(4))
    gates = only(layer, states(1, 20)).gates[0].tolist()
    assert BRANCHES == ("compressed", "selected", "window")
    assert gates == pytest.approx([1 / (1 + math.exp(x)) for x in (1.0, 0.0, -2.0)])
