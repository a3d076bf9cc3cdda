"""The commands of deployment: fxquant export | bench. Thin, as those of `fxquant.cli`."""

from __future__ import annotations

import argparse
import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn

import fxquant
from fxquant.cli_words import check_target, positive
from fxquant.console import Narrator
from fxquant.errors import ConfigError, FxquantWarning, ModelError
from fxquant.folder import ImageFolder
from fxquant.inspection import working_device
from fxquant.lower import BACKENDS
from fxquant.networks import Network, build, preprocessing
from fxquant.placement import EDGES
from fxquant.recipe import Recipe
from fxquant.record import Record

BASE = "lowered, compiled"
"""What the others are compared with."""

Rows = list[dict[str, Any]]
"""One measurement each: ``{"threads": 1, "batch": 8, "milliseconds": {"float32, eager": 30.1, ...}}``."""


def add_commands(commands: Any, named: argparse.ArgumentParser, common: argparse.ArgumentParser) -> None:
    """Add the parsers of the commands.

    Args:
        commands: where to, what ``add_subparsers`` gave.
        named, common: parents with the options of all commands for networks, and of all commands.
    """
    command = commands.add_parser("export", parents=[named, common], help="write a quantized network as ONNX or .pt2, checked")
    command.add_argument("file", metavar="FILE", help="what fxquant quantize wrote")
    target = command.add_mutually_exclusive_group(required=True)
    target.add_argument("--onnx", metavar="OUT", help="an ONNX file with integers of 2, 4 or 8 bits (extra onnx)")
    target.add_argument("--pt2", metavar="OUT", help="a file of torch.export")
    command.add_argument("--clip", action="store_true", help="with --onnx: 8-bit integers behind a Clip, for older runtimes")
    command.add_argument("--data", metavar="FOLDER", help="compare on images from there (default: on random ones)")
    command.add_argument("--images", type=positive, default=16, metavar="N", help="with --data: how many (default: 16)")
    command.set_defaults(run=run_export)

    command = commands.add_parser(
        "bench", parents=[named, common], help="latency of the float, compiled, bfloat16, simulated and lowered network"
    )
    command.add_argument("file", nargs="?", metavar="FILE", help="what fxquant quantize wrote (default: random weights, speed alone)")
    command.add_argument("--w", type=int, metavar="BITS", help="without FILE: bits of weights (default: 2)")
    command.add_argument("--a", type=int, metavar="BITS", help="without FILE: bits of activations (default: 2)")
    command.add_argument("--edges", choices=EDGES, help="without FILE: what first and last layers get (default: 8bit)")
    command.add_argument("--batches", type=positive, nargs="+", default=[1], metavar="N", help="images at once (default: 1)")
    command.add_argument("--threads", type=positive, nargs="+", metavar="N", help="of the CPU (default: as torch is set)")
    command.add_argument("--device", default="cpu", metavar="NAME", help="cpu, or cuda for int8 on a GPU (default: cpu)")
    command.add_argument("--cuda-graphs", action="store_true", help="with --device cuda: compile everything with CUDA graphs")
    command.add_argument("--rounds", type=positive, default=5, metavar="N", help="turns of a few calls each (default: 5)")
    command.add_argument("--plot", metavar="OUT", help="draw the table as OUT, .png or .svg (extra plots)")
    command.add_argument("--json", metavar="OUT", help="write the numbers to OUT")
    command.set_defaults(run=run_bench)


