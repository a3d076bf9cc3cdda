"""The output shape of a module that cannot run on fake tensors, found by running it on real ones of two batch sizes.

    f([2, 8, 7, 7]) -> [2, 49, 8]
    f([3, 8, 7, 7]) -> [3, 49, 8]        =>      f([B, 8, 7, 7]) -> [B, 49, 8]

Two sizes tell a dimension that grows with the batch from one that does not; the values in the tensors play no role.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from .values import expression, leaves, replace_leaves

_SMALL, _LARGE = 2, 3


def infer(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], batch: torch.SymInt) -> Any:
    """Fake output of `module` for fake inputs, under the current fake mode.

    Args:
        module: any module; a copy of it is run.
        args, kwargs: its fake arguments. Floating point ones are replaced by normal noise, integers and booleans by zeros.
        batch: the symbolic batch size.

    Raises:
        RuntimeError: if a size of the output is not a multiple of the batch size plus a constant.
    """
    small, large = (_run(module, args, kwargs, batch, size) for size in (_SMALL, _LARGE))
    others = iter(list(leaves(large)))

    def to_fake(value: Any) -> Any:
        other = next(others)
        if not isinstance(value, Tensor):
            return value
        sizes = [_size(a, b, batch) for a, b in zip(value.shape, other.shape, strict=True)]
        return torch.empty(sizes, dtype=value.dtype, device=value.device)

    return replace_leaves(small, to_fake)


def _run(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], batch: torch.SymInt, size: int) -> Any:
    def number(value: Any) -> Any:
        return int(expression(value).subs(expression(batch), size)) if isinstance(value, torch.SymInt) else value

    def to_real(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return number(value)
        shape = [number(n) for n in value.shape]
        real = torch.zeros(shape, dtype=value.dtype, device=value.device)
        return real.normal_(generator=torch.Generator(value.device).manual_seed(0)) if value.is_floating_point() else real

    with torch._subclasses.fake_tensor.unset_fake_temporarily():
        return copy.deepcopy(module)(*replace_leaves(args, to_real), **replace_leaves(kwargs, to_real))


def _size(small: int, large: int, batch: torch.SymInt) -> int | torch.SymInt:
    slope = (large - small) // (_LARGE - _SMALL)
    rest = small - slope * _SMALL
    if slope < 0 or rest < 0:
        raise RuntimeError(f"an output size is {small} for batch {_SMALL} and {large} for batch {_LARGE}")
    return batch * slope + rest if slope else small
