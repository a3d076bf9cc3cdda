"""The grid: laws that hold bit for bit, validation, compile and export."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fxquant.errors import ConfigError
from fxquant.quantizers import QuantSpec, UniformQuantizer, round_ste
from fxquant.quantizers.affine import with_16_bits


def quantizer(bits, signed, fraction, scale, dtype):
    spec = QuantSpec(bits, signed)
    zero_point = spec.qmin + round(fraction * (spec.levels - 1))
    return UniformQuantizer(spec, torch.tensor(scale, dtype=dtype), torch.tensor(float(zero_point)))


quantizers = st.builds(
    quantizer, st.integers(2, 8), st.booleans(), st.floats(0, 1), st.floats(1e-20, 1e20), st.sampled_from([torch.float32, torch.float64])
)
seeds = st.integers(0, 2**31)


def data_for(q, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(400, generator=generator, dtype=torch.float64) * q.spec.levels / 2
    halves = torch.arange(-20, 20, dtype=torch.float64) / 2
    return (torch.cat([x, halves, torch.zeros(1)]) * q.scale.double()).to(q.scale.dtype)


@settings(deadline=None, max_examples=50)
@given(quantizers, seeds)
def test_output_is_on_the_grid_idempotent_and_monotone(q, seed):
    x = data_for(q, seed).sort().values
    y, codes = q(x), q.quantize(x)
    assert torch.equal(codes, codes.round())
    assert q.spec.qmin <= codes.min()
    assert codes.max() <= q.spec.qmax
    assert torch.equal(y, q.dequantize(codes))
    assert torch.equal(q(y), y)
    assert torch.equal(q.quantize(y), codes)
    assert (y.diff() >= 0).all()
    assert (y[x == 0] == 0).all()


@settings(deadline=None, max_examples=50)
@given(quantizers, seeds)
def test_error_is_half_a_step_inside_the_range(q, seed):
    x = data_for(q, seed)
    low, high = ((end - q.zero_point) * q.scale for end in (q.spec.qmin, q.spec.qmax))
    inside = (x >= low) & (x <= high)
    assert ((q(x) - x).abs()[inside] <= q.scale * 0.50001).all()
    assert torch.equal(q(x[x > high]), high.expand(int((x > high).sum())))
    assert torch.equal(q(x[x < low]), low.expand(int((x < low).sum())))


def test_per_channel_matches_a_loop_on_any_axis():
    x = torch.randn(3, 4, 5)
    for axis in (0, 1, 2, -1):
        channels = x.shape[axis]
        scale, zero_point = torch.rand(channels) + 0.1, torch.arange(channels).float() % 4
        y = UniformQuantizer(QuantSpec(2, axis=axis), scale, zero_point)(x)
        for c in range(channels):
            expected = UniformQuantizer(QuantSpec(2), scale[c], zero_point[c])(x.select(axis, c))
            assert torch.equal(y.select(axis, c), expected)


def test_two_bit_codes_by_hand():
    q = UniformQuantizer(QuantSpec(2), torch.tensor(0.5), torch.tensor(1))
    x = torch.tensor([-9.0, -0.5, -0.25, 0.0, 0.25, 0.26, 0.75, 1.0, 9.0])
    assert q.quantize(x).tolist() == [0, 0, 0, 1, 2, 2, 2, 3, 3]  # ties go to the even code
    assert q(x).tolist() == [-0.5, -0.5, -0.5, 0, 0.5, 0.5, 0.5, 1, 1]


@settings(deadline=None, max_examples=100)
@given(st.floats(2.0**-100, 2.0**100, width=32), st.integers(-255, 255))
def test_short_scales_have_exact_products(value, code):
    scale = with_16_bits(torch.tensor(value))
    assert abs(scale.item() / value - 1) <= 2**-16 + 1e-7
    assert (scale * code).item() == scale.item() * code  # in float64, where it is exact
    assert torch.equal(with_16_bits(scale), scale)


@settings(deadline=None, max_examples=50)
@given(st.one_of(st.floats(-300, 300, width=32), st.floats(allow_nan=False, allow_infinity=False, width=32)))
def test_round_ste_is_exactly_round(value):
    for dtype in (torch.float32, torch.float64):
        x = torch.tensor(value, dtype=dtype)
        assert round_ste(x).item() == x.round().item()


def test_round_ste_is_exactly_round_next_to_ties():
    ties = torch.arange(-300, 300) + 0.5
    x = torch.cat([ties, ties.nextafter(torch.tensor(1e9)), ties.nextafter(torch.tensor(-1e9))])
    assert torch.equal(round_ste(x), x.round())


def test_round_ste_has_the_gradient_of_the_identity():
    x = torch.randn(10, requires_grad=True)
    (round_ste(x) * torch.arange(10)).sum().backward()
    assert torch.equal(x.grad, torch.arange(10.0))


def test_spec_ranges_and_dict():
    assert [(QuantSpec(b).qmin, QuantSpec(b).qmax) for b in (2, 8)] == [(0, 3), (0, 255)]
    assert [(QuantSpec(b, signed=True).qmin, QuantSpec(b, signed=True).qmax) for b in (2, 8)] == [(-2, 1), (-128, 127)]
    spec = QuantSpec(3, signed=True, symmetric=True, axis=1)
    assert QuantSpec.from_dict(spec.to_dict()) == spec
    assert spec.levels == 8


@pytest.mark.parametrize(
    "fields",
    [
        {"bits": 1},
        {"bits": 9},
        {"bits": 2.0},
        {"bits": True},
        {"bits": 4, "signed": 1},
        {"bits": 4, "axis": "0"},
        {"bits": 4, "width": 3},
        {},
    ],
)
def test_bad_specs_are_refused(fields):
    with pytest.raises(ConfigError):
        QuantSpec.from_dict(fields)


@pytest.mark.parametrize(
    ("spec", "scale", "zero_point", "message"),
    [
        (QuantSpec(2), [0.0], [0], "shape"),
        (QuantSpec(2, axis=0), 1.0, 0, "shape"),
        (QuantSpec(2, axis=0), [1.0, 2.0], [0], "shape"),
        (QuantSpec(2), 0.0, 0, "zero, negative"),
        (QuantSpec(2), -1.0, 0, "zero, negative"),
        (QuantSpec(2), float("nan"), 0, "not finite"),
        (QuantSpec(2), float("inf"), 0, "not finite"),
        (QuantSpec(2), 1, 0, "int64"),
        (QuantSpec(2), 1.0, 4, "not an integer in 0..3"),
        (QuantSpec(2), 1.0, 0.5, "not an integer in 0..3"),
        (QuantSpec(2), 1.0, float("nan"), "not an integer in 0..3"),
        (QuantSpec(2, signed=True, symmetric=True), 1.0, 1, "symmetric"),
    ],
)
def test_bad_parameters_are_refused(spec, scale, zero_point, message):
    with pytest.raises(ConfigError, match=message):
        UniformQuantizer(spec, torch.tensor(scale), torch.tensor(zero_point))


def test_buffers_are_copies_follow_the_dtype_and_are_saved():
    scale = torch.tensor([0.5, 2.0])
    q = UniformQuantizer(QuantSpec(4, axis=1), scale, torch.tensor([3, 4]))
    scale.zero_()
    assert set(q.state_dict()) == {"scale", "zero_point"}
    assert q.scale.tolist() == [0.5, 2.0]
    x = torch.randn(3, 2, dtype=torch.float64)
    y = q.double()(x)
    assert y.dtype == torch.float64
    assert torch.equal(y, q.dequantize(q.quantize(x)))


def test_extra_repr():
    one, zero = torch.tensor(1.0), torch.tensor(0.0)
    assert UniformQuantizer(QuantSpec(8, True, True), one, zero).extra_repr() == "8 bits, signed, symmetric, per tensor"
    per_channel = UniformQuantizer(QuantSpec(2, axis=0), one[None], zero[None])
    assert "(2 bits, unsigned, asymmetric, per channel (axis 0))" in repr(per_channel)


@pytest.mark.parametrize("axis", [None, 1])
def test_compiles_without_a_graph_break_and_exports_with_a_dynamic_batch(axis):
    shape = () if axis is None else (3,)
    q = UniformQuantizer(QuantSpec(2, axis=axis), torch.full(shape, 0.3), torch.full(shape, 1.0))
    x = torch.randn(4, 3, 2, 2)
    compiled = torch.compile(q, fullgraph=True, backend="aot_eager", dynamic=True)
    program = torch.export.export(nn.Sequential(q), (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for batch in (x, torch.randn(7, 3, 2, 2)):
        assert torch.equal(compiled(batch), q(batch))
        assert torch.equal(program.module()(batch), q(batch))
    ops = {node.target.overloadpacket.__name__ for node in program.graph.nodes if node.op == "call_function"}
    assert ops <= {"reciprocal", "round", "add", "clamp", "sub", "mul", "view"}
