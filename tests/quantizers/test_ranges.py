"""Range estimators against plain loops, and the laws they obey on any data."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fxquant.errors import CalibrationError, ConfigError, ModelError
from fxquant.quantizers import (
    METHODS,
    Histogram,
    ImageObserver,
    QuantSpec,
    UniformQuantizer,
    activation_quantizer,
    estimate_range,
    ranges,
    weight_quantizer,
)

SYMMETRIC = {"signed": True, "symmetric": True}


def fake_quantize(x, scale, zero_point, qmin, qmax):
    return [(min(max(round(v / scale) + zero_point, qmin), qmax) - zero_point) * scale for v in x]


def loss(x, scale, zero_point, spec, p=2.4):
    return math.fsum(abs(a - b) ** p for a, b in zip(x, fake_quantize(x, scale, zero_point, spec.qmin, spec.qmax), strict=True))


def brute_force(x, spec, p=2.4, steps=100):
    """PD-Quant's initialization as loops: (scale, zero_point, loss), the first of equals."""
    low, high, n = min(*x, 0), max(*x, 0), spec.levels - 1
    best = (None, None, math.inf)
    for i in range(1, steps + 1):
        if spec.symmetric:
            grids = [(i / steps * max(low / spec.qmin, high / spec.qmax), 0)]
        elif low == 0:
            grids = [(i / steps * high / n, spec.qmin)]
        elif high == 0:
            grids = [(i / steps * -low / n, spec.qmin + n)]
        else:
            grids = [(i / steps * (high - low) / n, spec.qmin + k) for k in range(n + 1)]
        for scale, zero_point in grids:
            candidate = loss(x, scale, zero_point, spec, p)
            if candidate < best[2]:
                best = (scale, zero_point, candidate)
    return best


