"""Canonicalize: drop what does nothing in eval mode, and make writes explicit."""

from __future__ import annotations

import operator
from collections.abc import Callable
from inspect import isfunction, signature

import torch
import torch.nn.functional as F
from torch.fx import GraphModule, Node

from fxquant.graph import argument, bypass, is_tensor, module_of, put_module, sharing_copy
from fxquant.kinds import kind
from fxquant.pipeline import Pass

_OUT_OF_PLACE: dict[Callable, Callable] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    F.relu_: F.relu,
    F.leaky_relu_: F.leaky_relu,
    F.elu_: F.elu,
    F.hardtanh_: F.hardtanh,
    torch.relu_: torch.relu,
    torch.sigmoid_: torch.sigmoid,
    torch.tanh_: torch.tanh,
}

_CASTS = ("to", "float", "double", "half", "type", "type_as")


class Canonicalize(Pass):
    """Drop identities, casts to the same type and eval-mode dropout; turn in-place operations into plain ones.

        conv -> identity -> dropout -> relu_        =>     conv -> relu

    An in-place operation also changes what *later* readers of its input see. The plain form says so on the graph:

        y = relu_(x); z = x + y                     =>     y = relu(x); z = y + y

    so that a quantizer put behind ``x`` cannot be overwritten. In-place writes into a view (a chunk, a slice) reach the tensor it views;
    these stay as they are, with a reason. Inputs given by keyword, ``relu(input=x)``, become positional, as every other pass expects.
    """

    preserves_output = True
    verb = "cleaned"

    def run(self, gm: GraphModule) -> None:
        for node in list(gm.graph.nodes):
            if not node.args and "input" in node.kwargs and kind(node) != "other":
                node.kwargs, node.args = {name: v for name, v in node.kwargs.items() if name != "input"}, (node.kwargs["input"],)
                self.changed()
            if _does_nothing(node):
                bypass(node, node.args[0])
                self.changed()
            elif _writes(node) and is_tensor(node.args[0]):
                reason = _aliasing(node)
                if reason:
                    self.skip(node, f"in-place, but {reason}; kept in place")
                else:
                    _write_elsewhere(gm, node)
                    self.changed()


def _does_nothing(node: Node) -> bool:
    word = kind(node)
    if word == "identity" or _casts_to_the_same(node):
        return True
    if word != "dropout" or not isinstance(node.args[0], Node):
        return False
    if node.op == "call_module":
        return not module_of(node).training
    return argument(node, 2, "training", signature(node.target).parameters["training"].default) is False  # type: ignore[arg-type]


def _casts_to_the_same(node: Node) -> bool:
    """Say whether `node` is ``x.float()``, ``x.to(...)`` or ``x.type_as(y)`` of what has that type already."""
    if node.op != "call_method" or node.target not in _CASTS or not isinstance(node.args[0], Node):
        return False
    before, after = node.args[0].meta.get("val"), node.meta.get("val")
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return False
    if node.kwargs.get("copy") or "memory_format" in node.kwargs:
        return False
    return (before.dtype, before.device) == (after.dtype, after.device)


def _writes(node: Node) -> bool:
    """Say whether `node` is an activation or arithmetic that overwrites its first argument."""
    if not node.args or not isinstance(node.args[0], Node):
        return False
    if node.op == "call_module":
        return bool(getattr(module_of(node), "inplace", False))
    if node.op == "call_method":
        name = str(node.target)
        return name.endswith("_") and not name.endswith("__") and hasattr(torch.Tensor, name[:-1])
    return node.op == "call_function" and (node.target in _OUT_OF_PLACE or _inplace_argument(node) is True)


def _inplace_argument(node: Node) -> object:
    if "inplace" in node.kwargs or len(node.args) < 2 or kind(node) == "other":
        return node.kwargs.get("inplace")
    return signature(node.target).bind(*node.args, **node.kwargs).arguments.get("inplace") if isfunction(node.target) else None


def _aliasing(node: Node) -> str | None:
    """Return why the write of `node` may be seen through another tensor, or None."""
    written = node.args[0]
    assert isinstance(written, Node)
    if kind(written) in ("view", "getitem", "getattr", "constant") or (kind(written) == "other" and written.op != "call_module"):
        return f"{written.name} may be a view of another tensor"
    if _writes(written):
        return f"{written.name} is written in place itself"
    views = [reader.name for reader in written.users if kind(reader) in ("view", "getitem")]
    return f"{written.name} is viewed by {', '.join(views)}" if views else None


def _write_elsewhere(gm: GraphModule, node: Node) -> None:
    later = set()
    written = node.args[0]
    assert isinstance(written, Node)
    for other in reversed(gm.graph.nodes):
        if other is node:
            break
        later.add(other)
    for reader in list(written.users):
        if reader in later:
            reader.replace_input_with(written, node)
    if node.op == "call_module":
        module = sharing_copy(module_of(node))
        module.inplace = False
        put_module(gm, str(node.target), module)
    elif node.op == "call_method":
        node.target = str(node.target).removesuffix("_")
    elif callable(node.target):
        if _inplace_argument(node) and "inplace" not in node.kwargs:
            bound = signature(node.target).bind(*node.args)
            node.args = tuple(value for name, value in bound.arguments.items() if name != "inplace")
        node.kwargs = {name: value for name, value in node.kwargs.items() if name != "inplace"}
        node.target = _OUT_OF_PLACE.get(node.target, node.target)
