"""The CUDA kernels as operators that ``torch.compile``, CUDA graphs and ``torch.export`` take as they take `aten` operators."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from fxquant.deploy.integers import output_sides
from fxquant.errors import ConfigError


@cache
def kernels_module() -> ModuleType:
    """Import the kernels, once: that is what needs Triton."""
    if importlib.util.find_spec("triton") is None:
        raise ConfigError("triton is not installed", where="CUDA integer layers", fix="Install it, or run the layer another way")
    return importlib.import_module("fxquant.deploy.triton_kernels")


def check(codes: Tensor, residual: Tensor | None, weight_scale: Tensor, window: Sequence[int], grid: Sequence[float] | None) -> list[int]:
    """Return the shape of the output of a convolution, or say what cannot be computed."""
    if weight_scale.dtype != torch.float32:
        raise ConfigError(f"the scales of an integer layer are {weight_scale.dtype}", fix="Call .half() or .bfloat16() before lowering")
    if codes.dtype != torch.uint8 or codes.ndim != 4:
        raise ConfigError(f"an integer layer got {codes.dtype} of {codes.ndim} dimensions", fix="Give it uint8 images [N, C, H, W]")
    shape = [codes.shape[0], weight_scale.numel(), *output_sides(codes.shape[2:], window)]
    if min(shape[2:]) < 1:
        raise ConfigError(f"images of {codes.shape[2]}x{codes.shape[3]} are smaller than the kernel", fix="Give larger images")
    if residual is not None:
        if list(residual.shape) != shape:
            raise ConfigError(f"the residual has shape {list(residual.shape)}, the output {shape}", fix="Both must agree")
        if (residual.dtype == torch.uint8) != (grid is not None):
            raise ConfigError(
                f"the residual is {residual.dtype}, but the layer {'has a' if grid else 'has no'} grid for its bytes",
                fix="Give CudaIntegerLayer(residual=...) the grid of bytes, and none for floats",
            )
    return shape


def _empty(codes: Tensor, shape: list[int], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=codes.device, memory_format=torch.channels_last)


def _runnable(codes: Tensor) -> ModuleType:
    kernels = kernels_module()
    if not codes.is_cuda and not (kernels.INTERPRETED and codes.device.type == "cpu"):
        raise ConfigError(
            f"the kernels are for CUDA devices, and the bytes are on {codes.device.type}",
            fix="Move them, or set TRITON_INTERPRET=1 before the first import to test on the CPU",
        )
    return kernels


@torch.library.custom_op("fxquant::int8_conv2d", mutates_args=())
def int8_conv2d(
    codes: Tensor,
    weight: Tensor,
    zeros: Tensor | None,
    weight_scale: Tensor,
    bias: Tensor,
    offset: Tensor,
    residual: Tensor | None,
    window: Sequence[int],
    groups: int,
    bits: int,
    scale_in: float,
    zero_in: int,
    shifted: bool,
    residual_grid: Sequence[float] | None,
    out_grid: Sequence[float] | None,
    dtype: torch.dtype,
) -> Tensor:
    """Convolve bytes with int8, 4-bit or 2-bit weights; `CudaIntegerLayer` prepares the arguments.

    Args:
        codes: uint8 ``[N, C, H, W]``.
        weight: int8 ``[O, kH * kW * I]``, or what `pack_weight` returns.
        zeros: int8 ``[O]``, taken off the codes of packed weights.
        weight_scale: float32 ``[O]``, the scale of the weights.
        bias: float32 ``[O]``.
        offset: int32 ``[O]``, ``-(zero_in - shift) * sum w``.
        residual: ``[N, O, H', W']``, bytes or floats.
        window: kernel, stride, padding and dilation, two numbers each.
        groups, bits: of the weights.
        scale_in: of the bytes that come in.
        zero_in: the byte of the real number 0, and so of the padding.
        shifted: the shift is 128, else 0.
        residual_grid: scale and zero-point of a residual of bytes.
        out_grid: 1 / scale, zero-point, low and high of the output; None: it is floats of `dtype`.
        dtype: of the output.
    """
    out = _empty(codes, check(codes, residual, weight_scale, window, residual_grid), dtype)
    added = None if residual is None else residual.contiguous(memory_format=torch.channels_last)
    images = codes.contiguous(memory_format=torch.channels_last)
    _runnable(codes).launch(
        images, weight, zeros, weight_scale, bias, offset, added, out, window, groups, bits, scale_in, zero_in, shifted,
        residual_grid, out_grid,
    )  # fmt: skip
    return out


@int8_conv2d.register_fake
def _(
    codes, weight, zeros, weight_scale, bias, offset, residual,
    window, groups, bits, scale_in, zero_in, shifted, residual_grid, out_grid, dtype,
):  # fmt: skip
    return _empty(codes, check(codes, residual, weight_scale, window, residual_grid), dtype)


@torch.library.custom_op("fxquant::int8_depthwise_conv2d", mutates_args=())
def int8_depthwise_conv2d(
    codes: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    window: Sequence[int],
    scale_in: float,
    zero_in: int,
    residual_grid: Sequence[float] | None,
    out_grid: Sequence[float] | None,
    dtype: torch.dtype,
) -> Tensor:
    """Convolve every channel with its own int8 weights ``[kH * kW, O]``; the rest is as in `int8_conv2d`, and O a multiple of C."""
    out = _empty(codes, check(codes, residual, weight_scale, window, residual_grid), dtype)
    added = None if residual is None else residual.contiguous(memory_format=torch.channels_last)
    images = codes.contiguous(memory_format=torch.channels_last)
    _runnable(codes).launch(
        images, weight, None, weight_scale, bias, None, added, out, window, codes.shape[1], 8, scale_in, zero_in, False,
        residual_grid, out_grid,
    )  # fmt: skip
    return out


@int8_depthwise_conv2d.register_fake
def _(codes, weight, weight_scale, bias, residual, window, scale_in, zero_in, residual_grid, out_grid, dtype):
    return _empty(codes, check(codes, residual, weight_scale, window, residual_grid), dtype)
