"""Recipes on vision transformers, and what the closed forms of ERQ cost on a network of DeiT-S's size.

    python examples/11_transformers.py PATH
    python examples/11_transformers.py PATH --networks cifar10_vit48 --recipes ranges erq --settings W4A4 --seeds 0 1 2 --out results
    python examples/11_transformers.py PATH --recipes erq --set weight_groups='"dual"' --development
    python examples/11_transformers.py --time

PATH is a folder with a zoo.py as in 02_cifar10_resnet20.py. Each run is appended to OUT/runs.jsonl as soon as it is over, and not
repeated when it is there already. Calibrates on training images and tests on test images; ``--development``, from which constants are
chosen, tests on other training images. The recipe "ranges" is the stage of that name alone, with uniform grids for softmaxes, too.

``--time`` needs no data: random weights, random norms, 32 random images of 224 pixels, W4A4, recipe "erq".
"""

from __future__ import annotations

import argparse
import importlib
import json
import resource
import sys
import time
from pathlib import Path

import torch
from torch import nn

import fxquant

runs = importlib.import_module("06_reconstruction")  # beside this file, so it is found where this one is run as a script

NETWORKS = ("cifar10_vit48", "cifar10_vit_postnorm")
SETTINGS = ("W8A8", "W4A8", "W4A4", "W3A4")
RECIPES = ("ranges", "fast", "erq", "standard", "best")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, nargs="?", help="folder with zoo.py")
    parser.add_argument("--networks", nargs="+", default=NETWORKS, metavar="NAME", help=f"(default: {' '.join(NETWORKS)})")
    parser.add_argument("--settings", nargs="+", default=SETTINGS, metavar="WxAy", help=f"bits (default: {' '.join(SETTINGS)})")
    parser.add_argument("--recipes", nargs="+", default=RECIPES, metavar="NAME", help=f"(default: {' '.join(RECIPES)})")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="one run each (default: 0 1 2)")
    parser.add_argument("--set", nargs="+", default=[], metavar="FIELD=VALUE", help="change fields of every recipe")
    parser.add_argument("--development", action="store_true", help="test on training images behind the calibration images")
    parser.add_argument("--out", type=Path, default=Path("transformers"), help="folder for runs and tables (default: transformers)")
    parser.add_argument("--device", default="cpu", help="(default: cpu)")
    parser.add_argument("--time", action="store_true", help="time ERQ on a network of DeiT-S's size instead")
    parser.add_argument("--images", type=int, default=32, help="images of --time (default: 32)")
    options = parser.parse_args()
    changes = {name: json.loads(value) for name, _, value in (item.partition("=") for item in options.set)}
    if options.time:
        measure(options.images, options.device, recipe_of("erq").replace(**changes))
        return
    if options.path is None or not (options.path / "zoo.py").is_file():
        parser.error(f"{options.path or 'PATH'} has no zoo.py; see --help")

    recipes = {runs.label(name, changes): recipe_of(name).replace(name=name, **changes) for name in options.recipes}
    options.out.mkdir(parents=True, exist_ok=True)
    log = options.out / ("development.jsonl" if options.development else "runs.jsonl")
    tables = [table(options, network, recipes, log) for network in options.networks]
    log.with_suffix(".md").write_text("\n".join(tables), encoding="utf-8")
    print("\n".join(tables))


def recipe_of(name: str) -> fxquant.Recipe:
    """Return a recipe by name, ``"ranges"`` among them."""
    return fxquant.Recipe(name=name, stages=("ranges",)) if name == "ranges" else fxquant.Recipe.named(name)


def table(options: argparse.Namespace, network: str, recipes: dict[str, fxquant.Recipe], log: Path) -> str:
    """Make the runs of a network that are not in the log yet, and return the table of all with these recipes, in Markdown."""
    data = runs.Data(options.path, network, options.development)
    current = {name: runs.constants(recipe, options.device) for name, recipe in recipes.items()}
    for setting in options.settings:
        for name, recipe in recipes.items():
            for seed in options.seeds:
                row = {"network": network, "setting": setting, "recipe": name, "seed": seed}
                if runs.run_once(log, row, data, recipe, options.device):
                    print(json.dumps(row), file=sys.stderr, flush=True)
    rows = [row for row in runs.rows_of(log) if row["network"] == network and row["constants"] == current.get(row["recipe"])]
    return runs.markdown(rows, data.float_top1)


def measure(count: int, device: str, recipe: fxquant.Recipe) -> None:
    """Quantize a network of DeiT-S's size and print the seconds and the memory that this took."""
    model, images = deit_small(), torch.randn(count, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    before, start, busy = peak_gib(), time.perf_counter(), time.process_time()
    fxquant.quantize(model, list(images.split(8)), 4, 4, recipe=recipe, device=device)
    seconds, busy, peak = time.perf_counter() - start, time.process_time() - busy, peak_gib()
    where = f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    print(f"\nDeiT-S, {count} images of 224 pixels, W4A4, recipe {recipe.name}, {where}")
    memory = f"peak resident memory {peak:.2f} GiB, {before:.2f} GiB before; memory_gib {recipe.memory_gib:g}"
    print(f"{seconds:.0f} s, {busy:.0f} s of processor time; {memory}")


def deit_small() -> nn.Module:
    """Return DeiT-S with random weights, and norms whose channels differ as those of trained ones do."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model("deit_small_patch16_224", pretrained=False).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.copy_(torch.empty_like(module.weight).log_normal_(0, 0.5))
                module.bias.normal_(0, 0.5)
    return model


def peak_gib() -> float:
    """Return the most memory that was resident so far."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / 2 ** (30 if sys.platform == "darwin" else 20)  # in bytes there, in KiB elsewhere


if __name__ == "__main__":
    main()
