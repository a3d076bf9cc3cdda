"""Quantizers while they are learned; `fixed` gives the `UniformQuantizer` that stays.

    soft rounding   W' = s * (clamp(B + h(alpha) + z) - z),  B = floor(W / s0),  h(alpha) = clamp(1.2 sigmoid(alpha) - 0.1, 0, 1)
    latent          W' = s * (clamp(round(v) + z) - z),      v starts at W / s and may cross any number of levels
    activation      Q(x) with a learned s; while training, some elements, or a share of each, stay float

What `round` does to gradients: it is taken for the identity, `clamp` passes none outside (straight through). With ``q = clamp(round(x/s)
+ z) - z`` that is the gradient of the step of LSQ (Esser et al. 2020):

    dQ/dx = 1 inside, 0 outside        dQ/ds = q - x/s inside, q outside        dQ/dz = 0 inside, -s outside
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.quantizers.affine import QuantSpec, UniformQuantizer, along

STRETCH = (-0.1, 1.1)
"""The ends gamma and zeta that the sigmoid of soft rounding is stretched to before it is clamped to 0..1 (AdaRound, eq. 23)."""

_BLOCK = 2**18
"""Elements whose products are added one after another."""

_SMALLEST = 1e-3
"""No learned scale gets below this share of where it started: at zero it would stay, and divide by it."""


class FakeQuantize(torch.autograd.Function):
    """Q(x) for one scale a tensor, in few passes over memory; where `keep` is 0, x stays as it is.

    A value on the border of two codes may get the other one than from `UniformQuantizer`, which rounds behind the zero-point.

    Inside is what rounds onto the grid, so no codes are kept for the backward pass, only x and the output, which the layers around keep
    anyway; the gradient of the scale is ``(<g, out> - <dx, x>) / s``, to which elements that stay float add nothing. On the CPU, where
    reading a number back costs nothing, bounds are numbers: ops with numbers are several times faster than ops with tensors of one element.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, keep: Tensor | None = None) -> Tensor:
        """Return Q(x); `scale` and `zero_point` have shape ``[]``, `keep` that of x, with 1 where x is quantized and 0 elsewhere."""
        if x.is_cpu:
            zero, step = zero_point.item(), scale.item()
            ctx.ends = (qmin - zero - 0.5) * step, (qmax - zero + 0.5) * step
            out = (x / step).round_().clamp_(qmin - zero, qmax - zero).mul_(step)
        else:
            zeros = zero_point.to(x.dtype)
            steps = x / scale.to(x.dtype)
            inside = (steps >= qmin - zeros - 0.5) & (steps <= qmax - zeros + 0.5)
            out = steps.round_().clamp_(qmin - zeros, qmax - zeros).mul_(scale)
        ctx.inside = None if x.is_cpu else inside
        if keep is not None:
            out = torch.lerp(x, out, keep)  # exact at 0 and 1, and many times faster than `where` on the CPU
        ctx.save_for_backward(x, out, scale, keep)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, the scale and the zero-point."""
        (gradient,) = gradients
        x, out, scale, keep = ctx.saved_tensors
        dx = torch.ops.aten.hardtanh_backward(gradient, x, *ctx.ends) if ctx.inside is None else gradient * ctx.inside
        if keep is not None:
            dx = torch.lerp(gradient, dx, keep)
        dscale = dzero = None
        if ctx.needs_input_grad[1]:
            dscale = (inner_product(gradient, out) - inner_product(dx, x)) / scale
        if ctx.needs_input_grad[2]:
            dzero = (dx - gradient).sum(dtype=torch.promote_types(dx.dtype, torch.float32)) * scale
        return dx, _typed_as(dscale, scale), _typed_as(dzero, scale), None, None, None


def inner_product(values: Tensor, others: Tensor) -> Tensor:
    """Return the sum of the products of the elements of two tensors of one shape, in float32 at least."""
    wide = torch.promote_types(values.dtype, torch.float32)
    if values.is_cpu and values.dtype == others.dtype == wide and _is_one_block(values) and values.stride() == others.stride():
        # No product is written to memory; block by block, as one sum from end to end loses digits.
        blocks = zip(*(each.as_strided((each.numel(),), (1,)).split(_BLOCK) for each in (values, others)), strict=True)
        return torch.stack([torch.dot(*pair) for pair in blocks]).sum()
    return (values * others if values.dtype == wide else values.to(wide) * others).sum()


def _is_one_block(values: Tensor) -> bool:
    return values.is_contiguous() or values.is_contiguous(memory_format=torch.channels_last)


def learned_step(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    """Return what `FakeQuantize` returns, with the same gradients, from plain ops that a compiler fuses."""
    steps, low, high = x / scale.to(x.dtype), qmin - zero_point, qmax - zero_point
    inside = steps * ((steps >= low - 0.5) & (steps <= high + 0.5)).detach()
    rounded = steps.detach().round()
    codes = torch.where(rounded < low, low, torch.where(rounded > high, high, rounded))
    ends = codes - codes.detach()  # nothing but the gradient of a learned zero-point, which codes beyond the ends follow
    return ((inside + (codes - inside).detach() + ends) * scale).to(x.dtype)


def _typed_as(gradient: Tensor | None, parameter: Tensor) -> Tensor | None:
    return None if gradient is None else gradient.to(parameter.dtype)


class LearnedScale(nn.Module):
    """A positive scale that is learned, or not.

    Args:
        scale: where it starts, ``[]`` or ``[C]``.
        relative: learn its ratio to the start, so that one rate suits scales of any size; otherwise the scale itself, as published.
        learned: False keeps it where it is.
    """

    start: Tensor
    value: Tensor

    def __init__(self, scale: Tensor, relative: bool = False, learned: bool = True):
        super().__init__()
        self.register_buffer("start", scale.detach().clone())
        self.relative = relative
        value = torch.ones_like(scale) if relative else scale.detach().clone()
        if learned:
            self.value = nn.Parameter(value)
        else:
            self.register_buffer("value", value)

    def forward(self) -> Tensor:
        """Return the scale, at least a thousandth of where it started."""
        if self.relative:
            return self.start * self.value.clamp_min(_SMALLEST)
        return torch.maximum(self.value, _SMALLEST * self.start)


class _Learned(nn.Module):
    """What the quantizers of this file share: a grid, a scale and a zero-point."""

    zero_point: Tensor

    def __init__(self, quantizer: UniformQuantizer, relative: bool, learned_scale: bool):
        super().__init__()
        self.spec: QuantSpec = quantizer.spec
        self.scale = LearnedScale(quantizer.scale, relative, learned_scale)
        self.register_buffer("zero_point", quantizer.zero_point.detach().clone())

    def fixed(self) -> UniformQuantizer:
        """Return the quantizer that stays: the scale as learned, the zero-point rounded."""
        zero_point = self.zero_point.detach().round().clamp(self.spec.qmin, self.spec.qmax)
        return UniformQuantizer(self.spec, self.scale().detach(), zero_point)

    def _along(self, values: Tensor, weight: Tensor) -> Tensor:
        return along(values, weight, self.spec.axis)


class WeightLearner(_Learned):
    """A weight quantizer in training: `forward` gives the weight the layer uses, whatever it is given; `codes` its integers."""

    def codes(self) -> Tensor:
        """Return the integers, as floats in ``qmin..qmax``, that the learned weight has when training ends."""
        raise NotImplementedError(f"{type(self).__name__} has no codes")

    def weight(self) -> Tensor:
        """Return the quantized weight that stays."""
        return self.fixed().dequantize(self.codes()).detach()


class SoftRounding(WeightLearner):
    """AdaRound's weight: every element goes up or down by less than one level, decided by a learned alpha.

    It starts at the float weight, clipped to the grid. The levels below, B, are counted with the starting scale and kept, so a learned
    scale moves the values of the levels and leaves the rounding alone (Genie-M).

    Args:
        weight: the float weight.
        quantizer: its grid and where the scale starts.
        learned_scale: learn the scale too.

    Attributes:
        last: h(alpha) of the last forward pass, for the loss that drives it to 0 or 1.
    """

    below: Tensor
    last: Tensor

    def __init__(self, weight: Tensor, quantizer: UniformQuantizer, learned_scale: bool = False):
        super().__init__(quantizer, relative=False, learned_scale=learned_scale)
        scaled = weight.detach() / self._along(quantizer.scale, weight)
        below = scaled.floor()
        self.register_buffer("below", below + self._along(quantizer.zero_point, weight))
        self.alpha = nn.Parameter(_inverse(scaled - below))

    def hardness(self) -> Tensor:
        """Return h(alpha) in 0..1: 0 is down, 1 is up."""
        low, high = STRETCH
        return F.hardtanh(self.alpha.sigmoid() * (high - low) + low, 0.0, 1.0)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight, softly rounded."""
        self.last = self.hardness()
        clamped = F.hardtanh(self.below + self.last, float(self.spec.qmin), float(self.spec.qmax))
        return (clamped - self._along(self.zero_point, clamped)) * self._along(self.scale(), clamped)

    def codes(self) -> Tensor:
        """Return the integers: up where alpha is at least 0."""
        return (self.below + (self.alpha >= 0)).clamp(self.spec.qmin, self.spec.qmax).detach()


