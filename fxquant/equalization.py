"""Which factors make the ranges of channels equal, and how they are put into layers and activations.

    A / s,  B1 * s,  B2 * s          s = sqrt(range_A / range_B), one a channel of A, behind which `fxquant.channels` finds B1 and B2

`balance` finds the factors, `rescaled` and `put_clamp` put them into layers and activations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxquant.channels import ChannelClamp, Link, Place, blocks, operand, upper_bound
from fxquant.graph import bypass, free_path, module_of, put_module, sharing_copy
from fxquant.reconstruction.norms import NORMS, FoldedNorm


def magnitudes(layer: nn.Module, width: int) -> Tensor:
    """Return the largest absolute weight between each output and each input channel, ``[groups, out, in]``, float64."""
    largest = blocks(layer, layer.weight.detach().abs()).amax(3)  # type: ignore[operator]
    return largest.unflatten(2, (-1, width)).amax(3).double()


@dataclass
class Balance:
    """The logarithms of the factors of each link, ``[C]`` float64, and how they were found.

    Attributes:
        moved: the largest of them in absolute value, 0 when the ranges were balanced before.
        before, behind: factors between the ranges of a channel in the two layers, at least 1, of all channels that can be balanced.
        left: how many channels cannot: their range is 0 in one layer, or they would need a factor beyond the limit.
    """

    logs: list[Tensor]
    sweeps: int
    settled: bool
    before: Tensor
    behind: Tensor
    left: int

    @property
    def moved(self) -> float:
        return max((log.abs().max().item() for log in self.logs), default=0.0)


@torch.no_grad()
def balance(links: Sequence[Link], tolerance: float, sweeps: int, limit: float) -> Balance:
    """Find ``s = sqrt(range_A / range_B)`` for every channel of every link, all at once: a layer may end one link and begin the next.

    Ranges are largest absolute weights, that of several readers the largest of all. In logarithms one sweep over the links moves the
    factors by no more than the sweep before (each update is a mean of maxima, which never spreads values apart), so a second run begins
    where the first one stopped: below the tolerance, with nothing to do.

    Args:
        links: in graph order.
        tolerance: relative change of factors below which they stay as they are.
        sweeps: at most so many.
        limit: a channel that needs a factor beyond `limit` or below ``1 / limit`` is as good as dead in one of the layers. It stays as it
            is: its weights would become ordinary ones, but its bias, which is no smaller than others, enormous.
    """
    widths = {consumer: width for link in links for consumer, width in link.consumers}
    sizes = {node: magnitudes(module_of(node), widths.get(node, 1)) for link in links for node in link.layers}
    wanted = [_wanted(link, sizes) for link in links]
    free = [log.abs() <= math.log(limit) for log in wanted]  # False for NaN as well
    found = Balance([torch.zeros_like(log) for log in wanted], 0, True, _ratios(wanted, free), _ratios(wanted, free), 0)
    # Half of the tolerance, so that rounding the weights does not give the next run something to do.
    for done in range(1, sweeps + 1):
        change = 0.0
        for index, link in enumerate(links):
            step = _wanted(link, sizes)
            # What a neighbor brought within the limit joins in, as it would in a second run.
            free[index] |= step.abs() <= math.log(limit)
            step = torch.where(free[index], step, 0.0)
            found.logs[index] += step
            change = max(change, step.abs().max().item())
            for node in link.layers:
                size = sizes[node]
                size *= (-step).exp().view(len(size), -1, 1) if node is link.layer else step.exp().view(len(size), 1, -1)
        found.sweeps, found.settled = done, change <= tolerance
        if change <= tolerance / 2 or (done == 1 and found.settled):
            break
    found.left = sum(int((~mask).sum()) for mask in free)
    if found.sweeps == 1 and found.settled:
        found.logs = [torch.zeros_like(log) for log in found.logs]
    found.behind = _ratios([_wanted(link, sizes) for link in links], free)
    return found


def _wanted(link: Link, sizes: dict[Node, Tensor]) -> Tensor:
    """Return log sqrt(range_A / range_B); infinite or NaN where a range is 0."""
    mine = sizes[link.layer].amax(2).flatten()
    theirs = torch.stack([sizes[node].amax(1).flatten() for node, _ in link.consumers]).amax(0)
    return (mine.log() - theirs.log()) / 2


def _ratios(wanted: Sequence[Tensor], free: Sequence[Tensor]) -> Tensor:
    return torch.cat([(2 * log[mask].abs()).exp() for log, mask in zip(wanted, free, strict=True)]) if wanted else torch.ones(0)


@torch.no_grad()
def rescaled(layer: nn.Module, outward: Tensor | None, inward: Tensor | None) -> nn.Module:
    """Return a copy of `layer` whose outputs are multiplied by `outward` and whose weights by `inward`, an input each; rounded once."""
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, Tensor) and not isinstance(bias, nn.Module)
    exact = weight.detach().double().contiguous()
    exact = exact.clone() if exact.data_ptr() == weight.data_ptr() else exact
    view = blocks(layer, exact)
    new = sharing_copy(layer)
    if inward is not None:
        view *= inward.view(len(view), 1, -1, 1)
    if outward is not None:
        view *= outward.view(len(view), -1, 1, 1)
        if bias is not None:
            new.bias = nn.Parameter((bias.double() * outward).to(bias.dtype), requires_grad=bias.requires_grad)
    new.weight = nn.Parameter(torch.empty_like(weight).copy_(exact), requires_grad=weight.requires_grad)
    return new


def put_clamp(gm: GraphModule, node: Node, bound: Tensor) -> None:
    """Let the activation `node` compute ``min(relu(x), bound)``."""
    called = node.op == "call_module"
    path = str(node.target) if called else node.name
    if not called or sum(other.op == "call_module" and other.target == path for other in gm.graph.nodes) > 1:
        path = free_path(gm, path)
    put_module(gm, path, ChannelClamp(bound))
    if called:
        node.target = path
        return
    with gm.graph.inserting_before(node):
        new = gm.graph.call_module(path, (operand(node),))  # type: ignore[arg-type]
    new.meta = dict(node.meta)
    bypass(node, new)


def spread_bound(node: Node, place: Place, like: Tensor) -> Tensor:
    """Return the bound of an activation in a shape that broadcasts against its value, for as many channels as `like` ``[C]``, float64."""
    return place.along(torch.ones_like(like), node.meta["val"].ndim) * upper_bound(node)  # type: ignore[operator]


def update_norm(gm: GraphModule, path: str, scale: Tensor, shift: Tensor) -> None:
    """Note that the outputs of the layer at `path`, and so those of the norm folded into it, are now ``scale * y + shift``."""
    norms = gm.meta.get(NORMS, {})
    if path in norms:
        old: FoldedNorm = norms[path]
        factor, offset = (value.double() * scale for value in (old.factor, old.shift))
        new = FoldedNorm(old.mean, old.deviation, factor.to(old.factor.dtype), (offset + shift).to(old.shift.dtype))
        gm.meta[NORMS] = {**norms, path: new}


@torch.no_grad()
def shifted(layer: nn.Module, shift: Tensor) -> nn.Module:
    """Return a copy of `layer` whose outputs are larger by `shift`, one a channel; a bias is made when there is none."""
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, Tensor) and not isinstance(bias, nn.Module)
    new = sharing_copy(layer)
    exact = shift if bias is None else bias.double() + shift
    new.bias = nn.Parameter(exact.to(weight.dtype), requires_grad=weight.requires_grad)
    return new
