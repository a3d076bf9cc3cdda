"""Networks with outputs, names and habits that others do not have: what they learn, and what they are refused for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import Net, conv_bn, head
from torch import Tensor, nn

import fxquant
from fxquant import Recipe

STEPS: dict[str, Any] = {
    "unit_iterations": 20,
    "scales_iterations": 5,
    "output_kl_iterations": 20,
    "finish_iterations": 20,
    "unit_batch": 8,
    "output_kl_batch": 8,
    "finish_batch": 8,
    "finish_checks": 4,
}
LEARN = Recipe(name="learn", stages=("ranges", "units", "scales", "output_kl", "finish"), **STEPS)


def net(body: Callable[[Any, Tensor], Any], classes: int = 5, width: int = 8) -> nn.Module:
    torch.manual_seed(0)
    return Net(body, c=nn.Conv2d(3, 8, 3, 2, 1), d=nn.Conv2d(8, 8, 3, 1, 1), fc=nn.Linear(width, classes)).eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(40, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def quantize(network: nn.Module, x: Tensor, recipe: Recipe | str = LEARN, **options: Any) -> Any:
    return fxquant.quantize(network, [x], recipe=recipe, **{"w": 3, "a": 3, "cat": False, **options}, progress=False)


def notes(quantized: nn.Module, name: str) -> list[str]:
    return [note for log in fxquant.report(quantized).record.passes if log.name == name for note in log.notes]


def test_a_network_with_one_logit_learns_its_value(x):
    """Its softmax is 1 whatever it says, so the KL says nothing."""
    torch.manual_seed(0)
    one = nn.Sequential(*conv_bn(3, 8, stride=2), nn.ReLU(), *conv_bn(8, 16, stride=2), nn.ReLU(), head(16, 1)).eval()
    errors = []
    for stages in (("ranges",), ("ranges", "finish")):
        quantized = quantize(one, x, LEARN.replace(stages=stages, finish_iterations=200), w=2, a=2)
        errors.append((quantized(x) - one(x)).square().mean().item())
    assert errors[1] < 0.6 * errors[0]
    assert any("of the outputs, over their power" in note for note in notes(quantize(one, x), "finish_network"))
    with pytest.warns(fxquant.FxquantWarning, match="CAT skipped: the network returns one logit, whose softmax is always 1"):
        quantize(one, x, "fast", cat=True)


def several(s: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    y = s.d(s.c(x).relu()).relu()
    return s.fc(y.mean((2, 3))), y.mean(), y.argmax(1)


def binary(s: Any, x: Tensor) -> Tensor:
    return s.fc((s.d(s.c(x).relu()) > 0).flatten(1).float())


@pytest.mark.parametrize(("body", "width"), [(several, 8), (binary, 512)])
def test_numbers_and_truth_values_beside_features(x, body, width):
    network = net(body, width=width)
    outputs = quantize(network, x)(x)
    for mine, theirs in zip(*(out if isinstance(out, tuple) else (out,) for out in (outputs, network(x))), strict=True):
        assert mine.shape == theirs.shape and mine.dtype == theirs.dtype


@pytest.mark.parametrize("method", ["to", "double"])
def test_a_quantized_tensor_named_like_a_method_of_modules(x, method):
    """Its name is the path of its quantizer, and no module can be called ``to``."""

    def body(s: Any, x: Tensor) -> Tensor:
        y = s.c(x) > 0
        return s.fc(s.d(y.to(x.dtype) if method == "to" else y.double()).mean((2, 3)))

    network, x = net(body).double(), x.double()
    quantized = quantize(network, x, "fast")
    assert f"activations.{method}_" in {str(node.target) for node in quantized.graph.nodes}
    assert (quantized(x) - network(x)).abs().max() < network(x).abs().max()


def test_rows_that_are_not_one_an_image_have_no_cat(x):
    flat = net(lambda s, x: s.fc(s.d(s.c(x).relu()).relu().permute(0, 2, 3, 1).reshape(-1, 8)))
    with pytest.warns(fxquant.FxquantWarning, match=r"CAT skipped: the network returns rows \[M, C\] that are not one an image"):
        quantized = quantize(flat, x, "fast", cat=True)
    assert quantized(x[:2]).shape == (128, 5)
    with pytest.raises(fxquant.CATError, match="not one an image"):
        quantize(flat, x, "fast", cat="paper")


@pytest.mark.parametrize("rows", [True, False])
def test_a_cat_by_the_paper_is_refused_before_anything_is_learned(x, rows, monkeypatch):
    monkeypatch.setattr(fxquant.passes.FinishNetwork, "run", lambda *_: pytest.fail("it learned"))
    body = (lambda s, x: s.fc(s.d(s.c(x)).mean((2, 3)))) if rows else (lambda s, x: (s.fc(s.d(s.c(x)).mean((2, 3))),))
    with pytest.raises(fxquant.CATError, match="40 images are fewer than 64 clusters" if rows else "returns a tuple"):
        quantize(net(body), x, "standard", cat="paper")


def test_writes_into_the_images(x):
    """What can be made a plain operation is; a write that repeats itself is harmless; another one is refused. The caller's images stay."""
    kept = x.clone()

    def normalized(s: Any, x: Tensor) -> Tensor:
        x.sub_(0.5).div_(0.5)
        return s.fc(s.d(s.c(x).relu()).mean((2, 3)))

    def cleared(s: Any, x: Tensor) -> Tensor:
        x[:, 0] = 0
        return s.fc(s.d(s.c(x).relu()).mean((2, 3)))

    def doubled(s: Any, x: Tensor) -> Tensor:
        x[:, 0] *= 2
        return s.fc(s.d(s.c(x).relu()).mean((2, 3)))

    for body in (normalized, cleared):
        wanted = net(body)(x.clone())
        assert (quantize(net(body), x, "fast", w=8, a=8)(x.clone()) - wanted).abs().max() < 0.05 * wanted.abs().max()
        assert torch.equal(x, kept)
    with pytest.raises(fxquant.ModelError, match=r"Net: writes into its images.*Begin forward with x = x.clone\(\)"):
        quantize(net(doubled), x, "fast")
    assert torch.equal(x, kept)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_autocast_of_the_caller_changes_nothing(x, precision):
    network = net(lambda s, x: s.fc(F.relu(s.d(F.relu(s.c(x)))).mean((2, 3))))
    stages = ("ranges", "bias", "units", "finish")
    recipe = LEARN.replace(stages=stages, finish_iterations=60, unit_bias_rate=1e-3, precision=precision)
    plain = quantize(network, x, recipe)
    with torch.autocast("cpu", torch.bfloat16):
        again = quantize(network, x, recipe)
    assert all(map(torch.equal, plain.state_dict().values(), again.state_dict().values()))
