"""Which nodes of a graph belong together: the search behind `fxquant.units`.

`Flow` says which tensors matter. A *solid* node makes a value of its own from the images; a *free* one follows from constants and the
batch size alone (a position bias, a size), so every region can compute it for itself and it never ties two regions together.

`Partition` starts with one region a node and only ever joins regions. Whatever was joined on the way, `Partition.close` makes the
result valid: a tensor that is no stack of images (a tuple, windows counted into the batch axis, indices, masks) is not cut, writes stay
beside what they write into, and regions that read each other in a circle become one.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from fxquant.graph import is_impure
from fxquant.kinds import QUANTIZED, WEIGHTED, kind
from fxquant.tracing.values import SizeNodes, expression, leaves, rows_of

MOVERS = frozenset({"view", "getitem", "getattr", "pad", "max_pool", "avg_pool", "mean", "interpolate", "dropout", "concat"})
"""Kinds that move or pool values: no activation, and no place to end a layer behind."""

VIEWS = frozenset({"view", "getitem"})


class Flow:
    """The tensors of a traced graph, read once.

    Attributes:
        nodes: what the graph computes, in order: all but placeholders, constants, the output and the dataclass that it may be.
        solid: those that make a value from the images.
        layers: the solid ones that call a module which owns a weight.
    """

    def __init__(self, gm: GraphModule):
        self.ordered = list(gm.graph.nodes)
        self.position = {node: index for index, node in enumerate(self.ordered)}
        self.nodes = [node for node in self.ordered if node.op not in ("placeholder", "get_attr", "output") and not is_dataclass_made(node)]
        self.kinds = {node: kind(node) for node in self.nodes}
        self.images = next(node for node in gm.graph.nodes if node.op == "placeholder")
        self.layers = {node for node in self.nodes if node.op == "call_module" and self.kinds[node] in WEIGHTED}
        self.writers = [node for node in self.nodes if is_impure(node)]
        bound = {*self.layers, *self.writers, *(other for node in self.writers for other in node.all_input_nodes)}
        self.free: set[Node] = set()
        for node in self.nodes:
            if node not in bound and self._is_free(node):
                self.free.add(node)
        self.solid = [node for node in self.nodes if node not in self.free]
        self._tensors = {node: [other for other in node.all_input_nodes if self._is_tensor(other)] for node in self.solid}
        self._readers: dict[Node, list[Node]] = {}
        for node, tensors in self._tensors.items():
            for tensor in tensors:
                self._readers.setdefault(tensor, []).append(node)

    def _is_free(self, node: Node) -> bool:
        if "val" not in node.meta:
            return False
        if is_number(node):
            return self._can_be_rebuilt(node)
        return all(other.op == "get_attr" or other in self.free for other in node.all_input_nodes)

    def _can_be_rebuilt(self, node: Node) -> bool:
        graph = Graph()
        image = graph.placeholder("image")
        image.meta = dict(self.images.meta)
        try:
            rebuild(node.meta["val"], image)
        except NotImplementedError:
            return False
        return True

    def _is_tensor(self, node: Node) -> bool:
        return node.op != "get_attr" and node not in self.free

    def tensors(self, node: Node) -> list[Node]:
        """Return the solid nodes and placeholders that a solid `node` reads."""
        return self._tensors[node]

    def readers(self, node: Node) -> list[Node]:
        """Return the solid nodes that read a solid node or placeholder, in graph order."""
        return self._readers.get(node, [])

    def inputs(self, nodes: Iterable[Node]) -> list[Node]:
        """Return the nodes outside of `nodes` whose tensors they read, in graph order."""
        inside = set(nodes)
        found = {tensor for node in inside - self.free for tensor in self.tensors(node)} - inside
        return sorted(found, key=self.position.__getitem__)

    def outputs(self, nodes: Iterable[Node]) -> list[Node]:
        """Return those of `nodes` that are read outside of them or returned by the network, in graph order."""
        inside = set(nodes)
        read = {node for node in inside - self.free if not inside.issuperset(self.readers(node)) or is_returned(node)}
        return sorted(read, key=self.position.__getitem__)

    def is_stack(self, node: Node) -> bool:
        """Say whether the value of `node` is one tensor of floats (or complex numbers) with one row an image."""
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or value.ndim == 0 or not isinstance(value.shape[0], torch.SymInt):
            return False
        return (value.is_floating_point() or value.is_complex()) and rows_of(value) == rows_of(self.images.meta["val"])

    def is_soft(self, node: Node) -> bool:
        """Say whether `node` keeps the shape of what it reads and has no weight: an activation, a norm, arithmetic."""
        value = node.meta.get("val")
        if node in self.layers or self.kinds[node] in MOVERS | QUANTIZED or not isinstance(value, Tensor) or not self.tensors(node):
            return False
        shapes = [other.meta["val"].shape for other in self.tensors(node) if isinstance(other.meta.get("val"), Tensor)]
        return len(shapes) == len(self.tensors(node)) and all(_sizes(shape) == _sizes(value.shape) for shape in shapes)

    def behind_a_layer(self) -> set[Node]:
        """Return the solid nodes that are computed from a layer's output."""
        found: set[Node] = set()
        for node in self.solid:
            if any(other in found or other in self.layers for other in self.tensors(node)):
                found.add(node)
        return found


