"""Quantizers while they are learned, against written-out formulas: where they start, their gradients, and what stays of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxquant.quantizers import QuantSpec, UniformQuantizer
from fxquant.quantizers.learned import (
    FakeQuantize,
    LatentWeight,
    LearnedQuantizer,
    LearnedScale,
    Masks,
    SoftRounding,
    WeightLearner,
    inner_product,
    learned_step,
    mixed,
)

LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(1, 3),
    "part": lambda x: x[:, ::2],
    "expanded": lambda x: x[:1].expand_as(x),
    "from the middle": lambda x: x[1:],
}


@pytest.mark.parametrize("first", LAYOUTS)
@pytest.mark.parametrize("second", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_inner_products_do_not_depend_on_how_tensors_lie(first, second, dtype):
    x, y = LAYOUTS[first](random(4, 6, 5, 6, dtype=dtype)), LAYOUTS[second](random(4, 6, 5, 6, seed=1, dtype=dtype))
    shape = [min(sizes) for sizes in zip(x.shape, y.shape, strict=True)]
    x, y = (value[tuple(map(slice, shape))] for value in (x, y))
    exact = (x.double() * y.double()).sum().item()
    assert inner_product(x, y).item() == pytest.approx(exact, rel=1e-4, abs=1e-4)
    assert inner_product(x, y).dtype == torch.promote_types(dtype, torch.float32)


def test_long_inner_products_lose_no_digits():
    x = random(2**22, dtype=torch.float32)
    assert inner_product(x, x).item() == pytest.approx(x.double().square().sum().item(), rel=1e-6)


SHAPES = {0: (4, 3, 3, 3), 1: (3, 4, 2, 2), None: (5, 7)}
seeds = st.integers(0, 2**31)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def grid(bits: int, signed: bool = False, axis: int | None = None, seed: int = 0, dtype: torch.dtype = torch.float64) -> UniformQuantizer:
    """Return a grid with random scales and zero-points, one for each of four channels where there is an axis."""
    spec = QuantSpec(bits, signed, axis=axis)
    generator, shape = torch.Generator().manual_seed(seed), () if axis is None else (4,)
    scale = torch.rand(shape, generator=generator, dtype=dtype) + 0.05
    return UniformQuantizer(spec, scale, torch.randint(spec.qmin, spec.qmax + 1, shape, generator=generator))


def weight_for(q: UniformQuantizer, seed: int = 0) -> Tensor:
    """Return a weight whose values lie on levels, between them, and beyond both ends."""
    steps = random(*SHAPES[q.spec.axis], seed=seed, dtype=q.scale.dtype) * q.spec.levels / 3
    steps = torch.where(torch.arange(steps.numel()).view(steps.shape) % 3 == 0, steps.round(), steps)
    return steps * q.along(q.scale, steps)


def ends(q: UniformQuantizer, x: Tensor) -> tuple[Tensor, Tensor]:
    return tuple((end - q.along(q.zero_point, x)) * q.along(q.scale, x) for end in (q.spec.qmin, q.spec.qmax))


def clipped(q: UniformQuantizer, x: Tensor) -> Tensor:
    low, high = ends(q, x)
    return torch.minimum(torch.maximum(x, low), high)


dtypes = st.sampled_from([torch.float32, torch.float64])
grids = st.builds(grid, st.integers(2, 8), st.booleans(), st.sampled_from([None, 0, 1]), seeds, dtypes)


# ---- soft rounding ----


@settings(deadline=None, max_examples=40)
@given(grids, seeds, st.booleans())
def test_soft_rounding_starts_at_the_clipped_float_weight_and_ends_on_the_grid(q, seed, learned_scale):
    weight = weight_for(q, seed)
    soft = SoftRounding(weight, q, learned_scale)
    torch.testing.assert_close(soft(weight).detach(), clipped(q, weight), rtol=1e-5, atol=float(q.scale.max()) * 1e-5 * q.spec.levels)
    scaled = weight / q.along(q.scale, weight)
    rest = scaled - scaled.floor()
    sure = (rest - 0.5).abs() > 1e-5
    assert torch.equal((soft.alpha >= 0)[sure], (rest >= 0.5)[sure])
    assert torch.equal(soft.codes()[sure], q.quantize(weight)[sure])
    hard = soft.weight()
    assert torch.equal(soft.fixed()(hard), hard)
    assert torch.equal(soft.fixed().quantize(hard), soft.codes())
    assert not hard.requires_grad


def test_a_rest_of_one_half_goes_up():
    q = UniformQuantizer(QuantSpec(4, signed=True), torch.tensor(0.5), torch.tensor(0))
    soft = SoftRounding(torch.tensor([-0.75, -0.25, 0.25, 0.75]), q)
    assert soft.alpha.tolist() == [0.0] * 4
    assert soft.codes().tolist() == [-1, 0, 1, 2]


def test_soft_rounding_by_hand():
    q = UniformQuantizer(QuantSpec(2, axis=0), torch.tensor([1.0, 0.5]), torch.tensor([1, 0]))
    soft = SoftRounding(torch.tensor([[-1.25, -0.25, 3.0], [0.6, 1.5, -0.1]]), q)
    assert soft.below.tolist() == [[-1, 0, 4], [1, 3, -1]]
    torch.testing.assert_close(soft.hardness().detach(), torch.tensor([[0.75, 0.75, 0], [0.2, 0, 0.8]]), rtol=0, atol=1e-6)
    torch.testing.assert_close(soft(torch.empty(0)).detach(), torch.tensor([[-1, -0.25, 2], [0.6, 1.5, 0]]), rtol=0, atol=1e-6)
    assert soft.codes().tolist() == [[0, 1, 3], [1, 3, 0]]
    assert soft.weight().tolist() == [[-1, 0, 2], [0.5, 1.5, 0]]


@pytest.mark.parametrize("axis", [0, 1, None])
def test_moving_the_scale_keeps_the_codes_and_scales_the_levels(axis):
    q = grid(3, axis=axis)
    weight = weight_for(q)
    soft = SoftRounding(weight, q, learned_scale=True)
    codes, values = soft.codes(), soft(weight).detach()
    with torch.no_grad():
        soft.scale.value.mul_(1.7)
    assert torch.equal(soft.codes(), codes)
    torch.testing.assert_close(soft(weight).detach(), 1.7 * values)
    torch.testing.assert_close(soft.fixed().scale, 1.7 * q.scale)
    assert torch.equal(soft.fixed().quantize(soft.weight()), codes)


@pytest.mark.parametrize("axis", [0, 1, None])
@pytest.mark.parametrize("signed", [False, True])
def test_soft_rounding_has_the_gradients_of_the_formula(axis, signed):
    q = grid(3, signed, axis)
    weight, g = weight_for(q), random(*SHAPES[axis], seed=5)
    soft = SoftRounding(weight, q, learned_scale=True)
    with torch.no_grad():
        soft.alpha.copy_(2 * random(*SHAPES[axis], seed=6))
    (soft(weight) * g).sum().backward()
    sigmoid = soft.alpha.detach().sigmoid()
    h = 1.2 * sigmoid - 0.1
    code = soft.below + h.clamp(0, 1)
    free = (h > 0) & (h < 1) & (code > q.spec.qmin) & (code < q.spec.qmax)
    assert free.any() and not free.all()
    torch.testing.assert_close(soft.alpha.grad, g * q.along(q.scale, g) * 1.2 * sigmoid * (1 - sigmoid) * free, rtol=1e-10, atol=1e-12)
    of_scale = g * (code.clamp(q.spec.qmin, q.spec.qmax) - q.along(q.zero_point, g))
    expected = of_scale.sum() if axis is None else of_scale.movedim(axis, 0).flatten(1).sum(1)
    torch.testing.assert_close(soft.scale.value.grad, expected, rtol=1e-10, atol=1e-12)
    step = 1e-6  # finite differences, where no kink is near
    with torch.no_grad():
        start = soft.alpha.clone()
        sides = []
        for sign in (1, -1):
            soft.alpha.copy_(start + sign * step)
            sides.append((soft(weight) * g).clone())
    slope = (sides[0] - sides[1]) / (2 * step)
    torch.testing.assert_close(slope[free], soft.alpha.grad[free], rtol=1e-5, atol=1e-7)


def test_a_scale_that_is_not_learned_is_no_parameter():
    q = grid(2)
    assert [name for name, _ in SoftRounding(weight_for(q), q).named_parameters()] == ["alpha"]
    assert {name for name, _ in SoftRounding(weight_for(q), q, True).named_parameters()} == {"alpha", "scale.value"}


# ---- the activation quantizer ----


@settings(deadline=None, max_examples=100)
@given(st.integers(2, 8), st.booleans(), st.floats(1e-20, 1e20), st.floats(0, 1), dtypes, seeds)
def test_fake_quantize_is_the_uniform_quantizer_bit_for_bit_but_at_ties(bits, signed, scale, place, dtype, seed):
    spec = QuantSpec(bits, signed)
    q = UniformQuantizer(spec, torch.tensor(scale, dtype=dtype), torch.tensor(spec.qmin + round(place * (spec.levels - 1))))
    ladder = torch.arange(-2 * spec.levels, 2 * spec.levels, dtype=dtype) / 2
    info = torch.finfo(dtype)
    extremes = torch.tensor([0.0, -0.0, 1e-30, 1e30, -1e30, float("inf"), float("-inf"), info.max, info.min, info.tiny], dtype=dtype)
    x = torch.cat([random(300, seed=seed, dtype=dtype) * scale * spec.levels, ladder * scale, extremes])
    steps = x.double() / q.scale.double()
    tie = ((steps - steps.floor()) - 0.5).abs() < 1e-4
    assert torch.equal(FakeQuantize.apply(x, q.scale, q.zero_point, spec.qmin, spec.qmax)[~tie], q(x)[~tie])
    assert ((FakeQuantize.apply(x, q.scale, q.zero_point, spec.qmin, spec.qmax) - q(x)).abs()[tie] <= 1.0001 * q.scale).all()
    usual = x[: -len(extremes)]
    same = ~tie[: -len(extremes)]
    assert torch.equal(learned_step(usual, q.scale, q.zero_point, spec.qmin, spec.qmax)[same], q(usual)[same])


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_fake_quantize_is_close_in_bfloat16(bits):
    q = grid(bits, dtype=torch.float32)
    x = (random(4000, dtype=torch.float32) * q.scale * q.spec.levels).bfloat16()
    y = FakeQuantize.apply(x, q.scale, q.zero_point, q.spec.qmin, q.spec.qmax)
    assert y.dtype == torch.bfloat16
    exact = q(x.float())
    same = (y.float() - exact).abs() <= 0.01 * exact.abs()  # the same code, rounded to bfloat16
    assert same.float().mean() > (0.99 if bits < 8 else 0.75)
    assert ((y.float() - exact).abs() <= 1.01 * q.scale + 0.01 * exact.abs()).all()


def lsq(x: Tensor, g: Tensor, q: UniformQuantizer) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of LSQ: of x, of the scale, of the zero-point; inside is what rounding puts on the grid."""
    s, z = q.scale, q.zero_point
    code = (x / s).round() + z
    inside = (code >= q.spec.qmin) & (code <= q.spec.qmax)
    ladder = code.clamp(q.spec.qmin, q.spec.qmax) - z
    return g * inside, (g * (ladder - torch.where(inside, x / s, 0))).sum(), -(g * s * ~inside).sum()


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 8), st.booleans(), seeds, st.sampled_from([FakeQuantize.apply, learned_step]))
def test_gradients_are_those_of_lsq(bits, signed, seed, quantize):
    q = grid(bits, signed, seed=seed)
    x = (random(500, seed=seed) * q.scale * q.spec.levels).requires_grad_()
    s, z = q.scale.clone().requires_grad_(), q.zero_point.clone().requires_grad_()
    g = random(500, seed=seed + 1)
    got = torch.autograd.grad(quantize(x, s, z, q.spec.qmin, q.spec.qmax), (x, s, z), g)
    for mine, formula in zip(got, lsq(x.detach(), g, q), strict=True):
        torch.testing.assert_close(mine, formula, rtol=1e-10, atol=1e-10)


