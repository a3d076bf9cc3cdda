"""How an intercepted torch call is written as a graph node.

Torch reports `x + y` and `x.add(y)` alike as the method `Tensor.add`. Graphs are easier to read and to match with one spelling
for both, so arithmetic becomes `call_function operator.add` as in `torch.fx.symbolic_trace`; all other methods stay
`call_method`, functions stay `call_function` and properties become `getattr`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch import Tensor

_BINARY = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
    "true_divide": operator.truediv,
    "__truediv__": operator.truediv,
    "__div__": operator.truediv,
    "__floordiv__": operator.floordiv,
    "__mod__": operator.mod,
    "remainder": operator.mod,
    "matmul": operator.matmul,
    "__matmul__": operator.matmul,
    "pow": operator.pow,
    "__pow__": operator.pow,
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "__eq__": operator.eq,
    "__ne__": operator.ne,
    "__lt__": operator.lt,
    "__le__": operator.le,
    "__gt__": operator.gt,
    "__ge__": operator.ge,
    "__and__": operator.and_,
    "__or__": operator.or_,
    "__xor__": operator.xor,
    "__getitem__": operator.getitem,
    "add_": operator.iadd,
    "sub_": operator.isub,
    "mul_": operator.imul,
    "div_": operator.itruediv,
    "__iadd__": operator.iadd,
    "__isub__": operator.isub,
    "__imul__": operator.imul,
    "__idiv__": operator.itruediv,
    "__itruediv__": operator.itruediv,
    "__ipow__": operator.ipow,
}
_REFLECTED = {
    "__radd__": operator.add,
    "__rsub__": operator.sub,
    "__rmul__": operator.mul,
    "__rdiv__": operator.truediv,
    "__rtruediv__": operator.truediv,
    "__rfloordiv__": operator.floordiv,
    "__rmod__": operator.mod,
    "__rpow__": operator.pow,
    "__rmatmul__": operator.matmul,
}
_UNARY = {"neg": operator.neg, "__neg__": operator.neg, "__invert__": operator.invert}

# The call that computes the same without writing into its first argument.
OUT_OF_PLACE: dict[Any, Callable[..., Any]] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    operator.ipow: operator.pow,
}

# By identity: x ** 2 arrives as the function Tensor.__pow__, whose own name is "pow".
_METHODS = {
    getattr(Tensor, name): name
    for name in sorted(dir(Tensor), key=lambda name: not name.startswith("__"))
    if callable(getattr(Tensor, name))
}

Call = tuple[str, Any, tuple[Any, ...], dict[str, Any]]


def as_call(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """`(op, target, args, kwargs)` of the node that records `func(*args, **kwargs)`."""
    if getattr(func, "__name__", None) == "__get__":
        return "call_function", getattr, (args[0], func.__self__.__name__), {}  # type: ignore[attr-defined]
    name = _METHODS.get(func)
    if name is None:
        return "call_function", func, args, kwargs
    if not kwargs:
        if len(args) == 1 and name in _UNARY:
            return "call_function", _UNARY[name], args, {}
        if len(args) == 2 and name in _BINARY:
            return "call_function", _BINARY[name], args, {}
        if len(args) == 2 and name in _REFLECTED:
            return "call_function", _REFLECTED[name], args[::-1], {}
        if name == "__setitem__":
            return "call_function", operator.setitem, args, {}
    return "call_method", name, args, kwargs