def run_export(options: argparse.Namespace) -> None:
    if options.clip and options.pt2:
        raise ConfigError("is a form of ONNX", where="--clip", fix="Use --onnx instead of --pt2, or leave --clip out")
    out = options.onnx or options.pt2
    check_target(out)
    network, qmodel = _loaded(options)
    images = None
    if options.data:
        folder = ImageFolder(options.data, preprocessing(network), options.images, options.seed)
        images = next(iter(folder.loader(len(folder))))[0]
    if options.onnx:
        exported = fxquant.export_onnx(qmodel, out, clip=options.clip, images=images)
    else:
        exported = fxquant.export_pt2(qmodel, out, images=images)
    table = Table(title=escape(out), show_header=False)
    rows = [("bytes", f"{exported.size:,}"), ("bytes of the quantized file", f"{Path(options.file).stat().st_size:,}")]
    if exported.opset is not None:
        rows.append(("operator set", str(exported.opset)))
    checked = f"{options.data or 'random images'}, batches of {' and '.join(map(str, exported.batches))}"
    rows += [("compared on", checked), ("largest difference", f"{exported.max_difference:.3g}")]
    rows.append(("relative error", f"{exported.relative_error:.2g}"))
    if exported.agreement is not None:
        rows.append(("same arg-max", f"{exported.agreement:.2%}"))
    for row in rows:
        table.add_row(*map(escape, row))
    Console().print(table)


