"""The tracer: one run on fake tensors, every torch call on the way written down as a node.

Nothing stands in for a tensor. The model sees real (fake) `torch.Tensor` objects, so `isinstance`, shapes, dtypes and Python
control flow on them work as in eager mode; a `TorchFunctionMode` sees each call before it runs, runs it, and remembers which
node every resulting tensor object belongs to:

    y = F.relu(x)        relu = call_function[F.relu](node of x);   node of y := relu
    x.add_(1)            add_ = call_method[add_](node of x);       node of x := add_   (the same object, a new value)

Calls on tensors that depend on neither the input nor the model's state are not recorded: they run for real, and their results
become buffers where a recorded call reads them.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import operator
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._prims_common import suggest_memory_format
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensor
from torch.fx import Graph, Node
from torch.overrides import TorchFunctionMode

from . import opaque
from .attention import explicit_forward, explicit_functional
from .leaves import around_hooks, is_leaf
from .targets import OUT_OF_PLACE, as_call
from .values import SYMBOLIC, SizeNodes, batch_dim, expression, fake_batch, leaves, replace_leaves

# Factories whose results must not be frozen into constants.
_RANDOM = {"rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial", "rand_like", "randn_like", "dropout"}
_RANDOM |= {"uniform_", "normal_", "bernoulli_", "random_", "exponential_", "trunc_normal_"}

# Factories on a tensor of which only the dtype and the device matter: with static sizes they give a constant.
_NEW = {Tensor.new_zeros, Tensor.new_ones, Tensor.new_full, Tensor.new_empty, Tensor.new_tensor}

_NORM_DIMS: dict[type[nn.Module], tuple[int, ...]] = {nn.BatchNorm1d: (2, 3), nn.BatchNorm2d: (4,), nn.BatchNorm3d: (5,)}

_EXPLICIT: dict[Callable[..., Any], Callable[..., Any]] = {F.multi_head_attention_forward: explicit_functional}


class ValueTracer(torch.fx.Tracer):
    """Records one forward pass of `root` into a graph whose nodes know their values (`node.meta["val"]`).

    Args:
        root: the module, in eval mode. Its forward may leave tensors on it: trace a copy.
        opaque_types: classes that stay `call_module` on top of those of `leaves.is_leaf`.

    Attributes:
        mutating: nodes that write into one of their arguments. They are alive even without readers.
        batch_symbol: how torch's messages write the batch size.
    """

    def __init__(self, root: nn.Module, opaque_types: tuple[type[nn.Module], ...] = ()):
        super().__init__()
        self.root = root
        self.graph = Graph()
        self.mutating: set[Node] = set()
        self.batch_symbol = "N"
        self.submodule_paths = self._known_modules = {module: name for name, module in root.named_modules()}
        self._opaque_types = opaque_types
        self._tensors = [*root.named_parameters(), *root.named_buffers()]
        self._state = {id(tensor): name for name, tensor in self._tensors}
        self._nodes: dict[int, tuple[Tensor, Node]] = {}
        self._fakes: dict[int, tuple[Tensor, Tensor]] = {}
        self._attributes: dict[tuple[str, str], Node] = {}
        self._constants: dict[tuple[int, int], tuple[Tensor, str]] = {}
        self._storages: dict[int, set[int]] = {}
        self._sizes = SizeNodes(self._emit)
        self._in_leaf = False

    def trace(self, example: Tensor, input_name: str) -> Graph:  # type: ignore[override]
        """The graph of `root(example)`, for every batch size.

        Args:
            example: `[N, C, H, W]`; its values and N play no role.
            input_name: name of the placeholder.
        """
        self.module_stack[""] = ("", type(self.root))
        self._fake_mode, self._shapes, value = fake_batch(example)
        size: Any = value.shape[0]
        self._batch: torch.SymInt = size
        self.batch_symbol = str(expression(size))
        placeholder = self._emit("placeholder", input_name, (), value)
        self._bind(value, placeholder)
        self._near = self._last_shape = placeholder
        with _module_calls(self), _Recorder(self):
            self._shapes.in_model = True
            result = self.root._call_impl(value)
        node = self._emit("output", "output", (self.create_arg(result),), None)
        node.meta["val"] = torch.fx.map_arg(node.args[0], lambda n: n.meta["val"])
        self._restore()
        return self.graph

    def _restore(self) -> None:
        """Put back the buffers that the forward assigned: `self.calls += 1` leaves a fake tensor on the module."""
        for name, tensor in self._tensors:
            prefix, _, attribute = name.rpartition(".")
            setattr(self.root.get_submodule(prefix), attribute, tensor)

    # What happens at a call

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one intercepted torch call and record it if its result depends on the input or on the model's state."""
        if self._in_leaf:
            return func(*args, **kwargs)
        if func is Tensor.__iter__:
            return iter(self.call(Tensor.unbind, (args[0], 0), {}))
        if func in _EXPLICIT:
            with _Recorder(self):
                return _EXPLICIT[func](*args, **kwargs)
        if _name(func) in {"__get__", "size"} and id(args[0]) in self._nodes and batch_dim(self._fake(args[0])) is not None:
            self._last_shape = self._nodes[id(args[0])][1]
        if not self._is_traced(func, args, kwargs):
            return func(*args, **kwargs)
        if func in _NEW and not any(isinstance(leaf, SYMBOLIC) for leaf in leaves((args[1:], kwargs))):
            like = self._fake(args[0])
            kwargs = {"dtype": like.dtype, "device": like.device} | kwargs
            return func(torch.empty(0, dtype=like.dtype, device=like.device), *args[1:], **kwargs)
        op, target, node_args, node_kwargs = as_call(func, args, kwargs)
        try:
            return self._record(op, target, node_args, node_kwargs, functools.partial(self._run, func, args, kwargs))
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            # A value that follows from weights and buffers alone is the same in every run, so Python may see it.
            try:
                args, kwargs = replace_leaves(args, self._concrete), replace_leaves(kwargs, self._concrete)
            except _DependsOnInput:
                raise error from None
            return func(*args, **kwargs)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One node for a leaf, the nodes of its forward for any other module."""
        if self._in_leaf or m not in self._known_modules:
            return forward(*args, **kwargs)
        own_forward = type(m).forward is not nn.MultiheadAttention.forward or "forward" in vars(m)
        if isinstance(m, nn.MultiheadAttention) and not own_forward and not isinstance(m, self._opaque_types):
            forward = functools.partial(explicit_forward, m)
        elif not is_leaf(m):
            return super().call_module(m, forward, args, kwargs)
        call = functools.partial(super().call_module, m, forward)
        return around_hooks(m, lambda *args, **kwargs: call(args, kwargs), args, kwargs)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_leaf(m, self._opaque_types)

    def create_proxy(self, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *_: Any, **__: Any) -> Any:
        """Called by `torch.fx.Tracer.call_module` for leaf modules; gives a fake tensor where torch.fx gives a proxy."""
        module = self.root.get_submodule(target)
        with torch._C.DisableTorchFunction():
            return self._record(kind, target, args, kwargs, functools.partial(self._run_leaf, module, args, kwargs))

    # Running

    def _run(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with self._inside_torch():
            return func(*replace_leaves(args, self._fake), **replace_leaves(kwargs, self._fake))

    def _run_leaf(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        args, kwargs = replace_leaves(args, self._fake), replace_leaves(kwargs, self._fake)
        unknown = isinstance(module, self._opaque_types)
        # What the forward of an unknown class leaves on the module must not end up in the result.
        runnable = copy.deepcopy(module) if unknown else module
        self._in_leaf = True
        try:
            with self._inside_torch():
                try:
                    if _keeps_form(module, args, kwargs):
                        return _like(args[0])
                    return (runnable.forward if is_leaf(module) else runnable)(*args, **kwargs)  # hooks run around it
                except Exception:
                    if not unknown:
                        raise
                    return opaque.infer(module, args, kwargs, self._batch)
        finally:
            self._in_leaf = False

    @contextmanager
    def _inside_torch(self) -> Iterator[None]:
        self._shapes.in_model, before = False, self._shapes.in_model
        try:
            # Without the Python dispatcher some operations (F.pad) fix the batch size. Without suppressing guards, a comparison
            # that picks a kernel (B >= 16 in convolutions) would decide later comparisons in the model.
            with self._shapes.suppress_guards(), self._fake_mode, enable_python_dispatcher():
                yield
        finally:
            self._shapes.in_model = before

    def _fake(self, leaf: Any) -> Any:
        """The fake twin of a real tensor; anything else as it is."""
        if not isinstance(leaf, Tensor) or isinstance(leaf, FakeTensor):
            return leaf
        if id(leaf) not in self._fakes:
            self._fakes[id(leaf)] = leaf, self._fake_mode.from_tensor(leaf, static_shapes=True)
        return self._fakes[id(leaf)][1]

    def _is_traced(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        return _name(func) in _RANDOM or any(
            isinstance(leaf, (FakeTensor, *SYMBOLIC)) or (isinstance(leaf, Tensor) and (id(leaf) in self._state or id(leaf) in self._nodes))
            for leaf in leaves((args, kwargs))
        )

    def _concrete(self, leaf: Any) -> Any:
        """The real value of a tensor that follows from weights, buffers and constants alone."""
        if isinstance(leaf, SYMBOLIC):
            raise _DependsOnInput
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) not in self._nodes and not isinstance(leaf, FakeTensor):
            return leaf.detach()
        return self._evaluate(self._nodes[id(leaf)][1])

    def _evaluate(self, node: Node) -> Any:
        if node.op == "get_attr":
            return operator.attrgetter(str(node.target))(self.root).detach()
        if node.op in {"placeholder", "call_module"} or node in self.mutating:
            raise _DependsOnInput
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), self._evaluate)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    # Writing down

    def _record(self, op: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], run: Callable[[], Any]) -> Any:
        inputs = {id(leaf): (leaf, self._fake(leaf)) for leaf in leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        versions = {key: fake._version for key, (_, fake) in inputs.items()}
        result = run()
        written = [pair for key, pair in inputs.items() if pair[1]._version != versions[key]]
        if not written and not any(isinstance(leaf, Tensor) for leaf in leaves(result)):
            return result
        if target in OUT_OF_PLACE and self._is_only_name_of(*args):
            target, mutates = OUT_OF_PLACE[target], False
        else:
            mutates = bool(written)
        for tensor, fake in written:
            self._thaw(tensor, fake)
        with_batch = (self._node_of(leaf) for leaf, fake in inputs.values() if batch_dim(fake) is not None)
        self._near = next(with_batch, self._last_shape)
        node = self.create_node(op, target, self.create_arg(args), self.create_arg(kwargs))
        if mutates:
            self.mutating.add(node)
        untouched = {id(fake) for _, fake in inputs.values()} - {id(fake) for _, fake in written}
        return self._attach(result, node, untouched)

    def _attach(self, result: Any, node: Node, untouched: set[int]) -> Any:
        """Make `node` the node of `result`, and give the parts of a container nodes of their own."""
        if isinstance(result, Tensor) and id(result) in untouched:
            # An identity (dropout in eval mode, contiguous()) hands its argument back. A second object keeps the two nodes apart.
            with self._inside_torch():
                result = result.detach()
        node.meta["val"] = result
        if isinstance(result, Tensor):
            self._bind(result, node)
        elif isinstance(result, (tuple, list, dict)):
            for key, item in result.items() if isinstance(result, dict) else enumerate(result):
                if any(isinstance(leaf, Tensor) for leaf in leaves(item)):
                    self._attach(item, self._emit("call_function", operator.getitem, (node, key), item), set())
        return result

    def _bind(self, tensor: Tensor, node: Node) -> None:
        self._nodes[id(tensor)] = tensor, node
        self._storages.setdefault(_storage(self._fake(tensor)), set()).add(id(tensor))

    def _is_only_name_of(self, tensor: Any, other: Any) -> bool:
        """Whether `tensor += other` can be seen through the object `tensor` alone, so that a new tensor may take its place."""
        if not isinstance(tensor, FakeTensor) or torch.result_type(tensor, self._fake(other)) != tensor.dtype:
            return False
        computed = self._nodes[id(tensor)][1].op not in {"placeholder", "get_attr"}
        return computed and self._storages[_storage(tensor)] == {id(tensor)}

    def _thaw(self, tensor: Tensor, fake: Tensor) -> None:
        """Before a recorded call writes into a constant: continue with a fresh copy of it in every run of the graph."""
        if isinstance(tensor, FakeTensor) or id(tensor) in self._nodes or id(tensor) in self._state:
            return
        if tensor._is_view():
            raise NotImplementedError("a value that depends on the input is written into a view of a constant tensor")
        copied = self._emit("call_method", "clone", (self._node_of(tensor),), fake)
        self._bind(tensor, copied)
        self._bind(fake, copied)

    def _node_of(self, tensor: Tensor) -> Node:
        if id(tensor) in self._nodes:
            return self._nodes[id(tensor)][1]
        if id(tensor) in self._state:
            return self._attribute(self._state[id(tensor)], self._fake(tensor))
        if isinstance(tensor, FakeTensor):
            raise NotImplementedError("a tensor comes out of code that torch cannot show (TorchScript, or a compiled extension)")
        key = id(tensor), tensor._version
        if key not in self._constants:
            name = self.get_fresh_qualname("_tensor_constant")
            self.root.register_buffer(name, tensor.detach().clone())
            self._constants[key] = tensor, name
        return self._attribute(self._constants[key][1], self._fake(tensor))

    def _attribute(self, name: str, value: Tensor) -> Node:
        """One get_attr node for a tensor and a module that reads it: pieces of the graph stay independent of each other."""
        key = self.scope.module_path, name
        if key not in self._attributes:
            self._attributes[key] = self._emit("get_attr", name, (), value)
        return self._attributes[key]

    def create_arg(self, a: Any) -> Any:
        """Like `torch.fx.Tracer.create_arg`, for tensors and symbolic numbers in the place of proxies."""
        if isinstance(a, Tensor):
            return self._node_of(a)
        if isinstance(a, torch.SymBool):
            return bool(a)
        if isinstance(a, (torch.SymInt, torch.SymFloat)):
            return self._sizes.number(a, self._near)
        if isinstance(a, torch.device) and a == self._near.meta["val"].device:
            # Most likely read from a tensor: reading it again in every run lets the graph move.
            return self._emit("call_function", getattr, (self._near, "device"), a)
        if isinstance(a, torch.Size) or hasattr(a, "n_sequence_fields"):
            return tuple(self.create_arg(item) for item in a)
        if dataclasses.is_dataclass(a) and not isinstance(a, type) and not all(field.init for field in dataclasses.fields(a)):
            raise NotImplementedError(f"{type(a).__name__} has fields that it does not take when it is made, so no node can make it")
        arg = super().create_arg(a)
        if isinstance(arg, Node):  # a named tuple or dataclass is made by a call of its class
            arg.meta["val"] = a
        return arg

    def _emit(self, op: str, target: Any, args: tuple[Any, ...], value: Any) -> Node:
        node = self.create_node(op, target, args, {})
        node.meta["val"] = value
        return node


class _DependsOnInput(Exception):
    pass


class _Recorder(TorchFunctionMode):
    def __init__(self, tracer: ValueTracer):
        super().__init__()
        self._tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._tracer.call(func, args, kwargs or {})


@contextmanager
def _module_calls(tracer: ValueTracer) -> Iterator[None]:
    """Send every `module(...)` of this thread through the tracer."""
    original, owner = nn.Module.__call__, threading.get_ident()

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != owner:
            return original(module, *args, **kwargs)
        return tracer.call_module(module, module._call_impl, args, kwargs)

    nn.Module.__call__ = call  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.__call__ = original  # type: ignore[method-assign]


def _keeps_form(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Say whether `module` is a batch norm that gives a new tensor like its input; fake tensors would take it apart, at 30 ms each."""
    if type(module) not in _NORM_DIMS or "forward" in vars(module) or len(args) != 1 or kwargs or not isinstance(args[0], Tensor):
        return False
    assert isinstance(module, nn.modules.batchnorm._BatchNorm)
    mean, value = module.running_mean, args[0]
    if mean is None or module.training or module._forward_hooks or module._forward_pre_hooks or value.dim() not in _NORM_DIMS[type(module)]:
        return False
    return value.dtype == mean.dtype and value.device == mean.device and value.shape[1] == len(mean)


def _like(value: Tensor) -> Tensor:
    """Return a tensor such as elementwise operations allocate for `value`: of its shape, channels last where those are, else contiguous."""
    return torch.empty_like(value, memory_format=suggest_memory_format(value))


def _name(func: Callable[..., Any]) -> str:
    return getattr(func, "__name__", "")


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
