"""Does a graph hold for images of any size? Sizes that a forward reads as numbers (windows, position embeddings) are fixed in its graph."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph
from torch.fx.graph import CodeGen

from fxquant.errors import ModelError


def same_operations(one: Graph, other: Graph) -> bool:
    """Say whether two graphs do the same with the same arguments, whatever the shapes of what flows between them."""
    return list(_operations(one)) == list(_operations(other))


def _operations(graph: Graph) -> Iterator[tuple[Any, ...]]:
    for node in graph.nodes:
        constant = node.meta["val"] if node.op == "get_attr" else None
        # Sizes of the batch are nodes, all others numbers; a constant that the forward made has a size as well.
        yield node.op, str(node.target), str(node.args), str(node.kwargs), constant.shape if isinstance(constant, Tensor) else None


class FixedSizeCode(CodeGen):
    """Writes code that refuses images of another size before it does anything with them.

    Part of the code and not of the nodes, so that passes need not know of it; copies of a graph keep it.

    Args:
        size: `(C, H, W)` of the images that the graph was traced with.
    """

    def __init__(self, size: tuple[int, ...]):
        super().__init__()
        self.size = size

    def gen_fn_def(self, free_vars: list[str], *args: Any, **kwargs: Any) -> str:
        """Return the head of the generated function and the check of its first argument."""
        head = super().gen_fn_def(free_vars, *args, **kwargs)
        images = next(name for name in free_vars if name != "self").split(":")[0].strip()
        return f"{head}\n    check_image_size({images}, {self.size})"

    def additional_globals(self) -> list[tuple[str, Any]]:
        """Return what the code calls."""
        return [*super().additional_globals(), ("check_image_size", check_image_size)]


def check_image_size(images: Tensor, size: tuple[int, ...]) -> None:
    """Raise ModelError where `images` are not ``[N, *size]``."""
    if isinstance(images, Tensor) and tuple(images.shape[1:]) != size:  # anything else is a tracer's stand-in for images
        if torch.compiler.is_compiling():  # what compiles cannot make the error below, but shows the words of this one
            raise ValueError(f"images are of shape {list(images.shape[1:])}, and the graph holds for {list(size)} alone")
        raise ModelError(
            f"are of shape {list(images.shape[1:])}, and the graph holds for {list(size)} alone: numbers in it follow from that size "
            "(of a position embedding, windows, a feature map that is resized or flattened)",
            where="images",
            fix="Resize them, or quantize the network built for their size",
        )
