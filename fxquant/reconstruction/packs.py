"""Packs: runs of blocks that are learned together, cut where the network is least sensitive (Pack-PTQ, arXiv 2505.00259).

blocks        1   2   3   4   5   6             H: sensitivity of the logits to noise at a block's output
H             9   2   7   8   1   6
packs         1 | 2   3   4 | 5   6             a pack begins at a block with small H
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule

from fxquant.execution import BATCH, bytes_per_image
from fxquant.graph import free_unused
from fxquant.recipe import Recipe
from fxquant.reconstruction.guidance import Suffix, suffix_of
from fxquant.reconstruction.learners import Learners
from fxquant.reconstruction.losses import prediction_loss
from fxquant.reconstruction.store import Store
from fxquant.reconstruction.unit import Show
from fxquant.reconstruction.walk import Visit, Walk, inner_of
from fxquant.tree import has_classes
from fxquant.units import Unit, extract, merge, on_student


def pack(
    teacher: GraphModule,
    student: GraphModule,
    units: Sequence[Unit],
    images: Sequence[Tensor],
    store: Store,
    recipe: Recipe,
    show: Show | None = None,
) -> list[Unit]:
    """Return `units` with runs of blocks merged into packs.

    What is in front of the first block and behind the last stays alone (`inner_of`).

    A pack holds at most ``recipe.pack_length`` units with layers, and activations for a batch (kept for the backward pass) of at most
    ``recipe.memory_gib``.
    """
    inner = inner_of(units)
    scores = [0.0] * len(units)
    if len(inner) > 1 and returns_classes(teacher):
        scores = sensitivities(teacher, student, units, images, store, recipe.pack_score == "literal", show)
    nodes = {node.name: node for node in teacher.graph.nodes}
    sizes = [recipe.unit_batch * sum(bytes_per_image(nodes[name]) for name in units[index].nodes) for index in inner]
    runs = adaptive_packs([scores[index] for index in inner], sizes, recipe.pack_length, recipe.memory_gib * 2**30)
    packed, done = [], 0
    for start, end in runs:
        first, last = inner[start], inner[end - 1]
        packed += [*units[done:first], units[first] if first == last else merge(teacher, units[first : last + 1])]
        done = last + 1
    return [*packed, *units[done:]]


def returns_classes(teacher: GraphModule) -> bool:
    """Say whether a traced network gives logits ``[N, C]`` of several classes, by which blocks are scored; without them packs are cut by
    length alone."""
    return has_classes(teacher.graph.output_node().meta.get("val"))


def adaptive_packs(scores: Sequence[float], sizes: Sequence[float], length: int, budget: float) -> list[tuple[int, int]]:
    """Return the packs ``[start, end)`` of blocks with these scores, in order.

    Blocks are visited by rising score; a visited block begins a pack that reaches to the former cut. So packs begin at insensitive
    blocks. What is longer than `length` blocks or larger than `budget` bytes is split from its front.
    """
    cuts, back = [], len(scores)
    for index in sorted(range(len(scores)), key=lambda index: scores[index]):
        if index < back:
            cuts.append((index, back))
            back = index
    packs: list[tuple[int, int]] = []
    for start, end in reversed(cuts):
        first, held = start, 0.0
        for index in range(start, end):
            if index > first and (index - first >= length or held + sizes[index] > budget):
                packs.append((first, index))
                first, held = index, 0.0
            held += sizes[index]
        packs.append((first, end))
    return packs


def sensitivities(
    teacher: GraphModule,
    student: GraphModule,
    units: Sequence[Unit],
    images: Sequence[Tensor],
    store: Store,
    literal: bool,
    show: Show | None = None,
) -> list[float]:
    """Return for each unit the mean curvature H of the logits' KL along the error that quantizing it alone makes at its output.

    ``H = 2 L / mean(d^2)`` with L the KL and d the error; `literal` subtracts ``mean(g d)``, g the gradient of L, from L as published
    (at the quantized output, and with the scales as they are there: g is that of a mean over images, so the term is small). Units without
    layers, and networks without logits: 0.
    """
    scores = [0.0] * len(units)
    walk = Walk(teacher, teacher, units, images, store)
    for visit in walk:
        quantized = Learners(extract(student, on_student(visit.unit, student)), None, None).graph
        suffix = suffix_of(walk, visit.index)
        loss = square = first_order = 0.0
        size = BATCH if literal else visit.images_at_once()  # g is that of a batch, so all batches are alike
        for rows in torch.arange(store.count).split(size):
            value, error, product = _curvature(visit, quantized, suffix, rows, literal)
            loss, square, first_order = loss + value, square + error, first_order + product
        if show is not None:
            show(visit.index + 1, len(units), visit.unit.name)
        scores[visit.index] = 2 * (loss - first_order) / square if square else 0.0
        free_unused(teacher)
    return scores


def _curvature(visit: Visit, quantized: GraphModule, suffix: Suffix, rows: Tensor, literal: bool) -> tuple[float, float, float]:
    inputs, targets = visit.floats(rows), visit.targets(rows)
    with torch.no_grad():
        out = quantized(*inputs)
        mine = out if isinstance(out, tuple) else (out,)
        theirs = suffix(targets, rows)
    if not has_classes(theirs):
        return 0.0, 0.0, 0.0
    free = tuple(value.detach().requires_grad_(literal) for value in mine)
    with torch.set_grad_enabled(literal):
        loss = prediction_loss(theirs, suffix(free, rows))  # KL(quantized || float), as published
    gradients = torch.autograd.grad(loss, free) if literal else free
    errors = [target - value for target, value in zip(targets, mine, strict=True)]
    square = sum(error.square().mean().item() for error in errors)
    product = sum((gradient * error).mean().item() for gradient, error in zip(gradients, errors, strict=True)) if literal else 0.0
    return loss.item() * len(rows), square * len(rows), product * len(rows)
