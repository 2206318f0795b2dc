"""`nsa_torch.diagnostics.check_causality`: what is causal passes, what looks ahead is caught, and where it does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nsa_torch
from nsa_torch.diagnostics import check_causality
from nsa_torch.heads import NSAInputs

SIZES: dict[str, Any] = {"block_size": 8, "block_stride": 4, "select_size": 8, "num_selected": 4, "window": 10}
HIDDEN = 32

pytestmark = pytest.mark.usefixtures("one_thread")


def make_layer(kind: type[nsa_torch.NSAAttention] = nsa_torch.NSAAttention) -> nsa_torch.NSAAttention:
    torch.manual_seed(0)
    return kind(HIDDEN, 4, 2, head_dim=16, **SIZES)


def states(*leading: int) -> Tensor:
    return torch.randn(*leading, HIDDEN, generator=torch.Generator().manual_seed(1))


def starts(*lengths: int) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


class EarlyBlocks(nsa_torch.NSAAttention):
    """Each compressed block holds the keys of the next one."""

    def _inputs(self, *arguments: Any) -> tuple[NSAInputs, dict[str, Any]]:
        inputs, packing = super()._inputs(*arguments)
        return inputs._replace(k_cmp=inputs.k_cmp.roll(-1, dims=-3)), packing


class Ahead(nn.Module):
    """A row for each token, `steps` tokens early."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        return x + 0.1 * x.roll(-self.steps, dims=-2)


class OfTheBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + x.mean(0, keepdim=True)


class Model(nn.Module):
    """Token ids to logits, with something between two layers."""

    def __init__(self, between: nn.Module) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(50, HIDDEN), nn.Linear(HIDDEN, 50)
        self.layers = nn.ModuleList([make_layer(), between, make_layer()])

    def forward(self, ids: Tensor) -> tuple[Tensor, str]:
        x = self.embedding(ids)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x), "and more"


def test_the_layer_is_causal(device: str) -> None:
    layer = make_layer().to(device)
    report = check_causality(layer, states(3, 70).to(device), trials=12)
    assert report.causal and report.trials == 12 and "12 trials, 0 leaks" in str(report)
    packed = check_causality(layer, states(100).to(device), cu_seqlens=starts(40, 1, 0, 59).to(device), trials=12)
    assert packed.causal
    assert check_causality(layer.bfloat16(), states(1, 70).to(device, torch.bfloat16)).causal


def test_a_layer_whose_blocks_come_early_is_caught(device: str) -> None:
    layer = make_layer(EarlyBlocks).to(device)
    report = check_causality(layer, states(2, 70).to(device))
    assert not report.causal
    for leak in report.leaks:
        assert leak.reached == leak.sequence and leak.position < leak.cut and leak.difference > report.tolerance
        # The block that ends at a position below the cut holds the next one's 8 keys, 4 later.
        assert leak.cut - 4 <= leak.position
    packed = check_causality(layer, states(100).to(device), cu_seqlens=starts(40, 60).to(device), trials=16)
    assert not packed.causal


@pytest.mark.parametrize("steps", [1, 3, 40])
def test_the_module_that_looks_ahead_is_named(steps: int) -> None:
    model, ids = Model(Ahead(steps)), torch.arange(100).view(2, 50) % 50
    report = check_causality(model, ids, trials=10)
    assert not report.causal
    leak = report.leaks[0]
    assert leak.module == "layers.1" and "in layers.1" in str(report)
    assert leak.position < leak.cut <= leak.position + steps + 50
    assert check_causality(Model(nn.Identity()), ids).causal


def test_a_leak_from_another_sequence_is_caught() -> None:
    report = check_causality(nn.Sequential(make_layer(), OfTheBatch()), states(2, 20))
    assert report.leaks[0].module == "1" and {leak.reached for leak in report.leaks} == {0, 1}
    # Of packed sequences only the first token of the second reaches the last of the first.
    ahead = Ahead(1)
    packed = check_causality(ahead, states(20), cu_seqlens=starts(8, 12), trials=1)
    assert not packed.causal and packed.leaks[0].module == "(the model)"


def test_a_leak_that_no_inner_module_shows_is_the_models() -> None:
    class Hidden(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return {"a": 1}, x.flip(1)

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Hidden()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)[1]

    report = check_causality(Wrapped(), states(1, 9))
    assert report.leaks[0].module == "(the model)"


def test_numbers_that_become_none_are_differences() -> None:
    class Divides(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x / (x[:, -1:, :1] == states(1, 9)[:, -1:, :1])

    report = check_causality(Divides(), states(1, 9))
    assert not report.causal and report.leaks[0].difference == float("inf")


def test_noise_of_the_model_is_no_leak() -> None:
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            self.calls = getattr(self, "calls", 0) + 1
            return x + 1e-6 * (self.calls % 2)

    report = check_causality(Noisy(), states(1, 30))
    assert report.causal and 0 < report.tolerance < 1e-5
    assert not check_causality(Noisy(), states(1, 30), tolerance=0.0).causal


def test_the_model_is_left_as_it_was_and_its_dropout_off() -> None:
    model = nn.Sequential(make_layer(), nn.Dropout(0.5))
    model[0].eval()
    assert check_causality(model, states(1, 30)).causal
    assert model.training and model[1].training and not model[0].training
    assert not any(module._forward_hooks for module in model.modules())


def test_models_of_hugging_face() -> None:
    pytest.importorskip("transformers")
    from hf_models import make_model, make_sequences

    ids = torch.stack(make_sequences([40, 40]))
    assert check_causality(make_model(), ids, vocabulary=40, use_cache=False).causal


@pytest.mark.parametrize(
    ("inputs", "keywords", "message"),
    [
        (states(2, 1), {}, "two tokens"),
        (states(9), {}, "inputs must be"),
        (torch.zeros(1, 9, dtype=torch.int64), {}, "vocabulary"),
        (states(1, 9), {"trials": 0}, "trials must be at least 1"),
        (states(1, 9), {"cache": 1}, "cache"),
    ],
)
def test_what_cannot_be_checked_is_refused(inputs: Tensor, keywords: dict[str, Any], message: str) -> None:
    model = nn.Embedding(4, 4) if not inputs.is_floating_point() else make_layer()
    with pytest.raises(ValueError, match=message):
        check_causality(model, inputs, **keywords)


def test_outputs_without_rows_and_wrong_types_are_refused() -> None:
    with pytest.raises(ValueError, match="a row for each of the tokens"):
        check_causality(nn.Flatten(), states(1, 9))
    with pytest.raises(TypeError, match="Module"):
        check_causality(lambda x: x, states(1, 9))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="tensor"):
        check_causality(make_layer(), [1, 2])  # type: ignore[arg-type]
