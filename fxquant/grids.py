"""Which tensors lie on a grid of quantized values: those behind a quantizer, and what only moves their values.

    quantizer -> max_pool -> flatten -> linear          all three tensors are multiples of the quantizer's scale

The walk is that of integer execution, so a view for which torch has no kernel on bytes ends it, in the simulation as well. And what an
integer layer can do besides its products, in front of its rounding: cut to an interval, and add a tensor of the same shape.
"""

from __future__ import annotations

from collections.abc import Mapping
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
    names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
    if node.op == "call_module":
        module = module_of(node)
        if type(module) is not nn.MaxPool2d:
            return None
        given = {name: getattr(module, name) for name in names}
    elif node.target in (F.max_pool2d, torch.max_pool2d) and len(node.all_input_nodes) == 1:
        defaults = {"stride": None, "padding": 0, "dilation": 1, "ceil_mode": False, "return_indices": False}
        given = {name: argument(node, place + 1, name, defaults.get(name)) for place, name in enumerate(names)}
    else:
        return None
    return None if given["return_indices"] else given


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
