"""What is minimized, and how it changes over the iterations; closed forms, no state.

All losses are means over images and positions, summed over channels, so that a constant of a paper means here what it means there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxquant.quantizers.learned import inner_product


def channel_loss(output: Tensor, target: Tensor, p: float = 2.0, importance: Tensor | None = None, axis: int | None = None) -> Tensor:
    """Return the mean over images and positions of the sum over channels of ``|output - target|^p``.

    Args:
        output, target: ``[N, C, ...]``, or tokens ``[N, T, C]``.
        p: exponent.
        axis: of the channels; None: the last of three, else the second.
        importance: a factor for every element, of the shape of both (BRECQ: the squared gradient of the output's KL).
    """
    if p == 2 and importance is None and not target.requires_grad:
        return SquaredError.apply(output, target) / positions(target, axis)
    error = output - target
    error = error.square() if p == 2 else error.abs().pow(p)
    if importance is not None:
        error = error * importance
    return error.sum() / positions(target, axis)


class SquaredError(torch.autograd.Function):
    """``|output - target|^2``, with a gradient for the output alone, in few passes over memory."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, target: Tensor) -> Tensor:
        """Return the sum over all elements."""
        error = output - target
        ctx.save_for_backward(error)
        return inner_product(error, error)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        """Return ``2 (output - target)`` times the gradient of the sum."""
        (error,), (gradient,) = ctx.saved_tensors, gradients
        return error * (2 * gradient).to(error.dtype), None


def positions(target: Tensor, axis: int | None = None) -> float:
    """Return images times positions: elements over channels (along `axis`; None: the last of three, else the second)."""
    if axis is None:
        axis = -1 if target.ndim == 3 else min(1, target.ndim - 1)
    return target.numel() / target.shape[axis]


def full_fisher_loss(output: Tensor, target: Tensor, gradient: Tensor) -> Tensor:
    """Return BRECQ's loss with the whole Fisher row of an image: ``mean((sum |d| g) |d| g) / 100``, d the error and g the gradient's
    size."""
    weighted = (output - target).abs() * gradient
    return (weighted.flatten(1).sum(1).view(-1, *[1] * (weighted.ndim - 1)) * weighted).mean() / 100


def prediction_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Return ``KL(softmax(teacher / T) || softmax(student / T))``, the mean over images of logits ``[N, C]``, without the factor T^2."""
    log_q, log_p = (F.log_softmax(logits.float() / temperature, 1) for logits in (student, teacher))
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def feature_loss(outputs: Sequence[Tensor], targets: Sequence[Tensor], powers: Sequence[Tensor] | None = None) -> Tensor:
    """Return the mean over places of ``|output - target|^2 / |target|^2``: each place weighs the same, whatever its scale.

    Args:
        powers: what to divide by, one a place; of a whole batch, the losses of its parts add up to its loss. None: `powers_of` the targets.
    """
    powers = powers_of(targets) if powers is None else powers
    ratios = [_power(y - t) / power.clamp_min(1e-12) for y, t, power in zip(outputs, targets, powers, strict=True)]
    return torch.stack(ratios).mean()


def feature_losses(outputs: Sequence[Tensor], targets: Sequence[Tensor], count: int) -> Tensor:
    """Return errors ``[count]``, one an image, whose mean is `feature_loss`.

    A place that has no row for each image (anchors, tokens in front) counts alike for all.
    """
    ratios = []
    for y, t, power in zip(outputs, targets, powers_of(targets), strict=True):
        apart = y.ndim > 0 and len(y) == count and y.numel() > 0
        errors = count * _power((y - t).reshape(count, -1), 1) if apart else _power(y - t).expand(count)
        ratios.append(errors / power.clamp_min(1e-12))
    return torch.stack(ratios).mean(0)


def powers_of(targets: Sequence[Tensor]) -> list[Tensor]:
    """Return ``|target|^2`` of each place."""
    return [_power(target) for target in targets]


def _power(value: Tensor, axis: int | None = None) -> Tensor:
    return torch.linalg.vector_norm(value, dim=axis, dtype=torch.promote_types(value.dtype, torch.float32)).square()


def rounding_loss(hardness: Sequence[Tensor], beta: float) -> Tensor:
    """Return ``sum(1 - |2h - 1|^beta)``: nothing where every h is 0 or 1 (AdaRound, eq. 24)."""
    return torch.stack([(1 - (2 * h - 1).abs().pow(beta)).sum() for h in hardness]).sum()


def beta_at(done: float, ends: tuple[float, float], warmup: float, shape: str = "linear") -> float | None:
    """Return the exponent of `rounding_loss` when a share `done` (0..1) of the iterations is over; None: the loss is still off.

    Args:
        ends: the exponent behind the warm-up and at the end, 20 and 2 as published.
        warmup: share of the iterations without the loss.
        shape: ``"linear"`` (BRECQ, QDrop, PD-Quant) or ``"cosine"`` (AIMET's AdaRound).
    """
    if done < warmup:
        return None
    start, end = ends
    part = (done - warmup) / (1 - warmup) if warmup < 1 else 1.0
    return end + (start - end) * (1 - part if shape == "linear" else 0.5 * (1 + math.cos(math.pi * part)))


def cosine(done: float, warmup: float = 0.0) -> float:
    """Return the factor of a rate that falls from 1 to 0 along half a cosine, behind a linear rise over the share `warmup`."""
    if done < warmup:
        return done / warmup
    return 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))


def annealed(done: float, start: float, until: float) -> float:
    """Return what falls linearly from `start` to 0 at the share `until` of the iterations, and stays there."""
    return start * max(0.0, 1 - done / until) if until > 0 else 0.0
