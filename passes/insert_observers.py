"""InsertObservers: look at every tensor that will be quantized."""

from __future__ import annotations

from torch.fx import GraphModule

from fxquant.graph import insert_behind, put_module
from fxquant.passes.fold_batch_norm import FoldBatchNorm
from fxquant.pipeline import Pass
from fxquant.placement import Plan
from fxquant.quantizers import observer_of

FOLDER = "activations"
"""Where the observers, and after them the quantizers, of activations live: ``activations.<node that makes the tensor>``."""


class InsertObservers(Pass):
    """Put an observer behind every tensor of the plan; all readers of the tensor read through it.

    relu -+-> conv2                             =>     relu -> [observer] -+-> conv2
          '-> add                                                          '-> add
    """

    after = (FoldBatchNorm,)
    preserves_output = True
    verb = "inserted"

    def __init__(self, plan: Plan):
        super().__init__()
        self.plan = plan

    def run(self, gm: GraphModule) -> None:
        for node in list(gm.graph.nodes):
            path = f"{FOLDER}.{node.name}"
            if node.name not in self.plan.tensors or any(reader.target == path for reader in node.users):
                continue
            put_module(gm, path, observer_of(node.name, self.plan.tensors[node.name].axis))
            insert_behind(node, path)
            self.changed()
