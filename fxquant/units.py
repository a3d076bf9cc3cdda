"""Cut a prepared graph into the units that are reconstructed one after the other, by the structure of the graph alone.

    images -> [conv1 -> relu] -> (maxpool) -> [conv -> relu -> conv -> add -> relu] -> ... -> (avgpool -> flatten) -> [fc]
               a layer           no weights    a block: the module layer1.0                    no weights             a layer

How blocks are found:

1. A module with one tensor in and one out that joins paths (add, mul, concat, matmul) in its own forward is a block, and so are the
   other modules of its class, with or without a join (MBConv without a skip), and modules that put layers around one such module. The
   outermost counts. A class with a member of more than `longest` layers is opened instead; so is what holds all layers of the network.
2. The rest is cut wherever a single tensor is alive. What lies between two cuts and has parallel paths with a layer in them becomes one
   unit if it has at most `longest` layers (a residual sum written in the network's own forward). If it has more, it is split into the
   outermost modules with one output and at most `longest` layers; these may have several inputs (DenseNet's layers).
3. Every other layer with a weight is a unit. Units of 2. and 3. also take the activations and norms behind them; and those in front of
   them, through views, that no unit has taken.
4. What is left (pools, views, sums of nothing but features) forms units without layers, which are only run.

Units touch at tensors with one row an image; `Partition.close` joins what is not. Numbers that depend on the batch size, and tensors that
depend on nothing else, are computed anew in each unit that needs them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torch.fx import Graph, GraphModule, Node

from fxquant.errors import ConfigError, one_of
from fxquant.graph import quantizer_path
from fxquant.regions import Flow, Partition, Scope, inside, is_number, rebuild, scopes

GRANULARITIES = ("layer", "block", "network")


@dataclass(frozen=True)
class Unit:
    """A part of a graph that is learned at once, by node names.

    Attributes:
        name: the path of the module that the unit is or lies in, else its first and last layer: ``conv1 .. fc``.
        nodes: its nodes, in graph order.
        inputs: the nodes outside whose tensors it reads, in graph order.
        outputs: those of its nodes that are read outside or returned by the network, in graph order.
        layers: the paths of its modules that own a weight, in order; empty if there is nothing to learn.
    """

    name: str
    nodes: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    layers: tuple[str, ...]


def cut(gm: GraphModule, granularity: str = "block", longest: int = 12) -> list[Unit]:
    """Return the units of `gm` in an order in which each reads only the network's input and the outputs of earlier ones.

    Args:
        gm: a traced and prepared graph.
        granularity: ``"layer"`` (a layer with the activations behind it), ``"block"`` or ``"network"`` (one unit).
        longest: blocks with more layers than this are split where their structure allows it.

    Raises:
        ConfigError: an unknown granularity.
    """
    if granularity not in GRANULARITIES:
        raise ConfigError(f"{granularity!r} is no granularity", where="granularity", fix=one_of(granularity, GRANULARITIES))
    flow = Flow(gm)
    partition, root = Partition(flow), scopes(flow)
    names: dict[frozenset[Node], str] = {}
    if granularity == "network":
        partition.join(flow.solid)
    elif granularity == "layer":
        for node in flow.solid:
            if node in flow.layers:
                partition.absorb_behind(node)
    else:
        names = _find_blocks(flow, root, partition, longest)
    regions = partition.close()
    home = {node: index for index, region in enumerate(regions) for node in region}
    for node in reversed(flow.nodes):
        if node in flow.free:
            home[node] = min((home[reader] for reader in node.users if reader in home), default=0)
    members: list[list[Node]] = [[] for _ in range(max(home.values(), default=-1) + 1)]
    for node in flow.nodes:
        members[home[node]].append(node)
    return [_unit(flow, nodes, names.get(frozenset(nodes) - flow.free) or _name(flow, root, nodes)) for nodes in members]


def merge(gm: GraphModule, units: Sequence[Unit]) -> Unit:
    """Return one unit made of consecutive units of a cut of `gm`.

    Raises:
        ConfigError: something between the units is missing, so that they cannot run at once.
    """
    flow = Flow(gm)
    named = {name for unit in units for name in unit.nodes}
    nodes = [node for node in flow.nodes if node.name in named]
    behind: set[Node] = set()
    for node in flow.solid:
        reads_behind = not behind.isdisjoint(flow.tensors(node))
        if node.name in named and reads_behind:
            raise ConfigError(f"are not consecutive: {node.name} reads what lies between them", where="units", fix="Merge these as well")
        if node.name not in named and (reads_behind or any(other.name in named for other in flow.tensors(node))):
            behind.add(node)
    return _unit(flow, nodes, _name(flow, scopes(flow), nodes))


def on_student(unit: Unit, student: GraphModule) -> Unit:
    """Return `unit` in a graph that observers or quantizers were inserted into: those behind its nodes belong to it.

    A quantizer of the images, which lies in front of all units, belongs to every one that reads it.
    """
    named, flow = set(unit.nodes), Flow(student)
    of_images = {
        node
        for images in student.graph.find_nodes(op="placeholder")
        for node in images.users
        if _observed(node) == images.name and any(reader.name in named for reader in node.users)
    }
    nodes = [node for node in flow.nodes if node.name in named or _observed(node) in named or node in of_images]
    found = _unit(flow, nodes, unit.name)
    return replace(found, outputs=tuple(name for name in found.outputs if name not in _names(of_images)))


def _observed(node: Node) -> str | None:
    """Return the name of the node that `node` observes or quantizes (as `InsertObservers` names them), else None."""
    parent = node.args[0] if node.op == "call_module" and len(node.args) == 1 else None
    return parent.name if isinstance(parent, Node) and node.target == quantizer_path(parent.name) else None


def extract(gm: GraphModule, unit: Unit) -> GraphModule:
    """Return `unit` as a graph of its own that shares the modules of `gm`, under the same paths.

    Its placeholders are `Unit.inputs`; it returns the tensor of its only output, or a tuple in the order of `Unit.outputs`.
    """
    flow, graph = Flow(gm), Graph()
    old = {node.name: node for node in gm.graph.nodes}
    copies: dict[Node, Any] = {}
    for name in unit.inputs:
        copies[old[name]] = graph.placeholder(name)
        copies[old[name]].meta = dict(old[name].meta)
    source = next(iter(copies.values()))

    def copied(node: Node) -> Any:
        if node not in copies:
            far = node in flow.free and is_number(node) and not copies.keys() >= set(node.all_input_nodes)
            copies[node] = rebuild(node.meta["val"], source) if far else graph.node_copy(node, copied)
        return copies[node]

    for name in unit.nodes:
        copied(old[name])
    results = tuple(copied(old[name]) for name in unit.outputs)
    graph.output(results[0] if len(results) == 1 else results)
    graph.lint()
    return GraphModule(gm, graph)


def _unit(flow: Flow, nodes: Sequence[Node], name: str) -> Unit:
    layers = tuple(str(node.target) for node in nodes if node in flow.layers)
    inputs = flow.inputs(nodes) or [flow.images]  # something to take the batch size from
    return Unit(name, _names(nodes), _names(inputs), _names(flow.outputs(nodes)), layers)


def _names(nodes: Iterable[Node]) -> tuple[str, ...]:
    return tuple(node.name for node in nodes)


def _name(flow: Flow, root: Scope, nodes: Sequence[Node]) -> str:
    """Return the outermost module that the unit is, else its first and last layer; quantizers do not matter."""
    held, layers = set(nodes), flow.layers.intersection(nodes)
    solid = [node for node in nodes if node not in flow.free and not _observed(node)]
    for scope in inside(root):
        own = [node for node in scope.nodes if not _observed(node)]
        if held.issuperset(scope.nodes) and layers == flow.layers.intersection(own) and (layers or solid == own):
            return _word(own[0]) if len(own) == 1 and not scope.children else scope.path
    words = [_word(node) for node in nodes if node in (layers or solid or nodes)]
    return words[0] if len(words) == 1 else f"{words[0]} .. {words[-1]}"


def _word(node: Node) -> str:
    return str(node.target) if node.op == "call_module" else node.name


def _find_blocks(flow: Flow, root: Scope, partition: Partition, longest: int) -> dict[frozenset[Node], str]:
    """Join the nodes of every block and of every other layer; return the names of blocks that are a module."""
    blocks, opened = _block_modules(flow, root, longest)
    inside_opened = {node for scope in opened for node in scope.nodes}
    for block in blocks:
        partition.take(block.nodes)
    items = {id(partition.region(node)): partition.region(node) for node in flow.solid}
    grown: list[list[Node]] = []
    for segment in _segments(flow, sorted(items.values(), key=lambda item: flow.position[item[-1]])):
        nodes = [node for item in segment for node in item]
        count = len(flow.layers.intersection(nodes))
        if len(segment) == 1 or not count:
            continue
        if count <= longest and inside_opened.isdisjoint(nodes):
            partition.take(nodes)
            grown.append(nodes)
            continue
        for scope in _modules_within(flow, root, set(nodes) - partition.taken, opened, longest):
            partition.take(scope.nodes)
            grown.append(scope.nodes)
    grown += [[node] for node in flow.solid if node in flow.layers and node not in partition.taken]
    fed = flow.behind_a_layer()
    for nodes in grown:
        partition.take(nodes)
    for nodes in grown:
        outputs = flow.outputs(nodes)
        if len(outputs) == 1:
            partition.absorb_behind(outputs[0])
    for nodes in grown:
        if not fed.isdisjoint(flow.inputs(nodes)):
            partition.absorb_before(nodes)
    return {frozenset(block.nodes): block.path for block in blocks}


def _block_modules(flow: Flow, root: Scope, longest: int) -> tuple[list[Scope], list[Scope]]:
    """Return the module calls that are blocks, and those that would be if they, or others of their class, were not too long."""
    size = {scope: len(flow.layers.intersection(scope.nodes)) for scope in inside(root)}
    simple = [scope for scope in size if 0 < size[scope] < len(flow.layers) and _is_simple(flow, scope)]
    joining = {scope.cls for scope in simple if any(len(set(flow.tensors(node))) > 1 for node in scope.own)}
    joining |= {scope.cls for scope in simple if _is_around_one(flow, scope, joining)}
    long = {s.cls for s in simple if s.cls in joining and size[s] > longest and all(below.cls != s.cls for below in inside(s))}
    candidates = {scope for scope in simple if scope.cls in joining}
    blocks: list[Scope] = []
    opened: list[Scope] = []
    todo = [root]
    while todo:
        scope = todo.pop(0)
        if scope in candidates and scope.cls not in long and size[scope] <= longest:
            blocks.append(scope)
            continue
        if scope in candidates:
            opened.append(scope)
        todo += scope.children
    return blocks, opened


def _is_around_one(flow: Flow, scope: Scope, joining: set[object]) -> bool:
    """Say whether a module's own forward puts layers around a single joining module (convolutions around squeeze and excitation)."""
    is_written = isinstance(scope.cls, type) and not issubclass(scope.cls, nn.Sequential)
    has_layers = any(not child.children and flow.layers.intersection(child.nodes) for child in scope.children)
    return is_written and has_layers and sum(below.cls in joining for below in inside(scope)) == 1