def is_number(node: Node) -> bool:
    """Say whether the value of `node` holds no tensor: a size, a shape, a dtype."""
    return "val" in node.meta and not any(isinstance(leaf, Tensor) for leaf in leaves(node.meta["val"]))


def is_returned(node: Node) -> bool:
    """Say whether the network's output reads `node`, itself or in a dataclass."""
    return any(reader.op == "output" or is_dataclass_made(reader) for reader in node.users)


def is_dataclass_made(node: Node) -> bool:
    """Say whether `node` makes the dataclass that the network returns, or a part of it, which torch.fx writes as a call: this is the form
    of the output, not a value."""
    makes = node.op == "call_function" and isinstance(node.target, type) and dataclasses.is_dataclass(node.target)
    return makes and all(reader.op == "output" or is_dataclass_made(reader) for reader in node.users)


def rebuild(value: object, source: Node) -> object:
    """Append nodes that compute `value`, numbers that depend on the batch size, from the size of the tensor `source`; return them."""
    if isinstance(value, tuple | list):
        return tuple(rebuild(item, source) for item in value)
    if isinstance(value, torch.SymBool):
        raise NotImplementedError("a truth value that depends on the batch size")
    if not isinstance(value, torch.SymInt | torch.SymFloat):
        return value

    def emit(op: str, target: object, args: tuple, result: object) -> Node:
        node = source.graph.create_node(op, target, args, name="images")  # type: ignore[arg-type]
        node.meta["val"] = result
        return node

    return SizeNodes(emit).number(value, source)


def _sizes(shape: Iterable[object]) -> list[object]:
    return [expression(size) if isinstance(size, torch.SymInt) else size for size in shape]


@dataclass(eq=False)
class Scope:
    """One call of a module: its path, its class and the solid nodes that ran inside of it."""

    path: str
    cls: object
    parent: Scope | None
    nodes: list[Node] = field(default_factory=list)
    own: list[Node] = field(default_factory=list)
    children: list[Scope] = field(default_factory=list)


def scopes(flow: Flow) -> Scope:
    """Return the tree of module calls, from what tracing noted on the nodes."""
    root = Scope("", None, None)
    found: dict[str, Scope] = {"": root}
    for node in flow.solid:
        scope = root
        root.nodes.append(node)
        for key, (_, cls) in (node.meta.get("nn_module_stack") or {}).items():
            if key and key not in found:
                found[key] = Scope(key, cls, scope)
                scope.children.append(found[key])
            scope = found[key]
            if key:
                scope.nodes.append(node)
        scope.own.append(node)
    return root


def inside(scope: Scope) -> Iterator[Scope]:
    """Yield all module calls below `scope`, outer ones first."""
    for child in scope.children:
        yield child
        yield from inside(child)


