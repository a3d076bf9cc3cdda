"""Layers whose weight passes through a quantizer on its way to the multiply-adds.

    x ------------------> conv -> y         W' = weight_quantizer(weight)
    weight -> quantizer ---^                frozen: the weight already is W' and the quantizer only keeps scale and zero-point

They are subclasses of torch's layers with the same attributes, so whatever knows an ``nn.Conv2d`` knows these.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.graph import sharing_copy
from fxquant.quantizers.affine import QuantSpec, UniformQuantizer


class QuantizedLayer(nn.Module):
    """What all layers with a quantized weight share; `of` makes one from a float layer."""

    weight: Tensor
    weight_quantizer: UniformQuantizer
    bias: Tensor | None
    frozen: bool

    def used_weight(self) -> Tensor:
        """Return the weight the layer multiplies with: on the grid, also while it is not frozen."""
        return self.weight if self.frozen else self.weight_quantizer(self.weight)

    def freeze(self) -> QuantizedLayer:
        """Return a copy whose stored weight is the quantized one; outputs stay bit-identical, since quantizing is idempotent."""
        new = sharing_copy(self)
        new.weight = nn.Parameter(self.used_weight().detach(), requires_grad=False)
        if new.bias is not None:
            new.bias = nn.Parameter(new.bias.detach(), requires_grad=False)
        new.frozen = True
        return new

    def scaled(self, gain: Tensor, shift: Tensor) -> QuantizedLayer:
        """Return a copy whose output is ``gain * y + shift`` and whose weight keeps its codes.

        Args:
            gain: positive, one for each scale of the weight; goes into that scale.
            shift: one for each output channel; goes into the bias, which is made when there is none.
        """
        new = sharing_copy(self)
        old = self.weight_quantizer
        new.weight_quantizer = UniformQuantizer(old.spec, old.scale * gain, old.zero_point)
        # What learns later starts at the float weight, so it is scaled along; a code that rounding noise would change stays. A frozen
        # weight is on the new grid to the bit, as it is when codes and scale are all that is stored of it.
        codes, scaled = self.codes(), self.weight * old.along(gain, self.weight)
        kept = (new.weight_quantizer.quantize(scaled) == codes) & (not self.frozen)
        new.weight = nn.Parameter(torch.where(kept, scaled, new.weight_quantizer.dequantize(codes)).detach(), requires_grad=False)
        bias = shift if self.bias is None else gain.repeat(len(shift) // len(gain)) * self.bias + shift
        new.bias = nn.Parameter(bias.detach(), requires_grad=False)
        return new

    def codes(self) -> Tensor:
        """Return the integers of the weight, as floats in ``qmin..qmax``, shaped like it."""
        return self.weight_quantizer.quantize(self.weight)

    @staticmethod
    def of(layer: nn.Module, weight_quantizer: UniformQuantizer) -> QuantizedLayer:
        """Return a copy of the float `layer` (convolution, transposed convolution or linear) that quantizes its weight."""
        kinds = [(base, quantized) for base, quantized in QUANTIZED_LAYERS.items() if isinstance(layer, base)]
        new = sharing_copy(layer)
        new.__class__ = kinds[0][1]
        new.weight_quantizer = weight_quantizer
        new.frozen = False
        assert isinstance(new, QuantizedLayer)
        return new


class QuantizedConv1d(QuantizedLayer, nn.Conv1d):
    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.used_weight(), self.bias)


class QuantizedConv2d(QuantizedLayer, nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.used_weight(), self.bias)


class QuantizedConv3d(QuantizedLayer, nn.Conv3d):
    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.used_weight(), self.bias)


def _transposed(convolve: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def forward(self: Any, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        shape = self.stride, self.padding, self.kernel_size, len(self.kernel_size), self.dilation
        more = self.output_padding if output_size is None else self._output_padding(input, output_size, *shape)
        return convolve(input, self.used_weight(), self.bias, self.stride, self.padding, more, self.groups, self.dilation)

    return forward


class QuantizedConvTranspose1d(QuantizedLayer, nn.ConvTranspose1d):
    forward = _transposed(F.conv_transpose1d)


class QuantizedConvTranspose2d(QuantizedLayer, nn.ConvTranspose2d):
    forward = _transposed(F.conv_transpose2d)


class QuantizedConvTranspose3d(QuantizedLayer, nn.ConvTranspose3d):
    forward = _transposed(F.conv_transpose3d)


class QuantizedLinear(QuantizedLayer, nn.Linear):  # type: ignore[misc]
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.used_weight(), self.bias)


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
