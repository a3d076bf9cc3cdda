"""Logarithmic grids: the published formula, zeros, idempotence, compile and export, the search, and the way through a file."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant import Recipe
from fxquant.calibration import activation_quantizers
from fxquant.errors import CalibrationError, ConfigError
from fxquant.graph import called
from fxquant.placement import Plan, TensorPlan
from fxquant.quantizers import AxisObserver, ImageObserver, LogQuantizer, QuantSpec, UniformQuantizer, log_quantizer

GRIDS = ("log2", "logsqrt2")


def quantizer(bits: int, grid: str, scale: float = 0.7, dtype: torch.dtype = torch.float32) -> LogQuantizer:
    return LogQuantizer(QuantSpec(bits, symmetric=True), torch.tensor(scale, dtype=dtype), grid)


def probabilities(dtype: torch.dtype = torch.float32) -> Tensor:
    scores = 4 * torch.randn(200, 65, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return scores.softmax(-1).to(dtype)


def by_hand(x: float, bits: int, grid: str, scale: float) -> float:
    """The formula on one number, in Python's own arithmetic."""
    n, steps = 2**bits - 1, 1 if grid == "log2" else 2
    code = n if x == 0 else min(max(round(-steps * math.log2(x / scale)), 0), n)
    if code == n or code > 100 * steps:
        return 0.0
    return scale * 2.0 ** -math.ceil(code / steps) * (math.sqrt(2) if steps == 2 and code % 2 else 1)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("bits", range(2, 9))