def test_gradients_of_lsq_in_float32_and_by_autograd():
    q = grid(3, dtype=torch.float32)
    x, g = random(400, dtype=torch.float32) * 2, random(400, seed=1, dtype=torch.float32)
    leaves = [value.clone().requires_grad_() for value in (x, q.scale, q.zero_point)]
    got = torch.autograd.grad(FakeQuantize.apply(*leaves, q.spec.qmin, q.spec.qmax), leaves, g)
    scaled = leaves[0] / leaves[1]  # the same written with straight-through rounding, differentiated by torch
    low, high = q.spec.qmin - leaves[2], q.spec.qmax - leaves[2]
    rounded = scaled + (scaled.round() - scaled).detach()
    inside = (rounded.detach() >= low) & (rounded.detach() <= high)
    y = torch.where(inside, rounded, torch.where(rounded.detach() > high, high, low)) * leaves[1]
    for mine, formula in zip(got, torch.autograd.grad(y, leaves, g), strict=True):
        torch.testing.assert_close(mine, formula, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_gradients_end_half_a_step_beyond_the_end_levels(scale):
    borders = torch.tensor([-0.5, 3.5]) * scale
    x = torch.cat([borders.nextafter(torch.tensor(scale)), borders.nextafter(torch.tensor(-1e9)), borders.nextafter(torch.tensor(1e9))])
    x.requires_grad_()
    FakeQuantize.apply(x, torch.tensor(scale), torch.tensor(0.0), 0, 3).sum().backward()
    assert x.grad.tolist() == [1, 1, 0, 1, 1, 0]


def test_only_asked_gradients_are_made():
    q = grid(4)
    x = random(10).requires_grad_()
    FakeQuantize.apply(x, q.scale, q.zero_point, q.spec.qmin, q.spec.qmax).sum().backward()
    assert x.grad is not None and q.scale.grad is None


# ---- latent weights ----


@settings(deadline=None, max_examples=40)
@given(grids, seeds)
def test_a_latent_weight_starts_at_the_nearest_codes(q, seed):
    weight = weight_for(q, seed)
    latent = LatentWeight(weight, q)
    assert torch.equal(latent.codes(), q.quantize(weight))
    assert torch.equal(latent(weight).detach(), q(weight))
    assert torch.equal(latent.weight(), latent(weight).detach())
    assert torch.equal(latent.fixed()(latent.weight()), latent.weight())


@pytest.mark.parametrize("axis", [0, 1, None])
@pytest.mark.parametrize("bits", [2, 4])
def test_a_latent_weight_lets_every_gradient_through_also_at_the_ends(axis, bits):
    q = grid(bits, axis=axis)
    low, high = ends(q, torch.empty(SHAPES[axis]))
    weight = torch.where(random(*SHAPES[axis]) > 0, low, high)  # exactly at the end levels
    weight[0] = 9 * weight[0] + 1  # and beyond them
    latent, g = LatentWeight(weight, q), random(*SHAPES[axis], seed=1)
    (latent(weight) * g).sum().backward()
    torch.testing.assert_close(latent.latent.grad, g * q.along(q.scale, g), rtol=1e-12, atol=0)
    of_ratio = g * q.along(q.scale, g) * (latent.codes() - q.along(q.zero_point, g))  # the scale is learned as a ratio to its start
    expected = of_ratio.sum() if axis is None else of_ratio.movedim(axis, 0).flatten(1).sum(1)
    torch.testing.assert_close(latent.scale.value.grad, expected, rtol=1e-12, atol=1e-12)


def test_a_latent_weight_crosses_levels_and_stays_within_reach_of_the_grid():
    q = UniformQuantizer(QuantSpec(3), torch.tensor(0.1), torch.tensor(2))
    weight = torch.tensor([-0.2, 0.0, 0.5])
    latent = LatentWeight(weight, q)
    optimizer = torch.optim.SGD([latent.latent], 1.0)
    seen = [latent.codes().tolist()]
    for _ in range(16):
        optimizer.zero_grad()
        (latent(weight) * torch.tensor([-5.0, 0, 5.0])).sum().backward()
        optimizer.step()
        latent.project()
        steps = latent.latent.detach()
        assert steps.min() >= -2.5 and steps.max() <= 5.5
        assert torch.equal(latent(weight).detach(), latent.weight())
        seen.append(latent.codes().tolist())
    assert seen[0] == [0, 2, 7] and seen[-1] == [7, 2, 0]
    assert {codes[0] for codes in seen} == set(range(8))  # one after the other
    assert latent.weight().tolist() == pytest.approx([0.5, 0.0, -0.2])


# ---- scales ----


@pytest.mark.parametrize("relative", [False, True])
def test_a_learned_scale_starts_where_it_is_and_never_gets_to_zero(relative):
    start = torch.tensor([0.5, 2.0])
    scale = LearnedScale(start, relative)
    assert torch.equal(scale().detach(), start)
    scale().sum().backward()
    assert scale.value.grad.tolist() == (start.tolist() if relative else [1, 1])
    for value in (0.0, -3.0):
        with torch.no_grad():
            scale.value.fill_(value)
        torch.testing.assert_close(scale().detach(), 1e-3 * start)
    with torch.no_grad():
        scale.value.fill_(1.5)
    assert torch.equal(scale().detach(), 1.5 * start if relative else torch.full((2,), 1.5))
    assert not list(LearnedScale(start, relative, learned=False).parameters())
    start.zero_()
    assert scale.start.tolist() == [0.5, 2.0]


# ---- what stays float meanwhile ----


def learned(bits: int = 3, dtype: torch.dtype = torch.float32, **options) -> tuple[LearnedQuantizer, UniformQuantizer]:
    q = grid(bits, dtype=dtype)
    return LearnedQuantizer(q, **options), q


@pytest.mark.parametrize("drop", [0.25, 0.5, 0.9])
def test_each_element_stays_float_with_the_probability_asked_for(drop):
    quantizer, q = learned()
    quantizer.drop, quantizer.masks = drop, Masks(torch.Generator().manual_seed(0))
    x = (random(100, 1000, dtype=torch.float32) * q.scale * 4).requires_grad_()
    y = quantizer(x)
    floats = y == x
    assert torch.equal(torch.where(floats, x, q(x)), y)
    share = floats.float().mean(1)  # of a hundred draws of a thousand
    assert abs(share.mean() - drop) < 0.006
    assert abs(share.std() - (drop * (1 - drop) / 1000) ** 0.5) < 0.005  # independent: binomial
    pairs = (floats[:, 1:] & floats[:, :-1]).float().mean()
    assert abs(pairs - drop**2) < 0.006
    g = torch.rand(x.shape) + 0.5
    y.backward(g)
    assert torch.equal(x.grad[floats], g[floats])
    code = (x.detach() / q.scale).round() + q.zero_point
    outside = (code < q.spec.qmin) | (code > q.spec.qmax)
    assert outside.any() and (x.grad[~floats & outside] == 0).all()
    gradient = torch.autograd.grad(FakeQuantize.apply(x, s := q.scale.clone().requires_grad_(), q.zero_point, 0, 7), s, g * ~floats)[0]
    torch.testing.assert_close(quantizer.scale.value.grad, gradient, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("size", [1, 7, 8, 9, 1001])
def test_the_choice_depends_on_the_generator_alone(size):
    x, q = torch.zeros(size), torch.ones(size)
    picked = [mixed(x, q, 0.5, Masks(torch.Generator().manual_seed(seed))) for seed in (3, 3, 4)]
    assert torch.equal(picked[0], picked[1])
    assert size < 9 or not torch.equal(picked[0], picked[2])
    masks = Masks(torch.Generator().manual_seed(3))
    mixed(x, q, 0.5, masks)
    assert size < 9 or not torch.equal(mixed(x, q, 0.5, masks), picked[0])


@pytest.mark.parametrize("shape", [(3, 5, 4, 2), (2, 6, 1, 1), (9,), (2, 3, 5)])
def test_the_mask_holds_zeros_and_ones_in_the_layout_of_what_it_masks(shape):
    x = torch.zeros(shape).to(torch.float64)
    x = x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x
    mask = Masks(torch.Generator().manual_seed(0)).like(x, 0.5)
    assert mask.shape == x.shape and mask.dtype == x.dtype
    assert x.ndim != 4 or mask.is_contiguous(memory_format=torch.channels_last)
    assert set(mask.unique().tolist()) <= {0.0, 1.0}


def test_the_ends_of_the_probability():
    x, q = torch.zeros(1000), torch.ones(1000)
    assert torch.equal(mixed(x, q, 0.0, Masks(torch.Generator())), q)
    assert torch.equal(mixed(x, q, 1.0, Masks(torch.Generator())), x)


def test_a_share_of_every_element_stays_float():
    quantizer, q = learned(dtype=torch.float64)
    x = random(50).requires_grad_()
    quantizer.mix = 0.3
    torch.testing.assert_close(quantizer(x).detach(), 0.3 * x.detach() + 0.7 * q(x.detach()))
    g = random(50, seed=1)
    quantizer(x).backward(g)
    torch.testing.assert_close(x.grad, 0.3 * g + 0.7 * lsq(x.detach(), g, q)[0])


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("zero_point", [False, True])
def test_what_stays_is_what_was_computed(relative, zero_point):
    quantizer, q = learned(4, relative=relative, learned_zero_point=zero_point)
    x = random(1000, dtype=torch.float32)
    assert torch.equal(quantizer.fixed()(x), q(x))
    with torch.no_grad():
        quantizer.scale.value.mul_(1.37)
        if zero_point:
            quantizer.zero_point.sub_(1.4 if q.zero_point >= 2 else -1.4)
    fixed = quantizer.fixed()
    assert torch.equal(quantizer(x).detach(), fixed(x))
    assert fixed.zero_point == fixed.zero_point.round()
    assert abs(fixed.zero_point - q.zero_point) == (1 if zero_point else 0)
    assert {name for name, _ in quantizer.named_parameters()} == {"scale.value"} | ({"zero_point"} if zero_point else set())


@pytest.mark.parametrize("place", [-0.7, 15.7])
def test_a_zero_point_that_was_learned_beyond_the_codes(place):
    quantizer, _ = learned(4, learned_zero_point=True)
    with torch.no_grad():
        quantizer.zero_point.fill_(place)
    x = random(1000, dtype=torch.float32)
    assert torch.equal(quantizer(x).detach(), quantizer.fixed()(x))


def test_a_symmetric_grid_keeps_its_zero_point():
    q = UniformQuantizer(QuantSpec(4, symmetric=True), torch.tensor(0.1), torch.tensor(0))
    quantizer = LearnedQuantizer(q, learned_zero_point=True)
    if isinstance(quantizer.zero_point, torch.nn.Parameter):
        with torch.no_grad():
            quantizer.zero_point.add_(0.8)
    assert quantizer.fixed().zero_point == 0


def test_gradients_of_a_learned_zero_point():
    quantizer, q = learned(3, torch.float64, learned_zero_point=True)
    x, g = random(300) * 4 * q.scale, random(300, seed=1)
    quantizer(x).backward(g)
    _, of_scale, of_zero = lsq(x, g, q)
    torch.testing.assert_close(quantizer.zero_point.grad, of_zero, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(quantizer.scale.value.grad, of_scale, rtol=1e-5, atol=1e-5)


# ---- one scale for each index of an axis ----


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("learned_zero_point", [False, True])
def test_an_axis_is_learned_index_by_index(axis, learned_zero_point):
    q = grid(3, axis=axis)
    x, g = weight_for(q, 3), random(*SHAPES[axis], seed=4)
    quantizer = LearnedQuantizer(q, learned_zero_point=learned_zero_point)
    y = quantizer(x)
    torch.testing.assert_close(y.detach(), q(x), rtol=1e-12, atol=1e-12)
    y.backward(g)
    for index in range(4):
        one = LearnedQuantizer(UniformQuantizer(QuantSpec(3), q.scale[index], q.zero_point[index]), learned_zero_point=learned_zero_point)
        one(x.select(axis, index)).backward(g.select(axis, index))
        torch.testing.assert_close(quantizer.scale.value.grad[index], one.scale.value.grad)
        if learned_zero_point:
            torch.testing.assert_close(quantizer.zero_point.grad[index], one.zero_point.grad)
    assert quantizer.fixed().scale.shape == (4,)


def test_what_stays_float_on_an_axis():
    q = grid(3, axis=1)
    x = weight_for(q)
    quantizer = LearnedQuantizer(q)
    quantizer.drop, quantizer.masks = 0.5, Masks(torch.Generator().manual_seed(0))
    y = quantizer(x).detach()
    torch.testing.assert_close(torch.where(y == x, x, q(x)), y, rtol=1e-12, atol=1e-12)
    assert (y == x).any() and (y != x).any()
    quantizer.drop, quantizer.mix = 0.0, 0.25
    torch.testing.assert_close(quantizer(x).detach(), 0.75 * q(x) + 0.25 * x)


def test_a_learner_without_codes_says_so():
    base = WeightLearner(UniformQuantizer(QuantSpec(4), torch.tensor(0.5), torch.tensor(0.0)), False, False)
    with pytest.raises(NotImplementedError, match="WeightLearner has no codes"):
        base.weight()
