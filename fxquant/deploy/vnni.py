"""Integer layers for x86 processors with AVX-512 VNNI, in kernels of fxquant's own (``vnni.cpp``), for one image.

oneDNN's are as good at the products, but torch makes their primitives anew at each call: 25 microseconds for each layer, as long as a small
layer takes itself. Here a layer is one call of C from the code that inductor writes, with its residual and its cut. Weights lie as

    dense       [panels of 64 outputs] [taps] [input channels / 4] [64 outputs] [4 channels]
    folded      the same, where channels come in no fours (images): taps are rows of the kernel, channels all that a row holds
    depthwise   [blocks of 64 channels] [columns of the kernel] [rows / 4] [64 channels in the order that bytes are packed] [4 rows]
"""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.deploy import native
from fxquant.deploy.integers import Grid, IntegerLayer, output_sides

SOURCE = Path(__file__).with_name("vnni.cpp")
FLAGS = tuple(f"-m{name}" for name in ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vnni", "bmi2"))
SHIM = (
    "AOTITorchError aoti_torch_cpu_vnni_layer(AtenTensorHandle, AtenTensorHandle, AtenTensorHandle, AtenTensorHandle, AtenTensorHandle, "
    "AtenTensorHandle*, const int64_t*, int64_t, const double*, int64_t, AtenTensorHandle*)"
)
"""How inductor's code declares the layer."""


def unavailable() -> str | None:
    """Say why layers run on oneDNN here instead, or return None. Compiles the kernels where that was not done before."""
    if not sys.platform.startswith("linux"):
        return f"its kernels are not built on {sys.platform}"
    has = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    if not has.get("avx512_vnni"):
        return "this processor has no AVX-512 VNNI, as far as torch knows"
    if has.get("amx_int8"):
        return "this processor has AMX, for which oneDNN has kernels"
    if os.environ.get("ONEDNN_MAX_CPU_ISA"):
        return "ONEDNN_MAX_CPU_ISA says which instructions to use"
    return _not_built()


@cache
def _not_built() -> str | None:
    try:
        native.library(SOURCE, FLAGS)
    except OSError as error:
        return str(error)
    return None


def refusal(layer: IntegerLayer, residual: Grid | None = None) -> str | None:
    """Say why `layer` runs on oneDNN instead, or return None."""
    depth = layer.weight.shape[1]
    if _is_depthwise(layer):
        return "depthwise layers give bytes, without a residual" if residual is not None or layer.output is None else None
    if depth % 4 and (layer.is_linear or layer.groups > 1 or layer.dilation[1] > 1):
        return f"{depth} input channels come in no fours"
    return None


def _is_depthwise(layer: IntegerLayer) -> bool:
    return 1 < layer.groups == len(layer.weight) and layer.weight.shape[1] == 1


@torch.library.custom_op("fxquant::vnni_layer", mutates_args=(), device_types="cpu", tags=(torch.Tag.needs_exact_strides,))
def vnni_layer(
    codes: Tensor,
    packed: Tensor,
    start: Tensor,
    scale: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    geometry: list[int],
    grids: list[float],
) -> Tensor:
    """Return bytes (or float32, where the output has no grid) for bytes ``[N, C, H, W]`` in channels_last, or rows ``[..., I]``.

    Args:
        packed, start, scale, bias: int8, int32, float32 and float32, flat, as `VnniProduct` holds them.
        residual: bytes of the shape of the output.
        geometry: outputs; of a convolution then kernel, stride, padding and dilation, height and width each, and groups.
        grids: scale and zero-point of the codes; 1 / scale (0: float32 goes out), zero-point, lowest and highest code of the output;
            scale and zero-point of the residual.

    Raises:
        ValueError: types or shapes are others, or the map is smaller than the kernel.
    """
    out = _output(codes, packed, start, scale, bias, residual, geometry, grids)
    if len(geometry) == 1:
        sizes, shape = [codes.numel() // codes.shape[-1], codes.shape[-1], 1, 1], [*geometry, 1, 1, 1, 1, 0, 0, 1, 1, 1, 1, 1]
    else:
        sizes, shape = list(codes.shape), [*geometry, *out.shape[2:]]
    pointers = [
        ctypes.c_void_p(None if tensor is None else tensor.data_ptr()) for tensor in (codes, packed, start, scale, bias, residual, out)
    ]
    numbers = [(ctypes.c_int64 * 4)(*sizes), (ctypes.c_int64 * 12)(*shape), (ctypes.c_double * 8)(*grids)]
    native.library(SOURCE, FLAGS).fxquant_vnni_layer(*pointers, *numbers)
    return out


@vnni_layer.register_fake
def _output(*given: Any) -> Tensor:
    """Return an empty output, if what is given to `vnni_layer` is what pointers to it are taken for."""
    codes, *constants, residual, geometry, grids = given
    types = [tensor.dtype for tensor in (codes, *constants)]
    if types != [torch.uint8, torch.int8, torch.int32, torch.float32, torch.float32]:
        raise ValueError(f"a layer of bytes cannot read {', '.join(str(dtype).removeprefix('torch.') for dtype in types)}")
    dtype = torch.uint8 if grids[2] else torch.float32
    if len(geometry) == 1:
        out = codes.new_empty((*codes.shape[:-1], *geometry), dtype=dtype)
    else:
        outputs, *kernel = geometry
        size = output_sides(codes.shape[2:], kernel)
        if min(size) < 1:
            raise ValueError(f"a map of {codes.shape[2]} x {codes.shape[3]} is smaller than the kernel: the images are too small")
        out = torch.empty((codes.shape[0], outputs, *size), dtype=dtype, device=codes.device, memory_format=torch.channels_last)
    if residual is not None and (residual.dtype != torch.uint8 or residual.shape != out.shape):
        raise ValueError(f"a residual of {residual.dtype} {tuple(residual.shape)} cannot be added to {tuple(out.shape)}")
    return out


class VnniProduct(nn.Module):
    """What a layer of bytes computes, in one call.

    Args:
        layer: the layer, of which `refusal` says nothing.
        residual: the grid of bytes that are added in front of the rounding.
    """

    packed: Tensor
    start: Tensor
    scale: Tensor
    bias: Tensor

    def __init__(self, layer: IntegerLayer, residual: Grid | None = None):
        super().__init__()
        weight = layer.weight if layer.weight.ndim == 4 else layer.weight[:, :, None, None]
        pack = _depthwise if _is_depthwise(layer) else _dense
        packed, order = pack(weight, layer.groups)
        start = -layer.input.zero_point * weight.flatten(1).sum(1, dtype=torch.int32)
        bias = torch.zeros_like(layer.scale) if layer.bias is None else layer.bias
        self.inputs = weight.shape[1] * layer.groups
        self.register_buffer("packed", packed)
        for name, values in (("start", start), ("scale", layer.scale), ("bias", bias)):
            self.register_buffer(name, torch.cat([values, values.new_zeros(1)])[order])
        self.geometry = [len(weight)]
        if not layer.is_linear:
            self.geometry += [*weight.shape[2:], *layer.stride, *layer.padding, *layer.dilation, layer.groups]
        out = (
            (0.0, 0, 0, 0) if layer.output is None else (layer.output.inverse, layer.output.zero_point, layer.output.low, layer.output.high)
        )
        added = (0.0, 0) if residual is None else (residual.scale, residual.zero_point)
        self.grids = [float(value) for value in (layer.input.scale, layer.input.zero_point, *out, *added)]

    def forward(self, codes: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return bytes on the grid of the output, or float32 where there is none, for bytes ``[N, C, H, W]`` or ``[..., I]``.

        Raises:
            ValueError: they have another number of channels, or as `vnni_layer` does.
        """
        is_linear = len(self.geometry) == 1
        if codes.shape[-1 if is_linear else 1] != self.inputs:
            raise ValueError(f"a layer of {self.inputs} input channels cannot read bytes of shape {tuple(codes.shape)}")
        order = torch.contiguous_format if is_linear else torch.channels_last
        residual = None if residual is None else residual.contiguous(memory_format=order)
        given = (self.packed, self.start, self.scale, self.bias)
        return vnni_layer(codes.contiguous(memory_format=order), *given, residual, self.geometry, self.grids)


def _dense(weight: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Return the bytes of a weight ``[O, I, kH, kW]`` and its outputs in the order of the kernel; output O stands for none."""
    if weight.shape[1] % 4:  # folded: a row of the kernel, side by side, is one tap
        weight = weight.permute(0, 3, 1, 2).flatten(1, 2)[:, :, :, None]
        weight = F.pad(weight, (0, 0, 0, 0, 0, -weight.shape[1] % 4))
    outputs, depth = weight.shape[:2]
    width = outputs // groups
    padded = F.pad(weight.reshape(groups, width, depth // 4, 4, -1), (0, 0, 0, 0, 0, 0, 0, -width % 16))
    panels = [panel.permute(3, 1, 0, 2).flatten() for group in padded for panel in group.split(64)]
    order = F.pad(torch.arange(outputs).view(groups, width), (0, -width % 16), value=outputs)
    return torch.cat(panels), order.flatten()


def _depthwise(weight: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Return the same for a weight ``[C, 1, kH, kW]``; of the last channels, up to 32 stand there for two neighbors, up to 16 for four."""
    _, _, height, width = weight.shape
    channels = torch.arange(groups + -groups % 64)
    left = groups % 64
    if left:
        among = torch.arange(64) % (16 if left <= 16 else 32 if left <= 32 else 64)
        channels[-64:] = torch.where(among < left, groups - left + among, groups)
    # Within 64, [lane, vector, place] becomes [vector, lane, place].
    order = channels.view(-1, 4, 4, 4).transpose(1, 2).flatten()
    padded = F.pad(weight[:, 0], (0, 0, 0, -height % 4, 0, 1))[order]
    return padded.view(-1, 64, padded.shape[1] // 4, 4, width).permute(0, 4, 2, 1, 3).flatten(), order
