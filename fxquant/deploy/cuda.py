"""Integer layers on CUDA devices: bytes in, bytes out, sums of int8 products on the tensor cores.

                            +--  groups == channels             depthwise kernel                        `fxquant::int8_depthwise_conv2d`
    bytes (channels last) --+--  1x1 and linear, 8-bit weights  torch._int_mm, then plain torch ops     fused by torch.compile
                            +--  the rest                       implicit matrix product                 `fxquant::int8_conv2d`

The two kernels are Triton's (`fxquant.deploy.triton_kernels` has their algebra), wrapped into operators with a shape function, so that
``torch.compile(fullgraph=True)``, CUDA graphs and ``torch.export`` take them as they take `aten` operators. Neither this module nor its
layers need Triton before the first launch. A kernel tries its block sizes when it meets a new shape: run once before a CUDA graph is
captured by hand, as ``torch.compile(mode="reduce-overhead")`` does by itself.

All routes give what `IntegerLayer.reference` gives in float32 on the CPU, bit for bit, with one exception: the plain ops behind
``torch._int_mm`` are the compiler's to contract (a product and a sum in one rounding), so a value that lies on the border of two bytes may
fall to the other side. ``torch._inductor.config.emulate_precision_casts`` forbids that, and ``int_mm=False`` sends these layers through
the kernel instead.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fxquant.deploy.cuda_ops import check, int8_conv2d, int8_depthwise_conv2d, kernels_module
from fxquant.deploy.integers import Grid, IntegerLayer, overflow
from fxquant.errors import ConfigError

# torch._int_mm on CUDA takes no fewer rows than this, and sides of whole multiples only.
_MIN_ROWS, _MULTIPLE = 17, 8


def refusal(layer: IntegerLayer, device: torch.device | str) -> str | None:
    """Say in words why `layer` cannot run on `device` as a `CudaIntegerLayer`; None: it can.

    The CPU is accepted where Triton interprets its kernels (``TRITON_INTERPRET=1``), of use for tests alone.
    """
    reason = _layer_refusal(layer)
    if reason is not None:
        return reason
    return unavailable(device)


def unavailable(device: torch.device | str = "cuda") -> str | None:
    """Say why no integer layer can run on `device`, or return None."""
    device = torch.device(device)
    if importlib.util.find_spec("triton") is None:
        return "triton, in which the kernels are written, is not installed"
    if device.type == "cpu" and kernels_module().INTERPRETED:
        return None
    if device.type != "cuda":
        return f"the kernels are for CUDA devices, and this is {device.type}"
    if not torch.cuda.is_available():
        return "CUDA is not available: no device, no driver, or a torch built without it"
    if torch.version.hip is not None:
        return "the kernels are for NVIDIA devices, and this torch is built for AMD"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"the device has compute capability {capability[0]}.{capability[1]}, and the kernels need 8.0 (Ampere) or later"
    return None


def _layer_refusal(layer: IntegerLayer) -> str | None:
    weight = layer.weight
    if weight.ndim not in (2, 4):
        return f"its weight has {weight.ndim} dimensions: only linear layers and 2-D convolutions have integer kernels"
    if weight.dtype != torch.int8:
        return f"its weight is {weight.dtype}, not int8: a code minus its zero-point leaves -128..127"
    if weight.ndim == 2 and layer.groups != 1:
        return f"it is a linear layer of {layer.groups} groups"
    if layer.groups < 1 or len(weight) % layer.groups:
        return f"{len(weight)} output channels do not divide into {layer.groups} groups"
    for grid, name in ((layer.input, "input"), (layer.output, "output")):
        if grid is not None and not 0 <= grid.low <= grid.high <= 255:
            return f"its {name} runs over {grid.low}..{grid.high}, which is not a range of bytes"
    if not 0 <= layer.input.zero_point <= 255:
        return f"the zero-point of its input, {layer.input.zero_point}, is no byte that padding could be filled with"
    return overflow(layer)


def weight_width(layer: IntegerLayer) -> int:
    """Return the fewest bits, 2, 4 or 8, that `CudaIntegerLayer` can keep the weights of `layer` in."""
    flat = layer.weight.flatten(1).long()
    span = int((flat.amax(1).clamp(min=0) - flat.amin(1).clamp(max=0)).max())
    return next(bits for bits in (2, 4, 8) if span < 2**bits)


def pack_weight(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Pack weights along their input channels, in the layout that `fxquant.deploy.triton_kernels` describes.

    Args:
        weight: int8 ``[O, I, kH, kW]``, codes minus their zero-points.
        bits: 2 or 4.

    Returns:
        uint8 ``[O, kH * kW * ceil(I * bits / 8)]``, and int8 ``[O]``: ``weight = code - zero``.

    Raises:
        ConfigError: bits is another width, or the weights of a channel (and 0) lie further apart than that width can tell.
    """
    if bits not in (2, 4):
        raise ConfigError(f"weights of {bits!r} bits cannot be packed", fix="Use 2 or 4, or keep them as int8")
    rows = weight.permute(0, 2, 3, 1).flatten(1, 2).long()
    zero = (-rows.amin((1, 2))).clamp(0, 2**bits - 1)
    codes = rows + zero[:, None, None]
    bad = ((codes < 0) | (codes >= 2**bits)).flatten(1).any(1)
    if bool(bad.any()):
        channel = int(bad.nonzero()[0])
        raise ConfigError(
            f"output channel {channel} has weights {int(rows[channel].min())}..{int(rows[channel].max())}, more than {bits} bits hold",
            fix="Ask weight_width for the width",
        )
    planes = 8 // bits
    codes = nn.functional.pad(codes, (0, -codes.shape[-1] % planes)).unflatten(-1, (planes, -1))
    shifts = bits * torch.arange(planes, device=weight.device)[:, None]
    return (codes << shifts).sum(2).flatten(1).to(torch.uint8), zero.to(torch.int8)


