"""UnshareModules: one call, one module, one weight."""

from __future__ import annotations

import copy

from torch import nn
from torch.fx import GraphModule

from fxquant.graph import called, free_path, put_module
from fxquant.pipeline import Pass


class UnshareModules(Pass):
    """Give every call its own module, and every module its own parameters.

        conv(x), conv(y)                            =>     conv(x), conv_1(y)
        a.weight is b.weight                        =>     b.weight is a copy

    A batch norm folded into a convolution that is called twice, or a step learned for one of two tied weights, would silently change
    the other place too.
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
                module = copy.copy(module)
                module._parameters = dict(module._parameters)
                module._buffers = dict(module._buffers)
                put_module(gm, path, module)
                node.target = path
                self.changed()
                if module._parameters:
                    self.note(f"{path}: second call of a shared module, now its own copy")
            called_paths.add(path)
            self._own_parameters(gm, path, module, owners, again)

    def _own_parameters(self, gm: GraphModule, path: str, module: nn.Module, owners: dict[int, str], already_new: bool) -> None:
        tied = [name for name, value in module.named_parameters() if id(value) in owners]
        if tied:
            if not already_new:
                for name in tied:
                    self.note(f"{path}.{name}: shared with {owners[id(module.get_parameter(name))]}, now its own copy")
                self.changed()
            put_module(gm, path, copy.deepcopy(module))
        owners.update({id(value): f"{path}.{name}" for name, value in module.named_parameters()})
