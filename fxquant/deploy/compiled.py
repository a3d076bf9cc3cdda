"""torch.compile with what integer layers need from it."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
import torch._inductor.config as inductor
from torch import Tensor, nn
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph, GraphModule

from fxquant.deploy.cpu import CpuIntegerLayer
from fxquant.deploy.onednn import add_in_place
from fxquant.deploy.vnni import SHIM, VnniProduct
from fxquant.errors import ConfigError
from fxquant.execution import images_at_once
from fxquant.graph import fork, is_on_cpu
from fxquant.tracing.values import rows_of
from fxquant.tree import is_logits


class _AddInPlace(CustomGraphPass):
    def __call__(self, graph: Graph) -> None:
        add_in_place(graph)

    def uuid(self) -> str:
        return "fxquant add_in_place 1"


_ADD_IN_PLACE = _AddInPlace()

# Measured with ResNet-18, ResNet-50, MobileNetV2 and RegNetX-600MF, batches of 32, whole and in parts of 16, 8 and 4, one thread and two.
IMAGES_PER_THREAD = 4
"""Images that each thread gets at least, where a batch runs in parts."""
BYTES_PER_WEIGHT = 8
"""Bytes of values that such a part has at least for each byte of weights, as every part reads those anew."""
TOLD_APART = 16
"""Images from which on torch takes other kernels for float convolutions without stride."""
UNLIMITED = 2**62


class CompiledNetwork(nn.Module):
    """A network behind ``torch.compile``, without gradients, its weights taken as constants.

    Packed weights must be constants of the compiled graph, which is what inductor calls freezing; it also packs the float layers that are
    left. It compiles at the first call, for any batch size above one, and once more for one image; a float convolution without stride makes
    torch tell batches of `TOLD_APART` and more apart. It stays what the network was then, on its device: after a change, compile again.

    On a CPU a traced graph that returns logits runs a batch in parts where tensors would be larger than `execution.LARGEST_VALUE`, which is
    faster as long as parts are large enough to keep threads busy and to be worth reading the weights again.

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
        options: dict[str, Any] = {"cpp_wrapper": is_on_cpu(network), "triton.cudagraphs": cuda_graphs}
        options["post_grad_custom_post_pass"] = _ADD_IN_PLACE
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
        """Return what the network gives for ``images [N, C, H, W]``, of its own precision (a lowered one takes floats of any)."""
        most = max(self._most, IMAGES_PER_THREAD * torch.get_num_threads())
        if images.shape[0] <= most:
            return self._whole(images)
        return torch.cat([self._whole(part) for part in images.tensor_split(parts_of(images.shape[0], most))])

    def _whole(self, images: Tensor) -> Any:
        if images.shape[0] > 1:
            torch._dynamo.maybe_mark_dynamic(images, 0)
        with torch.no_grad(), inductor.patch(freezing=True):  # not among the options, as tracing asks for it, too
            outputs = self._run(images)
        return copy.deepcopy(outputs) if self.cuda_graphs else outputs  # the next call would write over them


def parts_of(count: int, most: int) -> int:
    """Return into how many parts of at most `most` images to split `count`.

    Not into some below `TOLD_APART` and some not: torch would compile for the later ones, which begin inside of a tensor, and once more for
    batches of their size that do not.
    """
    parts = math.ceil(count / most)
    return math.ceil(count / (TOLD_APART - 1)) if count // parts < TOLD_APART <= math.ceil(count / parts) else parts


def _images_at_once(gm: GraphModule) -> int:
    """Return how many images a traced graph should run together."""
    images, logits = (node.meta.get("val") for node in (next(iter(gm.graph.nodes)), gm.graph.output_node()))
    if not isinstance(images, Tensor) or not isinstance(logits, Tensor) or not is_on_cpu(gm):
        return UNLIMITED
    if not is_logits(logits) or rows_of(logits) != rows_of(images):  # no row for each image
        return UNLIMITED
    weights = sum(value.nbytes for value in gm.parameters())
    weights += sum(module.bytes for module in gm.modules() if isinstance(module, CpuIntegerLayer))
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