def _inverse(rest: Tensor) -> Tensor:
    """Return the alpha whose h is `rest`, a number in 0..1."""
    low, high = STRETCH
    return ((rest - low) / (high - rest)).log()


class LatentWeight(WeightLearner):
    """A float weight in units of its step behind a straight-through round: it can move by any number of levels.

    In units of the step one rate fits all channels, however small batch norm folding has made them. The gradient passes at the ends of
    the grid as well, where torch's own ``clamp`` lets none through (on the bound itself, since torch 2.15): half of all two-bit weights
    are there. `project` keeps the latent weight within reach of the grid instead.

    Args:
        weight: where the float weight starts.
        quantizer: its grid and where the scale starts.
        learned_scale: learn the scale, as a ratio to its start.
    """

    def __init__(self, weight: Tensor, quantizer: UniformQuantizer, learned_scale: bool = True):
        super().__init__(quantizer, relative=True, learned_scale=learned_scale)
        self.latent = nn.Parameter(weight.detach() / self._along(quantizer.scale, weight))
        self.project()

    def forward(self, weight: Tensor) -> Tensor:
        """Return the quantized weight; gradients go straight through the rounding."""
        steps = self.latent + (self.latent.detach().round().clamp(*self._ends()) - self.latent).detach()
        return steps * self._along(self.scale(), steps)

    def codes(self) -> Tensor:
        """Return the integers nearest to the latent weight."""
        zero_point = self._along(self.zero_point, self.latent)
        return (self.latent.round() + zero_point).clamp(self.spec.qmin, self.spec.qmax).detach()

    @torch.no_grad()
    def project(self) -> None:
        """Bring the latent weight back to within half a step of the grid."""
        low, high = self._ends()
        self.latent.copy_(self.latent.clamp(low - 0.5, high + 0.5))

    def _ends(self) -> tuple[Tensor, Tensor]:
        zero_point = self._along(self.zero_point, self.latent)
        return self.spec.qmin - zero_point, self.spec.qmax - zero_point


