"""Does a graph hold for images of any size? Sizes that a forward reads as numbers (windows, position embeddings) are fixed in its graph."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.fx import GraphModule
from torch.fx.graph import CodeGen

from fxquant.errors import ModelError
from fxquant.graph import constant_of, fingerprint


def same_operations(one: GraphModule, other: GraphModule) -> bool:
    """Say whether two graphs do the same with the same numbers and constants, whatever the shapes of what flows between them."""
    if fingerprint(one) != fingerprint(other):
        return False
    pairs = zip(one.graph.nodes, other.graph.nodes, strict=True)
    constants = ((constant_of(mine), constant_of(its)) for mine, its in pairs if mine.op == "get_attr")
    return all(mine is its is None or (mine is not None and its is not None and torch.equal(mine, its)) for mine, its in constants)


@contextmanager
def quiet_failures() -> Iterator[None]:
    """Keep torch from printing how an operation failed on tensors without values: here that is an answer."""
    logger = logging.getLogger(FakeTensor.__module__)
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


class FixedSizeCode(CodeGen):
    """Writes code that refuses images of another size before it does anything with them.

    Part of the code and not of the nodes, so that passes need not know of it. A `copy.deepcopy` and a `fork` of the graph keep it;
    retracing it, pickling it and running it node by node lose it.

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
