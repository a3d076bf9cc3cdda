"""One grid that does what a grid a channel does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxquant.errors import CalibrationError
from fxquant.quantizers import QuantSpec, UniformQuantizer
from fxquant.quantizers.channelwise import channel_grids, one_grid


def rows() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 500, generator=generator, dtype=torch.float64)
    return x * torch.tensor([0.01, 0.1, 1, 2, 5, 0.0]).double()[:, None] + torch.tensor([0, 0.3, -2, 7, 0, 4.0]).double()[:, None]


def per_channel(x: Tensor, scale: Tensor, zero_point: Tensor, qmax: int) -> Tensor:
    """Quantize ``[C, M]`` with a scale and any real zero-point a channel."""
    scale, zero_point = scale[:, None], zero_point[:, None]
    return ((x / scale + zero_point).round().clamp(0, qmax) - zero_point) * scale


@pytest.mark.parametrize("method", ["minmax", "lp"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_one_quantizer_equals_one_a_channel(bits, method):
    x = rows()
    scale, zero_point = channel_grids(x, bits, method)
    x = x * 0.999  # off the extremes, which min-max puts right between two codes
    r, d, common, zero = one_grid(scale, zero_point, 2**bits - 1)
    one = UniformQuantizer(QuantSpec(bits), common, zero)
    moved = x / r[:, None] - d[:, None]
    torch.testing.assert_close((one(moved) + d[:, None]) * r[:, None], per_channel(x, scale, zero_point, 2**bits - 1), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_no_channel_is_clipped_or_wasted(bits):
    """With min-max, every channel takes all codes, wherever it is."""
    x = rows()[:5]
    scale, zero_point = channel_grids(x, bits, "minmax")
    torch.testing.assert_close(scale, (x.amax(1) - x.amin(1)) / (2**bits - 1), rtol=1e-9, atol=0)
    codes = (x / scale[:, None] + zero_point[:, None]).round()
    assert bool((codes.amax(1) - codes.amin(1) >= 2**bits - 2).all())


def test_the_published_formula():
    """d = -z s / r + z~ s~ with r = s / s~."""
    scale, zero_point = torch.tensor([0.5, 1.0, 1.5]), torch.tensor([3.0, 8.0, 4.0])
    r, d, common, zero = one_grid(scale, zero_point, 15)
    assert (common, zero) == (1.0, 5.0)
    torch.testing.assert_close(r, scale / common)
    torch.testing.assert_close(d, -zero_point * scale / r + zero * common)


def test_constant_channels_cost_nothing():
    scale, zero_point = channel_grids(rows(), 4)
    assert scale[5] == scale[:5].mean()
    assert zero_point[5] * scale[5] == pytest.approx(-4)
    scale, _ = channel_grids(torch.full((3, 5), 2.0), 4)
    assert scale.tolist() == [1, 1, 1]


def test_values_that_are_not_finite():
    with pytest.raises(CalibrationError, match="NaN or Inf"):
        channel_grids(torch.tensor([[0.0, float("nan")]]), 4)
