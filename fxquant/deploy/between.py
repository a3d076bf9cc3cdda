"""What lowering asks of the operations between layers: what they join or pool, what they are on bytes, and which stay floats."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from torch import nn
from torch.fx import GraphModule, Node

from fxquant.deploy.bytes import ByteMaxPool2d, BytePad
from fxquant.deploy.integers import Grid
from fxquant.graph import argument, behind, called, free_path, is_tensor, module_of, put_module
from fxquant.grids import max_pool, zero_padding
from fxquant.kinds import QUANTIZED, kind
from fxquant.placement import is_global_pool
from fxquant.quantizers import LogQuantizer, UniformQuantizer

_NOT_COUNTED = QUANTIZED | {"view", "getitem", "input", "constant", "output"}
"""Kinds that are skipped by name where they stay floats, and those that compute nothing."""


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


def pooled_bytes(layer: Node, grids: Mapping[Node, Grid]) -> Node | None:
    """Return the tensor of bytes ``[N, C, H, W]`` whose means over the maps are what `layer` reads, or None."""
    node = layer.all_input_nodes[0]
    while kind(node) == "view" and len(node.all_input_nodes) == 1 and is_tensor(node) and node.meta["val"].ndim == 2:
        node = node.all_input_nodes[0]
    if kind(node) not in ("avg_pool", "mean") or not is_global_pool(node) or not node.all_input_nodes:
        return None
    source = node.all_input_nodes[0]
    if source not in grids or source.meta["val"].ndim != 4 or not _is_over_maps(node):
        return None
    return source if layer.meta["val"].ndim in (2, 4) and layer.meta["val"].shape[2:].numel() == 1 else None


def _is_over_maps(node: Node) -> bool:
    if kind(node) == "avg_pool":
        return True
    axes = argument(node, 1, "dim", ())
    return isinstance(axes, list | tuple) and sorted(axis % 4 for axis in axes if isinstance(axis, int)) == [2, 3]


def float_operations(gm: GraphModule, grids: Mapping[Node, Grid]) -> tuple[Counter[str], dict[Node, str]]:
    """Find what computes floats in a lowered graph besides layers and products, of which each is skipped by name.

    Args:
        gm: the graph; what its output does not need is not counted. What lowering made gives bytes or has no traced value.
        grids: of the tensors that are bytes.

    Returns:
        how many there are by name, and with a reason those that could have worked on bytes.
    """
    modules, found, reasons = dict(called(gm)), Counter[str](), dict[Node, str]()
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
            found[named if word == "other" else word] += 1
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
