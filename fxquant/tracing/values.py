"""The value side of a trace: fake tensors whose batch size is a symbol, and the way back from the symbol to graph nodes.

A network is run once on fake tensors: they have shape, dtype and device but no data. The batch size is one sympy symbol `B`;
every other size is a plain integer, so Python code that looks at shapes takes the branch it would take in a real run:

    n, c, h, w = x.shape        # n is a SymInt (B), c, h and w are ints
    x.view(n * 4, c // 4, h, w)

Where a symbolic number reaches a recorded call it has to become a node again. Its expression is rebuilt from the size of a
tensor near the call (an argument of the call itself if one has a batch dimension), so that a piece cut out of the graph later
needs no scalar from far away:

    size = x.size(0);  mul = size * 4;  view = x.view(mul, 8, 7, 7)
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator
from typing import Any

import sympy
import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses import FakeTensorMode
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

# A prime that is rarely a feature, token or window count. A static size equal to it would pass for the batch size.
BATCH_HINT = 61

SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)


class BatchSpecialized(RuntimeError):
    """Python code needed the batch size as a number, which would make the graph wrong for another one."""


class DynamicBatch(ShapeEnv):
    """A shape environment that refuses, at the line of code that asks, what would tie the graph to some batch sizes.

    Torch takes a symbolic size to be two at least; what is true for that reason alone would tie the graph to more than one image.

    Attributes:
        in_model: whether Python code of the model is running, rather than a torch function. Torch may compare the batch size with
            a number to pick a kernel; when a model does, it picks what the graph computes.
    """

    in_model = False

    def evaluate_expr(self, orig_expr: sympy.Basic, *args: Any, **kwargs: Any) -> sympy.Basic:
        if orig_expr.free_symbols and isinstance(orig_expr, sympy.Expr):
            raise BatchSpecialized("Python needs the batch size as a number here (int, float, range, len, ...)")
        guards = len(self.guards)
        result = super().evaluate_expr(orig_expr, *args, **kwargs)
        wants_truth = kwargs.get("fallback_value") is None  # torch's own questions say what to answer where it is not known
        decided = len(self.guards) > guards or (wants_truth and not _holds_for_one_image(orig_expr, bool(result)))
        if self.in_model and decided and not _is_unlike_a_number(orig_expr, bool(result)):
            comparison = str(orig_expr).replace(str(*orig_expr.free_symbols), "B")
            raise BatchSpecialized(f"Python control flow compares the batch size B with a number ({comparison})")
        return result


def _holds_for_one_image(expr: sympy.Basic, result: bool) -> bool:
    """Whether `expr`, which torch knows to be `result` for batches of two and more, is that for one image, too."""
    value = expr.subs(dict.fromkeys(expr.free_symbols, 1))
    return value not in (sympy.true, sympy.false) or bool(value) == result


def _is_unlike_a_number(expr: sympy.Basic, result: bool) -> bool:
    """Whether `expr` says that the batch size is not some number: true of all sizes but one, and harmless."""
    if not isinstance(expr, sympy.Ne if result else sympy.Eq):
        return False
    return (expr.lhs - expr.rhs).is_polynomial(*expr.free_symbols)


def fake_batch(example: Tensor) -> tuple[FakeTensorMode, DynamicBatch, Tensor]:
    """A fake mode, its shape environment, and a fake `[B, C, H, W]` with the sizes, dtype and device of `example[0]`."""
    shapes = DynamicBatch(allow_scalar_outputs=False, allow_dynamic_output_shape_ops=False)
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=shapes)
    context: StatelessSymbolicContext[..., Any] = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
    batch = mode.from_tensor(torch.empty(BATCH_HINT), static_shapes=False, symbolic_context=context).shape[0]
    with mode:
        fake = torch.empty((batch, *example.shape[1:]), dtype=example.dtype, device=example.device)
    return mode, shapes, fake


def leaves(value: Any) -> Iterator[Any]:
    """Everything inside nested tuples, lists, dicts and slices, from left to right."""
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from leaves(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from leaves(item)
    elif isinstance(value, slice):
        yield from (value.start, value.stop, value.step)
    else:
        yield value


def replace_leaves(value: Any, replace: Callable[[Any], Any]) -> Any:
    """The same nest of containers with `replace` applied to everything inside. Unchanged containers keep their identity."""
    if isinstance(value, slice):
        return slice(replace(value.start), replace(value.stop), replace(value.step))
    if isinstance(value, dict):
        return {key: replace_leaves(item, replace) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        items = [replace_leaves(item, replace) for item in value]
        if all(new is old for new, old in zip(items, value, strict=True)):
            return value
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return replace(value)


def batch_dim(value: Any) -> int | None:
    """The dimension of a fake tensor that is `B`, or failing that the one that is the smallest multiple of it."""
    if not isinstance(value, Tensor):
        return None
    sizes: tuple[Any, ...] = tuple(value.shape)
    times = {i: _coefficient(expression(size)) for i, size in enumerate(sizes) if isinstance(size, torch.SymInt)}
    return min((i for i in times if times[i]), key=lambda i: (times[i], i), default=None)


def expression(number: torch.SymInt | torch.SymFloat) -> sympy.Expr:
    """The sympy expression in `B` that a symbolic number stands for."""
    return number.node.expr


def rows_of(value: Tensor) -> object:
    """Return how many rows a tensor of a traced graph has: a number, or an expression in `B`; of two that are equal, both have as many."""
    size = value.shape[0]
    return size if isinstance(size, int) else expression(size)


def _coefficient(expr: sympy.Expr) -> int:
    """c of `c * B`, or 0 for an expression of another form."""
    c, rest = expr.as_coeff_Mul()
    return int(c) if rest.is_Symbol and c.is_Integer and c > 0 else 0


_CALLS: dict[str, Callable[..., Any]] = {
    "FloorDiv": operator.floordiv,
    "CleanDiv": operator.floordiv,
    "Mod": operator.mod,
    "PythonMod": operator.mod,
    "IntTrueDiv": operator.truediv,
    "FloatTrueDiv": operator.truediv,
    "Pow": operator.pow,
    "PowByNatural": operator.pow,
    "FloatPow": operator.pow,
    "Max": max,
    "Min": min,
    "ToFloat": torch.sym_float,
}


class SizeNodes:
    """Emits the nodes that compute symbolic numbers, each expression once for a source tensor.

    Args:
        emit: `emit(op, target, args, value)` appends a node to the graph and returns it.
    """

    def __init__(self, emit: Callable[[str, Any, tuple[Any, ...], Any], Node]):
        self._emit = emit
        self._done: dict[tuple[Node, sympy.Expr], Node] = {}

    def number(self, number: torch.SymInt | torch.SymFloat, source: Node) -> Node | int | float:
        """A node with the value of `number`, computed from the batch dimension of the tensor node `source`."""
        return self._build(expression(number), source)

    def _build(self, expr: sympy.Expr, source: Node) -> Any:
        if expr.is_Integer:
            return int(expr)
        if expr.is_number:
            return float(expr)
        if (source, expr) not in self._done:
            self._done[source, expr] = self._new(expr, source)
        return self._done[source, expr]

    def _new(self, expr: sympy.Expr, source: Node) -> Node:
        value = source.meta["val"]
        for dim, size in enumerate(value.shape):
            if isinstance(size, torch.SymInt) and expression(size) == expr:
                return self._emit("call_method", "size", (source, dim), size)
        if expr.is_Symbol:
            multiple: Any = value.shape[batch_dim(value)]
            return self._call(operator.floordiv, (self._build(expression(multiple), source), _coefficient(expression(multiple))))
        if expr.is_Add or expr.is_Mul:
            join = operator.add if expr.is_Add else operator.mul
            # sympy puts the constant first; behind the size it reads as people write it.
            terms = sorted((self._build(term, source) for term in expr.args), key=lambda term: not isinstance(term, Node))
            return functools.reduce(lambda a, b: self._call(join, (a, b)), terms)
        target = _CALLS.get(type(expr).__name__)
        if target is None:
            raise NotImplementedError(f"a size computed as {expr} from the batch size cannot be written as graph nodes")
        return self._call(target, tuple(self._build(term, source) for term in expr.args))

    def _call(self, target: Callable[..., Any], args: tuple[Any, ...]) -> Node:
        values = [arg.meta["val"] if isinstance(arg, Node) else arg for arg in args]
        return self._emit("call_function", target, args, target(*values))


def insert_before(node: Node, target: Any, *args: Any) -> Node:
    """Insert into a traced graph, in front of `node` and inside the modules that it is inside of, a call with its fake value.

    Args:
        node: a node whose first argument is a tensor, which says what fake tensors the graph is made of.
        target: a function, the name of a tensor's method, or ``"get_attr"``.
        args: nodes and constants; of ``"get_attr"`` the path of a parameter or buffer.
    """
    graph, value = node.graph, node.all_input_nodes[0].meta["val"]
    mode, owner = value.fake_mode, graph.owning_module
    with graph.inserting_before(node):
        if target == "get_attr":
            new = graph.get_attr(args[0])
        else:
            new = graph.create_node("call_method" if isinstance(target, str) else "call_function", target, args)
    # As in the tracer: a comparison that picks a kernel must not decide anything about the batch size.
    with torch.no_grad(), mode.shape_env.suppress_guards(), mode, enable_python_dispatcher():
        if target == "get_attr":
            new.meta["val"] = mode.from_tensor(operator.attrgetter(args[0])(owner).detach(), static_shapes=True)
        else:
            given = torch.fx.map_arg(args, lambda parent: parent.meta["val"])
            new.meta["val"] = getattr(given[0], target)(*given[1:]) if isinstance(target, str) else target(*given)
    if "nn_module_stack" in node.meta:
        new.meta["nn_module_stack"] = node.meta["nn_module_stack"]
    return new