class CudaIntegerLayer(nn.Module):
    """An `IntegerLayer` on a CUDA device, from bytes ``[N, C, H, W]`` (channels last) or ``[..., I]`` to the same or to floats.

    Args:
        layer: what to compute.
        residual: the grid of the residual where that comes as bytes; None: it comes as floats, or not at all.
        weight_bits: 2, 4 or 8: the width the weights are stored in. Fewer bits save memory, not arithmetic: they are widened in
            registers. Depthwise weights always take 8.
        dtype: of the output, where `layer` has no output grid.
        int_mm: send 1x1 convolutions and linear layers of 8-bit weights through ``torch._int_mm`` where its conditions hold.

    Raises:
        ConfigError: no integer kernel computes `layer` (see `refusal`), or its weights do not fit into `weight_bits`.
    """

    weight: Tensor
    zeros: Tensor | None
    weight_scale: Tensor
    bias: Tensor
    offset: Tensor | None

    def __init__(
        self,
        layer: IntegerLayer,
        residual: Grid | None = None,
        weight_bits: int = 8,
        dtype: torch.dtype = torch.float32,
        int_mm: bool = True,
    ):
        super().__init__()
        reason = _layer_refusal(layer)
        if reason is not None:
            raise ConfigError(f"no integer kernel computes this layer: {reason}", fix="Run it as floats")
        if weight_bits not in (2, 4, 8):
            raise ConfigError(f"weight_bits={weight_bits!r} is not a width of packed weights", fix="Use 2, 4 or 8")
        weight = layer.weight.detach()
        weight = weight[:, :, None, None] if layer.is_linear else weight
        outputs, group_in, *kernel = weight.shape
        self.is_linear, self.groups, self.channels = layer.is_linear, layer.groups, group_in * layer.groups
        self.window = [*kernel, *layer.stride, *layer.padding, *layer.dilation]
        self.depthwise = layer.groups > 1 and group_in == 1
        self.weight_bits = 8 if self.depthwise else weight_bits
        pointwise = self.window == [1, 1, 1, 1, 0, 0, *layer.dilation] and layer.groups == 1
        self.int_mm = int_mm and pointwise and self.weight_bits == 8 and self.channels % _MULTIPLE == 0
        self.scale_in, self.zero_in, self.shifted = (
            layer.input.scale,
            layer.input.zero_point,
            max(layer.input.high, layer.input.zero_point) > 127,
        )
        self.residual_grid = None if residual is None else [residual.scale, float(residual.zero_point)]
        out = layer.output
        self.out_grid = None if out is None else [out.inverse, float(out.zero_point), float(out.low), float(out.high)]
        self.dtype = dtype if out is None else torch.uint8

        bias = torch.zeros_like(layer.scale) if layer.bias is None else layer.bias.detach()
        zeros, offset = None, None
        if self.depthwise:
            stored = weight.flatten(1).t().contiguous()
        else:
            offset = -(self.zero_in - self._shift) * weight.flatten(1).long().sum(1)
            if self.weight_bits < 8:
                stored, zeros = pack_weight(weight, self.weight_bits)
            else:
                stored = weight.permute(0, 2, 3, 1).flatten(1).contiguous()
        if self.int_mm:
            stored = nn.functional.pad(stored, (0, 0, 0, -outputs % _MULTIPLE))
        self.register_buffer("weight", stored)
        self.register_buffer("zeros", zeros)
        self.register_buffer("weight_scale", layer.scale.detach().float().clone())
        self.register_buffer("bias", bias.float().clone())
        self.register_buffer("offset", None if offset is None else offset.to(torch.int32))

    @property
    def _shift(self) -> int:
        return 128 if self.shifted else 0

    def extra_repr(self) -> str:
        """Return what ``print`` shows: the sides, the width of the weights, and the way the layer is computed."""
        route = "depthwise" if self.depthwise else "int_mm" if self.int_mm else "matrix"
        words = "linear" if self.is_linear else f"conv, window {self.window}, groups {self.groups}"
        channels = f"{self.channels} -> {len(self.weight_scale)} channels"
        return f"{words}, {channels}, {self.weight_bits} bits, {self.weight.numel():,} bytes, {route}"

    def forward(self, codes: Tensor, residual: Tensor | None = None) -> Tensor:
        """Compute the layer.

        Args:
            codes: uint8 ``[N, C, H, W]``, or ``[..., I]`` for a linear layer; images in channels last are not copied.
            residual: of the shape of the output, added in front of the rounding: bytes of the residual grid, or floats.

        Returns:
            uint8 where the layer has an output grid, else `dtype`; images in channels last.

        Raises:
            ConfigError: a tensor of another shape or type.
        """
        if self.is_linear:
            flat = codes.reshape(-1, self.channels)[:, :, None, None]
            added = None if residual is None else residual.reshape(flat.shape[0], -1)[:, :, None, None]
            return self._images(flat, added).reshape(*codes.shape[:-1], -1)
        return self._images(codes, residual)

    def _images(self, codes: Tensor, residual: Tensor | None) -> Tensor:
        if self.depthwise:
            return int8_depthwise_conv2d(
                codes, self.weight, self.weight_scale, self.bias, residual, self.window, self.scale_in, self.zero_in,
                self.residual_grid, self.out_grid, self.dtype,
            )  # fmt: skip
        if self.int_mm and statically_known_true(codes.numel() // self.channels >= _MIN_ROWS):
            return self._product(codes, residual)
        assert self.offset is not None
        return int8_conv2d(
            codes, self.weight, self.zeros, self.weight_scale, self.bias, self.offset, residual, self.window, self.groups, self.weight_bits,
            self.scale_in, self.zero_in, self.shifted, self.residual_grid, self.out_grid, self.dtype,
        )  # fmt: skip

    def _product(self, codes: Tensor, residual: Tensor | None) -> Tensor:
        assert self.offset is not None
        outputs = len(self.weight_scale)
        check(codes, residual, self.weight_scale, self.window, self.residual_grid)
        rows = codes.permute(0, 2, 3, 1)
        signed = (rows ^ 128 if self.shifted else rows).reshape(-1, self.channels).view(torch.int8)
        sums = torch._int_mm(signed, self.weight.t())[:, :outputs] + self.offset
        y = sums.float() * self.scale_in * self.weight_scale + self.bias
        if residual is not None:
            added = residual.permute(0, 2, 3, 1).reshape(-1, outputs).float()
            if self.residual_grid is not None:
                added = (added - self.residual_grid[1]) * self.residual_grid[0]
            y = y + added
        if self.out_grid is not None:
            inverse, zero, low, high = self.out_grid
            y = (y * inverse + zero).round().clamp(low, high)
        return y.to(self.dtype).view(*rows.shape[:3], outputs).permute(0, 3, 1, 2)


class CudaBackend:
    """Builds integer layers for one CUDA device; they are where the weights were that they are made of.

    Args:
        device: where they will run.
        pack: keep weights in the fewest bits that hold them, instead of in 8.
        int_mm: of `CudaIntegerLayer`.
    """

    def __init__(self, device: torch.device | str = "cuda", pack: bool = False, int_mm: bool = True):
        self.device, self.pack, self.int_mm = torch.device(device), pack, int_mm

    def refusal(self, layer: IntegerLayer, residual: Grid | None = None) -> str | None:
        """Say why `layer` cannot run on the device, or return None."""
        return refusal(layer, self.device)

    def build(self, layer: IntegerLayer, residual: Grid | None = None) -> nn.Module:
        """Return the module that computes `layer`."""
        return CudaIntegerLayer(layer, residual, weight_width(layer) if self.pack else 8, int_mm=self.int_mm)
