"""ReparameterizeNorms: channels behind a layer norm get one grid that is as good as one a channel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxquant.errors import listed
from fxquant.execution import Values, sweep
from fxquant.graph import argument, constant_of, module_of, put_constant, put_module, readers, sharing_copy
from fxquant.kinds import kind
from fxquant.passes.fold_batch_norm import FoldBatchNorm
from fxquant.pipeline import Pass, Skip
from fxquant.placement import Plan
from fxquant.quantizers.channelwise import channel_grids, one_grid
from fxquant.recipe import Recipe

DONE = "reparameterized"
"""The key of ``GraphModule.meta`` that names the norms a run has been over: channels that are even stay as they are, bit for bit."""


class ReparameterizeNorms(Pass):
    """Move and scale the channels of a layer norm's output so that one quantizer serves them all, and let the next layers take it back.

        norm(gamma, beta) -> linear(W, b)           =>     norm(gamma / r, beta / r - d) -> linear(W r, b + W r d)

    r and d are those of `fxquant.quantizers.channelwise`, from per-channel ranges over calibration images. Outputs stay equal:

        W r (x / r - d) + b + W r d = W x + b

    Behind it the tensor is quantized per tensor, as any other, and its grid is close to what a scale and a zero-point a channel would give.

    Args:
        plan: which tensors are quantized, with how many bits.
        batches: calibration images ``[N, C, H, W]`` on the device of the graph.
        recipe: the range estimator of activations, and its constants.
    """

    after = (FoldBatchNorm,)
    preserves_output = True
    verb = "reparameterized"

    def __init__(self, plan: Plan, batches: Sequence[Tensor], recipe: Recipe):
        super().__init__()
        self.plan, self.batches, self.recipe = plan, batches, recipe

    def run(self, gm: GraphModule) -> None:
        done = gm.meta.get(DONE, frozenset())
        norms = [n for n in gm.graph.nodes if kind(n) == "layer_norm" and n.name in self.plan.tensors and n.name not in done]
        reasons = {node: _unfit(node) for node in norms}
        carried = _carried(gm, [node for node in norms if not reasons[node]], self.batches[0][:2])
        layers: dict[Node, list[Node]] = {}
        for node in norms:
            found = reasons[node] or _layers(node, carried)
            if isinstance(found, Skip):
                self.skip(node, found.reason)
            else:
                layers[node] = found
        moves = {node: self._move(node, values) for node, values in self.track(self._values(gm, layers), "reparameterize", len(layers))}
        for node, (r, d) in moves.items():
            self._rewrite(gm, node, layers[node], r, d)
            self.changed()
        gm.meta[DONE] = done | {node.name for node in moves}

    def _values(self, gm: GraphModule, nodes: dict[Node, list[Node]]) -> Iterator[tuple[Node, Values]]:
        """Yield the values of `nodes`, in graph order, and go no further than the last one."""
        left = len(nodes)
        for node, values in sweep(gm, self.batches) if left else ():
            if node in nodes:
                yield node, values
                left -= 1
                if not left:
                    return

    def _move(self, node: Node, values: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return r and d of the channels of `node`, in float64."""
        rows = torch.cat([value.flatten(0, -2) for value in values]).T
        bits = self.plan.tensors[node.name].bits
        scale, zero_point = channel_grids(
            rows, bits, self.recipe.activation_range, p=self.recipe.activation_p, percentile=self.recipe.percentile
        )
        return one_grid(scale.double(), zero_point.double(), 2**bits - 1)[:2]

    def _rewrite(self, gm: GraphModule, node: Node, layers: list[Node], r: Tensor, d: Tensor) -> None:
        if node.op == "call_module":
            norm = sharing_copy(module_of(node))
            _set(norm, norm.weight.double() / r, norm.bias.double() / r - d)
            put_module(gm, str(node.target), norm)
        else:
            for constant, moved in zip(_constants(node), (lambda x: x / r, lambda x: x / r - d), strict=True):
                old = constant_of(constant)
                assert old is not None
                put_constant(gm, str(constant.target), nn.Parameter(moved(old.detach().double()).to(old), old.requires_grad))
        for reader in layers:
            layer = sharing_copy(module_of(reader))
            weight = layer.weight.double() * r
            bias = weight @ d if layer.bias is None else layer.bias.double() + weight @ d
            _set(layer, weight, bias)
            put_module(gm, str(reader.target), layer)


