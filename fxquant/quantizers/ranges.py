"""From data to a scale and a zero-point.

Every estimator picks a range ``[low, high]`` that contains 0, and the range gives the grid (n = 2^bits - 1 steps):

    asymmetric   s = (high - low) / n,                              z = qmin + clip(round(-low / s), 0, n)
    symmetric    s = max(-low / 2^(bits-1), high / (2^(bits-1)-1)), z = 0           (unsigned: s = high / n)

    minmax       everything seen: nothing is clipped, the steps are coarse where there are outliers
    percentile   the quantiles 1 - q and q
    lp           the range whose grid has the smallest mean |x - Q(x)|^p; p = 2.4 is PD-Quant's choice, p = 2 that of MSE;
                 of an activation, if relative, that of (|x - Q(x)| / r)^p, r the root mean square of the image (see ImageObserver)
    kl           the clip whose codes keep the shape of the distribution best (see entropy.py)

Rows are searched in units of a power of two close to their largest magnitude: ``range(2 x) == 2 range(x)`` bit for bit, and tiny
weights (channels that a batch norm switched off) are quantized as finely as others. A row of zeros gets scale 1 and code qmin.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fxquant.errors import CalibrationError, ConfigError, ModelError
from fxquant.quantizers.affine import QuantSpec, UniformQuantizer
from fxquant.quantizers.entropy import kl_grid
from fxquant.quantizers.histogram import AxisObserver, Histogram, Observer, as_rows
from fxquant.quantizers.search import grid_of_range, lp_grid

# A step below this would make x / scale overflow float32 for ordinary x. Rows this small become zeros.
MIN_SCALE = 2.0**-100
_BLOCK = 2**22  # elements of a weight that are looked at together


@dataclass(frozen=True)
class Options:
    """The constants of the estimators; see :func:`estimate_range`."""

    p: float = 2.4
    percentile: float = 0.9999
    steps: int = 100

    def __post_init__(self) -> None:
        if not self.p > 0:
            raise ConfigError(f"p={self.p!r} is no exponent", fix="Use a positive number, 2.4 for example")
        if not 0.5 < self.percentile <= 1:
            raise ConfigError(f"percentile={self.percentile!r} is no upper quantile", fix="Use a number above 0.5 and at most 1")
        if not self.steps >= 1:
            raise ConfigError(f"steps={self.steps!r} leaves nothing to try", fix="Use a positive integer, 100 for example")


def _minmax(h: Histogram, spec: QuantSpec, options: Options) -> tuple[Tensor, Tensor]:
    return grid_of_range(h.low, h.high, spec)


def _percentile(h: Histogram, spec: QuantSpec, options: Options) -> tuple[Tensor, Tensor]:
    low, high = (_quantile(h, q) for q in (1 - options.percentile, options.percentile))
    if options.percentile == 1:  # a bin holds the mean of its members; the extremes are known better
        low, high = h.low, h.high
    return grid_of_range(low, high, spec)


def _quantile(h: Histogram, q: float) -> Tensor:
    """The q-quantile of each row, each value repeated as often as its count, interpolated linearly between neighbors."""
    order = h.values.argsort(1)
    values, last = h.values.gather(1, order), h.counts.double().gather(1, order).cumsum(1)
    position = q * (last[:, -1:] - 1)
    below = position.floor()
    # Members 0 .. last - 1 of the sorted row; the first bin whose cumulative count exceeds the position holds it.
    left, right = (
        values.gather(1, torch.searchsorted(last, at, right=True).clamp(max=values.shape[1] - 1))
        for at in (below, (below + 1).minimum(last[:, -1:] - 1))
    )
    return (left + (right - left) * (position - below)).squeeze(1)


def _lp(h: Histogram, spec: QuantSpec, options: Options) -> tuple[Tensor, Tensor]:
    return lp_grid(h, spec, options.p, options.steps)


def _kl(h: Histogram, spec: QuantSpec, options: Options) -> tuple[Tensor, Tensor]:
    return kl_grid(h, spec, options.steps)


METHODS: dict[str, Callable[[Histogram, QuantSpec, Options], tuple[Tensor, Tensor]]] = {
    "minmax": _minmax,
    "percentile": _percentile,
    "lp": _lp,
    "kl": _kl,
}


def estimate_range(
    h: Histogram,
    spec: QuantSpec,
    method: str = "lp",
    *,
    p: float = 2.4,
    percentile: float = 0.9999,
    steps: int = 100,
    where: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the scale and the zero-point of a histogram, in its dtype.

    Args:
        h: one row per channel where ``spec.axis`` is set, else one row.
        spec: the integer grid.
        method: a key of :data:`METHODS`; the module's docstring says what each does.
        p: the exponent of "lp".
        percentile: the upper quantile of "percentile"; the lower one is ``1 - percentile``.
        steps: how many widths "lp" and "kl" try: ``1/steps, 2/steps, .. 1`` of the full range.
        where: the layer, put in front of error messages.

    Returns:
        scale and zero_point, ``[C]`` where ``spec.axis`` is set, else ``[]``.

    Raises:
        ConfigError: an unknown method, an option out of its range, or rows that do not fit ``spec.axis``.
        CalibrationError: a symmetric unsigned grid for data with negative values.
    """
    _check(h, spec, method, where)
    unit = _unit(h)
    scale, zero_point = METHODS[method](_in_units(h, unit), spec, Options(p, percentile, steps))
    return _finish(h, spec, unit, scale, zero_point)


