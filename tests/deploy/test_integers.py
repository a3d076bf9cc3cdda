"""Integer layers against the plain arithmetic that defines them, and that arithmetic against the simulation; all to the bit."""

from __future__ import annotations

import copy
import os
import platform
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from integer_layers import OUTPUTS, random_bytes, random_layer
from torch import Tensor, nn

from fxquant.deploy import cpu, vnni
from fxquant.deploy.bytes import ByteMaxPool2d, BytePad, Dequantize, Quantize
from fxquant.deploy.integers import Grid, IntegerLayer, integer_layer
from fxquant.deploy.pooled import PooledIntegerLayer
from fxquant.quantizers import QuantSpec, UniformQuantizer, weight_quantizer
from fxquant.quantizers.layers import QuantizedLayer, weight_spec

needs_vnni = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 7, 8])
def test_a_grid_is_its_quantizer(bits, signed):
    spec = QuantSpec(bits, signed=signed)
    quantizer = UniformQuantizer(spec, torch.tensor(0.37), torch.tensor(float(spec.qmin + 1)))
    x = torch.linspace(-40, 40, 999)
    grid = Grid.of(quantizer)
    assert (grid.low, grid.high, grid.zero_point) == (0, 2**bits - 1, 1)
    assert torch.equal(grid.dequantize(grid.quantize(x)), quantizer(x))
    assert torch.equal(Quantize(grid)(x), grid.quantize(x))
    assert torch.equal(Dequantize(grid)(Quantize(grid)(x)), quantizer(x))


@pytest.mark.parametrize("ends", [(0.0, float("inf")), (0.0, 6.0), (-1.0, 1.0), (-0.2, 0.3)])
def test_a_cut_in_front_of_the_rounding_is_a_narrower_grid(ends):
    grid, x = Grid(0.29, 5, 0, 15), torch.linspace(-9, 9, 1001)
    assert torch.equal(grid.within(*ends).quantize(x), grid.quantize(x.clamp(*ends)))


def quantized(layer: nn.Module, bits: int) -> QuantizedLayer:
    return QuantizedLayer.of(layer, weight_quantizer(layer.weight, weight_spec(layer, bits, bits == 8), "minmax"))


LAYERS = {
    "conv": lambda: nn.Conv2d(6, 8, 3, 2, 1),
    "grouped": lambda: nn.Conv2d(6, 8, 3, padding=1, groups=2, bias=False),
    "depthwise": lambda: nn.Conv2d(6, 12, 3, padding="same", groups=6),
    "dilated": lambda: nn.Conv2d(6, 8, (3, 1), padding=(2, 0), dilation=(2, 1)),
    "valid": lambda: nn.Conv2d(6, 8, 3, padding="valid"),
    "linear": lambda: nn.Linear(6, 8),
}


@pytest.mark.parametrize("bits", [2, 4, 7, 8])
@pytest.mark.parametrize("name", LAYERS)
def test_the_reference_is_the_simulation(name, bits):
    torch.manual_seed(bits)
    layer, grid = quantized(LAYERS[name](), bits), Grid(0.11, 3, 0, 15)
    integers = integer_layer(layer, grid)
    assert isinstance(integers, IntegerLayer)
    codes = random_bytes(1, 4, 6, grid=grid) if integers.is_linear else random_bytes(1, 2, 6, 9, 7, grid=grid)
    torch.testing.assert_close(integers.reference(codes), layer(grid.dequantize(codes)), rtol=1e-5, atol=1e-5)
    frozen = layer.freeze(torch.tensor(grid.scale))
    assert torch.equal(frozen(grid.dequantize(codes)), integers.reference(codes))
    frozen = integer_layer(frozen, grid)
    assert isinstance(frozen, IntegerLayer)
    assert torch.equal(frozen.weight, integers.weight)


