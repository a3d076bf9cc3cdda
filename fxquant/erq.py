"""Error reduction in closed form: fit a layer to its quantized inputs, then round it column block by column block (ERQ, arXiv 2407.06794).

A layer computes ``y = W x + b``. With quantized inputs ``X = [Q(x), 1]`` ([N, d + 1], a row a token), ``W := [W, b]`` and float outputs Y,
all that is needed of the N tokens are sums over them, which do not grow with N:

    A = X^T X    [d + 1, d + 1]            B = X^T Y    [d + 1, outputs]            c = sum Y^2    [outputs]

    |Y - X W^T|^2 = c - 2 W B + W A W^T    for each output

Aqer    the error of the inputs: ridge regression around the float weights (equation 6 there)

            W* = W + D,      D^T = (A + lambda I)^-1 (B - A W^T)

Wqer    the error of the rounding: half of the columns left are rounded, the others make up for it (equations 11 and 20)

            [ 1: rounded by e1 | 2: still real | b ]         e2 = -(A22 + lambda I)^-1 A21 e1

        until only b is left. Which way a weight of group 1 is rounded goes by what the others cannot make up for,

            P(e1) = e1 S e1^T,      S = A11 - A12 (A22 + lambda I)^-1 A21

        of which a flip of one code by one step s changes ``2 s (e1 S)_i + s^2 S_ii``: the best flip of each row is taken while it lowers P.
        (The paper takes A11 / N for S, and the entry with the largest gradient.)

        At the end b, the scale of each row (or both of them, `fxquant.quantizers.dual`) and single codes are optimal given all others.

lambda is a share of the mean square of a column of X, for each token: ``lambda = share * tr(A) / (d + 1)``, tr(A) being a sum over tokens.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.quantizers.affine import UniformQuantizer
from fxquant.quantizers.dual import DualQuantizer

SHARES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""The ridges that a search tries."""

_CHUNK = 2**22  # numbers of X that are held in float64 at a time
_ROUNDS = 4  # of rounding, scales and bias at the end
_DECREASE = 1e-9  # what lowers an error by a smaller share is rounding noise


@dataclass
class Gram:
    """The sums A, B and c of the module, in float64, and how many tokens are in them."""

    a: Tensor
    b: Tensor
    c: Tensor
    count: int = 0

    @classmethod
    def empty(cls, inputs: int, outputs: int, device: torch.device | str = "cpu") -> Gram:
        """Return the sums over no token, for a layer with a bias behind its `inputs` columns."""
        zeros = functools.partial(torch.zeros, dtype=torch.float64, device=device)
        return cls(zeros(inputs + 1, inputs + 1), zeros(inputs + 1, outputs), zeros(outputs))

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add tokens: quantized inputs ``[n, inputs]`` and float outputs ``[n, outputs]``."""
        rows = max(1, _CHUNK // len(self.a))
        for some, wanted in zip(x.split(rows), y.split(rows), strict=True):
            some = torch.cat([some.double(), some.new_ones(len(some), 1, dtype=torch.float64)], 1)
            wanted = wanted.double()
            self.a.addmm_(some.T, some)
            self.b.addmm_(some.T, wanted)
            self.c.add_(wanted.square().sum(0))
            self.count += len(some)

    def __add__(self, other: Gram) -> Gram:
        return Gram(self.a + other.a, self.b + other.b, self.c + other.c, self.count + other.count)

    def error(self, weight: Tensor) -> Tensor:
        """Return the squared error of each output, summed over the tokens, under the weights and biases ``[outputs, inputs + 1]``."""
        return (self.c - 2 * (weight * self.b.T).sum(1) + (weight @ self.a * weight).sum(1)).clamp_min(0)


def gram_bytes(inputs: int, outputs: int) -> int:
    """Return about how many bytes the closed forms hold at once for a layer: sums of two folds and of both, and factors of them."""
    return 8 * (inputs + 1) * (5 * (inputs + 1) + 8 * outputs)


def ridge(gram: Gram, weight: Tensor, share: float) -> Tensor:
    """Aqer: return ``weight [outputs, inputs + 1]`` moved to the ridge optimum around itself; never a larger error than before."""
    factor = _factor(gram.a, share * _mean_square(gram.a))
    return weight + torch.cholesky_solve(gram.b - gram.a @ weight.T, factor).T


def sums_of_halves(
    layer: nn.Module, axis: int, read: Sequence[Tensor], wanted: Sequence[Tensor], sizes: Sequence[int]
) -> tuple[Gram, Gram]:
    """Return the sums over every second image, and over the others; of a single image: over its tokens.

    Args:
        layer: a linear layer or 2-D convolution without groups, whose weight gives the sizes.
        read: what goes into it, batch by batch, ``[..., inputs]`` or ``[N, C, H, W]``.
        wanted: what should come out, of the shapes that the layer gives.
        axis: along which the images of a batch lie, each with as many rows as the next (the windows of an image, say).
        sizes: images in each batch.
    """
    assert isinstance(layer.weight, Tensor)
    inputs, outputs = layer.weight[0].numel(), len(layer.weight)
    folds = Gram.empty(inputs, outputs, layer.weight.device), Gram.empty(inputs, outputs, layer.weight.device)
    first, single = 0, sum(sizes) == 1
    for x, y, images in zip(read, wanted, sizes, strict=True):
        x, y = x.movedim(axis, 0), y.movedim(axis, 0)
        owner = first + torch.arange(len(x), device=x.device) * images // len(x)
        for start, fold in enumerate(folds):
            rows = slice(None) if single else owner % 2 == start
            for some, its in _tokens(layer, x[rows], y[rows]):
                fold.add(*((some[start::2], its[start::2]) if single else (some, its)))
        first += images
    return folds


def _tokens(layer: nn.Module, x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield what goes in and comes out as tokens ``[n, inputs]`` and ``[n, outputs]``."""
    if isinstance(layer, nn.Linear):
        yield x.flatten(0, -2), y.flatten(0, -2)
        return
    for image, its in zip(x, y, strict=True):
        columns = F.unfold(image[None], layer.kernel_size, layer.dilation, layer.padding, layer.stride)  # type: ignore[arg-type]
        yield columns[0].T, its.flatten(1).T


