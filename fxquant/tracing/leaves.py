"""Which modules stay whole in the graph, and what is taken off a model before it is traced."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

_NORMS = (nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


def is_leaf(module: nn.Module, opaque: tuple[type[nn.Module], ...] = ()) -> bool:
    """Whether a call of `module` is one `call_module` node.

    * torch's own layers, as long as they hold no other module: `Conv2d` is one node, `TransformerEncoderLayer` is traced through.
    * norms with an activation built in (every batch norm subclass; group and layer norms that have an `act`).
    * the classes in `opaque`.

    A subclass of a torch layer that comes from elsewhere is traced through, because its forward may do anything with the weight.
    """
    if isinstance(module, opaque):
        return True
    if isinstance(module, _BatchNorm) or (isinstance(module, _NORMS) and isinstance(getattr(module, "act", None), nn.Module)):
        return True
    return type(module).__module__.startswith("torch.nn.modules.") and not any(True for _ in module.children())


def unwrap(model: nn.Module) -> nn.Module:
    """The network inside `DataParallel`, `DistributedDataParallel` and `torch.compile`, however often it was wrapped."""
    while (inner := _wrapped(model)) is not None:
        model = inner
    return model


def unwrap_children(model: nn.Module) -> None:
    """Replace wrapped submodules of `model` by what they wrap, in place."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if _wrapped(child) is not None:
                setattr(parent, name, unwrap(child))


def _wrapped(module: nn.Module) -> nn.Module | None:
    if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return module.module
    # torch._dynamo.OptimizedModule, recognized by its one attribute: importing dynamo for the test would take seconds.
    inner = None if isinstance(module, torch.jit.ScriptModule) else module._modules.get("_orig_mod")
    return inner if isinstance(inner, nn.Module) else None
