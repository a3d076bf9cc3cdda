"""AppendCAT: correct the logits at the end of the graph."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxquant.cat import CAT
from fxquant.channels import Shared
from fxquant.errors import CATError
from fxquant.graph import free_path, insert_behind, is_tensor, module_of, put_module, sharing_copy
from fxquant.grids import averaged_part
from fxquant.kinds import kind
from fxquant.passes.freeze import Freeze
from fxquant.pipeline import Pass
from fxquant.quantizers.layers import QuantizedLayer
from fxquant.tracing.values import rows_of


class AppendCAT(Pass):
    """Append a fitted cluster-based affine transformation; with one cluster, fold it into the classifier for free.

        fc -> output                                =>     fc -> cat -> output
        fc -> output, one cluster                   =>     fc' -> output

    With the blended ``g = 1 + alpha (gamma - 1)`` and ``h = alpha beta``, the fold is ``W' = g W``, ``b' = g b + h``; on a quantized
    weight, ``g`` goes into its scale, one a class. It needs ``g > 0`` and a classifier, linear or a convolution in front of a global
    average pool, that is called once and whose weight and output nothing else reads; where that does not hold the module is appended, with
    the reason. A folded classifier looks like any other, so a second run would fold again.

    Args:
        cat: the fitted module.

    Raises:
        CATError: the graph's output is not one ``[N, C]`` tensor with the C of `cat`.
    """

    after = (Freeze,)
    preserves_output = False
    verb = "appended"

    def __init__(self, cat: CAT):
        super().__init__()
        self.cat = cat

    def run(self, gm: GraphModule) -> None:
        logits = logits_node(gm)
        if isinstance(logits, str) or logits.meta["val"].shape[1] != self.cat.classes:
            why = (
                logits
                if isinstance(logits, str)
                else f"gives {logits.meta['val'].shape[1]} logits, the CAT was fitted to {self.cat.classes}"
            )
            raise CATError(why, where=type(gm).__name__, fix="Use cat=False")
        if logits.op == "call_module" and isinstance(module_of(logits), CAT):
            return
        classifier = self._classifier(gm, logits) if self.cat.clusters == 1 else None
        if isinstance(classifier, Node):
            gamma, beta = (part[0] for part in self.cat.affine())
            put_module(gm, str(classifier.target), scaled_outputs(module_of(classifier), gamma, beta))
            self.note(f"one cluster: folded into {classifier.target}, free at inference")
        else:
            if classifier is not None:
                self.skip(logits, f"not folded, {classifier}; appended as a module")
            path = free_path(gm, "cat")
            put_module(gm, path, self.cat)
            insert_behind(logits, path)
        self.changed()

    def _classifier(self, gm: GraphModule, logits: Node) -> Node | str:
        """Return the layer that makes the logits and can take a gain and a shift a class, or the reason why there is none."""
        if bool((self.cat.affine()[0] <= 0).any()):
            return "a class has a factor that is not positive"
        node, allowed = logits, {"linear", "conv"}
        while len(node.users) == 1 and _keeps_classes(node):
            node, allowed = node.args[0], {"conv"}  # type: ignore[assignment]
        if len(node.users) > 1:
            return f"{node.name} has other readers"
        if node.op != "call_module" or kind(node) not in allowed:
            return f"the logits come from {node.name}, which is no linear layer or convolution"
        return Shared(gm).elsewhere(str(node.target)) or node


def _keeps_classes(node: Node) -> bool:
    """Say whether `node` pools ``[N, C, H, W]`` to its means or drops axes of size 1: a gain and a shift a class pass through."""
    parent = node.args[0] if node.args else None
    if not isinstance(parent, Node) or not is_tensor(parent) or parent.meta["val"].ndim != 4:
        return False
    if kind(node) == "view":
        return all(size == 1 for size in parent.meta["val"].shape[2:]) and node.meta["val"].ndim == 2
    return averaged_part(node) is not None


def logits_node(gm: GraphModule) -> Node | str:
    """Return the node whose value ``[N, C]`` the graph returns, or a sentence that says why there is none."""
    result = next(node for node in reversed(gm.graph.nodes) if node.op == "output").args[0]
    if not isinstance(result, Node):
        several = {"immutable_dict": "dict", "immutable_list": "list"}.get(type(result).__name__, type(result).__name__)
        return f"returns a {several}, not one tensor of logits [N, C]"
    value = result.meta.get("val")
    if isinstance(value, Tensor) and value.ndim == 2 and not value.is_floating_point():
        return f"returns {str(value.dtype).removeprefix('torch.')}, not logits [N, C]"
    if not isinstance(value, Tensor) or value.ndim != 2:
        shape = [size if isinstance(size, int) else "N" for size in value.shape] if isinstance(value, Tensor) else type(value).__name__
        return f"returns {shape}, not logits [N, C]"
    return result


def why_not_chosen(gm: GraphModule) -> str | None:
    """Return a sentence that says why no CAT can be chosen by the KL of images behind a traced network, or None."""
    logits = logits_node(gm)
    if isinstance(logits, str):
        return logits
    value, images = logits.meta["val"], next(iter(gm.graph.find_nodes(op="placeholder"))).meta["val"]
    if value.shape[1] == 1:
        return "returns one logit, whose softmax is always 1"
    return None if rows_of(value) == rows_of(images) else "returns rows [M, C] that are not one an image"


@torch.no_grad()
def scaled_outputs(layer: nn.Module, gamma: Tensor, beta: Tensor) -> nn.Module:
    """Return a copy of a linear `layer` or convolution whose outputs are ``gamma * y + beta``; a quantized weight keeps its codes."""
    if isinstance(layer, QuantizedLayer):
        return layer.scaled(gamma, beta)
    new = sharing_copy(layer)
    new.weight = nn.Parameter(gamma.view(-1, *[1] * (layer.weight.ndim - 1)) * layer.weight, requires_grad=False)  # type: ignore
    bias = beta if layer.bias is None else gamma * layer.bias + beta  # type: ignore[operator]
    new.bias = nn.Parameter(bias, requires_grad=False)
    return new
