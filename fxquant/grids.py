"""Which tensors lie on a grid of quantized values: those behind a quantizer, and what only moves their values.

    quantizer -> max_pool -> flatten -> linear          all three tensors are multiples of the quantizer's scale

The walk is that of integer execution, so a view for which torch has no kernel on bytes ends it, in the simulation as well. And what an
integer layer can do besides its products: read means of maps (`averaged_part`) and, in front of its rounding, cut to an interval and add a
tensor of the same shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule, Node

from fxquant.graph import argument, is_tensor, module_of
from fxquant.kinds import kind

T = TypeVar("T")

_NOT_FOR_BYTES = (nn.ChannelShuffle, nn.PixelUnshuffle, torch.channel_shuffle, F.pixel_unshuffle)
"""Views that torch does not have for bytes."""


def carried_grids(gm: GraphModule, grids: Mapping[Node, T]) -> dict[Node, T]:
    """Return the grid of every node whose values are on one: the quantizers given, and all that only moves their values."""
    carried = dict(grids)
    for node in gm.graph.nodes:
        if node not in carried and _moves_bytes(node) and node.all_input_nodes[0] in carried:
            carried[node] = carried[node.all_input_nodes[0]]
    return carried


def _moves_bytes(node: Node) -> bool:
    """Say whether `node` moves the values of its first input without changing them, and can do so with bytes."""
    word = kind(node)
    target = type(module_of(node)) if node.op == "call_module" else node.target
    if target in _NOT_FOR_BYTES or not node.all_input_nodes:
        return False
    pool, padding = word == "max_pool" and max_pool(node) is not None, word == "pad" and zero_padding(node) is not None
    return word in ("view", "getitem") or pool or padding


def max_pool(node: Node) -> dict[str, Any] | None:
    """Return the arguments of the ``nn.MaxPool2d`` that `node` computes, or None for anything else."""
    defaults = {"kernel_size": None, "stride": None, "padding": 0, "dilation": 1, "ceil_mode": False, "return_indices": False}
    given = _pool(node, nn.MaxPool2d, (F.max_pool2d, torch.max_pool2d), defaults)
    return None if given is None or given["return_indices"] else given


@dataclass(frozen=True)
class AveragedPart:
    """What part of each map a pool averages to its only value.

    Attributes:
        size: of the window in the corner; None: all of the map, whatever its size.
        largest: the largest map for which a pool with that window gives one value.
    """

    size: tuple[int, int] | None = None
    largest: tuple[int, int] | None = None


def averaged_part(node: Node) -> AveragedPart | None:
    """Return what part of each map of ``[N, C, H, W]`` `node` averages, where it gives one value a map.

    None for anything else, as a pool that counts padding or divides by a number of its own.
    """
    parent = node.args[0] if node.args else None
    if not isinstance(parent, Node) or not is_tensor(parent) or not is_tensor(node) or parent.meta["val"].ndim != 4:
        return None
    if node.meta["val"].shape[2:].numel() != 1:
        return None
    if kind(node) == "mean":
        axes = argument(node, 1, "dim", ())
        over_maps = isinstance(axes, list | tuple) and sorted(axis % 4 for axis in axes if isinstance(axis, int)) == [2, 3]
        return AveragedPart() if over_maps else None
    adaptive = _pool(node, nn.AdaptiveAvgPool2d, (F.adaptive_avg_pool2d,), {"output_size": None})
    if adaptive is not None:
        return AveragedPart() if _pair(adaptive["output_size"]) == (1, 1) else None
    defaults = {"kernel_size": None, "stride": None, "padding": 0, "ceil_mode": False, "count_include_pad": True, "divisor_override": None}
    given = _pool(node, nn.AvgPool2d, (F.avg_pool2d,), defaults)
    if given is None or given["ceil_mode"] or given["divisor_override"] is not None or _pair(given["padding"]) != (0, 0):
        return None
    size = _pair(given["kernel_size"])
    stride = _pair(given["stride"]) if given["stride"] else size
    if not all(isinstance(number, int) for number in (*size, *stride)):
        return None
    return AveragedPart(size, (size[0] + stride[0] - 1, size[1] + stride[1] - 1))


def _pool(node: Node, module_type: type[nn.Module], functions: tuple[Any, ...], defaults: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the arguments of a pool, however it is spelled, or None for anything else."""
    if node.op == "call_module":
        module = module_of(node)
        return {name: getattr(module, name) for name in defaults} if type(module) is module_type else None
    if node.target not in functions or len(node.all_input_nodes) != 1:
        return None
    return {name: argument(node, place, name, default) for place, (name, default) in enumerate(defaults.items(), 1)}


def _pair(size: Any) -> tuple[Any, Any]:
    """Return the size for both axes of a map, which may be given as one number, or as a sequence of one."""
    sizes = tuple(size) if isinstance(size, list | tuple) else (size,)
    return sizes[0], sizes[-1]


def zero_padding(node: Node) -> tuple[int, ...] | None:
    """Return the widths by which `node` pads with zeros, or None for other paddings and for widths that follow from the images."""
    if node.op == "call_module":
        module = module_of(node)
        padding: Any = module.padding
        mode, value = "constant", getattr(module, "value", 0)
    else:
        padding, mode = argument(node, 1, "pad"), argument(node, 2, "mode", "constant")
        value = argument(node, 3, "value", 0)
    static = isinstance(padding, list | tuple) and all(isinstance(side, int) for side in padding)
    return tuple(padding) if static and mode == "constant" and not value else None


def cut_of(node: Node) -> tuple[float, float] | None:
    """Return the ends that an activation cuts its input to, or None when it does anything else."""
    word = kind(node)
    if word == "relu":
        return 0.0, float("inf")
    if word == "relu6":
        return 0.0, 6.0
    if word == "hardtanh":
        if node.op == "call_module":
            module = module_of(node)
            return float(module.min_val), float(module.max_val)  # type: ignore[arg-type]
        ends = argument(node, 1, "min_val", -1.0), argument(node, 2, "max_val", 1.0)
        return (float(ends[0]), float(ends[1])) if all(isinstance(end, int | float) for end in ends) else None
    return None


def terms_of(node: Node) -> tuple[Node, ...]:
    """Return the two tensors of one shape that `node` adds, or nothing."""
    if kind(node) != "add" or len(node.args) != 2 or argument(node, 2, "alpha", 1) != 1:
        return ()
    terms = [term for term in node.args if isinstance(term, Node) and is_tensor(term) and is_tensor(node)]
    shapes = [tuple(term.meta["val"].shape[1:]) for term in [*terms, node] if "val" in term.meta]
    return tuple(terms) if len(terms) == 2 and shapes[0] == shapes[1] == shapes[2] else ()
