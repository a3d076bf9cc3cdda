"""The clip whose codes keep the shape of a distribution best, by Kullback-Leibler divergence (entropy calibration).

A row is counted in N non-empty fine bins j of equal width, a share P_j of its members in each. Exact zeros are left out: they are
exact at every scale, and half of a ReLU's output in one bin would drown the rest. A candidate clips magnitudes at
T = (i / steps) max|x|; its grid spans ``[max(low, -T), min(high, T)]`` and sends bin j to code c(j). Q is what the codes still
tell about P:

    mass(c)  =  sum of P_j over c(j) = c, what is clipped above and below folded into the outermost codes
    Q_j      =  eps / N                                                                        where j is clipped
             =  eps / N + (1 - eps) mass(c(j)) / (number of unclipped bins of that code)       elsewhere
    loss     =  KL(P || Q)  =  sum_j P_j log(P_j / Q_j)

Wide clips lose the shape inside the cells; narrow ones leave the clipped bins with next to no mass in Q. This is the idea of
TensorRT's calibration (8 bits, positive data, 128 levels) for two sides and any number of levels. There, the clipped mass is
folded into P instead; then a clip around a handful of bins has a loss of nearly 0, and at 2 bits everything collapses. Here, a
clipped share t costs about ``t log(1 / eps)`` nats.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxquant.quantizers.affine import QuantSpec
from fxquant.quantizers.histogram import Histogram
from fxquant.quantizers.search import grid_of_range

_EPS = 1e-3
_MEMBERS_PER_BIN = 4  # fewer would make every code look like the few members it has


def kl_grid(h: Histogram, spec: QuantSpec, steps: int) -> tuple[Tensor, Tensor]:
    """Return the scale and the zero-point ``[C]`` with the smallest KL loss; of equal losses the widest clip.

    Args:
        h: rows whose ``[low, high]`` contains 0, of magnitude about 1.
        spec: the integer grid.
        steps: the number of clips tried.
    """
    members = int(h.counts.sum(1).max())
    bins = min(max(512, 16 * spec.levels), max(4 * spec.levels, members // _MEMBERS_PER_BIN))
    fine = h.coarsen(bins)
    best_loss = torch.full_like(h.low, float("inf"))
    scale, zero_point = grid_of_range(h.low, h.high, spec)
    largest = torch.maximum(-h.low, h.high)
    for i in range(steps, 0, -1):
        clip = largest * (i / steps)
        grid = grid_of_range(h.low.maximum(-clip), h.high.minimum(clip), spec)
        loss = _kl_loss(fine, *grid, spec)
        better = loss < best_loss
        best_loss = torch.where(better, loss, best_loss)
        scale, zero_point = (torch.where(better, new, old) for new, old in zip(grid, (scale, zero_point), strict=True))
    return scale, zero_point


def _kl_loss(h: Histogram, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    p = torch.where(h.values == 0, 0, h.counts)
    p = p / p.sum(1, True).clamp_min(1)
    code = (h.values / scale[:, None]).round() + zero_point[:, None]
    expanded = ((code >= spec.qmin) & (code <= spec.qmax) & (p > 0)).to(p)
    cell = (code.clamp_(spec.qmin, spec.qmax) - spec.qmin).long()
    empty = p.new_zeros(len(p), spec.levels)
    mass, number = empty.scatter_add(1, cell, p), empty.scatter_add(1, cell, expanded)
    smooth = _EPS / (p > 0).sum(1, True).clamp_min(1)
    q = smooth + (1 - _EPS) * expanded * (mass / number.clamp_min(1)).gather(1, cell)
    return (torch.xlogy(p, p) - torch.xlogy(p, q)).sum(1)