def _is_simple(flow: Flow, scope: Scope) -> bool:
    """Say whether a module call reads one stack of images' features and gives one."""
    ends = flow.inputs(scope.nodes), flow.outputs(scope.nodes)
    return all(len(end) == 1 and flow.is_stack(end[0]) for end in ends)


def _modules_within(flow: Flow, root: Scope, nodes: set[Node], opened: Sequence[Scope], longest: int) -> Iterator[Scope]:
    """Yield the outermost module calls inside of `nodes` that can be units of their own."""
    found: set[Node] = set()
    for scope in inside(root):
        fits = scope.children and nodes.issuperset(scope.nodes) and found.isdisjoint(scope.nodes) and scope not in opened
        if not fits or not 0 < len(flow.layers.intersection(scope.nodes)) <= longest:
            continue
        outputs = flow.outputs(scope.nodes)
        if len(outputs) == 1 and all(map(flow.is_stack, [*outputs, *flow.inputs(scope.nodes)])):
            found.update(scope.nodes)
            yield scope


def _segments(flow: Flow, items: Iterable[list[Node]]) -> Iterator[list[list[Node]]]:
    """Cut a sequence of regions wherever a single stack of features is alive; yield what lies between the cuts."""
    last = {tensor: node for node in flow.solid for tensor in flow.tensors(node)}
    pending = dict.fromkeys(last, 0)
    for node in flow.solid:
        for tensor in flow.tensors(node):
            pending[tensor] += 1
    live = {node for node in last if node.op == "placeholder"}
    segment: list[list[Node]] = []
    for item in items:
        segment.append(item)
        live.update(node for node in item if node in last)
        for node in item:
            for tensor in flow.tensors(node):
                pending[tensor] -= 1
        live = {node for node in live if pending[node]}
        if not live or (len(live) == 1 and flow.is_stack(next(iter(live)))):
            yield segment
            segment = []
    if segment:
        yield segment
