"""What a ResNet-18 costs: to trace, to find ranges for, to fit a CAT to, to correct at inference, to store.

    python examples/04_benchmark_resnet18.py
    python examples/04_benchmark_resnet18.py --skip-inference

Weights are random and norms perturbed: time and size do not depend on accuracy. Each number is measured in this run and compared with
its goal, which is meant for two CPU cores with nothing else on them. CAT is timed alone, compiled, on logits; the compiled 2-bit network
without CAT takes turns with it, and the share is that of the medians. Needs no data; a C++ compiler for torch.compile.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
import torchvision
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.fx import GraphModule

import fxquant
from fxquant.cat import fit_cat
from fxquant.kinds import WEIGHTED, kind
from fxquant.passes import PREPARE, AppendCAT
from fxquant.pipeline import Pipeline
from fxquant.quantizers import weight_quantizer
from fxquant.quantizers.layers import weight_spec

IMAGES, CLASSES, CLUSTERS = 1024, 1000, 64
BATCHES = {1: (0.02, 60), 32: (0.005, 7)}
"""Batch size: the share of the network's time that CAT may take, and how often to measure."""


@dataclass
class Row:
    """A measured value, its goal (at most), how to print both, and a remark."""

    what: str
    value: float
    goal: float
    show: Callable[[float], str]
    remark: str = ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--skip-inference", action="store_true", help="leave out what needs torch.compile")
    options = parser.parse_args()
    console = Console(stderr=True)
    torch.manual_seed(0)
    model = resnet18()
    console.print("trace, ranges, fits")
    start = time.perf_counter()
    graph = fxquant.trace(model, torch.randn(2, 3, 224, 224))
    rows = [Row("trace", time.perf_counter() - start, 5, seconds)]
    rows.append(Row("weight ranges", range_seconds(graph), 10, seconds, "all layers at 2 bits, L_2.4"))
    student, teacher = logits()
    for fit in ("moments", "ridge", "kl"):
        start = time.perf_counter()
        cat = fit_cat(student, teacher, fit=fit, clusters=CLUSTERS)
        rows.append(Row(f"CAT fit {fit}", time.perf_counter() - start, 2, seconds, f"{IMAGES:,} x {CLASSES:,} logits, K={CLUSTERS}"))
    console.print("quantize and save")
    qmodel = quantized(model)
    before = len(safetensors.torch.save(model.state_dict()))
    size = file_bytes(qmodel)
    rows.append(Row("W2 file, no CAT", size / before, 1 / 11, fraction, f"{size:,} of {before:,} bytes"))
    corrected = AppendCAT(cat)(qmodel).graph_module
    corrected.meta.update(qmodel.meta)
    size = file_bytes(corrected)
    rows.append(Row(f"W2 file, CAT K={CLUSTERS}", size / before, 1 / 11, fraction, f"{size:,} of {before:,} bytes"))
    if not options.skip_inference:
        network = torch.compile(qmodel, fullgraph=True, dynamic=False)
        correction = torch.compile(cat, fullgraph=True, dynamic=False)
        for batch, (goal, repeats) in BATCHES.items():
            console.print(f"inference at batch {batch}, compiled")
            whole, part = inference_seconds(network, correction, batch, repeats)
            remark = f"{1e3 * part:.2f} of {1e3 * whole:.1f} ms"
            rows.append(Row(f"CAT at batch {batch}", part / whole, goal, percent, remark))
    table = Table(title=f"ResNet-18, 224 px, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for name in ("what", "value", "goal", "met", ""):
        table.add_column(name, justify="right" if name in ("value", "goal") else "left")
    for row in rows:
        met = "[green]yes[/]" if row.value <= row.goal else "[red]no[/]"
        table.add_row(row.what, row.show(row.value), row.show(row.goal), met, row.remark)
    Console().print(table)


def resnet18() -> nn.Module:
    """Return a ResNet-18 with random weights, and with norms that are not the identity."""
    model = torchvision.models.resnet18(weights=None).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for value, low, high in ((module.weight, 0.5, 1.5), (module.bias, -0.2, 0.2)):
                nn.init.uniform_(value, low, high)
            nn.init.normal_(module.running_mean, std=0.1)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 1.5)  # type: ignore[arg-type]
    return model


def range_seconds(graph: GraphModule) -> float:
    """Return how long the ranges of all weights take, batch norms folded."""
    folded = Pipeline([step() for step in PREPARE]).run(graph)
    layers = [folded.get_submodule(str(node.target)) for node in folded.graph.nodes if node.op == "call_module" and kind(node) in WEIGHTED]
    start = time.perf_counter()
    for layer in layers:
        weight_quantizer(layer.weight, weight_spec(layer, 2, False), "lp", p=2.4)  # type: ignore[arg-type]
    return time.perf_counter() - start


def logits() -> tuple[Tensor, Tensor]:
    """Return made-up logits of a student and of its teacher: classes that go together, and noise."""
    teacher = torch.randn(IMAGES, 40) @ torch.randn(40, CLASSES) / 3
    return 0.6 * teacher + 0.5 * torch.randn(IMAGES, CLASSES), teacher


def quantized(model: nn.Module) -> GraphModule:
    """Return `model` at W2A2 with edges at 8 bits; ranges are the cheapest ones, because the size does not depend on them."""
    recipe = fxquant.Recipe.FAST.replace(stages=("ranges",), weight_range="minmax", activation_range="minmax")
    return fxquant.quantize(model, [torch.randn(4, 3, 224, 224)], w=2, a=2, cat=False, recipe=recipe, progress=False)


def file_bytes(qmodel: nn.Module) -> int:
    """Return the size of the saved network."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.safetensors"
        fxquant.save(qmodel, path)
        return path.stat().st_size


@torch.inference_mode()
def inference_seconds(network: nn.Module, cat: nn.Module, batch: int, repeats: int) -> tuple[float, float]:
    """Return the median seconds of the network and of CAT on its logits, the two taking turns."""
    images = torch.randn(batch, 3, 224, 224)
    for _ in range(3):
        outputs = network(images)
        cat(outputs)
    times: tuple[list[float], list[float]] = ([], [])
    for _ in track(range(repeats), "measure", console=Console(stderr=True), transient=True):
        for step, value, found in zip((network, cat), (images, outputs), times, strict=True):
            start = time.perf_counter()
            step(value)
            found.append(time.perf_counter() - start)
    return statistics.median(times[0]), statistics.median(times[1])


def seconds(value: float) -> str:
    return f"{value:.2f} s"


def percent(value: float) -> str:
    return f"{value:.2%}"


def fraction(value: float) -> str:
    return f"1/{1 / value:.2f}"


if __name__ == "__main__":
    main()
