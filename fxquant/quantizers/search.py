"""The range whose grid has the smallest mean |x - Q(x)|^p: the initialization of PD-Quant (p = 2.4), and of LAPQ.

With n = 2^bits - 1 and rows whose range ``[low, high]`` has been widened to contain 0, the candidates are

    asymmetric   s = (i / steps) (high - low) / n,   z = qmin + k      for i = 1..steps and k = 0..n
    symmetric    s = (i / steps) s_minmax,           z = 0             for i = 1..steps

in this order, and of equal losses the first wins. A one-sided row needs no rule of its own: at any s its best k is 0 (or n where
all is negative), since any other wastes a code where no data is; that leaves the one-dimensional search over the threshold.

Above 16 levels the plane (i, k) is too large. There k runs over a window, nine values from "no clipping below" to "no clipping
above": outside of it a code is wasted as above, and at i = steps it closes around the zero-point of min-max. The windows of the
best few i are then sampled eight times as densely around their best k. On rows of normal, Laplace, exponential, GELU and SiLU
data at 5 to 8 bits this found the optimum of the whole plane.

Where the extremes lie 32 times as far out as the values' root mean square, few of these widths are of any use: the grid is looked for
within 16 times that, too, and the better one is taken.

Long rows are searched in coarse bins, and the best few candidates are then compared on the rows themselves. At 8 bits, where a
bin can be as wide as a quarter of a step, that costs up to two percent of loss on long, heavy-tailed rows; at 2 bits, less than
a thousandth.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxquant.quantizers.affine import QuantSpec
from fxquant.quantizers.histogram import Histogram

_FULL_GRID_LEVELS = 16
_BINS = {False: 256, True: 1024}  # for a search over few levels, and over many
_WINDOW = 9
_FAR = 16  # root mean squares: twice as far out, values are few enough to look for the grid without them, too
_ZOOMS = 3
_FINALISTS = 8
_CPU_BLOCK = 2**18  # values times candidates evaluated at a time: few enough for the temporaries to stay in the cache,
_GPU_BLOCK = 2**24  # and enough to keep a GPU busy; 64 MiB in float32


def grid_of_range(low: Tensor, high: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Return the scale and the zero-point, of any shape, that make the grid span ``[low, high]`` and 0.

    Nothing in the range is clipped by more than half a step. A range that is only 0 gets scale 1.
    """
    low, high = low.clamp(max=0), high.clamp(min=0)
    if spec.symmetric:
        scale = torch.maximum(low / spec.qmin, high / spec.qmax) if spec.signed else high / spec.qmax
        return torch.where(scale > 0, scale, 1), torch.zeros_like(scale)
    scale = (high - low) / (spec.levels - 1)
    scale = torch.where(scale > 0, scale, 1)
    return scale, (-low / scale).round().clamp(0, spec.levels - 1) + spec.qmin


