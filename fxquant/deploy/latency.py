"""How long networks take: in turns, because the clock of a busy machine drifts, and behind a warm-up, because the first calls compile."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch._inductor.config as inductor
from torch import Tensor, nn

from fxquant.graph import is_on_cpu

WARM_UP = 3
"""Calls before the clock starts: the first compiles, the others let the machine settle."""
TURN = 5
"""Calls of a turn. The first is not timed: another network has just filled the caches, as it would not where one network serves."""


def latencies(networks: Mapping[str, Callable[[Tensor], Any]], images: Tensor, rounds: int) -> dict[str, float]:
    """Return the median milliseconds of every network on `images`, called again and again as in use, in turns of `TURN` calls.

    Args:
        networks: what to call, by name.
        images: one batch, the same for all.
        rounds: turns of each, behind `WARM_UP` calls that are not timed.
    """
    times: dict[str, list[float]] = {name: [] for name in networks}
    with torch.no_grad():
        for network in networks.values():
            for _ in range(WARM_UP):
                network(images)
        for _ in range(rounds):
            for name, network in networks.items():
                network(images)
                wait_for(images.device)
                for _ in range(TURN - 1):
                    start = time.perf_counter()
                    network(images)
                    wait_for(images.device)
                    times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(taken) for name, taken in times.items()}


def wait_for(device: torch.device) -> None:
    """Return when what was asked of `device` is done: calls on a GPU return at once."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class InBFloat16(nn.Module):
    """A copy of a float network that computes in bfloat16, between float32 images and float32 logits."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = copy.deepcopy(model).bfloat16()

    def forward(self, images: Tensor) -> Any:
        """Return what the network gives for ``images [N, C, H, W]``."""
        outputs = self.model(images.bfloat16())
        return outputs.float() if isinstance(outputs, Tensor) else outputs


def frozen(network: nn.Module, cuda_graphs: bool = False) -> Callable[[Tensor], Any]:
    """Return `network` compiled as well as torch does it, for the one batch size of the first call: what others are measured by."""
    compiled = torch.compile(network, fullgraph=True, options={"cpp_wrapper": is_on_cpu(network), "triton.cudagraphs": cuda_graphs})

    def run(images: Tensor) -> Any:
        with torch.no_grad(), inductor.patch(freezing=True):
            return compiled(images)

    return run


def variants(model: nn.Module, simulated: nn.Module, lowered: nn.Module, cuda_graphs: bool = False) -> dict[str, Callable[[Tensor], Any]]:
    """Return a network in every form that is worth a comparison, by name; all but the first compile at their first call.

    Float networks get graphs for one batch size, so make all of them anew for another one, with `torch.compiler.reset` in between.

    Args:
        model: the float network.
        simulated: what `fxquant.quantize` or `fxquant.load` made of it.
        lowered: what `fxquant.lower` made of that.
        cuda_graphs: compile all of them with CUDA graphs.
    """
    from fxquant.deploy.compiled import compile

    floats = copy.deepcopy(model).to(memory_format=torch.channels_last)
    return {
        "float32, eager": model,
        "float32, compiled": frozen(floats, cuda_graphs),
        "bfloat16, compiled": frozen(InBFloat16(floats), cuda_graphs),
        "simulated, compiled": compile(simulated, cuda_graphs=cuda_graphs),
        "lowered, compiled": compile(lowered, cuda_graphs=cuda_graphs),
    }


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run torch on `count` threads inside the block, and let nothing that was compiled for another number be used there."""
    before = torch.get_num_threads()
    torch.compiler.reset()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        torch.compiler.reset()