@pytest.mark.parametrize(
    ("layer", "bits", "reason"),
    [
        (nn.Conv1d(3, 4, 3), 4, "Conv1d has no integer form"),
        (nn.ConvTranspose2d(3, 4, 3), 4, "ConvTranspose2d has no integer form"),
        (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), 4, "reflect"),
        (nn.Conv2d(3, 4, 2, padding="same"), 4, "not the same zeros on both sides"),
    ],
)
def test_what_has_no_integers(layer, bits, reason):
    found = integer_layer(quantized(layer, bits), Grid(1.0, 0))
    assert isinstance(found, str)
    assert reason in found


def test_eight_bits_less_a_zero_point_do_not_fit_a_byte():
    layer = nn.Conv2d(3, 4, 3)
    layer.weight.data = layer.weight.data.abs()
    found = integer_layer(QuantizedLayer.of(layer, weight_quantizer(layer.weight, weight_spec(layer, 8), "minmax")), Grid(1.0, 0))
    assert isinstance(found, str)
    assert "weight_symmetric=True" in found


@needs_vnni
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 99),
    channels=st.sampled_from([(3, 5), (8, 8), (16, 40), (33, 7)]),
    size=st.sampled_from([1, 3]),
    stride=st.sampled_from([1, 2]),
    groups=st.sampled_from([1, 2, 4, None]),
    dilation=st.sampled_from([1, 2]),
    side=st.integers(5, 12),
    zero_point=st.integers(0, 255),
    output=st.sampled_from(OUTPUTS),
)
def test_convolutions_on_the_cpu(seed, channels, size, stride, groups, dilation, side, zero_point, output):
    """`groups`: None is depthwise."""
    inputs, outputs = (channels[1], channels[1]) if groups is None else tuple(count * groups for count in channels)
    more = {"input": Grid(0.05, zero_point), "output": output, "stride": (stride, stride), "padding": (size // 2, size // 2)}
    layer = random_layer(seed, outputs, inputs, size, groups or inputs, dilation=(dilation, dilation), **more)
    codes = random_bytes(seed, 2, inputs, side, side, grid=layer.input)
    compare(layer, codes)


@needs_vnni
@pytest.mark.parametrize("output", OUTPUTS)
def test_linear_layers_on_the_cpu(output):
    layer = random_layer(0, 10, 32, 1, input=Grid(0.05, 9), output=output)
    layer = IntegerLayer(layer.weight.flatten(1), layer.scale, layer.bias, layer.input, output)
    for shape in ((5, 32), (2, 7, 32)):
        compare(layer, random_bytes(3, *shape, grid=layer.input))


def compare(layer: IntegerLayer, codes: Tensor) -> None:
    """What the layer gives for all images and for one, and each kind of kernel for all of them, is the reference."""
    expected, module = layer.reference(codes), cpu.CpuIntegerLayer(layer)
    assert (module.single is None) == (vnni.unavailable() is not None or vnni.refusal(layer) is not None)
    got = {"layer": module(codes), "oneDNN": module.several(codes)}
    if module.single is not None:
        got["own"] = module.single(codes)
    for name, values in got.items():
        assert values.dtype == expected.dtype, name
        assert torch.equal(values, expected), name
    assert torch.equal(module(codes[:1]), expected[:1])
    if layer.output is not None:
        assert expected.min() >= layer.output.low
        assert expected.max() <= layer.output.high


@needs_vnni
@pytest.mark.parametrize("output", OUTPUTS[1:])
@pytest.mark.parametrize("grid", [Grid(51 / 64, 0, 0, 3), Grid(7 / 64, 130)])
def test_residuals_on_the_cpu(grid, output):
    """The sum is cut to the grid also where oneDNN would saturate at 255 only, and the residual is not written to.

    Scales of few bits, as those of a frozen network: oneDNN multiplies and adds the residual with one rounding.
    """
    layer = random_layer(7, 12, 8, 3, input=Grid(0.05, 3), output=output, padding=(1, 1))
    codes, added = random_bytes(1, 2, 8, 6, 6, grid=layer.input), random_bytes(2, 2, 12, 6, 6, grid=grid)
    before, floats = added.clone(), grid.dequantize(added)
    expected, module = layer.reference(codes, floats), cpu.CpuIntegerLayer(layer, grid)
    for product in filter(None, (module, module.single, module.several)):
        assert torch.equal(product(codes, added), expected)
        assert torch.equal(added, before)
        assert torch.equal(product(codes, added.contiguous()), expected)
    assert torch.equal(module(codes[:1], added[:1]), expected[:1])


@needs_vnni
def test_a_shape_given_for_packing_changes_nothing():
    for shape in (None, (8, 6, 6), (8, 14, 14)):
        layer = random_layer(7, 12, 8, 3, input=Grid(0.05, 3), output=OUTPUTS[2], shape=shape)
        compare(layer, random_bytes(1, 3, 8, 9, 9, grid=layer.input))


@needs_vnni
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("side", [1, 7, 16, 17, 40, 256, 257, 300])
def test_means_of_bytes(side, keep):
    """Maps of more than 257 pixels have sums that do not fit two bytes, those of more than 65,793 not three; all of 255 are the largest."""
    layer = random_layer(4, 10, 16, 1, input=Grid(0.3, 17))
    module = PooledIntegerLayer(layer, keep, cpu.CpuBackend().build)
    for codes in (random_bytes(1, 2, 16, side, side, grid=layer.input), torch.full((2, 16, side, side), 255, dtype=torch.uint8)):
        means = layer.input.dequantize(codes, torch.float64).mean((2, 3))
        assert layer.bias is not None
        expected = F.linear(means, layer.weight.flatten(1).double()) * layer.scale.double() + layer.bias.double()
        got = module(codes)
        assert got.shape == ((2, 10, 1, 1) if keep else (2, 10))
        torch.testing.assert_close(got.flatten(1).double(), expected, rtol=1e-5, atol=1e-3)


def test_pools_and_padding_of_bytes():
    grid = Grid(0.5, 9, 0, 15)
    codes = random_bytes(5, 2, 3, 40, 40, grid=grid)
    for arguments in ({"kernel_size": 3, "stride": 2, "padding": 1}, {"kernel_size": 2, "ceil_mode": True}):
        pooled = ByteMaxPool2d(**arguments)(codes)
        assert pooled.dtype == torch.uint8
        assert torch.equal(grid.dequantize(pooled), nn.MaxPool2d(**arguments)(grid.dequantize(codes)))
    padded = BytePad((1, 2, 0, 3), grid)(codes)
    assert torch.equal(grid.dequantize(padded), F.pad(grid.dequantize(codes), (1, 2, 0, 3)))


@needs_vnni
def test_a_copy_computes_the_same():
    layer = random_layer(0, 8, 8, 3, input=Grid(0.05, 3), output=OUTPUTS[2])
    module, codes = cpu.CpuIntegerLayer(layer), random_bytes(0, 1, 8, 5, 5, grid=layer.input)
    assert torch.equal(copy.deepcopy(module)(codes), module(codes))
    assert "8 channels" in repr(module)


def test_a_machine_that_cannot(monkeypatch):
    monkeypatch.setattr(cpu, "_products_are_exact", lambda: False)
    assert "VNNI" in str(cpu.unavailable())
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    assert cpu.unavailable() == "arm64 is no x86 processor"
    monkeypatch.setattr(cpu, "_OPS", (*cpu._OPS, "qconv_of_tomorrow"))
    assert "oneDNN" in str(cpu.unavailable())


@needs_vnni
@pytest.mark.slow
@pytest.mark.parametrize(("instructions", "exact"), [("AVX2", False), ("AVX2_VNNI", "avx_vnni")])
def test_instructions_of_other_processors(instructions, exact):
    """oneDNN takes those it is told to: AVX2 has no VNNI, and what processors without AVX-512 have of VNNI is enough."""
    if exact and not torch.cpu.get_capabilities().get(exact):
        pytest.skip(f"this processor has no {exact}")
    code = "from fxquant.deploy import cpu; print(cpu.unavailable())"
    told = {**os.environ, "ONEDNN_MAX_CPU_ISA": instructions}
    said = subprocess.run([sys.executable, "-c", code], env=told, capture_output=True, text=True, check=True).stdout
    assert ("saturate" in said) == (not exact), said
    if exact:
        assert said.strip() == "None"
