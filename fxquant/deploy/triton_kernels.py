"""Integer convolutions in Triton: an implicit matrix product over channels-last bytes, and a depthwise one.

    pixels m of [N, H, W]            taps and channels k              output channels n

            a [m, k]    x    w [k, n]    ->    acc [m, n]    ->    y [m, n]    ->    bytes [m, n]
           never stored     one row per n       int32             float32        channels last

A program owns a block of output pixels and of output channels. It walks over the taps of the kernel and the channels behind each tap,
gathers the bytes that the tap sees, and multiplies them with the tap's weights on the tensor cores; the column matrix of a convolution
exists nowhere. Everything behind the sum happens in registers, so one byte per output leaves the program.

Signs. The tensor cores that Triton reaches want both sides signed, and a byte is not. With a shift of 128 (0 where no byte of the grid is
above 127: then the bytes are signed integers as they are), ``byte - shift`` is one, and

    sum w (a - z) = sum w (a - shift) + offset,      offset = -(z - shift) sum w        per output channel, exact in int32

holds at the border too, because a pixel outside the image is read as the byte z: the real number 0.
Tensor cores saturate; `fxquant.deploy.cuda.refusal` keeps layers away whose sums could come near 2^31, in any order of adding.

Packed weights. A row of weights holds, tap after tap, the codes of its input channels. With b bits a byte holds ``p = 8 / b`` of them, and
the C channels of a tap take ``Q = ceil(C / p)`` bytes: byte j has channel ``i Q + j`` in its bits ``i b .. i b + b - 1``:

    2 bits, C = 8, Q = 2:      byte 0 = channels 0 2 4 6 (lowest bits first)      byte 1 = channels 1 3 5 7

So a block of bytes is loaded once and its planes multiply p blocks of neighboring channels; nothing is moved between the lanes. A weight
is ``code - zero``, one zero per output channel, taken off in registers; 8-bit weights are stored as they are.

Rounding. Each step of the epilogue is rounded on its own, in the order of `IntegerLayer.reference`: a product is not contracted with
the sum behind it (see `OPTIONS`). Half to even comes from adding and subtracting ``1.5 * 2^23``.

This module imports Triton, `fxquant.deploy.cuda` imports it when the first kernel is launched. With ``TRITON_INTERPRET=1`` in the
environment before that, the kernels run on the CPU, slowly.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED: bool = triton.knobs.runtime.interpret

# What the residual is.
NO_RESIDUAL, FLOAT_RESIDUAL, BYTE_RESIDUAL = 0, 1, 2

OPTIONS = {"enable_fp_fusion": False}
"""What all kernels are compiled with: a product and a sum round twice, as they do in plain torch."""

# Rows shorter than this (the three channels of an image, narrow groups) would leave most of a block empty: taps and channels then share
# one axis, at the price of a division per lane.
_SHORT_ROW = 32


def _configs(blocks: Sequence[tuple[int, int, int, int, int]]) -> list[triton.Config]:
    if INTERPRETED:
        blocks = [(64, 32, 32, 1, 1)]
    return [
        triton.Config({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}, num_warps=warps, num_stages=stages) for m, n, k, warps, stages in blocks
    ]


# Blocks of pixels, output channels and bytes of weights, then warps and stages. Large blocks feed wide layers of large batches, small ones
# spread the last stages of a network, with few pixels and many channels, over all the multiprocessors.
_MATRIX = _configs(
    [
        (128, 256, 64, 8, 3),
        (128, 128, 128, 8, 3),
        (128, 128, 64, 8, 4),
        (128, 64, 64, 4, 4),
        (64, 128, 64, 4, 4),
        (128, 32, 64, 4, 4),
        (64, 64, 128, 4, 3),
        (64, 64, 64, 4, 4),
        (32, 64, 128, 4, 4),
        (32, 32, 64, 2, 4),
        (128, 64, 32, 4, 4),
        (64, 32, 32, 2, 4),
    ]
)
_DEPTHWISE = [
    triton.Config({"BLOCK_M": m, "BLOCK_N": n}, num_warps=warps)
    for m, n, warps in ([(64, 32, 1)] if INTERPRETED else [(16, 64, 4), (32, 64, 4), (64, 32, 4), (16, 128, 4), (32, 32, 2), (8, 128, 4)])
]


@triton.jit
def _finish(
    acc, weight_scale, bias, residual, out, place, live, scale_in, residual_scale, residual_zero, out_inverse, out_zero, low, high,
    RESIDUAL: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """Turn a block of sums into what is stored at `place`."""
    y = acc.to(tl.float32) * scale_in * weight_scale[None, :] + bias[None, :]
    if RESIDUAL > 0:
        r = tl.load(residual + place, mask=live, other=0).to(tl.float32)
        if RESIDUAL == 2:
            r = (r - residual_zero) * residual_scale
        y = y + r
    if ROUND:
        # Cut before it is rounded, which is the same for whole limits, and keeps the sum with 1.5 * 2^23 exact.
        code = tl.minimum(tl.maximum(y * out_inverse + out_zero, low), high)
        y = (code + 12582912.0) - 12582912.0
        tl.store(out + place, y.to(tl.int32).to(tl.uint8), mask=live)
    else:
        tl.store(out + place, y.to(out.dtype.element_ty), mask=live)


@triton.autotune(configs=_MATRIX, key=["bucket", "out_height", "group_in", "group_out", "TAPS", "BITS", "SHIFTED", "RESIDUAL", "ROUND"])
@triton.jit
def _matrix_kernel(
    codes, weight, zeros, weight_scale, bias, offset, residual, out,
    bucket,  # of the number of pixels: a reason to tune again, not read
    pixels, height, width, out_height, out_width, channels, group_in, group_out, row,
    stride_h, stride_w, pad_h, pad_w, step_h, step_w, zero_in,
    scale_in, residual_scale, residual_zero, out_inverse, out_zero, low, high,
    TAPS: tl.constexpr, ACROSS: tl.constexpr, BITS: tl.constexpr, SHIFTED: tl.constexpr, FLAT: tl.constexpr,
    RESIDUAL: tl.constexpr, ROUND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # Programs that share pixels follow each other: the weights are the smaller side, and stay in the cache.
    blocks_n = tl.cdiv(group_out, BLOCK_N)
    groups = channels // group_in
    block = tl.program_id(0) % (blocks_n * groups)
    m = (tl.program_id(0) // (blocks_n * groups)) * BLOCK_M + tl.arange(0, BLOCK_M)
    group = block // blocks_n
    n = (block % blocks_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    live_m, live_n = m < pixels, n < group_out
    o = group * group_out + n

    image = m // (out_height * out_width)
    inner = m % (out_height * out_width)
    top = (inner // out_width) * stride_h - pad_h
    left = (inner % out_width) * stride_w - pad_w
    base = codes + image.to(tl.int64) * (height * width * channels) + group * group_in
    rows = weight + o * (TAPS * row)
    if BITS < 8:
        zero = tl.load(zeros + o, mask=live_n, other=0)

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    blocks_k = tl.cdiv(TAPS * row, BLOCK_K) if FLAT else TAPS * tl.cdiv(row, BLOCK_K)
    for k in range(blocks_k):
        if FLAT:
            at = k * BLOCK_K + tl.arange(0, BLOCK_K)
            tap = at // row
            j = at - tap * row
            live_k = at < TAPS * row
            y = top[:, None] + (tap // ACROSS)[None, :] * step_h
            x = left[:, None] + (tap % ACROSS)[None, :] * step_w
        else:
            tap = k // tl.cdiv(row, BLOCK_K)
            j = (k % tl.cdiv(row, BLOCK_K)) * BLOCK_K + tl.arange(0, BLOCK_K)
            at = tap * row + j
            live_k = j < row
            y = (top + (tap // ACROSS) * step_h)[:, None]
            x = (left + (tap % ACROSS) * step_w)[:, None]
        inside = (y >= 0) & (y < height) & (x >= 0) & (x < width) & live_m[:, None]
        pixel = base[:, None] + (y * width + x) * channels
        packed = tl.load(rows[None, :] + at[:, None], mask=live_k[:, None] & live_n[None, :], other=0)
        for plane in tl.static_range(8 // BITS):
            channel = plane * row + j
            live = live_k & (channel < group_in)
            a = tl.load(pixel + channel[None, :], mask=inside & live[None, :], other=zero_in)
            if SHIFTED:
                a = a ^ 128
            if BITS == 8:
                w = packed
            else:
                code = (packed >> (plane * BITS)) & ((1 << BITS) - 1)
                # What is read behind the last channel is no weight: it must not meet the byte there.
                w = tl.where(live[:, None], code.to(tl.int8) - zero[None, :], 0).to(tl.int8)
            acc = tl.dot(a.to(tl.int8, bitcast=True), w, acc, out_dtype=tl.int32)

    acc += tl.load(offset + o, mask=live_n, other=0)[None, :]
    place = m.to(tl.int64)[:, None] * (groups * group_out) + o[None, :]
    _finish(
        acc, tl.load(weight_scale + o, mask=live_n, other=0.0), tl.load(bias + o, mask=live_n, other=0.0), residual, out, place,
        live_m[:, None] & live_n[None, :], scale_in, residual_scale, residual_zero, out_inverse, out_zero, low, high, RESIDUAL, ROUND,
    )  # fmt: skip


@triton.autotune(configs=_DEPTHWISE, key=["bucket", "out_height", "outputs", "TAPS", "RESIDUAL", "ROUND"])
@triton.jit
def _depthwise_kernel(
    codes, weight, weight_scale, bias, residual, out,
    bucket, pixels, height, width, out_height, out_width, channels, outputs,
    stride_h, stride_w, pad_h, pad_w, step_h, step_w, zero_in,
    scale_in, residual_scale, residual_zero, out_inverse, out_zero, low, high,
    TAPS: tl.constexpr, ACROSS: tl.constexpr, RESIDUAL: tl.constexpr, ROUND: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    blocks_n = tl.cdiv(outputs, BLOCK_N)
    m = (tl.program_id(0) // blocks_n) * BLOCK_M + tl.arange(0, BLOCK_M)
    o = (tl.program_id(0) % blocks_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    live_m, live_n = m < pixels, o < outputs

    image = m // (out_height * out_width)
    inner = m % (out_height * out_width)
    top = (inner // out_width) * stride_h - pad_h
    left = (inner % out_width) * stride_w - pad_w
    base = codes + image.to(tl.int64) * (height * width * channels)
    channel = o // (outputs // channels)

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for tap in range(TAPS):
        y = top + (tap // ACROSS) * step_h
        x = left + (tap % ACROSS) * step_w
        inside = (y >= 0) & (y < height) & (x >= 0) & (x < width) & live_m
        spot = (base + (y * width + x) * channels)[:, None] + channel[None, :]
        a = tl.load(spot, mask=inside[:, None] & live_n[None, :], other=zero_in)
        w = tl.load(weight + tap * outputs + o, mask=live_n, other=0)
        acc += (a.to(tl.int32) - zero_in) * w.to(tl.int32)[None, :]

    place = m.to(tl.int64)[:, None] * outputs + o[None, :]
    _finish(
        acc, tl.load(weight_scale + o, mask=live_n, other=0.0), tl.load(bias + o, mask=live_n, other=0.0), residual, out, place,
        live_m[:, None] & live_n[None, :], scale_in, residual_scale, residual_zero, out_inverse, out_zero, low, high, RESIDUAL, ROUND,
    )  # fmt: skip


def launch(
    codes: Tensor,
    weight: Tensor,
    zeros: Tensor | None,
    weight_scale: Tensor,
    bias: Tensor,
    offset: Tensor | None,
    residual: Tensor | None,
    out: Tensor,
    window: Sequence[int],
    groups: int,
    bits: int,
    scale_in: float,
    zero_in: int,
    shifted: bool,
    residual_grid: Sequence[float] | None,
    out_grid: Sequence[float] | None,
) -> None:
    """Fill `out` with what a convolution gives; all the tensors are as `fxquant.deploy.cuda.int8_conv2d` describes them.

    Args:
        offset: None: the depthwise kernel, of weights ``[kH * kW, O]``.
        out: empty, channels last.
    """
    if not out.numel():
        return
    _, channels, height, width = codes.shape
    batch, outputs, out_height, out_width = out.shape
    kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, step_h, step_w = window
    pixels = batch * out_height * out_width
    kind = NO_RESIDUAL if residual is None else FLOAT_RESIDUAL if residual_grid is None else BYTE_RESIDUAL
    grid = out_grid or (1.0, 0.0, 0.0, 0.0)
    residual_scale, residual_zero = residual_grid or (1.0, 0.0)
    # Zero-points and limits go in as floats: an integer 1 would turn into a constant of the kernel, and compile another one.
    numbers = tuple(map(float, (scale_in, residual_scale, residual_zero, *grid)))
    shape = (triton.next_power_of_2(pixels), pixels, height, width, out_height, out_width, channels)
    steps = (stride_h, stride_w, pad_h, pad_w, step_h, step_w, zero_in)
    options = {"TAPS": kernel_h * kernel_w, "ACROSS": kernel_w, "RESIDUAL": kind, "ROUND": out_grid is not None}
    added = codes if residual is None else residual
    with torch.cuda.device(codes.device) if codes.is_cuda else nullcontext():
        if offset is None:
            _depthwise_kernel[lambda meta: (triton.cdiv(pixels, meta["BLOCK_M"]) * triton.cdiv(outputs, meta["BLOCK_N"]),)](
                codes, weight, weight_scale, bias, added, out, *shape, outputs, *steps, *numbers, **options, **OPTIONS
            )
            return
        group_in, group_out = channels // groups, outputs // groups
        row = packed_row(group_in, bits)
        _matrix_kernel[lambda meta: (triton.cdiv(pixels, meta["BLOCK_M"]) * triton.cdiv(group_out, meta["BLOCK_N"]) * groups,)](
            codes, weight, weight if zeros is None else zeros, weight_scale, bias, offset, added, out, *shape, group_in, group_out, row,
            *steps, *numbers, BITS=bits, SHIFTED=shifted, FLAT=row < _SHORT_ROW, **options, **OPTIONS,
        )  # fmt: skip


def packed_row(channels: int, bits: int) -> int:
    """Return how many bytes the channels of one tap take."""
    return -(-channels * bits // 8)
