"""Weighted values in place of a tensor: what the range estimators look at.

A weight is at hand as a whole: its rows are used as they are when short, and binned when long. An activation comes in batches and
is seen once. :class:`HistogramObserver` counts it in bins of a power-of-two width around zero (:class:`ImageObserver` has one for
images of each size),

    bin -2      bin -1      bin 0       bin 1             width = 2^e
    [-2w, -w)   [-w, 0)     [0, w)      [w, 2w)           value x -> bin floor(x / w)

and when a batch does not fit, e grows by k and bins ``j`` move to ``floor(j / 2^k)``: old bins nest in new ones exactly, so the
counts do not depend on the order of the batches. In-bin offsets are summed as integers: no rounding error, no order of summation,
the same result on every device. Exact zeros (half of what a ReLU gives) have their own count, the extremes are kept exactly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fxquant.errors import CalibrationError, ConfigError

_SIDE_BITS = 12  # 4096 bins on either side of zero
_SIDE = 2**_SIDE_BITS
_OFFSET_UNITS = 2**16  # resolution of a value inside its bin; 2^35 values in one bin still fit into an int64
_MIN_EXPONENT = -100  # keeps 1 / width finite in float32; all of |x| < 2^-112 shares the bins next to zero
_CPU_CHUNK = 2**15  # values binned at a time: temporaries stay in the cache, and ops of torch's grain size wait for no thread
_GPU_CHUNK = 2**25
_PER_OCTAVE = 4  # classes of images: the root mean square of one is known to 2^(1/8), 9 %
_OCTAVES_BELOW = 2  # how far below the median a smaller root mean square still counts for more


@dataclass
class Histogram:
    """Rows of weighted values, one row per channel (or one for the whole tensor).

    Attributes:
        values: ``[C, M]``, in any order, the representative of each bin: the mean of its members. No bin holds zeros and others.
        counts: ``[C, M]``, how many members each bin has, or their weight; 0 for padding.
        low: ``[C]``, the exact smallest value of each row.
        high: ``[C]``, the exact largest.
    """

    values: Tensor
    counts: Tensor
    low: Tensor
    high: Tensor

    @staticmethod
    def of(tensor: Tensor, axis: int | None = None, max_bins: int = 4096) -> Histogram:
        """Return the histogram of a whole tensor.

        Args:
            tensor: any shape, floating point.
            axis: the channel axis, one row per index; ``None`` for one row.
            max_bins: rows of at most this many elements are kept as they are; longer ones get this many bins of equal width
                between their extremes, and one bin for exact zeros.

        Raises:
            CalibrationError: the tensor is empty or holds NaN or Inf.
            ConfigError: there is no such axis.
        """
        rows = as_rows(tensor.detach(), axis)
        if rows.numel() == 0:
            raise CalibrationError("the tensor to quantize holds no values", fix="Remove the empty layer")
        low, high = rows.aminmax(dim=1)
        if not bool((low.isfinite() & high.isfinite()).all()):
            raise CalibrationError("the tensor to quantize holds NaN or Inf", fix="Re-load the checkpoint")
        return Histogram(rows, torch.ones_like(rows), low, high).coarsen(max_bins)

    def coarsen(self, bins: int) -> Histogram:
        """Return rows of ``bins`` bins of equal width from `low` to `high` and one bin for exact zeros (no-op on short rows).

        Values beyond `low` and `high`, if these have been narrowed, join the first and the last bin.
        """
        rows, length = self.values.shape
        if length <= bins:
            return self
        dtype, device = self.values.dtype, self.values.device
        width = ((self.high - self.low) / bins).clamp_min(torch.finfo(dtype).tiny)
        index = ((self.values - self.low[:, None]) / width[:, None]).clamp(0, bins - 1).int()
        index.masked_fill_(self.values == 0, bins)
        index += torch.arange(rows, dtype=torch.int32, device=device)[:, None] * (bins + 1)
        size = rows * (bins + 1)
        counts, sums = (
            torch.zeros(size, dtype=torch.float64, device=device).index_add_(0, index.flatten(), weights.flatten())
            for weights in (self.counts.double(), self.values.double() * self.counts)
        )
        means = sums / torch.where(counts > 0, counts, 1)
        return Histogram(means.view(rows, -1).to(dtype), counts.view(rows, -1).to(dtype), self.low, self.high)


def as_rows(tensor: Tensor, axis: int | None) -> Tensor:
    """Return the tensor as ``[C, M]``, C the size of the channel axis (1 where it is ``None``)."""
    if axis is None:
        return tensor.reshape(1, -1)
    if not -tensor.ndim <= axis < tensor.ndim:
        raise ConfigError(f"a tensor of shape {list(tensor.shape)} has no axis {axis}", fix="Use another axis, or None")
    return tensor.movedim(axis, 0).flatten(1) if tensor.ndim > 1 else tensor.reshape(-1, 1)


class HistogramObserver(nn.Module):
    """Returns its input unchanged and remembers how its values are distributed, batch after batch, in constant memory.

    The state is in buffers: it moves with the module, and is saved with it.

    Args:
        name: the layer, put in front of error messages.
    """

    bins: Tensor
    offsets: Tensor
    zeros: Tensor
    total: Tensor
    exponent: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, name: str | None = None):
        super().__init__()
        self.name = name
        self.register_buffer("bins", torch.zeros(2 * _SIDE, dtype=torch.int64))
        self.register_buffer("offsets", torch.zeros(2 * _SIDE, dtype=torch.int64))
        self.register_buffer("zeros", torch.zeros((), dtype=torch.int64))
        self.register_buffer("total", torch.zeros((), dtype=torch.int64))
        self.register_buffer("exponent", torch.tensor(_MIN_EXPONENT))
        self.register_buffer("low", torch.tensor(float("inf")))
        self.register_buffer("high", torch.tensor(float("-inf")))

    @property
    def count(self) -> int:
        """How many values have been seen."""
        return int(self.total)

    @property
    def seen(self) -> bool:
        """Whether any value has been seen."""
        return self.count > 0

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Record x, of any shape, and return it.

        Raises:
            CalibrationError: x is empty or holds NaN or Inf.
        """
        flat = x.detach().reshape(-1)
        if flat.dtype != torch.float64:
            flat = flat.float()
        self._record_extremes(flat)
        inverse_width = 2.0 ** (_SIDE_BITS - int(self.exponent))
        for chunk in flat.split(_CPU_CHUNK if flat.device.type == "cpu" else _GPU_CHUNK):
            scaled = chunk * inverse_width
            floor = scaled.floor()
            index = floor.int() + _SIDE
            self.bins += torch.bincount(index, minlength=2 * _SIDE)
            self.offsets.index_add_(0, index, ((scaled - floor) * _OFFSET_UNITS).long())
        self.zeros += flat.numel() - flat.count_nonzero()
        self.total += flat.numel()
        return x

    def _record_extremes(self, flat: Tensor) -> None:
        low, high = _extremes(flat, self.name)
        self.low = torch.minimum(self.low.to(flat.dtype), low)
        self.high = torch.maximum(self.high.to(flat.dtype), high)
        # frexp: |x| < 2^exponent, with equality nowhere, so that floor(x / width) is below 4096.
        needed = int(torch.frexp(torch.maximum(low.abs(), high.abs()).double())[1])
        if needed > int(self.exponent):
            self._grow(needed)

    def _grow(self, exponent: int) -> None:
        """Widen the bins by 2^k: offset o of bin j becomes offset ``(j mod 2^k + o) / 2^k`` of bin ``floor(j / 2^k)``."""
        if not self.seen:
            self.exponent.fill_(exponent)
        old = torch.arange(-_SIDE, _SIDE, device=self.bins.device)
        while (k := min(exponent - int(self.exponent), _SIDE_BITS)) > 0:  # in steps that cannot overflow an int64
            new = old >> k
            offsets = ((old - (new << k)) * _OFFSET_UNITS * self.bins + self.offsets) >> k
            self.bins = torch.zeros_like(self.bins).index_add_(0, new + _SIDE, self.bins)
            self.offsets = torch.zeros_like(self.offsets).index_add_(0, new + _SIDE, offsets)
            self.exponent += k

    def histogram(self) -> Histogram:
        """Return what was seen as one row ``[1, M]`` of ascending values, without empty bins, in the dtype of the data.

        Raises:
            CalibrationError: nothing was seen.
        """
        if not self.seen:
            raise CalibrationError(
                "never saw data: the layer was not reached by the calibration images",
                where=self.name,
                fix="Skip the layer, or give a calibration loader that makes the network use it",
            )
        counts = self.bins.clone()
        counts[_SIDE] -= self.zeros
        starts = torch.arange(-_SIDE, _SIDE, device=self.bins.device)
        means = starts + self.offsets.double() / (counts.clamp_min(1) * _OFFSET_UNITS)
        values = (means * 2.0 ** (int(self.exponent) - _SIDE_BITS)).clamp(self.low.double(), self.high.double())
        values = torch.cat([values[:_SIDE], values.new_zeros(1), values[_SIDE:]])
        counts = torch.cat([counts[:_SIDE], self.zeros.view(1), counts[_SIDE:]])
        kept = counts > 0
        dtype = self.low.dtype
        return Histogram(values[kept][None].to(dtype), counts[kept][None].to(dtype), self.low.view(1), self.high.view(1))


