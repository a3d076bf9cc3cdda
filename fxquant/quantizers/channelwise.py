"""One grid for a tensor that is as good as one a channel, when the channels may be moved and scaled for free (RepQ-ViT, arXiv 2212.08254).

    x_c      |---.-.-...-.---|                                   x'_c = x_c / r_c - d_c       |---.-.-...-.---|
    x_c+1                          |-.-..-.-|          =>        x'_c+1                       |-. - .. - . - -|

Each channel c has the scale s_c and the zero-point z_c that suit it; with the means s~ and z~ of both,

    r_c = s_c / s~,      d_c = (z~ - z_c) s~          (equation 6 and 7 there: -z_c s_c / r_c + z~ s~)

so that ``x' / s~ + z~ = x / s_c + z_c``: the codes are the same, hence ``Q~(x') = Q_c(x) / r_c - d_c`` with one grid for all.
Since d may be any number, z_c need not be a code: a channel that is far from 0 has a grid around itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxquant.quantizers.affine import QuantSpec
from fxquant.quantizers.histogram import Histogram
from fxquant.quantizers.ranges import estimate_range


def channel_grids(rows: Tensor, bits: int, method: str = "lp", *, p: float = 2.4, percentile: float = 0.9999) -> tuple[Tensor, Tensor]:
    """Return scale and zero-point, both real numbers ``[C]``, of the channels of ``rows`` ``[C, M]``.

    A channel is estimated around the middle of its range. One that is constant gets the mean scale of the others, which costs nothing.

    Raises:
        CalibrationError: a value is not finite, or there are none. ConfigError: as `estimate_range`.
    """
    low, high = rows.aminmax(dim=1)
    middle = (low + high) / 2
    h = Histogram.of(rows - middle[:, None], axis=0)
    scale, zero_point = estimate_range(h, QuantSpec(bits, axis=0), method, p=p, percentile=percentile)
    varied = high > low
    scale = torch.where(varied, scale, scale[varied].mean() if bool(varied.any()) else 1.0)
    return scale, zero_point - middle / scale


def one_grid(scale: Tensor, zero_point: Tensor, qmax: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return r ``[C]`` and d ``[C]`` of the module's formulas, and the scale s~ and zero-point z~ (a code, 0 to `qmax`) of the one grid."""
    common = scale.mean()
    zero = zero_point.mean().round().clamp(0, qmax)
    return scale / common, (zero - zero_point) * common, common, zero