def search_ridge(folds: Sequence[Gram], weight: Tensor, shares: Sequence[float] = SHARES) -> float | None:
    """Return the share whose ridge optimum on each fold has the smallest error on the others, None when that is larger than without.

    Args:
        folds: sums over different calibration images, at least two.
        weight: what the ridge holds to, ``[outputs, inputs + 1]``.
        shares: what is tried.
    """
    noise = _DECREASE * sum(float(fold.c.sum()) for fold in folds)
    best, found = sum(float(fold.error(weight).sum()) for fold in folds) - noise, None
    rest = [functools.reduce(operator.add, [fold for fold in folds if fold is not held]) for held in folds]
    for share in shares:
        error = sum(float(held.error(ridge(others, weight, share)).sum()) for held, others in zip(folds, rest, strict=True))
        if error < best:
            best, found = error, share
    return found


def round_compensated(
    gram: Gram, weight: Tensor, quantizer: UniformQuantizer, share: float, flips: int = 100
) -> tuple[UniformQuantizer, Tensor, Tensor]:
    """Wqer: round the weights ``[outputs, inputs + 1]`` (biases last) to the grids of `quantizer`, one or two an output.

    Args:
        gram: the sums over the calibration tokens.
        weight: the real weights and biases to come close to.
        quantizer: scales and zero-points to start with.
        share: the ridge.
        flips: most flips a row in each refinement.

    Returns:
        the quantizer with its final scales, codes ``[outputs, inputs]`` and biases ``[outputs]``, all in float64.
    """
    ladder, shape = Ladder(quantizer.spec.qmin, quantizer.spec.qmax), weight[:, :-1].shape
    scale, zero = (quantizer.along(part.double(), weight).expand(shape) for part in (quantizer.scale, quantizer.zero_point))
    damping = share * _mean_square(gram.a)
    codes, real, done = torch.empty_like(weight[:, :-1]), weight.clone(), 0
    while done < codes.shape[1]:
        cut = done + (weight.shape[1] - done) // 2
        cross = gram.a[cut:, done:cut]
        made_up = torch.cholesky_solve(cross, _factor(gram.a[cut:, cut:], damping))  # (A22 + lambda I)^-1 A21
        left = gram.a[done:cut, done:cut] - cross.T @ made_up
        block, grid = real[:, done:cut], (scale[:, done:cut], zero[:, done:cut])
        codes[:, done:cut] = refine(ladder.nearest(block, *grid), block, *grid, left, ladder, flips)
        real[:, cut:] -= (ladder.values(codes[:, done:cut], *grid) - block) @ made_up.T
        done = cut
    groups = quantizer.columns() if isinstance(quantizer, DualQuantizer) else [slice(None)]
    codes, scale, bias = _polish(gram, weight, codes, scale, zero, ladder, flips, groups)
    scales = torch.stack([scale[:, group][:, 0] for group in groups], 1).view_as(quantizer.scale)
    return quantizer.with_grid(scales.to(quantizer.scale), quantizer.zero_point), codes, bias


