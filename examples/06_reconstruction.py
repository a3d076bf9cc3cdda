"""Every learning recipe on a real network: accuracy against time, and an ablation of ranges and network-wise finish.

    python examples/06_reconstruction.py PATH
    python examples/06_reconstruction.py PATH --recipes qdrop standard --settings W2A2 --seeds 0 1 2 --out results
    python examples/06_reconstruction.py PATH --equal-time --recipes brecq adaround pdquant qdrop genie packptq standard
    python examples/06_reconstruction.py PATH --recipes qdrop --set unit_iterations=1000
    python examples/06_reconstruction.py PATH --recipes standard --images 8192
    python examples/06_reconstruction.py PATH --ablation
    python examples/06_reconstruction.py PATH --ablation standard "no augmentation" --set finish_iterations=1000
    python examples/06_reconstruction.py PATH --ablation standard "ranges " --set 'stages=["ranges", "bias"]' --network mobilenet_v2

PATH is a folder with a zoo.py as in 02_cifar10_resnet20.py. Each run is appended to OUT/runs.jsonl (ablations: OUT/ablation.jsonl) as soon
as it is over, and not repeated when it is there already, made by the same code; a table (.md) and a plot (.png; pip install -e ".[plots]")
of the same name are made from all runs of the network and of that code in that file. Calibrates on training images. Recipes are tested on
test images; the ablation, from which constants are chosen, on other training images.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import re
import statistics
import time
import zlib
from collections import defaultdict
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

import fxquant
from fxquant.metrics import agreement, kl_divergence, top1

RECIPES = ("fast", "adaround", "brecq", "qdrop", "pdquant", "genie", "packptq", "output_kl", "finish", "standard", "best")
DATA = {"cifar10": ("cifar10_train8192", "cifar10_test", 1024), "mobile": ("imagenet_train", "imagenet_val", 1000)}
DATA["squeezenet1_1"] = DATA["mobile"]
EQUAL_TIME: dict[str, dict[str, Any]] = {
    "adaround": {"unit_iterations": 6400},
    "brecq": {"unit_iterations": 7000, "scales_iterations": 1750},
    "qdrop": {"unit_iterations": 6400},
    "pdquant": {"unit_iterations": 2200, "unit_correction_iterations": 20},
    "genie": {"unit_iterations": 4400},
    "packptq": {"unit_iterations": 10_000},
}
"""Iterations with which the published recipes take 7 to 13 minutes where `standard` takes 9 (ResNet-20, W2A2, one core)."""

DEVELOPMENT = 4096
"""Training images behind the calibration images on which the ablation is measured; if there are fewer, those left, a quarter at least."""


def ablation(standard: fxquant.Recipe) -> dict[str, dict[str, Any]]:
    """Return what is changed of the recipe `standard`, one thing at a time."""
    return {
        "standard": {},
        "without the bias stage": {"stages": ("ranges", "finish", "cat")},
        "ranges by absolute errors": {"activation_error": "absolute"},
        "ranges by absolute errors, p = 2.4": {"activation_error": "absolute", "activation_p": 2.4},
        "ranges with p = 2.4": {"activation_p": 2.4},
        "ranges with p = 3": {"activation_p": 3.0},
        "without CAT": {"stages": ("ranges", "bias", "finish")},
        "units first (QDrop, 500 steps each)": {
            "stages": ("ranges", "units", "finish", "cat"),
            "unit_iterations": 500,
            "unit_rounding_rate": 3e-3,
        },
        "weights fixed": {"finish_weight_rate": 0.0},
        "weight scales fixed": {"finish_scale_rate": 0.0},
        "activation scales fixed": {"finish_activation_rate": 0.0},
        "biases fixed": {"finish_bias_rate": 0.0},
        "channels not matched": {"finish_match": False},
        "biases at a fifth of the rate": {"finish_bias_rate": standard.finish_bias_rate / 5},
        "weights at a third of the rate": {"finish_weight_rate": standard.finish_weight_rate / 3},
        "weights at three times the rate": {"finish_weight_rate": standard.finish_weight_rate * 3},
        "8-bit weights at the same share of their range": {"finish_level_power": 1.0},
        "no feature matching": {"finish_feature_weight": 0.0},
        "features at a tenth of the weight": {"finish_feature_weight": standard.finish_feature_weight / 10},
        "features at three times the weight": {"finish_feature_weight": standard.finish_feature_weight * 3},
        "features at ten times the weight": {"finish_feature_weight": standard.finish_feature_weight * 10},
        "features of every layer": {"unit_longest": 1},
        "temperature 4": {"finish_temperature": 4.0},
        "the best state": {"finish_margin": 0.0},
        "no augmentation": {"finish_augment": "none", "finish_blend": 0.0},
        "crop and flip alone": {"finish_blend": 0.0},
        "half of the batches blended": {"finish_blend": 0.5},
        "recolored": {"finish_color": 0.4},
        "moving average of 0.99": {"finish_averaging": 0.99},
        "annealed mixing of float activations": {"finish_mix": 0.5},
        "batches of 32, twice the steps": {"finish_batch": 32, "finish_iterations": 2 * standard.finish_iterations},
        "float32": {"precision": "float32"},
        "half the steps": {"finish_iterations": standard.finish_iterations // 2},
        "twice the steps": {"finish_iterations": 2 * standard.finish_iterations},
        "rates of two bits whatever the bits": {"finish_fine_power": 0.0},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="folder with zoo.py")
    parser.add_argument("--network", default="cifar10_resnet20", help="a name that zoo.load_model knows (default: cifar10_resnet20)")
    parser.add_argument("--recipes", nargs="+", default=RECIPES, metavar="NAME", help=f"of {' '.join(RECIPES)} (default: all)")
    parser.add_argument("--settings", nargs="+", default=["W2A2"], metavar="WxAy", help="bits (default: W2A2)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="one run each (default: 0)")
    parser.add_argument("--set", nargs="+", default=[], metavar="FIELD=VALUE", help="change fields of every recipe")
    parser.add_argument("--equal-time", action="store_true", help="published recipes with iterations that take about as long as standard")
    parser.add_argument("--images", type=int, help="calibration images (default: 1,024; 1,000 of ImageNet)")
    parser.add_argument(
        "--ablation",
        nargs="*",
        metavar="WORDS",
        help="vary the recipe standard, one thing at a time; with WORDS those of its variants that begin so",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("reconstruction"), help="folder for runs, tables and plots (default: reconstruction)"
    )
    parser.add_argument("--device", default="cpu", help="(default: cpu)")
    options = parser.parse_args()
    if not (options.path / "zoo.py").is_file():
        parser.error(f"{options.path} has no zoo.py; see --help")
    changes = {name: json.loads(value) for name, _, value in (item.partition("=") for item in options.set)}
    shown = changes | ({"images": options.images} if options.images else {})
    ablates = options.ablation is not None
    if ablates and options.equal_time:
        parser.error("--equal-time is for published recipes, --ablation for the recipe standard: choose one")
    if ablates:
        standard = fxquant.Recipe.STANDARD.replace(name="standard", **changes)
        varied = ablation(standard)
        unknown = [words for words in options.ablation if not any(name.startswith(words) for name in varied)]
        if unknown:
            parser.error(f"no variant begins with {unknown[0]!r}; there are: {', '.join(varied)}")
        chosen = [name for name in varied if not options.ablation or any(name.startswith(words) for words in options.ablation)]
        runs = [(label(name, shown), standard.replace(name="standard", **varied[name])) for name in chosen]
    else:
        runs = []
        for name in options.recipes:
            recipe, timed = fxquant.Recipe.named(name), EQUAL_TIME.get(name, {}) if options.equal_time else {}
            own = timed | changes
            runs.append((label(name, timed | shown), recipe.replace(name=name, **own) if own else recipe))

    options.out.mkdir(parents=True, exist_ok=True)
    log = options.out / ("ablation.jsonl" if ablates else "runs.jsonl")
    data = Data(options.path, options.network, ablates, options.images)
    for setting in options.settings:
        for name, recipe in runs:
            for seed in options.seeds:
                row = {"network": options.network, "setting": setting, "recipe": name, "seed": seed}
                if run_once(log, row, data, recipe, options.device):
                    print(json.dumps(row), flush=True)
    current = {name: constants(recipe, options.device) for name, recipe in runs}  # rows of a recipe that has changed since are left out
    rows = [row for row in rows_of(log) if row["network"] == options.network]
    rows = [row for row in rows if current.get(row["recipe"], row["constants"]) == row["constants"]]
    text = markdown(rows, data.float_top1)
    (options.out / log.with_suffix(".md").name).write_text(text, encoding="utf-8")
    plot(rows, data.float_top1, options.out / log.with_suffix(".png").name)
    print(text)


class Data:
    """The network, its calibration images (`count`, or as many as is usual), and what it is tested on."""

    def __init__(self, folder: Path, network: str, development: bool, count: int | None = None):
        zoo = import_zoo(folder)
        self.model, norm = zoo.load_model(network)
        train, test, usual = next(value for prefix, value in DATA.items() if network.startswith(prefix))
        wanted = count or usual
        if development:
            images, labels = zoo.load_images(train, norm, wanted + DEVELOPMENT)
            first = min(wanted, len(images) * 3 // 4)
            self.calibration, self.images, self.labels = images[:first], images[first:], labels[first:]
        else:
            self.calibration = zoo.load_images(train, norm, wanted)[0]
            self.images, self.labels = zoo.load_images(test, norm)
        if count is not None and len(self.calibration) < count:
            raise SystemExit(f"{train} has {len(self.calibration)} images to calibrate on, not {count}")
        self.teacher, self.taught = logits(self.model, self.images), logits(self.model, self.calibration)
        self.float_top1 = top1(self.teacher, self.labels)


def run_once(log: Path, row: dict[str, Any], data: Data, recipe: fxquant.Recipe, device: str) -> bool:
    """Make the run that `row` names, fill it in and append it to the log; say whether it was not there yet."""
    row |= {"constants": constants(recipe, device), "code": revision()}
    if key(row) in {key(other) for other in rows_of(log)}:
        return False
    row |= run(data, row["setting"], recipe, row["seed"], device)
    with log.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    return True


def run(data: Data, setting: str, recipe: fxquant.Recipe, seed: int, device: str) -> dict[str, Any]:
    """Quantize once and test."""
    w, a = bits_of(setting)
    start, worked = time.perf_counter(), time.process_time()
    qmodel = fxquant.quantize(data.model, list(data.calibration.split(64)), w, a, recipe=recipe, seed=seed, device=device)
    seconds, worked = time.perf_counter() - start, time.process_time() - worked
    qmodel = qmodel.cpu()
    student = logits(qmodel, data.images)
    return {
        "top1": top1(student, data.labels),
        "agreement": agreement(student, data.teacher),
        "kl": kl_divergence(student, data.teacher).mean().item(),
        "kl_learned": kl_divergence(logits(qmodel, data.calibration), data.taught).mean().item(),
        "seconds": seconds,
        "processor_seconds": worked,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu",
    }


def bits_of(setting: str) -> tuple[int, int]:
    """Return the bits of weights and activations of a setting such as W2A4."""
    found = re.fullmatch(r"W(\d)A(\d)", setting)
    if not found:
        raise SystemExit(f"{setting!r} is no setting such as W2A4")
    return int(found[1]), int(found[2])


@torch.inference_mode()
def logits(network: nn.Module, images: Tensor) -> Tensor:
    """Return the outputs ``[N, C]`` for all images."""
    few = max(1, min(128, 2**19 // images[0].numel()))  # of large images, whose tensors would leave the caches
    return torch.cat([network(batch) for batch in images.split(few)])


def label(name: str, changes: dict[str, Any]) -> str:
    """Return the name of a recipe with the fields that were changed."""
    return name + "".join(f" {field}={value}" for field, value in changes.items())


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    """Return what a run is known by."""
    return tuple(row.get(name) for name in ("network", "setting", "recipe", "seed", "constants", "code"))


def constants(recipe: fxquant.Recipe, device: str) -> str:
    """Return a short hash of what the result depends on besides network, bits and seed."""
    text = json.dumps([recipe.to_dict(), device, torch.__version__, fxquant.__version__], sort_keys=True)
    return f"{zlib.crc32(text.encode()):08x}"


@functools.cache
def revision() -> str:
    """Return the version of fxquant with a short hash of its source files: what other code has measured is left out."""
    files = [file for folder in (*fxquant.__path__, *fxquant.passes.__path__) for file in Path(folder).rglob("*.[pc]*")]
    sources = sorted({file.read_bytes() for file in files if file.suffix in (".py", ".cpp")})
    return f"{fxquant.__version__}+{zlib.crc32(b''.join(sources)):08x}"


def rows_of(log: Path) -> list[dict[str, Any]]:
    """Return the runs that a log holds, without those of other code."""
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.is_file() else []
    return [row for row in rows if row.get("code") == revision()]


def markdown(rows: list[dict[str, Any]], float_top1: float) -> str:
    """Return the table: mean ± standard deviation over seeds, by setting and then by top-1."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["setting"], row["recipe"]].append(row)
    lines = [f"{rows[0]['network']}: float top-1 {float_top1:.2f}\n" if rows else ""]
    lines += [
        "| bits | recipe | seeds | top-1 % | agreement % | KL to float | on the calibration images | seconds | of one core |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for (setting, name), group in sorted(groups.items(), key=lambda item: (item[0][0], statistics.mean(row["top1"] for row in item[1]))):
        columns = (("top1", 2), ("agreement", 2), ("kl", 4), ("kl_learned", 4))
        cells = [spread([row[column] for row in group if column in row], digits) for column, digits in columns]
        seconds = " | ".join(f"{statistics.mean(row[column] for row in group):.0f}" for column in ("seconds", "processor_seconds"))
        lines.append(f"| {setting} | {name} | {len(group)} | {' | '.join(cells)} | {seconds} |")
    return "\n".join(lines) + "\n"


def spread(values: list[float], digits: int) -> str:
    """Return the value, or mean ± standard deviation of several, or a dash."""
    if not values:
        return "-"
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def plot(rows: list[dict[str, Any]], float_top1: float, path: Path) -> None:
    """Draw top-1 over seconds, a panel a setting; nothing without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        print('no plot: pip install -e ".[plots]"')
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    settings = sorted({row["setting"] for row in rows})
    figure, panels = pyplot.subplots(1, len(settings), figsize=(6 * len(settings), 5), squeeze=False)
    for panel, setting in zip(panels[0], settings, strict=True):
        for name in dict.fromkeys(row["recipe"] for row in rows if row["setting"] == setting):
            group = [row for row in rows if (row["setting"], row["recipe"]) == (setting, name)]
            seconds, scores = (statistics.mean(row[column] for row in group) for column in ("seconds", "top1"))
            panel.scatter(seconds, scores)
            panel.annotate(name, (seconds, scores), xytext=(4, 4), textcoords="offset points", fontsize=8)
        panel.axhline(float_top1, color="grey", linestyle=":", linewidth=1)
        panel.set(title=setting, xlabel="seconds", ylabel="top-1 %", xscale="log")
        panel.margins(x=0.2)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def import_zoo(folder: Path) -> ModuleType:
    """Import ``folder/zoo.py``."""
    spec = importlib.util.spec_from_file_location("zoo", folder.resolve() / "zoo.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main()
