"""Layers with a quantized weight: what they compute, what freezing and scaling keep, and what they share."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from fxquant.quantizers import UniformQuantizer, weight_quantizer
from fxquant.quantizers.layers import QUANTIZED_LAYERS, QuantizedLayer, channel_axis, sharing_copy, weight_spec

SPECS = [
    (nn.Conv1d, (4, 8, 3), {"padding": 1}),
    (nn.Conv2d, (4, 8, 3), {"stride": 2, "padding": 1, "groups": 2}),
    (nn.Conv2d, (4, 8, 3), {"padding": 1, "padding_mode": "reflect", "bias": False}),
    (nn.Conv2d, (4, 4, 3), {"padding": "same", "groups": 4, "dilation": 2}),
    (nn.Conv3d, (4, 8, 2), {"bias": False}),
    (nn.ConvTranspose1d, (4, 6, 3), {"stride": 2, "output_padding": 1}),
    (nn.ConvTranspose2d, (4, 6, 3), {"stride": 2, "groups": 2, "dilation": 2}),
    (nn.ConvTranspose2d, (4, 6, 3), {"padding": 1, "bias": False}),
    (nn.ConvTranspose3d, (4, 6, 2), {}),
    (nn.Linear, (4, 8), {}),
    (nn.Linear, (4, 8), {"bias": False}),
]


def layer_and_input(spec, dtype=torch.float32) -> tuple[nn.Module, Tensor]:
    build, args, options = spec
    torch.manual_seed(0)
    axes = {"1": 1, "2": 2, "3": 3}.get(build.__name__[-2], 0)
    x = torch.randn(2, 4, *[7] * axes) if axes else torch.randn(2, 5, 4)
    return build(*args, **options).eval().to(dtype), x.to(dtype)


def quantize(layer: nn.Module, bits: int = 3, symmetric: bool = False) -> QuantizedLayer:
    return QuantizedLayer.of(layer, weight_quantizer(layer.weight, weight_spec(layer, bits, symmetric), "minmax"))


@pytest.fixture(params=SPECS, ids=lambda spec: f"{spec[0].__name__}{spec[2]}")
def pair(request) -> tuple[nn.Module, Tensor]:
    return layer_and_input(request.param)


@pytest.mark.parametrize("symmetric", [True, False])
def test_output_is_that_of_the_layer_with_the_quantized_weight(pair, symmetric):
    layer, x = pair
    quantized = quantize(layer, symmetric=symmetric)
    reference = copy.deepcopy(layer)
    with torch.no_grad():
        reference.weight.copy_(quantized.weight_quantizer(layer.weight))
    assert torch.equal(quantized(x), reference(x))
    assert not torch.equal(quantized(x), layer(x))


def test_the_quantized_layer_is_one_of_torchs_and_shares_its_parameters(pair):
    layer, _ = pair
    state, kind = dict(vars(layer)), type(layer)
    quantized = quantize(layer)
    assert isinstance(quantized, QuantizedLayer) and isinstance(quantized, type(layer))
    assert type(quantized) is QUANTIZED_LAYERS[type(layer)]
    assert quantized.weight is layer.weight and quantized.bias is layer.bias
    assert type(layer) is kind
    assert vars(layer) == state
    assert not list(layer.children())


def test_freezing_keeps_the_codes(pair):
    layer, x = pair
    quantized = quantize(layer.double())
    frozen = quantized.freeze()
    torch.testing.assert_close(frozen(x.double()), quantized(x.double()), rtol=1e-12, atol=1e-12)
    assert torch.equal(frozen.codes(), quantized.codes())
    assert torch.equal(frozen.used_weight(), quantized.used_weight())
    assert torch.equal(frozen.weight, frozen.weight.round())
    assert (frozen.frozen, quantized.frozen) == (True, False)
    assert quantized.weight is layer.weight
    assert not any(value.requires_grad for value in frozen.parameters())
    assert torch.equal(frozen.freeze().weight, frozen.weight)


@pytest.mark.parametrize("freeze", [True, False])
def test_scaled(pair, freeze):
    layer, x = pair
    quantized = quantize(layer.double())
    x = x.double()
    if freeze:
        quantized = quantized.freeze()
    scales = quantized.weight_quantizer.scale.numel()
    axis = x.ndim - 1 if isinstance(layer, nn.Linear) else 1
    channels = quantized(x).shape[axis]
    gain = torch.linspace(0.5, 2, scales, dtype=torch.float64)
    shift = torch.linspace(-1, 1, channels, dtype=torch.float64)
    scaled = quantized.scaled(gain, shift)
    shape = [1] * x.ndim
    shape[axis] = -1
    expected = gain.repeat(channels // scales).view(shape) * quantized(x) + shift.view(shape)
    torch.testing.assert_close(scaled(x), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(scaled.codes(), quantized.codes())
    assert scaled.frozen == quantized.frozen
    assert scaled.bias is not None and scaled.bias.shape == (channels,)
    torch.testing.assert_close(scaled.weight_quantizer.scale, gain * quantized.weight_quantizer.scale)
    torch.testing.assert_close(scaled.freeze()(x), scaled(x), rtol=1e-12, atol=1e-12)
    # What learns later starts at the float weight, scaled along; a frozen weight is integers, which stay.
    along = scaled.weight_quantizer.along(gain, layer.weight)
    assert torch.equal(scaled.weight, quantized.weight if freeze else layer.weight * along)


@pytest.mark.parametrize("bits", [2, 8])
def test_a_frozen_layer_that_reads_a_grid_sums_integers(pair, bits):
    """Up to 2^24 these sums are exact, so that float32 and float64 differ by the rounding of the scales and the bias alone."""
    layer, x = pair
    step = torch.tensor(0.37)
    x = (x / x.abs().max() * 127).round() * step
    frozen = QuantizedLayer.of(layer, weight_quantizer(layer.weight, weight_spec(layer, bits))).freeze(step)
    integers, weight = (x.double() / 0.37).round(), frozen.integers().double()
    sums = frozen.convolve(integers, weight, None)
    assert torch.equal(frozen.convolve(frozen.to_integers(x), frozen.weight, None).double(), sums)
    assert sums.abs().max() < 2**24
    assert torch.equal(frozen.from_sums(sums.float()), frozen(x))
    torch.testing.assert_close(
        frozen(x), QuantizedLayer.of(layer, frozen.weight_quantizer)(x), rtol=1e-4, atol=1e-4 * float(frozen(x).abs().max())
    )


@pytest.mark.parametrize("seed", range(20))
def test_scaled_keeps_codes_that_rounding_noise_would_change(seed):
    generator = torch.Generator().manual_seed(seed)
    gain = torch.rand(8, generator=generator) + 0.3
    layer = nn.Linear(64, 8)
    quantizer = UniformQuantizer(weight_spec(layer, 4), torch.rand(8, generator=generator) + 0.1, torch.full((8,), 7.0))
    halves = torch.randint(-7, 7, (8, 64), generator=generator) + 0.5  # in steps: on the edge between two codes, as near as float32 gets
    layer.weight = nn.Parameter(halves * quantizer.scale.view(-1, 1))
    quantized = QuantizedLayer.of(layer, quantizer)
    scaled = quantized.scaled(gain, torch.zeros(8))
    assert torch.equal(scaled.codes(), quantized.codes())
    assert torch.equal(scaled.freeze().codes(), quantized.codes())
    steps = scaled.weight / scaled.weight_quantizer.scale.view(-1, 1)
    assert (steps - halves).abs().max() <= 0.501  # scaled along, or on its grid where the code would change
    naive = scaled.weight_quantizer.quantize(layer.weight * gain.view(-1, 1))
    assert torch.equal(naive == quantized.codes(), (scaled.weight == layer.weight * gain.view(-1, 1)))


def test_codes_are_integers_on_the_grid(pair):
    layer, _ = pair
    codes = quantize(layer, 2).codes()
    assert set(codes.unique().tolist()) <= {0.0, 1.0, 2.0, 3.0}
    assert set(quantize(layer, 2, symmetric=True).codes().unique().tolist()) <= {-2.0, -1.0, 0.0, 1.0}


def test_one_scale_an_output_channel(pair):
    layer, _ = pair
    axis = channel_axis(layer)
    assert axis == (1 if "Transpose" in type(layer).__name__ else 0)
    assert weight_spec(layer, 4).axis == axis
    assert quantize(layer).weight_quantizer.scale.shape == (layer.weight.shape[axis],)


def test_weight_spec():
    layer = nn.Linear(2, 2)
    assert (weight_spec(layer, 4).signed, weight_spec(layer, 4).symmetric) == (False, False)
    assert (weight_spec(layer, 4, symmetric=True).signed, weight_spec(layer, 4, symmetric=True).symmetric) == (True, True)


def test_copies_in_state_dict_and_deepcopy(pair):
    layer, x = pair
    quantized = quantize(layer)
    other = copy.deepcopy(quantized)
    assert torch.equal(other(x), quantized(x))
    assert other.weight is not quantized.weight
    assert {"weight", "weight_quantizer.scale", "weight_quantizer.zero_point"} <= set(quantized.state_dict())
    assert quantized.to(torch.float64)(x.double()).dtype == torch.float64


def test_gradients_reach_the_bias_but_the_given_layer_is_not_trained_by_accident():
    layer, x = layer_and_input(SPECS[0])
    frozen = quantize(layer).freeze()
    assert not frozen(x).requires_grad
    assert layer.weight.requires_grad


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_transposed_convolution_with_an_output_size(axes):
    build = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[axes - 1]
    layer = build(4, 6, 3, stride=2)
    x = torch.randn(2, 4, *[5] * axes)
    quantized = quantize(layer, 8)
    assert quantized(x, output_size=[12] * axes).shape == layer(x, output_size=[12] * axes).shape == (2, 6, *[12] * axes)
    reference = copy.deepcopy(layer)
    with torch.no_grad():
        reference.weight.copy_(quantized.used_weight())
    assert torch.equal(quantized(x, [12] * axes), reference(x, [12] * axes))


def test_sharing_copy():
    layer = nn.Sequential(nn.Linear(2, 2))
    layer.register_buffer("b", torch.ones(1))
    new = sharing_copy(layer)
    new.register_parameter("p", nn.Parameter(torch.ones(1)))
    new.b = torch.zeros(1)
    new.add_module("1", nn.ReLU())
    assert list(layer._modules) == ["0"] and not layer._parameters and layer.b == 1
    assert new[0] is layer[0]


def test_a_quantizer_of_another_shape_is_noticed():
    layer = nn.Conv2d(4, 8, 1)
    quantized = QuantizedLayer.of(layer, UniformQuantizer(weight_spec(layer, 4), torch.ones(3), torch.zeros(3)))
    with pytest.raises(RuntimeError, match="size"):
        quantized(torch.randn(1, 4, 2, 2))
