"""A quantized layer as integers: what every backend computes, and the plain arithmetic that all of them must reproduce.

    bytes a [N, C, ...]  ->  acc = sum w * (a - z_in)  ->  y = acc * s_in * s_w + b  (+ r)  ->  clamp(round(y * (1 / s) + z), low, high)
         uint8                int32, exact                      float32                              uint8

Every step of it is rounded to float32 on its own, from left to right, so that all backends, and the simulation of a frozen network, give
the same bytes (scales of tensors have 16 bits, so that the product of a residual is exact).

A tensor on an integer grid travels as unsigned bytes, signed grids shifted by half their range, so ``value = scale * (byte - zero_point)``.
An activation that only cuts off (ReLU, ReLU6, Hardtanh) in front of the rounding is no more than a narrower ``low..high``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.quantizers.affine import UniformQuantizer
from fxquant.quantizers.dual import DualQuantizer
from fxquant.quantizers.layers import QuantizedConv2d, QuantizedLinear


@dataclass(frozen=True)
class Grid:
    """The bytes of a tensor: ``value = scale * (byte - zero_point)``, bytes within ``low..high``."""

    scale: float
    zero_point: int
    low: int = 0
    high: int = 255
    inverse: float = field(init=False, repr=False, compare=False)
    """1 / scale, rounded to float32."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "inverse", torch.tensor(self.scale, dtype=torch.float32).reciprocal().item())

    @staticmethod
    def of(quantizer: UniformQuantizer) -> Grid:
        """Return the grid of a quantizer with one scale for the tensor."""
        spec = quantizer.spec
        zero_point = int(quantizer.zero_point.item()) - spec.qmin
        return Grid(quantizer.scale.item(), zero_point, 0, spec.levels - 1)

    def within(self, low: float, high: float) -> Grid:
        """Return the grid cut to the real numbers ``low..high``, as an activation that clamps to them in front of the rounding does."""
        return Grid(self.scale, self.zero_point, max(self.low, self._byte(low)), min(self.high, self._byte(high)))

    def _byte(self, value: float) -> int:
        code = torch.tensor(value, dtype=torch.float32) * self.inverse + self.zero_point
        return int(min(max(code.round().item(), self.low), self.high))

    def quantize(self, x: Tensor) -> Tensor:
        """Return the bytes of a float tensor, rounded half to even as everywhere."""
        return (x * self.inverse + self.zero_point).round().clamp(self.low, self.high).to(torch.uint8)

    def dequantize(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the values of bytes."""
        return (codes.to(dtype) - self.zero_point) * self.scale


@dataclass(frozen=True)
class IntegerLayer:
    """A convolution or linear layer in integers.

    Args:
        weight: int8 ``[O, I / groups, kH, kW]``, or ``[O, I]`` for a linear layer: codes minus their zero-points.
        scale: float32 ``[O]``, of the weight.
        bias: float32 ``[O]``.
        input: the grid of the bytes that come in.
        output: the grid of the bytes that go out; None: float32 goes out.
        stride, padding, dilation, groups: those of the convolution; padding is with the real number 0.
        shape: of one image (or row) that comes in, without the batch. Weights are packed for it; others come out right, perhaps slower.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None
    input: Grid
    output: Grid | None = None
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    shape: tuple[int, ...] | None = None

    @property
    def is_linear(self) -> bool:
        """Whether this is a linear layer, of bytes ``[..., I]``."""
        return self.weight.ndim == 2

    def accumulate(self, codes: Tensor) -> Tensor:
        """Return ``sum w * (a - z_in)`` for bytes ``[N, C, H, W]`` (or ``[..., I]``): exact integers, as float64."""
        centered, weight = codes.double() - self.input.zero_point, self.weight.double()
        if self.is_linear:
            return F.linear(centered, weight)
        return F.conv2d(centered, weight, None, self.stride, self.padding, self.dilation, self.groups)

    def reference(self, codes: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return what the layer gives, in plain torch: the meaning of every backend, and slow.

        Args:
            codes: the bytes that come in.
            residual: float32 of the shape of the output, added in front of the rounding.
        """
        shape = (-1,) if self.is_linear else (-1, 1, 1)
        y = self.accumulate(codes).float() * self.input.scale * self.scale.view(shape)
        if self.bias is not None:
            y = y + self.bias.view(shape)
        if residual is not None:
            y = y + residual
        return y if self.output is None else self.output.quantize(y)


def integer_layer(layer: nn.Module, incoming: Grid, shape: tuple[int, ...] | None = None) -> IntegerLayer | str:
    """Return a quantized layer that reads bytes on the grid `incoming` as integers, or why it has none.

    Args:
        layer: a `QuantizedLayer`.
        incoming: the grid of what it reads.
        shape: that of one image which it reads.
    """
    if not isinstance(layer, QuantizedConv2d | QuantizedLinear):
        return f"{type(layer).__name__.removeprefix('Quantized')} has no integer form here"
    if isinstance(layer.weight_quantizer, DualQuantizer):
        return "its weight has two grids an output, an integer sum has one scale; quantize with weight_groups='one'"
    weight = layer.integers()
    if weight.min() < -128 or weight.max() > 127:
        bits = layer.weight_quantizer.spec.bits
        return f"its {bits}-bit weight has zero-points, so it does not fit a signed byte; quantize with weight_symmetric=True"
    geometry: dict[str, Any] = {}
    if isinstance(layer, QuantizedConv2d):
        padding = _padding(layer)
        if padding is None:
            return f"its padding {layer.padding!r} ({layer.padding_mode}) is not the same zeros on both sides"
        geometry = {"stride": layer.stride, "padding": padding, "dilation": layer.dilation, "groups": layer.groups}
    scale = layer.weight_quantizer.scale.float().expand(len(weight))
    bias = None if layer.bias is None else layer.bias.detach().float()
    return IntegerLayer(weight.to(torch.int8), scale.clone(), bias, incoming, shape=shape, **geometry)


def output_sides(sides: Sequence[int], geometry: Sequence[int]) -> list[int]:
    """Return height and width of what a convolution makes of a map of `sides`; below 1 where that is too small.

    Args:
        geometry: kernel, stride, padding and dilation, height and width each; what comes behind does not count.
    """
    kernel, stride, padding, dilation = geometry[:2], geometry[2:4], geometry[4:6], geometry[6:8]
    return [(sides[i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in (0, 1)]


def overflow(layer: IntegerLayer) -> str | None:
    """Say why sums of `layer` may not fit int32, in which processors of all kinds add up products of bytes, or return None."""
    largest = 255 * int(layer.weight.flatten(1).long().abs().sum(1).max())
    return f"a sum may reach {largest}, which does not fit into 32 bits" if largest >= 2**31 else None


def _padding(layer: nn.Conv2d) -> tuple[int, int] | None:
    if layer.padding_mode != "zeros":
        return None
    if layer.padding == "valid":
        return 0, 0
    if layer.padding == "same":
        total = [dilation * (size - 1) for dilation, size in zip(layer.dilation, layer.kernel_size, strict=True)]
        return (total[0] // 2, total[1] // 2) if all(size % 2 == 0 for size in total) else None
    return int(layer.padding[0]), int(layer.padding[1])
