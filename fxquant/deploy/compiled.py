"""torch.compile with what integer layers need from it."""

from __future__ import annotations

from typing import Any

import torch
import torch._inductor.config as inductor
from torch import Tensor, nn
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph, GraphModule

from fxquant.deploy.onednn import add_in_place
from fxquant.deploy.vnni import SHIM, VnniProduct
from fxquant.graph import fork, is_on_cpu


class _AddInPlace(CustomGraphPass):
    def __call__(self, graph: Graph) -> None:
        add_in_place(graph)

    def uuid(self) -> str:
        return "fxquant add_in_place 1"


_ADD_IN_PLACE = _AddInPlace()


class CompiledNetwork(nn.Module):
    """A network behind ``torch.compile``, without gradients, its weights taken as constants.

    Packed weights must be constants of the compiled graph, which is what inductor calls freezing; it also packs the float layers that are
    left. It compiles at the first call, for any batch size above one, and once more for one image; a float convolution without stride makes
    torch tell batches of 16 and more apart. It stays what the network was then, on its device: after a change, compile again.

    Attributes:
        network: what was compiled.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        options: dict[str, Any] = {"cpp_wrapper": is_on_cpu(network), "post_grad_custom_post_pass": _ADD_IN_PLACE}
        if any(isinstance(module, VnniProduct) for module in network.modules()):
            options["aot_inductor.custom_ops_to_c_shims"] = {torch.ops.fxquant.vnni_layer.default: [SHIM]}
        if isinstance(network, GraphModule):
            # Before each call torch would look at every attribute of every module, to tell apart networks that share their code; a fork has
            # code that nothing else was compiled with.
            network = fork(network)
            options["guard_filter_fn"] = torch.compiler.skip_guard_on_all_nn_modules_unsafe
        self._run = torch.compile(network, fullgraph=True, options=options)

    def forward(self, images: Tensor) -> Any:
        """Return what the network gives for ``images [N, C, H, W]``."""
        if images.shape[0] > 1:
            torch._dynamo.maybe_mark_dynamic(images, 0)
        with torch.no_grad(), inductor.patch(freezing=True):  # not among the options, as tracing asks for it, too
            return self._run(images)


def compile(network: nn.Module) -> CompiledNetwork:
    """Return `network` compiled for inference, as it is at the first call: a lowered one, a simulation or a float one."""
    return CompiledNetwork(network)
