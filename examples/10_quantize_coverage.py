"""Which networks of torchvision and timm can be quantized, and how much of their work is then done on quantized operands.

    python examples/10_quantize_coverage.py --library torchvision --largest 60
    python examples/10_quantize_coverage.py --library timm --families 160 --only "resnet*" --out coverage.jsonl

Every network of 05_trace_coverage.py is built with random weights and perturbed norms and quantized to 8 bits with the recipe "fast",
images included (``edges="integer"``: else the first layer multiplies floats, which is much of the work of a small network), without CAT,
which is no matter of the network. In a deep random network images fade away: outputs are nearly the same for all of them, and their cosine
says little. With --settle batch norms get the statistics of the calibration images, which keeps the images alive, is much harder, and
wants more --images. Five things are asked of it:

    covered    at least 99 % of the multiply-adds are on quantized operands; the total is counted on the float network, in eager mode
    cosine     between quantized and float outputs, image by image, at least 0.99 on average over images that it was not calibrated on
    compiled   torch.compile(fullgraph=True) takes it, and gives the same outputs at two batch sizes
    stored     saved and loaded, it gives the same outputs bit for bit
    in time    all of it takes less than --limit seconds

Prints a markdown table and totals. With --out, every row is appended to a file as a line of JSON, and networks that are there are not run
again.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import importlib
import json
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import fxquant
from fxquant.coverage import Work, count_multiply_adds, count_work
from fxquant.tree import tensors_of

tracing = importlib.import_module("05_trace_coverage")  # beside this file, so it is found where this one is run as a script

COVERED, COSINE = 0.99, 0.99
SMALL = 128
"""Image size from which on a network is worth making for smaller images."""
COUNTING = 1e-3
"""How far two counts of the multiply-adds of a network may be apart: folding a constant takes some away."""


Network = tuple[str, Callable[[], nn.Module], int]


@dataclass
class Row:
    name: str
    library: str = ""
    size: int = 0
    parameters: int = 0
    multiply_adds: int = 0
    covered: float = 0.0
    cosine: float = 0.0
    centered: float = 0.0
    """The cosine behind subtraction of the mean over the images: outputs that hardly depend on the image have a large plain one."""
    compiled: str = "not reached"
    stored: str = "not reached"
    seconds: float = 0.0
    quantize_seconds: float = 0.0
    left: list[Work] = field(default_factory=list)
    """The largest work that is left on floats."""
    why: str = ""

    def judge(self) -> Row:
        """Put what is missing into words, in `why`."""
        if self.why:
            return self
        biggest = "; ".join(f"{work.name}: {work.float_because}, {work.multiply_adds / self.multiply_adds:.1%}" for work in self.left[:2])
        self.why = "; ".join(
            text
            for missing, text in (
                (not self.covered >= COVERED, f"covered {100 * self.covered:.2f} % ({biggest})"),
                (not self.cosine >= COSINE, f"cosine {self.cosine:.4f}"),
                (bool(self.compiled), f"compile: {self.compiled}"),
                (bool(self.stored), f"storage: {self.stored}"),
            )
            if missing
        )
        return self

    @property
    def ok(self) -> bool:
        return not self.why

    def __str__(self) -> str:
        cells = (
            self.name,
            f"{self.multiply_adds / 1e6:,.0f}",
            f"{100 * self.covered:.2f}",
            f"{self.cosine:.4f}",
            f"{self.seconds:.0f}",
            self.why or "ok",
        )
        return f"| {' | '.join(cells)} |"


def torchvision_networks(largest: float) -> Iterator[Network]:
    """Yield the classification networks of torchvision, small ones first, up to `largest` million parameters."""
    sizes = {}
    for name, *rest in tracing.torchvision_networks():
        sizes[name] = (torchvision.models.get_model_weights(name).DEFAULT.meta["num_params"], rest)
    for name, (parameters, (build, size)) in sorted(sizes.items(), key=lambda item: item[1][0]):
        if parameters <= 1e6 * largest:
            yield name, build, size


def smaller(network: Network) -> Network:
    """Return a timm network made for images of half the size or less, where it is made for one large size and timm can do that."""
    name, _, size = network
    small = size // 2 if size <= 4 * SMALL else size // 4

    def build_small() -> nn.Module:
        return timm.create_model(name, pretrained=False, img_size=small)

    if size <= SMALL or not timm.is_model(name):
        return network
    try:
        with torch.no_grad():
            build_small().eval()(torch.zeros(1, 3, small, small))
    except Exception:
        return network
    return name, build_small, small


def smooth_images(count: int, channels: int, size: int, seed: int) -> Tensor:
    """Return images with structure at two scales: pure noise looks the same everywhere, to a network."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, channels, 5, 5, generator=generator)
    return F.interpolate(coarse, size, mode="bilinear") + 0.3 * torch.randn(count, channels, size, size, generator=generator)


