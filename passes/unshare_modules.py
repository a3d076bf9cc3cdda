"""UnshareModules: one call, one module, one weight."""

from __future__ import annotations

import copy

from torch import Tensor, nn
from torch.fx import GraphModule

from fxquant.graph import called, constant_of, free_path, put_constant, put_module, sharing_copy
from fxquant.pipeline import Pass


class UnshareModules(Pass):
    """Give every call its own module, and every module its own parameters.

        conv(x), conv(y)                            =>     conv(x), conv_1(y)
        a.weight is b.weight                        =>     b.weight is a copy
        a(x) * a.weight.mean()                      =>     a(x) * a_weight.mean()

    A batch norm folded into a convolution that is called twice, or a step learned for one of two tied weights, would silently change
    the other place too, and so would the weight of a layer that the network also reads by itself.
    """

    preserves_output = True
    verb = "unshared"

    def run(self, gm: GraphModule) -> None:
        called_paths: set[str] = set()
        owners: dict[int, str] = {}
        for node, module in list(called(gm)):
            path = str(node.target)
            again = path in called_paths
            if again:
                path = free_path(gm, path)
                module = sharing_copy(module)
                put_module(gm, path, module)
                node.target = path
                self.changed()
                if module._parameters:
                    self.note(f"{path}: second call of a shared module, now its own copy")
            called_paths.add(path)
            self._own_parameters(gm, path, module, owners, again)
        for node in gm.graph.nodes:
            owner, _, name = str(node.target).rpartition(".")
            if node.op == "get_attr" and owner in called_paths and isinstance(value := constant_of(node), Tensor):
                node.target = free_path(gm, f"{owner}_{name}")
                put_constant(gm, str(node.target), value)
                self.note(f"{owner}.{name}: also read outside of its module, now {node.target} there")
                self.changed()

    def _own_parameters(self, gm: GraphModule, path: str, module: nn.Module, owners: dict[int, str], already_new: bool) -> None:
        tied = [name for name, value in module.named_parameters() if id(value) in owners]
        if tied:
            if not already_new:
                for name in tied:
                    self.note(f"{path}.{name}: shared with {owners[id(module.get_parameter(name))]}, now its own copy")
                self.changed()
            put_module(gm, path, copy.deepcopy(module))
        owners.update({id(value): f"{path}.{name}" for name, value in module.named_parameters()})
