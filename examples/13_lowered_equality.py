"""Are lowered and exported networks the simulation? Every test image; every byte of every layer in eager mode, and the logits of the
compiled network and of onnxruntime.

    python examples/13_lowered_equality.py PATH
    python examples/13_lowered_equality.py PATH --networks mobilenet_v2 --settings W8A8 --edges integer --out equality
    python examples/13_lowered_equality.py PATH --edges integer --batch 1

PATH is a folder with a zoo.py as in 02_cifar10_resnet20.py. Networks are quantized with recipe "fast" on training images and lowered for
the CPU; the simulation in eager mode is what everything is compared with. Where the sums of all layers are integers, nothing may differ.
Where a layer sums floats (the first one, unless the edges are "integer"), a compiler may sum in another order, and a value on the border
of two codes then falls to the other side: the table counts such bytes in eager mode, and the images that they reach where it is compiled.
With AVX-512 VNNI and without AMX one image at a time runs on other kernels than several (``--batch 1``), and they have to give the same
bytes. onnxruntime (pip install -e ".[onnx]") has kernels of its own, so there bytes are not compared. Prints a table in Markdown, and
writes it to OUT/equality.md.
"""

from __future__ import annotations

import argparse
import importlib
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter

import fxquant
from fxquant.deploy import cpu
from fxquant.deploy.between import quantize_in_front_of_concats
from fxquant.deploy.bytes import Quantize
from fxquant.deploy.cpu import CpuIntegerLayer
from fxquant.deploy.integers import Grid
from fxquant.graph import fork
from fxquant.quantizers import UniformQuantizer

runs = importlib.import_module("06_reconstruction")  # beside this file, so it is found where this one is run as a script

COLUMNS = (
    *("network", "bits", "edges", "images", "bytes that differ, of", "eager: classes, logits", "compiled: classes, logits, images"),
    "onnxruntime: classes, logits, images",
)
CLOSE = 1e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="folder with zoo.py")
    parser.add_argument("--networks", nargs="+", default=["cifar10_resnet20", "mobilenet_v2"], metavar="NAME")
    parser.add_argument("--settings", nargs="+", default=["W2A2", "W4A4", "W8A8"], metavar="WxAy", help="bits (default: W2A2 W4A4 W8A8)")
    parser.add_argument("--edges", nargs="+", default=["integer", "8bit"], choices=("integer", "8bit"), help="(default: both)")
    parser.add_argument("--batch", type=int, default=64, metavar="N", help="images at once (default: 64)")
    parser.add_argument("--out", type=Path, default=Path("equality"), help="folder for the table (default: equality)")
    options = parser.parse_args()
    if not (options.path / "zoo.py").is_file():
        parser.error(f"{options.path} has no zoo.py; see --help")
    if cpu.unavailable():
        parser.error(f"nothing can be lowered: {cpu.unavailable()}")
    lines = [f"| {' | '.join(COLUMNS)} |", "|---|---|---|" + "---:|" * (len(COLUMNS) - 3)]
    for network in options.networks:
        data = runs.Data(options.path, network, False)
        for setting in options.settings:
            for edges in options.edges:
                lines.append(f"| {' | '.join([network, setting, edges, *compared(data, setting, edges, options.batch)])} |")
                print(lines[-1], flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "equality.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


def compared(data: runs.Data, setting: str, edges: str, batch: int) -> list[str]:
    """Quantize and lower a network; return the cells of its row behind the edges."""
    w, a = runs.bits_of(setting)
    simulation = fxquant.quantize(data.model, list(data.calibration.split(64)), w, a, recipe="fast", edges=edges, progress=False)
    lowered = fxquant.lower(simulation)
    compiled = fxquant.compile(lowered)
    alike = fork(simulation)
    quantize_in_front_of_concats(alike)  # as lowering does, so that both have the same quantizers in the same order
    differing, count = 0, 0
    session = in_onnxruntime(simulation, data.images[:16])
    logits: dict[str, list[Tensor]] = {"simulated": [], "eager": [], "compiled": [], "onnxruntime": []}
    with torch.inference_mode():
        for images in data.images.split(batch):
            wanted, theirs = outputs_and_bytes(alike, images)
            given, mine = outputs_and_bytes(lowered, images)
            pairs = list(zip(mine, theirs, strict=True))
            differing += sum(int((one != other).sum()) for one, other in pairs)
            count += sum(one.numel() for one, _ in pairs)
            for name, value in (("simulated", wanted), ("eager", given), ("compiled", compiled(images))):
                logits[name].append(value)
            logits["onnxruntime"].append(session(images))
    reference, eager, fast, exported = (torch.cat(values) for values in logits.values())
    cells = [f"{len(reference):,}", f"{differing:,} of {count:,}", "{}, {}".format(*apart(eager, reference)[:2])]
    return [*cells, *("{}, {}, {}".format(*apart(values, reference)) for values in (fast, exported))]


def in_onnxruntime(simulation: GraphModule, images: Tensor) -> Callable[[Tensor], Tensor]:
    """Export the network, checked on `images`, and return it as onnxruntime runs it."""
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        fxquant.export_onnx(simulation, path, images=images)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (name,) = (value.name for value in session.get_inputs())
    return lambda batch: torch.from_numpy(session.run(None, {name: batch.numpy()})[0])


def apart(logits: Tensor, reference: Tensor) -> tuple[str, str, str]:
    """Return how many images have another class, the largest difference over the range, and how many images exceed `CLOSE`."""
    classes = int((logits.argmax(1) != reference.argmax(1)).sum())
    differences = (logits - reference).abs().amax(1) / (reference.max() - reference.min())
    return f"{classes:,}", f"{differences.max():.1e}", f"{int((differences > CLOSE).sum()):,}"


def outputs_and_bytes(gm: GraphModule, images: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Return the logits, and the bytes at every quantizer in order of execution: those of a simulation are worked out from its values."""
    run = _Bytes(gm)
    return run.run(images.clone()), run.bytes


class _Bytes(Interpreter):
    def __init__(self, gm: GraphModule):
        super().__init__(gm)
        self.bytes: list[Tensor] = []

    def call_module(self, target, args, kwargs):  # type: ignore[no-untyped-def]
        value, module = super().call_module(target, args, kwargs), self.fetch_attr(target)
        if isinstance(module, UniformQuantizer):
            self.bytes.append(Grid.of(module).quantize(value))
        elif isinstance(module, Quantize) or (isinstance(module, CpuIntegerLayer) and module.output is not None):
            self.bytes.append(value)
        return value


if __name__ == "__main__":
    main()
