"""What learning costs, as ratios measured in one run: the memory of units, a step of one, a step of the finish, and the whole recipe.

    python examples/07_benchmark_reconstruction.py PATH
    python examples/07_benchmark_reconstruction.py PATH --whole

PATH is a folder with a zoo.py as in 02_cifar10_resnet20.py. Times are medians of interleaved rounds on an otherwise idle machine.
Memory (Linux alone) is what the process grows by at most while units learn, what torch sets aside once included, and the float weights,
over these and the most that the cache held.
``--whole`` also runs the recipe standard from the images to the end (minutes).
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule

import fxquant
from fxquant.calibration import activation_quantizers, weight_quantizers
from fxquant.passes import PREPARE, FinishNetwork, InsertFakeQuant, InsertObservers
from fxquant.passes.reconstruct_units import unit_settings
from fxquant.pipeline import Pipeline
from fxquant.placement import place
from fxquant.reconstruction.unit import UnitData, UnitLearning, learn_unit
from fxquant.reconstruction.walk import Walk, cache_of
from fxquant.units import cut

DEVICE = torch.device("cpu")
PROCESS = Path("/proc/self/statm")
"""Where Linux says what memory a process has."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="folder with zoo.py")
    parser.add_argument("--rounds", type=int, default=15, help="(default: 15)")
    parser.add_argument("--whole", action="store_true", help="also run the recipe standard to the end")
    options = parser.parse_args()
    spec = importlib.util.spec_from_file_location("zoo", options.path.resolve() / "zoo.py")
    if spec is None or spec.loader is None or not (options.path / "zoo.py").is_file():
        parser.error(f"{options.path} has no zoo.py; see --help")
    zoo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(zoo)
    model, norm = zoo.load_model("cifar10_resnet20")
    images = list(zoo.load_images("cifar10_train8192", norm, 1024)[0].split(64))
    teacher, student = prepared(model, images)

    print(f"ResNet-20, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print("| what | ratio | goal |\n|---|---:|---:|")
    if PROCESS.is_file():
        print(f"| memory of the stage of units, QDrop, over model and cache | {memory_ratio(teacher, student, images):.2f} | 1.2 |")
    ratio = unit_ratio(teacher, student, images, options.rounds)
    print(f"| step of a unit, QDrop, over forward and backward of the float unit | {ratio:.2f} | 1.6 |")
    for precision in ("float32", "bfloat16"):
        ratio = finish_ratio(model, teacher, student, images, precision, options.rounds)
        print(f"| step of the finish over a float training step, {precision} | {ratio:.2f} | 2.2 |")
    if options.whole:
        start = time.perf_counter()
        fxquant.quantize(model, images, 2, 2)
        print(f"\nrecipe standard, W2A2, from 1,024 images to the end: {(time.perf_counter() - start) / 60:.1f} minutes (goal: 10)")


def prepared(model: nn.Module, images: list[torch.Tensor]) -> tuple[GraphModule, GraphModule]:
    """Return the float graph and the quantized one, W2A2."""
    teacher = Pipeline([step() for step in PREPARE]).run(fxquant.trace(model, images[0]))
    plan = place(teacher, 2, 2)
    observed = InsertObservers(plan)(teacher).graph_module
    with torch.no_grad():
        for batch in images[:4]:
            observed(batch)
    recipe = fxquant.Recipe.QDROP
    return teacher, InsertFakeQuant(plan, activation_quantizers(recipe), weight_quantizers(recipe))(observed).graph_module


def memory_ratio(teacher: GraphModule, student: GraphModule, images: list[torch.Tensor]) -> float:
    """Return weights and the bytes that the process grows by at most while all units learn (a few steps each) over weights and cache."""
    page = os.sysconf("SC_PAGE_SIZE")
    resident = lambda: int(PROCESS.read_text().split()[1]) * page  # noqa: E731
    before, seen, over = resident(), [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.002):
            seen.append(resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        store = cache_of(fxquant.Recipe.QDROP, sum(map(len, images)), DEVICE)
        settings = replace(unit_settings(fxquant.Recipe.QDROP), iterations=20)
        for visit in Walk(teacher, student, cut(teacher), images, store):
            learn_unit(UnitData(visit, store.count), settings, 0, lambda done, total, text: None)
    finally:
        over.set()
        watcher.join()
    weights = sum(value.numel() * value.element_size() for value in teacher.parameters())
    return (weights + max(seen) - before) / (weights + store.peak)


def unit_ratio(teacher: GraphModule, student: GraphModule, images: list[torch.Tensor], rounds: int) -> float:
    """Return the time of one step of every unit over that of a forward and backward pass of every float unit."""
    settings, count = unit_settings(fxquant.Recipe.QDROP), sum(map(len, images))
    mine = theirs = 0.0
    for visit in Walk(teacher, student, cut(teacher), images, cache_of(fxquant.Recipe.QDROP, count, DEVICE)):
        learning = UnitLearning(UnitData(visit, count), settings, 0)
        optimizer = torch.optim.Adam(learning.groups, lr=0.0, fused=True)
        learning._dropping(settings.drop)
        weights = [nn.Parameter(value.detach().clone()) for value in visit.teacher.parameters()]
        names = [name for name, _ in visit.teacher.named_parameters()]

        def step(learning=learning, optimizer=optimizer) -> None:
            optimizer.zero_grad(set_to_none=True)
            learning.backward(learning.draw(), 0.5)
            optimizer.step()

        def plain(visit=visit, names=names, weights=weights) -> None:
            rows = torch.randint(count, (settings.batch,))
            out = torch.func.functional_call(visit.teacher, dict(zip(names, weights, strict=True)), visit.floats(rows))
            (out[0] if isinstance(out, tuple) else out).square().mean().backward()

        first, second = interleaved([step, plain], rounds)
        mine, theirs = mine + first, theirs + second
    return mine / theirs


def finish_ratio(
    model: nn.Module, teacher: GraphModule, student: GraphModule, images: list[torch.Tensor], precision: str, rounds: int
) -> float:
    """Return the time of one step of the finish over that of a training step of the float network in float32, augmentation in both."""
    recipe = fxquant.Recipe.STANDARD.replace(precision=precision)
    training = FinishNetwork(teacher, images, images, recipe, 0, DEVICE).training(student)
    optimizer = torch.optim.Adam([{"params": values, "lr": 0.0} for values, _ in training.groups], fused=True)
    network = fxquant.trace(model, images[0]).train().requires_grad_(True)
    plain_optimizer = torch.optim.Adam(network.parameters(), lr=0.0, fused=True)
    labels = torch.arange(recipe.finish_batch) % 10

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        training.backward(training.views.batch(0))
        optimizer.step()
        for learner in training.latents:
            learner.project()

    def plain() -> None:
        loss = F.cross_entropy(network(training.views.batch(0)), labels)
        plain_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        plain_optimizer.step()

    mine, theirs = interleaved([step, plain], rounds)
    return mine / theirs


def interleaved(functions: list[Callable[[], None]], rounds: int) -> list[float]:
    """Return the median seconds of each function, called in turns."""
    times: list[list[float]] = [[] for _ in functions]
    for number in range(rounds + 2):
        for function, taken in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            if number > 1:
                taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in times]


if __name__ == "__main__":
    main()
