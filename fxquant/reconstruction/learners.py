"""From a quantized graph to one that learns, and back.

conv(Wq) -> relu -> [quantizer]    =>    conv(learner(W)) -> relu -> [learned quantizer]    =>    conv(Wq') -> relu -> [quantizer']
                                `Learners`                                            `Learners.fixed`
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxquant.graph import called, constant_of, fork, put_constant, put_module, sharing_copy
from fxquant.quantizers import LogQuantizer, UniformQuantizer
from fxquant.quantizers.layers import QuantizedLayer
from fxquant.quantizers.learned import LearnedQuantizer, WeightLearner

MakeWeight = Callable[[Tensor, UniformQuantizer], WeightLearner]
MakeActivation = Callable[[UniformQuantizer], LearnedQuantizer]


class Learners:
    """A graph whose quantizers, and biases, learn.

    Args:
        gm: a graph with `QuantizedLayer` and `UniformQuantizer` modules; not changed.
        weight: makes the learner of a weight from the float weight and its quantizer; None: weights stay as they are, on the grid.
        activation: makes the learner of an activation quantizer; None: they stay as they are.
        biases: learn biases (a layer without one gets one).
        float_activations: activations are not quantized at all.

    Attributes:
        graph: the graph that learns; it shares with `gm` what does not.
        weights, activations, biases: the learners by the path of their module.
    """

    def __init__(
        self,
        gm: GraphModule,
        weight: MakeWeight | None,
        activation: MakeActivation | None,
        biases: bool = False,
        float_activations: bool = False,
    ):
        self.weights: dict[str, WeightLearner] = {}
        self.activations: dict[str, LearnedQuantizer] = {}
        self.biases: dict[str, nn.Parameter] = {}
        self._layers: dict[str, QuantizedLayer] = {}
        self.graph = fork(gm)
        for node, module in list(called(gm)):
            path = str(node.target)
            if isinstance(module, QuantizedLayer) and path not in self._layers:
                put_module(self.graph, path, self._layer(path, module, weight, biases))
            elif isinstance(module, UniformQuantizer | LogQuantizer) and float_activations:
                put_module(self.graph, path, nn.Identity())
            elif isinstance(module, UniformQuantizer) and activation is not None and path not in self.activations:
                self.activations[path] = activation(module)
                put_module(self.graph, path, self.activations[path])
            elif not isinstance(module, UniformQuantizer | QuantizedLayer) and any(True for _ in module.parameters()):
                put_module(self.graph, path, constant(module))
        _fix_constants(self.graph)

    def _layer(self, path: str, layer: QuantizedLayer, weight: MakeWeight | None, biases: bool) -> nn.Module:
        self._layers[path] = layer
        new = sharing_copy(layer)
        if weight is None or layer.frozen:  # quantized once, not at every step
            new.weight, new.weight_quantizer = nn.Parameter(layer.used_weight().detach(), requires_grad=False), nn.Identity()
            new.frozen = False
        else:
            self.weights[path] = new.weight_quantizer = weight(layer.weight.detach(), layer.weight_quantizer)
            new.weight = nn.Parameter(layer.weight.detach(), requires_grad=False)
        start = layer.bias.detach() if layer.bias is not None else None
        if biases:
            channels = getattr(layer, "out_channels", None) or layer.out_features
            assert isinstance(channels, int)
            start = torch.zeros(channels).to(layer.weight.detach()) if start is None else start
            self.biases[path] = new.bias = nn.Parameter(start.clone())
        elif start is not None:
            new.bias = nn.Parameter(start, requires_grad=False)
        return new

    def fixed(self) -> dict[str, nn.Module]:
        """Return what has been learned: by path, layers and quantizers that learn no more."""
        found: dict[str, nn.Module] = {path: learner.fixed() for path, learner in self.activations.items()}
        # What frozen layers know of the grids that they read may be no longer so; Freeze tells them again.
        bases = {path: layer.freeze() if layer.input_scale is not None else layer for path, layer in self._layers.items()}
        found |= {path: base for path, base in bases.items() if base is not self._layers[path]}
        for path in {**self.weights, **self.biases}:
            new = sharing_copy(bases[path])
            if path in self.weights:
                new.weight_quantizer = self.weights[path].fixed()
                new.weight = nn.Parameter(self.weights[path].weight(), requires_grad=False)
            if path in self.biases:
                new.bias = nn.Parameter(self.biases[path].detach().clone(), requires_grad=False)
            found[path] = new
        return found


def constant(module: nn.Module) -> nn.Module:
    """Return a copy of a leaf `module` that shares its values, and of which none gets a gradient."""
    new = sharing_copy(module)
    for name, value in module.named_parameters(recurse=False):
        new._parameters[name] = nn.Parameter(value.detach(), requires_grad=False)
    for name, child in module.named_children():
        new._modules[name] = constant(child)
    return new


def without_gradients(gm: GraphModule) -> GraphModule:
    """Return a graph that computes the same with the same values, of which none gets a gradient."""
    new = fork(gm)
    for node, module in list(called(gm)):
        if any(True for _ in module.parameters()):
            put_module(new, str(node.target), constant(module))
    _fix_constants(new)
    return new


def _fix_constants(gm: GraphModule) -> None:
    """Let no parameter that the graph reads by itself get a gradient; `gm` is a fork."""
    for node in gm.graph.nodes:
        value = constant_of(node)
        if value is not None and value.requires_grad:
            put_constant(gm, str(node.target), nn.Parameter(value.detach(), requires_grad=False))


def put_modules(gm: GraphModule, modules: Mapping[str, nn.Module]) -> None:
    """Put every module at its path."""
    for path, module in modules.items():
        put_module(gm, path, module)
