"""Exact principal components of a cloud of logits.

    X = x - mean                 [N, C]
    X^T X = V L V^T              [C, C], or, when N < C,
    X X^T = U L U^T              [N, N] with V = X^T U / sqrt(L): the same components from the smaller matrix
    features = (x - mean) V

Everything is float64: an eigendecomposition of a 1,000 x 1,000 matrix takes half a second, has no random start and needs no
iteration count, so the features of one calibration set are one fixed thing.
"""

from __future__ import annotations

import torch
from torch import Tensor


def fit_pca(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Return the mean and the leading principal components of the rows of ``x``.

    The sign of a component is chosen so that its entry of largest magnitude is positive.

    Args:
        x: points ``[N, C]``, any floating dtype.
        dim: components wanted; clipped to the numerical rank of the centered points, which is at most ``min(N - 1, C)``.

    Returns:
        ``mean [C]`` and ``components [C, dim]`` with orthonormal columns, largest variance first, both float64.
    """
    x = x.double()
    n, c = x.shape
    mean = x.mean(0)
    centered = x - mean
    small = n < c
    values, vectors = torch.linalg.eigh(centered @ centered.T if small else centered.T @ centered)
    values, vectors = values.flip(0), vectors.flip(1)
    # Beyond the rank only rounding noise is left; its directions mean nothing and, in the N x N form, divide by zero.
    rank = min(n - 1, c, int((values > values[0] * max(n, c) * torch.finfo(torch.float64).eps).sum()))
    dim = min(dim, rank)
    values, vectors = values[:dim], vectors[:, :dim]
    components = centered.T @ vectors / values.sqrt() if small else vectors
    if dim == 0:
        return mean, components
    largest = components.gather(0, components.abs().argmax(0, keepdim=True))
    return mean, components * largest.sign()
