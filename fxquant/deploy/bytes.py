"""Where a lowered graph enters the bytes and leaves them; plain ops, which a compiler fuses with what is around."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

from fxquant.deploy.integers import Grid
from fxquant.errors import ModelError
from fxquant.graph import free_path, insert_behind, is_tensor, put_module


class _Boundary(nn.Module):
    def __init__(self, grid: Grid):
        super().__init__()
        self.grid = grid

    def extra_repr(self) -> str:
        return str(self.grid)


class Quantize(_Boundary):
    """Float tensors to bytes on `grid`, rounded as in the simulation."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the bytes, uint8, of the shape of x."""
        return self.grid.quantize(x)


class Dequantize(_Boundary):
    """Bytes to the float32 values that they stand for."""

    def forward(self, codes: Tensor) -> Tensor:
        """Return float32 of the shape of the bytes."""
        return self.grid.dequantize(codes)


class ByteMaxPool2d(nn.MaxPool2d):
    """Max pooling of bytes. Eager mode has none for maps of bytes in channels-last order, so there they are pooled as floats."""

    def forward(self, input: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return super().forward(input)
        return super().forward(input.float()).to(torch.uint8)


class BytePad(nn.Module):
    """Padding with the byte that stands for the real number 0."""

    def __init__(self, padding: tuple[int, ...], grid: Grid):
        super().__init__()
        self.padding, self.zero_point = padding, grid.zero_point

    def forward(self, codes: Tensor) -> Tensor:
        return F.pad(codes, self.padding, value=self.zero_point)


class ToFloat32(nn.Module):
    """The network's input in float32, which everything behind it was made for; half precision images are taken as well.

    Integer kernels say little of a tensor that they cannot take, so this looks at the images first.

    Args:
        channels: of the images.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels

    def forward(self, images: Tensor) -> Tensor:
        """Return images ``[N, channels, H, W]`` in float32.

        Raises:
            ModelError: images of another form.
        """
        if images.ndim != 4 or images.shape[1] != self.channels or not images.is_floating_point():
            if torch.compiler.is_compiling():  # what compiles cannot make the error below, but shows the words of this one
                raise ValueError(f"images are of shape {list(images.shape)}, and the network takes floats [N, {self.channels}, H, W]")
            raise ModelError(
                f"are {str(images.dtype).removeprefix('torch.')} of shape {list(images.shape)}",
                where="images",
                fix=f"Pass a batch of normalized images, floats [N, {self.channels}, H, W]",
            )
        return images.float()

    def extra_repr(self) -> str:
        return f"channels={self.channels}"


def cast_images(gm: GraphModule) -> None:
    """Let `gm` take images in half precision, which become float32 before anything else, and refuse what are no images by name."""
    for node in gm.graph.find_nodes(op="placeholder"):
        if is_tensor(node) and node.users:
            path = free_path(gm, "to_float32")
            put_module(gm, path, ToFloat32(int(node.meta["val"].shape[1])))
            insert_behind(node, path)
    gm.recompile()
