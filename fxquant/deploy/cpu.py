"""Integer layers on x86.

    bytes -> [ VNNI: u8 x s8 -> int32 ] -> * s_in * s_w + b -> (+ residual bytes) -> cut -> round -> bytes

For one image it is done by fxquant's own kernels (`fxquant.deploy.vnni`), where the processor has the instructions that they are written
for, otherwise by oneDNN (`fxquant.deploy.onednn`). Both give the bytes of `IntegerLayer.reference`, with a residual as long as scales have
16 bits, as those of a frozen network do.
"""

from __future__ import annotations

import platform
from functools import cache

import torch
from torch import Tensor, nn

from fxquant.deploy import vnni
from fxquant.deploy.integers import Grid, IntegerLayer, overflow
from fxquant.deploy.onednn import OneDnnProduct
from fxquant.deploy.vnni import VnniProduct

_OPS = ("qconv_prepack", "qconv_pointwise", "qconv2d_pointwise", "qlinear_prepack", "qlinear_pointwise")


def unavailable() -> str | None:
    """Say why this machine cannot run integer layers, or return None."""
    if not torch.backends.mkldnn.is_available() or not all(hasattr(torch.ops.onednn, name) for name in _OPS):
        return "this build of torch has no oneDNN with int8 operations"
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return f"{platform.machine()} is no x86 processor"
    if not _products_are_exact():
        return "without VNNI instructions (or with ONEDNN_MAX_CPU_ISA below them) this processor's sums of products of bytes saturate"
    return None


@cache
def _products_are_exact() -> bool:
    """Say whether sums of the largest bytes come out; without VNNI pairs of products are added in 16 bits. Asked of oneDNN itself, as flags
    of the processor say neither what it makes of them nor what it was told."""
    weight = torch.full((32, 32, 3, 3), 127, dtype=torch.int8, device="cpu")
    layer = IntegerLayer(weight, torch.ones(32, device="cpu"), None, Grid(1.0, 0), shape=(32, 8, 8))
    codes = torch.full((1, 32, 8, 8), 255, dtype=torch.uint8, device="cpu").contiguous(memory_format=torch.channels_last)
    return torch.equal(OneDnnProduct(layer)(codes), layer.reference(codes))


class CpuIntegerLayer(nn.Module):
    """A layer of bytes, on the CPU.

    Args:
        layer: what it computes.
        residual: the grid of bytes that are added in front of the rounding, as a second input.
    """

    def __init__(self, layer: IntegerLayer, residual: Grid | None = None):
        super().__init__()
        self.input, self.output, self.residual, self.is_linear = layer.input, layer.output, residual, layer.is_linear
        self.channels, self.bytes = len(layer.weight), layer.weight.numel()
        own = vnni.refusal(layer, residual) is None and vnni.unavailable() is None
        self.single = VnniProduct(layer, residual) if own else None
        self.several = OneDnnProduct(layer, residual)

    def forward(self, codes: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return bytes on the grid of the output, or float32 where there is none."""
        # A compiler decides this once: its graphs of one image and of several differ anyway.
        single = self.single is not None and codes.shape[0] == 1
        return self.single(codes, residual) if single else self.several(codes, residual)  # type: ignore[misc]

    def extra_repr(self) -> str:
        words = "linear" if self.is_linear else f"conv, stride {self.several.geometry[0]}, groups {self.several.geometry[3]}"
        return f"{words}, {self.channels} channels, {self.bytes:,} bytes, {self.input} -> {self.output or 'float32'}"


class CpuBackend:
    """Builds integer layers for x86 processors."""

    def refusal(self, layer: IntegerLayer, residual: Grid | None = None) -> str | None:
        """Say why `layer` cannot run here, or return None."""
        if residual is not None and (layer.is_linear or layer.output is None):
            return "only convolutions that give bytes add a residual"
        return overflow(layer)

    def build(self, layer: IntegerLayer, residual: Grid | None = None) -> nn.Module:
        """Return the module that computes `layer`."""
        return CpuIntegerLayer(layer, residual)
