"""From an `nn.Module` to a `torch.fx.GraphModule` with modules, names, and the value of every node."""

from __future__ import annotations

import contextlib
import copy
import inspect
import itertools
import warnings

import torch
from torch import Tensor, nn

from fxquant.errors import FxquantWarning, TraceError
from fxquant.graph import KEPT_ATTRIBUTES

from .attention import without_fast_path
from .failure import explain
from .leaves import drop_hooks, unwrap, unwrap_children
from .sizes import FixedSizeCode, quiet_failures, same_operations
from .tracer import ValueTracer

__all__ = ["copied", "trace"]

_RESERVED = {*vars(torch.fx.GraphModule(nn.Module(), torch.fx.Graph())), "shape_env"}
"""Attributes of a GraphModule that are not of its class."""


def trace(model: nn.Module, example: Tensor, *, leaf_modules: tuple[type[nn.Module], ...] = ()) -> torch.fx.GraphModule:
    """Trace `model` in eval mode into a graph that computes the same for every batch size.

    torch's layers stay `call_module` under their qualified names, with what their forward hooks do around them; everything else is
    written out down to torch functions, attention included; no convolution or linear weight is hidden. Every node has its fake value in
    `node.meta["val"]` and the modules it is inside of in `node.meta["nn_module_stack"]`. Parameters and buffers keep their names (behind
    those that a graph needs itself, such as ``code``, comes a ``_``), constants that the forward makes become buffers.

    Args:
        model: any module with one tensor argument. It is copied and never changed. `DataParallel`, `DistributedDataParallel` and
            `torch.compile` wrappers are taken off.
        example: `[N, C, H, W]`, any N. Only its sizes and dtype are used. N is not fixed in the graph; H and W are where the forward
            reads them as numbers. That shows in a second trace, at about 2H x 3W: where it differs, the graph refuses images of another
            size with a `ModelError` (a test such as `if h > 1000` shows only if it turns out otherwise there). A test of the batch
            size for equality (`if n == 1`) is taken to fail; other tests of it are refused.
        leaf_modules: classes to keep whole as `call_module`, whatever they hold.

    Returns:
        The graph module, in eval mode, with the class name of the model. Its attributes `num_classes`, `pretrained_cfg` and
        `default_cfg` are the model's, where it has them.

    Raises:
        TraceError: names the module, the file and the line, and what to do.

    Warns:
        FxquantWarning: if the model is in train mode.
    """
    if not isinstance(example, Tensor) or example.dim() == 0:
        raise TraceError(
            f"the example is {_describe(example)}",
            where="example",
            fix="Pass one batch of images as a tensor [N, C, H, W], for instance torch.randn(1, 3, 224, 224)",
        )
    model = unwrap(model)
    training = next((name for name, module in model.named_modules() if module.training), None)
    if training is not None:
        part = f"{type(model).__name__}{f'.{training}' if training else ''}"
        warnings.warn(
            FxquantWarning(f"{part} is in train mode; a copy in eval mode is traced. Call model.eval() first to silence this."),
            stacklevel=2,
        )
    scripted = next((name for name, module in model.named_modules() if isinstance(module, torch.jit.ScriptModule)), None)
    if scripted is not None:
        raise TraceError(
            "is TorchScript, whose operations cannot be seen",
            where=scripted or type(model).__name__,
            fix="Use the Python module it was made from",
        )
    device = next((t.device for t in [*model.parameters(), *model.buffers()]), example.device)
    # The caller's modes are none of the graph's business.
    can_autocast = torch.amp.is_autocast_available(device.type)
    autocast = torch.autocast(device.type, enabled=False) if can_autocast else contextlib.nullcontext()
    with torch.inference_mode(False), torch.no_grad(), autocast:
        module = _trace(copied(model), example.to(device), leaf_modules)
        if example.dim() > 2 and not _holds_at_other_sizes(module, model, example.to(device), leaf_modules):
            module.graph.set_codegen(FixedSizeCode(tuple(example.shape[1:])))
            module.recompile()
    return module


def _holds_at_other_sizes(
    module: torch.fx.GraphModule, model: nn.Module, example: Tensor, leaf_modules: tuple[type[nn.Module], ...]
) -> bool:
    """Say whether images of another size and aspect, odd where the network takes that, give the same graph."""
    sizes = example.shape[2:]
    for odd in (1, 0):
        root, other = copied(model), [(2 + number) * size + odd for number, size in enumerate(sizes)]
        with warnings.catch_warnings(action="ignore"), quiet_failures():
            try:
                larger = _trace(root, example.new_empty(1).expand(1, example.shape[1], *other), leaf_modules)
            except TraceError:
                continue
        return same_operations(module, larger)
    return False


def copied(model: nn.Module) -> nn.Module:
    """Return a deep copy of `model`; tensors that were computed from parameters (as by `weight_norm`) are copied without their history.

    Raises:
        TraceError: something on it cannot be copied.
    """
    computed = (value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor) and value.grad_fn)
    try:
        return copy.deepcopy(model, {id(value): value.detach().clone() for value in computed})
    except Exception as error:
        raise TraceError(
            f"the model cannot be copied: {error}",
            where=type(model).__name__,
            fix="Remove what cannot be copied from its attributes, or build it again and load its state_dict",
        ) from error


def _trace(root: nn.Module, example: Tensor, leaf_modules: tuple[type[nn.Module], ...]) -> torch.fx.GraphModule:
    unwrap_children(root)
    root.eval()
    tracer = ValueTracer(root, leaf_modules)
    try:
        with without_fast_path():
            graph = tracer.trace(example, _input_name(root))
    except Exception as error:
        raise explain(error, tracer, example) from error
    alive = tracer.mutating
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in {"placeholder", "output"} or node in alive)
    for node in graph.find_nodes(op="call_module"):
        drop_hooks(root.get_submodule(str(node.target)))
    _rename_reserved(root, graph)
    module = torch.fx.GraphModule(root, graph, class_name=type(root).__name__)
    kept = {name: getattr(root, name) for name in KEPT_ATTRIBUTES if hasattr(root, name)}
    # Attributes under this key are the ones that a deepcopy of a GraphModule takes along.
    module.meta["_user_preserved_attributes"] = kept
    for name, value in kept.items():
        setattr(module, name, value)
    module.graph.lint()
    return module


def _rename_reserved(root: nn.Module, graph: torch.fx.Graph) -> None:
    """Put a ``_`` behind names on `root` that a GraphModule needs itself (``code``, ``graph``, ``meta``), there and in `graph`."""
    for members in (root._modules, root._parameters, root._buffers):
        for name in [name for name in members if hasattr(torch.fx.GraphModule, name) or name in _RESERVED]:
            new = next(new for new in (name + "_" * count for count in itertools.count(1)) if not hasattr(root, new))
            members[new] = members.pop(name)  # type: ignore[assignment]

            def renamed(path: str, name: str = name, new: str = new) -> str:
                return new + path[len(name) :] if path == name or path.startswith(f"{name}.") else path

            for node in graph.nodes:
                if node.op in ("call_module", "get_attr"):
                    node.target = renamed(node.target)
                if stack := node.meta.get("nn_module_stack"):
                    node.meta["nn_module_stack"] = {renamed(key): (renamed(path), kind) for key, (path, kind) in stack.items()}


def _input_name(module: nn.Module) -> str:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return next((p.name for p in inspect.signature(module.forward).parameters.values() if p.kind in kinds), "x")


def _describe(value: object) -> str:
    return "a tensor without dimensions" if isinstance(value, Tensor) else f"a {type(value).__name__}, not a tensor"
