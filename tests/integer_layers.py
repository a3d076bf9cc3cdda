"""Integer layers with random weights, and bytes for them."""

from __future__ import annotations

import torch
from torch import Tensor

from fxquant.deploy.integers import Grid, IntegerLayer

OUTPUTS = (None, Grid(0.9, 0), Grid(0.7, 2, 0, 3), Grid(0.7, 2, 2, 3), Grid(1.3, 120, 0, 255), Grid(1.3, 7, 7, 15))


def random_layer(seed: int, outputs: int, inputs: int, size: int, groups: int = 1, **more) -> IntegerLayer:
    g = torch.Generator().manual_seed(seed)
    weight = torch.randint(-128, 128, (outputs, inputs // groups, size, size), generator=g).to(torch.int8)
    return IntegerLayer(weight, torch.rand(outputs, generator=g) * 0.01 + 0.001, torch.randn(outputs, generator=g), groups=groups, **more)


def random_bytes(seed: int, *shape: int, grid: Grid) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(grid.low, grid.high + 1, shape, generator=g).to(torch.uint8)
    return codes.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else codes
