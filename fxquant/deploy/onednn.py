"""Integer layers on x86 through oneDNN: int8 convolutions and matrix products, weights packed once.

All of a layer is one call. What cuts bytes to fewer than 8 bits happens in the real domain, in front of the rounding (``hardtanh``), or,
where a residual is added, on the bytes: oneDNN itself only saturates at 0 and 255, so 2-bit codes would become 4, 5, 6 (which is what fused
quantize and dequantize patterns silently give).
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node

from fxquant.deploy.integers import Grid, IntegerLayer


@torch.library.custom_op("fxquant::qconv_add", mutates_args=())
def qconv_add(
    codes: Tensor,
    codes_scale: float,
    codes_zero_point: int,
    packed: Tensor,
    scale: Tensor,
    zeros: Tensor,
    residual: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    output_scale: float,
    output_zero_point: int,
    residual_scale: float,
    residual_zero_point: int,
) -> Tensor:
    """Return the bytes of a convolution plus a residual; oneDNN writes them over the residual, so here over a copy of it."""
    owned = residual.clone(memory_format=torch.channels_last)
    shape = (stride, padding, dilation, groups, output_scale, output_zero_point, torch.uint8, residual_scale, residual_zero_point)
    given = (codes, codes_scale, codes_zero_point, packed, scale, zeros, owned, bias)
    torch.ops.onednn.qconv2d_pointwise.binary(*given, *shape, "sum", 1.0, "none", [], "")
    return owned


@qconv_add.register_fake
def _(*arguments: Any, **named: Any) -> Tensor:
    return torch.empty_like(arguments[6], memory_format=torch.channels_last)


def add_in_place(graph: Graph) -> None:
    """Let `qconv_add` write over its residual in the graph of a compiler: no copy, and no call from Python.

    Where the residual is a view, has views, or is read later, it stays as it is.
    """
    order = {node: place for place, node in enumerate(graph.nodes)}
    for node in graph.find_nodes(op="call_function", target=torch.ops.fxquant.qconv_add.default):
        *given, residual_scale, residual_zero_point = node.args
        residual = given[6]
        assert isinstance(residual, Node)
        shared = residual.op != "call_function" or given[0] is residual or any(map(_is_view, [residual, *residual.users]))
        if shared or any(order[user] > order[node] for user in residual.users):
            continue
        added: tuple[Any, ...] = (torch.uint8, residual_scale, residual_zero_point, "sum", 1.0, "none", [], "")
        with graph.inserting_before(node):
            new = graph.call_function(torch.ops.onednn.qconv2d_pointwise.binary, (*given, *added))
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
        order[new] = order[node]


def _is_view(node: Node) -> bool:
    if isinstance(node.target, torch._ops.OpOverload):
        return any(value.alias_info is not None for value in node.target._schema.returns)
    return node.target is operator.getitem and _is_view(node.args[0])  # type: ignore[arg-type]


class OneDnnProduct(nn.Module):
    """What a layer of bytes computes, in one call (two where a sum is cut).

    Args:
        layer: the layer.
        residual: the grid of bytes that are added in front of the rounding.
    """

    packed: Tensor
    scale: Tensor
    zeros: Tensor
    bias: Tensor | None

    def __init__(self, layer: IntegerLayer, residual: Grid | None = None):
        super().__init__()
        self.input, self.output, self.residual, self.is_linear = layer.input, layer.output, residual, layer.is_linear
        self.geometry = [list(layer.stride), list(layer.padding), list(layer.dilation), layer.groups]
        # Without the shape of what comes in, oneDNN packs for another one, and then repacks at every call: up to 50 times slower.
        shape = None if layer.shape is None else [1, *layer.shape]
        if layer.is_linear:
            packed = torch.ops.onednn.qlinear_prepack(layer.weight.contiguous(), shape and [1, shape[-1]])
        else:
            given = (layer.weight.contiguous(), layer.scale, layer.input.scale, layer.input.zero_point)
            packed = torch.ops.onednn.qconv_prepack(*given, *self.geometry, shape)
        self.register_buffer("packed", packed)
        self.register_buffer("scale", layer.scale)
        self.register_buffer("zeros", torch.zeros(len(layer.weight), dtype=torch.int32, device="cpu"))
        self.register_buffer("bias", layer.bias)

    def forward(self, codes: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return bytes on the grid of the output, or float32 where there is none."""
        ops, out = torch.ops.onednn, self.output
        given = (codes, self.input.scale, self.input.zero_point, self.packed, self.scale, self.zeros)
        kind: tuple[Any, ...] = (1.0, 0, torch.float32) if out is None else (out.scale, out.zero_point, torch.uint8)
        if residual is not None:
            assert out is not None and self.residual is not None
            grid = self.residual
            y = qconv_add(*given, residual, self.bias, *self.geometry, out.scale, out.zero_point, grid.scale, grid.zero_point)
            return y if (out.low, out.high) == (0, 255) else y.clamp(out.low, out.high)
        cut: tuple[Any, ...] = ("none", [], "")
        if out is not None and (out.low, out.high) != (0, 255):
            cut = ("hardtanh", [(end - out.zero_point) * out.scale for end in (out.low, out.high)], "")
        if self.is_linear:
            return ops.qlinear_pointwise(*given, self.bias, *kind, *cut)
        return ops.qconv_pointwise(*given, self.bias, *self.geometry, *kind, *cut)

    def __deepcopy__(self, memo: dict[int, Any]) -> OneDnnProduct:
        return self  # a packed weight cannot be copied, and nothing here ever changes
