"""A pretrained CIFAR-10 ResNet-20, from 8 to 2 bits, stage by stage: ranges only, with corrected biases, with CAT.

    python examples/02_cifar10_resnet20.py PATH
    python examples/02_cifar10_resnet20.py PATH --settings W2A2 --seeds 0 1 2 --markdown

PATH is a folder with a zoo.py that has

    load_model("cifar10_resnet20")                -> (model in eval mode, norm)
    load_images("cifar10_train8192", norm, 1024)  -> images [N, 3, 32, 32] float32, normalized; labels [N]
    load_images("cifar10_test", norm)             -> the same

Calibrates with the training images, tests with the test images. With several seeds, prints the mean and the standard deviation.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import statistics
from pathlib import Path
from types import ModuleType

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import fxquant
from fxquant.metrics import agreement, kl_divergence, top1

SETTINGS = ("W8A8", "W4A4", "W3A3", "W2A4", "W4A2", "W2A2")
STAGES = {"ranges": ("ranges",), "ranges, bias": ("ranges", "bias"), "ranges, bias, cat": ("ranges", "bias", "cat")}
COLUMNS = ("network", "stages", "top-1 %", "agreement %", "KL to float")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="folder with zoo.py")
    parser.add_argument("--settings", nargs="+", default=SETTINGS, metavar="WxAy", help=f"bits (default: {' '.join(SETTINGS)})")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="one run each (default: 0)")
    parser.add_argument("--images", type=int, default=1024, help="to calibrate with (default: 1024)")
    parser.add_argument("--recipe", default="fast", help="where all constants but the stages come from (default: fast)")
    parser.add_argument("--markdown", action="store_true", help="print the table as markdown")
    options = parser.parse_args()
    try:
        bits = {name: tuple(map(int, re.fullmatch(r"W(\d)A(\d)", name).groups())) for name in options.settings}  # type: ignore[union-attr]
    except AttributeError:
        parser.error("settings look like W4A8")
    if not (options.path / "zoo.py").is_file():
        parser.error(f"{options.path} has no zoo.py; see --help")

    zoo = import_zoo(options.path)
    model, norm = zoo.load_model("cifar10_resnet20")
    calibration = list(zoo.load_images("cifar10_train8192", norm, options.images)[0].split(64))
    images, labels = zoo.load_images("cifar10_test", norm)
    teacher = logits(model, images)
    rows = [("float", "", f"{top1(teacher, labels):.2f}", "", "")]
    recipe = fxquant.Recipe.named(options.recipe)
    runs = [(name, stages) for name in bits for stages in STAGES]
    for name, stages in track(runs, "quantize and test", console=Console(stderr=True)):
        scores = []
        for seed in options.seeds:
            w, a = bits[name]
            only = recipe.replace(stages=STAGES[stages])
            qmodel = fxquant.quantize(model, calibration, w, a, recipe=only, seed=seed, progress=False)
            student = logits(qmodel, images)
            scores.append((top1(student, labels), agreement(student, teacher), kl_divergence(student, teacher).mean().item()))
        first, second, third = zip(*scores, strict=True)
        rows.append((name, stages, spread(first, 2), spread(second, 2), spread(third, 4)))
    title = f"CIFAR-10 ResNet-20: {len(images):,} test images, {options.images:,} to calibrate, seeds {options.seeds}"
    show(rows, title, options.markdown)


def import_zoo(folder: Path) -> ModuleType:
    """Import ``folder/zoo.py``."""
    spec = importlib.util.spec_from_file_location("zoo", folder.resolve() / "zoo.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@torch.inference_mode()
def logits(network: nn.Module, images: Tensor) -> Tensor:
    """Return the outputs ``[N, C]`` for all images."""
    return torch.cat([network(batch) for batch in images.split(250)])


def spread(values: tuple[float, ...], digits: int) -> str:
    """Return the value, or mean ± standard deviation of several."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def show(rows: list[tuple[str, ...]], title: str, markdown: bool) -> None:
    """Print the table."""
    if markdown:
        print(f"{title}\n")
        for row in (COLUMNS, ("---",) * 2 + ("---:",) * 3, *rows):
            print(f"| {' | '.join(row)} |")
        return
    table = Table(title=title)
    for number, name in enumerate(COLUMNS):
        table.add_column(name, justify="right" if number > 1 else "left")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    main()
