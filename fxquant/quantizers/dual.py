"""Two grids for each output channel of a weight: one for a few columns with large weights, one for the others (ERQ, arXiv 2407.06794).

             inputs                          inputs
        | . : . | . . : |                | . : . : . |   | | |
    out | : . . | : . . |        =       | : . . : . | + | | |         |: a column with outliers
        | . . : | . : . |                | . . : . : |   | | |
                                           s_0, z_0     s_1, z_1       one of each an output

With the columns of the second group named by ``m``, ``Wq = s_g (N - z_g)``, ``g = m_column``; the sums of a layer are those of both groups,

    y = s_x (s_0 (N0 u) + s_1 (N1 u)) + b          N0 = N (1 - m),  N1 = N m

so that a channel has ten bytes of grids instead of five, and its codes have the bits they had. Behind a layer norm a few channels are much
larger than others, and layers that read it have columns that fit them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxquant.errors import ConfigError
from fxquant.quantizers.affine import QuantSpec, UniformQuantizer

_TAIL = 0.01  # share of a row's positive, and of its negative, weights that are flagged
_GROUP = 20  # one column is an outlier for so many outputs


class DualQuantizer(UniformQuantizer):
    """Fake quantization of the weight of a linear layer with two grids an output.

    Args:
        spec: the integers, ``axis=0``; those of both groups.
        scale, zero_point: ``[outputs, 2]``: of the plain columns, of those with outliers.
        outlier: which columns have outliers, bool ``[inputs]``.

    Raises:
        ConfigError: shapes that do not fit, or what `UniformQuantizer` does not take.
    """

    outlier: Tensor

    def __init__(self, spec: QuantSpec, scale: Tensor, zero_point: Tensor, outlier: Tensor):
        if spec.axis != 0 or scale.ndim != 2 or scale.shape[1] != 2 or scale.shape != zero_point.shape:
            raise ConfigError(
                f"axis {spec.axis}, scale {list(scale.shape)} and zero_point {list(zero_point.shape)} are no two grids an output",
                fix="Give axis=0, and both as [outputs, 2]",
            )
        if outlier.dtype != torch.bool or outlier.ndim != 1:
            raise ConfigError(f"outlier is {outlier.dtype} {list(outlier.shape)}", fix="Give one truth value for each input column")
        super().__init__(spec, scale.flatten(), zero_point.flatten())
        self.scale, self.zero_point = self.scale.view(-1, 2), self.zero_point.view(-1, 2)
        self.register_buffer("outlier", outlier.detach().clone())
        self._sizes = [len(outlier) - int(outlier.sum()), int(outlier.sum())]

    def along(self, values: Tensor, x: Tensor) -> Tensor:
        """Return numbers of each grid ``[outputs, 2]`` as those of each weight ``[outputs, inputs]``."""
        return torch.where(self.outlier, values[:, 1:], values[:, :1])

    def with_grid(self, scale: Tensor, zero_point: Tensor) -> DualQuantizer:
        """Return a quantizer of the same integers and groups with other scales and zero-points ``[outputs, 2]``."""
        return DualQuantizer(self.spec, scale, zero_point, self.outlier)

    def columns(self) -> tuple[Tensor, ...]:
        """Return the indices of the columns of either group, in their order: the plain ones, those with outliers."""
        # A sort, since how many a mask names is not known to a compiler; here it is.
        return self.outlier.to(torch.uint8).argsort(stable=True).split(self._sizes)

    def extra_repr(self) -> str:
        """Describe the grid, for ``print(model)``."""
        return f"{super().extra_repr()}, twice: {int(self.outlier.sum())} of {len(self.outlier)} columns apart"


def outlier_columns(weight: Tensor) -> Tensor:
    """Return the columns of ``weight [outputs, inputs]`` that most outputs have an outlier in, as truth values ``[inputs]``.

    An outlier is above the 99th percentile of the row's positive weights, or below the 1st of its negative ones (as in ERQ's
    published code). The most flagged ``outputs // 20`` columns are named; at least one, at most half of them.
    """
    weight = weight.detach()
    high = torch.where(weight > 0, weight, torch.nan).nanquantile(1 - _TAIL, dim=1, keepdim=True)
    low = torch.where(weight < 0, weight, torch.nan).nanquantile(_TAIL, dim=1, keepdim=True)
    flags = ((weight > high) | (weight < low)).sum(0)
    count = min(max(1, len(weight) // _GROUP), weight.shape[1] // 2)
    outlier = torch.zeros(weight.shape[1], dtype=torch.bool, device=weight.device)
    outlier[flags.argsort(descending=True, stable=True)[:count]] = True
    return outlier
