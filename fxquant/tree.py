"""Tensors inside nested outputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor


def tensors_of(value: Any) -> list[Tensor]:
    """Return the tensors inside a tensor, tuple, list, mapping or dataclass, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [tensor for part in value.values() for tensor in tensors_of(part)]
    if isinstance(value, tuple | list):
        return [tensor for part in value for tensor in tensors_of(part)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [tensor for field in dataclasses.fields(value) for tensor in tensors_of(getattr(value, field.name))]
    return []


def floats_of(value: Any) -> list[Tensor]:
    """Return those of `tensors_of` that hold floats (or complex numbers), and so have errors: others are classes, indices and masks."""
    return [tensor for tensor in tensors_of(value) if tensor.is_floating_point() or tensor.is_complex()]


def is_logits(output: Any) -> bool:
    """Say whether a network's output is one tensor of logits ``[N, C]``."""
    return isinstance(output, Tensor) and output.ndim == 2 and output.is_floating_point()


def has_classes(output: Any) -> bool:
    """Say whether a network's output is logits of several classes, which have a KL: the softmax of a single one is always 1."""
    return is_logits(output) and output.shape[1] > 1
