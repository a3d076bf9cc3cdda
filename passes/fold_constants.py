"""FoldConstants: what is computed from the network's own parameters alone is computed once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.node import map_arg

from fxquant.graph import constant_of, free_path, is_impure, is_tensor, put_constant
from fxquant.kinds import QUANTIZED, WEIGHTED, kind
from fxquant.passes.canonicalize import Canonicalize
from fxquant.pipeline import Pass

_RANDOM = ("rand", "bernoulli", "multinomial", "normal", "dropout", "empty")


class FoldConstants(Pass):
    """Compute the weights and biases that are computed from parameters, and the products of parameters, once and for all.

        get_attr weight -> standardize --.                       get_attr weight' --.
        x ------------------------------ F.conv2d         =>     x ---------------- F.conv2d

        get_attr table -> linear -> gather --.                   get_attr linear -> gather --.
        x ---------------------------------- +            =>     x ------------------------- +

    Weight standardization, a bias put together of parts, a position bias that a small network makes of a table: with a stored weight the
    layer can be quantized like any other, and work that does not depend on the image is done once. Positions that are computed for each
    image of a batch, all alike, are computed for one. A table that is merely indexed stays smaller as it is.
    """

    after = (Canonicalize,)
    preserves_output = True
    verb = "folded"

    def run(self, gm: GraphModule) -> None:
        for node, value in _folded(gm).items():
            self._store(gm, node, value)

    def _store(self, gm: GraphModule, node: Node, value: Tensor) -> None:
        """Let the readers of `node` read `value`, under the name of the parameter that it takes the place of, where there is one."""
        sources = _sources(node)
        alike = [str(source.target) for source in sources if (held := constant_of(source)) is not None and held.numel() == value.numel()]
        path = free_path(gm, f"{sources[0].target}_folded".replace(".", "_") if sources else f"{node.name}_folded")
        put_constant(gm, path, value.clone())
        with gm.graph.inserting_before(node):
            stored = new = gm.graph.get_attr(path)
            if value.shape[:1] != node.meta["val"].shape[:1]:  # one image stands for all of the batch
                images = next(other for other in gm.graph.nodes if other.op == "placeholder")
                size = gm.graph.call_method("size", (images, 0))
                size.meta = {"val": images.meta["val"].shape[0]}
                new = gm.graph.call_method("expand", (stored, size, *[-1] * (value.ndim - 1)))
                stored.meta = {"val": node.meta["val"][:1]}
        new.meta = {key: node.meta[key] for key in ("val", "nn_module_stack") if key in node.meta}
        node.replace_all_uses_with(new)
        gm.graph.eliminate_dead_code(is_impure)
        if alike and not _is_read(gm, alike[0]):
            owner, _, name = alike[0].rpartition(".")
            delattr(gm.get_submodule(owner), name)
            put_constant(gm, alike[0], getattr(gm, path))
            delattr(gm, path)
            stored.target = alike[0]
        self.changed()


def _folded(gm: GraphModule) -> dict[Node, Tensor]:
    """Return the nodes to store, with their values: parameters of layers, and the last products on the way to what reads the image."""
    constants = _constants(gm)
    wanted: list[Node] = []
    shown: dict[Node, bool] = {}
    """Whether something that reads the image sees a constant, but as the parameter of a layer, or through another product."""
    for node in reversed(constants):
        layers = [user for user in node.users if user not in constants and _is_parameter_of(node, user)]
        shown[node] = any(user not in constants and user not in layers for user in node.users) or any(
            shown[user] and kind(user) not in QUANTIZED for user in node.users if user in constants
        )
        if is_tensor(node) and node.op != "get_attr" and (layers or (shown[node] and kind(node) in QUANTIZED)):
            wanted.append(node)
    interpreter, values = Interpreter(gm), [_Values(gm, count) for count in (2, 3)]
    found = {}
    with torch.no_grad():
        for node in reversed(wanted):
            few, more = (_value(interpreter, node, each) for each in values)
            if few.shape == more.shape:
                if torch.equal(few, more):
                    found[node] = few
            elif len(few) == 2 and len(more) == 3 and torch.equal(more, few[:1].expand_as(more)):
                found[node] = few[:1]
    return found


class _Values(dict[Node, Any]):
    """What constants are, by node, for a batch of `count` images."""

    def __init__(self, gm: GraphModule, count: int):
        super().__init__((node, count) for node in gm.graph.nodes if _is_batch_size(node))


def _is_read(gm: GraphModule, path: str) -> bool:
    """Say whether a node reads the parameter at `path`, or calls the module that it is of."""
    return any(node.op in ("get_attr", "call_module") and (path + ".").startswith(f"{node.target}.") for node in gm.graph.nodes)


def _constants(gm: GraphModule, written: frozenset[Node] = frozenset()) -> dict[Node, None]:
    """Return the nodes that depend on parameters, buffers and the number of images alone, in order, but for what is `written` into."""
    found: dict[Node, None] = {}
    for node in gm.graph.nodes:
        computed = _is_repeatable(node) and all(parent in found for parent in node.all_input_nodes)
        if _is_batch_size(node) or (node not in written and (node.op == "get_attr" or computed)):
            found[node] = None
        elif is_impure(node) and node.args and node.args[0] in found and node.op != "output":
            return _constants(gm, written.union(_behind(node.args[0])))  # it may be a view of any of them
    return found


def _is_batch_size(node: Node) -> bool:
    images = next(other for other in node.graph.nodes if other.op == "placeholder").meta.get("val")
    value = node.meta.get("val")
    return isinstance(value, torch.SymInt) and isinstance(images, Tensor) and str(value) == str(images.shape[0])


def _is_repeatable(node: Node) -> bool:
    """Say whether `node` computes something, gives the same whenever it runs, and leaves its inputs alone."""
    if node.op == "call_module":
        return kind(node) != "other" and not is_impure(node)
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    return node.op in ("call_function", "call_method") and not is_impure(node) and not any(word in name for word in _RANDOM)


def _is_parameter_of(node: Node, layer: Node) -> bool:
    if layer.op != "call_function" or kind(layer) not in WEIGHTED | {"batch_norm"}:
        return False
    return node in [operand for operand in [*layer.args[1:], *layer.kwargs.values()] if isinstance(operand, Node)]


def _behind(node: Node) -> set[Node]:
    """Return `node` and all that it is computed from."""
    behind, todo = set(), [node]
    while todo:
        current = todo.pop()
        if current not in behind:
            behind.add(current)
            todo += current.all_input_nodes
    return behind


def _sources(node: Node) -> list[Node]:
    """Return the parameters and buffers that `node` is computed from, in graph order."""
    behind = _behind(node)
    return [other for other in node.graph.nodes if other in behind and other.op == "get_attr"]


def _value(interpreter: Interpreter, node: Node, values: dict[Node, Any]) -> Any:
    """Return what a constant node is, and keep it in `values`."""
    for parent in node.all_input_nodes:
        if parent not in values:
            _value(interpreter, parent, values)
    args, kwargs = (map_arg(part, values.__getitem__) for part in (node.args, node.kwargs))
    values[node] = getattr(interpreter, node.op)(node.target, args, kwargs)
    return values[node]
