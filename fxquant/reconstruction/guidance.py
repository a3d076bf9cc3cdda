"""What some recipes look at beyond a unit and its float twin: the rest of the network, and the statistics of batch norms."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule

from fxquant.calibration import activation_quantizers
from fxquant.graph import called, fork, put_module
from fxquant.placement import TensorPlan
from fxquant.quantizers import UniformQuantizer, observer_of
from fxquant.recipe import Recipe
from fxquant.reconstruction.learners import Learners
from fxquant.reconstruction.losses import channel_loss
from fxquant.reconstruction.norms import FoldedNorm, norm_distance
from fxquant.reconstruction.unit import Show
from fxquant.reconstruction.walk import Visit, Walk
from fxquant.units import extract, merge

Suffix = Callable[[tuple[Tensor, ...], Tensor], Tensor]


def suffix_of(walk: Walk, index: int) -> Suffix:
    """Return what takes the outputs of unit `index`, and the rows they stand for, to the network's output through the float units behind.

    Gradients reach the outputs and nothing of the float units.
    """
    unit = walk.units[index]
    if index + 1 == len(walk.units):
        return lambda outputs, rows: outputs[0]
    rest = merge(walk.teacher, walk.units[index + 1 :])
    graph = extract(walk.teacher, rest)

    def run(outputs: tuple[Tensor, ...], rows: Tensor) -> Tensor:
        given = dict(zip(unit.outputs, outputs, strict=True))
        return graph(*(given[name] if name in given else walk.rows(name, rows) for name in rest.inputs))

    return run


def output_gradients(visit: Visit, suffix: Suffix, logits: Tensor, batch: int) -> tuple[list[str], Callable[[Tensor], tuple[Tensor, ...]]]:
    """Store ``|d KL(teacher || student) / d output| + 1`` for every output of the quantized unit (BRECQ), and return names and reader."""
    names = [f"gradient:{name}" for name in visit.unit.outputs]
    graph = Learners(visit.student, None, None, float_activations=not visit.activations).graph

    def gradients() -> Iterator[list[Tensor]]:
        for rows in torch.arange(len(logits)).split(batch):
            with torch.no_grad():
                out = graph(*visit.quantized(rows))
            outputs = tuple(value.detach().requires_grad_() for value in (out if isinstance(out, tuple) else (out,)))
            log_q, p = F.log_softmax(suffix(outputs, rows), 1), F.softmax(logits[rows.to(logits.device)], 1)
            loss = F.kl_div(log_q, p, reduction="sum") / min(batch, len(logits))  # images of the last, smaller batch weigh as much
            found = torch.autograd.grad(loss, outputs)
            yield [gradient.abs() + 1 for gradient in found]

    visit.store.put_all(names, gradients())
    return names, lambda rows: tuple(visit.store.rows(name, rows) for name in names)


def corrected_inputs(
    visit: Visit, walk: Walk, norms: Mapping[str, FoldedNorm], count: int, recipe: Recipe, show: Show
) -> tuple[list[str], Callable[[Tensor], tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]]:
    """Correct the float inputs of a unit towards the statistics of its batch norms (PD-Quant, section 3.3), and return names and reader.

    The inputs x' of each batch minimize, by Adam, starting at the true float inputs x,

        sum over norms, mean over images of |mean - m(x')|^2 + |deviation - s(x')|^2   +   pull * mean sum_channel |x' - x|^2

    with m and s the mean and the standard deviation over the positions of one image. The targets become the float unit's outputs for x'.
    `show` is told how many images are done.
    """
    names = [f"corrected:{name}" for name in visit.unit.inputs]
    targets = [f"corrected:{name}" for name in visit.unit.outputs]
    found = [(node.name, norms[str(node.target)]) for node, _ in called(visit.teacher) if str(node.target) in norms]
    probe = extract(walk.teacher, replace(visit.unit, outputs=(*visit.unit.outputs, *(name for name, _ in found))))
    if not found:
        return [], lambda rows: (visit.floats(rows), visit.targets(rows))

    def corrected() -> Iterator[tuple[Tensor, ...]]:
        for rows in torch.arange(count).split(recipe.unit_batch):  # rates fall by the loss of a batch
            show(0, 1, f"correcting inputs: {int(rows[0])} of {count} images")
            moved = _corrected(probe, visit.floats(rows), [norm for _, norm in found], len(visit.unit.outputs), recipe)
            with torch.no_grad():
                out = visit.teacher(*moved)
            yield (*moved, *(out if isinstance(out, tuple) else (out,)))

    visit.store.put_all([*names, *targets], corrected())

    def read(rows: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        return tuple(visit.store.rows(name, rows) for name in names), tuple(visit.store.rows(name, rows) for name in targets)

    return [*names, *targets], read


def _corrected(probe: GraphModule, inputs: tuple[Tensor, ...], norms: list[FoldedNorm], outputs: int, recipe: Recipe) -> tuple[Tensor, ...]:
    moved = tuple(value.detach().clone().requires_grad_(value.is_floating_point()) for value in inputs)
    free = [value for value in moved if value.requires_grad]
    optimizer = torch.optim.Adam(free, recipe.unit_correction_rate)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer,
        factor=recipe.unit_correction_decay,
        patience=recipe.unit_correction_patience,
        min_lr=recipe.unit_correction_least_rate,
    )
    for _ in range(recipe.unit_correction_iterations):
        values = probe(*moved)[outputs:]
        loss = torch.stack([norm_distance(value, norm) for value, norm in zip(values, norms, strict=True)]).sum()
        pull = [channel_loss(new, old) for new, old in zip(moved, inputs, strict=True) if new.requires_grad]
        loss = loss + recipe.unit_correction_pull * torch.stack(pull).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        plateau.step(loss.item())
    return tuple(value.detach() for value in moved)


def choose_ranges_again(visit: Visit, student: GraphModule, recipe: Recipe) -> None:
    """Choose the scale of every activation quantizer of a unit from what reaches it behind the quantized prefix, in order (PD-Quant)."""
    make = activation_quantizers(recipe)
    graph = fork(visit.student)
    rows = torch.arange(min(recipe.unit_range_images, visit.store.count)).split(visit.images_at_once())
    for node, module in list(called(graph)):
        if not isinstance(module, UniformQuantizer) or visit.is_settled(module):
            continue
        path = str(node.target)
        observer = observer_of(path, module.spec.axis)
        put_module(graph, path, observer)
        with torch.no_grad():
            for part in rows:
                graph(*visit.quantized(part))
        chosen = make(TensorPlan(path, module.spec.bits, (), axis=module.spec.axis), observer)
        for place in (graph, visit.student, student):
            put_module(place, path, chosen)
