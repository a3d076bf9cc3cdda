"""Uniform affine quantization: a float tensor on a ladder of evenly spaced values.

          scale
         |<--->|
    -----+-----+-----+-----+-----      x = scale * (code - zero_point)
        -1     0     1     2           code - zero_point
         0     1     2     3           code, here 2 bits unsigned with zero_point 1

    code = clamp(round(x * (1 / scale) + zero_point), qmin, qmax),     Q(x) = (code - zero_point) * scale

Codes are kept as floats that hold integers, so every op is a plain one (mul, add, round, clamp, sub): the result compiles
without a graph break, exports, and runs in float32 and float64. The real number 0 is always on the ladder, because zero_point
is an integer inside the code range: padding and ReLU zeros stay exact. The order of the ops, and the product with the inverse, are
those of integer kernels (oneDNN), so that a value on the border of two codes gets the same one there and here.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.errors import ConfigError


@dataclass(frozen=True)
class QuantSpec:
    """What the integers of a tensor look like; the scale and the zero-point come later, from data.

    Args:
        bits: width of a code, 2 to 8.
        signed: codes run over ``-2^(bits-1) .. 2^(bits-1) - 1`` instead of ``0 .. 2^bits - 1``.
        symmetric: the zero-point is 0 (of use with ``signed``, or for data that is never negative).
        axis: the axis with one scale per index (0 for the weights of conv and linear layers); ``None``: one for the tensor.

    Raises:
        ConfigError: bits outside 2 to 8, or a field of the wrong type.
    """

    bits: int
    signed: bool = False
    symmetric: bool = False
    axis: int | None = None

    def __post_init__(self) -> None:
        if not _is_int(self.bits) or not 2 <= self.bits <= 8:
            raise ConfigError(f"bits={self.bits!r} is not a width this library stores", fix="Use an integer from 2 to 8")
        for name in ("signed", "symmetric"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}={getattr(self, name)!r} is not a truth value", fix=f"Use {name}=True or {name}=False")
        if self.axis is not None and not _is_int(self.axis):
            raise ConfigError(f"axis={self.axis!r} is not an axis", fix="Use an integer, or None for one scale per tensor")

    @property
    def qmin(self) -> int:
        """The smallest code."""
        return -(2 ** (self.bits - 1)) if self.signed else 0

    @property
    def qmax(self) -> int:
        """The largest code."""
        return self.qmin + self.levels - 1

    @property
    def levels(self) -> int:
        """The number of codes, ``2^bits``."""
        return 2**self.bits

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dict of plain values, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> QuantSpec:
        """Return the spec that :meth:`to_dict` wrote.

        Raises:
            ConfigError: a field is missing, unknown, or has a value that cannot be meant.
        """
        try:
            return cls(**fields)
        except TypeError as error:
            raise ConfigError(
                f"{fields!r} does not describe a quantizer ({error})", fix="The fields are bits, signed, symmetric and axis"
            ) from None


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def round_ste(x: Tensor) -> Tensor:
    """Round half to even, with the gradient of the identity (the straight-through estimator).

    The forward value is exactly ``x.round()`` for finite x: ``x.round() - x`` is representable without rounding error
    (Sterbenz' lemma above one half, trivially below), so adding it to x lands on the integer.
    """
    return x + (x.round() - x).detach()


class UniformQuantizer(nn.Module):
    """Fake quantization with a fixed scale and zero-point: ``Q(x) = (clamp(round(x * (1/s) + z), qmin, qmax) - z) * s``.

    Idempotent bit for bit: ``((q - z) * s) * (1/s)`` is within a few float roundings of the integer ``q - z``, and rounds back to it.
    The gradient is 0 almost everywhere, as that of ``round`` is; what is to be learned goes through :func:`round_ste`.

    Args:
        spec: the integer grid.
        scale: the step s, positive and finite, in the dtype of the data; shape ``[]``, or ``[C]`` where ``spec.axis`` is set.
        zero_point: the code of the real number 0, an integer in ``qmin..qmax`` (0 where ``spec.symmetric``); same shape as scale.

    Raises:
        ConfigError: scale or zero_point do not satisfy the above.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, spec: QuantSpec, scale: Tensor, zero_point: Tensor):
        super().__init__()
        _check_parameters(spec, scale, zero_point)
        self.spec = spec
        self.register_buffer("scale", scale.detach().clone())
        self.register_buffer("zero_point", zero_point.detach().to(scale).clone())

    def forward(self, x: Tensor) -> Tensor:
        """Return Q(x), of the shape and dtype of x."""
        return self.dequantize(self.quantize(x))

    def quantize(self, x: Tensor) -> Tensor:
        """Return the codes of x: a float tensor that holds integers in ``qmin..qmax``."""
        scale, zero_point = self._broadcast(x)
        steps, low = x * scale.reciprocal(), self.spec.qmin
        if low:  # rounded as the unsigned bytes that kernels know: 0.49999999 + 128 is 128.5, which goes to the even 128
            return (steps + (zero_point - low)).round().clamp(0, self.spec.levels - 1) + low
        return (steps + zero_point).round().clamp(low, self.spec.qmax)

    def dequantize(self, codes: Tensor) -> Tensor:
        """Return the values ``(codes - zero_point) * scale`` that the codes stand for."""
        scale, zero_point = self._broadcast(codes)
        return (codes - zero_point) * scale

    def _broadcast(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.along(self.scale, x), self.along(self.zero_point, x)

    def along(self, values: Tensor, x: Tensor) -> Tensor:
        """Return `values`, shaped like the scale, so that they broadcast along the channel axis of x."""
        return along(values, x, self.spec.axis)

    def with_grid(self, scale: Tensor, zero_point: Tensor) -> UniformQuantizer:
        """Return a quantizer of the same integers with another scale and zero-point, shaped like these."""
        return UniformQuantizer(self.spec, scale, zero_point)

    def extra_repr(self) -> str:
        """Describe the grid, for ``print(model)``."""
        spec = self.spec
        sign = "signed" if spec.signed else "unsigned"
        symmetry = "symmetric" if spec.symmetric else "asymmetric"
        granularity = "per tensor" if spec.axis is None else f"per channel (axis {spec.axis})"
        return f"{spec.bits} bits, {sign}, {symmetry}, {granularity}"


def along(values: Tensor, x: Tensor, axis: int | None) -> Tensor:
    """Return `values` ``[C]`` shaped to broadcast along an axis of x; those of a tensor with one scale (None) as they are."""
    if axis is None:
        return values
    shape = [1] * x.ndim
    shape[axis] = -1
    return values.view(shape)


def with_16_bits(scale: Tensor) -> Tensor:
    """Return scales rounded to 16 significant bits, at most a 2^-16th away.

    Products with codes are then exact in float32, so that to multiply and to add rounds once, whether or not a kernel fuses the two.
    """
    mantissa, exponent = torch.frexp(scale)
    return torch.ldexp((mantissa * 2**16).round() / 2**16, exponent)


def _check_parameters(spec: QuantSpec, scale: Tensor, zero_point: Tensor) -> None:
    dims = 0 if spec.axis is None else 1
    if scale.ndim != dims or scale.shape != zero_point.shape or scale.numel() == 0:
        expected = "[]" if dims == 0 else "[C]"
        raise ConfigError(
            f"scale has shape {list(scale.shape)} and zero_point {list(zero_point.shape)}",
            fix=f"Both must be {expected} for axis={spec.axis}",
        )
    if not scale.is_floating_point():
        raise ConfigError(f"scale is {scale.dtype}", fix="Give it in the floating point dtype of the data")
    if not bool((scale.isfinite() & (scale > 0)).all()):
        raise ConfigError("a scale is zero, negative or not finite", fix="Every step must be a positive number")
    inside = (zero_point >= spec.qmin) & (zero_point <= spec.qmax) & (zero_point == zero_point.round())
    if not bool(inside.all()):
        raise ConfigError(f"a zero_point is not an integer in {spec.qmin}..{spec.qmax}", fix="Round and clamp it first")
    if spec.symmetric and bool((zero_point != 0).any()):
        raise ConfigError("a symmetric grid has a zero_point other than 0", fix="Set it to 0, or use symmetric=False")