def test_formula(bits, grid):
    q = quantizer(bits, grid, dtype=torch.float64)
    x = torch.cat([probabilities(torch.float64)[:10].flatten(), torch.tensor([0.0, 1.0, 1e-30, 1e-300], dtype=torch.float64)])
    wanted = torch.tensor([by_hand(value, bits, grid, 0.7) for value in x.tolist()], dtype=torch.float64)
    torch.testing.assert_close(q(x), wanted, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("grid", "wanted"),
    [("log2", [1, 0.5, 0.25, 0.125, 0.0625, 0.03125, 0.015625, 0]), ("logsqrt2", [1, 0.5**0.5, 0.5, 0.5**1.5, 0.25, 0.5**2.5, 0.125, 0])],
)
def test_the_eight_values_of_three_bits(grid, wanted):
    values = quantizer(3, grid, 1.0).dequantize(torch.arange(8.0))
    torch.testing.assert_close(values, torch.tensor(wanted), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("bits", range(2, 9))
def test_on_the_grid_idempotent_and_monotone(bits, grid, dtype):
    q = quantizer(bits, grid, 0.83, dtype)
    x = torch.cat([probabilities(dtype).flatten(), torch.tensor([0.0, 1.0, 1e-38], dtype=dtype)]).sort().values
    y, codes = q(x), q.quantize(x)
    assert y.dtype == dtype
    assert torch.equal(codes, codes.round())
    assert codes.min() >= 0
    assert codes.max() == q.spec.qmax
    assert torch.equal(y, q.dequantize(codes))
    assert torch.equal(y, q(y))
    assert bool((y.diff() >= 0).all())
    assert y[0] == 0
    assert len(y.unique()) <= 2**bits


@pytest.mark.parametrize("grid", GRIDS)
def test_what_is_nearest_in_the_logarithm(grid):
    """No value of the grid is nearer, in octaves, than the one taken."""
    q = quantizer(4, grid)
    values = q.dequantize(torch.arange(15.0))
    x = probabilities().flatten()
    x = x[(x > values[-1]) & (x < 0.7)]
    distance = (x.log2()[:, None] - values.log2()).abs().min(1).values
    torch.testing.assert_close((x.log2() - q(x).log2()).abs(), distance, rtol=0, atol=1e-5)


@pytest.mark.parametrize("grid", GRIDS)
def test_gradient_is_that_of_the_identity(grid):
    x = torch.tensor([0.0, 0.1, 0.5, 1.0], requires_grad=True)
    quantizer(3, grid)(x).sum().backward()
    assert x.grad.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("grid", GRIDS)
def test_compiles_and_exports(grid):
    q, x = quantizer(4, grid), probabilities()
    torch.testing.assert_close(torch.compile(q, fullgraph=True)(x), q(x), rtol=1e-6, atol=0)
    exported = torch.export.export(q, (x,), dynamic_shapes=({0: torch.export.Dim("n", min=2)},))
    assert torch.equal(exported.module()(x[:3]), q(x[:3]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: quantizer(4, "log3"), "'log3' is no logarithmic grid"),
        (lambda: quantizer(9, "log2"), "bits=9"),
        (lambda: quantizer(4, "log2", 0.0), "the scale is no positive number"),
        (lambda: quantizer(4, "log2", math.inf), "the scale is no positive number"),
        (lambda: LogQuantizer(QuantSpec(4), torch.tensor(1.0)), "not unsigned and symmetric"),
        (lambda: LogQuantizer(QuantSpec(4, symmetric=True), torch.ones(3)), r"no positive number. Give .* of shape \[\]"),
        (lambda: LogQuantizer(QuantSpec(4, symmetric=True, axis=0), torch.tensor(1.0)), r"no positive number. Give .* of shape \[C\]"),
    ],
)
def test_what_cannot_be_meant(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def seen(x: Tensor) -> ImageObserver:
    observer = ImageObserver("softmax")
    observer(x)
    return observer


@pytest.mark.parametrize("p", [1.0, 2.0, 2.4])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_search_beats_the_largest_value(bits, grid, p):
    x = probabilities()
    found = log_quantizer(seen(x), bits, grid, p=p)
    plain = quantizer(bits, grid, float(x.max()))
    assert found.grid == grid
    assert (x - found(x)).abs().pow(p).sum() <= 1.001 * (x - plain(x)).abs().pow(p).sum()


@pytest.mark.parametrize("grid", GRIDS)
def test_small_values_survive_that_a_uniform_grid_loses(grid):
    x = probabilities()
    uniform = UniformQuantizer(QuantSpec(4), x.max() / 15, torch.zeros(()))
    assert (log_quantizer(seen(x), 4, grid)(x) == 0).double().mean() < (uniform(x) == 0).double().mean()


def test_a_tensor_of_zeros():
    q = log_quantizer(seen(torch.zeros(4)), 4)
    assert q(torch.zeros(3)).tolist() == [0, 0, 0]


def test_negative_values_and_no_values():
    with pytest.raises(CalibrationError, match="softmax: has negative values"):
        log_quantizer(seen(torch.tensor([-0.1, 0.5])), 4)
    with pytest.raises(CalibrationError, match="softmax: never saw data"):
        log_quantizer(ImageObserver("softmax"), 4)


def test_the_recipe_chooses_for_softmaxes_alone():
    observer = seen(probabilities())
    for word, kind in (("uniform", UniformQuantizer), ("log2", LogQuantizer), ("logsqrt2", LogQuantizer)):
        make = activation_quantizers(Recipe(softmax_quantizer=word))
        made = make(TensorPlan("softmax", 4, ("matmul",), softmax=True), observer)
        assert type(made) is kind
        assert getattr(made, "grid", word) == word
        assert type(make(TensorPlan("relu", 4, ("matmul",)), observer)) is UniformQuantizer


def test_a_plan_of_an_older_file():
    plan = Plan.from_dict({"layers": [], "tensors": [{"node": "softmax", "bits": 4, "readers": ["matmul"]}]})
    assert not plan.tensors["softmax"].softmax
    told = Plan({}, {"softmax": TensorPlan("softmax", 4, ("matmul",), softmax=True)})
    assert Plan.from_dict(told.to_dict()) == told


class Attention(nn.Module):
    """Patches, one head, a classifier."""

    def __init__(self):
        super().__init__()
        self.patch, self.q, self.k, self.v = nn.Conv2d(3, 8, 2, 2), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = x + (3 * self.q(x) @ self.k(x).transpose(1, 2)).softmax(-1) @ self.v(x)
        return self.fc(x.mean(1))


@pytest.mark.parametrize("word", ["uniform", *GRIDS])
def test_through_a_file(tmp_path, images, word):
    torch.manual_seed(0)
    recipe = Recipe.FAST.replace(softmax_quantizer=word, stages=("ranges", "bias"))
    qmodel = fxquant.quantize(Attention().eval(), images, 4, 4, recipe=recipe, progress=False)
    found = [module for _, module in called(qmodel) if isinstance(module, LogQuantizer)]
    assert [module.grid for module in found] == ([] if word == "uniform" else [word])
    fxquant.save(qmodel, tmp_path / "q.safetensors")
    again = fxquant.load(tmp_path / "q.safetensors", Attention())
    assert torch.equal(again(images[0]), qmodel(images[0]))
    torch.testing.assert_close(torch.compile(again, fullgraph=True)(images[0]), qmodel(images[0]), rtol=0.05, atol=0.05)
    assert [str(module) for _, module in called(again)] == [str(module) for _, module in called(qmodel)]


def test_learning_goes_through_it(images):
    recipe = Recipe.FINISH.replace(softmax_quantizer="logsqrt2", finish_iterations=3, finish_checks=1, finish_batch=16)
    qmodel = fxquant.quantize(Attention().eval(), images, 4, 4, recipe=recipe, progress=False)
    assert bool(qmodel(images[0]).isfinite().all())


@pytest.mark.parametrize("grid", GRIDS)
def test_a_scale_for_each_index_of_an_axis(grid):
    x = torch.rand(6, 3, 40, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 0.1, 0.0])[:, None]
    observer = AxisObserver("softmax", 1)
    observer(x)
    q = log_quantizer(observer, 4, grid)
    assert q.spec == QuantSpec(4, symmetric=True, axis=1) and q.scale.shape == (3,)
    for index in range(3):
        own = log_quantizer(seen(x[:, index]), 4, grid)
        assert torch.equal(q.scale[index], own.scale)
        assert torch.equal(q(x)[:, index], own(x[:, index]))
    assert torch.equal(q(q(x)), q(x))
