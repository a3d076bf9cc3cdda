"""The few helpers on fx nodes that every pass uses.

They replace leaf modules and never write into one: a graph can be edited on a cheap `fork` while the original stays as it is.
"""

from __future__ import annotations

import copy
import gc
import operator
import zlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxquant.errors import ConfigError

KEPT_ATTRIBUTES = ("num_classes", "pretrained_cfg", "default_cfg")
LARGE = 2**26
"""Bytes of parameters from which on memory is worth a look for what can be freed."""


def module_of(node: Node) -> nn.Module:
    """Return the module that a ``call_module`` node calls."""
    owner = node.graph.owning_module
    assert owner is not None, "the graph has no GraphModule yet"
    return owner.get_submodule(str(node.target))


def constant_of(node: Node) -> Tensor | None:
    """Return the parameter or buffer that a ``get_attr`` node reads, else None."""
    if node.op != "get_attr":
        return None
    value: Any = node.graph.owning_module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value if isinstance(value, torch.Tensor) else None


def argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    """Return the argument of a functional `node`, however the caller passed it."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def readers(node: Node) -> list[Node]:
    """Return the nodes that read `node`, in graph order."""
    users = set(node.users)
    return [other for other in node.graph.nodes if other in users] if len(users) > 1 else list(users)


def behind(node: Node) -> set[Node]:
    """Return `node` and all that it is computed from."""
    found, todo = set[Node](), [node]
    while todo:
        current = todo.pop()
        if current not in found:
            found.add(current)
            todo += current.all_input_nodes
    return found


def is_tensor(node: Node) -> bool:
    """Say whether the traced value of `node` is one tensor (and not a tuple, a size or a device)."""
    return isinstance(node.meta.get("val"), torch.Tensor)


def is_traced(model: nn.Module) -> bool:
    """Say whether `model` is a graph whose nodes know their values, as `fxquant.trace` makes it."""
    return isinstance(model, GraphModule) and all("val" in node.meta for node in model.graph.nodes if node.op == "placeholder")


def called(gm: GraphModule) -> Iterator[tuple[Node, nn.Module]]:
    """Yield every ``call_module`` node with its module, in execution order."""
    for node in gm.graph.nodes:
        if node.op == "call_module":
            yield node, module_of(node)


def fork(gm: GraphModule) -> GraphModule:
    """Return a new GraphModule with a copy of the graph that shares the leaf modules with `gm`.

    Passes edit forks, so the original stays as it is, at the cost of a graph copy.
    """
    new = GraphModule(gm, copy.deepcopy(gm.graph), class_name=type(gm).__name__)
    new.meta = dict(gm.meta)
    for name in KEPT_ATTRIBUTES:
        if hasattr(gm, name):
            setattr(new, name, getattr(gm, name))
    return new


def deep_copy(gm: GraphModule) -> GraphModule:
    """Return a copy that shares nothing with `gm`, under the class name that ``copy.deepcopy`` forgets."""
    new = copy.deepcopy(gm)
    new.__class__.__name__ = type(gm).__name__  # each GraphModule has a class of its own
    return new


def free_unused(like: nn.Module) -> None:
    """Free GraphModules that nothing refers to any more, where they may be as large as `like`.

    Each refers to itself through its graph, so Python would keep all its weights until it next looks for such cycles, which it may not do
    for gigabytes: it counts objects. Looking takes some tenths of a second, so small networks wait.
    """
    if sum(value.nbytes for value in like.parameters()) >= LARGE:
        gc.collect()


def device_of(network: nn.Module) -> torch.device | None:
    """Return the device of the first parameter or buffer, or None when there is none."""
    return next((value.device for values in (network.parameters(), network.buffers()) for value in values), None)


def is_on_cpu(network: nn.Module) -> bool:
    """Say whether the first parameter or buffer is on the CPU, or there is none."""
    device = device_of(network)
    return device is None or device.type == "cpu"


def precision_of(network: object) -> torch.dtype:
    """Return the floating point type of the first parameter that has one, float32 when there is none."""
    values = network.parameters() if isinstance(network, nn.Module) else ()
    return next((value.dtype for value in values if value.is_floating_point()), torch.float32)


def check_same_device(teacher: GraphModule, student: GraphModule) -> None:
    """Raise ConfigError when the two graphs are on different devices."""
    theirs, mine = device_of(teacher), device_of(student)
    if theirs != mine and None not in (theirs, mine):
        raise ConfigError(
            f"the teacher is on {str(theirs)!r}, the student on {str(mine)!r}", where="device", fix="Move both to one with .to(device)"
        )


def sharing_copy(module: Any) -> Any:
    """Return a copy that shares parameters, buffers and children with `module`, but no registry: what is set on it stays on it."""
    new = copy.copy(module)
    vars(new).update({name: copy.copy(value) for name, value in vars(module).items() if isinstance(value, dict | set)})
    return new


def put_module(gm: GraphModule, path: str, module: nn.Module) -> None:
    """Set the module at the dotted `path`, replacing what is there; parents are made when missing."""
    *parents, name = path.split(".")
    owner: nn.Module = gm
    for parent in parents:
        child = getattr(owner, parent, None)
        if not isinstance(child, nn.Module):
            child = nn.Module()
            owner.add_module(parent, child)
        elif type(child) is not nn.Module:  # a leaf, shared with other graphs
            child = owner._modules[parent] = sharing_copy(child)
        owner = child
    if name in owner._modules:
        owner._modules[name] = module
    else:
        owner.add_module(name, module)


def put_constant(gm: GraphModule, path: str, value: Tensor) -> None:
    """Set the parameter or buffer at the dotted `path`; parents are made when missing."""
    owner_path, _, name = path.rpartition(".")
    if owner_path and not _exists(gm, owner_path):
        put_module(gm, owner_path, nn.Module())
    owner = gm.get_submodule(owner_path)
    if isinstance(value, nn.Parameter):
        owner.register_parameter(name, value)
    else:
        owner.register_buffer(name, value)


def quantizer_path(name: str) -> str:
    """Return where the observer, and after it the quantizer, of the tensor of the node `name` lives."""
    return f"activations.{name}" + ("_" if hasattr(nn.Module, name) else "")  # no module can be called "to"


def free_path(gm: GraphModule, path: str) -> str:
    """Return `path`, or `path` with the first number behind it that no attribute of `gm` has yet."""
    candidate, number = path, 0
    while _exists(gm, candidate):
        number += 1
        candidate = f"{path}_{number}"
    return candidate


def _exists(gm: nn.Module, path: str) -> bool:
    value: Any = gm
    for part in path.split("."):
        if not hasattr(value, part):
            return False
        value = getattr(value, part)
    return True


def insert_behind(node: Node, path: str) -> Node:
    """Insert a call of the module at `path` behind `node` and let every former reader of `node` read it."""
    users = list(node.users)
    with node.graph.inserting_after(node):
        new = node.graph.call_module(path, (node,))
    for user in users:
        user.replace_input_with(node, new)
    new.meta = {key: node.meta[key] for key in ("val", "nn_module_stack") if key in node.meta}
    return new


def bypass(node: Node, replacement: Node) -> None:
    """Let every reader of `node` read `replacement`, and erase `node`."""
    node.replace_all_uses_with(replacement)
    node.graph.erase_node(node)


def is_impure(node: Node) -> bool:
    """Say whether dropping an unread `node` would change the result: it writes into a tensor, or checks something."""
    if node.op in ("placeholder", "output"):
        return True
    if node.op == "call_method":
        name = str(node.target)
        return name.endswith("_") and not name.endswith("__")
    if node.op == "call_function":
        name = getattr(node.target, "__name__", "")
        return node.target in _WRITERS or (name.endswith("_") and not name.endswith("__")) or bool(node.kwargs.get("inplace"))
    return node.op == "call_module" and bool(getattr(module_of(node), "inplace", False))


_WRITERS = {
    operator.setitem,
    operator.iadd,
    operator.isub,
    operator.imul,
    operator.itruediv,
    torch._assert,
}


def clean(gm: GraphModule) -> GraphModule:
    """Drop unread pure nodes and unused modules, check the graph and rebuild its code."""
    gm.graph.eliminate_dead_code(is_impure)
    gm.delete_all_unused_submodules()
    gm.graph.lint()
    gm.recompile()
    return gm


def fingerprint(gm: GraphModule) -> list[str]:
    """Return one short hash a node of what it is: its op, target, arguments, and the hyper-parameters of its module.

    Two networks with equal fingerprints take the same weights; the first difference says where two architectures part.
    """
    lines = []
    for node in gm.graph.nodes:
        target = str(node.target) if isinstance(node.target, str) else torch.typename(node.target)
        module = _settings(module_of(node)) if node.op == "call_module" else ""
        lines.append(f"{zlib.crc32(f'{node.op} {target} {node.args} {node.kwargs} {module}'.encode()):08x}")
    return lines


def _settings(module: nn.Module) -> str:
    """Return class and plain attributes; not ``repr``, whose text differs between versions of torch."""
    plain = {name: value for name, value in vars(module).items() if isinstance(value, bool | int | float | str | tuple | None)}
    return f"{type(module).__name__} {sorted((name, value) for name, value in plain.items() if name[0] != '_' and name != 'training')}"
