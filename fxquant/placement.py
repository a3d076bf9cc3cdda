"""Where quantizers go, and with how many bits: one quantizer per tensor, found on the graph.

A *quantized op* is a convolution, a linear layer or a matmul. Each of its operands is traced up through operations that only move values
(views, padding, max pooling, global average pooling) to the operation that made it; behind that one sits the quantizer, and every reader,
residual branches too, reads the quantized value:

    conv1 -> bn -> relu -[q]-+-> conv2 -> bn -> add -> relu -[q]-> pool -> fc
                             '--------------------^

Of a tensor that is split (``q, k, v = qkv(x).chunk(3)``) each part that a matmul reads has a quantizer of its own, unless the whole is
quantized for a layer:

    qkv -> chunk -+-> q -> * scale -[q]-> matmul -> softmax -[q]-> matmul
                  +-> k -[q]-> transpose --^                        |
                  '-> v -[q]----------------------------------------'

The network's input is not quantized, nor is its output, a bias, or a sum that only feeds another sum. On ResNet, MobileNetV2, RegNetX and
MNasNet this is the placement of PD-Quant, QDrop and BRECQ.

With ``edges="integer"`` the input is quantized, too, and so is the shortcut where the sum of two convolutions is, so that nothing but bytes
travels through a ResNet:

    x -[q]-+-> conv -> ... -> conv ------> add -> relu -[q]->
           '-> downsample ---[q, 8 bits]---^
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch.fx import GraphModule, Node

from fxquant.errors import ConfigError, ModelError, listed, one_of
from fxquant.graph import argument, is_tensor, module_of
from fxquant.grids import cut_of, terms_of
from fxquant.kinds import QUANTIZED, WEIGHTED, kind
from fxquant.tracing.values import leaves

EDGES = {
    "8bit": "first and last weights and the last layer's input at 8 bits",
    "brecq": "first and last weights, the last layer's input and the first layer's output at 8 bits",
    "same": "first and last layers like all others",
    "float": "first and last layers not quantized",
    "integer": "first and last weights, the last layer's input, the images and convolutions on shortcuts at 8 bits, so that sums and the "
    "first layer run on integers too",
}

MATMUL_SCALES = ("tensor", "head")
"""What the operand of a matmul has one scale for: the whole tensor, or each head (axis 1 of ``[N, heads, L, d]``)."""

_MOVES_VALUES = {"view", "getitem", "pad", "max_pool"}
_PICKS = {"select", "narrow", torch.select, torch.narrow}
_PRODUCTS = QUANTIZED - WEIGHTED
_HEADS = 1


@dataclass(frozen=True)
class LayerPlan:
    """One quantized op: `w` bits of its weight (None: float, or none), `a` bits of what it reads (None: float), its place in the net."""

    name: str
    kind: str
    w: int | None
    a: int | None
    edge: str = ""
    """``"first"``, ``"last"``, ``"first, last"`` or nothing."""


@dataclass(frozen=True)
class TensorPlan:
    """One quantized tensor: the node that makes it, its bits and the layers that read it (on a shortcut: the sum)."""

    node: str
    bits: int
    readers: tuple[str, ...]
    softmax: bool = False
    """Whether a softmax made it: values in (0, 1], for which there are logarithmic quantizers."""
    axis: int | None = None
    """The axis with a scale for each index; None: one scale for the tensor."""


@dataclass
class Plan:
    """All layers and tensors to quantize, by name; survives a round trip through JSON."""

    layers: dict[str, LayerPlan] = field(default_factory=dict)
    tensors: dict[str, TensorPlan] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON-able lists."""
        return {"layers": [asdict(layer) for layer in self.layers.values()], "tensors": [asdict(t) for t in self.tensors.values()]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """Return the plan that `to_dict` wrote."""
        layers = {layer["name"]: LayerPlan(**layer) for layer in data["layers"]}
        tensors = {t["node"]: TensorPlan(**{**t, "readers": tuple(t["readers"])}) for t in data["tensors"]}
        return cls(layers, tensors)


def place(
    gm: GraphModule,
    w: int | None,
    a: int | None,
    edges: str = "8bit",
    overrides: Mapping[str, Mapping[str, int | None]] | None = None,
    matmul_scales: str = "tensor",
) -> Plan:
    """Return which weights and tensors of the folded graph `gm` are quantized, with how many bits.

    Args:
        gm: a traced graph whose nodes carry ``meta["val"]``.
        w: bits of weights, 2 to 8; None leaves them float.
        a: bits of activations, 2 to 8; None leaves them float.
        edges: the rule for first and last layers, a key of `EDGES`.
        overrides: ``{glob over layer names: {"w": bits, "a": bits}}``; later globs win over earlier ones, all win over `edges`.
            ``"a"`` is the precision of what the layer *reads*; a tensor with several readers gets the most bits that one of them asks for.
        matmul_scales: one of `MATMUL_SCALES`. With ``"head"``, an operand ``[N, heads, L, d]`` of a matmul is quantized as the matmul
            reads it, a scale a head; where a layer reads the same values, they are quantized once, with one scale.

    Raises:
        ConfigError: bits outside 2 to 8, an unknown edge rule or word for scales, a glob that matches no layer, nothing left to quantize.
        ModelError: nothing to quantize.
    """
    check_bits("w", w)
    check_bits("a", a)
    if not isinstance(edges, str) or edges not in EDGES:
        raise ConfigError(f"{edges!r} is no rule", where="edges", fix=one_of(edges, EDGES))
    if matmul_scales not in MATMUL_SCALES:
        raise ConfigError(f"{matmul_scales!r} is not known", where="matmul_scales", fix=one_of(str(matmul_scales), MATMUL_SCALES))
    ops = {layer_name(node): node for node in gm.graph.nodes if _is_quantized_op(node)}
    if not any(kind(node) in WEIGHTED for node in ops.values()):
        raise ModelError(
            "has no convolution or linear layer with stored weights, so there is nothing to quantize",
            where=type(gm).__name__,
            fix="Check fxquant.trace(model, example).print_readable(); modules named in leaf_modules stay opaque",
        )
    first, last = _edges(gm)
    bits = {name: _bits_of(node, w, a, edges, first, last) for name, node in ops.items()}
    for name, changes in _matched(overrides or {}, list(ops)):
        bits[name] = {**bits[name], **changes}
    plan = Plan()
    read = _place_tensors(plan, ops, {name: wanted["a"] for name, wanted in bits.items()}, edges == "integer", matmul_scales == "head")
    for name, node in ops.items():
        edge = ", ".join(word for word, members in (("first", first), ("last", last)) if node in members)
        plan.layers[name] = LayerPlan(name, kind(node), bits[name]["w"] if kind(node) in WEIGHTED else None, read.get(name), edge)
    if edges == "integer":
        _place_shortcuts(plan, ops)
    if not plan.tensors and all(layer.w is None for layer in plan.layers.values()):
        raise ConfigError("leave every weight and activation float", where="edges and overrides", fix="Give bits to one layer at least")
    return plan


def layer_name(node: Node) -> str:
    """Return the name of a quantized op: the module path of a layer, the node name of a functional op."""
    return str(node.target) if node.op == "call_module" else node.name


def operands(node: Node) -> list[Node]:
    """Return the nodes whose values a quantized op multiplies (not its weight, bias or mask)."""
    if node.target is torch.einsum:
        return [operand for operand in leaves((node.args, node.kwargs)) if isinstance(operand, Node)]
    count = {"matmul": 2, "attention": 3}.get(kind(node), 1)
    given = [operand for operand in [*node.args, *node.kwargs.values()] if isinstance(operand, Node)]
    return given[:count]


def source(node: Node) -> Node:
    """Return the node that made the values of `node`: up through views, padding, max pooling and global average pooling."""
    return _way(node)[-1]


def _way(node: Node) -> list[Node]:
    """Return the nodes that the values of `node` come through, from itself up to the one that made them."""
    way = [node]
    while _moves_values(node):
        parent = node.args[0] if node.args else next(iter(node.kwargs.values()), None)
        if not isinstance(parent, Node) or not (is_tensor(parent) or _moves_values(parent)):
            break
        node = parent
        way.append(node)
    return way


def _is_part(node: Node) -> bool:
    """Say whether `node` picks a part of a tensor: one of several that it was split into, or what an index selects."""
    if kind(node) != "getitem":
        return node.op in ("call_method", "call_function") and node.target in _PICKS
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    return not all(place is None or place is Ellipsis or place == slice(None) for place in index)


def _moves_values(node: Node) -> bool:
    word = kind(node)
    if word in ("avg_pool", "mean"):
        return is_global_pool(node)
    if word == "interpolate":
        mode = module_of(node).mode if node.op == "call_module" else argument(node, 3, "mode", "nearest")
        return str(mode).startswith("nearest")
    return word in _MOVES_VALUES


def is_global_pool(node: Node) -> bool:
    """A pool of a whole map leaves one value a channel (or token): the published placements quantize in front of it."""
    parent = node.args[0]
    if not isinstance(parent, Node) or not is_tensor(node) or not is_tensor(parent):
        return False
    before, after = parent.meta["val"], node.meta["val"]
    if before.ndim < 3:
        return False
    return after.ndim == 2 or (after.ndim == before.ndim and all(size == 1 for size in after.shape[2:]))


def _is_quantized_op(node: Node) -> bool:
    return kind(node) in QUANTIZED and (node.op == "call_module" or kind(node) not in WEIGHTED)


def _place_tensors(plan: Plan, ops: Mapping[str, Node], wanted: Mapping[str, int | None], images: bool, heads: bool) -> dict[str, int]:
    """Add the tensors that the quantized ops read to `plan`; return the bits that each op gets to read."""
    ways = {name: _ways(node, images) for name, node in ops.items()}
    asked = {_spot(ops[name], way, heads) for name, found in ways.items() if wanted[name] is not None for way in found}
    readers: dict[Node, list[str]] = {}
    by_head: dict[Node, bool] = {}
    for name, way in ((name, way) for name, found in ways.items() for way in found):
        # Of several quantizers on one way only the first is left: nothing is rounded twice without an operation between.
        place = next((node for node in reversed(way) if node in asked), None)
        if place is not None:
            if name not in readers.setdefault(place, []):
                readers[place].append(name)
            by_head[place] = by_head.get(place, heads) and kind(ops[name]) in _PRODUCTS and _has_heads(way[0]) and _has_heads(place)
    read: dict[str, int] = {}
    for node in next(iter(ops.values())).graph.nodes:
        asking = [name for name in readers.get(node, []) if wanted[name] is not None]
        if asking:
            bits = max(wanted[name] or 0 for name in asking)
            axis = _HEADS if by_head[node] else None
            plan.tensors[node.name] = TensorPlan(node.name, bits, tuple(asking), kind(source(node)) == "softmax", axis)
            read |= {name: max(bits, read.get(name, 0)) for name in readers[node]}
    return read


def _place_shortcuts(plan: Plan, ops: Mapping[str, Node]) -> None:
    """Add to `plan`, at 8 bits, one of two convolutions whose sum is quantized: whose input has more readers, else the later one."""
    quantized = [layer for layer in plan.layers.values() if layer.kind == "conv" and layer.w and layer.a]
    places = {ops[layer.name]: place for place, layer in enumerate(quantized) if ops[layer.name].meta["val"].ndim == 4}
    for node in next(iter(ops.values())).graph.nodes:
        terms = [term for term in terms_of(node) if term in places and len(term.users) == 1]
        if len(set(terms)) == 2 and _is_quantized_behind_cuts(plan, node):
            shortcut = max(terms, key=lambda term: (len(operands(term)[0].users), places[term]))
            plan.tensors[shortcut.name] = TensorPlan(shortcut.name, 8, (node.name,))


def _is_quantized_behind_cuts(plan: Plan, node: Node) -> bool:
    while node.name not in plan.tensors and len(node.users) == 1 and cut_of(next(iter(node.users))) is not None:
        node = next(iter(node.users))
    return node.name in plan.tensors


def _spot(op: Node, way: list[Node], heads: bool) -> Node:
    """Return the tensor of `way`, on which the values of an operand reach `op`, that `op` wants to be quantized."""
    if kind(op) not in _PRODUCTS:
        return way[-1]
    if heads and _has_heads(way[0]):
        return way[0]
    return next((node for node in way if _is_part(node)), way[-1])


def _has_heads(node: Node) -> bool:
    return is_tensor(node) and node.meta["val"].ndim == 4 and isinstance(node.meta["val"].shape[_HEADS], int)


def _ways(node: Node, images: bool = False) -> list[list[Node]]:
    """Return how the operands of a quantized op reach it, where they are floats computed from the network's input, or (`images`) it."""
    other = ("constant",) if images else ("input", "constant")
    ways = [_way(operand) for operand in operands(node)]
    ends = [(way, way[-1]) for way in ways]
    return [way for way, end in ends if kind(end) not in other and is_tensor(end) and end.meta["val"].is_floating_point()]


def _nearest_weights(node: Node) -> set[Node]:
    """Return the quantized ops that `node` is computed from without another one between."""
    found, todo, seen = set(), [node], set()
    while todo:
        current = todo.pop()
        if current in seen:
            continue
        seen.add(current)
        if _is_quantized_op(current):
            found.add(current)
        else:
            todo += current.all_input_nodes
    return found


def _edges(gm: GraphModule) -> tuple[set[Node], set[Node]]:
    """Return the first weighted ops (none before them) and the last (no quantized op behind them)."""
    first, last = set(), set()
    behind: set[Node] = set()
    for node in gm.graph.nodes:
        reads_layer = any(parent in behind for parent in node.all_input_nodes)
        weighted = _is_quantized_op(node) and kind(node) in WEIGHTED
        if weighted and not reads_layer:
            first.add(node)
        if reads_layer or weighted:
            behind.add(node)
    before: set[Node] = set()
    for node in reversed(gm.graph.nodes):
        feeds_layer = any(user in before for user in node.users)
        if _is_quantized_op(node):
            if kind(node) in WEIGHTED and not feeds_layer:
                last.add(node)
            before.add(node)
        elif feeds_layer:
            before.add(node)
    return first, last


def _bits_of(node: Node, w: int | None, a: int | None, edges: str, first: set[Node], last: set[Node]) -> dict[str, int | None]:
    at_edge = node in first or node in last
    if edges == "float" and at_edge:
        return {"w": None, "a": None}
    if edges in ("8bit", "brecq", "integer"):
        reads_stem = edges == "brecq" and any(layers and layers <= first for layers in (_nearest_weights(way[-1]) for way in _ways(node)))
        w = 8 if w is not None and at_edge else w
        a = 8 if a is not None and (node in last or reads_stem or (edges == "integer" and node in first)) else a
    return {"w": w, "a": a}


def _matched(overrides: Mapping[str, Mapping[str, int | None]], names: list[str]) -> Iterable[tuple[str, dict[str, int | None]]]:
    if not isinstance(overrides, Mapping):
        raise ConfigError(f"is a {type(overrides).__name__}", where="overrides", fix='Write a dict such as {"layer4.*": {"w": 4}}')
    for glob, changes in overrides.items():
        where = f"overrides[{glob!r}]"
        if not isinstance(changes, Mapping) or not set(changes) <= {"w", "a"}:
            raise ConfigError(f"{changes!r} is not a dict with the keys 'w' and 'a'", where=where, fix="Write for example {'w': 4, 'a': 8}")
        for key, value in changes.items():
            check_bits(f"{where}[{key!r}]", value)
        found = [name for name in names if fnmatchcase(name, glob)]
        if not found:
            raise ConfigError("matches no layer", where=where, fix=_suggest(glob, names))
        for name in found:
            yield name, dict(changes)


def _suggest(glob: str, names: list[str]) -> str:
    prefixes = {".".join(name.split(".")[:depth]) for name in names for depth in range(1, name.count(".") + 1)}
    near = difflib.get_close_matches(glob.rstrip(".*"), [*names, *sorted(prefixes)], n=1, cutoff=0.3)
    hint = f"Did you mean {near[0] + '.*' if near[0] in prefixes else near[0]!r}? " if near else ""
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f"{hint}Layers are named {listed(names[:4])}{more}"


def check_bits(where: str, bits: object) -> None:
    if bits is not None and (isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8):
        raise ConfigError(f"{bits!r} bits are not supported", where=where, fix="Use a whole number from 2 to 8, or None for float")
