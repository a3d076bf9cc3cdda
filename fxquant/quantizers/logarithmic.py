"""Logarithmic quantization of values in (0, 1]: the outputs of a softmax, most of which are small and few of which are large.

          d/8  d/4       d/2                  d
    |--|---+----+---------+-------------------+        log2:      x = d 2^-code
    0                                        code 0
          d/8  d/4  .35d  d/2     .71d        d
    |--|-+-+--+-+----+----+--------+----------+        log-sqrt2: x = d sqrt(2)^-code

With k = 1 step an octave for log2 and k = 2 for log-sqrt2, and n = 2^bits - 1 (RepQ-ViT, section 3.3 of arXiv 2212.08254):

    code = clip(round(-k log2(x / d)), 0, n),      Q(x) = d 2^-ceil(code / k) (1 + (sqrt(2) - 1) [k = 2 and code odd])

so that a value is a shift of d, and half of them a shift of ``sqrt(2) d``. The code n stands for the value 0. (The published quantizer
keeps all 2^bits powers and a zero besides them, one value more than `bits` bits can tell apart.)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fxquant.errors import CalibrationError, ConfigError
from fxquant.quantizers.affine import QuantSpec, along
from fxquant.quantizers.histogram import AxisObserver, Observer

STEPS = {"log2": 1, "logsqrt2": 2}
"""Codes an octave of each logarithmic grid."""

_OCTAVES = 100  # what is smaller than 2^-100 d is 0: the powers behind it come near the end of float32
_TRIED_OCTAVES, _TRIED_PER_OCTAVE = 3, 16  # thresholds that the search looks at


class LogQuantizer(nn.Module):
    """Fake quantization on a logarithmic grid; see the module for the formulas.

    Idempotent: the logarithm of a value of the grid is an integer up to rounding noise. The gradient is that of the identity, since no
    learned quantizer takes its place while a network is trained, and what stands in front of the softmax should learn all the same.

    Args:
        spec: the bits; unsigned and symmetric.
        scale: the largest value d, positive and finite, in the dtype of the data; shape ``[]``, or ``[C]`` where ``spec.axis`` is set.
        grid: ``"log2"`` or ``"logsqrt2"``.

    Raises:
        ConfigError: a grid that is not known, a spec or a scale that cannot be meant.
    """

    scale: Tensor

    def __init__(self, spec: QuantSpec, scale: Tensor, grid: str = "log2"):
        super().__init__()
        if grid not in STEPS:
            raise ConfigError(f"{grid!r} is no logarithmic grid", fix=f"Use one of {', '.join(STEPS)}")
        if spec.signed or not spec.symmetric:
            raise ConfigError(f"{spec} is not unsigned and symmetric", fix="Use QuantSpec(bits, symmetric=True)")
        dims, shape = (0, "[]") if spec.axis is None else (1, "[C]")
        if scale.ndim != dims or not scale.is_floating_point() or not bool((scale.isfinite() & (scale > 0)).all()):
            raise ConfigError("the scale is no positive number", fix=f"Give the largest value, as a tensor of shape {shape}")
        self.spec, self.grid = spec, grid
        self.register_buffer("scale", scale.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """Return Q(x), of the shape and dtype of x."""
        fixed = x.detach()
        return self.dequantize(self.quantize(fixed)) + (x - fixed)  # plus 0, which has the gradient of x

    def quantize(self, x: Tensor) -> Tensor:
        """Return the codes of x: a float tensor that holds integers in ``0..qmax``; x below 0 counts as 0."""
        code, zero = self.steps(x).round(), self.spec.qmax
        return torch.where(code > min(zero - 1, STEPS[self.grid] * _OCTAVES), zero, code.clamp_min(0))

    def steps(self, x: Tensor) -> Tensor:
        """Return how many steps x is below the largest value, as real numbers; infinite for 0 and below."""
        return -STEPS[self.grid] * (x / along(self.scale, x, self.spec.axis)).clamp_min(0).log2()

    def dequantize(self, codes: Tensor) -> Tensor:
        """Return the values that the codes stand for."""
        steps = STEPS[self.grid]
        value = along(self.scale, codes, self.spec.axis) * torch.exp2(-(codes / steps).ceil())
        if steps == 2:
            value = value * (1 + (math.sqrt(2) - 1) * codes.remainder(2))
        return torch.where(codes == self.spec.qmax, 0.0, value)

    def extra_repr(self) -> str:
        """Describe the grid, for ``print(model)``."""
        return f"{self.spec.bits} bits, {self.grid}, {'per tensor' if self.spec.axis is None else f'per index of axis {self.spec.axis}'}"


def log_quantizer(observer: Observer, bits: int, grid: str = "log2", *, p: float = 2.4) -> LogQuantizer:
    """Return the logarithmic quantizer with the smallest ``sum |x - Q(x)|^p`` over all that the observer saw, apart for each row of it.

    The thresholds tried are the largest value seen, and those up to three octaves below it, sixteen an octave.

    Raises:
        CalibrationError: the observer saw nothing, or negative values.
        ConfigError: bits outside 2 to 8, or a grid that is not known.
    """
    h, axis = observer.histogram(), observer.axis if isinstance(observer, AxisObserver) else None
    rows = QuantSpec(bits, symmetric=True, axis=0)
    if bool((h.low < 0).any()):
        raise CalibrationError("has negative values, which have no logarithm", where=observer.name, fix="Use a uniform quantizer")
    high = torch.where(h.high > 0, h.high, 1)
    tried = high * torch.exp2(-torch.arange(_TRIED_OCTAVES * _TRIED_PER_OCTAVE).to(high) / _TRIED_PER_OCTAVE)[:, None]
    quantizers = [LogQuantizer(rows, scale, grid) for scale in tried]
    losses = torch.stack([((h.values - quantizer(h.values)).abs().double().pow(p) * h.counts).sum(1) for quantizer in quantizers])
    best = tried.gather(0, losses.argmin(0)[None])[0]
    return LogQuantizer(QuantSpec(bits, symmetric=True, axis=axis), best[0] if axis is None else best, grid)
