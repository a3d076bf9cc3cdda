"""Layers whose weight passes through a quantizer on its way to the multiply-adds.

    x ------------------> conv -> y         W' = weight_quantizer(weight)
    weight -> quantizer ---^

    u = round(x / s_x) ---> conv -> * s_x -> * s_w -> + b -> y         frozen: the weight is the integers N = codes - zero_point
    N ----------------------^

Where a frozen layer reads a tensor on a grid of step ``s_x``, its sums are of integers: exact in float32 up to 2^24, in whatever order they
are added; larger ones, rare even at 8 bits and in wide layers, are rounded. So the result is that of integer kernels bit for bit, whatever
the batch and the memory order, and in compiled form where the compiler does not contract products and sums (on CPUs it does not).

They are subclasses of torch's layers with the same attributes, so whatever knows an ``nn.Conv2d`` knows these.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.graph import sharing_copy
from fxquant.quantizers.affine import QuantSpec, UniformQuantizer, along
from fxquant.quantizers.dual import DualQuantizer


class QuantizedLayer(nn.Module):
    """What all layers with a quantized weight share; `of` makes one from a float layer."""

    weight: Tensor
    weight_quantizer: UniformQuantizer
    bias: Tensor | None
    frozen: bool
    input_scale: Tensor | None
    """The step of the grid that the input lies on, ``[]``; None: it lies on none, or the layer is not frozen."""

    convolve: Callable[..., Tensor]
    """The plain operation, of ``(x, weight, bias)`` and what else the layer is called with."""

    def forward(self, input: Tensor, *more: Any, **named: Any) -> Tensor:
        """Return what the layer computes with its quantized weight."""
        if not self.frozen:
            return self.convolve(input, self.used_weight(), self.bias, *more, **named)
        return self.from_sums(self.convolve(self.to_integers(input), self.weight, None, *more, **named))

    def to_integers(self, x: Tensor) -> Tensor:
        """Return the integers that x is multiples of, as floats; x itself where it lies on no grid."""
        return x if self.input_scale is None else (x / self.input_scale).round()

    def from_sums(self, *sums: Tensor) -> Tensor:
        """Return ``sums * s_x * s_w + b``, rounded in this order, which is that of integer kernels.

        Args:
            sums: those of the integers, one tensor for each grid of an output; their products with the scales are added.
        """
        axis = -1 if isinstance(self, nn.Linear) else -1 - len(self.kernel_size)  # type: ignore[arg-type]
        scale, outputs = self.weight_quantizer.scale, sums[0].shape[axis]
        scales = (scale,) if scale.ndim == 1 else scale.unbind(1)
        if self.input_scale is not None:
            sums = tuple(part * self.input_scale for part in sums)
        first, *others = (
            part * along(scale.repeat(outputs // len(scale)) if len(scale) < outputs else scale, part, axis)
            for part, scale in zip(sums, scales, strict=True)
        )
        y = sum(others, first)
        return y if self.bias is None else y + along(self.bias, y, axis)

    def used_weight(self) -> Tensor:
        """Return the weight the layer multiplies with: on the grid, also while it is not frozen."""
        return self.weight_quantizer.dequantize(self.codes()) if self.frozen else self.weight_quantizer(self.weight)

    def freeze(self, input_scale: Tensor | None = None) -> QuantizedLayer:
        """Return a copy that multiplies with integers and scales their sums; outputs stay equal up to rounding.

        Args:
            input_scale: the step of the grid that the input lies on, ``[]``; None: it is not known to lie on one.
        """
        new = sharing_copy(self)
        new.weight = nn.Parameter(self.integers().detach(), requires_grad=False)
        if new.bias is not None:
            new.bias = nn.Parameter(new.bias.detach(), requires_grad=False)
        new.frozen = True
        new.register_buffer("input_scale", None if input_scale is None else input_scale.detach().clone())
        return new

    def scaled(self, gain: Tensor, shift: Tensor) -> QuantizedLayer:
        """Return a copy whose output is ``gain * y + shift`` and whose weight keeps its codes.

        Args:
            gain: positive, one for each index of the weight's channel axis; goes into its scale, or both of them.
            shift: one for each output channel; goes into the bias, which is made when there is none.
        """
        new = sharing_copy(self)
        old = self.weight_quantizer
        new.weight_quantizer = old.with_grid(old.scale * gain.view(-1, *[1] * (old.scale.ndim - 1)), old.zero_point)
        if not self.frozen:
            # What learns later starts at the float weight, so it is scaled along; a code that rounding noise would change stays.
            codes, scaled = self.codes(), self.weight * along(gain, self.weight, old.spec.axis)
            kept = new.weight_quantizer.quantize(scaled) == codes
            new.weight = nn.Parameter(torch.where(kept, scaled, new.weight_quantizer.dequantize(codes)).detach(), requires_grad=False)
        bias = shift if self.bias is None else gain.repeat(len(shift) // len(gain)) * self.bias + shift
        new.bias = nn.Parameter(bias.detach(), requires_grad=False)
        return new

    def codes(self) -> Tensor:
        """Return the codes of the weight, as floats in ``qmin..qmax``, shaped like it."""
        if self.frozen:
            return self.weight + self.weight_quantizer.along(self.weight_quantizer.zero_point, self.weight)
        return self.weight_quantizer.quantize(self.weight)

    def integers(self) -> Tensor:
        """Return the codes minus their zero-points: the weight in steps of its scale, as floats."""
        codes = self.codes()
        return codes - self.weight_quantizer.along(self.weight_quantizer.zero_point, codes)

    @staticmethod
    def of(layer: nn.Module, weight_quantizer: UniformQuantizer) -> QuantizedLayer:
        """Return a copy of the float `layer` (convolution, transposed convolution or linear) that quantizes its weight."""
        kinds = [(base, quantized) for base, quantized in QUANTIZED_LAYERS.items() if isinstance(layer, base)]
        new = sharing_copy(layer)
        new.__class__ = kinds[0][1]
        new.weight_quantizer = weight_quantizer
        new.frozen = False
        new.register_buffer("input_scale", None)
        assert isinstance(new, QuantizedLayer)
        return new


class QuantizedConv1d(QuantizedLayer, nn.Conv1d):
    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._conv_forward(x, weight, bias)


class QuantizedConv2d(QuantizedLayer, nn.Conv2d):
    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._conv_forward(x, weight, bias)


class QuantizedConv3d(QuantizedLayer, nn.Conv3d):
    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._conv_forward(x, weight, bias)


class _QuantizedTransposed(QuantizedLayer):
    operation: Callable[..., Tensor]

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None, output_size: list[int] | None = None) -> Tensor:
        layer: Any = self
        shape = layer.stride, layer.padding, layer.kernel_size, len(layer.kernel_size), layer.dilation
        more = layer.output_padding if output_size is None else layer._output_padding(x, output_size, *shape)
        return type(self).operation(x, weight, bias, layer.stride, layer.padding, more, layer.groups, layer.dilation)


class QuantizedConvTranspose1d(_QuantizedTransposed, nn.ConvTranspose1d):
    operation = staticmethod(F.conv_transpose1d)


class QuantizedConvTranspose2d(_QuantizedTransposed, nn.ConvTranspose2d):
    operation = staticmethod(F.conv_transpose2d)


class QuantizedConvTranspose3d(_QuantizedTransposed, nn.ConvTranspose3d):
    operation = staticmethod(F.conv_transpose3d)


class QuantizedLinear(QuantizedLayer, nn.Linear):  # type: ignore[misc]
    def forward(self, input: Tensor) -> Tensor:
        """Return what the layer computes with its quantized weight; with two grids, from the sums over the columns of either."""
        if not self.frozen or not isinstance(self.weight_quantizer, DualQuantizer):
            return super().forward(input)
        x = self.to_integers(input)
        return self.from_sums(*[F.linear(x[..., columns], self.weight[:, columns]) for columns in self.weight_quantizer.columns()])

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)


QUANTIZED_LAYERS: dict[type[nn.Module], type[QuantizedLayer]] = {
    nn.Conv1d: QuantizedConv1d,
    nn.Conv2d: QuantizedConv2d,
    nn.Conv3d: QuantizedConv3d,
    nn.ConvTranspose1d: QuantizedConvTranspose1d,
    nn.ConvTranspose2d: QuantizedConvTranspose2d,
    nn.ConvTranspose3d: QuantizedConvTranspose3d,
    nn.Linear: QuantizedLinear,
}


def channel_axis(layer: nn.Module) -> int:
    """Return the axis of the weight that counts output channels (within a group, for transposed convolutions)."""
    return 1 if isinstance(layer, nn.modules.conv._ConvTransposeNd) else 0


def weight_spec(layer: nn.Module, bits: int, symmetric: bool = False) -> QuantSpec:
    """Return the grid of `layer`'s weight: per output channel; signed where symmetric, else unsigned with a zero-point."""
    return QuantSpec(bits, signed=symmetric, symmetric=symmetric, axis=channel_axis(layer))
