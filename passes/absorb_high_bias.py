"""AbsorbHighBias: what a channel hardly ever falls below moves behind its ReLU, into the bias of the layer that reads it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxquant.channels import Link, Shared, blocks, follow
from fxquant.equalization import put_clamp, shifted, spread_bound, update_norm
from fxquant.execution import sweep
from fxquant.graph import module_of, put_module
from fxquant.kinds import is_layer, kind
from fxquant.passes.equalize_channels import EqualizeChannels
from fxquant.passes.fold_batch_norm import FoldBatchNorm
from fxquant.pipeline import Pass
from fxquant.reconstruction.norms import NORMS, FoldedNorm

Moments = dict[str, tuple[Tensor, Tensor, Tensor]]
"""Mean, deviation and least value (infinity where nothing is known of it) of each output channel of a layer, float64 ``[C]``, by the path
of the layer."""


class AbsorbHighBias(Pass):
    """Move the part of a channel that is almost always there from the bias of its layer into those behind (Nagel et al. 2019, 4.1.3).

        A(W, b) -> relu -> B(V, d)                  =>     A(W, b - c) -> relu -> B(V, d + V c)         c = max(0, mean - 3 std)

    ``relu(y) = relu(y - c) + c`` wherever y >= c, which is all but a thousandth of a normal distribution. The tensor between the layers
    then begins at 0 where it began at c, and its quantizer spends no codes below: equalizing makes some channels small in their
    weights, but large in their bias. A bound above (ReLU6, `ChannelClamp`) falls by c as well.

    Means and deviations are of the outputs of A, from `batches` or, without images, from the batch norm that was folded into A, if it has
    statistics. Give images where there are any: c then is at most the least value of the channel on them, so that the outputs for them stay
    equal, and a batch norm may remember statistics that its layer does not have.

    Refused when anything but ReLUs lies between, when the output also goes anywhere else, and when a B pads with zeros: c is then missing
    in the padding, and the borders of every image would be wrong by V c, not the rare values below c by a little.

    Args:
        batches: images ``[N, C, H, W]`` on the device of the graph, or None.
        deviations: how many deviations below the mean the moved part ends.
    """

    after = (FoldBatchNorm, EqualizeChannels)
    preserves_output = False
    verb = "absorbed"

    def __init__(self, batches: Sequence[Tensor] | None = None, deviations: float = 3.0):
        super().__init__()
        self.batches, self.deviations = batches, deviations

    def run(self, gm: GraphModule) -> None:
        moments, shared = self._moments(gm), Shared(gm)
        moved: list[tuple[Link, Tensor]] = []
        for node in gm.graph.nodes:
            if not is_layer(node):
                continue
            link = follow(node, shared)
            why = link if isinstance(link, str) else _why_not(link)
            if why is None and str(node.target) not in moments:
                why = "nothing is known of its outputs: no batch norm with statistics was folded into it, and there are no images"
            if why is not None:
                self.skip(node, why)
                continue
            assert isinstance(link, Link)
            part = self._part(*moments[str(node.target)])
            if part.any():
                moved.append((link, part))
        for link, part in moved:
            _move(gm, link, part)
            self.changed()
        if moved:
            self.note(
                f"{sum(int((part > 0).sum()) for _, part in moved)} of {sum(len(part) for _, part in moved)} channels of these layers"
            )

    def _moments(self, gm: GraphModule) -> Moments:
        if self.batches is None:
            norms: dict[str, FoldedNorm] = gm.meta.get(NORMS, {})
            return {path: _of_norm(norm) for path, norm in norms.items() if norm.has_statistics}
        self.note(f"moments over {sum(map(len, self.batches))} images")
        found = {}
        for node, values in self.track(sweep(gm, self.batches), "absorb high bias", len(gm.graph.nodes)):
            if is_layer(node):
                found[str(node.target)] = _of_values(values, -1 if kind(node) == "linear" else 1)
        return found

    def _part(self, mean: Tensor, deviation: Tensor, least: Tensor) -> Tensor:
        part = torch.minimum(mean - self.deviations * deviation, least)
        # What rounding leaves of a part that has been moved already does not count.
        return torch.where(part > 1e-4 * (mean.abs() + deviation), part, 0.0)


def _of_norm(norm: FoldedNorm) -> tuple[Tensor, Tensor, Tensor]:
    mean, deviation = norm.outputs()
    return mean, deviation, torch.full_like(mean, torch.inf)


def _of_values(values: Sequence[Tensor], axis: int) -> tuple[Tensor, Tensor, Tensor]:
    flat = [value.detach().movedim(axis, 0).flatten(1) for value in values]
    count = sum(value.shape[1] for value in flat)
    mean = torch.stack([value.double().sum(1) for value in flat]).sum(0) / count
    square = torch.stack([(value.double() - mean[:, None]).square().sum(1) for value in flat]).sum(0) / count
    return mean, square.sqrt(), torch.stack([value.amin(1) for value in flat]).amin(0).double()


def _why_not(link: Link) -> str | None:
    """Return why the bias of a layer cannot move through what lies behind it, or None."""
    others = sorted(link.words - {"relu", "identity"} - {kind(node) for node, _ in link.clamps})
    if others:
        return f"{', '.join(others)} between it and the next layer; only a ReLU may be"
    if not link.words - {"identity"}:
        return "has no ReLU behind it"
    for node, _ in link.consumers:
        if kind(node) == "conv_transpose":
            return f"{node.target} reads its inputs a different number of times at each position"
        if _pads_zeros(node):
            return f"{node.target} pads with zeros, where the moved part would be missing"
    return None


def _pads_zeros(node: Node) -> bool:
    layer = module_of(node)
    padding = getattr(layer, "padding", 0)
    if getattr(layer, "padding_mode", "zeros") != "zeros" or padding == "valid":
        return False
    if padding == "same":
        return any(size > 1 for size in layer.kernel_size)  # type: ignore[union-attr]
    return any(padding) if isinstance(padding, tuple) else padding != 0


@torch.no_grad()
def _move(gm: GraphModule, link: Link, part: Tensor) -> None:
    for node, place in link.clamps:
        bound = spread_bound(node, place, part)
        part = torch.minimum(part, bound.flatten()[:: place.width])
    path = str(link.layer.target)
    put_module(gm, path, shifted(module_of(link.layer), -part))
    update_norm(gm, path, torch.ones_like(part), -part)
    for node, place in link.clamps:
        bound = spread_bound(node, place, part) - place.along(part, node.meta["val"].ndim)
        put_clamp(gm, node, bound.to(node.meta["val"].dtype))
    for node, _ in link.consumers:
        layer = module_of(node)
        weight = blocks(layer, layer.weight).double().sum(3)  # type: ignore[arg-type]
        put_module(gm, str(node.target), shifted(layer, (weight @ part.view(len(weight), -1, 1)).flatten()))