def _check(h: Histogram, spec: QuantSpec, method: str, where: str | None) -> None:
    if method not in METHODS:
        raise ConfigError(f"method={method!r} is not a range estimator", where=where, fix=f"Use one of {', '.join(METHODS)}")
    if spec.axis is None and len(h.low) != 1:
        raise ConfigError(f"{len(h.low)} rows for a grid with one scale", where=where, fix="Set the axis of the QuantSpec, or use one row")
    if spec.symmetric and not spec.signed and bool((h.low < 0).any()):
        raise CalibrationError(
            "the data has negative values, which a symmetric unsigned grid has no codes for",
            where=where,
            fix="Use signed=True, or symmetric=False",
        )


def _unit(h: Histogram) -> Tensor:
    """The power of two just above the largest magnitude of each row (1 for rows of zeros), ``[C]`` in float64."""
    largest = torch.maximum(h.low.abs(), h.high.abs()).double()
    return torch.where(largest > 0, largest / torch.frexp(largest)[0], 1)  # x = mantissa * 2^e: the quotient is exact


def _in_units(h: Histogram, unit: Tensor) -> Histogram:
    values = (h.values.double() / unit[:, None]).to(h.values.dtype)
    low, high = ((x.double() / unit).to(h.values.dtype) for x in (h.low, h.high))
    return Histogram(values, h.counts, low.clamp(max=0), high.clamp(min=0))


def _finish(h: Histogram, spec: QuantSpec, unit: Tensor, scale: Tensor, zero_point: Tensor) -> tuple[Tensor, Tensor]:
    zeros = (h.low == 0) & (h.high == 0)
    scale = torch.where(zeros, 1.0, (scale.double() * unit).clamp(min=MIN_SCALE)).to(h.values.dtype)
    zero_point = torch.where(zeros, 0 if spec.symmetric else spec.qmin, zero_point).to(scale)
    return (scale[0], zero_point[0]) if spec.axis is None else (scale, zero_point)


def weight_quantizer(
    weight: Tensor,
    spec: QuantSpec,
    method: str = "lp",
    *,
    where: str | None = None,
    p: float = 2.4,
    percentile: float = 0.9999,
    steps: int = 100,
) -> UniformQuantizer:
    """Return the quantizer of a weight, its range estimated on the weight itself.

    Args:
        weight: any shape; ``spec.axis`` is its output channel axis (0 for conv and linear, 1 for transposed conv).
        spec: the integer grid.
        method: see :func:`estimate_range`, as for p, percentile and steps.
        where: the layer, put in front of error messages.

    Raises:
        ModelError: the weight holds NaN or Inf.
        ConfigError: as :func:`estimate_range`; or the axis does not exist.
    """
    if not bool(weight.isfinite().all()):
        raise ModelError("the weight holds NaN or Inf", where=where, fix="Re-load the checkpoint, or skip the layer")
    rows = as_rows(weight.detach(), spec.axis)
    found = []
    for block in rows.split(max(1, _BLOCK // max(1, rows.shape[1]))):  # rows do not know of each other, and take several copies each
        h = Histogram.of(block, 0, max_bins=weight.numel())
        found.append(estimate_range(h, spec, method, p=p, percentile=percentile, steps=steps, where=where))
    scale, zero_point = (torch.cat(parts) if spec.axis is not None else parts[0] for parts in zip(*found, strict=True))
    return UniformQuantizer(spec, scale, zero_point)


def activation_quantizer(
    observer: Observer,
    spec: QuantSpec,
    method: str = "lp",
    *,
    p: float = 2.4,
    percentile: float = 0.9999,
    steps: int = 100,
    relative: bool = False,
) -> UniformQuantizer:
    """Return the quantizer of an activation, its range estimated on all that the observer saw.

    Args:
        observer: what looked at the activation.
        spec: the integer grid, with an axis where the observer has one.
        method: see :func:`estimate_range`, as for p, percentile and steps.
        relative: errors of "lp" are those relative to the root mean square of the image's activation.

    Raises:
        CalibrationError: the observer saw nothing, or negative values that the grid has no codes for.
        ConfigError: as :func:`estimate_range`; or ``spec.axis`` is not the axis that the observer kept apart.
    """
    axis = observer.axis if isinstance(observer, AxisObserver) else None
    if spec.axis != axis:
        raise ConfigError(f"axis={spec.axis} for an activation observed with axis={axis}", where=observer.name, fix=f"Use axis={axis}")
    h = observer.histogram(p if relative and method == "lp" else 0.0)
    return UniformQuantizer(spec, *estimate_range(h, spec, method, p=p, percentile=percentile, steps=steps, where=observer.name))