def sample(kind, *shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return {"normal": x, "relu": x.relu(), "negative": -x.abs(), "skew": x.exp() - 0.3, "cubed": x**3}[kind]


@pytest.mark.parametrize("kind", ["normal", "relu", "negative", "skew", "cubed"])
@pytest.mark.parametrize(
    "spec", [QuantSpec(2, axis=0), QuantSpec(3, signed=True, axis=0), QuantSpec(2, axis=0, **SYMMETRIC), QuantSpec(8, axis=0, **SYMMETRIC)]
)
def test_lp_on_short_rows_is_the_brute_force_optimum(kind, spec):
    x = sample(kind, 3, 40)
    q = weight_quantizer(x, spec)
    for c, row in enumerate(x.tolist()):
        scale, zero_point, _ = brute_force(row, spec)
        assert q.scale[c].item() == pytest.approx(scale, rel=1e-12)
        assert q.zero_point[c].item() == zero_point


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("activation", [F.gelu, F.silu, F.hardswish, F.mish])
def test_signed_tails_of_activations_get_the_codes_that_they_are_worth(activation, bits):
    """Of all widths and zero-points hardly any is better; a tail below half a step gets no code, one of several steps does."""
    x = activation(2 * torch.randn(20_000, generator=torch.Generator().manual_seed(0)))
    spec = QuantSpec(bits)

    def error(scale, zero_point):
        codes = ((x / scale).round() + zero_point).clamp(spec.qmin, spec.qmax)
        return ((codes - zero_point) * scale - x).abs().pow(2.4).mean().item()

    scale, zero_point = (value.item() for value in estimate_range(Histogram.of(x), spec))
    width = (x.max() - x.min()).item() / (spec.levels - 1)
    best = min(error(share / 60 * width, k) for share in range(6, 66) for k in range(min(spec.levels, 48)))
    assert error(scale, zero_point) <= 1.04 * best
    if bits == 8:
        assert zero_point > 0
        assert error(scale, zero_point) < 0.1 * min(error(share / 60 * width, 0) for share in range(6, 66))
    else:
        assert zero_point == pytest.approx(-x.min().item() / scale, abs=1)


@pytest.mark.parametrize("p", [1.0, 2.0, 2.4, 4.0])
def test_lp_uses_its_exponent_and_its_steps(p):
    x = sample("cubed", 60)
    scale, zero_point = estimate_range(Histogram.of(x), QuantSpec(2), p=p, steps=40)
    expected = brute_force(x.tolist(), QuantSpec(2), p, 40)
    assert scale.item() == pytest.approx(expected[0], rel=1e-12)
    assert zero_point.item() == expected[1]


@pytest.mark.parametrize("kind", ["normal", "relu", "skew", "cubed"])
def test_lp_on_long_rows_is_within_a_thousandth_of_the_optimum(kind):
    x = sample(kind, 2, 1500).float()
    q = weight_quantizer(x, QuantSpec(2, axis=0))
    for c, row in enumerate(x.tolist()):
        found = loss(row, q.scale[c].item(), int(q.zero_point[c]), q.spec)
        assert found <= 1.001 * brute_force(row, q.spec)[2]


@pytest.mark.parametrize("kind", ["normal", "skew"])
def test_the_window_of_large_grids_is_within_a_hundredth_of_the_optimum(kind):
    spec = QuantSpec(5)
    x = sample(kind, 60)
    q = weight_quantizer(x, spec)
    assert loss(x.tolist(), q.scale.item(), int(q.zero_point), spec) <= 1.01 * brute_force(x.tolist(), spec)[2]


def test_lp_of_an_observed_activation_is_close_to_that_of_its_values():
    x = sample("skew", 3000).float()
    observer = ImageObserver()
    for batch in x.split(700):
        observer(batch)
    q = activation_quantizer(observer, QuantSpec(2))
    assert loss(x.tolist(), q.scale.item(), int(q.zero_point), q.spec) <= 1.001 * brute_force(x.tolist(), q.spec)[2]


@pytest.mark.parametrize("quantile", [0.9, 0.99, 0.9999])
def test_percentile_is_that_of_numpy_on_repeated_values(quantile):
    values, counts = sample("normal", 2, 50), torch.randint(1, 9, (2, 50), generator=torch.Generator().manual_seed(1))
    h = Histogram(values, counts.double(), values.amin(1), values.amax(1))
    scale, zero_point = estimate_range(h, QuantSpec(8, axis=0), "percentile", percentile=quantile)
    for c in range(2):
        low, high = np.quantile(np.repeat(values[c].numpy(), counts[c].numpy()), [1 - quantile, quantile])
        assert scale[c].item() == pytest.approx((high - low) / 255, rel=1e-9)
        assert zero_point[c].item() == round(-low / scale[c].item())


def test_percentile_one_is_minmax():
    h = Histogram.of(sample("cubed", 9000), max_bins=100)
    assert estimate_range(h, QuantSpec(4), "percentile", percentile=1.0) == estimate_range(h, QuantSpec(4), "minmax")


def kl_loss(values, counts, scale, zero_point, spec, eps=1e-3):
    """The formula of entropy.py as loops over bins."""
    bins = [(v, c) for v, c in zip(values, counts, strict=True) if v and c]
    bins = [(v, c / sum(c for _, c in bins)) for v, c in bins]
    mass, members = {}, {}
    for v, share in bins:
        code = round(v / scale) + zero_point
        clamped = min(max(code, spec.qmin), spec.qmax)
        mass[clamped] = mass.get(clamped, 0) + share
        members[clamped] = members.get(clamped, 0) + (code == clamped)
    total = 0.0
    for v, share in bins:
        code = round(v / scale) + zero_point
        q = eps / len(bins)
        if spec.qmin <= code <= spec.qmax:
            q += (1 - eps) * mass[code] / members[code]
        total += share * math.log(share / q)
    return total


@pytest.mark.parametrize("spec", [QuantSpec(2), QuantSpec(3, signed=True), QuantSpec(4, **SYMMETRIC)])
@pytest.mark.parametrize("kind", ["normal", "relu", "skew"])
def test_kl_is_the_smallest_of_the_documented_losses(kind, spec):
    x = sample(kind, 40_000)
    h = Histogram.of(x, max_bins=500)
    scale, zero_point = estimate_range(h, spec, "kl", steps=20)
    best = math.inf
    for i in range(1, 21):
        clip = i / 20 * x.abs().max().item()
        low, high = max(min(h.low.item(), 0), -clip), min(max(h.high.item(), 0), clip)
        if spec.symmetric:
            grid = max(low / spec.qmin, high / spec.qmax), 0
        else:
            step = (high - low) / (spec.levels - 1)
            grid = step, spec.qmin + min(max(round(-low / step), 0), spec.levels - 1)
        best = min(best, kl_loss(h.values[0].tolist(), h.counts[0].tolist(), *grid, spec))
    found = kl_loss(h.values[0].tolist(), h.counts[0].tolist(), scale.item(), int(zero_point), spec)
    assert found == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("kind", ["normal", "relu"])
def test_kl_clips_outliers_and_more_of_them_at_fewer_bits(kind):
    x = torch.cat([sample(kind, 50_000), torch.tensor([40.0])])
    spans = [estimate_range(Histogram.of(x), QuantSpec(b), "kl")[0].item() * (2**b - 1) for b in (2, 4, 8)]
    assert spans[0] <= spans[1] <= spans[2] < 20
    assert spans[0] > 1.5  # and does not collapse


finite_rows = st.integers(1, 40).flatmap(
    lambda m: st.lists(st.lists(st.floats(-1e3, 1e3, width=32), min_size=m, max_size=m), min_size=1, max_size=4)
)
specs = st.builds(QuantSpec, bits=st.integers(2, 8), signed=st.booleans(), axis=st.just(0)) | st.builds(
    QuantSpec, bits=st.integers(2, 8), signed=st.just(True), symmetric=st.just(True), axis=st.just(0)
)


@pytest.mark.parametrize("method", METHODS)
@settings(deadline=None, max_examples=25)
@given(rows=finite_rows, spec=specs)
def test_every_estimate_makes_a_valid_quantizer_with_an_exact_zero(method, rows, spec):
    x = torch.tensor(rows)
    q = weight_quantizer(x, spec, method, steps=20)
    assert q.scale.dtype == x.dtype
    assert (q(torch.zeros_like(x)) == 0).all()
    assert (q(x)[x == 0] == 0).all()
    y = q(x)
    assert torch.equal(q(y), y)


@settings(deadline=None, max_examples=40)
@given(rows=finite_rows, spec=specs)
def test_minmax_errs_by_half_a_step_and_lp_by_no_more_than_minmax(rows, spec):
    x = torch.tensor(rows, dtype=torch.float64)
    q = weight_quantizer(x, spec, "minmax")
    assert ((q(x) - x).abs() <= q.scale[:, None] * (0.5 + 1e-9)).all()
    lp = weight_quantizer(x, spec, "lp", steps=20)
    bound = (q(x) - x).abs().pow(2.4).sum(1)
    # Rows below the smallest step become zeros.
    assert ((lp(x) - x).abs().pow(2.4).sum(1) <= bound * (1 + 1e-9) + 1e-60).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("spec", [QuantSpec(2, axis=0), QuantSpec(6, axis=0), QuantSpec(4, axis=0, **SYMMETRIC)])
def test_scaling_by_a_power_of_two_scales_the_step_alone(method, spec):
    x = sample("skew", 3, 700).float()
    scale, zero_point = estimate_range(Histogram.of(x, 0), spec, method)
    for factor in (2.0**-60, 0.5, 2.0**40):
        scaled = estimate_range(Histogram.of(x * factor, 0), spec, method)
        assert torch.equal(scaled[0], scale * factor)
        assert torch.equal(scaled[1], zero_point)


@pytest.mark.parametrize("method", METHODS)
def test_channels_do_not_see_each_other(method):
    x = sample("cubed", 5, 300).float() * torch.tensor([1e-6, 1, 50, 0, 3])[:, None]
    order = torch.tensor([3, 0, 4, 2, 1])
    for spec in (QuantSpec(2, axis=0), QuantSpec(6, axis=0)):
        scale, zero_point = estimate_range(Histogram.of(x, 0), spec, method)
        permuted = estimate_range(Histogram.of(x[order], 0), spec, method)
        assert torch.equal(permuted[0], scale[order])
        assert torch.equal(permuted[1], zero_point[order])


def test_flipping_the_sign_mirrors_the_grid():
    x = sample("skew", 3, 200)
    for bits in (2, 8):
        q, mirrored = (weight_quantizer(s * x, QuantSpec(bits, axis=0), "minmax") for s in (1, -1))
        assert torch.equal(q.scale, mirrored.scale)
        assert torch.equal(q.zero_point, q.spec.qmax - mirrored.zero_point)
        assert torch.allclose(q(x), -mirrored(-x))
    symmetric = weight_quantizer(x, QuantSpec(4, axis=0, **SYMMETRIC), "lp")
    inside = x.abs() <= symmetric.spec.qmax * symmetric.scale[:, None]
    assert torch.equal(symmetric(x)[inside], -symmetric(-x)[inside])


@pytest.mark.parametrize("method", METHODS)
def test_signed_codes_are_unsigned_codes_shifted(method):
    x = sample("skew", 4, 100)
    unsigned, signed = (weight_quantizer(x, QuantSpec(3, s, axis=0), method) for s in (False, True))
    assert torch.equal(unsigned.scale, signed.scale)
    assert torch.equal(unsigned.zero_point + signed.spec.qmin, signed.zero_point)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("value", [0.7, -0.7, 1e-20, -3e38, 3e38, 6.0])
def test_constant_tensors_are_kept(method, bits, value):
    x = torch.full((2, 9), value)
    for spec in (QuantSpec(bits), QuantSpec(bits, axis=0)):
        assert torch.allclose(weight_quantizer(x, spec, method)(x), x, rtol=1e-6, atol=0)
    observer = ImageObserver()
    observer(x)
    assert torch.allclose(activation_quantizer(observer, QuantSpec(bits), method)(x), x, rtol=1e-6, atol=0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("spec", [QuantSpec(2, axis=0), QuantSpec(8, signed=True, axis=0), QuantSpec(4, axis=0, **SYMMETRIC)])
def test_degenerate_rows(method, spec):
    x = torch.zeros(4, 50)
    x[1, 7] = 2.0
    x[2, 7] = -2.0
    x[3] = torch.linspace(-1e-42, 1e-42, 50)
    q = weight_quantizer(x, spec, method)
    assert q.scale[0] == 1
    assert q.zero_point[0] == (0 if spec.symmetric else spec.qmin)
    assert (q(x)[[0, 3]].abs() <= 1e-41).all()
    if method in ("minmax", "lp"):
        assert torch.allclose(q(x)[1:3], x[1:3])
    assert q(x).isfinite().all()


def test_float64_is_searched_and_returned_in_float64():
    x = sample("normal", 2, 30)
    assert weight_quantizer(x, QuantSpec(4, axis=0)).scale.dtype == torch.float64


def test_a_symmetric_unsigned_grid_needs_data_without_negatives():
    spec = QuantSpec(4, symmetric=True)
    x = sample("relu", 100)
    for method in METHODS:
        assert weight_quantizer(x, spec, method).zero_point == 0
    with pytest.raises(CalibrationError, match="Use signed=True, or symmetric=False"):
        weight_quantizer(x - 0.1, spec)


@pytest.mark.parametrize(
    "options", [{"method": "mse"}, {"p": 0}, {"p": float("nan")}, {"percentile": 1.1}, {"percentile": 0.5}, {"steps": 0}]
)
def test_bad_options_are_refused(options):
    with pytest.raises(ConfigError):
        estimate_range(Histogram.of(torch.randn(9)), QuantSpec(2), **options)


def test_rows_and_axis_must_agree():
    with pytest.raises(ConfigError, match="3 rows"):
        estimate_range(Histogram.of(torch.randn(3, 9), 0), QuantSpec(2))
    observer = ImageObserver("act")
    observer(torch.ones(3))
    with pytest.raises(ConfigError, match="act: axis=1"):
        activation_quantizer(observer, QuantSpec(2, axis=1))


@pytest.mark.parametrize("axis", [0, 1, None])
@pytest.mark.parametrize("block", [1, 40, 10**6])
def test_large_weights_are_looked_at_in_blocks_of_channels(monkeypatch, axis, block):
    weight = torch.randn(7, 5, 3, generator=torch.Generator().manual_seed(0))
    spec = QuantSpec(3, axis=axis)
    expected = estimate_range(Histogram.of(weight, axis), spec)
    monkeypatch.setattr(ranges, "_BLOCK", block)
    quantizer = weight_quantizer(weight, spec)
    assert torch.equal(quantizer.scale, expected[0]) and torch.equal(quantizer.zero_point, expected[1])


def test_errors_name_the_layer():
    with pytest.raises(ModelError, match=r"conv1: the weight holds NaN or Inf"):
        weight_quantizer(torch.tensor([1.0, float("nan")]), QuantSpec(2), where="conv1")
    observer = ImageObserver("act")
    observer(-torch.ones(3))
    with pytest.raises(CalibrationError, match=r"act: the data has negative values"):
        activation_quantizer(observer, QuantSpec(2, symmetric=True))
    with pytest.raises(CalibrationError, match=r"act: never saw data"):
        activation_quantizer(ImageObserver("act"), QuantSpec(2))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_extremes_that_hardly_count_leave_the_grid_alone(bits):
    """One value is a thousand times as large as the others, and weighs nothing: the grid is that of the others, found as closely."""
    x = torch.randn(1, 20000, generator=torch.Generator().manual_seed(0))
    far = torch.cat([x, torch.tensor([[4000.0]])], 1)
    weights = torch.ones_like(far)
    weights[0, -1] = 1e-14
    plain = Histogram.of(x, max_bins=x.numel())
    scale, zero_point = estimate_range(Histogram(far, weights, far.amin(1), far.amax(1)), QuantSpec(bits))
    losses = [
        (x - UniformQuantizer(QuantSpec(bits), *grid)(x)).abs().pow(2.4).sum()
        for grid in ((scale, zero_point), estimate_range(plain, QuantSpec(bits)))
    ]
    assert losses[0] <= 1.03 * losses[1]
