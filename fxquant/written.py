"""Constants that a forward writes into: what they are behind the last write."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from fxquant.graph import behind, is_impure


def written_constants(gm: GraphModule, is_repeatable: Callable[[Node], bool]) -> tuple[dict[Node, Tensor], list[Node]]:
    """Return the constants that are written into, with their values behind all writes, and the nodes that write.

        clone = bias.clone();  part = clone[4:8];  part.zero_()       =>     {clone: 1 2 3 4 0 0 0 0, part: 0 0 0 0}, [zero_]

    Only where no parameter or buffer itself is written into, where all that is written is constant too, and where everything else
    reads behind the last write.

    Args:
        gm: not changed, and neither are its parameters.
        is_repeatable: says whether a node gives the same whenever it runs on the same inputs, and leaves them alone.
    """
    order = {node: number for number, node in enumerate(gm.graph.nodes)}
    region = _region(gm, is_repeatable)
    writers = [node for node in region if _writes(node)]
    if not writers:
        return {}, []
    values = _run(gm, list(region))
    memory = {node: value.untyped_storage().data_ptr() for node, value in values.items() if isinstance(value, Tensor)}
    held = {memory[node] for node in region if node.op == "get_attr" and node in memory}
    found, done = dict[Node, Tensor](), list[Node]()
    for place in dict.fromkeys(memory[node.all_input_nodes[0]] for node in writers):
        group = [node for node in region if memory.get(node) == place]
        writing = [node for node in writers if memory[node.all_input_nodes[0]] == place]
        readers = {user for node in group for user in node.users} - {*group, *writing}
        if place not in held and all(order[user] > order[writing[-1]] for user in readers):
            found |= {node: values[node] for node in group}
            done += writing
    return found, done


def _region(gm: GraphModule, is_repeatable: Callable[[Node], bool], spoiled: frozenset[Node] = frozenset()) -> dict[Node, None]:
    """Return what depends on parameters and buffers alone, writes too, in order, but for what is `spoiled`."""
    region: dict[Node, None] = {}
    for node in gm.graph.nodes:
        known = bool(node.all_input_nodes) and all(parent in region for parent in node.all_input_nodes)
        if node not in spoiled and (node.op == "get_attr" or (known and (is_repeatable(node) or _writes(node)))):
            region[node] = None
        elif is_impure(node) and node.op != "output" and node.all_input_nodes and node.all_input_nodes[0] in region:
            # Something unknown is written here, and what is written into may be a view of anything behind it.
            return _region(gm, is_repeatable, spoiled.union(behind(node.all_input_nodes[0])))
    return region


def _writes(node: Node) -> bool:
    return node.op in ("call_function", "call_method") and is_impure(node) and bool(node.args) and isinstance(node.args[0], Node)


@torch.no_grad()
def _run(gm: GraphModule, nodes: list[Node]) -> dict[Node, Any]:
    """Run `nodes` in order, on a copy of the parameters."""
    interpreter = Interpreter(copy.deepcopy(gm))
    for node in nodes:
        interpreter.env[node] = interpreter.run_node(node)
    return interpreter.env