class Partition:
    """The regions of a graph: disjoint sets of solid nodes that can only grow together."""

    def __init__(self, flow: Flow):
        self.flow = flow
        self.taken: set[Node] = set()
        self._region = {node: [node] for node in flow.solid}

    def join(self, nodes: Iterable[Node]) -> None:
        """Make one region of the regions that hold `nodes`."""
        regions = {id(self._region[node]): self._region[node] for node in nodes}
        union = sorted({node for region in regions.values() for node in region}, key=self.flow.position.__getitem__)
        for node in union:
            self._region[node] = union

    def take(self, nodes: Iterable[Node]) -> None:
        """Join `nodes` and keep later regions from absorbing them."""
        nodes = list(nodes)
        self.join(nodes)
        self.taken.update(nodes)

    def region(self, node: Node) -> list[Node]:
        """Return the nodes of the region that holds `node`, in graph order."""
        return self._region[node]

    def absorb_behind(self, last: Node) -> None:
        """Add the activations and norms behind `last` to its region, as far as the region still ends in one tensor."""
        flow, tail, done = self.flow, [last], 1
        at = flow.position[last] + 1
        while not is_returned(tail[-1]) and any(flow.position[reader] >= at for node in tail for reader in flow.readers(node)):
            node, at = flow.ordered[at], at + 1
            if node in self._region and node not in self.taken and flow.is_soft(node) and set(flow.tensors(node)) <= set(tail):
                tail.append(node)
                done = len(tail) if flow.outputs(tail) == [node] else done
        self.take(tail[:done])

    def absorb_before(self, nodes: list[Node]) -> None:
        """Add the norms and activations that only `nodes` read, with views between, to their region."""
        run: list[Node] = []
        while len(before := self.flow.inputs([*nodes, *run])) == 1:
            node = before[0]
            if node.op == "placeholder" or node in self.taken or len(self.flow.tensors(node)) != 1 or is_returned(node):
                break
            if not (self.flow.is_soft(node) or self.flow.kinds[node] in VIEWS) or not {*nodes, *run}.issuperset(self.flow.readers(node)):
                break
            run.append(node)
        if any(self.flow.is_soft(node) for node in run):
            self.take([*nodes, *run])

    def close(self) -> list[list[Node]]:
        """Join what cannot be apart; return the regions in an order in which each reads only earlier ones."""
        for node in self.flow.solid:
            if not self.flow.is_stack(node):
                self.join([node, *self.flow.readers(node)])
        for writer in self.flow.writers:
            self.join(self._touched(writer))
        while True:
            order, waiting = self._sorted()
            if not waiting:
                break
            self.join(node for region in _circle(waiting) for node in region)
        for one, other in pairwise(order):
            if not self.flow.layers.intersection(one) and not self.flow.layers.intersection(other):
                self.join([one[0], other[0]])
        return list({id(self._region[region[0]]): self._region[region[0]] for region in order}.values())

    def _touched(self, writer: Node) -> list[Node]:
        """Return the nodes that may see what `writer` writes: all that read the same storage, through views too."""
        base = next((other for other in writer.all_input_nodes if other not in self.flow.free), writer)
        while self.flow.kinds.get(base) in VIEWS and self.flow.tensors(base):
            base = self.flow.tensors(base)[0]
        found, todo = [writer], [base]
        while todo:
            node = todo.pop()
            if node in self._region:
                found.append(node)
            todo += [r for r in self.flow.readers(node) if r not in found and (node is base or self.flow.kinds[node] in VIEWS)]
        return found

    def _sorted(self) -> tuple[list[list[Node]], dict[int, list[list[Node]]]]:
        """Return the regions in order, and those that wait for each other with what they wait for."""
        regions = {id(region): region for region in self._region.values()}
        reads: dict[int, set[int]] = {}
        for key, region in regions.items():
            reads[key] = {id(self._region[node]) for node in self.flow.inputs(region) if node in self._region}
        read_by: dict[int, list[int]] = {}
        for key, others in reads.items():
            for other in others:
                read_by.setdefault(other, []).append(key)
        ready = [(self.flow.position[regions[key][0]], key) for key, others in reads.items() if not others]
        heapq.heapify(ready)
        order = []
        while ready:
            _, key = heapq.heappop(ready)
            order.append(regions.pop(key))
            for reader in read_by.get(key, []):
                reads[reader].discard(key)
                if not reads[reader]:
                    heapq.heappush(ready, (self.flow.position[regions[reader][0]], reader))
        return order, {key: [region, *(regions[other] for other in reads[key])] for key, region in regions.items()}


def _circle(waiting: dict[int, list[list[Node]]]) -> list[list[Node]]:
    """Return regions that wait for each other in a circle."""
    path = [next(iter(waiting))]
    while True:
        following = id(waiting[path[-1]][1])
        if following in path:
            return [waiting[key][0] for key in path[path.index(following) :]]
        path.append(following)
