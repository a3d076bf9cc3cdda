"""Integer layers behind a global average pool, whose outputs are finer than bytes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fxquant.deploy.integers import Grid, IntegerLayer
from fxquant.errors import ConfigError
from fxquant.grids import AveragedPart

ALL = AveragedPart()
"""Means over whole maps, whatever their size."""


class PooledIntegerLayer(nn.Module):
    """A linear layer (or 1x1 convolution) of the means of bytes over a map, in exact integers.

        mean = S / n,  S = 256 h + l:    sum w (S / n - z)  =  (256 (w . h) + w . l) / n  -  z sum w

    The sums S of up to 257 bytes fit two bytes, those of larger maps three or four; the products of all of them are one product of bytes,
    of so many times the rows.

    Args:
        layer: what it computes; gives float32.
        keep: the shape that goes out is ``[N, O, 1, 1]`` instead of ``[N, O]``.
        build: makes the product of bytes.
        part: what of each map the means are of.
        name: of the layer, for messages.
    """

    offset: Tensor

    def __init__(
        self,
        layer: IntegerLayer,
        keep: bool,
        build: Callable[[IntegerLayer], nn.Module],
        part: AveragedPart = ALL,
        name: str = "",
    ):
        super().__init__()
        weight = layer.weight.flatten(1)
        self.keep, self.part, self.name = keep, part, name
        self.product = build(IntegerLayer(weight, layer.scale * layer.input.scale, None, Grid(1.0, 0), shape=weight.shape[1:]))
        offset = -layer.input.zero_point * weight.sum(1).double() * layer.scale.double() * layer.input.scale
        self.register_buffer("offset", (offset if layer.bias is None else offset + layer.bias.double()).float())

    def forward(self, codes: Tensor) -> Tensor:
        """Return float32 for bytes ``[N, C, H, W]``.

        Raises:
            ConfigError: maps for which the pool in front does not give one value.
        """
        if self.part.size is not None:
            self._check(codes.shape[2], codes.shape[3])
            codes = codes[:, :, : self.part.size[0], : self.part.size[1]]
        count = codes.shape[2] * codes.shape[3]
        sums = codes.sum((2, 3), dtype=torch.int32)
        shifts = (8, 0) if count <= 257 else (16, 8, 0) if count <= 65_793 else (24, 16, 8, 0)
        parts = self.product(torch.stack([(sums >> shift) & 255 for shift in shifts], 1).to(torch.uint8)).unbind(1)
        y = sum(part * (2**shift / count) for part, shift in zip(parts, shifts, strict=True)) + self.offset
        return y[:, :, None, None] if self.keep else y

    def _check(self, height: int, width: int) -> None:
        assert self.part.size is not None and self.part.largest is not None
        if self.part.size[0] <= height <= self.part.largest[0] and self.part.size[1] <= width <= self.part.largest[1]:
            return
        ends = " and ".join(f"{size[0]} x {size[1]}" for size in (self.part.size, self.part.largest))
        problem = f"the pool in front gives one value for maps between {ends}, not for {height} x {width}"
        if torch.compiler.is_compiling():  # what compiles cannot make the error below, but shows the words of this one
            raise ValueError(problem)
        raise ConfigError(problem, where=self.name, fix="Use images of another size, or quantize with images of this one")
