"""InsertFakeQuant: observers become quantizers, and layers get a quantizer on their weight."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from torch.fx import GraphModule

from fxquant.graph import called, put_module, quantizer_path
from fxquant.passes.insert_observers import InsertObservers
from fxquant.pipeline import Pass
from fxquant.placement import LayerPlan, Plan, TensorPlan
from fxquant.quantizers import LogQuantizer, Observer, UniformQuantizer
from fxquant.quantizers.layers import QuantizedLayer

ActivationQuantizers = Callable[[TensorPlan, Observer], UniformQuantizer | LogQuantizer]
WeightQuantizers = Callable[[LayerPlan, nn.Module], UniformQuantizer]


class InsertFakeQuant(Pass):
    """Replace every observer by the quantizer made from it, and every planned layer by one that quantizes its weight.

        conv1 -> relu -> [observer] -> conv2        =>     conv1(Wq) -> relu -> [quantizer] -> conv2(Wq)

    Args:
        plan: the bits of every layer and tensor.
        activations: makes the quantizer of a tensor from its plan and its observer.
        weights: makes the quantizer of a weight from its plan and its float layer.
    """

    after = (InsertObservers,)
    preserves_output = False
    verb = "quantized"

    def __init__(self, plan: Plan, activations: ActivationQuantizers, weights: WeightQuantizers):
        super().__init__()
        self.plan, self.activations, self.weights = plan, activations, weights

    def run(self, gm: GraphModule) -> None:
        tensors = {quantizer_path(name): tensor for name, tensor in self.plan.tensors.items()}
        for node, module in self.track(list(called(gm)), "choose ranges"):
            path = str(node.target)
            if isinstance(module, Observer):
                put_module(gm, path, self.activations(tensors[path], module))
                self.changed()
            elif path in self.plan.layers and not isinstance(module, QuantizedLayer):
                layer = self.plan.layers[path]
                if layer.w is not None:
                    put_module(gm, path, QuantizedLayer.of(module, self.weights(layer, module)))
                    self.changed()
                else:
                    self.skip(node, "its weight stays float, as planned")
