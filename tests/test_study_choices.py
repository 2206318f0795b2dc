"""The study's other ways to choose blocks and to learn the choice, against their definitions."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nsa_torch import reference
from nsa_torch.heads import NSAInputs
from study.choices import ScaledReach, TaughtChoice
from study.layer_reads import layer_reads
from study.layers import Shape
from study.models import make_model
from study.nsa_layers import nsa_layer
from study.runs import make_task

SHAPE = Shape(hidden=32, layers=2, heads=4, kv_heads=2, head_dim=16)
BLOCKS = {"block_size": 8, "block_stride": 4, "select_size": 8}
TOKENS = 75

pytestmark = pytest.mark.usefixtures("one_thread")


def states(sequences: int = 2, tokens: int = TOKENS) -> Tensor:
    random = torch.Generator().manual_seed(1)
    return torch.randn(sequences, tokens, SHAPE.hidden, generator=random, dtype=torch.float64)


def taught() -> TaughtChoice:
    torch.manual_seed(0)
    layer = nsa_layer(SHAPE, choice="taught", num_selected=4, window=8, **BLOCKS).double()
    assert isinstance(layer, TaughtChoice)
    return layer


def expected_loss(layer: TaughtChoice, x: Tensor) -> Tensor:
    """The cross-entropy of every query, with dense attention and the reference's importance."""
    inputs, _ = layer._inputs(x, None, None, None)
    q, k_cmp = inputs.q.detach(), inputs.k_cmp
    _, lse = reference.compressed_attention(q, k_cmp, inputs.v_cmp, seqlen_k=TOKENS, block_size=8, block_stride=4)
    importance = reference.block_importance(q, k_cmp, lse, seqlen_k=TOKENS, **BLOCKS)
    k = inputs.k_slc.detach().repeat_interleave(2, dim=2)
    scores = torch.einsum("bihc,bjhc->bhij", q, k) / SHAPE.head_dim**0.5
    p = scores.masked_fill(~torch.ones(TOKENS, TOKENS).tril().bool(), -torch.inf).softmax(-1)
    total, count = x.new_zeros(()), 0
    for batch in range(x.size(0)):
        for query in range(TOKENS):
            for head in range(SHAPE.kv_heads):
                count += 1
                free = list(range(1, query // 8 - 1))  # neither the first block nor the last two
                if free:
                    share = importance[batch, query, head, free]
                    heads = p[batch, 2 * head : 2 * head + 2, query].mean(0)
                    mass = torch.stack([heads[8 * block : 8 * block + 8].sum() for block in free])
                    total = total - (mass * (share / share.sum()).log()).sum()
    return total / count


def test_teaching_is_the_cross_entropy_of_dense_attention_by_block() -> None:
    layer, x = taught(), states()
    inputs, _ = layer._inputs(x, None, None, None)
    loss = layer.teaching_loss(inputs, torch.arange(TOKENS))
    torch.testing.assert_close(loss, expected_loss(layer, x).float().to(loss), atol=1e-5, rtol=1e-5)
    for tensor in (inputs.q, inputs.k_slc):
        (gradient,) = torch.autograd.grad(loss, tensor, retain_graph=True, allow_unused=True)
        assert gradient is None
    (gradient,) = torch.autograd.grad(loss, inputs.k_cmp)
    assert gradient.isfinite().all() and gradient.norm() > 0


def test_sharp_queries_count_by_their_greatest_mass() -> None:
    layer, x = taught(), states()
    inputs, _ = layer._inputs(x, None, None, None)
    rows = [torch.tensor([row]) for row in (40, 60, 74)]
    k = inputs.k_slc.repeat_interleave(2, dim=2)
    losses, weights = [], []
    for row in rows:
        p = torch.einsum("bihc,bjhc->bhij", inputs.q[:, row], k[:, : row + 1]) / SHAPE.head_dim**0.5
        mass = torch.nn.functional.pad(p.softmax(-1), (0, 80 - row - 1)).unflatten(-1, (10, 8)).sum(-1)
        by_group = mass.unflatten(1, (2, 2)).mean(2)[:, :, 0, 1 : row // 8 - 1]
        weights.append(by_group.amax(-1))
        one = [layer.teaching_loss(inputs._replace(**part(inputs, b, h)), row) for b in range(2) for h in range(2)]
        losses.append(torch.stack(one).view(2, 2))
    expected = sum((w * loss).sum() for w, loss in zip(weights, losses, strict=True)) / torch.stack(weights).sum()
    layer.sharp = True
    torch.testing.assert_close(
        layer.teaching_loss(inputs, torch.cat(rows)), expected.to(losses[0]), atol=1e-5, rtol=0.0
    )


def part(inputs: NSAInputs, sequence: int, kv_head: int) -> dict[str, Tensor]:
    """One sequence and one KV head of what the loss is made of."""
    one = slice(sequence, sequence + 1)
    k_cmp, k_slc = (t[one, :, kv_head : kv_head + 1] for t in (inputs.k_cmp, inputs.k_slc))
    return {"q": inputs.q[one, :, 2 * kv_head : 2 * kv_head + 2], "k_cmp": k_cmp, "k_slc": k_slc}


@pytest.mark.parametrize("tokens", [1, 7, 8, 20])
def test_short_texts_teach_nothing(tokens: int) -> None:
    layer, x = taught(), states(1, tokens)
    layer(x).square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())


def test_what_is_taught_counts_beside_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = taught(), states()
    layer.taught_queries = 10**6
    monkeypatch.setattr("torch.randint", lambda high, size, device: torch.arange(high, device=device))
    layer(x).square().sum().backward()
    both = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    layer.zero_grad()
    plain = layer.eval()(x).square().sum()
    (plain + layer.teaching_loss(layer._inputs(x, None, None, None)[0], torch.arange(TOKENS))).backward()
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(both[name], parameter.grad, atol=1e-6, rtol=1e-5)


def test_teaching_moves_the_choice_towards_dense_attention() -> None:
    layer, x, rows = taught(), states(), torch.arange(TOKENS)
    with torch.no_grad():
        layer.q_proj.weight.mul_(8)  # a teacher that prefers some keys
        layer.k_proj.weight.mul_(2)
    weights = [layer.k_proj.weight, *layer.compress_k.parameters()]
    optimizer = torch.optim.Adam(weights, lr=1e-2)
    losses = []
    for _ in range(40):
        loss = layer.teaching_loss(layer._inputs(x, None, None, None)[0], rows)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("choice", ["explored", "scaled", "taught"])
def test_in_scoring_the_choice_is_the_papers(choice: str) -> None:
    layer, plain = (nsa_layer(SHAPE, choice=c, num_selected=4, window=8, **BLOCKS).double() for c in (choice, "scores"))
    plain.load_state_dict(layer.state_dict())
    x = states()
    torch.testing.assert_close(layer.eval()(x), plain(x))
    trained = layer.train()(x)
    assert trained.isfinite().all()
    if choice == "taught":
        torch.testing.assert_close(trained, plain(x))


def test_results_say_what_each_layer_read() -> None:
    task = make_task("recall-mini")
    model, _ = make_model("mini-nsa+conv", task.sizes.vocabulary, task.sizes.shape, 8, task.sizes.reference)
    layers = layer_reads(model, task, torch.device("cpu"))
    assert [layer["queries"] for layer in layers] == [256, 256]
    assert [len(layers[0][name]) for name in ("mass", "overlap", "gates")] == [4, 1, 4]
    json.dumps(layers, allow_nan=False)
    short = replace(task, lengths=(32,))
    assert layer_reads(model, short, torch.device("cpu"))[0]["mass"] == [None] * 4
    full, _ = make_model("full", task.sizes.vocabulary, task.sizes.shape, 8, task.sizes.reference)
    assert layer_reads(full, task, torch.device("cpu")) == []


def test_reach_grows_with_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nsa_layer(SHAPE, choice="scaled", whole_at=512, select_size=16, num_selected=16, window=64)
    assert isinstance(layer, ScaledReach)
    asked = []

    def attend(*inputs: Tensor, num_selected: int, window: int, **_: object) -> Tensor:
        asked.append((inputs[0].size(1), num_selected, window))
        return inputs[0]

    monkeypatch.setattr("nsa_torch.nsa_attention", attend)
    for tokens in (64, 128, 256, 512, 1024):
        layer(torch.zeros(1, tokens, SHAPE.hidden))
    assert asked == [(64, 4, 8), (128, 4, 16), (256, 8, 32), (512, 16, 64), (1024, 16, 64)]


def test_an_open_gate_stays_open() -> None:
    layer, x = nsa_layer(SHAPE, opened=True).double(), states()
    gates = layer.choices(x).gates
    assert (gates[..., 0] == 1).all() and (gates[..., 1:] < 1).all()
    layer(x).square().sum().backward()
    gradient = layer.gate_proj.linear.weight.grad.unflatten(0, (-1, 3))
    assert (gradient[:, 0] == 0).all() and (gradient[:, 1:] != 0).any()