def _set(module: nn.Module, weight: Tensor, bias: Tensor) -> None:
    like = module.weight
    assert isinstance(like, Tensor)
    module.weight, module.bias = (nn.Parameter(value.detach().to(like), like.requires_grad) for value in (weight, bias))


def _unfit(node: Node) -> Skip | None:
    """Return why the norm itself cannot take r and d, None when it can."""
    if node.op != "call_module":
        return _unfit_function(node)
    norm = module_of(node)
    if getattr(norm, "weight", None) is None or getattr(norm, "bias", None) is None:
        return Skip("has no weight and bias of its own to take the scales and zero-points")
    assert isinstance(norm, nn.LayerNorm)
    if len(norm.normalized_shape) != 1 or not _is_over_the_last_axis(norm):
        return Skip("does not normalize the last axis")
    return None


def _unfit_function(node: Node) -> Skip | None:
    """The same for ``F.layer_norm`` over parameters of some module."""
    constants = _constants(node)
    if any(constant_of(constant) is None for constant in constants):
        return Skip("has no weight and bias of its own to take the scales and zero-points")
    if len(argument(node, 1, "normalized_shape")) != 1:
        return Skip("does not normalize the last axis")
    read = [other.target for other in node.graph.nodes if other.op == "get_attr"]
    if any(len(constant.users) > 1 or read.count(constant.target) > 1 for constant in constants):
        return Skip("shares its weight or bias")
    return None


def _constants(node: Node) -> list[Node]:
    """Return the nodes that give ``F.layer_norm`` its weight and bias, or the node itself, which is no constant."""
    given = [argument(node, place, name) for place, name in ((2, "weight"), (3, "bias"))]
    return [value if isinstance(value, Node) else node for value in given]


@torch.no_grad()
def _is_over_the_last_axis(norm: nn.LayerNorm) -> bool:
    """Try it: some subclasses move the channels first, or compute something else."""
    channels = norm.normalized_shape[0]
    x = torch.linspace(-1, 2, 30 * channels).to(norm.weight).view(2, 15, channels).cos()
    try:
        return torch.allclose(norm(x), F.layer_norm(x, (channels,), norm.weight, norm.bias, norm.eps), rtol=1e-4, atol=1e-5)
    except (RuntimeError, ValueError, IndexError):
        return False


def _carried(gm: GraphModule, norms: list[Node], images: Tensor) -> set[Node]:
    """Return the views whose last axis is the channels of one of the norms: each norm is made to say 1, 2, .. C and they are read again.

    Padding shows, too: 0 is no channel's number, and zeros would not be zeros any more behind the pass.
    """
    carried: dict[Node, Tensor] = {}
    for node, values in sweep(gm, [images]) if norms else ():
        if node in norms:
            value = values[0]
            carried[node] = torch.arange(1, value.shape[-1] + 1, dtype=value.dtype, device=value.device)
            values[:] = [carried[node].expand(value.shape).contiguous()]
            continue
        channels = next((carried[parent] for parent in node.all_input_nodes if parent in carried), None)
        if channels is None or kind(node) not in ("view", "getitem", "pad", "identity"):
            continue
        value = values[0]
        if isinstance(value, Tensor) and value.shape[-1:] == channels.shape and bool((value == channels).all()):
            carried[node] = channels
    return set(carried)


def _layers(norm: Node, carried: set[Node]) -> list[Node] | Skip:
    """Return the linear layers that read the norm, through views of it too, or why they cannot take r and d back."""
    found, others, todo = [], [], [norm]
    while todo:
        for reader in readers(todo.pop()):
            if reader in carried:
                todo.append(reader)
            elif reader.op == "call_module" and kind(reader) == "linear":
                found.append(reader)
            elif kind(reader) not in ("size", "getattr"):
                others.append(str(reader.target) if reader.op == "call_module" else reader.name)
    if others:
        return Skip(f"is read by {listed(others)}, too, which could not take the scales back" if found else f"is read by {listed(others)}")
    return found or Skip("is read by no layer")
