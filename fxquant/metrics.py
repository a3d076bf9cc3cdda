"""The few numbers everything is judged by: KL, agreement and top-1 on logits, signal-to-noise on tensors, standard errors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_BLOCK = 2**22  # values that are taken to float64 at a time


def kl_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Return KL(softmax(teacher) || softmax(student)) per image, in nats.

    Args:
        student: logits ``[N, C]`` of the quantized network.
        teacher: logits ``[N, C]`` of the float network.

    Returns:
        ``[N]``, non-negative, 0 where both softmaxes are equal.
    """
    log_p, log_q = F.log_softmax(teacher, 1), F.log_softmax(student, 1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)


def agreement(student: Tensor, teacher: Tensor) -> float:
    """Return the share of images, in percent, on which the arg-max of both logits ``[N, C]`` is the same."""
    return 100 * (student.argmax(1) == teacher.argmax(1)).double().mean().item()


def top1(logits: Tensor, labels: Tensor) -> float:
    """Return the share of images, in percent, whose arg-max over logits ``[N, C]`` is the label ``[N]``."""
    return 100 * (logits.argmax(1) == labels).double().mean().item()


def standard_error(difference: Tensor) -> float:
    """Return the standard error of the mean of ``[G]`` differences; of a single one, infinity."""
    return (difference.std() / len(difference) ** 0.5).item() if len(difference) > 1 else float("inf")


def exceeds(gain: Tensor, margin: float) -> bool:
    """Tell whether the mean of ``gain [G]`` is above 0 by more than `margin` standard errors; with a margin of 0, above 0 at all."""
    return gain.mean().item() > (margin * standard_error(gain) if margin else 0.0)


def sqnr(signal: Tensor, approximation: Tensor) -> float:
    """Return the signal-to-quantization-noise ratio ``10 log10(|x|^2 / |x - y|^2)`` in dB; ``inf`` where both are equal."""
    parts = zip(signal.flatten().split(_BLOCK), approximation.flatten().split(_BLOCK), strict=True)
    sums = [torch.stack([x.double().square().sum(), (x.double() - y.double()).square().sum()]) for x, y in parts]
    power, noise = torch.stack(sums).sum(0)
    return (10 * torch.log10(power / noise)).item() if noise > 0 else float("inf")