def _extremes(values: Tensor, name: str | None) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest value, both finite; anything else is a CalibrationError that names the layer."""
    if values.numel() == 0:
        raise CalibrationError("the activation holds no values", where=name, fix="Give batches of at least one image")
    low, high = values.aminmax()
    if not bool(low.isfinite() & high.isfinite()):
        raise CalibrationError(
            "the activation holds NaN or Inf", where=name, fix="Check the calibration images, and the float network on them"
        )
    return low, high


class ImageObserver(nn.Module):
    """Returns its input unchanged and remembers how its values are distributed, apart for images with small and with large values.

        image with root mean square r      ->      histogram of the class round(4 log2(r))

    Some images can have values ten times as large as the others (in MobileNetV2, artifacts in a corner of its last maps). Each value
    counted alike, these alone decide on a step. Errors relative to r weigh images alike, and for them it is enough to know the class. A
    class takes 128 KiB; images of a dataset are usually in less than ten. An r on the border of two classes may fall into the other one
    on another device.

    Args:
        name: the layer, put in front of error messages.
    """

    def __init__(self, name: str | None = None):
        super().__init__()
        self.name = name
        self.classes = nn.ModuleDict()

    @property
    def seen(self) -> bool:
        """Whether any value has been seen."""
        return len(self.classes) > 0

    @property
    def low(self) -> Tensor:
        """The smallest value."""
        return torch.stack([part.low for part in self.classes.values()]).min()  # type: ignore[misc]

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Record x, whose first axis counts images (or windows or tokens of them, whatever the network makes of it), and return it.

        Raises:
            CalibrationError: x is empty or holds NaN or Inf.
        """
        rows = as_rows(x.detach(), 0)
        wide = rows if rows.dtype == torch.float64 else rows.float()
        norms = torch.linalg.vector_norm(wide, dim=1)
        if not x.numel() or not bool(norms.isfinite().all()):
            _extremes(rows, self.name)  # says what is wrong; if nothing is, the squares were too large
            norms = torch.linalg.vector_norm(wide, dim=1, dtype=torch.float64)
        sizes = norms.double() / math.sqrt(rows.shape[1])
        classes = (sizes.clamp_min(2.0**_MIN_EXPONENT).log2() * _PER_OCTAVE).round().int()
        for number in classes.unique().tolist():
            if str(number) not in self.classes:
                self.classes[str(number)] = HistogramObserver(self.name).to(x.device)
            members = classes == number
            self.classes[str(number)](rows if bool(members.all()) else rows[members])
        return x

    def histogram(self, power: float = 0.0) -> Histogram:
        """Return what was seen as one row ``[1, M]``, the values of each image counted ``(R / r)**power`` times.

        r is that of the image's class, R the median over all values but zeros, and r at least R / 4: relative errors of an all but empty
        image say little.

        Args:
            power: 0 counts all values alike; p makes a sum of ``|error|**p`` one of errors relative to r.

        Raises:
            CalibrationError: nothing was seen.
        """
        if not self.seen:
            return HistogramObserver(self.name).histogram()  # which says so
        parts: dict[int, HistogramObserver] = {int(key): part for key, part in self.classes.items()}  # type: ignore[misc]
        order = sorted(parts)
        filled = torch.tensor([parts[number].count - int(parts[number].zeros) for number in order]).cumsum(0)
        usual = order[int(torch.searchsorted(filled, (filled[-1] + 1) // 2))]
        octaves = {number: max((number - usual) / _PER_OCTAVE, -_OCTAVES_BELOW) for number in order}
        rows = {number: part.histogram() for number, part in parts.items()}
        values = torch.cat([rows[number].values for number in order], 1)
        weights = torch.cat([rows[number].counts * 2.0 ** (-power * octaves[number]) for number in order], 1)
        low, high = (torch.stack([getattr(row, name) for row in rows.values()]) for name in ("low", "high"))
        return Histogram(values, weights, low.amin(0), high.amax(0))


class AxisObserver(nn.Module):
    """Returns its input unchanged and remembers how its values are distributed, apart for each index of an axis.

    Args:
        name: the layer, put in front of error messages.
        axis: the axis, whose size is that of the first input.
    """

    def __init__(self, name: str | None = None, axis: int = 1):
        super().__init__()
        self.name, self.axis = name, axis
        self.rows = nn.ModuleList()

    @property
    def seen(self) -> bool:
        """Whether any value has been seen."""
        return len(self.rows) > 0

    @property
    def low(self) -> Tensor:
        """The smallest value of each row, ``[C]``."""
        return torch.stack([row.low for row in self.rows])  # type: ignore[misc]

    def forward(self, x: Tensor) -> Tensor:
        """Record x and return it.

        Raises:
            CalibrationError: x is empty or holds NaN or Inf.
        """
        parts = x.detach().unbind(self.axis)
        if not self.seen:
            self.rows.extend(ImageObserver(self.name) for _ in parts)
        for row, part in zip(self.rows, parts, strict=True):
            row(part)
        return x

    def histogram(self, power: float = 0.0) -> Histogram:
        """Return what was seen as rows ``[C, M]``, short ones padded with values that count nothing; `power`: see `ImageObserver`.

        Raises:
            CalibrationError: nothing was seen.
        """
        if not self.seen:
            return HistogramObserver(self.name).histogram()  # which says so
        rows: list[Histogram] = [row.histogram(power) for row in self.rows]  # type: ignore[operator]
        values, counts = (
            nn.utils.rnn.pad_sequence([getattr(row, name)[0] for row in rows], batch_first=True) for name in ("values", "counts")
        )
        return Histogram(values, counts, torch.cat([row.low for row in rows]), torch.cat([row.high for row in rows]))


Observer = ImageObserver | AxisObserver
"""What looks at an activation while it is calibrated."""


def observer_of(name: str | None, axis: int | None) -> Observer:
    """Return an observer of a tensor that gets one scale (None), or one for each index of an axis."""
    return ImageObserver(name) if axis is None else AxisObserver(name, axis)
