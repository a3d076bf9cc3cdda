"""SplitNormAct: a norm with an activation inside becomes a norm and an activation."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn
from torch.fx import GraphModule, Node
from torch.nn.modules.batchnorm import _BatchNorm

from fxquant.graph import free_path, insert_behind, module_of, put_module
from fxquant.kinds import kind
from fxquant.pipeline import Pass, Skip

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.GroupNorm, nn.LayerNorm)


class SplitNormAct(Pass):
    """Split a norm that carries its activation (timm's ``BatchNormAct2d``, ``GroupNormAct``, ...) into the two it is made of.

        conv -> bn_act                              =>     conv -> bn -> bn_act

    The plain norm keeps the name, so that it can be folded like any other.
    """

    preserves_output = True
    verb = "split"

    def match(self, node: Node) -> nn.Module | Skip | None:
        if node.op != "call_module" or kind(node) != "norm_act":
            return None
        module = module_of(node)
        base = next((base for base in _NORMS if isinstance(module, base)), None)
        if base is None:
            return Skip(f"{type(module).__name__} is no batch, group or layer norm")
        if not type(module).forward.__module__.startswith("timm."):
            return Skip(f"{type(module).__name__} has a forward of its own, which may be more than a norm and its activation")
        if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 1 and _rank(node) > 3:
            return Skip(f"{type(module).__name__} normalizes channels of a channels-first tensor, which a plain layer norm does not")
        return module

    def rewrite(self, gm: GraphModule, node: Node, match: object) -> None:
        assert isinstance(match, nn.Module)
        path = str(node.target)
        put_module(gm, path, _plain(match))
        for name in ("act", "drop"):
            part = getattr(match, name, None)
            if isinstance(part, nn.Module) and not isinstance(part, nn.Identity):
                part_path = free_path(gm, f"{path}_{name}")
                part = copy.deepcopy(part)
                if hasattr(part, "inplace"):
                    part.inplace = False  # type: ignore[assignment]
                put_module(gm, part_path, part)
                insert_behind(node, part_path)


def _rank(node: Node) -> int:
    return node.meta["val"].ndim if "val" in node.meta else 4


def _plain(module: nn.Module) -> nn.Module:
    """Return the torch norm inside, sharing parameters and buffers."""
    plain: nn.Module
    if isinstance(module, _BatchNorm):
        base: Any = next(base for base in type(module).__mro__ if base in _NORMS)
        plain = base(module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats)
    elif isinstance(module, nn.GroupNorm):
        plain = nn.GroupNorm(module.num_groups, module.num_channels, module.eps, module.affine)
    else:
        assert isinstance(module, nn.LayerNorm)
        plain = nn.LayerNorm(module.normalized_shape, module.eps, module.elementwise_affine)
    plain._parameters.update({name: module._parameters[name] for name in plain._parameters})
    plain._buffers.update({name: module._buffers[name] for name in plain._buffers})
    return plain.train(module.training)
