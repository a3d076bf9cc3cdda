"""Integer layers behind a global average pool, whose outputs are finer than bytes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fxquant.deploy.integers import Grid, IntegerLayer
from fxquant.errors import ConfigError
from fxquant.grids import Window


class PooledIntegerLayer(nn.Module):
    """A linear layer (or 1x1 convolution) of the means of bytes over a map, in exact integers.

        mean = S / n,  S = 256 h + l:    sum w (S / n - z)  =  (256 (w . h) + w . l) / n  -  z sum w

    The sums S of up to 257 bytes fit two bytes, those of larger maps three or four; the products of all of them are one product of bytes,
    of so many times the rows.

    Args:
        layer: what it computes; gives float32.
        keep: the shape that goes out is ``[N, O, 1, 1]`` instead of ``[N, O]``.
        build: makes the product of bytes.
        window: what of each map the means are of; None: all, whatever its size.
        name: of the layer, for messages.
    """

    offset: Tensor

    def __init__(
        self, layer: IntegerLayer, keep: bool, build: Callable[[IntegerLayer], nn.Module], window: Window | None = None, name: str = ""
    ):
        super().__init__()
        weight = layer.weight.flatten(1)
        self.keep, self.window, self.name = keep, window, name
        self.product = build(IntegerLayer(weight, layer.scale * layer.input.scale, None, Grid(1.0, 0), shape=weight.shape[1:]))
        offset = -layer.input.zero_point * weight.sum(1).double() * layer.scale.double() * layer.input.scale
        self.register_buffer("offset", (offset if layer.bias is None else offset + layer.bias.double()).float())

    def forward(self, codes: Tensor) -> Tensor:
        """Return float32 for bytes ``[N, C, H, W]``.

        Raises:
            ConfigError: maps for which the pool in front gives several values.
        """
        if self.window is not None:
            if codes.shape[2] > self.window.largest[0] or codes.shape[3] > self.window.largest[1]:
                most = " x ".join(map(str, self.window.largest))
                found = f"the pool in front gives one value for maps up to {most}, not for {codes.shape[2]} x {codes.shape[3]}"
                raise ConfigError(found, where=self.name, fix="Use smaller images, or quantize with images of this size")
            codes = codes[:, :, : self.window.size[0], : self.window.size[1]]
        count = codes.shape[2] * codes.shape[3]
        sums = codes.sum((2, 3), dtype=torch.int32)
        shifts = (8, 0) if count <= 257 else (16, 8, 0) if count <= 65_793 else (24, 16, 8, 0)
        parts = self.product(torch.stack([(sums >> shift) & 255 for shift in shifts], 1).to(torch.uint8)).unbind(1)
        y = sum(part * (2**shift / count) for part, shift in zip(parts, shifts, strict=True)) + self.offset
        return y[:, :, None, None] if self.keep else y
