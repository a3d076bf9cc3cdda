"""ModularizeWeights: a functional layer that reads the network's own parameters becomes the module it stands for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxquant.graph import argument, constant_of, free_path, put_module
from fxquant.kinds import WEIGHTED, kind
from fxquant.passes.canonicalize import Canonicalize
from fxquant.passes.fold_constants import FoldConstants
from fxquant.pipeline import Pass, Skip

_CONVS: dict[Callable, type[nn.Module]] = {
    F.conv1d: nn.Conv1d,
    F.conv2d: nn.Conv2d,
    F.conv3d: nn.Conv3d,
    torch.conv1d: nn.Conv1d,
    torch.conv2d: nn.Conv2d,
    torch.conv3d: nn.Conv3d,
    F.conv_transpose1d: nn.ConvTranspose1d,
    F.conv_transpose2d: nn.ConvTranspose2d,
    F.conv_transpose3d: nn.ConvTranspose3d,
}


class ModularizeWeights(Pass):
    """Turn ``F.conv2d``, ``F.linear``, ``F.batch_norm`` over stored parameters into ``nn.Conv2d``, ``nn.Linear``, ``nn.BatchNorm2d``.

        get_attr stem.weight ---.
        x ------------------- F.conv2d              =>     x -> stem

    The module takes the dotted path of the parameter, or of the module that computed it (parametrizations) and does nothing else, so it has
    the name the network's author gave it. Refused when the weight is computed from the image (what is computed from parameters alone is
    folded before): such a layer has no stored weight to quantize.
    """

    after = (Canonicalize, FoldConstants)
    preserves_output = True
    verb = "made modules"

    def match(self, node: Node) -> nn.Module | Skip | None:
        word = kind(node)
        if node.op != "call_function" or word not in WEIGHTED | {"batch_norm"}:
            return None
        if word == "batch_norm":
            return _batch_norm(node)
        operands = [argument(node, place, name) for place, name in ((1, "weight"), (2, "bias"))]
        for name, operand in zip(("weight", "bias"), operands, strict=True):
            if isinstance(operand, Node) and constant_of(operand) is None:
                return Skip(f"its {name} is computed ({operand.name}), not stored; the layer stays float")
        weight, bias = (constant_of(operand) if isinstance(operand, Node) else operand for operand in operands)
        if not isinstance(weight, Tensor):
            return Skip("its weight is no parameter or buffer of the network; the layer stays float")
        return _linear(weight, bias) if word == "linear" else _conv(node, weight, bias)

    def rewrite(self, gm: GraphModule, node: Node, match: object) -> None:
        assert isinstance(match, nn.Module)
        place, name = (1, "running_mean") if kind(node) == "batch_norm" else (1, "weight")
        source = str(argument(node, place, name).target)
        path = free_path(gm, source.removesuffix(name).rstrip("._") or "weight")
        owner = source.removesuffix("." + name)
        if owner == source and _is_all_of(gm, node, inside := _innermost(node)):
            path = inside
        elif owner != source and _only_holds_parameters(gm, owner):
            path = owner
            if sum(str(other.target) == source for other in gm.graph.nodes) > 1:
                path = free_path(gm, owner)  # another call still reads the parameter under its name
        put_module(gm, path, match)
        with gm.graph.inserting_before(node):
            new = gm.graph.call_module(path, (node.args[0] if node.args else node.kwargs["input"],))
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        constants = [other for other in node.all_input_nodes if other.op == "get_attr"]
        gm.graph.erase_node(node)
        for constant in constants:  # the module may have taken the place of what held them
            if not constant.users:
                gm.graph.erase_node(constant)


def _innermost(node: Node) -> str:
    """Return the path of the innermost module whose forward made the call."""
    return next((path for path, _ in reversed((node.meta.get("nn_module_stack") or {}).values())), "")


def _is_all_of(gm: GraphModule, node: Node, path: str) -> bool:
    """Say whether the module at `path` makes no other such call, and all that it holds is read by `node` alone."""
    held = [other for other in gm.graph.nodes if other.op in ("get_attr", "call_module") and str(other.target).startswith(f"{path}.")]
    alone = not any(kind(other) in WEIGHTED | {"batch_norm"} and _innermost(other) == path for other in gm.graph.nodes if other is not node)
    return bool(path) and bool(held) and alone and all(other.op == "get_attr" and set(other.users) == {node} for other in held)


def _only_holds_parameters(gm: GraphModule, path: str) -> bool:
    owner = gm.get_submodule(path)
    held = {name for name, _ in [*owner.named_parameters(), *owner.named_buffers()]}
    return (
        type(owner) is nn.Module
        and not any(True for _ in owner.children())
        and held <= {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    )


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Module | Skip:
    if weight.ndim != 2:
        return Skip(f"its weight has {weight.ndim} axes")
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    return _with_parameters(module, weight, bias)


def _conv(node: Node, weight: Tensor, bias: Tensor | None) -> nn.Module | Skip:
    build = _CONVS[node.target]  # type: ignore[index]
    options: dict[str, Any] = {"stride": argument(node, 3, "stride", 1), "padding": argument(node, 4, "padding", 0)}
    if kind(node) == "conv":
        options |= {"dilation": argument(node, 5, "dilation", 1), "groups": argument(node, 6, "groups", 1)}
        channels = weight.shape[1] * options["groups"], weight.shape[0]
    else:
        options |= {"output_padding": argument(node, 5, "output_padding", 0), "groups": argument(node, 6, "groups", 1)}
        options |= {"dilation": argument(node, 7, "dilation", 1)}
        channels = weight.shape[0], weight.shape[1] * options["groups"]
    if any(isinstance(part, Node) for value in options.values() for part in (value if isinstance(value, tuple | list) else (value,))):
        return Skip("its stride or padding depends on the batch; the layer stays float")
    options = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
    module = build(*channels, tuple(weight.shape[2:]), bias=bias is not None, device="meta", **options)
    return _with_parameters(module, weight, bias)


def _batch_norm(node: Node) -> nn.Module | Skip:
    names = ("running_mean", "running_var", "weight", "bias")
    operands = [argument(node, place, name) for place, name in enumerate(names, start=1)]
    mean, var, weight, bias = values = [constant_of(operand) if isinstance(operand, Node) else None for operand in operands]
    if argument(node, 5, "training", False) or mean is None or var is None:
        return Skip("normalizes with the statistics of the batch, not with stored ones")
    if any(isinstance(operand, Node) and value is None for operand, value in zip(operands, values, strict=True)):
        return Skip("its scale or shift is computed, not stored")
    if "val" not in node.meta or node.meta["val"].ndim not in (2, 3, 4, 5):
        return Skip("its input has an unknown number of axes")
    build = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[node.meta["val"].ndim]
    if (weight is None) != (bias is None):
        return Skip("has a scale without a shift, or a shift without a scale")
    module = build(mean.numel(), eps=argument(node, 7, "eps", 1e-5), affine=weight is not None, device="meta")
    module.running_mean, module.running_var = mean, var
    module.num_batches_tracked = torch.zeros((), dtype=torch.long, device=mean.device)
    return _with_parameters(module, weight, bias)


def _with_parameters(module: nn.Module, weight: Tensor | None, bias: Tensor | None) -> nn.Module:
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            setattr(module, name, value if isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=False))
    return module.eval()
