"""FoldConstants: what is computed from the network's own parameters alone is computed once."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from fxquant.graph import behind, constant_of, free_path, is_impure, is_tensor, module_of, put_constant
from fxquant.kinds import QUANTIZED, WEIGHTED, kind
from fxquant.passes.canonicalize import Canonicalize
from fxquant.pipeline import Pass
from fxquant.written import written_constants

_RANDOM = ("rand", "bernoulli", "multinomial", "normal", "dropout", "empty")


class FoldConstants(Pass):
    """Compute the weights and biases that are computed from parameters, and the products of parameters, once and for all.

        get_attr weight -> standardize --.                       get_attr weight' --.
        x ------------------------------ F.conv2d         =>     x ---------------- F.conv2d

        get_attr table -> linear -> gather --.                   get_attr linear -> gather --.
        x ---------------------------------- +            =>     x ------------------------- +

    Weight standardization, a bias put together of parts, a position bias that a small network makes of a table: with a stored weight the
    layer can be quantized like any other, and work that does not depend on the image is done once. Positions that are computed for each
    image of a batch, all alike, are computed for one. A table that is merely indexed stays smaller as it is. Which nodes those are is
    up to the architecture, not to the weights: a file is loaded into a network with any. What a parameter has a share in is a parameter.
    What is written into a copy of a parameter (a bias with a part of zeros) is folded behind the last write.
    """

    after = (Canonicalize,)
    preserves_output = True
    verb = "folded"

    def run(self, gm: GraphModule) -> None:
        values, writers = written_constants(gm, _is_repeatable)
        for node in reversed(writers):
            node.replace_all_uses_with(node.all_input_nodes[0])  # what writes in place returns what it has written into
            gm.graph.erase_node(node)
            self.changed()
        for node in [node for node in values if node not in writers and any(user not in values for user in node.users)]:
            self._store(gm, node, values[node])
        for node, value in _folded(gm).items():
            self._store(gm, node, value)

    def _store(self, gm: GraphModule, node: Node, value: Tensor) -> None:
        """Let the readers of `node` read `value`, under the name of the parameter that it takes the place of, where there is one."""
        sources = _sources(node)
        alike = [str(source.target) for source in sources if (held := constant_of(source)) is not None and held.numel() == value.numel()]
        path = free_path(gm, f"{sources[0].target}_folded".replace(".", "_") if sources else f"{node.name}_folded")
        put_constant(gm, path, nn.Parameter(value.clone(), requires_grad=False) if _is_learned(node) else value.clone())
        with gm.graph.inserting_before(node):
            stored = new = gm.graph.get_attr(path)
            if value.shape[:1] != node.meta["val"].shape[:1]:  # one image stands for all of the batch
                images = _images(gm)
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
    sizes = _batch_sizes(gm)
    constants = _constants(gm, sizes)
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
    counting = {node for node in wanted if not sizes.isdisjoint(behind(node))}
    found = {}
    with torch.no_grad():
        networks = [gm, _with_random_weights(gm)] if counting else [gm]
        runs = [(Interpreter(network), [dict.fromkeys(sizes, count) for count in (2, 3)]) for network in networks]
        for node in reversed(wanted):
            judged = runs if node in counting else runs[:1]
            kept = [_of_any_batch(*(_value(interpreter, node, each) for each in values)) for interpreter, values in judged]
            if kept[0] is not None and all(value is not None for value in kept):
                found[node] = kept[0]
    return found


def _of_any_batch(few: Tensor, more: Tensor) -> Tensor | None:
    """Return what is the same for two images (`few`) and for three, or for each of the images; None where nothing is."""
    if few.shape != more.shape:
        if (len(few), len(more)) != (2, 3) or few.shape[1:] != more.shape[1:]:
            return None
        few = few[:1]
    return few if torch.allclose(few.expand_as(more), more, rtol=0, atol=0, equal_nan=True) else None


def _with_random_weights(gm: GraphModule) -> GraphModule:
    """Return a copy of `gm` with parameters that do not depend on its own: with zeros or NaN all images of a batch look alike."""
    new, generator = copy.deepcopy(gm), torch.Generator().manual_seed(0)
    for value in new.parameters():
        if value.is_floating_point():
            value.copy_(torch.rand(value.shape, generator=generator))
    return new


def _is_learned(node: Node) -> bool:
    """Say whether a parameter has a share in the constant `node`, rather than buffers alone."""
    return any(
        isinstance(constant_of(other), nn.Parameter) or (other.op == "call_module" and any(True for _ in module_of(other).parameters()))
        for other in behind(node)
    )


def _is_read(gm: GraphModule, path: str) -> bool:
    """Say whether a node reads the parameter at `path`, or calls the module that it is of."""
    return any(node.op in ("get_attr", "call_module") and (path + ".").startswith(f"{node.target}.") for node in gm.graph.nodes)


def _constants(gm: GraphModule, sizes: set[Node], written: frozenset[Node] = frozenset()) -> dict[Node, None]:
    """Return the nodes that depend on parameters, buffers and `sizes`, the number of images, alone, in order, but for what is `written`."""
    found: dict[Node, None] = {}
    for node in gm.graph.nodes:
        computed = _is_repeatable(node) and all(parent in found for parent in node.all_input_nodes)
        if node in sizes or (node not in written and (node.op == "get_attr" or computed)):
            found[node] = None
        elif is_impure(node) and node.args and node.args[0] in found and node.op != "output":
            return _constants(gm, sizes, written.union(behind(node.args[0])))  # it may be a view of any of them
    return found


def _images(gm: GraphModule) -> Node:
    return next(node for node in gm.graph.nodes if node.op == "placeholder")


def _batch_sizes(gm: GraphModule) -> set[Node]:
    """Return the nodes that are the number of images."""
    images = _images(gm).meta.get("val")
    count = str(images.shape[0]) if isinstance(images, Tensor) else None
    return {node for node in gm.graph.nodes if isinstance(node.meta.get("val"), torch.SymInt) and str(node.meta["val"]) == count}


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


def _sources(node: Node) -> list[Node]:
    """Return the parameters and buffers that `node` is computed from, in graph order."""
    known = behind(node)
    return [other for other in node.graph.nodes if other in known and other.op == "get_attr"]


def _value(interpreter: Interpreter, node: Node, values: dict[Node, Any]) -> Any:
    """Return what a constant node is, and keep it in `values`."""
    for parent in node.all_input_nodes:
        if parent not in values:
            _value(interpreter, parent, values)
    interpreter.env = values
    values[node] = interpreter.run_node(node)
    return values[node]