@dataclass(frozen=True)
class Ladder:
    """The codes that a weight may have."""

    qmin: int
    qmax: int

    def nearest(self, weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Return the nearest codes of ``weight [outputs, columns]``; scale and zero broadcast to it."""
        return ((weight / scale).round() + zero).clamp(self.qmin, self.qmax)

    @staticmethod
    def values(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Return the weights that codes stand for."""
        return (codes - zero) * scale


def refine(codes: Tensor, weight: Tensor, scale: Tensor, zero: Tensor, left: Tensor, ladder: Ladder, flips: int) -> Tensor:
    """Return `codes` after the best flips of single codes by one step, row by row; ``P = e S e^T`` falls with each of them.

    Args:
        codes, weight: ``[outputs, columns]``; e is the difference of what the codes stand for and the weight.
        scale, zero: the grid of each weight, ``[outputs, columns]``.
        left: the matrix S ``[columns, columns]``.
        ladder: what codes there are.
        flips: at most so many a row.
    """
    codes = codes.clone()
    error = ladder.values(codes, scale, zero) - weight
    slope, curve = 2 * error @ left, left.diagonal()
    enough = _DECREASE * (error @ left * error).sum(1).abs()
    rows = torch.arange(len(codes), device=codes.device)
    for _ in range(flips):
        step = -slope[rows].sign()
        there = codes[rows] + step
        change = scale[rows] * (step * slope[rows] + scale[rows] * curve)
        best, place = change.masked_fill((there < ladder.qmin) | (there > ladder.qmax) | (step == 0), torch.inf).min(1)
        going = best < -enough[rows]
        if not bool(going.any()):
            break
        rows, place, step = rows[going], place[going], step[going]
        step = step.gather(1, place[:, None]).squeeze(1)
        codes[rows, place] += step
        slope[rows] += 2 * (step * scale[rows, place])[:, None] * left[place]
    return codes


def _polish(
    gram: Gram, weight: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, ladder: Ladder, flips: int, groups: Sequence[Tensor | slice]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes, scales and biases of which each is optimal given the others (of the codes: no single flip helps).

    With the bias made up for exactly, ``S = A_dd - a a^T / N``; the scale of a row with the integers ``u = codes - zero`` is a regression
    on one variable, ``s = (u S w) / (u S u)``. Of several groups of columns one after the other, with w less what the others stand for.
    """
    sums, count = gram.a[:-1, -1], gram.a[-1, -1]
    left = gram.a[:-1, :-1] - torch.outer(sums, sums) / count
    real = weight[:, :-1]
    for _ in range(_ROUNDS):
        before = codes
        codes = refine(codes, real, scale, zero, left, ladder, flips)
        for group in groups:
            integers, old = (codes - zero)[:, group], scale[:, group]
            rest = real - ladder.values(codes, scale, zero)
            rest[:, group] = real[:, group]
            projected = integers @ left[group]
            fitted = ((projected * rest).sum(1) / (projected[:, group] * integers).sum(1))[:, None]
            scale = scale.clone()
            scale[:, group] = torch.where((fitted > 0.2 * old) & (fitted < 5 * old), fitted, old)
        if torch.equal(codes, before):
            break
    bias = weight[:, -1] - (ladder.values(codes, scale, zero) - real) @ sums / count
    return codes, scale, bias


def _mean_square(a: Tensor) -> float:
    return float(a.diagonal().mean())


def _factor(a: Tensor, damping: float) -> Tensor:
    """Return the Cholesky factor of ``a + damping I``; the damping grows tenfold while rounding noise keeps that from being definite."""
    damping = max(damping, 1e-12 * _mean_square(a), torch.finfo(a.dtype).tiny)
    while True:
        factor, failed = torch.linalg.cholesky_ex(a + damping * torch.eye(len(a), dtype=a.dtype, device=a.device))
        if not int(failed):
            return factor
        damping *= 10