def run_bench(options: argparse.Namespace) -> None:
    for out in filter(None, (options.plot, options.json)):
        check_target(out)
    if options.plot:
        _require_matplotlib()
    device = _device(options)
    network, qmodel = _loaded(options) if options.file else _random(options)
    qmodel = qmodel.to(device)
    lowered, note = _lowered(qmodel, device.type)
    rows = measured(options, device, network.model.to(device), qmodel, lowered)
    title = f"{network.name}, {_bits(qmodel)}, torch {torch.__version__}"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    if device.type == "cuda":
        title += f", {name}{', CUDA graphs' if options.cuda_graphs else ''}"
    for count in dict.fromkeys(row["threads"] for row in rows):
        Console().print(_table([row for row in rows if row["threads"] == count], f"{title}, {_plural(count, 'thread')}"))
    Console(soft_wrap=True).print(note, markup=False, highlight=False)
    if options.json:
        found = {"network": network.name, "bits": _bits(qmodel), "torch": torch.__version__, "rounds": options.rounds, "lowered": note}
        found |= {"device": name, "cuda_graphs": options.cuda_graphs}
        Path(options.json).write_text(json.dumps({**found, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    if options.plot:
        plot(rows, title, options.plot)


def measured(options: argparse.Namespace, device: torch.device, model: nn.Module, qmodel: nn.Module, lowered: nn.Module) -> Rows:
    """Return the medians at every number of threads and every batch size, each compiled for itself."""
    from fxquant.deploy import latency

    shape = Record.from_module(qmodel).input_shape
    todo = [(count, batch) for count in options.threads or [torch.get_num_threads()] for batch in options.batches]
    rows: Rows = []
    for count, batch in Narrator(not options.quiet).bar(todo, "compile and measure"):
        images = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(options.seed))
        with latency.threads(count):
            images = images.to(device).contiguous(memory_format=torch.channels_last)
            found = latency.latencies(latency.variants(model, qmodel, lowered, options.cuda_graphs), images, options.rounds)
        rows.append({"threads": count, "batch": batch, "milliseconds": found})
    return rows


def plot(rows: Rows, title: str, path: str | os.PathLike[str]) -> None:
    """Draw milliseconds an image as bars, a panel a number of threads, a group a batch size.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    _require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    counts = list(dict.fromkeys(row["threads"] for row in rows))
    figure = Figure(figsize=(6.5 * len(counts), 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(counts), squeeze=False)[0]
    for panel, count in zip(panels, counts, strict=True):
        shown = [row for row in rows if row["threads"] == count]
        names = list(shown[0]["milliseconds"])
        for place, name in enumerate(names):
            heights = [row["milliseconds"][name] / row["batch"] for row in shown]
            bars = panel.bar([group + (place - len(names) / 2 + 0.5) * 0.16 for group in range(len(shown))], heights, 0.15, label=name)
            panel.bar_label(bars, fmt="%.1f", fontsize=7)
        panel.set_xticks(range(len(shown)), [f"batch {row['batch']}" for row in shown])
        panel.set(title=_plural(count, "thread"), ylabel="milliseconds an image")
    panels[0].legend(fontsize=8)
    figure.suptitle(title)
    try:
        figure.savefig(path, dpi=120)
    except ValueError as error:  # an ending that is no picture
        raise ConfigError(f"cannot be drawn ({error})", where=str(path), fix="Use an ending such as .png or .svg") from error


def _loaded(options: argparse.Namespace) -> tuple[Network, nn.Module]:
    """Return the float architecture and the quantized network of the file."""
    given = [name for name in ("w", "a", "edges") if getattr(options, name, None) is not None]
    if given:
        raise ConfigError(f"{options.file} has bits of its own", where=f"--{given[0]}", fix="Leave it out, or leave out the file")
    network = build(options.model, options.library, options.num_classes)
    return network, fxquant.load(options.file, network.model)


def _random(options: argparse.Namespace) -> tuple[Network, nn.Module]:
    """Return a network with random weights, and quantized by the cheapest ranges: speed depends on neither."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        network = build(options.model, options.library, options.num_classes)
    shape = preprocessing(network)(Image.new("RGB", (64, 64))).shape
    images = torch.randn(4, *shape, generator=torch.Generator().manual_seed(options.seed))
    w, a = (2 if value is None else value for value in (options.w, options.a))
    recipe = Recipe.FAST.replace(stages=("ranges",), weight_range="minmax", activation_range="minmax")
    return network, fxquant.quantize(
        network.model, [images], w, a, False, edges=options.edges or "8bit", recipe=recipe, seed=options.seed, progress=False
    )


def _device(options: argparse.Namespace) -> torch.device:
    """Return where to measure."""
    device = working_device(None, options.device)
    if device.type not in BACKENDS:
        raise ConfigError(f"there are no integer kernels for {device.type}", where="--device", fix=f"Use {' or '.join(BACKENDS)}")
    if options.cuda_graphs and device.type != "cuda":
        raise ConfigError("is for GPUs", where="--cuda-graphs", fix="Add --device cuda, or leave it out")
    return device


def _lowered(qmodel: nn.Module, backend: str) -> tuple[nn.Module, str]:
    """Return the network on integers, and what became of its layers: with the reason where the simulation stays."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            lowered = fxquant.lower(qmodel, backend)
        except ModelError as error:  # weights alone are quantized, for instance
            return qmodel, f"nothing is lowered, that row is the simulation again; {error}"
    reasons = []
    for warning in caught:
        if issubclass(warning.category, FxquantWarning):
            reasons.append(str(warning.message))
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    record = Record.from_module(lowered, lowered=True)
    if not record.lowered:
        return lowered, "; ".join(["nothing is lowered, that row is the simulation again", *reasons])
    log = record.passes[-1]
    skipped = [f"{where}: {reason}" for where, reason in log.skipped]
    left = f"; simulated: {'; '.join(skipped[:3])}{f' and {len(skipped) - 3} more' if len(skipped) > 3 else ''}" if skipped else ""
    return lowered, f"{log.count} layers on integers{left}"


def _bits(qmodel: nn.Module) -> str:
    """Return the bits of most layers: ``W2A2``."""
    layers = Record.from_module(qmodel).layers
    pairs = [(row.w, row.a) for row in layers if row.w is not None]
    w, a = max(dict.fromkeys(pairs), key=pairs.count, default=(None, None))
    return f"W{w or 'float'}A{a or 'float'}"


def _table(rows: Rows, title: str) -> Table:
    table = Table(title=title, caption="milliseconds, medians of calls in turns; ratio to lowered")
    table.add_column("network")
    for row in rows:
        table.add_column(f"batch {row['batch']}", justify="right")
        table.add_column("ratio", justify="right")
    for name in rows[0]["milliseconds"]:
        cells = []
        for row in rows:
            value, base = row["milliseconds"][name], row["milliseconds"][BASE]
            cells += [f"{value:.2f}", f"{value / base:.2f}x"]
        table.add_row(name, *cells)
    return table


def _require_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError("matplotlib is not installed", where="--plot", fix='Run: pip install "fxquant[plots]"') from error


def _plural(count: int, word: str) -> str:
    return f"{count} {word}{'s' if count > 1 else ''}"