class LearnedQuantizer(_Learned):
    """An activation quantizer whose scale, and zero-point if asked, is learned; part of its input can stay float meanwhile.

    Args:
        quantizer: the grid and where the scale starts.
        relative: see `LearnedScale`.
        learned_zero_point: learn the zero-point as well, as a real number that is rounded in the end (LSQ+).

    Attributes:
        drop: probability with which an element stays float (QDrop); 0: all are quantized.
        mix, is_mixed: share of the float value in every element (annealed to 0, NWQ), and whether there is one.
        masks: where the random choice comes from; needed while `drop` is not 0.
    """

    _share: Tensor

    def __init__(self, quantizer: UniformQuantizer, relative: bool = False, learned_zero_point: bool = False, learned_scale: bool = True):
        super().__init__(quantizer, relative, learned_scale)
        self.drop = 0.0
        self.register_buffer("_share", torch.zeros((), device=quantizer.scale.device), persistent=False)
        self._mix, self.is_mixed = 0.0, False
        self.masks: Masks | None = None
        if learned_zero_point and not quantizer.spec.symmetric:
            start = self.zero_point
            del self.zero_point
            self.zero_point = nn.Parameter(start)

    @property
    def mix(self) -> float:
        return self._mix

    @mix.setter
    def mix(self, share: float) -> None:
        if share != self._mix:
            self._mix, self.is_mixed = share, share > 0
            self._share.fill_(share)  # compiled code reads this one: for another number it would be compiled anew

    def forward(self, x: Tensor) -> Tensor:
        """Return Q(x), or a mixture of it and x."""
        zero_point = self.zero_point
        if zero_point.requires_grad:
            rounded = zero_point.detach().round().clamp(self.spec.qmin, self.spec.qmax)
            zero_point = zero_point + (rounded - zero_point).detach()
        keep = self.masks.like(x, self.drop) if self.drop and self.masks else None
        if self.spec.axis is not None or (torch.compiler.is_compiling() and not self.drop):
            grid = self._along(self.scale(), x), self._along(zero_point, x)
            quantized = learned_step(x, *grid, self.spec.qmin, self.spec.qmax)
            quantized = quantized if keep is None else torch.lerp(x, quantized, keep)
            return torch.lerp(quantized, x, self._share.to(x.dtype)) if self.is_mixed else quantized
        quantized = FakeQuantize.apply(x, self.scale(), zero_point, self.spec.qmin, self.spec.qmax, keep)
        assert isinstance(quantized, Tensor)
        return torch.lerp(quantized, x, self.mix) if self.mix else quantized


class Masks:
    """Masks of ones and, with some probability, zeros: each is cut at a random place from one long random sequence.

    Drawing every element anew would cost more than the layers around; a window at one of a million places is as good for dropping.

    Args:
        generator: where the randomness comes from, on the CPU.
    """

    PLACES = 2**20

    def __init__(self, generator: torch.Generator):
        self.generator = generator
        self._sequences: dict[tuple[float, torch.dtype, torch.device], Tensor] = {}

    def like(self, x: Tensor, drop: float) -> Tensor:
        """Return a mask of the shape, type, device and memory format of x, whose elements are 0 with probability `drop`."""
        key, count = (drop, x.dtype, x.device), x.numel()
        sequence = self._sequences.get(key)
        if sequence is None or len(sequence) < count + self.PLACES:
            drawn = torch.rand(count + self.PLACES, generator=self.generator) >= drop
            sequence = self._sequences[key] = drawn.to(x.device, x.dtype)
        start = int(torch.randint(self.PLACES, (), generator=self.generator))
        mask = sequence[start : start + count]
        if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
            return mask.view(x.shape[0], *x.shape[2:], x.shape[1]).permute(0, 3, 1, 2)
        return mask.view(x.shape)


def mixed(float_values: Tensor, quantized: Tensor, drop: float, masks: Masks) -> Tensor:
    """Return `quantized` with each element replaced by its float value with probability `drop`."""
    return torch.lerp(float_values, quantized, masks.like(quantized, drop))
