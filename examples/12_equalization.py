"""Equalization, absorption and bias correction on depthwise networks, with ranges alone (Nagel et al. 2019, DFQ).

    python examples/12_equalization.py PATH
    python examples/12_equalization.py PATH --networks mobilenet_v2 --settings W4A8 --seeds 0 1 2 --out results

PATH is a folder with a zoo.py as in 02_cifar10_resnet20.py. A pass that is no stage of a recipe is run on the traced graph, and the graph
is then quantized like any network. Each run is appended to OUT/equalization.jsonl as soon as it is over, and not repeated when it is there
already. Calibrates on training images and tests on test images.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn
from torch.fx import GraphModule

import fxquant
from fxquant.passes import PREPARE, AbsorbHighBias, EqualizeChannels
from fxquant.pipeline import Pass, Pipeline

runs = importlib.import_module("06_reconstruction")  # beside this file, so it is found where this one is run as a script

NETWORKS = ("mobilenet_v2", "mobilenetv1_075", "squeezenet1_1")
RANGES = fxquant.Recipe(name="ranges", stages=("ranges",))
BIAS = fxquant.Recipe(name="bias", stages=("ranges", "bias"))
IMAGES = 128
"""Calibration images of which `AbsorbHighBias` takes the moments."""

WAYS: dict[str, tuple[tuple[str, ...], fxquant.Recipe]] = {
    "ranges": ((), RANGES),
    "equalized": (("equalize",), RANGES),
    "equalized, absorbed by batch norms": (("equalize", "absorb by batch norms"), RANGES),
    f"equalized, absorbed by {IMAGES} images": (("equalize", "absorb by images"), RANGES),
    "bias": ((), BIAS),
    "bias by batch norms": ((), BIAS.replace(name="bias by batch norms", bias_means="norms")),
    f"equalized, absorbed by {IMAGES} images, bias": (("equalize", "absorb by images"), BIAS),
}
"""Passes in front of the quantization, and the recipe of it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="folder with zoo.py")
    parser.add_argument("--networks", nargs="+", default=NETWORKS, metavar="NAME", help=f"(default: {' '.join(NETWORKS)})")
    parser.add_argument("--settings", nargs="+", default=["W8A8"], metavar="WxAy", help="bits (default: W8A8)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="one run each (default: 0)")
    parser.add_argument("--out", type=Path, default=Path("equalization"), help="folder for runs and the table (default: equalization)")
    parser.add_argument("--device", default="cpu", help="(default: cpu)")
    options = parser.parse_args()
    if not (options.path / "zoo.py").is_file():
        parser.error(f"{options.path} has no zoo.py; see --help")

    options.out.mkdir(parents=True, exist_ok=True)
    log = options.out / "equalization.jsonl"
    tables = [table(options, network, log) for network in options.networks]
    log.with_suffix(".md").write_text("\n".join(tables), encoding="utf-8")
    print("\n".join(tables))


def table(options: argparse.Namespace, network: str, log: Path) -> str:
    """Make the runs of a network that are not in the log yet, and return the table of all with these recipes, in Markdown."""
    data = runs.Data(options.path, network, False)
    float_network = data.model
    for name, (steps, recipe) in WAYS.items():
        data.model = prepared(float_network, data.calibration[:IMAGES], steps)
        for setting in options.settings:
            for seed in options.seeds:
                row = {"network": network, "setting": setting, "recipe": name, "seed": seed}
                if runs.run_once(log, row, data, recipe, options.device):
                    print(json.dumps(row), file=sys.stderr, flush=True)
    current = {name: runs.constants(recipe, options.device) for name, (_, recipe) in WAYS.items()}
    rows = [row for row in runs.rows_of(log) if row["network"] == network and row["constants"] == current.get(row["recipe"])]
    return f"{network}\n\n{runs.markdown(rows, data.float_top1)}"


def prepared(network: nn.Module, images: Tensor, steps: Sequence[str]) -> GraphModule:
    """Return the graph of `network` behind these passes."""
    made: dict[str, Pass] = {
        "equalize": EqualizeChannels(),
        "absorb by batch norms": AbsorbHighBias(),
        "absorb by images": AbsorbHighBias(images.split(32)),
    }
    return Pipeline([*(step() for step in PREPARE), *(made[step] for step in steps)]).run(fxquant.trace(network, images[:1]))


if __name__ == "__main__":
    main()
