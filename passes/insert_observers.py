"""InsertObservers: look at every tensor that will be quantized."""

from __future__ import annotations

from torch.fx import GraphModule

from fxquant.graph import insert_behind, put_module, quantizer_path
from fxquant.passes.fold_batch_norm import FoldBatchNorm
from fxquant.pipeline import Pass
from fxquant.placement import Plan
from fxquant.quantizers import observer_of


class InsertObservers(Pass):
    """Put an observer behind every tensor of the plan; all readers of the tensor read through it.

    relu -+-> conv2                             =>     relu -> [observer] -+-> conv2
          '-> add                                                          '-> add

    Args:
        plan: what is quantized.
        matmul_scales: what the plan was made with; where operands of matmuls could not have a scale a head, a note says so.
    """

    after = (FoldBatchNorm,)
    preserves_output = True
    verb = "inserted"

    def __init__(self, plan: Plan, matmul_scales: str = "tensor"):
        super().__init__()
        self.plan, self.matmul_scales = plan, matmul_scales

    def run(self, gm: GraphModule) -> None:
        products = {layer.name for layer in self.plan.layers.values() if layer.kind in ("matmul", "attention")}
        whole = [tensor.node for tensor in self.plan.tensors.values() if tensor.axis is None and products & {*tensor.readers}]
        if self.matmul_scales == "head" and whole:
            self.note(f"one scale, not one a head, for {', '.join(whole)}: not [N, heads, L, d], or a layer reads the same values")
        for node in list(gm.graph.nodes):
            path = quantizer_path(node.name)
            if node.name not in self.plan.tensors or any(reader.target == path for reader in node.users):
                continue
            put_module(gm, path, observer_of(node.name, self.plan.tensors[node.name].axis))
            insert_behind(node, path)
            self.changed()
