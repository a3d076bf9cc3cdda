"""torch.compile with what integer layers need from it."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch._inductor.config as inductor
from torch import Tensor, nn
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph, GraphModule
from torch.fx.node import map_aggregate

from fxquant.deploy.onednn import add_in_place
from fxquant.deploy.vnni import SHIM, VnniProduct
from fxquant.errors import ConfigError
from fxquant.execution import images_at_once
from fxquant.graph import fork, is_on_cpu
from fxquant.tree import is_logits


class _AddInPlace(CustomGraphPass):
    def __call__(self, graph: Graph) -> None:
        add_in_place(graph)

    def uuid(self) -> str:
        return "fxquant add_in_place 1"


_ADD_IN_PLACE = _AddInPlace()

IMAGES_PER_THREAD = 4
"""Images that each thread gets at least, where a batch runs in parts."""
BYTES_PER_WEIGHT = 8
"""Bytes of values that such a part has at least for each byte of float weights, as every part reads those anew."""
UNLIMITED = 2**62


class CompiledNetwork(nn.Module):
    """A network behind ``torch.compile``, without gradients, its weights taken as constants.

    Packed weights must be constants of the compiled graph, which is what inductor calls freezing; it also packs the float layers that are
    left. It compiles at the first call, for any batch size above one, and once more for one image; a float convolution without stride makes
    torch tell batches of 16 and more apart. It stays what the network was then, on its device: after a change, compile again.

    On a CPU a large batch runs in parts whose tensors stay in the caches, where the network is a traced graph that returns logits.

    Attributes:
        network: what was compiled.
        cuda_graphs: whether a CUDA graph is recorded for each batch size.
    """

    def __init__(self, network: nn.Module, cuda_graphs: bool = False):
        super().__init__()
        if cuda_graphs and is_on_cpu(network):
            raise ConfigError("the network is on the CPU", where="cuda_graphs", fix="Move it with .to('cuda'), or leave cuda_graphs out")
        self.network = network
        self.cuda_graphs = cuda_graphs
        self._most = UNLIMITED
        options: dict[str, Any] = {"cpp_wrapper": is_on_cpu(network), "post_grad_custom_post_pass": _ADD_IN_PLACE}
        if cuda_graphs:
            options["triton.cudagraphs"] = True
        if any(isinstance(module, VnniProduct) for module in network.modules()):
            options["aot_inductor.custom_ops_to_c_shims"] = {torch.ops.fxquant.vnni_layer.default: [SHIM]}
        if isinstance(network, GraphModule):
            # Before each call torch would look at every attribute of every module, to tell apart networks that share their code; a fork has
            # code that nothing else was compiled with.
            network = fork(network)
            options["guard_filter_fn"] = torch.compiler.skip_guard_on_all_nn_modules_unsafe
            self._most = _images_at_once(network)
        self._run = torch.compile(network, fullgraph=True, options=options)

    def forward(self, images: Tensor) -> Any:
        """Return what the network gives for ``images [N, C, H, W]``."""
        most = max(self._most, IMAGES_PER_THREAD * torch.get_num_threads())
        if images.shape[0] <= most:
            return self._whole(images)
        return torch.cat([self._whole(part) for part in images.tensor_split(math.ceil(images.shape[0] / most))])

    def _whole(self, images: Tensor) -> Any:
        if images.shape[0] > 1:
            torch._dynamo.maybe_mark_dynamic(images, 0)
        with torch.no_grad(), inductor.patch(freezing=True):  # not among the options, as tracing asks for it, too
            outputs = self._run(images)
        if not self.cuda_graphs:
            return outputs
        return map_aggregate(outputs, lambda value: value.clone() if isinstance(value, Tensor) else value)  # the next call overwrites them


def _images_at_once(gm: GraphModule) -> int:
    """Return how many images a traced graph should run together."""
    if not is_on_cpu(gm) or not is_logits(gm.graph.output_node().meta.get("val")):
        return UNLIMITED
    weights = sum(value.nbytes for value in gm.parameters())  # those of integer layers, a quarter of that, are buffers
    return images_at_once(gm.graph.nodes, torch.device("cpu"), UNLIMITED, BYTES_PER_WEIGHT * weights)


def compile(network: nn.Module, *, cuda_graphs: bool = False) -> CompiledNetwork:
    """Return `network` compiled for inference, as it is at the first call: a lowered one, a simulation or a float one.

    Args:
        network: on the CPU or a CUDA device, where its images have to be, too.
        cuda_graphs: on a CUDA device, record what is launched for each batch size at its first calls, and replay it from then on: where
            batches are so small that launching takes longer than computing. It keeps memory for each of the sizes.

    Raises:
        ConfigError: `cuda_graphs` for a network on the CPU.
    """
    return CompiledNetwork(network, cuda_graphs)
