"""Which networks of torchvision and timm can be traced, and whether the graph computes the same.

    python examples/05_trace_coverage.py --library torchvision
    python examples/05_trace_coverage.py --library timm --families 160 --only "resnet*"

Every network is built with random weights, its zero parameters and batch norm statistics are perturbed so that equality means
something, it is traced at batch 2 and compared with eager mode at batch 3. Prints a markdown table and totals.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import signal
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, nn

from fxquant.tracing import trace

TRACED, CHECKED = 2, 3


@dataclass
class Row:
    name: str
    nodes: int = 0
    seconds: float = 0.0
    error: float = float("nan")
    why: str = ""

    @property
    def ok(self) -> bool:
        return not self.why

    def __str__(self) -> str:
        error = "exact" if self.error == 0 else f"{self.error:.1e}"
        return f"| {self.name} | {self.nodes} | {self.seconds:.2f} | {error} | {self.why or 'ok'} |"


def torchvision_networks() -> Iterator[tuple[str, Callable[[], nn.Module], int]]:
    """`(name, build, image size)` of every classification network of torchvision."""
    fixed = ("vit_", "swin", "maxvit")
    for name in torchvision.models.list_models(module=torchvision.models):
        kwargs = {"init_weights": False} if name in {"googlenet", "inception_v3"} else {}
        size = 224 if name.startswith(fixed) else 128 if name == "inception_v3" else 64
        yield name, lambda name=name, kwargs=kwargs: torchvision.models.get_model(name, weights=None, **kwargs), size


def timm_networks(families: int) -> Iterator[tuple[str, Callable[[], nn.Module], int]]:
    """`(name, build, image size)`: the shortest name of every timm module, then the second of each, and so on."""
    modules = {module: sorted(timm.list_models(module=module), key=_weight) for module in timm.list_modules()}
    names: list[str] = []
    rank = 0
    while len(names) < families and any(len(models) > rank for models in modules.values()):
        names += [models[rank] for _, models in sorted(modules.items()) if len(models) > rank]
        rank += 1
    for name in names[:families]:
        config = timm.get_pretrained_cfg(name, allow_unregistered=True)
        native = config.input_size[-1] if config else 224
        size = native if not config or config.fixed_input_size else min(native, 128)
        yield name, lambda name=name: timm.create_model(name, pretrained=False), size


def _weight(name: str) -> tuple[int, int, str]:
    """Sort key that puts small variants first."""
    small = ("atto", "femto", "pico", "nano", "tiny", "xxs", "xs", "small", "_s", "_t", "lite", "mini", "18", "050")
    large = ("large", "huge", "giant", "gigantic", "_l", "_h", "_g", "xl", "base", "_b")
    return any(s in name for s in large) - any(s in name for s in small), len(name), name


def perturb(model: nn.Module) -> nn.Module:
    """Give zero parameters and batch norm statistics values, in place: a zero gamma would hide whatever is in front of it."""
    for p in model.parameters():
        if p.is_floating_point() and p.abs().max() < 1e-3:
            nn.init.normal_(p, std=0.05)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


def flat(output: object) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def relative_error(a: object, b: object) -> float:
    """max |a - b| / max |b| over all tensors of the outputs; infinite where they are not finite or not alike."""
    pairs = list(zip(flat(a), flat(b), strict=True))
    if not all(torch.isfinite(y.double()).all() and x.shape == y.shape and y.abs().max() > 0 for x, y in pairs):
        return float("inf")
    return max(((x - y).abs().max() / y.abs().max()).item() for x, y in pairs)


def check(name: str, build: Callable[[], nn.Module], size: int, limit: int) -> Row:
    row = Row(name)
    try:
        with time_limit(limit), torch.no_grad():
            torch.manual_seed(0)
            model = perturb(build().eval())
            channels, size = input_size(model, size)
            start = time.perf_counter()
            graph = trace(model, torch.randn(TRACED, channels, size, size))
            row.seconds, row.nodes = time.perf_counter() - start, len(graph.graph.nodes)
            images = torch.randn(CHECKED, channels, size, size)
            row.error = relative_error(graph(images), model(images))
            row.why = "" if row.error < 1e-5 else "differs from eager mode"
    except TimeoutError:
        row.why = f"over {limit} s"
    except Exception as error:
        row.why = f"{type(error).__name__}: {error}".replace("\n", " ").replace("|", "/")
    return row


def input_size(model: nn.Module, wanted: int) -> tuple[int, int]:
    """Channels, and the wanted image size if the network runs at that size, else the one it was made for."""
    channels, native, _ = getattr(model, "pretrained_cfg", {}).get("input_size", (3, wanted, wanted))
    if native != wanted:
        try:
            copy.deepcopy(model)(torch.randn(1, channels, wanted, wanted))
        except Exception:
            return channels, native
    return channels, wanted


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", choices=["torchvision", "timm"], help="default: both")
    parser.add_argument("--only", default="*", help="glob on the names")
    parser.add_argument("--families", type=int, default=160, help="number of timm networks")
    parser.add_argument("--limit", type=int, default=240, help="seconds for one network")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    networks: list[tuple[str, Callable[[], nn.Module], int]] = []
    if options.library != "timm":
        networks += torchvision_networks()
    if options.library != "torchvision":
        networks += timm_networks(options.families)
    print("| network | nodes | seconds | max\\|d\\| / max\\|y\\| | |\n|---|---|---|---|---|")
    rows = []
    for name, build, size in networks:
        if fnmatch.fnmatch(name, options.only):
            rows.append(check(name, build, size, options.limit))
            print(rows[-1], flush=True)
    exact = sum(row.error == 0 for row in rows)
    median = sorted(row.seconds for row in rows)[len(rows) // 2] if rows else 0.0
    print(f"\n{len(rows)} networks: {sum(row.ok for row in rows)} ok, {exact} of them exact; median trace {median:.2f} s")
    print_failures(rows)


def print_failures(rows: Iterable[Any]) -> None:
    """Print the reason of every row that is not `ok`."""
    for row in rows:
        if not row.ok:
            print(f"* {row.name}: {row.why}")


if __name__ == "__main__":
    main()