def lp_losses(h: Histogram, scale: Tensor, zero_point: Tensor, spec: QuantSpec, p: float) -> Tensor:
    """Return ``sum |x - Q(x)|^p`` of each row under each of its candidates; scale, zero_point and the result are ``[C, K]``."""
    length, losses = h.values.shape[1], torch.empty_like(scale)
    budget = _CPU_BLOCK if scale.device.type == "cpu" else _GPU_BLOCK
    columns = max(1, budget // length)
    rows = max(1, budget // (length * min(columns, scale.shape[1])))
    for c in range(0, len(scale), rows):
        values, counts = h.values[c : c + rows, None], h.counts[c : c + rows, :, None]
        for k in range(0, scale.shape[1], columns):
            block = slice(c, c + rows), slice(k, k + columns)
            steps, zeros = scale[block][..., None], zero_point[block][..., None]
            x = values / steps
            code = x.round().clamp_(spec.qmin - zeros, spec.qmax - zeros)
            losses[block] = (x.sub_(code).abs_().pow_(p) @ counts * steps**p).squeeze(-1)
    return losses


def best_of(h: Histogram, scale: Tensor, zero_point: Tensor, spec: QuantSpec, p: float) -> tuple[Tensor, Tensor]:
    """Return the candidate ``[C]`` of ``[C, K]`` with the smallest loss on h, the first of equals."""
    best = lp_losses(h, scale, zero_point, spec, p).argmin(1, keepdim=True)
    return scale.gather(1, best).squeeze(1), zero_point.gather(1, best).squeeze(1)


def lp_grid(h: Histogram, spec: QuantSpec, p: float, steps: int) -> tuple[Tensor, Tensor]:
    """Return the scale and the zero-point ``[C]`` with the smallest L_p loss; never a larger one than that of min-max.

    Args:
        h: rows whose ``[low, high]`` contains 0, of magnitude about 1.
        spec: the integer grid.
        p: the exponent.
        steps: the number of widths tried.
    """
    scale, zero_point = _searched(h, h.low, h.high, spec, p, steps)
    low, high = h.low, h.high
    for _ in range(_ZOOMS):
        reach = _FAR * _root_mean_square(h, low, high)
        far = (torch.maximum(-low, high) > 2 * reach).nonzero().flatten()
        if not len(far):
            break
        low, high = low.maximum(-reach), high.minimum(reach)
        rows = Histogram(h.values[far], h.counts[far], h.low[far], h.high[far])
        near = _searched(rows, low[far], high[far], spec, p, steps)
        both = torch.stack([scale[far], near[0]], 1), torch.stack([zero_point[far], near[1]], 1)
        scale[far], zero_point[far] = best_of(rows, *both, spec, p)
    return scale, zero_point


def _root_mean_square(h: Histogram, low: Tensor, high: Tensor) -> Tensor:
    """Return that of the values of each row ``[C]`` within ``[low, high]``, zeros left out."""
    inside = (h.values >= low[:, None]) & (h.values <= high[:, None]) & (h.values != 0)
    counts = h.counts.double() * inside
    mean = (counts * h.values.double().square()).sum(1) / counts.sum(1).clamp_min(torch.finfo(torch.float64).tiny)
    return mean.sqrt().to(h.values.dtype)


def _searched(h: Histogram, low: Tensor, high: Tensor, spec: QuantSpec, p: float, steps: int) -> tuple[Tensor, Tensor]:
    """Return the best grid on h of those within ``[low, high]``, which need not hold all values."""
    large = spec.levels > _FULL_GRID_LEVELS
    coarse = Histogram(h.values, h.counts, low, high).coarsen(_BINS[large])
    if large and not spec.symmetric:
        candidates = _window_candidates(coarse, spec, p, steps)
    else:
        candidates = _all_candidates(coarse, spec, steps)
    losses = lp_losses(coarse, *candidates, spec, p)
    finalists = losses.topk(min(_FINALISTS, losses.shape[1]), 1, largest=False).indices.sort(1).values
    minmax = grid_of_range(low, high, spec)
    scale, zero_point = (torch.cat([x.gather(1, finalists), y[:, None]], 1) for x, y in zip(candidates, minmax, strict=True))
    return best_of(h, scale, zero_point, spec, p)


def _all_candidates(h: Histogram, spec: QuantSpec, steps: int) -> tuple[Tensor, Tensor]:
    scale = grid_of_range(h.low, h.high, spec)[0][:, None] * _fractions(h, steps)
    if spec.symmetric:
        return scale, torch.zeros_like(scale)
    codes = torch.arange(spec.qmin, spec.qmax + 1).to(h.values)
    return scale.repeat_interleave(spec.levels, 1), codes.repeat(steps).expand(len(scale), -1)


def _window_candidates(h: Histogram, spec: QuantSpec, p: float, steps: int) -> tuple[Tensor, Tensor]:
    """Every i with nine k over its window; then, for the i of the best few, k eight times as densely around them."""
    scale = grid_of_range(h.low, h.high, spec)[0][:, None] * _fractions(h, steps)
    share = torch.linspace(0, 1, _WINDOW).to(h.values).expand(len(scale), -1)
    k = _window(h, spec, scale, share[:, None])
    losses = lp_losses(h, scale.repeat_interleave(_WINDOW, 1), k.flatten(1), spec, p)
    best = losses.topk(min(_FINALISTS, losses.shape[1]), 1, largest=False).indices.sort(1).values
    scale = scale.gather(1, best // _WINDOW)
    around = torch.linspace(-1, 1, 2 * _WINDOW - 1).to(h.values) / (_WINDOW - 1)
    share = (share.gather(1, best % _WINDOW)[..., None] + around).clamp(0, 1)
    return scale.repeat_interleave(len(around), 1), _window(h, spec, scale, share).flatten(1)


def _window(h: Histogram, spec: QuantSpec, scale: Tensor, share: Tensor) -> Tensor:
    """The zero-point ``[C, I, T]`` at shares ``[C, I or 1, T]`` of the way through the window of each scale ``[C, I]``."""
    n = spec.levels - 1
    nothing_below = (-h.low[:, None] / scale).round()
    nothing_above = n - (h.high[:, None] / scale).round()
    first, last = (ends(nothing_below, nothing_above).clamp(0, n)[..., None] for ends in (torch.minimum, torch.maximum))
    return (first + (last - first) * share).round() + spec.qmin


def _fractions(h: Histogram, steps: int) -> Tensor:
    return torch.arange(1, steps + 1).to(h.values) / steps
