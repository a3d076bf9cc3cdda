"""Run a graph over the calibration images one node at a time: every value is computed once, and dropped behind its last reader.

    images -> node 1 -> node 2 -> ...        each over *all* batches before the next one starts

So a pass can change a layer on the way, and everything behind it sees the change, at the price of one forward pass in total.
(Empirical bias correction done layer by layer from the image costs a forward pass a layer.)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.node import map_arg

from fxquant.kinds import kind

_VIEWS = frozenset({"view", "getitem"})

BATCH = 64
"""Images in a forward pass where nothing else decides it."""
LARGEST_VALUE = 2**24
"""Bytes that the largest value of a graph may take, for all images of a batch, when it runs on a CPU."""

Values = list[Any]
"""The value of one node, batch by batch."""


def sweep(gm: GraphModule, batches: Sequence[Tensor]) -> Iterator[tuple[Node, Values]]:
    """Run `gm` over `batches` node by node, without gradients, and yield each node with its values.

    What the caller writes into the list of values is what later nodes read; a module may be replaced before its node is reached. Two
    sweeps over graphs with the same layers can go side by side.

    Args:
        gm: a graph with one input.
        batches: images ``[N, C, H, W]``, on the device of `gm`.
    """
    drops: dict[Node, list[Node]] = {}
    for parent, reader in last_readers(gm).items():
        drops.setdefault(reader, []).append(parent)
    interpreter = Interpreter(gm)
    values: dict[Node, Values] = {}
    for node in gm.graph.nodes:
        with torch.no_grad():
            values[node] = [_run(interpreter, node, values, index, batch) for index, batch in enumerate(batches)]
        yield node, values[node]
        for parent in drops.get(node, []):
            del values[parent]
        if not node.users:
            del values[node]


def last_readers(gm: GraphModule) -> dict[Node, Node]:
    """Return the node behind which each value is not needed any more."""
    return {parent: node for node in gm.graph.nodes for parent in node.all_input_nodes}


def _run(interpreter: Interpreter, node: Node, values: dict[Node, Values], index: int, batch: Tensor) -> Any:
    if node.op == "placeholder":
        return batch
    args = map_arg(node.args, lambda parent: values[parent][index])
    kwargs = map_arg(node.kwargs, lambda parent: values[parent][index])
    return getattr(interpreter, node.op)(node.target, args, kwargs)


def peak_bytes(gm: GraphModule) -> float:
    """Return the most bytes of activations per image that `sweep` holds at once, from the traced shapes."""
    last = last_readers(gm)
    for node in reversed(gm.graph.nodes):  # a value lives as long as the views of it
        if kind(node) in _VIEWS and node in last:
            for parent in node.all_input_nodes:
                last[parent] = max(last[parent], last[node])
    live = peak = 0.0
    dropped: dict[Node, float] = {}
    for node in gm.graph.nodes:
        live += bytes_per_image(node)
        peak = max(peak, live)
        dropped[last.get(node, node)] = dropped.get(last.get(node, node), 0.0) + bytes_per_image(node)
        live -= dropped.get(node, 0.0)
    return peak


def images_at_once(nodes: Iterable[Node], device: torch.device, most: int = BATCH, weights: float = 0) -> int:
    """Return how many images to run through `nodes` of a traced graph together: `most`, on a CPU fewer where `LARGEST_VALUE` asks for it.

    Larger values leave the caches, and the C library maps them from the system and gives them back for every operation, which can cost
    more than the operation.

    Args:
        weights: bytes of what is computed anew for each such part of a batch; the values of a part take as many, at least.
    """
    sizes = [copied_bytes_per_image(node) for node in nodes if node.op not in ("get_attr", "output")]
    if device.type != "cpu" or not any(sizes):
        return most
    return max(1, min(most, max(int(LARGEST_VALUE / max(sizes)), math.ceil(weights / sum(sizes)))))


def bytes_per_image(node: Node) -> float:
    """Return the bytes that the traced value of `node` adds for one image (0 for views, sizes and constants).

    Sizes that depend on the batch (windows of an image counted into the batch axis) are taken in proportion to it.
    """
    return 0 if kind(node) in _VIEWS | {"constant", "output"} else copied_bytes_per_image(node)


def copied_bytes_per_image(node: Node) -> float:
    """Return the bytes that a copy of the traced value of `node` takes for one image (0 for what is no tensor)."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return 0
    image = next(other for other in node.graph.nodes if other.op == "placeholder").meta["val"]
    return value.element_size() * math.prod(_hint(size) for size in value.shape) / _hint(image.shape[0])


def _hint(size: Any) -> int:
    return size if isinstance(size, int) else size.node.hint
