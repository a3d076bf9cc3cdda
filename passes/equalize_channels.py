"""EqualizeChannels: neighboring layers share the range of each channel, so that one step fits all channels of a tensor."""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.fx import GraphModule, Node

from fxquant.channels import Link, Shared, follow
from fxquant.equalization import Balance, balance, put_clamp, rescaled, spread_bound, update_norm
from fxquant.errors import ConfigError, one_of
from fxquant.graph import module_of, put_module
from fxquant.kinds import is_layer
from fxquant.passes.canonicalize import Canonicalize
from fxquant.passes.fold_batch_norm import FoldBatchNorm
from fxquant.passes.modularize_weights import ModularizeWeights
from fxquant.passes.unshare_modules import UnshareModules
from fxquant.pipeline import Pass

RELU6 = {"channels": "a bound a channel takes the place of the 6", "refuse": "a layer in front of a ReLU6 stays as it is"}


class EqualizeChannels(Pass):
    """Give every channel the same range in the layer that makes it and in the layers that read it (Nagel et al. 2019, DFQ).

        A -> relu -> B                              =>     A / s -> relu -> s * B
        A -> relu6 -> B                             =>     A / s -> min(relu, 6 / s) -> s * B

    ReLU commutes with positive factors, so any ``s > 0``, one a channel, leaves the output as it is; with ranges the largest absolute
    weights of a channel (of several layers B, the largest of all),

        s = sqrt(range_A / range_B)                 =>     range_A / s = s * range_B = sqrt(range_A * range_B)

    A layer that ends one pair and begins the next (conv -> depthwise -> conv) takes part in both, so all pairs are swept until nothing
    moves. Between the layers may lie ReLU, LeakyReLU, PReLU, pooling, zero padding, and flattening that keeps channels apart.

    Refused when the output also goes anywhere else (a sum, a concatenation, the result), when the activation is not homogeneous, when a
    weight is read in two places. Channels whose range is 0 in one of the layers, or all but 0, stay as they are.

    Args:
        relu6: a key of `RELU6`: what happens to ReLU6, and to Hardtanh from 0 on.
        tolerance: factors that all lie this close to 1 are left alone.
        sweeps: at most so many.
        limit: a channel that needs a factor beyond `limit`, or below ``1 / limit``, stays as it is.
    """

    after = (Canonicalize, ModularizeWeights, UnshareModules, FoldBatchNorm)
    preserves_output = True
    verb = "equalized"

    def __init__(self, relu6: Literal["channels", "refuse"] = "channels", tolerance: float = 1e-3, sweeps: int = 1000, limit: float = 1e4):
        super().__init__()
        if relu6 not in RELU6:
            raise ConfigError(f"{relu6!r} is no way to treat ReLU6", where="relu6", fix=one_of(relu6, RELU6))
        for where, value, least in (("tolerance", tolerance, 0), ("sweeps", sweeps, 0), ("limit", limit, 1)):
            if not value > least:
                raise ConfigError(f"is {value!r}", where=where, fix=f"Give more than {least}")
        self.relu6, self.tolerance, self.sweeps, self.limit = relu6, tolerance, sweeps, limit

    def run(self, gm: GraphModule) -> None:
        links, shared = [], Shared(gm)
        for node in gm.graph.nodes:
            if is_layer(node):
                link = follow(node, shared, clamps=self.relu6 == "channels")
                if isinstance(link, Link):
                    links.append(link)
                else:
                    self.skip(node, link)
        found = balance(links, self.tolerance, self.sweeps, self.limit)
        if found.left:
            self.note(f"{found.left} channels have no weights to speak of in one of two layers and stay as they are")
        if not found.moved:
            return
        self._tell(found)
        factors = {link.layer: log.exp() for link, log in zip(links, found.logs, strict=True) if log.any()}
        _put_factors(gm, [link for link in links if link.layer in factors], factors)
        self.changed(sum(len(link.consumers) for link in links if link.layer in factors))

    def _tell(self, found: Balance) -> None:
        far = "" if found.settled else f", which did not settle; it needs more than sweeps={self.sweeps}"
        self.note(f"{found.sweeps} sweeps{far}")
        before, now = (
            f"{values.log().mean().exp().item():.3g}-fold (at most {values.max().item():.3g})" for values in (found.before, found.behind)
        )
        self.note(f"the ranges of a channel in two layers differed {before}, now {now}")


def _put_factors(gm: GraphModule, links: list[Link], factors: dict[Node, Tensor]) -> None:
    outward = {link.layer: 1 / factors[link.layer] for link in links}
    inward = {node: factors[link.layer].repeat_interleave(width) for link in links for node, width in link.consumers}
    for node in {node: None for link in links for node in link.layers}:
        put_module(gm, str(node.target), rescaled(module_of(node), outward.get(node), inward.get(node)))
    for link in links:
        scale = outward[link.layer]
        update_norm(gm, str(link.layer.target), scale, 0 * scale)
        for node, place in link.clamps:
            bound = spread_bound(node, place, scale) * place.along(scale, node.meta["val"].ndim)
            put_clamp(gm, node, bound.to(node.meta["val"].dtype))
