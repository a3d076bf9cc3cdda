"""The command line: fxquant demo | quantize | evaluate | report | export | bench.

Thin: every command reads its arguments and calls the library.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

import fxquant
from fxquant import cli_deploy, demo
from fxquant.cli_words import bits, check_target, positive, read_overrides, read_recipe
from fxquant.console import Narrator
from fxquant.correction import logits_of
from fxquant.errors import FxquantError, FxquantWarning
from fxquant.execution import images_at_once
from fxquant.folder import ImageFolder
from fxquant.metrics import agreement, kl_divergence, top1
from fxquant.networks import LIBRARIES, Network, build, load_weights, preprocessing
from fxquant.placement import EDGES
from fxquant.recipe import PRESETS
from fxquant.reconstruction.checkpoint import FILE as CHECKPOINT

RECIPES = f"{', '.join(PRESETS)}, or a TOML file"

EXAMPLES = """examples:
  fxquant demo
  fxquant quantize --model resnet18 --weights resnet18.pth --data photos/train --out resnet18-w2.safetensors
  fxquant quantize --model resnet18 --weights resnet18.pth --data photos/train --out resnet18-w2.safetensors --recipe best --checkpoint run
  fxquant quantize --model resnet18 --weights resnet18.pth --data photos/train --out resnet18-w2.safetensors --recipe best --resume run
  fxquant quantize --model timm:resnet10t --weights r10t.safetensors --data photos/train --out r10t-w4.safetensors --w 4 --a 4 --no-cat
  fxquant evaluate resnet18-w2.safetensors --model resnet18 --data photos/val --float-weights resnet18.pth
  fxquant report resnet18-w2.safetensors --model resnet18
  fxquant export resnet18-w2.safetensors --model resnet18 --onnx resnet18-w2.onnx
  fxquant bench resnet18-w2.safetensors --model resnet18 --batches 1 8 32 --plot latency.png
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return 0, or 2 behind one readable message on stderr."""
    options = parser().parse_args(argv)
    errors = Console(stderr=True, highlight=False)
    with warnings.catch_warnings():
        warnings.showwarning = _shown_on(errors, warnings.showwarning)
        try:
            options.run(options)
        except FxquantError as error:
            if options.debug:
                raise
            errors.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
            return 2
        except KeyboardInterrupt:
            folder = getattr(options, "resume", None) or getattr(options, "checkpoint", None)
            begun = folder is not None and (Path(folder) / CHECKPOINT).is_file()
            errors.print(
                f"stopped; --resume {folder} goes on from here" if begun else "stopped", markup=False, highlight=False, soft_wrap=True
            )
            return 130
    return 0


def run_demo(options: argparse.Namespace) -> None:
    if options.out:
        check_target(options.out)
    demo.run(
        Console(),
        seed=options.seed,
        epochs=options.epochs,
        recipe=read_recipe(options.recipe),
        out=options.out,
        compiled=options.compile,
        quiet=options.quiet,
    )


def run_quantize(options: argparse.Namespace) -> None:
    narrator = Narrator(not options.quiet)
    recipe, overrides = read_recipe(options.recipe), read_overrides(options.override)
    network = _network(options, options.weights)
    check_target(options.out)
    folder = ImageFolder(options.data, preprocessing(network), options.images, options.seed)
    images = [batch for batch, _ in narrator.bar(folder.loader(options.batch_size, options.workers), "read images")]
    qmodel = fxquant.quantize(
        network.model,
        images,
        options.w,
        options.a,
        options.cat,
        recipe=recipe,
        edges=options.edges,
        overrides=overrides,
        seed=options.seed,
        device=options.device,
        progress=not options.quiet,
        checkpoint=options.checkpoint,
        resume=options.resume,
    )
    fxquant.save(qmodel, options.out)
    if not options.quiet:
        Console().print(fxquant.report(qmodel))
    before, after = (Path(path).stat().st_size for path in (options.weights, options.out))
    Console(soft_wrap=True).print(f"{options.out}: {after:,} bytes; {options.weights}: {before:,} bytes", markup=False, highlight=False)


@torch.inference_mode()
def run_evaluate(options: argparse.Namespace) -> None:
    narrator = Narrator(not options.quiet)
    network = _network(options, options.float_weights)
    quantized = fxquant.load(options.file, network.model)
    networks = {"quantized": quantized}
    if options.float_weights:
        networks["float"] = network.model  # type: ignore[assignment]
    device = torch.device(options.device or "cpu")
    networks = {name: model.to(device) for name, model in networks.items()}
    at_once = images_at_once(quantized.graph.nodes, device, options.batch_size)
    folder = ImageFolder(options.data, preprocessing(network), options.images, options.seed)
    parts: dict[str, list[Tensor]] = {name: [] for name in networks}
    for batch, _ in narrator.bar(folder.loader(options.batch_size, options.workers), "evaluate"):
        for name, model in networks.items():
            parts[name].append(logits_of(model, batch.to(device).split(at_once)).cpu())
    logits = {name: torch.cat(batches) for name, batches in parts.items()}
    Console().print(_scores(logits, folder))


def run_report(options: argparse.Namespace) -> None:
    network = build(options.model, options.library, options.num_classes)
    Console().print(fxquant.report(fxquant.load(options.file, network.model)))


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    top = argparse.ArgumentParser(
        prog="fxquant",
        description="Vision networks in two to eight bits.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"fxquant {fxquant.__version__}")
    commands = top.add_subparsers(title="commands", required=True, metavar="COMMAND")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--seed", type=int, default=0, help="same seed, same result (default: 0)")
    common.add_argument("--quiet", action="store_true", help="results only, no progress")
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    named = argparse.ArgumentParser(add_help=False)
    named.add_argument("--model", "--arch", required=True, metavar="NAME", help="network of torchvision or timm: resnet18, timm:resnet10t")
    named.add_argument("--library", choices=LIBRARIES, help="where to look the name up (default: torchvision, then timm)")
    named.add_argument("--num-classes", type=int, metavar="N", help="classes of the network (default: as published)")
    data = argparse.ArgumentParser(add_help=False)
    data.add_argument("--data", required=True, metavar="FOLDER", help="images, directly inside or in one subfolder a class")
    data.add_argument(
        "--batch-size",
        type=positive,
        default=64,
        metavar="N",
        help="images at once (default: 64); on a CPU, networks get fewer at a time where their tensors are large",
    )
    data.add_argument("--workers", type=int, default=0, metavar="N", help="processes that read images (default: 0, none besides this one)")
    data.add_argument("--device", metavar="NAME", help="where to work, cuda for example (default: cpu)")

    command = commands.add_parser("demo", parents=[common], help="train, quantize and compare on real digits; under two minutes")
    command.add_argument("--epochs", type=int, default=30, help="of the training (default: 30)")
    command.add_argument("--recipe", default="fast", metavar="NAME|FILE", help=f"{RECIPES} (default: fast; most others learn, for minutes)")
    command.add_argument("--out", metavar="FILE", help="keep the 2-bit network with CAT as FILE")
    command.add_argument("--compile", action="store_true", help="run it through torch.compile(fullgraph=True), too")
    command.set_defaults(run=run_demo)

    command = commands.add_parser("quantize", parents=[named, data, common], help="weights and images in, a small file out")
    command.add_argument("--weights", required=True, metavar="FILE", help="float weights: .safetensors, or .pth with tensors only")
    command.add_argument("--out", required=True, metavar="FILE", help="where the quantized network goes (.safetensors)")
    command.add_argument("--w", type=bits, default=2, metavar="BITS", help="bits of weights, 2 to 8 or 'float' (default: 2)")
    command.add_argument("--a", type=bits, default=2, metavar="BITS", help="bits of activations, 2 to 8 or 'float' (default: 2)")
    command.add_argument(
        "--cat", nargs="?", const=True, default=True, choices=["paper"], help="correct the logits: chosen by itself (default), or 'paper'"
    )
    command.add_argument("--no-cat", dest="cat", action="store_false", help="leave the logits alone")
    command.add_argument("--recipe", default="standard", metavar="NAME|FILE", help=f"{RECIPES} (default: standard; fast learns nothing)")
    command.add_argument("--edges", default="8bit", choices=EDGES, help="rule for first and last layers and shortcuts (default: 8bit)")
    command.add_argument(
        "--override", action="append", default=[], metavar="GLOB:w=4,a=8", help="bits of single layers: 'layer4.*:w=4,a=4'; may be repeated"
    )
    command.add_argument("--images", type=positive, default=1024, metavar="N", help="images to calibrate with (default: 1024)")
    command.add_argument("--checkpoint", metavar="DIR", help="keep there how far learning is; emptied when the run is over")
    command.add_argument(
        "--resume", metavar="DIR", help="go on from there after a kill or Ctrl-C, with the same result; all else as it was"
    )
    command.set_defaults(run=run_quantize)

    command = commands.add_parser("evaluate", parents=[named, data, common], help="top-1, and how near to the float network")
    command.add_argument("file", metavar="FILE", help="what fxquant quantize wrote")
    command.add_argument("--float-weights", metavar="FILE", help="compare with the float network of these weights")
    command.add_argument("--images", type=positive, metavar="N", help="how many images (default: all)")
    command.set_defaults(run=run_evaluate)

    command = commands.add_parser("report", parents=[named, common], help="show what was done to each layer")
    command.add_argument("file", metavar="FILE", help="what fxquant quantize wrote")
    command.set_defaults(run=run_report)
    cli_deploy.add_commands(commands, named, common)
    return top


def _network(options: argparse.Namespace, weights: str | None) -> Network:
    network = build(options.model, options.library, options.num_classes)
    if weights:
        load_weights(network.model, weights)
    return network


def _scores(logits: dict[str, Tensor], folder: ImageFolder) -> Table:
    classes = logits["quantized"].shape[1]
    table = Table(title=f"{len(folder):,} images of {folder.root}")
    table.add_column("network")
    for name in ("top-1 %", "agreement %", "KL to float"):
        table.add_column(name, justify="right")
    if len(folder.classes) != classes:
        table.caption = f"no top-1: {len(folder.classes)} class folders, {classes} classes"
    for name, mine in logits.items():
        labels = folder.labels if len(folder.classes) == classes else None
        cells = ["" if labels is None else f"{top1(mine, labels):.2f}"]
        if name == "quantized" and "float" in logits:
            cells += [f"{agreement(mine, logits['float']):.2f}", f"{kl_divergence(mine, logits['float']).mean().item():.4f}"]
        table.add_row(name, *cells)
    return table


def _shown_on(console: Console, otherwise: Callable[..., None]) -> Callable[..., None]:
    """Return what shows a warning: those of fxquant as one line, all others as ever."""

    def show(message: Warning | str, kind: type[Warning], *place: Any, **more: Any) -> None:
        if issubclass(kind, FxquantWarning):
            console.print(f"[bold yellow]warning:[/] {escape(str(message))}", soft_wrap=True)
        else:
            otherwise(message, kind, *place, **more)

    return show


if __name__ == "__main__":
    sys.exit(main())
