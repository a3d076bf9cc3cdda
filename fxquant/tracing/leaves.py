"""Which modules stay whole in the graph, and what is taken off a model before it is traced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

_NORMS = (nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


def is_leaf(module: nn.Module, opaque: tuple[type[nn.Module], ...] = ()) -> bool:
    """Whether a call of `module` is one `call_module` node.

    * torch's own layers, as long as they hold no other module: `Conv2d` is one node, `TransformerEncoderLayer` is traced through.
    * norms with an activation built in (every batch norm subclass; group and layer norms that have an `act`).
    * the classes in `opaque`.

    A subclass of a torch layer that comes from elsewhere is traced through, because its forward may do anything with the weight; so is a
    layer with a forward of its own, or a weight that hooks compute. Hooks are run by the tracer, in front of the node and behind it.
    """
    if isinstance(module, opaque):
        return True
    if "forward" in vars(module) or any(isinstance(value, Tensor) for value in vars(module).values()):
        return False
    if isinstance(module, _BatchNorm) or (isinstance(module, _NORMS) and isinstance(getattr(module, "act", None), nn.Module)):
        return True
    return type(module).__module__.startswith("torch.nn.modules.") and not any(True for _ in module.children())


def around_hooks(module: nn.Module, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return what `call` gives between the forward pre-hooks and the forward hooks of `module`, as ``module.__call__`` runs them."""
    for key, hook in module._forward_pre_hooks.items():
        if key in module._forward_pre_hooks_with_kwargs:
            args, kwargs = hook(module, args, kwargs) or (args, kwargs)
        elif (given := hook(module, args)) is not None:
            args = given if isinstance(given, tuple) else (given,)
    output = call(*args, **kwargs)
    for key, hook in module._forward_hooks.items():
        given = hook(module, args, kwargs, output) if key in module._forward_hooks_with_kwargs else hook(module, args, output)
        output = output if given is None else given
    return output


def drop_hooks(module: nn.Module) -> None:
    """Remove the forward hooks of a leaf, in place: a graph has what they do around its call; those of an opaque module run inside."""
    if is_leaf(module):
        module._forward_pre_hooks.clear()
        module._forward_hooks.clear()


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
