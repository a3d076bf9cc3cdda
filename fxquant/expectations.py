"""What batch norms tell of the channels behind them: their means, without any image (Nagel et al. 2019, section 4.2.1).

    layer (+ folded norm)    y ~ N(m, s^2)                              m, s of each channel, from the norm
    relu                     E = m Phi(m / s) + s phi(m / s)  = r(m)    Phi, phi: distribution and density of N(0, 1)
    min(relu, b)             E = r(m) - r(m - b)
    add                      E = E1 + E2                                 its deviation is not known, so no ReLU may follow
    mean, view, quantizer    E stays

Values are taken for normal in front of a ReLU, quantization for unbiased, and zeros that average pooling pads with are not counted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxquant.channels import Place, operand, place_behind, upper_bound
from fxquant.graph import argument, is_tensor, module_of
from fxquant.kinds import is_layer, kind
from fxquant.quantizers import UniformQuantizer
from fxquant.reconstruction.norms import NORMS, FoldedNorm

_STAYS = frozenset({"identity", "mean", "avg_pool", "view"})


@dataclass(frozen=True)
class Expected:
    """What is known of the channels of a tensor.

    Attributes:
        mean: ``[C]``, float64.
        deviation: ``[C]``, of values that are taken for normal; None where they are not.
        place: where the channels are.
    """

    mean: Tensor
    deviation: Tensor | None
    place: Place


def expectations(gm: GraphModule) -> dict[Node, Expected | str]:
    """Return what is known of every tensor of a prepared graph, with or without quantizers, or why nothing is."""
    norms: dict[str, FoldedNorm] = gm.meta.get(NORMS, {})
    found: dict[Node, Expected | str] = {}
    for node in gm.graph.nodes:
        if is_tensor(node):
            found[node] = _of(node, found, norms)
    return found


def rectified_mean(mean: Tensor, deviation: Tensor, bound: Tensor | float | None = None) -> Tensor:
    """Return ``E min(relu(y), bound)`` for normal y, elementwise; `bound` None: none."""
    standard = mean / deviation.clamp_min(torch.finfo(deviation.dtype).tiny)
    below = 0.5 * torch.erfc(-standard / math.sqrt(2))
    result = mean * below + deviation * torch.exp(-0.5 * standard.square()) / math.sqrt(2 * math.pi)
    return result if bound is None else result - rectified_mean(mean - bound, deviation)


def _of(node: Node, found: dict[Node, Expected | str], norms: dict[str, FoldedNorm]) -> Expected | str:
    word = kind(node)
    if node.op == "placeholder":
        return "nothing is known of images"
    if is_layer(node):
        norm = norms.get(str(node.target))
        if norm is None:
            return f"no batch norm was folded into {node.target}"
        if not norm.has_statistics:
            return f"the batch norm that was folded into {node.target} has no statistics: mean 0 and one deviation for all channels"
        return Expected(*norm.outputs(), Place(node.meta["val"].ndim - 1 if word == "linear" else 1))
    changed = f"{node.name} ({word}) changes the means by more than batch norms tell"
    tensors = [parent for parent in node.all_input_nodes if is_tensor(parent)]
    known: list[Expected] = []
    for parent in tensors:
        its = found[parent]
        if isinstance(its, str):
            return its
        known.append(its)
    if word == "add" and len(tensors) == 2 and "alpha" not in node.kwargs:
        one, other = known
        same = one.place == other.place and len(one.mean) == len(other.mean)
        return Expected(one.mean + other.mean, None, one.place) if same else changed
    if len(tensors) != 1 or operand(node) is not tensors[0]:
        return changed
    one = known[0]
    if node.op == "call_module" and isinstance(module_of(node), UniformQuantizer):
        return one
    place = place_behind(node, tensors[0], one.place)
    if place is None or _divides_by_another_number(node):
        return changed
    if word in _STAYS:
        return Expected(one.mean, one.deviation if word in ("identity", "view") else None, place)
    bound = upper_bound(node)
    if (word != "relu" and bound is None) or one.deviation is None:
        return changed
    limit = bound.flatten()[:: place.width].double() if isinstance(bound, Tensor) else bound
    return Expected(rectified_mean(one.mean, one.deviation, limit), None, place)


def _divides_by_another_number(node: Node) -> bool:
    """Say whether this is an average pool whose sum is divided by anything but the number of values in it."""
    if kind(node) != "avg_pool":
        return False
    if node.op == "call_module":
        return getattr(module_of(node), "divisor_override", None) is not None
    return argument(node, 6, "divisor_override") is not None
