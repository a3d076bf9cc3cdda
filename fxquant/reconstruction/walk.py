"""Walk over the units of teacher and student side by side, once: the cache moves forward, and nothing runs from the image again.

    float    x0 --unit 1--> x1 --unit 2--> x2        targets of a unit: the outputs of the float unit
    student  x0 --unit 1'-> q1 --unit 2'-> q2        unit 1' is learned before q1 is computed

What no later unit reads is dropped. A unit is run once a side and batch to fill the cache, so the total is twice the number of units;
where teacher and student are one graph, there is one side.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxquant.execution import BATCH, copied_bytes_per_image, images_at_once
from fxquant.graph import called
from fxquant.kinds import kind
from fxquant.quantizers import UniformQuantizer
from fxquant.recipe import Recipe
from fxquant.reconstruction.learners import Learners, without_gradients
from fxquant.reconstruction.store import Store
from fxquant.units import Unit, extract, on_student

MOVES = ("input", "view", "getitem", "getattr", "size", "matmul", "attention", "other", "constant", "mean")
"""Kinds of nodes behind which the channels may be on another axis than in front."""


@dataclass
class Visit:
    """A unit at its turn: its graphs, and the rows of what goes in and should come out."""

    index: int
    unit: Unit
    teacher: GraphModule
    student: GraphModule
    store: Store
    shared: frozenset[str] = frozenset()
    """Names that are the same on both sides: the images, or all where teacher and student are one graph."""
    activations: bool = True
    """Whether the student's activations are quantized."""
    nodes: tuple[Node, ...] = ()
    """What the unit reads and computes, in the whole float graph."""
    settled: frozenset[str] = frozenset()
    """Paths of quantizers that an earlier unit has learned already: those of images that several units read."""

    def images_at_once(self, most: int = BATCH) -> int:
        """Return how many images to run through the unit together."""
        return images_at_once(self.nodes, self.store.device, most)

    def is_settled(self, module: nn.Module) -> bool:
        """Say whether `module` of the student is one of those."""
        return any(self.student.get_submodule(path) is module for path in self.settled)

    @property
    def axes(self) -> tuple[int | None, ...]:
        """The axis of the channels of each output, None where the graph does not tell."""
        returned = next(node for node in self.teacher.graph.nodes if node.op == "output").args[0]
        return tuple(channel_axis(node) for node in (returned if isinstance(returned, tuple) else (returned,)))

    def floats(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Return rows of the inputs in the float network."""
        return tuple(self.store.rows(key(name, "float", self.shared), rows) for name in self.unit.inputs)

    def quantized(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Return rows of the inputs behind what has been quantized so far."""
        return tuple(self.store.rows(key(name, "student", self.shared), rows) for name in self.unit.inputs)

    def targets(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Return rows of the outputs of the float unit."""
        return tuple(self.store.rows(key(name, "float", self.shared), rows) for name in self.unit.outputs)


def channel_axis(node: Node) -> int | None:
    """Return the axis of the channels of a node's value, as the layer says that it comes from through elementwise operations; else None."""
    todo, seen = [node], set[Node]()
    while todo:
        node = todo.pop(0)
        word = kind(node)
        if word in ("linear", "layer_norm"):
            return -1
        if word in ("conv", "conv_transpose", "batch_norm", "group_norm"):
            return 1
        if word not in MOVES:
            todo += [parent for parent in node.all_input_nodes if parent not in seen]
        seen.add(node)
    return None


def key(name: str, side: str, shared: frozenset[str]) -> str:
    """Return under which name a tensor is stored: once when it is `shared`, else once a side."""
    return name if name in shared else f"{side}:{name}"


class Walk:
    """The walk.

    Args:
        teacher: the float graph.
        student: the quantized graph; its modules may be replaced while a unit is visited, and the new ones are what is run. Or `teacher`
            itself, where nothing is learned: then all inputs are float.
        units: a partition of `teacher`.
        images: calibration images, in order.
        store: where activations are kept.
        activations: False: the student's activations stay float, only its weights are quantized.
    """

    def __init__(
        self,
        teacher: GraphModule,
        student: GraphModule,
        units: Sequence[Unit],
        images: Sequence[Tensor],
        store: Store,
        activations: bool = True,
    ):
        self.teacher, self.student, self.units, self.store = without_gradients(teacher), student, units, store
        placeholders = [node.name for node in teacher.graph.nodes if node.op == "placeholder"]
        same = [name for unit in units for name in unit.outputs] if student is teacher else []
        self.shared = frozenset((*placeholders, *same))
        self.placeholders = frozenset(placeholders)
        self.images, self.activations = images, activations
        self.nodes = {node.name: node for node in teacher.graph.nodes}
        read = {name for unit in units for name in unit.inputs}
        self.last = {name: max(index for index, unit in enumerate(units) if name in unit.inputs) for name in read}

    def __iter__(self) -> Iterator[Visit]:
        for name in self.placeholders & self.last.keys():
            self.store.put(name, self.images)
        settled: set[str] = set()
        for index, unit in enumerate(self.units):
            teacher = extract(self.teacher, unit)
            self._fill(teacher, unit, "float")
            if unit.layers:
                student = extract(self.student, on_student(unit, self.student))
                of_images = {str(node.target) for node, _ in called(student) if node.all_input_nodes[0].name in self.placeholders}
                of_images = {path for path in of_images if isinstance(student.get_submodule(path), UniformQuantizer)}
                known = frozenset(of_images & settled)
                nodes = tuple(self._nodes(unit))
                yield Visit(index, unit, teacher, student, self.store, self.shared, self.activations, nodes, known)
                settled |= of_images
            if any(name in self.last and name not in self.shared for name in unit.outputs):
                quantized = extract(self.student, on_student(unit, self.student))
                self._fill(Learners(quantized, None, None, float_activations=not self.activations).graph, unit, "student")
            self._drop(index, unit)

    def rows(self, name: str, rows: Tensor) -> Tensor:
        """Return rows of a tensor as the student has it."""
        return self.store.rows(key(name, "student", self.shared), rows)

    def _fill(self, graph: GraphModule, unit: Unit, side: str) -> None:
        """Run one side of a unit over all images, and store what later units read (of the float side: all, as targets)."""
        wanted = [name for name in unit.outputs if (side == "float" and unit.layers) or name in self.last]
        if not wanted:
            return
        places = [unit.outputs.index(name) for name in wanted]
        names = [key(name, side, self.shared) for name in wanted]
        self.store.put_all(names, ([values[place] for place in places] for values in self._outputs(graph, unit, side)))

    @torch.no_grad()
    def _outputs(self, graph: GraphModule, unit: Unit, side: str) -> Iterator[tuple[Tensor, ...]]:
        size = images_at_once(self._nodes(unit), self.store.device)
        inputs = [self.store.batches(key(name, side, self.shared), size) for name in unit.inputs]
        for values in zip(*inputs, strict=True):
            out = graph(*values)
            yield out if isinstance(out, tuple) else (out,)

    def _nodes(self, unit: Unit) -> list[Node]:
        return [self.nodes[name] for name in (*unit.inputs, *unit.nodes)]

    def _drop(self, index: int, unit: Unit) -> None:
        dead = {name for name, last in self.last.items() if last == index} | {name for name in unit.outputs if name not in self.last}
        for name in dead:
            for side in ("float", "student"):
                if key(name, side, self.shared) in self.store.names:
                    self.store.drop(key(name, side, self.shared))


def cache_of(recipe: Recipe, count: int, device: torch.device) -> Store:
    """Return the empty cache for `count` images that a recipe asks for."""
    narrow = torch.bfloat16 if recipe.cache_dtype == "bfloat16" else None
    return Store(count, device, recipe.memory_gib * 2**30, narrow)


def peak_need(
    teacher: GraphModule, units: Sequence[Unit], count: int, share: float = 1.0, gradients: bool = False, corrected: bool = False
) -> float:
    """Return the most bytes the cache holds at once, for `count` images, from the traced shapes.

    Args:
        share: bytes stored for a byte of activations (0.5 for float32 in bfloat16).
        gradients: the recipe stores a gradient for every output of the unit at hand (Fisher).
        corrected: the recipe stores corrected inputs and targets of the unit at hand (distribution correction).
    """
    nodes = {node.name: node for node in teacher.graph.nodes}
    images = {node.name for node in teacher.graph.nodes if node.op == "placeholder"}
    last = {name: index for index, unit in enumerate(units) for name in unit.inputs}
    size = {name: copied_bytes_per_image(nodes[name]) for unit in units for name in (*unit.inputs, *unit.outputs)}
    live: dict[str, float] = {name: size[name] for name in images & last.keys()}
    peak = 0.0
    for index, unit in enumerate(units):
        inputs, outputs = (sum(size[name] for name in names) for names in (unit.inputs, unit.outputs))
        targets = dict.fromkeys(unit.outputs if unit.layers else [name for name in unit.outputs if name in last], 1)
        extra = (gradients * outputs + corrected * (inputs + outputs)) if unit.layers else 0.0
        peak = max(peak, sum(live.values()) + sum(size[name] for name in targets) + extra)
        for name in unit.outputs:
            live[name] = size[name] * ((name in targets) + (name in last))
        peak = max(peak, sum(live.values()))
        live = {name: value for name, value in live.items() if last.get(name, -1) > index}
    return peak * count * share


def inner_of(units: Sequence[Unit]) -> list[int]:
    """Return the places of the units that packs are made of: those with layers, but the first and the last, from the first to the last that
    has several layers, where several have."""
    learned = [index for index, unit in enumerate(units) if unit.layers]
    blocks = [index for index in learned if len(units[index].layers) > 1]
    first, last = (blocks[0], blocks[-1]) if len(blocks) > 1 else (0, len(units))
    return [index for index in learned[1:-1] if first <= index <= last]


def peak_need_of_packs(
    teacher: GraphModule,
    units: Sequence[Unit],
    count: int,
    length: int,
    share: float = 1.0,
    gradients: bool = False,
    corrected: bool = False,
) -> float:
    """Return the most bytes the cache may hold at once when runs of up to `length` of the inner units with layers are merged into packs.

    Which ones is not known before they are scored, so each run is tried. The last three arguments are those of `peak_need`.
    """
    inner = inner_of(units)
    returned = {node.name for node in next(iter(teacher.graph.find_nodes(op="output"))).all_input_nodes}
    most = peak_need(teacher, units, count, share, gradients, corrected)
    for place, first in enumerate(inner):
        for last in inner[place + 1 : place + length]:
            run, others = units[first : last + 1], [*units[:first], *units[last + 1 :]]
            made = {name: None for unit in run for name in unit.outputs}
            read = {name: None for unit in run for name in unit.inputs if name not in made}
            kept = returned.union(*(unit.inputs for unit in others))
            joined = Unit("", (), tuple(read), tuple(name for name in made if name in kept), units[first].layers)
            most = max(most, peak_need(teacher, [*units[:first], joined, *units[last + 1 :]], count, share, gradients, corrected))
    return most
