"""FoldBatchNorm: a batch norm in eval mode is an affine map and vanishes into the layer that feeds it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxquant.graph import bypass, module_of, put_module, readers, sharing_copy
from fxquant.kinds import is_layer, kind
from fxquant.passes.canonicalize import Canonicalize
from fxquant.passes.modularize_weights import ModularizeWeights
from fxquant.passes.split_norm_act import SplitNormAct
from fxquant.passes.unshare_modules import UnshareModules
from fxquant.pipeline import Pass, Skip
from fxquant.reconstruction.norms import NORMS, FoldedNorm


class FoldBatchNorm(Pass):
    """Fold an eval-mode batch norm into the convolution, transposed convolution or linear layer that feeds it.

        conv -> bn -> relu                          =>     conv' -> relu

    With ``g = gamma / sqrt(var + eps)``, one factor an output channel:

        W' = g * W,      b' = g * (b - mean) + beta

    Refused when the layer has other readers (they want the output without the norm), when the norm uses batch statistics, and when it
    normalizes another axis than the output channels.
    """

    after = (Canonicalize, ModularizeWeights, UnshareModules, SplitNormAct)
    preserves_output = True
    verb = "folded"

    def match(self, node: Node) -> Node | Skip | None:
        if kind(node) != "batch_norm":
            return None
        if node.op != "call_module":
            return Skip("a functional batch norm whose statistics are no buffers of the network")
        norm, layer = module_of(node), node.args[0]
        assert isinstance(norm, nn.modules.batchnorm._BatchNorm) and isinstance(layer, Node)
        if norm.running_mean is None or norm.running_var is None or norm.training:
            return Skip("normalizes with the statistics of the batch, not with stored ones")
        if not is_layer(layer):
            return Skip(f"its input {layer.name} is no convolution or linear layer")
        if len(layer.users) > 1:
            others = ", ".join(other.name for other in readers(layer))
            return Skip(f"its input {layer.target} has {len(layer.users)} readers ({others})")
        if kind(layer) == "linear" and "val" in layer.meta and layer.meta["val"].ndim != 2:
            return Skip(f"normalizes axis 1 of {layer.target}, whose output channels are the last axis")
        return layer

    def rewrite(self, gm: GraphModule, node: Node, match: object) -> None:
        assert isinstance(match, Node)
        norm = module_of(node)
        assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
        # Distribution correction needs the statistics that folding hides, but only during the run: meta need not survive a save.
        gm.meta[NORMS] = {**gm.meta.get(NORMS, {}), str(match.target): statistics(module_of(match), norm)}
        put_module(gm, str(match.target), fold(module_of(match), norm))
        bypass(node, match)


@torch.no_grad()
def statistics(layer: nn.Module, norm: nn.modules.batchnorm._BatchNorm) -> FoldedNorm:
    """Return what `norm` knows of the outputs of `layer`, and how it changes them."""
    assert norm.running_mean is not None and norm.running_var is not None
    deviation = (norm.running_var + norm.eps).sqrt()
    factor = deviation.reciprocal() if norm.weight is None else norm.weight / deviation
    shift = -factor * norm.running_mean if norm.bias is None else norm.bias - factor * norm.running_mean
    return FoldedNorm(norm.running_mean.clone(), deviation, factor, shift)


@torch.no_grad()
def fold(layer: nn.Module, norm: nn.modules.batchnorm._BatchNorm) -> nn.Module:
    """Return a copy of `layer` (a convolution, transposed convolution or linear layer) that has `norm` folded in."""
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, Tensor) and not isinstance(bias, nn.Module)
    assert norm.running_var is not None and norm.running_mean is not None
    factor = (norm.running_var + norm.eps).rsqrt()
    if norm.weight is not None:
        factor = factor * norm.weight
    offset = -norm.running_mean if bias is None else bias - norm.running_mean
    folded_bias = factor * offset if norm.bias is None else factor * offset + norm.bias
    new = sharing_copy(layer)
    new.weight = nn.Parameter(_scale_outputs(layer, weight, factor), requires_grad=weight.requires_grad)
    new.bias = nn.Parameter(folded_bias, requires_grad=weight.requires_grad)
    return new


def _scale_outputs(layer: nn.Module, weight: Tensor, factor: Tensor) -> Tensor:
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):
        # [in, out / groups, ...]: the inputs of group g make the outputs of group g.
        grouped = weight.unflatten(0, (layer.groups, -1))
        per_group = factor.view(layer.groups, 1, -1, *[1] * (weight.ndim - 2))
        return (grouped * per_group).flatten(0, 1)
    return weight * factor.view(-1, *[1] * (weight.ndim - 1))