@torch.no_grad()
def settle(model: nn.Module, images: Tensor) -> None:
    """Give every batch norm of `model` the statistics of what it gets, in place: else the images fade away in a deep random network."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats]
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    model(images)
    for norm, momentum in zip(norms, before, strict=True):
        norm.momentum = momentum
        norm.eval()


def check(name: str, build: Callable[[], nn.Module], size: int, limit: int, images: int = 8, settled: bool = False) -> Row:
    """Return the row of one network, calibrated on `images` images and measured on as many others; `settled`: see `settle`."""
    row = Row(name)
    start = time.perf_counter()
    try:
        with tracing.time_limit(limit):
            torch.manual_seed(0)
            model = tracing.perturb(build().eval())
            channels, row.size = tracing.input_size(model, size)
            measure(row, model, channels, images, settled)
    except TimeoutError:
        row.why = f"over {limit} s"
    except Exception as error:  # of the time limit too, where something made another error of it
        row.why = one_line(error) if time.perf_counter() - start < limit else f"over {limit} s"
    row.seconds = time.perf_counter() - start
    return row.judge()


def measure(row: Row, model: nn.Module, channels: int, count: int, settled: bool = False) -> None:
    """Quantize `model` and fill in `row`."""
    row.parameters = sum(value.numel() for value in model.parameters())
    images, others = (smooth_images(count, channels, row.size, seed) for seed in (1, 2))
    if settled:
        settle(model, images)
    start = time.perf_counter()
    quantized = fxquant.quantize(model, [images], w=8, a=8, cat=False, recipe="fast", edges="integer", progress=False)
    row.quantize_seconds = time.perf_counter() - start
    row.multiply_adds = count_multiply_adds(copy.deepcopy(model), others[:1])
    work = count_work(quantized, others[:1])
    done = sum(part.multiply_adds for part in work)
    floats = [part for part in work if part.float_because]
    if done > (1 + COUNTING) * row.multiply_adds:
        raise AssertionError(f"the graph does {done} multiply-adds, the network {row.multiply_adds}")
    row.covered = 1 - sum(part.multiply_adds for part in floats) / row.multiply_adds
    row.left = sorted(floats, key=lambda part: -part.multiply_adds)[:5]
    with torch.no_grad():
        mine, theirs = ([value.flatten(1).double() for value in tensors_of(net(others))] for net in (quantized, model))
        row.cosine = min(F.cosine_similarity(a, b).mean().item() for a, b in zip(mine, theirs, strict=True))
        row.centered = min(F.cosine_similarity(a - a.mean(0), b - b.mean(0)).mean().item() for a, b in zip(mine, theirs, strict=True))
    row.compiled = why_not_compiled(quantized, others)
    row.stored = why_not_stored(quantized, model, others)


def why_not_compiled(quantized: nn.Module, images: Tensor) -> str:
    """Return why `quantized` does not compile as one graph for two batch sizes, or nothing. No code is generated."""
    torch.compiler.reset()
    try:
        compiled = torch.compile(quantized, fullgraph=True, backend="eager")
        with torch.no_grad():
            for count in (3, 2):
                batch = images[:count].clone()
                torch._dynamo.maybe_mark_dynamic(batch, 0)
                if not same(compiled(batch), quantized(batch)):
                    return f"gives other outputs for {count} images"
    except TimeoutError:
        raise
    except Exception as error:
        return one_line(error)
    finally:
        torch.compiler.reset()
    return ""


def why_not_stored(quantized: nn.Module, model: nn.Module, images: Tensor) -> str:
    """Return why `quantized` is not the same behind a file, or nothing."""
    fresh = copy.deepcopy(model)
    with torch.no_grad():
        for value in fresh.parameters():
            value.zero_()  # all that counts has to come out of the file
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "network.safetensors"
            fxquant.save(quantized, path)
            loaded = fxquant.load(path, fresh)
        with torch.no_grad():
            return "" if same(loaded(images), quantized(images)) else "gives other outputs"
    except TimeoutError:
        raise
    except Exception as error:
        return one_line(error)


def same(a: object, b: object) -> bool:
    return all(torch.equal(x, y) for x, y in zip(tensors_of(a), tensors_of(b), strict=True))


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".replace("\n", " ").replace("|", "/")[:400]


def read(path: Path | None) -> dict[str, Row]:
    """Return the rows of a file of JSON lines, the last one of each network."""
    if path is None or not path.is_file():
        return {}
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {f"{row['library']}:{row['name']}": Row(**{**row, "left": [Work(**work) for work in row["left"]]}) for row in rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", choices=["torchvision", "timm"], help="default: both")
    parser.add_argument("--only", default="*", help="glob on the names")
    parser.add_argument("--families", type=int, default=160, help="number of timm networks")
    parser.add_argument("--largest", type=float, default=1000, help="million parameters of the largest torchvision network")
    parser.add_argument("--images", type=int, default=8, help="to calibrate on, and as many others to measure on; 3 at least")
    parser.add_argument("--settle", action="store_true", help="give batch norms the statistics of the calibration images")
    parser.add_argument("--limit", type=int, default=600, help="seconds for one network")
    parser.add_argument("--out", type=Path, help="file of JSON lines to append to, and to go on from")
    parser.add_argument("--again", action="store_true", help="run those again that are in the file and failed")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    networks: list[tuple[str, Network]] = []
    if options.library != "timm":
        networks += [("torchvision", network) for network in torchvision_networks(options.largest)]
    if options.library != "torchvision":
        networks += [("timm", network) for network in tracing.timm_networks(options.families)]
    known = read(options.out)
    print("| network | million multiply-adds | covered % | cosine | seconds | |\n|---|---|---|---|---|---|")
    rows = []
    for library, network in networks:
        name = network[0]
        if not fnmatch.fnmatch(name, options.only):
            continue
        row = known.get(f"{library}:{name}")
        if row is None or (options.again and not row.ok):
            row = check(*(smaller(network) if library == "timm" else network), options.limit, options.images, options.settle)
            row.library = library
            if options.out:
                with options.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(asdict(row)) + "\n")
        rows.append(row)
        print(row, flush=True)
    counts = {
        "ok": sum(row.ok for row in rows),
        "covered": sum(row.covered >= COVERED for row in rows),
        "cosine": sum(row.cosine >= COSINE for row in rows),
        "compiled": sum(not row.compiled for row in rows),
        "stored": sum(not row.stored for row in rows),
    }
    print(f"\n{len(rows)} networks: {', '.join(f'{count} {word}' for word, count in counts.items())}")
    tracing.print_failures(rows)


if __name__ == "__main__":
    main()
