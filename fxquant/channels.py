"""Where the channels of a layer go, up to the layers that read them, through what commutes with a positive factor a channel.

    A -> relu -> max_pool -+-> B1          A / s,  B1 * s,  B2 * s          for any s > 0, one a channel
                           '-> B2

`follow` walks from A to B1 and B2, and says why it cannot. All of it goes by one view of a weight, `blocks`: ``[groups, out, in, taps]``.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxquant.graph import argument, constant_of, is_impure, is_tensor, module_of, readers
from fxquant.kinds import is_layer, kind
from fxquant.quantizers.layers import QuantizedLayer
from fxquant.regions import is_number
from fxquant.tracing.values import expression

_HOMOGENEOUS = frozenset({"relu", "leaky_relu", "prelu", "identity"})
_CURVED = frozenset({"relu6", "hardtanh", "gelu", "silu", "hardswish", "mish", "elu", "hardsigmoid", "sigmoid", "tanh", "softmax"})

# Views that keep the order of the values in memory, so that shapes tell where a channel went. Permutations do not.
_ORDERED_MODULES = (nn.Flatten, nn.Unflatten)
_ORDERED_FUNCTIONS = {torch.flatten, torch.reshape, torch.squeeze, torch.unsqueeze, torch.unflatten, torch.clone}
_ORDERED_METHODS = {"view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "contiguous", "clone", "view_as", "reshape_as"}


class ChannelClamp(nn.Module):
    """``min(relu(x), bound)`` with one bound a channel: what a ReLU6 becomes when its channels are scaled.

    Args:
        bound: not negative, of a shape that broadcasts along the channels: ``[C, 1, 1]`` for images.
    """

    bound: Tensor

    def __init__(self, bound: Tensor):
        super().__init__()
        self.register_buffer("bound", bound)

    def forward(self, input: Tensor) -> Tensor:
        """Return `input` between 0 and the bounds, in its shape."""
        return torch.minimum(input.relu(), self.bound)

    def extra_repr(self) -> str:
        return f"channels={self.bound.numel()}"


@dataclass(frozen=True)
class Place:
    """Where the channels of a layer are in a tensor: along `axis`, `width` neighbors for each of them."""

    axis: int
    width: int = 1

    def along(self, values: Tensor, ndim: int) -> Tensor:
        """Return ``[C]`` values in a shape that broadcasts against a tensor with `ndim` axes."""
        return values.repeat_interleave(self.width).view(-1, *[1] * (ndim - 1 - self.axis))


@dataclass
class Link:
    """A layer, the layers that read its channels, the activations with a bound between, and all operations between by their kind."""

    layer: Node
    consumers: list[tuple[Node, int]] = field(default_factory=list)
    """Each with how many of its inputs make one channel: more than 1 behind a flattened map."""
    clamps: list[tuple[Node, Place]] = field(default_factory=list)
    words: set[str] = field(default_factory=set)

    @property
    def layers(self) -> list[Node]:
        return [self.layer, *(node for node, _ in self.consumers)]


class Shared:
    """Layers whose weight the graph reads in more than one place, so that scaling it in one would change the other."""

    def __init__(self, gm: GraphModule):
        self.calls = Counter(str(node.target) for node in gm.graph.nodes if node.op == "call_module")
        self.read = {str(node.target).rpartition(".")[0] for node in gm.graph.nodes if constant_of(node) is not None}

    def elsewhere(self, path: str) -> str | None:
        """Say where else the weight of the layer at `path` is read, or None."""
        if self.calls[path] > 1:
            return f"{path} is called {self.calls[path]} times"
        return f"the weight of {path} is also read outside of it" if path in self.read else None

    def why_not(self, node: Node) -> str | None:
        """Return the reason why the weight of the layer `node` cannot be changed, or None."""
        path = str(node.target)
        if reason := self.elsewhere(path):
            return reason
        layer = module_of(node)
        if isinstance(layer, QuantizedLayer):
            return f"the weight of {path} is quantized already"
        return None if isinstance(layer.weight, Tensor) and layer.weight.is_floating_point() else f"the weight of {path} is not stored"


def follow(node: Node, shared: Shared, clamps: bool = True) -> Link | str:
    """Return the layers that read the output channels of the layer `node`, or the reason why these cannot be scaled.

    Args:
        node: a call of a convolution, transposed convolution or linear layer.
        shared: of the same graph.
        clamps: whether activations with a bound (ReLU6) may lie between.
    """
    if (why := shared.why_not(node)) is not None:
        return why
    if not is_tensor(node):
        return "the shape of its output is not known"
    link = Link(node)
    todo = [(node, Place(node.meta["val"].ndim - 1 if kind(node) == "linear" else 1))]
    while todo:
        tensor, place = todo.pop(0)
        for reader in readers(tensor):
            if is_number(reader):  # a size; no value of the tensor
                continue
            if reader.op == "output":
                return "its output is returned by the network"
            if operand(reader) is not tensor or is_impure(reader):
                return _refusal(reader)
            if is_layer(reader):
                if (why := shared.why_not(reader) or why_not_read(reader, tensor, place)) is not None:
                    return why
                link.consumers.append((reader, place.width))
                continue
            behind = place_behind(reader, tensor, place, clamps)
            if behind is None:
                return _refusal(reader)
            link.words.add(kind(reader))
            if upper_bound(reader) is not None:
                link.clamps.append((reader, behind))
            todo.append((reader, behind))
    return link if link.consumers else "no layer reads its output"


def operand(node: Node) -> object:
    """Return the first argument of `node`, by place or by name."""
    return node.args[0] if node.args else node.kwargs.get("input")


def _refusal(reader: Node) -> str:
    word = kind(reader)
    if word == "other":
        target = type(module_of(reader)) if reader.op == "call_module" else reader.target
        word = getattr(target, "__name__", str(target))
    why = "is not homogeneous" if word in _CURVED else "does not commute with a scale a channel"
    return f"goes to {reader.name} ({word}), which {why}"


def why_not_read(reader: Node, tensor: Node, place: Place) -> str | None:
    """Return why the layer `reader` does not read the channels of `tensor` as its inputs, or None when it does."""
    layer, ndim = module_of(reader), tensor.meta["val"].ndim
    if place.axis != (ndim - 1 if kind(reader) == "linear" else 1):
        return f"{reader.target} reads its channels as positions"
    groups, _, inputs, _ = blocks(layer, layer.weight).shape  # type: ignore[arg-type]
    if inputs % place.width:
        return f"the {groups} groups of {reader.target} cut through its channels"
    return None


def place_behind(node: Node, tensor: Node, place: Place, clamps: bool = True) -> Place | None:
    """Return where the channels are behind `node`, or None where it does not commute with a positive factor a channel."""
    word = kind(node)
    if not is_tensor(node):
        return None
    before, after = tensor.meta["val"], node.meta["val"]
    if word in _HOMOGENEOUS or (clamps and upper_bound(node) is not None):
        return place
    if word in ("max_pool", "avg_pool"):
        name = type(module_of(node)).__name__ if node.op == "call_module" else getattr(node.target, "__name__", "")
        axes = re.search(r"([123])d", name)
        return place if axes and place.axis < before.ndim - int(axes[1]) else None
    if word == "mean":
        return _behind_mean(node, before.ndim, place)
    if word == "pad":
        return place if _pads_zeros(node, before.ndim - place.axis) else None
    return _behind_view(node, before, after, place) if word == "view" else None


def _behind_mean(node: Node, ndim: int, place: Place) -> Place | None:
    axes = argument(node, 1, "dim")
    axes = [axes] if isinstance(axes, int) else axes
    if not axes or not all(isinstance(axis, int) for axis in axes):
        return None
    axes = {axis % ndim for axis in axes}
    if place.axis in axes:
        return None
    gone = 0 if argument(node, 2, "keepdim", False) else sum(axis < place.axis for axis in axes)
    return Place(place.axis - gone, place.width)


def _pads_zeros(node: Node, axes_behind: int) -> bool:
    """Say whether padding adds nothing but zeros, and none along the channels, which are `axes_behind` axes from the end."""
    if node.op == "call_module":
        module = module_of(node)
        return getattr(module, "value", 0) == 0 and len(module.padding) // 2 < axes_behind  # type: ignore[arg-type]
    amounts, mode, value = argument(node, 1, "pad"), argument(node, 2, "mode", "constant"), argument(node, 3, "value")
    return mode == "constant" and value in (None, 0) and isinstance(amounts, Sequence) and len(amounts) // 2 < axes_behind


def _behind_view(node: Node, before: Tensor, after: Tensor, place: Place) -> Place | None:
    """Find the axis behind a view whose neighbors all come from one channel, by the sizes in front of and behind it."""
    if node.op == "call_module":
        ordered = isinstance(module_of(node), _ORDERED_MODULES)
    else:
        ordered = node.target in (_ORDERED_METHODS if node.op == "call_method" else _ORDERED_FUNCTIONS)
    inner = _count(before.shape[place.axis + 1 :])
    if not ordered or before.dtype != after.dtype or not isinstance(inner, int):
        return None
    for axis, size in enumerate(after.shape):
        rest = _count(after.shape[axis + 1 :])
        if _count(after.shape[:axis]) != _count(before.shape[: place.axis]) or not isinstance(rest, int) or not rest or inner % rest:
            continue
        if size == before.shape[place.axis] * (inner // rest):
            return Place(axis, place.width * (inner // rest))
    return None


def _count(sizes: Iterable[Any]) -> Any:
    """Return the product of sizes, as an int or as an expression in the batch size."""
    return math.prod(expression(size) if isinstance(size, torch.SymInt) else int(size) for size in sizes)


def upper_bound(node: Node) -> Tensor | float | None:
    """Return the bound of ``min(relu(x), bound)`` when `node` computes that (ReLU6, Hardtanh from 0 on, `ChannelClamp`), else None."""
    word, module = kind(node), module_of(node) if node.op == "call_module" else None
    if isinstance(module, ChannelClamp):
        return module.bound
    if word == "relu6":
        return 6.0
    if word != "hardtanh":
        return None
    low, high = (module.min_val, module.max_val) if module else (argument(node, 1, "min_val", -1.0), argument(node, 2, "max_val", 1.0))
    return float(high) if low == 0 and isinstance(high, int | float) else None


def blocks(layer: nn.Module, weight: Tensor) -> Tensor:
    """Return a view ``[groups, out, in, taps]`` of a contiguous tensor shaped like the weight of `layer`; out and in are of a group."""
    if isinstance(layer, nn.Linear):
        return weight[None, :, :, None]
    grouped = weight.reshape(layer.groups, weight.shape[0] // layer.groups, weight.shape[1], -1)  # type: ignore[operator, call-overload]
    return grouped.transpose(1, 2) if isinstance(layer, nn.modules.conv._ConvTransposeNd) else grouped
