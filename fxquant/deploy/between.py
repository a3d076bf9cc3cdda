"""What lowering asks of the operations between layers: what they join or pool, what they are on bytes, and which stay floats."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.fx import GraphModule, Node

from fxquant.deploy.bytes import ByteMaxPool2d, BytePad
from fxquant.deploy.integers import Grid
from fxquant.graph import behind, called, free_path, is_tensor, module_of, put_module
from fxquant.grids import AveragedPart, averaged_part, max_pool, zero_padding
from fxquant.kinds import QUANTIZED, kind
from fxquant.placement import is_global_pool
from fxquant.quantizers import LogQuantizer, UniformQuantizer

_NOT_COUNTED = QUANTIZED | {"view", "getitem", "input", "constant", "output"}
"""Kinds that are skipped by name where they stay floats, and those that compute nothing."""
_KEEP_ORDER = frozenset({nn.Flatten, torch.flatten, torch.reshape, "flatten", "reshape", "view", "contiguous"})
"""What gives its elements in their order in another shape; not ``squeeze``, which drops the batch axis of one image."""


def quantize_in_front_of_concats(gm: GraphModule) -> dict[Node, Grid]:
    """Move quantizers from behind concatenations onto what these join; return the concatenations, with the grids they are on then.

        conv, conv -> concat -> q        =>        conv -> q, conv -> q -> concat

    A quantizer with one grid for the tensor works element by element, so that values stay as they are, and the layers in front give bytes.
    """
    joined: dict[Node, Grid] = {}
    found = [node for node, module in called(gm) if isinstance(module, UniformQuantizer) and module.spec.axis is None]
    for quantizer in found:  # which grows: concatenations of concatenations
        concat = quantizer.all_input_nodes[0]
        if kind(concat) != "concat" or len(concat.users) > 1:
            continue
        joined[concat] = Grid.of(module_of(quantizer))  # type: ignore[arg-type]
        for part in concat.all_input_nodes:
            with gm.graph.inserting_after(part):
                found.append(gm.graph.call_module(str(quantizer.target), (part,)))
            found[-1].meta = dict(part.meta)
            concat.replace_input_with(part, found[-1])
        quantizer.replace_all_uses_with(concat)
        gm.graph.erase_node(quantizer)
    return joined


def copy_on_bytes(gm: GraphModule, node: Node, codes: Mapping[Node, Node], grid: Grid) -> Node:
    """Insert behind `node` what it does, on the bytes that `codes` has for its inputs; return the new node."""
    module: nn.Module | None = None
    if kind(node) == "max_pool":
        pooling = max_pool(node)
        assert pooling is not None
        module = ByteMaxPool2d(**pooling)
    elif kind(node) == "pad":
        padding = zero_padding(node)
        assert padding is not None
        module = BytePad(padding, grid)
    with gm.graph.inserting_after(node):
        if module is None:
            return gm.graph.node_copy(node, lambda source: codes.get(source, source))
        path = free_path(gm, f"{node.name}_bytes")
        put_module(gm, path, module)
        return gm.graph.call_module(path, (codes[node.all_input_nodes[0]],))


def pooled_bytes(layer: Node, grids: Mapping[Node, Grid]) -> tuple[Node, AveragedPart] | None:
    """Return the tensor of bytes ``[N, C, H, W]`` whose means over maps, or over a part of each, `layer` reads; None if it does not."""
    module, node = module_of(layer), layer.all_input_nodes[0]
    pointwise = isinstance(module, nn.Conv2d) and module.groups == 1 and module.kernel_size == (1, 1)
    if isinstance(module, nn.Conv2d) and not (pointwise and module.padding in ((0, 0), "same", "valid")):
        return None
    while _keeps_order(node) and is_tensor(node) and node.meta["val"].ndim == 2:
        node = node.all_input_nodes[0]
    part = averaged_part(node)
    if part is None or node.all_input_nodes[0] not in grids or layer.meta["val"].shape[2:].numel() > 1:
        return None
    source = node.all_input_nodes[0]
    channels = module.in_channels if isinstance(module, nn.Conv2d) else module.in_features
    return (source, part) if channels == source.meta["val"].shape[1] else None


def _keeps_order(node: Node) -> bool:
    """Say whether `node` gives its input in another shape, for one image as for several, element by element in the same order."""
    target = type(module_of(node)) if node.op == "call_module" else node.target
    return target in _KEEP_ORDER and len(node.all_input_nodes) == 1


def float_operations(gm: GraphModule, grids: Mapping[Node, Grid]) -> tuple[dict[str, list[str]], dict[Node, str]]:
    """Find what computes floats in a lowered graph besides layers and products, of which each is skipped by name.

    Args:
        gm: the graph; what its output does not need is not counted. What lowering made gives bytes or has no traced value.
        grids: of the tensors that are bytes.

    Returns:
        where they are, by what they compute; and with a reason those that could have worked on bytes.
    """
    modules, found, reasons = dict(called(gm)), dict[str, list[str]](), dict[Node, str]()
    needed = behind(gm.graph.output_node())
    for node in gm.graph.nodes:
        if node not in needed:
            continue
        word, module = kind(node), modules.get(node)
        if isinstance(module, UniformQuantizer | LogQuantizer) or word in _NOT_COUNTED or not is_tensor(node):
            continue
        if not node.meta["val"].is_floating_point():
            continue
        reason = _why_float(node, grids)
        if reason is not None:
            reasons[node] = reason
        else:
            named = getattr(node.target, "__name__", str(node.target)) if module is None else type(module).__name__
            found.setdefault(named if word == "other" else word, []).append(node.name if module is None else str(node.target))
    return found, reasons


def _why_float(node: Node, grids: Mapping[Node, Grid]) -> str | None:
    """Return why an operation of which some work on bytes does not, or None for any other."""
    if kind(node) == "avg_pool" and not is_global_pool(node):
        return "its means lie between bytes; those of whole maps are exact in the layer that reads them"
    if kind(node) not in ("add", "concat") or (kind(node) == "add" and len(node.all_input_nodes) < 2):
        return None
    floats = [source.name for source in node.all_input_nodes if source not in grids]
    verb = "adds" if kind(node) == "add" else "joins"
    return f"{verb} {floats[0]}, which is not quantized" if floats else "no layer in front of it gives its result in integers"
