"""Losses and schedules against loops and closed forms."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxquant.reconstruction.losses import (
    annealed,
    beta_at,
    channel_loss,
    cosine,
    feature_loss,
    feature_losses,
    full_fisher_loss,
    prediction_loss,
    rounding_loss,
)

SHAPES = [(3, 5), (2, 4, 3), (2, 3, 2, 4), (2, 3, 1, 2, 2)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("p", [1.0, 2.0, 2.4])
@pytest.mark.parametrize("weighted", [False, True])
def test_channel_loss_against_loops(shape, p, weighted):
    """Images and positions are averaged over, channels (axis 1; the last of three axes) are summed over."""
    a, b = random(*shape), random(*shape, seed=1)
    importance = random(*shape, seed=2).square() if weighted else None
    channels_last = [value.movedim(1, -1) if len(shape) != 3 else value for value in (a, b, importance if weighted else torch.ones(shape))]
    total, count = 0.0, 0
    for x, y, w in zip(*(value.flatten(0, -2).tolist() for value in channels_last), strict=True):
        total += sum(w[c] * abs(x[c] - y[c]) ** p for c in range(len(x)))
        count += 1
    assert channel_loss(a, b, p, importance).item() == pytest.approx(total / count, rel=1e-12)


@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 5, 2)])
def test_the_gradient_of_a_squared_channel_loss(shape):
    x, y = random(*shape).requires_grad_(), random(*shape, seed=1)
    (3 * channel_loss(x, y)).backward()
    torch.testing.assert_close(x.grad, 6 * (x - y).detach() / (x.numel() / 4))
    assert torch.autograd.gradcheck(lambda value: channel_loss(value, y), x)
    both = x.detach().requires_grad_(), y.clone().requires_grad_()
    channel_loss(*both).backward()
    torch.testing.assert_close(both[0].grad, -both[1].grad)


@pytest.mark.parametrize("p", [2.0, 2.4])
def test_channel_loss_has_a_gradient_of_zero_at_no_error(p):
    x = random(3, 4).requires_grad_()
    channel_loss(x, x.detach(), p).backward()
    assert (x.grad == 0).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_full_fisher_loss_against_loops(shape):
    a, b, g = random(*shape), random(*shape, seed=1), random(*shape, seed=2).abs() + 1
    total, count = 0.0, 0
    for image in range(shape[0]):
        products = [abs(x - y) * w for x, y, w in zip(*(v[image].flatten().tolist() for v in (a, b, g)), strict=True)]
        total += sum(sum(products) * product for product in products)
        count += len(products)
    assert full_fisher_loss(a, b, g).item() == pytest.approx(total / count / 100, rel=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_prediction_loss_is_the_kl_of_torch(temperature):
    student, teacher = (random(6, 10, seed=seed).float() * 5 for seed in (0, 1))
    p, q = ((value.double() / temperature).softmax(1) for value in (teacher, student))
    expected = (p * (p.log() - q.log())).sum(1).mean()
    torch.testing.assert_close(F.kl_div(q.log(), p, reduction="batchmean"), expected)
    torch.testing.assert_close(prediction_loss(student, teacher, temperature), expected.float())
    assert prediction_loss(teacher, teacher, temperature).item() == pytest.approx(0, abs=1e-6)
    assert prediction_loss(student.bfloat16(), teacher, temperature).dtype == torch.float32


def test_prediction_loss_has_the_gradient_of_softmax():
    student, teacher = random(6, 10).float().requires_grad_(), random(6, 10, seed=1).float()
    prediction_loss(student, teacher, 3.0).backward()
    torch.testing.assert_close(student.grad, ((student.detach() / 3).softmax(1) - (teacher / 3).softmax(1)) / 3 / 6)


def test_feature_loss_weighs_every_place_the_same():
    outputs, targets = [random(2, 3), random(4, 5, 2)], [random(2, 3, seed=1), random(4, 5, 2, seed=1)]
    ratios = [((y - t).square().sum() / t.square().sum()).item() for y, t in zip(outputs, targets, strict=True)]
    assert feature_loss(outputs, targets).item() == pytest.approx(sum(ratios) / 2, rel=1e-12)
    scaled = feature_loss([outputs[0] * 1e4, outputs[1]], [targets[0] * 1e4, targets[1]])
    assert scaled.item() == pytest.approx(sum(ratios) / 2, rel=1e-12)
    assert feature_loss([torch.zeros(3)], [torch.zeros(3)]).item() == 0
    small = [torch.full((4,), 2.0, dtype=torch.bfloat16)], [torch.full((4,), 1.0, dtype=torch.bfloat16)]
    assert feature_loss(*small).item() == 1 and feature_loss(*small).dtype == torch.float32


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.complex64])
def test_the_feature_losses_of_images_are_those_of_their_errors_and_have_its_mean(kind):
    outputs, targets = ([torch.randn(5, 3, 4, dtype=kind), torch.randn(5, dtype=kind)] for _ in range(2))
    found = feature_losses(outputs, targets, 5)
    assert found.shape == (5,) and found.mean().item() == pytest.approx(feature_loss(outputs, targets).item(), rel=1e-5)
    image = [5 * (y[2] - t[2]).abs().square().sum() / t.abs().square().sum() for y, t in zip(outputs, targets, strict=True)]
    assert found[2].item() == pytest.approx(sum(image).item() / 2, rel=1e-5)


@pytest.mark.parametrize("shape", [(7, 4), (3, 5, 4), (6,), (0, 4)])
def test_what_has_no_row_for_each_image_counts_alike_for_all(shape):
    outputs, targets = [torch.randn(5, 3), torch.randn(shape)], [torch.randn(5, 3), torch.randn(shape)]
    found, apart = feature_losses(outputs, targets, 5), feature_losses(outputs[:1], targets[:1], 5)
    assert found.mean().item() == pytest.approx(feature_loss(outputs, targets).item(), rel=1e-5)
    torch.testing.assert_close(found - apart / 2, (feature_loss(outputs[1:], targets[1:]) / 2).expand(5))


@given(st.floats(1, 30))
def test_rounding_loss_is_zero_at_the_ends_and_one_in_the_middle(beta):
    ends, middle = torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.full((3,), 0.5)
    assert rounding_loss([ends], beta).item() == 0
    assert rounding_loss([ends, middle], beta).item() == 3
    quarter = rounding_loss([torch.tensor([0.25, 0.75], dtype=torch.float64)], beta).item()
    assert quarter == pytest.approx(2 * (1 - 0.5**beta), rel=1e-12)


@pytest.mark.parametrize("shape", ["linear", "cosine"])
@pytest.mark.parametrize("warmup", [0.0, 0.2, 0.5])
def test_beta_falls_from_20_to_2_behind_the_warmup(shape, warmup):
    at = [beta_at(warmup + share * (1 - warmup), (20.0, 2.0), warmup, shape) for share in (0, 0.25, 0.5, 1)]
    quarter = 15.5 if shape == "linear" else 2 + 9 * (1 + math.sqrt(0.5))
    assert at == pytest.approx([20, quarter, 11, 2], abs=1e-12)
    assert warmup == 0 or beta_at(0.0, (20.0, 2.0), warmup, shape) is None
    assert warmup == 0 or beta_at(warmup - 1e-9, (20.0, 2.0), warmup, shape) is None
    values = [beta_at(step / 50, (20.0, 2.0), warmup, shape) for step in range(50) if step / 50 >= warmup]
    assert values == sorted(values, reverse=True)


def test_a_warmup_that_never_ends():
    assert [beta_at(done, (20.0, 2.0), 1.0) for done in (0.0, 0.5, 0.999)] == [None] * 3


@pytest.mark.parametrize("iterations", [10, 1000, 20_000])
def test_beta_is_that_of_the_published_code(iterations):
    """BRECQ's LinearTempDecay, step by step (its loss is off for the steps below the warm-up)."""
    start = 0.2 * iterations
    for step in range(0, iterations, max(1, iterations // 50)):
        published = 2 + 18 * max(0.0, 1 - (step - start) / (iterations - start)) if step >= start else None
        assert beta_at(step / iterations, (20.0, 2.0), 0.2) == (published if published is None else pytest.approx(published))


def test_rates_rise_and_fall_along_a_cosine():
    assert [cosine(done) for done in (0, 0.25, 0.5, 1)] == pytest.approx([1, 0.5 + math.sqrt(0.125), 0.5, 0])
    assert [cosine(done, 0.1) for done in (0, 0.05, 0.1, 0.55, 1)] == pytest.approx([0, 0.5, 1, 0.5, 0])


def test_the_float_share_falls_to_zero_and_stays():
    assert [annealed(done, 0.5, 0.6) for done in (0, 0.3, 0.6, 0.9, 1)] == pytest.approx([0.5, 0.25, 0, 0, 0])
    assert annealed(0.0, 0.5, 0.0) == 0
